"""``flash_attn.layers.rotary``: rotary embedding (Su et al. 2021, arXiv:2104.09864)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fastgpt.ops.rotary.api import rotary_embedding


def apply_rotary_emb(
    x: Tensor,
    cos: Tensor,
    sin: Tensor,
    interleaved: bool = False,
    inplace: bool = False,
    seqlen_offsets: int | Tensor = 0,
    cu_seqlens: Tensor | None = None,
    max_seqlen: int | None = None,
) -> Tensor:
    """:func:`fastgpt.rotary_embedding` under flash-attn's name, with its defaults: halves, not neighbours.

    Args:
        x: (batch, seqlen, nheads, headdim) or, with cu_seqlens, (total, nheads, headdim).
        cos, sin: (positions, rotary_dim / 2).
        inplace: x itself is turned and returned.
        max_seqlen: not read.

    Raises:
        RuntimeError: an argument is not as :func:`fastgpt.rotary_embedding` wants it; the message names it.
    """
    try:
        out = rotary_embedding(
            x if x.stride(-1) == 1 else x.contiguous(),
            cos,
            sin,
            interleaved=interleaved,
            seqlen_offsets=seqlen_offsets,
            cu_seqlens=cu_seqlens,
        )
    except (TypeError, ValueError) as error:
        raise RuntimeError(str(error)) from error
    return x.copy_(out) if inplace else out


apply_rotary_emb_func = apply_rotary_emb


def apply_rotary_emb_qkv_(
    qkv: Tensor,
    cos: Tensor,
    sin: Tensor,
    cos_k: Tensor | None = None,
    sin_k: Tensor | None = None,
    interleaved: bool = False,
    seqlen_offsets: int | Tensor = 0,
    num_heads_q: int | None = None,
) -> Tensor:
    """Turns q and k of qkv (batch, seqlen, 3, nheads, headdim), or (batch, seqlen, num_heads_q + 2 nheads_k,
    headdim), in place; k by cos_k and sin_k, where they are given."""
    if qkv.dim() == 5:
        q, k = qkv[:, :, 0], qkv[:, :, 1]
    elif num_heads_q is None:
        raise RuntimeError(
            "num_heads_q: got None, expected how many heads of qkv (batch, seqlen, heads, ...) are q's"
        )
    else:
        q, k = qkv[:, :, :num_heads_q], qkv[:, :, num_heads_q : (num_heads_q + qkv.shape[2]) // 2]
    apply_rotary_emb(q, cos, sin, interleaved, True, seqlen_offsets)
    if cos_k is not None and sin_k is not None:
        cos, sin = cos_k, sin_k
    apply_rotary_emb(k, cos, sin, interleaved, True, seqlen_offsets)
    return qkv


def apply_rotary_emb_kv_(
    kv: Tensor, cos: Tensor, sin: Tensor, interleaved: bool = False, seqlen_offsets: int | Tensor = 0
) -> Tensor:
    """Turns k of kv (batch, seqlen, 2, nheads, headdim) in place."""
    apply_rotary_emb(kv[:, :, 0], cos, sin, interleaved, True, seqlen_offsets)
    return kv


class RotaryEmbedding(nn.Module):
    """The tables of rotary embedding, grown as sequences do, and what applies them.

    Args:
        dim: how many elements of a head are turned.
        base: the slowest pair turns by ``base ** (2 / dim − 1)`` radians a position.
        interleaved: pairs are neighbours; else halves.
        scale_base: q and k are scaled by powers of ``(i + 0.4 dim) / 1.4 dim``, one of them by the inverse
            (XPos, Sun et al. 2022, arXiv:2212.10554); None for none.
    """

    inv_freq: Tensor
    scale: Tensor | None

    def __init__(
        self,
        dim: int,
        base: float = 10000.0,
        interleaved: bool = False,
        scale_base: float | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        self.dim, self.base, self.interleaved, self.scale_base = dim, float(base), interleaved, scale_base
        inv_freq, scale = self._frequencies(device)
        self.register_buffer("inv_freq", inv_freq, persistent=False)
        self.register_buffer("scale", None if scale_base is None else scale, persistent=False)
        self._tables: tuple[Tensor, ...] = ()  # cos and sin of q, then of k

    def _frequencies(self, device: torch.device | str | None) -> tuple[Tensor, Tensor]:
        even = torch.arange(0, self.dim, 2, device=device, dtype=torch.float32)
        return 1.0 / self.base ** (even / self.dim), (even + 0.4 * self.dim) / (1.4 * self.dim)

    def _grown(self, seqlen: int, like: Tensor) -> tuple[Tensor, ...]:
        if known := self._tables[:1]:
            cos = known[0]
            fits = len(cos) >= seqlen and (cos.device, cos.dtype) == (like.device, like.dtype)
            if fits and not (self.training and cos.is_inference()):
                return self._tables
        # In fp32, whatever the module's buffers are in: positions are large.
        inv_freq, scale = self._frequencies(like.device)
        position = torch.arange(seqlen, device=like.device, dtype=torch.float32)
        angles = torch.outer(position, inv_freq)
        cos, sin = angles.cos(), angles.sin()
        tables = (cos, sin, cos, sin)
        if self.scale_base is not None:
            scale = scale ** ((position - seqlen // 2) / self.scale_base)[:, None]
            tables = (cos * scale, sin * scale, cos / scale, sin / scale)
        self._tables = tuple(t.to(like.dtype) for t in tables)
        return self._tables

    def forward(
        self,
        qkv: Tensor,
        kv: Tensor | None = None,
        seqlen_offset: int | Tensor = 0,
        max_seqlen: int | None = None,
        num_heads_q: int | None = None,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Turns q and k in place.

        Args:
            qkv: (batch, seqlen, 3, nheads, headdim) or, with num_heads_q, (batch, seqlen, heads, headdim); q
                (batch, seqlen, nheads, headdim) with kv (batch, seqlen, 2, nheads_k, headdim).
            seqlen_offset: the position of the first token: an int, or (batch), int32, with max_seqlen.
        """
        seqlen = max_seqlen
        if seqlen is None:
            if isinstance(seqlen_offset, Tensor):
                raise RuntimeError(
                    "max_seqlen: got None, expected the last position + 1 where offsets are a tensor"
                )
            seqlen = qkv.shape[1] + seqlen_offset
        q_cos, q_sin, k_cos, k_sin = self._grown(seqlen, qkv)
        if kv is None:
            return apply_rotary_emb_qkv_(
                qkv, q_cos, q_sin, k_cos, k_sin, self.interleaved, seqlen_offset, num_heads_q
            )
        q = apply_rotary_emb(qkv, q_cos, q_sin, self.interleaved, True, seqlen_offset)
        return q, apply_rotary_emb_kv_(kv, k_cos, k_sin, self.interleaved, seqlen_offset)
