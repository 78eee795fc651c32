"""What a norm call means: everything but the tensors."""

from __future__ import annotations

from typing import NamedTuple

import torch


class NormSpec(NamedTuple):
    """Everything but the tensors.

    With ``z = dropout(x) + residual`` rounded to x's dtype, over the last axis:
    layer norm: ``out = (z − mean) · rstd · weight + bias``, ``rstd = (mean((z − mean)²) + eps) ** −0.5``;
    RMS norm: ``out = z · rstd · weight + bias``, ``rstd = (mean(z²) + eps) ** −0.5``.

    ``dropout(x) = x · keep / (1 − dropout_p)``. keep is a pure function of seed, offset, row and column, row
    being the place among x's leading axes as one: Philox4x32-10 (``fastgpt/ops/philox.py``) with key = the
    64 bits of the seed and counter = (column >> 2, row mod 2^32, row >> 32, offset); lane column & 3 of its
    four outputs is kept iff it is at least dropout_p · 2^32. The offset counts mod 2^32.
    """

    rms: bool
    eps: float
    dropout_p: float = 0.0


class NormCall(NamedTuple):
    """The metadata by which dispatch chooses a backend."""

    device: str
    dtype: torch.dtype
    features: tuple[str, ...]  # what the call asks for beyond a layer norm of x, of FEATURES
    op: str = "norm"

    def describe(self) -> str:
        parts = [f"{str(self.dtype).removeprefix('torch.')} on {self.device}", *self.features]
        return f"{self.op}({', '.join(parts)})"


FEATURES = ("rms", "weight", "bias", "mixed_weight", "residual", "dropout", "backward")
