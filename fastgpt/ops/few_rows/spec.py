"""What is computed for a few rows, a token's at every step of generation.

csrc/cpu/few_rows.h reads these tuples field by field, and checks them.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

ACTIVATIONS = ("silu", "gelu_tanh")


class Projection(NamedTuple):
    """``x weightᵀ + bias``; weight (out_features, in_features), bias (out_features) or None."""

    weight: Tensor
    bias: Tensor | None = None


class Norm(NamedTuple):
    """Layer or RMS norm of rows; weight, bias (in_features) or None."""

    rms: bool
    eps: float
    weight: Tensor | None
    bias: Tensor | None = None


class HeadNorm(NamedTuple):
    """RMS norm of each head: weight (headdim)."""

    weight: Tensor
    eps: float


class Mlp(NamedTuple):
    """``down(activation(up(x)))``; gated ``down(activation(gate(x)) · up(x))`` (Shazeer 2020,
    arXiv:2002.05202).

    up: the one projection, or that of the gate and that of up; gate's outputs are the first half of theirs.
    transposed: the weights are (in_features, out_features), as GPT-2's.
    norm: if there is one, ``x +`` the same of norm(x).
    """

    up: tuple[Projection, ...]
    down: Projection
    gated: bool
    activation: str  # of ACTIVATIONS
    transposed: bool = False
    norm: Norm | None = None


class Attention(NamedTuple):
    """Causal attention of new tokens over a KV cache, with what stands around it in a block.

    ``q, k, v = qkv(x)`` by one projection or three, head by head; ``q = rotary(q_norm(q))`` and k alike, v as
    it is; k and v are appended, q attends (``ops/decode/spec.py`` says how), and ``out`` projects all heads.
    With a norm, ``x +`` the same of norm(x).
    """

    qkv: tuple[Projection, ...]
    out: Projection
    softmax_scale: float
    window_left: int = -1
    softcap: float = 0.0
    q_norm: HeadNorm | None = None
    k_norm: HeadNorm | None = None
    transposed: bool = False
    norm: Norm | None = None


class Rotary(NamedTuple):
    """Of each new token: a head's halves (x1, x2) become ``(x1 cos1 − x2 sin1, x2 cos2 + x1 sin2)``.

    cos, sin: (batch or 1, seqlen, columns), columns headdim, cos1 and cos2 side by side, or headdim / 2 where
    both halves have the same.
    """

    cos: Tensor
    sin: Tensor


class Cache(NamedTuple):
    """k, v: (batch, capacity, nheads_k, headdim), written behind what they hold: ``seqlens`` tokens, of all
    sequences or (batch), int32, of each. key_ranges: (batch, ..., 2), int32: of each sequence its first key,
    and one past the last new one; None for all keys.
    """

    k: Tensor
    v: Tensor
    seqlens: int | Tensor
    key_ranges: Tensor | None = None
