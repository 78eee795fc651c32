"""Argument checks that the ops share; every message names the argument, what it got and what it expected."""

from __future__ import annotations

import contextlib
import math
from typing import Any, TypeVar

import torch
from torch import Tensor

FLOATING = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
INT32_MAX = 2**31 - 1
PLAIN_TENSORS = (Tensor, torch.nn.Parameter)
Signature = tuple[object, ...] | None
MOST_REMEMBERED = 4096  # signatures of an op: lengths that grow call by call are without end
_NOTHING = contextlib.nullcontext()
T = TypeVar("T")
_C: Any = torch._C  # whose stubs lack some of what is read below


def shape_of(t: Tensor) -> str:
    return str(tuple(t.shape))


def concrete(size: int) -> int:
    """``size`` itself; torch.compile specialises on it, where int() would leave it symbolic."""
    return len(range(size))


def device_type(t: Tensor) -> str:
    """``t.device.type``, five times as fast where it matters."""
    return "cpu" if t.is_cpu else t.device.type


def own_precision(t: Tensor) -> contextlib.AbstractContextManager[Any]:
    """Where torch.autocast is off: an op computes in the dtype it was given, whatever serves it."""
    kind = device_type(t)
    if kind in ("cpu", "cuda") and torch.is_autocast_enabled(kind):
        return torch.autocast(kind, enabled=False)
    return _NOTHING


def differ_under_autocast(*tensors: object) -> torch.dtype | None:
    """The dtype of torch.autocast, if it is on and the tensors have several: a rotary embedding in float32
    makes q and k wider than v, which is a projection's output as it is.
    """
    dtypes = {t.dtype for t in tensors if isinstance(t, Tensor)}
    first = tensors[0]
    if len(dtypes) < 2 or torch.float64 in dtypes or not isinstance(first, Tensor):
        return None
    kind = device_type(first)
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None


def needs_autograd(*tensors: Tensor | None) -> bool:
    """Whether a call has to pass through autograd; forward mode is refused there, not dropped.

    Under torch.func, too, whatever the tensors say: vmap hides that a gradient is asked for outside of it.
    """
    if torch.autograd.forward_ad._current_level >= 0:
        return True
    if torch.is_grad_enabled():
        if _C._functorch.peek_interpreter_stack() is not None:
            return True
        for t in tensors:  # any() of a generator takes several times as long
            if t is not None and t.requires_grad:
                return True
    return False


def signature(*tensors: object) -> Signature:
    """Everything about the tensors that the checks of an op read, to be remembered once they have passed.

    None where a call has to go through the dispatcher, whatever it was before: under torch.compile and
    jit.trace, whose sizes are no numbers, and with tensor subclasses and lazy negations.
    """
    if torch.compiler.is_compiling() or _C._get_tracing_state() is not None:
        return None
    parts: list[object] = []
    for t in tensors:
        if t is None:
            parts.append(None)
        elif type(t) in PLAIN_TENSORS and not t.is_neg():  # type: ignore[attr-defined]
            parts += (t.shape, t.stride(), t.dtype, t.device)  # type: ignore[attr-defined]
        else:
            return None
    return tuple(parts)


def remember(passed: set[Signature], seen: Signature) -> None:
    """Notes that tensors of this signature have passed an op's checks, slower than a small kernel."""
    if seen is not None:
        if len(passed) >= MOST_REMEMBERED:
            passed.clear()
        passed.add(seen)


def watched() -> bool:
    """Whether something around a call has to see it as an operator: a mode, functorch or the profiler. Where
    nothing has, going past the dispatcher saves as much time as a small kernel takes.
    """
    return (
        _C._len_torch_dispatch_stack() > 0
        or _C._len_torch_function_stack() > 0
        or _C._functorch.peek_interpreter_stack() is not None
        or torch.autograd._profiler_enabled()
    )


def check_indices(
    name: str, t: Tensor | None, batch: int, q: Tensor, axes: str = "(batch)", like: str = "q"
) -> None:
    """None, or an int32 tensor with an entry or a row for every sequence, on q's device, contiguous."""
    check_optional(name, t, axes)
    if t is None:
        return
    if t.dtype != torch.int32 or t.dim() != axes.count(",") + 1 or t.shape[0] != batch:
        raise ValueError(f"{name}: got {t.dtype} {shape_of(t)}, expected torch.int32 {axes}, batch {batch}")
    if t.device != q.device:
        raise ValueError(f"{name}: got device {t.device}, expected {q.device} like {like}")
    if not t.is_contiguous():
        raise ValueError(f"{name}: got strides {t.stride()}, expected contiguous")


