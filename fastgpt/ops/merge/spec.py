"""What a merge of two attention states means. It has no options: there is no spec beyond the call.

With (out_x, lse_x) from attention over the keys x, a and b disjoint, per query and head:
``lse = log(exp(lse_a) + exp(lse_b))``, ``w_x = exp(lse_x − lse)``, ``out = w_a · out_a + w_b · out_b``, which
is attention over the keys of both. A state of weight 0 is not read, whatever its out holds; lse_x = −inf is
one that saw no key. Where both are −inf, out = 0, lse = −inf and every gradient is 0.
"""

from __future__ import annotations

from typing import NamedTuple

import torch


class MergeCall(NamedTuple):
    """The metadata by which dispatch chooses a backend."""

    device: str
    dtype: torch.dtype
    features: tuple[str, ...]  # what the call asks for beyond the forward, of FEATURES
    op: str = "merge"

    def describe(self) -> str:
        parts = [f"{str(self.dtype).removeprefix('torch.')} on {self.device}", *self.features]
        return f"{self.op}({', '.join(parts)})"


FEATURES = ("backward",)
