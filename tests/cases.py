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

    def inputs(self, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
        def make(seqlen: int, heads: int, dim: int) -> Tensor:
            if self.layout == "bhsd":
                return torch.randn(self.batch, heads, seqlen, dim).to(dtype).transpose(1, 2)
            if self.layout == "packed":
                # Rows of another tensor between, before and behind: reading or writing there is seen.
                full = torch.full((self.batch, seqlen, 3, heads + 1, dim + 5), torch.nan)
                full[:, :, 1, :heads, :dim] = torch.randn(self.batch, seqlen, heads, dim)
                return full.to(dtype)[:, :, 1, :heads, :dim]
            return torch.randn(self.batch, seqlen, heads, dim).to(dtype)

        return (
            make(self.sq, self.nheads, self.headdim),
            make(self.sk, self.nheads_k, self.headdim),
            make(self.sk, self.nheads_k, self.headdim_v),
        )


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
]
