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
    """Layer or RMS norm of rows; weight, bias (hidden) or None; the weight counts as ``weight +
    weight_offset``."""

    rms: bool
    eps: float
    weight: Tensor | None
    bias: Tensor | None = None
    weight_offset: float = 0.0


class Around(NamedTuple):
    """What stands around half a block f: ``x + after(f(before(x)))``."""

    before: Norm | None
    after: Norm | None = None


class Mlp(NamedTuple):
    """``down(activation(up(x)))``; gated ``down(activation(gate(x)) · up(x))`` (Shazeer 2020,
    arXiv:2002.05202).

    up: the one projection, or that of the gate and that of up; gate's outputs are the first half of theirs.
    transposed: the weights are (in_features, out_features), as GPT-2's.
    """

    up: tuple[Projection, ...]
    down: Projection
    gated: bool
    activation: str  # of ACTIVATIONS
    transposed: bool = False
    around: Around | None = None


class Attention(NamedTuple):
    """Causal attention of new tokens over a KV cache, with what stands around it in a block.

    ``q, k, v = qkv(x)`` by one projection or three, head by head; ``q = rotary(q_norm(q))`` and k alike, v as
    it is; k and v are appended, q attends (``ops/decode/spec.py`` says how), and ``out`` projects all heads.
    q_norm, k_norm: of each head; with ``heads_together`` of all heads of a token.
    """

    qkv: tuple[Projection, ...]
    out: Projection
    softmax_scale: float
    window_left: int = -1
    softcap: float = 0.0
    q_norm: Norm | None = None
    k_norm: Norm | None = None
    heads_together: bool = False
    transposed: bool = False
    around: Around | None = None


class Rotary(NamedTuple):
    """Of each new token: a head's halves (x1, x2) become ``(x1 cos1 − x2 sin1, x2 cos2 + x1 sin2)``.

    cos, sin: in x's dtype or float32, (batch or 1, seqlen, headdim), cos1 and cos2 side by side; with
    ``alike``, where both are the same, (batch or 1, seqlen, headdim / 2).
    """

    cos: Tensor
    sin: Tensor
    alike: bool = False


class Cache(NamedTuple):
    """k, v: (batch, capacity, nheads_k, headdim), written behind what they hold: ``seqlens`` tokens, of all
    sequences or (batch), int32, of each. key_ranges: (batch, ..., 2), int32: of each sequence its first key,
    and one past the last new one; None for all keys.
    """

    k: Tensor
    v: Tensor
    seqlens: int | Tensor
    key_ranges: Tensor | None = None
