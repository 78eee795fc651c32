"""Attention over a KV cache as it is defined, in eager PyTorch: the oracle of every other backend.

Computes in fp64 for fp64 tensors and in fp32 otherwise.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastgpt.ops.decode.spec import DecodeCall, DecodeSpec


def unsupported(call: DecodeCall) -> list[str]:
    return []


def append(cache: Tensor, new: Tensor, cache_seqlens: Tensor) -> None:
    """Writes new (batch, seqlen_new, nheads_k, dim) behind the keys that each sequence has."""
    batch, seqlen_new = new.shape[:2]
    rows = torch.arange(batch, device=new.device)[:, None]
    positions = cache_seqlens.long()[:, None] + torch.arange(seqlen_new, device=new.device)
    cache[rows, positions] = new


def forward(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    k: Tensor | None,
    v: Tensor | None,
    cache_seqlens: Tensor,
    spec: DecodeSpec,
) -> tuple[Tensor, Tensor]:
    """out (batch, seqlen_q, nheads, headdim_v) in q's dtype; lse (batch, nheads, seqlen_q)."""
    lengths = cache_seqlens.long()
    if k is not None and v is not None:
        append(k_cache, k, cache_seqlens)
        append(v_cache, v, cache_seqlens)
        lengths = lengths + k.shape[1]
    acc = torch.float64 if q.dtype == torch.float64 else torch.float32
    (_, sq, nheads, _), (_, capacity, nheads_k, _) = q.shape, k_cache.shape

    lengths = lengths[:, None, None]
    i = torch.arange(sq, device=q.device)[:, None] + lengths - sq
    j = torch.arange(capacity, device=q.device)[None, None, :]
    visible = (j < lengths).expand(-1, sq, -1)  # (batch, sq, capacity)
    if spec.window_left >= 0:
        visible = visible & (j >= i - spec.window_left)
    if spec.window_right >= 0:
        visible = visible & (j <= i + spec.window_right)

    # Behind a sequence's keys the cache may hold anything, NaN too, which 0 · NaN would let through.
    written = (j < lengths).view(-1, capacity, 1, 1)
    keys = k_cache.masked_fill(~written, 0).to(acc).repeat_interleave(nheads // nheads_k, dim=2)
    values = v_cache.masked_fill(~written, 0).to(acc).repeat_interleave(nheads // nheads_k, dim=2)
    s = torch.einsum("bihd,bjhd->bhij", q.to(acc), keys) * spec.softmax_scale
    s = s.masked_fill(~visible[:, None], -torch.inf)
    lse = torch.logsumexp(s, dim=-1)
    p = torch.exp(s - lse.masked_fill(lse == -torch.inf, 0)[..., None])
    return torch.einsum("bhij,bjhd->bihd", p, values).to(q.dtype), lse
