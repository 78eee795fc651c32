"""Attention over a KV cache as it is defined, in eager PyTorch: the oracle of every other backend.

Computes in fp64 for fp64 tensors and in fp32 otherwise.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastgpt.ops.decode.spec import DecodeCall, DecodeSpec, DecodeTensors


def unsupported(call: DecodeCall) -> list[str]:
    return []


def accumulator(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def rotate(x: Tensor, positions: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
    """Rotary embedding (Su et al. 2021, arXiv:2104.09864) of x (batch, seqlen, heads, dim) in x's dtype."""
    acc = accumulator(x.dtype)
    cos, sin = (t[positions].to(acc).unsqueeze(2) for t in (cos, sin))  # (batch, seqlen, 1, rotary_dim / 2)
    rotated, rest = x.to(acc).split((2 * cos.shape[-1], x.shape[-1] - 2 * cos.shape[-1]), -1)
    x1, x2 = (rotated[..., ::2], rotated[..., 1::2]) if interleaved else rotated.chunk(2, -1)
    y1, y2 = x1 * cos - x2 * sin, x2 * cos + x1 * sin
    y = torch.stack((y1, y2), -1).flatten(-2) if interleaved else torch.cat((y1, y2), -1)
    return torch.cat((y, rest), -1).to(x.dtype)


def _rows(cache: Tensor, tensors: DecodeTensors, rows: Tensor) -> tuple[Tensor, Tensor]:
    """Where rows (batch, n) of each sequence lie in a cache: indices of its first two axes."""
    if tensors.block_table is not None:
        page = cache.shape[1]
        return tensors.block_table.long().gather(1, rows // page), rows % page
    sequence = tensors.cache_batch_idx
    if sequence is None:
        sequence = torch.arange(rows.shape[0], device=rows.device)
    return sequence.long()[:, None].expand_as(rows), rows


def _scale(descale: Tensor | None, acc: torch.dtype) -> Tensor | int:
    """k_descale or v_descale, to be multiplied with (batch, seqlen, nheads_k, dim)."""
    return 1 if descale is None else descale.to(acc).view(-1, 1, descale.shape[-1], 1)


def _append(cache: Tensor, new: Tensor, descale: Tensor | None, tensors: DecodeTensors) -> None:
    """Writes new (batch, seqlen_new, nheads_k, dim) behind the keys that each sequence has."""
    rows = tensors.cache_seqlens.long()[:, None] + torch.arange(new.shape[1], device=new.device)
    if descale is not None:
        scaled = new.float() / _scale(descale, torch.float32)
        limit = 127.0 if cache.dtype == torch.int8 else torch.finfo(cache.dtype).max
        new = (scaled.round() if cache.dtype == torch.int8 else scaled).clamp(-limit, limit)
    cache[_rows(cache, tensors, rows)] = new.to(cache.dtype)


def forward(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, spec: DecodeSpec, tensors: DecodeTensors
) -> tuple[Tensor, Tensor]:
    """out (batch, seqlen_q, nheads, headdim_v) in q's dtype; lse (batch, nheads, seqlen_q)."""
    (batch, sq, nheads, _), nheads_k, device = q.shape, k_cache.shape[2], q.device
    acc = accumulator(q.dtype)
    pads = tensors.cache_leftpad
    pads = torch.zeros(batch, dtype=torch.int64, device=device) if pads is None else pads.long()
    lengths = tensors.cache_seqlens.long() - pads
    if tensors.k is not None and tensors.v is not None:
        k, v, seqlen_new = tensors.k, tensors.v, tensors.k.shape[1]
        if tensors.rotary_cos is not None and tensors.rotary_sin is not None:
            tables = tensors.rotary_cos, tensors.rotary_sin, spec.rotary_interleaved
            first = tensors.cache_seqlens.long()[:, None]
            k = rotate(k, first + torch.arange(seqlen_new, device=device), *tables)
            step = 1 if spec.window_left >= 0 or spec.window_right >= 0 else 0
            q = rotate(q, first + step * torch.arange(sq, device=device), *tables)
        _append(k_cache, k, tensors.k_descale, tensors)
        _append(v_cache, v, tensors.v_descale, tensors)
        lengths = lengths + seqlen_new

    # Every sequence's keys, gathered; behind them the cache may hold anything, NaN too.
    capacity = k_cache.shape[1] * (1 if tensors.block_table is None else tensors.block_table.shape[1])
    j = torch.arange(capacity, device=device)
    written = j < lengths[:, None]  # (batch, capacity)
    rows = (j + pads[:, None]).masked_fill(~written, 0)

    def gather(cache: Tensor, descale: Tensor | None) -> Tensor:
        # A block table's unused entries may be anything as well.
        first, second = (t.masked_fill(~written, 0) for t in _rows(cache, tensors, rows))
        gathered = cache.to(acc)[first, second] * _scale(descale, acc)
        return gathered.masked_fill(~written[..., None, None], 0).repeat_interleave(nheads // nheads_k, dim=2)

    lengths = lengths[:, None, None]
    i = torch.arange(sq, device=device)[:, None] + lengths - sq
    visible = written[:, None].expand(-1, sq, -1)  # (batch, sq, capacity)
    if spec.window_left >= 0:
        visible = visible & (j >= i - spec.window_left)
    if spec.window_right >= 0:
        visible = visible & (j <= i + spec.window_right)

    s = torch.einsum("bihd,bjhd->bhij", q.to(acc), gather(k_cache, tensors.k_descale)) * spec.softmax_scale
    if spec.softcap:
        s = spec.softcap * torch.tanh(s / spec.softcap)
    if tensors.alibi_slopes is not None:
        slopes = tensors.alibi_slopes.to(acc).expand(batch, nheads)
        s = s - slopes[:, :, None, None] * (i - j).abs()[:, None]
    s = s.masked_fill(~visible[:, None], -torch.inf)
    # The sink is a key with value 0. Not exp(s − lse), where log(n) is lost in the rounding of a large lse.
    sink = s.new_full((), -torch.inf) if tensors.sink is None else tensors.sink.to(acc)[:, None, None]
    s = torch.cat((s, sink.expand(*s.shape[:-1], 1)), -1)
    m = s.amax(-1, keepdim=True)
    m = m.masked_fill(m == -torch.inf, 0)
    e = torch.exp(s - m)
    total = e.sum(-1, keepdim=True)
    p = (e / total.masked_fill(total == 0, 1))[..., :-1]
    out = torch.einsum("bhij,bjhd->bihd", p, gather(v_cache, tensors.v_descale))
    return out.to(q.dtype), (m + total.log()).squeeze(-1)
