"""The tables of cases that every backend runs."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


def _mask_name(causal: bool, window: tuple[int, int]) -> str:
    name = "causal" if causal else "full"
    return f"{name}-w{window[0]}_{window[1]}" if max(window) >= 0 else name


class AttentionCase(NamedTuple):
    batch: int
    sq: int
    sk: int
    nheads: int
    nheads_k: int
    headdim: int
    headdim_v: int
    causal: bool = True
    window: tuple[int, int] = (-1, -1)
    layout: str = "bshd"  # or "bhsd" (transposed), "packed" (slices of one qkv tensor, padded rows)

    def __str__(self) -> str:
        mask = _mask_name(self.causal, self.window)
        heads, dims = f"h{self.nheads}-{self.nheads_k}", f"d{self.headdim}-{self.headdim_v}"
        return f"b{self.batch}-{self.sq}x{self.sk}-{heads}-{dims}-{mask}-{self.layout}"

    def laid_out(self, values: Tensor) -> Tensor:
        """The values of a (batch, seqlen, heads, dim) tensor in the case's layout."""
        if self.layout == "bhsd":
            return values.transpose(1, 2).contiguous().transpose(1, 2)
        if self.layout == "packed":
            # Rows of another tensor between, before and behind: reading or writing there is seen.
            batch, seqlen, heads, dim = values.shape
            full = torch.full((batch, seqlen, 3, heads + 1, dim + 5), torch.nan, dtype=values.dtype)
            full[:, :, 1, :heads, :dim] = values
            return full[:, :, 1, :heads, :dim]
        return values

    def inputs(self, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
        shapes = (
            (self.sq, self.nheads, self.headdim),
            (self.sk, self.nheads_k, self.headdim),
            (self.sk, self.nheads_k, self.headdim_v),
        )
        q, k, v = (self.laid_out(torch.randn(self.batch, *shape).to(dtype)) for shape in shapes)
        return q, k, v


ATTENTION = [
    AttentionCase(1, 1, 1, 1, 1, 1, 1),
    AttentionCase(2, 5, 7, 4, 2, 3, 5),
    AttentionCase(1, 17, 17, 1, 1, 33, 17, layout="bhsd"),
    AttentionCase(2, 64, 64, 2, 2, 64, 64),
    AttentionCase(1, 97, 193, 2, 2, 64, 64, layout="packed"),
    AttentionCase(1, 200, 200, 3, 1, 80, 80),  # MQA
    AttentionCase(2, 131, 131, 6, 2, 96, 96, layout="bhsd"),  # GQA
    AttentionCase(1, 129, 129, 2, 2, 128, 128),
    AttentionCase(1, 70, 70, 1, 1, 256, 256),
    AttentionCase(1, 70, 70, 1, 1, 255, 1),
    AttentionCase(1, 150, 100, 2, 2, 64, 64),  # sq > sk: the first 50 rows see no key
    AttentionCase(1, 100, 150, 2, 1, 64, 32),  # sq < sk
    AttentionCase(1, 3, 500, 8, 2, 64, 64),  # few queries: the decode path
    AttentionCase(2, 1, 300, 4, 4, 40, 40),
    AttentionCase(1, 120, 120, 2, 2, 64, 64, causal=False),
    AttentionCase(1, 90, 40, 2, 2, 32, 32, causal=False, layout="packed"),
    AttentionCase(1, 300, 300, 2, 1, 64, 64, window=(40, 0)),
    AttentionCase(1, 300, 300, 2, 2, 64, 64, window=(0, 0)),  # each query sees itself
    AttentionCase(1, 257, 311, 1, 1, 64, 64, causal=False, window=(30, 20)),
    AttentionCase(1, 311, 257, 1, 1, 48, 48, causal=False, window=(10, 3)),  # rows without a key
    AttentionCase(1, 200, 200, 1, 1, 64, 64, causal=False, window=(-1, 17)),
    AttentionCase(1, 5, 0, 2, 2, 16, 16),  # no keys at all
    AttentionCase(0, 5, 5, 2, 2, 16, 16),
    AttentionCase(2, 0, 5, 2, 2, 16, 16),
    AttentionCase(1, 700, 700, 1, 1, 64, 64),  # several blocks in both directions
    AttentionCase(1, 1000, 1000, 1, 1, 16, 16, window=(100, 0)),
]


class Variant(NamedTuple):
    """A case with more of the specification; shapes of the optional tensors, None for none."""

    case: AttentionCase
    softcap: float = 0.0
    slopes: tuple[int, ...] | None = None
    bias: tuple[int, ...] | None = None
    mask: float = 0.0  # above 0: the bias is boolean, and true in this share of its places
    sink: bool = False
    dropout_p: float = 0.0
    lengths_q: tuple[int, ...] | None = None  # packed sequences; the case has their totals
    lengths_k: tuple[int, ...] | None = None
    seqused_k: tuple[int, ...] | None = None
    leftpad_k: tuple[int, ...] | None = None


_C = AttentionCase

VARIANTS = {
    "softcap": Variant(_C(2, 70, 130, 4, 2, 40, 24), softcap=1.5),
    "softcap, few queries": Variant(_C(2, 2, 130, 4, 2, 40, 24), softcap=1.5),
    "alibi": Variant(_C(2, 130, 170, 4, 2, 16, 16), slopes=(4,)),
    "alibi per batch": Variant(_C(2, 130, 70, 4, 2, 16, 16, causal=False), slopes=(2, 4)),
    "alibi, few queries": Variant(_C(2, 3, 170, 4, 1, 16, 16), slopes=(2, 4)),
    "sink": Variant(_C(2, 111, 111, 6, 2, 32, 32), sink=True),
    "sink of rows that see no key": Variant(_C(1, 90, 40, 2, 1, 32, 32, window=(20, 0)), sink=True),
    "sink, few queries": Variant(_C(2, 1, 600, 6, 2, 32, 48), sink=True),
    "sink, no keys": Variant(_C(1, 3, 0, 2, 2, 16, 16), sink=True),
    "bias": Variant(_C(2, 70, 133, 4, 2, 24, 24, causal=False), bias=(2, 4, 70, 133)),
    "bias of a head": Variant(_C(2, 70, 100, 4, 2, 24, 24), bias=(1, 4, 70, 100)),
    "bias of a sequence": Variant(_C(3, 40, 100, 4, 2, 24, 24), bias=(3, 1, 40, 100)),
    "bias of all": Variant(_C(2, 70, 100, 4, 2, 24, 24), bias=(1, 1, 70, 100)),
    "bias of a key": Variant(_C(2, 70, 100, 4, 2, 24, 24), bias=(2, 1, 1, 100)),
    "bias of a query": Variant(_C(2, 70, 101, 4, 2, 24, 24), bias=(2, 4, 70, 1)),
    "bias, few queries": Variant(_C(2, 2, 301, 4, 2, 24, 24), bias=(2, 1, 2, 301)),
    "mask": Variant(_C(2, 70, 133, 4, 2, 24, 24, causal=False), bias=(2, 4, 70, 133), mask=0.6),
    "mask of a key": Variant(_C(2, 70, 133, 4, 2, 24, 24), bias=(2, 1, 1, 133), mask=0.5),
    "mask of a query": Variant(_C(2, 70, 133, 4, 2, 24, 24), bias=(2, 1, 70, 1), mask=0.5),
    "sparse mask": Variant(_C(1, 300, 300, 2, 1, 16, 16, causal=False), bias=(1, 2, 300, 300), mask=0.001),
    "mask, few queries": Variant(_C(2, 2, 133, 4, 2, 24, 24), bias=(2, 4, 2, 133), mask=0.6),
    "dropout": Variant(_C(2, 130, 210, 4, 2, 40, 24), dropout_p=0.4),
    "dropout, few queries": Variant(_C(2, 3, 210, 4, 2, 40, 24, window=(77, 0)), dropout_p=0.4),
    "varlen": Variant(
        _C(1, 318, 275, 4, 2, 32, 16), lengths_q=(3, 0, 117, 1, 197), lengths_k=(5, 4, 117, 0, 149)
    ),
    "varlen, not causal": Variant(
        _C(1, 130, 330, 2, 2, 32, 32, causal=False, window=(50, 9), layout="packed"),
        lengths_q=(100, 30),
        lengths_k=(300, 30),
    ),
    "varlen, everything": Variant(
        _C(1, 221, 260, 4, 1, 32, 32, window=(60, 0)),
        softcap=3.0,
        slopes=(3, 4),
        sink=True,
        dropout_p=0.3,
        lengths_q=(20, 101, 100),
        lengths_k=(20, 101, 139),
        seqused_k=(20, 60, 101),
        leftpad_k=(0, 7, 20),
    ),
    "seqused_k": Variant(_C(3, 70, 200, 4, 2, 32, 32), seqused_k=(0, 70, 200)),
    "seqused_k, few queries": Variant(_C(3, 2, 200, 4, 2, 32, 32), seqused_k=(1, 70, 200)),
    "left padding": Variant(_C(3, 120, 120, 4, 2, 32, 32), leftpad_k=(0, 50, 120)),
    "left padding, few queries": Variant(_C(3, 1, 120, 4, 2, 32, 32), leftpad_k=(0, 50, 120), slopes=(4,)),
    "padding on both sides, bias": Variant(
        _C(2, 60, 120, 4, 2, 32, 32), leftpad_k=(3, 50), seqused_k=(110, 120), bias=(2, 4, 60, 120)
    ),
    "padding on both sides, shared bias": Variant(
        _C(2, 60, 120, 4, 2, 32, 32), leftpad_k=(3, 50), seqused_k=(110, 120), bias=(1, 1, 60, 120)
    ),
    "everything": Variant(
        _C(2, 150, 170, 4, 2, 80, 72, causal=False, window=(90, 30), layout="packed"),
        softcap=3.0,
        slopes=(2, 4),
        bias=(2, 4, 150, 170),
        sink=True,
        dropout_p=0.3,
    ),
}


class DecodeCase(NamedTuple):
    sq: int
    appended: int
    capacity: int
    lengths: tuple[int, ...]  # keys in the cache before the append
    nheads: int
    nheads_k: int
    headdim: int
    headdim_v: int
    causal: bool = True
    window: tuple[int, int] = (-1, -1)
    num_splits: int = 0

    def __str__(self) -> str:
        lengths = "_".join(map(str, self.lengths))
        mask = _mask_name(self.causal, self.window)
        return (
            f"q{self.sq}+{self.appended}-len{lengths}of{self.capacity}-h{self.nheads}-{self.nheads_k}"
            f"-d{self.headdim}-{self.headdim_v}-{mask}-s{self.num_splits}"
        )


DECODE = [
    DecodeCase(1, 1, 4, (0,), 1, 1, 1, 1),
    DecodeCase(1, 1, 20, (3, 19), 4, 2, 8, 8),
    DecodeCase(1, 0, 20, (0, 20), 4, 2, 8, 8),  # a sequence without keys
    DecodeCase(1, 1, 700, (699, 0, 255, 256), 9, 3, 64, 64),
    DecodeCase(1, 1, 1100, (1030,), 8, 1, 128, 128),
    DecodeCase(1, 1, 300, (290,), 2, 2, 33, 17),
    DecodeCase(1, 1, 300, (256, 100), 2, 2, 255, 256),
    DecodeCase(1, 0, 600, (513,), 16, 16, 80, 96),
    DecodeCase(2, 2, 600, (500, 7), 4, 2, 64, 64),
    DecodeCase(4, 4, 600, (2, 511), 4, 1, 64, 64),
    DecodeCase(5, 2, 300, (1, 200), 3, 3, 64, 64),  # more queries than keys in one sequence
    DecodeCase(4, 0, 300, (299, 2), 2, 1, 16, 16, causal=False),
    DecodeCase(1, 1, 900, (800, 30), 6, 2, 64, 64, window=(100, 0)),
    DecodeCase(3, 3, 900, (800, 30), 2, 2, 64, 64, window=(300, 0)),
    DecodeCase(3, 3, 200, (100, 30), 2, 2, 64, 64, causal=False, window=(7, 1)),
    DecodeCase(1, 1, 900, (800, 30), 6, 2, 64, 64, num_splits=1),
    DecodeCase(1, 1, 900, (800, 30), 6, 2, 64, 64, num_splits=7),
    DecodeCase(1, 1, 900, (800, 3), 6, 2, 64, 64, num_splits=1000),
    DecodeCase(1, 1, 32, (5, 3), 2, 1, 8, 8, num_splits=4),  # the shorter sequence has more parts
    DecodeCase(1, 0, 32, (9, 8), 2, 1, 8, 8, num_splits=4),
    DecodeCase(60, 60, 200, (0, 130), 4, 2, 64, 64),  # prefill, and a chunk behind others
    DecodeCase(40, 40, 400, (350, 1), 2, 1, 48, 24, window=(25, 0)),
    DecodeCase(2, 70, 300, (100, 0), 4, 2, 16, 16, window=(9, 0), num_splits=2),  # new keys that none sees
]


class DecodeVariant(NamedTuple):
    """A case with more of the specification; the case's lengths are without padding."""

    case: DecodeCase
    softcap: float = 0.0
    slopes: tuple[int, ...] | None = None
    sink: bool = False
    rotary_dim: int = 0
    interleaved: bool = True
    leftpad: tuple[int, ...] | None = None
    shuffled: bool = False  # cache_batch_idx
    page_size: int = 0
    cache_dtype: torch.dtype | None = None
    descale: tuple[int, ...] = ()


_D = DecodeCase
_INT8, _FP8 = torch.int8, torch.float8_e4m3fn

DECODE_VARIANTS = {
    "softcap": DecodeVariant(_D(1, 1, 400, (300, 7), 4, 2, 40, 24), softcap=1.5),
    "alibi": DecodeVariant(_D(3, 3, 400, (300, 7), 4, 2, 40, 24), slopes=(4,)),
    "alibi per batch, prefill": DecodeVariant(_D(30, 30, 400, (300, 7), 4, 2, 40, 24), slopes=(2, 4)),
    "sink": DecodeVariant(_D(1, 0, 700, (0, 600), 4, 2, 64, 64), sink=True),
    "sink, window": DecodeVariant(_D(2, 2, 700, (3, 600), 4, 1, 64, 64, window=(100, 0)), sink=True),
    "rotary, neighbours": DecodeVariant(_D(1, 1, 400, (300, 0), 4, 2, 64, 64), rotary_dim=64),
    "rotary, halves": DecodeVariant(_D(3, 3, 400, (300, 0), 4, 2, 64, 64), rotary_dim=64, interleaved=False),
    "rotary of a part": DecodeVariant(_D(2, 2, 400, (300, 0), 4, 2, 80, 16), rotary_dim=34),
    "rotary of a part, halves": DecodeVariant(
        _D(2, 2, 400, (300, 0), 4, 2, 33, 16), rotary_dim=6, interleaved=False
    ),
    "rotary, not causal": DecodeVariant(_D(3, 3, 400, (300, 5), 4, 2, 64, 64, causal=False), rotary_dim=32),
    "rotary, prefill": DecodeVariant(
        _D(40, 40, 400, (0, 300), 4, 2, 64, 64), rotary_dim=64, interleaved=False
    ),
    "left padding": DecodeVariant(_D(1, 1, 700, (600, 0, 13), 4, 2, 64, 64), leftpad=(0, 77, 20)),
    "left padding, rotary, window": DecodeVariant(
        _D(2, 2, 700, (600, 0, 13), 4, 2, 64, 64, window=(40, 0)), leftpad=(0, 77, 20), rotary_dim=64
    ),
    "cache_batch_idx": DecodeVariant(_D(1, 1, 300, (200, 0, 13), 4, 2, 64, 64), shuffled=True),
    "pages of 16": DecodeVariant(_D(1, 1, 320, (300, 0, 17), 4, 2, 64, 64), page_size=16),
    "pages of 1": DecodeVariant(_D(1, 1, 90, (80, 3), 4, 2, 64, 64), page_size=1),
    "pages of 7, splits": DecodeVariant(_D(2, 2, 700, (600, 3), 4, 4, 24, 40, num_splits=3), page_size=7),
    "pages of 256, prefill": DecodeVariant(_D(50, 50, 512, (300, 0), 4, 2, 64, 64), page_size=256),
    "pages, padding, rotary": DecodeVariant(
        _D(1, 1, 320, (250, 17), 4, 1, 64, 64),
        page_size=32,
        leftpad=(3, 40),
        rotary_dim=64,
        interleaved=False,
    ),
    "int8": DecodeVariant(_D(1, 1, 600, (500, 9), 4, 2, 64, 64), cache_dtype=_INT8, descale=(2,)),
    "int8, prefill": DecodeVariant(
        _D(40, 40, 600, (500, 9), 4, 2, 64, 33), cache_dtype=_INT8, descale=(2, 2)
    ),
    "fp8": DecodeVariant(_D(1, 1, 600, (500, 9), 8, 2, 128, 128), cache_dtype=_FP8, descale=(2, 2)),
    "fp8, prefill": DecodeVariant(_D(20, 20, 600, (500, 9), 4, 2, 63, 64), cache_dtype=_FP8, descale=(2,)),
    "everything": DecodeVariant(
        _D(2, 2, 640, (500, 9), 8, 2, 64, 48, window=(300, 0), num_splits=2),
        softcap=5.0,
        slopes=(2, 8),
        sink=True,
        rotary_dim=48,
        leftpad=(11, 0),
        page_size=32,
        cache_dtype=_INT8,
        descale=(2, 2),
    ),
}
