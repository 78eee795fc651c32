"""What torch ships for each workload: the other side of every ratio.

Called the way torch's own documentation calls it, on the very tensors that fastgpt gets.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


def window_mask(seqlen: int, left: int, device: str) -> Tensor:
    """(seqlen, seqlen) bool for a causal window; scaled_dot_product_attention knows no cheaper way."""
    ones = torch.ones(seqlen, seqlen, dtype=torch.bool, device=device)
    return ones.tril_().logical_and_(torch.ones_like(ones).triu_(-left))


def attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    """Causal attention of (batch, seqlen, nheads, headdim); ``mask`` replaces the causal one."""
    out = F.scaled_dot_product_attention(
        q.transpose(1, 2),
        k.transpose(1, 2),
        v.transpose(1, 2),
        attn_mask=mask,
        is_causal=mask is None,
        enable_gqa=q.shape[2] != k.shape[2],
    )
    return out.transpose(1, 2)


def attention_repeated(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    """The same with a copy of k and v for each query head, as transformers does it without enable_gqa."""
    groups = q.shape[2] // k.shape[2]
    return attention(q, k.repeat_interleave(groups, dim=2), v.repeat_interleave(groups, dim=2), mask)


def decode(q: Tensor, k_cache: Tensor, v_cache: Tensor, keys: int) -> Tensor:
    """One query per sequence over the first ``keys`` of fastgpt's cache, all of which it sees."""
    out = F.scaled_dot_product_attention(
        q.transpose(1, 2),
        k_cache[:, :keys].transpose(1, 2),
        v_cache[:, :keys].transpose(1, 2),
        enable_gqa=q.shape[2] != k_cache.shape[2],
    )
    return out.transpose(1, 2)


def decode_grouped(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The same over keys and values laid out (batch, nheads_k, keys, headdim), as transformers caches them.

    The query heads of a group stand as the queries of one head, which is the same sum where no key is
    hidden; on the CPU this is several times as fast as enable_gqa.
    """
    batch, _, nheads, headdim = q.shape
    out = F.scaled_dot_product_attention(q.view(batch, k.shape[1], -1, headdim), k, v)
    return out.view(batch, 1, nheads, headdim)


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    return F.layer_norm(x, x.shape[-1:], weight, bias, eps)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return F.rms_norm(x, x.shape[-1:], weight, eps)


def forced(function: Callable[..., Any], backend: str) -> Callable[..., Any]:
    """``function`` with one of torch's kernels for scaled_dot_product_attention; raises where it cannot."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    def run(*tensors: Tensor) -> Any:
        with sdpa_kernel(getattr(SDPBackend, backend)):
            return function(*tensors)

    return run


FORCED = {
    "flash": "FLASH_ATTENTION",
    "cuDNN": "CUDNN_ATTENTION",
    "efficient": "EFFICIENT_ATTENTION",
    "math": "MATH",
}


def flex_attention(seqlen: int, window: int, device: str) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """Causal attention of (batch, seqlen, nheads, headdim) by FlexAttention, compiled; window -1 for none."""
    from torch.nn.attention.flex_attention import create_block_mask
    from torch.nn.attention.flex_attention import flex_attention as flex

    def visible(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return (i >= j) & (i - j <= window) if window >= 0 else i >= j

    mask = create_block_mask(visible, None, None, seqlen, seqlen, device=device)
    compiled = torch.compile(flex, dynamic=False)

    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))
        return compiled(q, k, v, block_mask=mask, enable_gqa=q.shape[1] != k.shape[1]).transpose(1, 2)

    return run


def flex_decode() -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """Of one query (batch, 1, nheads, headdim) per sequence over (batch, nheads_k, keys, headdim)."""
    from torch.nn.attention.flex_attention import flex_attention as flex

    compiled = torch.compile(flex, dynamic=False)

    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return compiled(q.transpose(1, 2), k, v, enable_gqa=q.shape[2] != k.shape[1]).transpose(1, 2)

    return run


def compiled_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Causal attention as it is defined, for torch.compile."""
    k, v = (t.repeat_interleave(q.shape[2] // k.shape[2], dim=2) for t in (k, v))
    scores = torch.einsum("bihd,bjhd->bhij", q, k) * q.shape[-1] ** -0.5
    i = torch.arange(q.shape[1], device=q.device)
    scores = scores.masked_fill(i[:, None] < i, -torch.inf)
    return torch.einsum("bhij,bjhd->bihd", torch.softmax(scores, dim=-1), v)


@functools.cache
def empty_launch() -> Callable[[], object]:
    """A launch by Triton of a kernel that does nothing."""
    import triton

    @triton.jit
    def nothing() -> None:
        pass

    return lambda: nothing[(1,)]()
