"""What a call of attention over a KV cache means: everything but q and the caches."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class DecodeSpec(NamedTuple):
    """Sequence b has ``L = cache_seqlens[b] + seqlen_new − cache_leftpad[b]`` keys after the append.

    The scores are ``s = softcap(softmax_scale · q·k) − slope · |i + L − sq − j|``, as in attention. Key j < L
    is visible to query i iff ``i + L − sq − window_left <= j <= i + L − sq + window_right``,
    −1 = unlimited; causal is ``window_right = 0``. ``num_splits`` is into how many parts the keys are cut,
    each with its own softmax state, merged at the end; 0 = the backend chooses.

    Rotary embedding turns pairs of q and of the new keys before anything else, (x[i], x[i + rotary_dim / 2])
    or neighbours if interleaved, by the angles of row ``position`` of the tables. The new keys are at
    ``cache_seqlens[b] + t``, padding included, query i at ``cache_seqlens[b] + i``, or, if neither causal nor
    a window makes positions matter, all queries at ``cache_seqlens[b]``.
    """

    softmax_scale: float
    window_left: int = -1
    window_right: int = -1
    softcap: float = 0.0
    rotary_interleaved: bool = True
    num_splits: int = 0


class DecodeTensors(NamedTuple):
    """The tensors of a call beside q and the caches; None where the call has none.

    k, v: (batch, seqlen_new, nheads_k, dim), appended first. cache_seqlens: (batch), int32: keys before the
    append, with the padding. rotary_cos, rotary_sin: (positions, rotary_dim / 2). cache_batch_idx: (batch),
    int32: the caches' sequence of each of q's. cache_leftpad: (batch), int32: rows before a sequence's first
    key. block_table: (batch, blocks), int32; the caches are then (num_blocks, page_size, nheads_k, dim) and
    row r of sequence b is row ``r % page_size`` of block ``block_table[b, r // page_size]``. alibi_slopes:
    (nheads) or (batch, nheads). sink: (nheads). k_descale, v_descale: (nheads_k) or (batch, nheads_k), fp32:
    what the elements of an int8 or fp8 cache are multiplied by.
    """

    k: Tensor | None
    v: Tensor | None
    cache_seqlens: Tensor
    rotary_cos: Tensor | None = None
    rotary_sin: Tensor | None = None
    cache_batch_idx: Tensor | None = None
    cache_leftpad: Tensor | None = None
    block_table: Tensor | None = None
    alibi_slopes: Tensor | None = None
    sink: Tensor | None = None
    k_descale: Tensor | None = None
    v_descale: Tensor | None = None


def capacity(k_cache: Tensor, tensors: DecodeTensors) -> int:
    """How many keys a sequence can have."""
    blocks = 1 if tensors.block_table is None else tensors.block_table.shape[1]
    return k_cache.shape[1] * blocks


class DecodeCall(NamedTuple):
    """The metadata by which dispatch chooses a backend."""

    device: str
    dtype: torch.dtype
    headdim: int
    headdim_v: int
    features: tuple[str, ...]  # what the call asks for beyond plain attention, of FEATURES
    op: str = "decode"

    def describe(self) -> str:
        dims = f"{self.headdim}" + (f"/{self.headdim_v}" if self.headdim_v != self.headdim else "")
        parts = [f"{str(self.dtype).removeprefix('torch.')} on {self.device}", f"headdim {dims}"]
        return f"{self.op}({', '.join([*parts, *self.features])})"


FEATURES = (
    "window",
    "softcap",
    "alibi",
    "sink",
    "rotary",
    "cache_batch_idx",
    "cache_leftpad",
    "paged",
    "quantized",
    "lse",
)


def used(spec: DecodeSpec, tensors: DecodeTensors, lse: bool) -> tuple[bool, ...]:
    """Of each of FEATURES, whether a call uses it."""
    return (
        spec.window_left >= 0 or spec.window_right > 0,
        spec.softcap != 0,
        tensors.alibi_slopes is not None,
        tensors.sink is not None,
        tensors.rotary_cos is not None,
        tensors.cache_batch_idx is not None,
        tensors.cache_leftpad is not None,
        tensors.block_table is not None,
        tensors.k_descale is not None,
        lse,
    )