def check_per_head(name: str, t: Tensor | None, batch: int, heads: int, batched: bool, q: Tensor) -> None:
    """None, or floats (heads), or with ``batched`` (batch, heads)."""
    check_optional(name, t, f"({heads},)")
    if t is None:
        return
    shapes = ((heads,), (batch, heads)) if batched else ((heads,),)
    if tuple(t.shape) not in shapes:
        raise ValueError(f"{name}: got shape {shape_of(t)}, expected {' or '.join(map(str, shapes))}")
    if not t.dtype.is_floating_point:
        raise TypeError(f"{name}: got dtype {t.dtype}, expected float32")
    if t.device != q.device:
        raise ValueError(f"{name}: got device {t.device}, expected {q.device} like q")


def check_softcap(softcap: float) -> None:
    """0, or of a size that fp32 arithmetic can divide by and multiply with."""
    if check_number("softcap", softcap, 0, math.inf) != 0 and not 1e-30 <= softcap <= 1e30:
        raise ValueError(f"softcap: got {softcap}, expected 0 (off) or 1e-30 to 1e30")


def check_optional(name: str, value: object, axes: str) -> None:
    """A tensor or None; a TypeError if not."""
    if value is not None and not isinstance(value, Tensor):
        raise TypeError(f"{name}: got {type(value).__name__}, expected a torch.Tensor {axes} or None")


def check_number(name: str, value: object, low: float, high: float) -> float:
    """A number with low <= value < high; a TypeError or ValueError if not."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name}: got {type(value).__name__}, expected a float")
    if not low <= value < high:
        raise ValueError(f"{name}: got {value}, expected {low:g} <= {name} < {high:g}")
    return float(value)


def check_dropout(dropout_p: float, rng_state: Tensor | None, like: Tensor) -> Tensor | None:
    """Checks both; returns the state, drawn from torch's generator if none was given, None if p is 0."""
    device = like.device
    check_number("dropout_p", dropout_p, 0, 1)
    check_optional("rng_state", rng_state, "(2)")
    if not dropout_p:
        return None
    if rng_state is None:
        if hasattr(like, "device_mesh"):
            raise ValueError(
                "rng_state: got None with DTensors, expected a replicated DTensor, int64 (2): seed and "
                "offset, of which each rank would draw its own"
            )
        return torch.randint(2**31, (2,), device=device, dtype=torch.int64)
    if tuple(rng_state.shape) != (2,) or rng_state.dtype != torch.int64 or rng_state.device != device:
        raise ValueError(
            f"rng_state: got {rng_state.dtype} {shape_of(rng_state)} on {rng_state.device}, "
            f"expected int64 (2,) on {device}: seed and offset"
        )
    return rng_state


