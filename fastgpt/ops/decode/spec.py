"""What a call of attention over a KV cache means: everything but the tensors."""

from __future__ import annotations

from typing import NamedTuple

import torch


class DecodeSpec(NamedTuple):
    """Sequence b has ``L = cache_seqlens[b] + seqlen_new`` keys once the new ones are appended.

    Key j < L is visible to query i iff ``i + L − sq − window_left <= j <= i + L − sq + window_right``,
    −1 = unlimited; causal is ``window_right = 0``. ``num_splits`` is into how many parts the keys are cut,
    each with its own softmax state, merged at the end; 0 = chosen from the shape.
    """

    softmax_scale: float
    window_left: int = -1
    window_right: int = -1
    num_splits: int = 0


class DecodeCall(NamedTuple):
    """The metadata by which dispatch chooses a backend."""

    device: str
    dtype: torch.dtype
    headdim: int
    headdim_v: int
    features: tuple[str, ...]  # what the call asks for beyond plain attention: "window", "lse"
    op: str = "decode"

    def describe(self) -> str:
        dims = f"{self.headdim}" + (f"/{self.headdim_v}" if self.headdim_v != self.headdim else "")
        parts = [f"{str(self.dtype).removeprefix('torch.')} on {self.device}", f"headdim {dims}"]
        return f"{self.op}({', '.join([*parts, *self.features])})"
