"""What a norm call means: everything but the tensors."""

from __future__ import annotations

from typing import NamedTuple

import torch


class NormSpec(NamedTuple):
    """Everything but the tensors.

    With ``z = x + residual`` rounded to x's dtype, over the last axis:
    layer norm: ``out = (z − mean) · rstd · weight + bias``, ``rstd = (mean((z − mean)²) + eps) ** −0.5``;
    RMS norm: ``out = z · rstd · weight + bias``, ``rstd = (mean(z²) + eps) ** −0.5``.
    """

    rms: bool
    eps: float


class NormCall(NamedTuple):
    """The metadata by which dispatch chooses a backend."""

    device: str
    dtype: torch.dtype
    features: tuple[str, ...]  # what the call asks for beyond a layer norm of x, of FEATURES
    op: str = "norm"

    def describe(self) -> str:
        parts = [f"{str(self.dtype).removeprefix('torch.')} on {self.device}", *self.features]
        return f"{self.op}({', '.join(parts)})"


FEATURES = ("rms", "weight", "bias", "mixed_weight", "residual", "backward")
