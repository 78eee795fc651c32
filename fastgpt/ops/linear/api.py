"""``F.linear`` of a few rows on the CPU, without gradients: most of a token's time in generation.

Everything else, and every other backend, is torch's own.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from fastgpt import dispatch
from fastgpt.ops.checks import PLAIN_TENSORS, needs_autograd, watched


class Limits(NamedTuple):
    """Where the kernel was measured to be the faster way, or as fast (docs/log.md)."""

    most_rows: int
    least_weight: int  # elements


LIMITS = {
    torch.float32: Limits(8, 1 << 18),
    torch.bfloat16: Limits(6, 1 << 14),
    torch.float16: Limits(8, 1 << 16),
}


def serves_few_rows(weight: Tensor, backend: str | None = None) -> bool:
    """Whether :func:`linear_of_few_rows` takes this weight, for some rows."""
    asked = dispatch.requested(backend)
    kernels = asked in ("auto", "cpu") and dispatch.unavailable("cpu") is None
    served = LIMITS.get(weight.dtype)
    return kernels and served is not None and weight.is_cpu and weight.numel() >= served.least_weight


def linear_of_few_rows(
    x: Tensor, weight: Tensor, bias: Tensor | None, transposed: bool = False, backend: str | None = None
) -> Tensor | None:
    """``F.linear(x, weight, bias)`` at the speed at which memory is read, where the CPU's kernels have it.

    Args:
        x: (..., in_features).
        weight: (out_features, in_features); with ``transposed`` (in_features, out_features), as GPT-2's
            projections have it.
        bias: (out_features), or None.
        backend: default ``FASTGPT_BACKEND``, else ``auto``.

    Returns:
        (..., out_features), contiguous, the same bits for any number of threads and of rows; or None where
        torch has to compute it, or does as fast (:class:`Limits`): gradients, torch.compile, other devices
        and dtypes, several dtypes, a weight that is not contiguous or no plain tensor, autocast, other
        backends.
    """
    # What costs least and refuses most comes first: a whole call takes as long as a small product.
    if torch.compiler.is_compiling() or torch._C._get_tracing_state() is not None:
        return None
    if type(x) is not Tensor or type(weight) not in PLAIN_TENSORS or not (x.is_cpu and weight.is_cpu):
        return None
    dtype, served = weight.dtype, LIMITS.get(weight.dtype)
    if x.dtype != dtype or served is None or x.is_nested or weight.is_nested:
        return None
    if x.layout != torch.strided or weight.layout != torch.strided or x.dim() == 0 or weight.dim() != 2:
        return None
    out_features, in_features = weight.shape
    if transposed:
        out_features, in_features = in_features, out_features
    if x.shape[-1] != in_features or not weight.is_contiguous():
        return None
    if not 0 < x.numel() <= served.most_rows * in_features or not out_features:
        return None
    if bias is not None and not (
        type(bias) in PLAIN_TENSORS
        and bias.is_cpu
        and bias.dtype == dtype
        and bias.shape == (out_features,)
        and bias.is_contiguous()
        and not bias.is_neg()
    ):
        return None
    if x.is_neg() or weight.is_neg() or needs_autograd(x, weight, bias) or watched():
        return None
    if torch.is_autocast_enabled("cpu") or not serves_few_rows(weight, backend):
        return None
    out: Tensor = dispatch.implementation("linear", "cpu").forward(x, weight, bias, transposed)
    return out