def check_tensor(name: str, value: object, axes: str, dtypes: tuple[torch.dtype, ...] = FLOATING) -> None:
    """A tensor of one of the dtypes with as many dimensions as ``axes`` names, unit last stride."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name}: got {type(value).__name__}, expected a torch.Tensor {axes}")
    ndim = axes.count(",") + 1
    if value.dim() != ndim:
        raise ValueError(f"{name}: got shape {shape_of(value)}, expected {ndim} dimensions {axes}")
    if value.dtype not in dtypes:
        expected = ", ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
        raise TypeError(f"{name}: got dtype {value.dtype}, expected one of {expected}")
    if value.stride(-1) != 1 and value.shape[-1] > 1:
        raise ValueError(
            f"{name}: got strides {value.stride()}, expected the last one to be 1; call .contiguous() on it"
        )


def unit_rows(t: T) -> T:
    """With unit stride of the last axis, as :func:`check_tensor` wants it: a copy where it has another."""
    if isinstance(t, Tensor) and t.dim() and t.stride(-1) != 1 and t.shape[-1] > 1:
        return t.contiguous()  # type: ignore[return-value]  # a tensor
    return t


def check_same(name: str, value: Tensor, other: Tensor, like: str = "q") -> None:
    if value.dtype != other.dtype:
        raise TypeError(f"{name}: got dtype {value.dtype}, expected {other.dtype} like {like}")
    if value.device != other.device:
        raise ValueError(f"{name}: got device {value.device}, expected {other.device} like {like}")


Q = "(batch, seqlen, nheads, headdim)"
K = "(batch, seqlen, nheads_k, headdim)"
V = "(batch, seqlen, nheads_k, headdim_v)"
PACKED = "(total, nheads, headdim)", "(total, nheads_k, headdim)", "(total, nheads_k, headdim_v)"


QUANTIZED = (torch.int8, torch.float8_e4m3fn)


def check_qkv(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    packed: bool,
    names: tuple[str, str, str] = ("q", "k", "v"),
    caches: bool = False,
    own_batch: bool = False,
) -> None:
    """Ranks, dtypes, devices, strides and the sizes that must agree; a ValueError or TypeError if not.

    With ``caches``, k and v may also be of a dtype of QUANTIZED; with ``own_batch`` their first axis is not
    q's batch.
    """
    qn, kn, vn = names
    q_axes, k_axes, v_axes = PACKED if packed else (Q, K, V)
    check_tensor(qn, q, q_axes)
    dtypes = FLOATING + QUANTIZED if caches else FLOATING
    check_tensor(kn, k, k_axes, dtypes)
    check_tensor(vn, v, v_axes, dtypes)
    if k.dtype not in QUANTIZED:
        check_same(kn, k, q)
        check_same(vn, v, q)
    elif v.dtype != k.dtype:
        raise TypeError(f"{vn}: got dtype {v.dtype}, expected {k.dtype} like {kn}")
    elif not k.device == v.device == q.device:
        raise ValueError(f"{kn}, {vn}: got devices {k.device} and {v.device}, expected {q.device} like q")
    (*q_lead, nheads, headdim), (*k_lead, nheads_k, headdim_k) = q.shape, k.shape
    *v_lead, nheads_v, headdim_v = v.shape
    if headdim < 1 or headdim_v < 1:
        raise ValueError(f"{qn}, {vn}: got headdims {headdim} and {headdim_v}, expected at least 1")
    if headdim_k != headdim:
        raise ValueError(f"{kn}: got headdim {headdim_k}, expected {headdim} like {qn}")
    if v_lead != k_lead or nheads_v != nheads_k:
        raise ValueError(
            f"{vn}: got shape {shape_of(v)}, expected {shape_of(k[..., 0])[:-1]}, headdim_v) like {kn}"
        )
    if nheads_k < 1 or nheads % nheads_k != 0:
        raise ValueError(f"{kn}: got {nheads_k} heads, expected a divisor of the {nheads} heads of {qn}")
    if not packed and not own_batch and k_lead[0] != q_lead[0]:
        raise ValueError(f"{kn}: got batch {k_lead[0]}, expected {q_lead[0]} like {qn}")
    if torch.compiler.is_compiling():
        return  # the bound would become a guard on every dynamic length
    for name, tokens in ((qn, q_lead[-1]), (kn, k_lead[-1])):
        if tokens > INT32_MAX:
            raise ValueError(f"{name}: got {tokens} tokens, expected at most {INT32_MAX}")


def check_scale(softmax_scale: float | None, headdim: int) -> float:
    if softmax_scale is None:
        return concrete(headdim) ** -0.5
    if isinstance(softmax_scale, bool) or not isinstance(softmax_scale, (int, float)):
        raise TypeError(f"softmax_scale: got {type(softmax_scale).__name__}, expected a float or None")
    if not -math.inf < softmax_scale < math.inf:
        raise ValueError(f"softmax_scale: got {softmax_scale}, expected a finite number")
    return float(softmax_scale)


def check_window(causal: bool, window_size: tuple[int, int]) -> tuple[int, int]:
    """(left, right), with causal folded in: right = 0, whatever was given."""
    if not isinstance(causal, bool):
        raise TypeError(f"causal: got {causal!r}, expected True or False")
    if not isinstance(window_size, (tuple, list)) or len(window_size) != 2:
        raise TypeError(f"window_size: got {window_size!r}, expected (left, right)")
    for size in window_size:
        if isinstance(size, bool) or not isinstance(size, int):
            raise TypeError(f"window_size: got {window_size!r}, expected two integers")
        if not -1 <= size <= INT32_MAX:
            raise ValueError(f"window_size: got {tuple(window_size)}, expected −1 (unlimited) to {INT32_MAX}")
    left, right = window_size
    return left, 0 if causal else right
