"""Attention as it is defined, in eager PyTorch: the oracle of every other backend.

Computes in fp64 for fp64 tensors and in fp32 otherwise, and materialises the (seqlen_q, seqlen_k)
matrix of scores.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from fastgpt.ops import philox
from fastgpt.ops.attention.spec import AttentionCall, AttentionSpec, AttentionTensors


def unsupported(call: AttentionCall) -> list[str]:
    return []


def accumulator(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def visible(sq: int, sk: int, spec: AttentionSpec, device: torch.device) -> Tensor:
    """(sq, sk) bool: which keys a query sees."""
    i = torch.arange(sq, device=device)[:, None] + (sk - sq)
    j = torch.arange(sk, device=device)[None, :]
    mask = torch.ones(sq, sk, dtype=torch.bool, device=device)
    if spec.window_left >= 0:
        mask &= j >= i - spec.window_left
    if spec.window_right >= 0:
        mask &= j <= i + spec.window_right
    return mask


def philox_keep(rng_state: Tensor, dropout_p: float, shape: tuple[int, ...], first_batch: int = 0) -> Tensor:
    """Of ``shape`` (batch, nheads, sq, sk), bool: which probabilities dropout keeps.

    A pure function of seed, offset, batch, head, i and j. Philox4x32-10 (Salmon et al. 2011) with
    key = the 64 bits of the seed and counter = (j >> 2, i, batch · nheads + head, offset); lane
    j & 3 of its four outputs is kept iff it is at least dropout_p · 2^32. The offset counts mod 2^32.
    """
    (batch, nheads, sq, sk), device = shape, rng_state.device
    blocks = (sk + 3) // 4
    c0 = torch.arange(blocks, device=device).view(1, 1, blocks)
    c1 = torch.arange(sq, device=device).view(1, sq, 1)
    c2 = (torch.arange(batch * nheads, device=device) + first_batch * nheads).view(-1, 1, 1)
    kept = philox.keep(rng_state, dropout_p, c0, c1, c2)
    return kept.view(batch, nheads, sq, 4 * blocks)[..., :sk]


def _scores(q: Tensor, k: Tensor, spec: AttentionSpec, tensors: AttentionTensors) -> tuple[Tensor, Tensor]:
    """Scores (batch, nheads, sq, sk), −inf where a key is not visible; and softmax_scale · q·k."""
    acc = accumulator(q.dtype)
    (batch, sq, nheads, _), sk = q.shape, k.shape[1]
    k = k.repeat_interleave(nheads // k.shape[2], dim=2)
    x = torch.einsum("bihd,bjhd->bhij", q.to(acc), k.to(acc)) * spec.softmax_scale
    s = spec.softcap * torch.tanh(x / spec.softcap) if spec.softcap else x
    if tensors.alibi_slopes is not None:
        i = torch.arange(sq, device=q.device)[:, None] + (sk - sq)
        distance = (i - torch.arange(sk, device=q.device)[None, :]).abs()
        slopes = tensors.alibi_slopes.to(acc).expand(batch, nheads)
        s = s - slopes[:, :, None, None] * distance
    bias = tensors.attn_bias
    if bias is not None and bias.dtype != torch.bool:
        s = s + bias.to(acc)
    s = s.masked_fill(~visible(sq, sk, spec, q.device), -torch.inf)
    if bias is not None and bias.dtype == torch.bool:
        s = s.masked_fill(~bias, -torch.inf)
    return s, x


def _softmax(s: Tensor, sink: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """The probabilities, 0 in rows that see no key; the sink's; and lse.

    Not exp(s − lse): of a row with scores of 1e30, lse is one of them, log(n) being lost in its rounding.
    """
    column = s.new_full((), -torch.inf) if sink is None else sink.to(s.dtype)[:, None, None]
    s = torch.cat((s, column.expand(*s.shape[:-1], 1)), -1)  # the sink is a key with value 0
    m = s.amax(-1, keepdim=True)
    m = m.masked_fill(m == -torch.inf, 0)
    e = torch.exp(s - m)
    total = e.sum(-1, keepdim=True)
    p = e / total.masked_fill(total == 0, 1)
    return p[..., :-1], p[..., -1], (m + total.log()).squeeze(-1)


def _probabilities(s: Tensor, sink: Tensor | None, lse: Tensor) -> tuple[Tensor, Tensor]:
    """exp(s − lse) and exp(sink − lse), by the softmax of s: lse may be that of more keys than these."""
    p, p_sink, own = _softmax(s, sink)
    factor = torch.exp((own - lse).masked_fill(own == lse, 0))  # of infinities, too
    return p * factor[..., None], p_sink * factor


def _keep_factor(
    p: Tensor, spec: AttentionSpec, tensors: AttentionTensors, first_batch: int
) -> Tensor | None:
    """What dropout multiplies a probability by: 0 or 1 / (1 − dropout_p)."""
    if not spec.dropout_p:
        return None
    assert tensors.rng_state is not None
    keep = philox_keep(tensors.rng_state, spec.dropout_p, p.shape, first_batch)
    return keep.to(p.dtype) / (1 - spec.dropout_p)


def signed_probabilities(
    q: Tensor, k: Tensor, lse: Tensor, spec: AttentionSpec, tensors: AttentionTensors, first_batch: int = 0
) -> Tensor:
    """(batch, nheads, sq, sk): the probabilities, negative where dropout drops them."""
    p, _ = _probabilities(_scores(q, k, spec, tensors)[0], tensors.sink, lse)
    if not spec.dropout_p:
        return p
    assert tensors.rng_state is not None
    return torch.where(philox_keep(tensors.rng_state, spec.dropout_p, p.shape, first_batch), p, -p)


def _forward_dense(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    spec: AttentionSpec,
    tensors: AttentionTensors,
    first_batch: int = 0,
) -> tuple[Tensor, Tensor]:
    acc = accumulator(q.dtype)
    s, _ = _scores(q, k, spec, tensors)
    p, _, lse = _softmax(s, tensors.sink)
    factor = _keep_factor(p, spec, tensors, first_batch)
    if factor is not None:
        p = p * factor
    v = v.repeat_interleave(q.shape[2] // v.shape[2], dim=2)
    out = torch.einsum("bhij,bjhd->bihd", p, v.to(acc))
    return out.to(q.dtype), lse


def _backward_dense(
    dout: Tensor,
    dlse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    bias_gradient: bool,
    spec: AttentionSpec,
    tensors: AttentionTensors,
    first_batch: int = 0,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None]:
    acc = accumulator(q.dtype)
    nheads_k = k.shape[2]
    group = q.shape[2] // nheads_k
    dout, lse = dout.to(acc), lse.to(acc)
    s, x = _scores(q, k, spec, tensors)
    p, p_sink = _probabilities(s, tensors.sink, lse)
    factor = _keep_factor(p, spec, tensors, first_batch)
    # out = P V, so dV = Pᵀ dout and dP = dout Vᵀ.
    dropped = p if factor is None else p * factor
    dv = torch.einsum("bhij,bihd->bjhd", dropped, dout)
    dp = torch.einsum("bihd,bjhd->bhij", dout, v.repeat_interleave(group, dim=2).to(acc))
    if factor is not None:
        dp = dp * factor
    # P = exp(s − lse) with d lse/d s = P: ds = P (dP − delta), delta = Σ_d dout · out − dlse.
    delta = torch.einsum("bihd,bihd->bhi", dout, out.to(acc))
    if dlse is not None:
        delta = delta - dlse.to(acc)
    ds = p * (dp - delta[..., None])
    dsink = dbias = None
    if tensors.sink is not None:
        # The sink's value is 0, so its dP is 0.
        dsink = -(p_sink * delta).sum((0, 2)).to(tensors.sink.dtype)
    if tensors.attn_bias is not None and bias_gradient:
        dbias = ds.sum_to_size(tensors.attn_bias.shape).to(tensors.attn_bias.dtype)
    if spec.softcap:
        ds = ds * (1 - torch.tanh(x / spec.softcap) ** 2)  # d softcap(x) / dx
    ds = ds * spec.softmax_scale
    dq = torch.einsum("bhij,bjhd->bihd", ds, k.repeat_interleave(group, dim=2).to(acc))
    dk = torch.einsum("bhij,bihd->bjhd", ds, q.to(acc))
    dk, dv = (t.unflatten(2, (nheads_k, group)).sum(3) for t in (dk, dv))
    return dq.to(q.dtype), dk.to(k.dtype), dv.to(v.dtype), dsink, dbias


class _Sequence(NamedTuple):
    """One sequence of a call whose sequences differ: where its rows are, and its optional tensors."""

    queries: slice | int  # of q's leading axis, in lse of its last (packed) or first
    keys: slice | tuple[int, slice]
    bias: tuple[slice, ...]  # its part of attn_bias
    tensors: AttentionTensors


def _sequences(q: Tensor, k: Tensor, tensors: AttentionTensors) -> Iterator[_Sequence]:
    edges_q, edges_k = tensors.cu_seqlens_q, tensors.cu_seqlens_k
    packed = edges_q is not None and edges_k is not None
    for b in range(edges_q.shape[0] - 1 if edges_q is not None else q.shape[0]):
        first, end = (0, k.shape[1]) if edges_k is None else edges_k[b : b + 2].tolist()
        used = end - first if tensors.seqused_k is None else int(tensors.seqused_k[b])
        pad = 0 if tensors.leftpad_k is None else int(tensors.leftpad_k[b])
        of_k = slice(first + pad, first + used)
        slopes, bias = tensors.alibi_slopes, tensors.attn_bias
        if slopes is not None and slopes.dim() == 2:
            slopes = slopes[b : b + 1]
        of_bias: tuple[slice, ...] = ()
        if bias is not None:
            own = slice(b, b + 1) if bias.shape[0] > 1 else slice(None)
            of_bias = (own, slice(None), slice(None), of_k if bias.shape[3] > 1 else slice(None))
            bias = bias[of_bias]
        queries = slice(int(edges_q[b]), int(edges_q[b + 1])) if edges_q is not None else b
        yield _Sequence(
            queries,
            of_k if packed else (b, of_k),
            of_bias,
            tensors._replace(alibi_slopes=slopes, attn_bias=bias),
        )


def _lse_of(lse: Tensor, sequence: _Sequence) -> Tensor:
    """Its (nheads, seqlen_q) part of lse."""
    return lse[sequence.queries] if isinstance(sequence.queries, int) else lse[:, sequence.queries]


def forward(
    q: Tensor, k: Tensor, v: Tensor, spec: AttentionSpec, tensors: AttentionTensors
) -> tuple[Tensor, Tensor]:
    """out, in q's layout and dtype; lse (batch, nheads, seqlen_q), or (nheads, total_q) if packed."""
    if not spec.varlen and not spec.key_ranges:
        return _forward_dense(q, k, v, spec, tensors)
    out = q.new_zeros(*q.shape[:-1], v.shape[-1])
    lse_shape = (q.shape[1], q.shape[0]) if spec.varlen else (q.shape[0], q.shape[2], q.shape[1])
    lse = q.new_zeros(lse_shape, dtype=accumulator(q.dtype))
    for b, s in enumerate(_sequences(q, k, tensors)):
        own = q[s.queries][None], k[s.keys][None], v[s.keys][None]
        out_b, lse_b = _forward_dense(*own, spec, s.tensors, b)
        out[s.queries] = out_b[0]
        _lse_of(lse, s).copy_(lse_b[0])
    return out, lse


