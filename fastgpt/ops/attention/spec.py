"""What an attention call means: everything but the tensors, and the tensors that vary a call."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class AttentionSpec(NamedTuple):
    """Everything but the tensors.

    The scores are ``s = softcap(softmax_scale · q·k) + bias − slope · |i + sk − sq − j|``.

    Key j is visible to query i iff ``i + sk − sq − window_left <= j <= i + sk − sq + window_right``
    (bottom-right alignment), −1 = unlimited; causal is ``window_right = 0``.
    ``softcap(x) = softcap · tanh(x / softcap)``, 0 = off. A sink is a logit per head that joins the
    denominator only. Dropout keeps a probability iff ``philox_keep`` in ``reference.py`` says so.
    """

    softmax_scale: float
    window_left: int = -1
    window_right: int = -1
    softcap: float = 0.0
    dropout_p: float = 0.0
    alibi: bool = False
    sink: bool = False
    bias: bool = False
    varlen: bool = False
    key_ranges: bool = False


class AttentionTensors(NamedTuple):
    """The optional tensors of a call; None where the call has none.

    cu_seqlens_q, cu_seqlens_k: (batch + 1), int32. seqused_k, leftpad_k: (batch), int32; the keys of a
    sequence are its rows [leftpad_k, seqused_k), numbered from 0. alibi_slopes: (nheads) or
    (batch, nheads), fp32. sink: (nheads), fp32. attn_bias: broadcasts to
    (batch, nheads, seqlen_q, seqlen_k); bool (True = visible) or floating point. rng_state: (2), int64:
    Philox seed and offset.
    """

    cu_seqlens_q: Tensor | None = None
    cu_seqlens_k: Tensor | None = None
    seqused_k: Tensor | None = None
    leftpad_k: Tensor | None = None
    alibi_slopes: Tensor | None = None
    sink: Tensor | None = None
    attn_bias: Tensor | None = None
    rng_state: Tensor | None = None


class AttentionCall(NamedTuple):
    """The metadata by which dispatch chooses a backend."""

    device: str
    dtype: torch.dtype
    headdim: int
    headdim_v: int
    features: tuple[str, ...]  # what the call asks for beyond plain attention, of FEATURES
    op: str = "attention"

    def describe(self) -> str:
        dims = f"{self.headdim}" + (f"/{self.headdim_v}" if self.headdim_v != self.headdim else "")
        parts = [f"{str(self.dtype).removeprefix('torch.')} on {self.device}", f"headdim {dims}"]
        return f"{self.op}({', '.join([*parts, *self.features])})"


FEATURES = (
    "window",
    "softcap",
    "dropout",
    "alibi",
    "sink",
    "bias",
    "varlen",
    "key_ranges",  # seqused_k or leftpad_k
    "lse",
    "backward",
)


def used(spec: AttentionSpec, lse: bool, backward: bool) -> tuple[bool, ...]:
    """Of each of FEATURES, whether a call uses it."""
    return (
        spec.window_left >= 0 or spec.window_right > 0,
        spec.softcap != 0,
        spec.dropout_p != 0,
        spec.alibi,
        spec.sink,
        spec.bias,
        spec.varlen,
        spec.key_ranges,
        lse,
        backward,
    )
