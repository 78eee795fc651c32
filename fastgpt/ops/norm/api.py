"""``fastgpt.layer_norm`` and ``fastgpt.rms_norm``."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fastgpt import dispatch
from fastgpt.ops import checks
from fastgpt.ops.norm import library
from fastgpt.ops.norm.spec import FEATURES, NormCall, NormSpec
from fastgpt.ops.norm.torch import composite

_passed: set[checks.Signature] = set()


def _check_rows(name: str, value: object) -> None:
    if not isinstance(value, Tensor):
        raise TypeError(f"{name}: got {type(value).__name__}, expected a torch.Tensor (..., hidden)")
    if value.dim() < 1 or value.shape[-1] < 1:
        raise ValueError(
            f"{name}: got shape {checks.shape_of(value)}, expected (..., hidden) with hidden >= 1"
        )
    if value.dtype not in checks.FLOATING:
        raise TypeError(f"{name}: got dtype {value.dtype}, expected float32, bfloat16, float16 or float64")
    if value.stride(-1) != 1 and value.shape[-1] > 1:
        raise ValueError(
            f"{name}: got strides {value.stride()}, expected the last one to be 1; call .contiguous() on it"
        )


def _check_residual(residual: Tensor, x: Tensor) -> None:
    _check_rows("residual", residual)
    if residual.shape != x.shape:
        raise ValueError(
            f"residual: got shape {checks.shape_of(residual)}, expected {checks.shape_of(x)} like x"
        )
    if residual.dtype != x.dtype:
        raise TypeError(f"residual: got dtype {residual.dtype}, expected {x.dtype} like x")
    if residual.device != x.device:
        raise ValueError(f"residual: got device {residual.device}, expected {x.device} like x")


def _check_parameter(name: str, value: object, x: Tensor) -> None:
    if not isinstance(value, Tensor):
        raise TypeError(f"{name}: got {type(value).__name__}, expected a torch.Tensor (hidden) or None")
    if value.shape != x.shape[-1:]:
        raise ValueError(
            f"{name}: got shape {checks.shape_of(value)}, expected ({x.shape[-1]},), the hidden of x"
        )
    if value.dtype not in (x.dtype, torch.float32):
        raise TypeError(f"{name}: got dtype {value.dtype}, expected {x.dtype} like x, or torch.float32")
    if value.device != x.device:
        raise ValueError(f"{name}: got device {value.device}, expected {x.device} like x")
    if value.stride(0) != 1 and value.shape[0] > 1:
        raise ValueError(f"{name}: got stride {value.stride(0)}, expected 1; call .contiguous() on it")


def _check_eps(eps: float) -> None:
    if isinstance(eps, bool) or not isinstance(eps, (int, float)):
        raise TypeError(f"eps: got {type(eps).__name__}, expected a float")
    if not 0 <= eps < math.inf:
        raise ValueError(f"eps: got {eps}, expected a finite number that is not negative")


def _check_tensors(x: Tensor, weight: Tensor | None, bias: Tensor | None, residual: Tensor | None) -> None:
    _check_rows("x", x)
    if residual is not None:
        _check_residual(residual, x)
    if weight is not None:
        _check_parameter("weight", weight, x)
    if bias is not None:
        _check_parameter("bias", bias, x)
        if weight is not None and bias.dtype != weight.dtype:
            raise TypeError(f"bias: got dtype {bias.dtype}, expected {weight.dtype} like weight")


def _run(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    rms: bool,
    eps: float,
    residual: Tensor | None,
    prenorm: bool,
    dropout_p: float,
    rng_state: Tensor | None,
    backend: str | None,
) -> Tensor | tuple[Tensor, Tensor]:
    signature = checks.signature(x, weight, bias, residual, rng_state)
    if signature is None or signature not in _passed:
        if residual is not None and checks.differ_under_autocast(x, residual) is not None:
            # As x + residual would be: there, a projection's output is narrower than the residual stream.
            wide = torch.promote_types(x.dtype, residual.dtype)
            x, residual = x.to(wide), residual.to(wide)
            signature = checks.signature(x, weight, bias, residual, rng_state)
        _check_tensors(x, weight, bias, residual)
        checks.remember(_passed, signature)
    _check_eps(eps)
    if not isinstance(prenorm, bool):
        raise TypeError(f"prenorm: got {prenorm!r}, expected True or False")
    if type(dropout_p) is not float or dropout_p != 0 or rng_state is not None:
        rng_state = checks.check_dropout(dropout_p, rng_state, x)
    spec = NormSpec(rms, eps, float(dropout_p))

    inputs = (x, residual, weight, bias)
    backward = checks.needs_autograd(*inputs)
    parameter = weight if weight is not None else bias
    uses = (
        rms,
        weight is not None,
        bias is not None,
        parameter is not None and parameter.dtype != x.dtype,
        residual is not None,
        rng_state is not None,
        backward,
    )
    asked = dispatch.requested(backend)
    name = dispatch.choose(asked, NormCall, FEATURES, uses, checks.device_type(x), x.dtype)
    if name == "torch":
        with checks.own_precision(x):
            out, residual_out = composite(*inputs, spec)
        return (out, residual_out) if prenorm else out
    if name == "reference":
        dispatch.warn_if_slow(asked, "norm", x.numel(), stacklevel=4)
    direct = not (signature is None or backward or checks.watched())
    out, z = library.run(direct, *inputs, rng_state, prenorm or backward, *spec, name)
    if prenorm:
        return out, x if z is None or (residual is None and rng_state is None) else z
    return out


def layer_norm(
    x: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    *,
    residual: Tensor | None = None,
    prenorm: bool = False,
    dropout_p: float = 0.0,
    rng_state: Tensor | None = None,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Layer norm over the last axis, with optional dropout and residual addition before it (Ba et al. 2016).

    ``z = dropout(x) + residual``, ``out = (z − mean(z)) / sqrt(var(z) + eps) · weight + bias``, var being
    that of the population and ``dropout(x) = x · keep / (1 − dropout_p)``. Statistics and the gradients of
    weight and bias accumulate in float32 (float64 for float64 tensors). ``z`` is rounded to x's dtype, and
    everything after it is computed from the rounded sum, as in ``layer_norm(x + residual)``: forward and
    backward see the same rows.

    DTensors sharded by any axis but the last are computed where they are, the gradients of weight and bias
    being partial sums; with dropout DTensor gathers them first. Under torch.func.vmap the samples are rows of
    one call; each is a call where it has a weight of its own, or the gradient of a weight is asked for.

    Args:
        x: (..., hidden); float32, bfloat16, float16, or float64 on ``reference`` and ``torch``. Any strides
            whose last is 1: rows at a uniform distance are read in place, other layouts are copied first.
        weight: (hidden), in x's dtype or float32; None = 1.
        bias: (hidden), in weight's dtype; None = 0.
        eps: added to the variance.
        residual: of x's shape and dtype, added to x, after its dropout, before the norm. Under torch.autocast
            its dtype may be another: both are taken in the wider one.
        prenorm: also return the sum z (x itself without a residual and dropout), the next block's residual.
        dropout_p: probability of dropping an element of x. The residual is not dropped.
        rng_state: (2), int64: Philox seed and offset of the dropout; drawn from torch's generator if None.
            Which elements are kept is a function of it, row and column alone (:class:`NormSpec`), so what
            is given twice drops twice the same.
        backend: ``auto``, ``cpu``, ``torch``, ``reference``, ``triton`` or ``cuda``; default
            ``FASTGPT_BACKEND``, else ``auto``.

    Returns:
        out, contiguous, of x's shape and dtype; with ``prenorm`` the pair (out, residual_out).

    Raises:
        ValueError, TypeError: an argument is not as above; the message names it.
        fastgpt.BackendUnsupported: the backend asked for cannot serve the call; the message says why.
    """
    return _run(x, weight, bias, False, eps, residual, prenorm, dropout_p, rng_state, backend)


def rms_norm(
    x: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    *,
    residual: Tensor | None = None,
    prenorm: bool = False,
    dropout_p: float = 0.0,
    rng_state: Tensor | None = None,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """RMS norm over the last axis, with optional dropout and residual addition before it.

    ``z = dropout(x) + residual``, ``out = z / sqrt(mean(z²) + eps) · weight + bias`` (Zhang & Sennrich 2019).
    Everything else is as in :func:`layer_norm`; ``eps`` is added to the mean square.
    """
    return _run(x, weight, bias, True, eps, residual, prenorm, dropout_p, rng_state, backend)
