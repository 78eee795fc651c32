"""What a block of a transformer computes for a few rows on the CPU, without gradients: a token of generation.

At every token each weight is read once, and memory's rate is the limit: of the products (:func:`linear`) and,
where nothing comes between them, of an MLP (:func:`mlp`), an attention (:func:`attention`) or both
(:func:`block`) as one call. Everything else, and every other backend, is somebody else's: these return None.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from fastgpt import dispatch
from fastgpt.ops.checks import needs_autograd, watched
from fastgpt.ops.few_rows.spec import Attention, Cache, Mlp, Projection, Rotary


class Limits(NamedTuple):
    """Where the kernel was measured to be the faster way, or as fast (docs/log.md)."""

    most_rows: int
    least_weight: int  # elements, of a product by itself


LIMITS = {
    torch.float32: Limits(8, 1 << 18),
    torch.bfloat16: Limits(6, 1 << 14),
    torch.float16: Limits(8, 1 << 16),
}


def served(backend: str | None = None) -> bool:
    """Whether the backend asked for, or ``auto``, is the CPU's kernels, and they are here."""
    return dispatch.requested(backend) in ("auto", "cpu") and dispatch.unavailable("cpu") is None


def serves_weight(weight: Tensor) -> bool:
    """Whether :func:`linear` takes this weight, for some rows."""
    limits = LIMITS.get(weight.dtype)
    return limits is not None and weight.is_cpu and weight.numel() >= limits.least_weight


def are_few(x: Tensor) -> bool:
    """Whether x (..., in_features) is of as many rows as are served, of a dtype that is."""
    limits = LIMITS.get(x.dtype)
    return limits is not None and 0 < x.dim() <= 4 and 0 < x.numel() <= limits.most_rows * x.shape[-1]


def _takes(x: Tensor, others: Callable[[], Iterable[Tensor | None]], backend: str | None) -> bool:
    """Whether x (..., in_features) has few rows, and nothing has to see or to differentiate the call. Whether
    the operands are as the kernels read them, these say themselves.
    """
    # What costs least and refuses most comes first: a whole call takes as long as a small product.
    if torch.compiler.is_compiling() or torch._C._get_tracing_state() is not None:
        return False
    if type(x) is not Tensor or not are_few(x) or watched() or torch.is_autocast_enabled("cpu"):
        return False
    tracked = torch.is_grad_enabled() or torch.autograd.forward_ad._current_level >= 0
    return not (tracked and needs_autograd(x, *others())) and served(backend)


def linear(
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
    if not _takes(x, lambda: (weight, bias), backend) or weight.dim() != 2:
        return None
    if weight.numel() < LIMITS[x.dtype].least_weight:
        return None
    out: Tensor | None = dispatch.implementation("few_rows", "cpu").linear(
        x, Projection(weight, bias), transposed
    )
    return out


def _tensors(spec: object) -> Iterator[Tensor]:
    """All that are in a tuple, and in the tuples in it."""
    if isinstance(spec, Tensor):
        yield spec
    elif isinstance(spec, tuple):
        for part in spec:
            yield from _tensors(part)


def mlp(x: Tensor, spec: Mlp, backend: str | None = None) -> Tensor | None:
    """An MLP of x (..., in_features), by the steps of ``spec``, each rounded to x's dtype.

    Returns:
        (..., out_features), contiguous; or None, as :func:`linear`, weights of any size being taken.
    """
    if not _takes(x, lambda: _tensors(spec), backend):
        return None
    out: Tensor | None = dispatch.implementation("few_rows", "cpu").mlp(x, spec)
    return out


def attention(
    x: Tensor, spec: Attention, rotary: Rotary | None, cache: Cache, backend: str | None = None
) -> Tensor | None:
    """The attention of a block for new tokens x (batch, seqlen, in_features), by the steps of ``spec``, each
    rounded to x's dtype. The cache is appended to; counting what it holds is the caller's.

    Returns:
        (batch, seqlen, out_features), contiguous; or None, as :func:`linear`, weights of any size being
        taken, also where the tokens have no room in the cache: then it is as it was.
    """
    if not _int32(cache.seqlens) or not _takes(x, lambda: _tensors((spec, rotary, cache)), backend):
        return None
    out: Tensor | None = dispatch.implementation("few_rows", "cpu").attention(x, spec, rotary, cache)
    return out


def block(
    x: Tensor, first: Attention, rotary: Rotary | None, cache: Cache, second: Mlp, backend: str | None = None
) -> Tensor | None:
    """``mlp(attention(x, first, rotary, cache), second)``, both or neither."""
    operands = first, rotary, cache, second
    if not _int32(cache.seqlens) or not _takes(x, lambda: _tensors(operands), backend):
        return None
    out: Tensor | None = dispatch.implementation("few_rows", "cpu").block(x, *operands)
    return out


def _int32(lengths: int | Tensor) -> bool:
    return isinstance(lengths, int) or lengths.dtype == torch.int32