def backward(
    dout: Tensor,
    dlse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    bias_gradient: bool,
    spec: AttentionSpec,
    tensors: AttentionTensors,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None]:
    """Gradients of q, k, v, sink and, if asked for, attn_bias (None where there is none)."""
    if not spec.varlen and not spec.key_ranges:
        return _backward_dense(dout, dlse, q, k, v, out, lse, bias_gradient, spec, tensors)
    dq, dk, dv = torch.zeros_like(q), torch.zeros_like(k), torch.zeros_like(v)
    dsink = None if tensors.sink is None else torch.zeros_like(tensors.sink)
    bias = tensors.attn_bias
    dbias = torch.zeros_like(bias) if bias is not None and bias_gradient else None
    for b, s in enumerate(_sequences(q, k, tensors)):
        dq_b, dk_b, dv_b, dsink_b, dbias_b = _backward_dense(
            dout[s.queries][None],
            None if dlse is None else _lse_of(dlse, s)[None],
            q[s.queries][None],
            k[s.keys][None],
            v[s.keys][None],
            out[s.queries][None],
            _lse_of(lse, s)[None],
            bias_gradient,
            spec,
            s.tensors,
            b,
        )
        dq[s.queries], dk[s.keys], dv[s.keys] = dq_b[0], dk_b[0], dv_b[0]
        if dsink is not None and dsink_b is not None:
            dsink += dsink_b
        if dbias is not None and dbias_b is not None:
            dbias[s.bias] += dbias_b
    return dq, dk, dv, dsink, dbias
