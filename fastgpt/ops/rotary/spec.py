"""What a call of rotary embedding means: everything but x."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class RotarySpec(NamedTuple):
    """Each pair (x1, x2) of a token becomes ``(x1 · cos − x2 · sin, x2 · cos + x1 · sin)``, cos and sin being
    row ``position`` of the tables, one column for each pair (Su et al. 2021, arXiv:2104.09864). Pairs are
    neighbours, (x[2i], x[2i + 1]), if interleaved, else (x[i], x[i + rotary_dim / 2]). Elements from
    rotary_dim on stay as they are.

    Token t of sequence b has the position ``seqlen_offsets[b] + t``, or ``seqlen_offset + t``. With conjugate
    the sines count negated, which is the derivative.
    """

    seqlen_offset: int = 0
    interleaved: bool = True
    conjugate: bool = False


class RotaryTensors(NamedTuple):
    """The tensors of a call beside x; None where the call has none.

    cos, sin: (positions, rotary_dim / 2), in float32 or x's dtype. seqlen_offsets: (batch), int32.
    cu_seqlens: (batch + 1), int32: x is packed.
    """

    cos: Tensor
    sin: Tensor
    seqlen_offsets: Tensor | None = None
    cu_seqlens: Tensor | None = None


def token_positions(x: Tensor, spec: RotarySpec, tensors: RotaryTensors) -> Tensor:
    """int64: (batch, seqlen), 1 for batch where it makes no difference, or (total) of packed sequences."""
    offsets, edges = tensors.seqlen_offsets, tensors.cu_seqlens
    if edges is None:
        tokens = torch.arange(x.shape[1], device=x.device)[None]
        return tokens + (spec.seqlen_offset if offsets is None else offsets.long()[:, None])
    tokens = torch.arange(x.shape[0], device=x.device)
    sequence = torch.searchsorted(edges[1:], tokens, right=True)
    first = edges[sequence].long()
    return tokens - first + (spec.seqlen_offset if offsets is None else offsets.long()[sequence])


class RotaryCall(NamedTuple):
    """The metadata by which dispatch chooses a backend."""

    device: str
    dtype: torch.dtype
    headdim: int
    features: tuple[str, ...]  # what the call asks for beyond halves at positions that all share, of FEATURES
    op: str = "rotary"

    def describe(self) -> str:
        parts = [f"{str(self.dtype).removeprefix('torch.')} on {self.device}", f"headdim {self.headdim}"]
        return f"{self.op}({', '.join([*parts, *self.features])})"


FEATURES = ("interleaved", "seqlen_offsets", "varlen")
