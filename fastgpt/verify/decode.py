"""Decoding's table of cases, and each of them computed three times (see :mod:`fastgpt.verify.attention`)."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

import fastgpt
from fastgpt.verify.attention import mask_name, plain_attention
from fastgpt.verify.rule import Result, as_called, require


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
        mask = mask_name(self.causal, self.window)
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
    DecodeCase(1, 1, 300, (290, 31), 4, 2, 256, 256),
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
    DecodeCase(3, 0, 30, (20, 1), 2, 1, 16, 16, causal=False, window=(-1, 2**31 - 1)),
    DecodeCase(3, 3, 30, (20, 1), 2, 1, 16, 16, window=(2**31 - 1, 0)),
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


MEDIUM = {
    "medium": DecodeVariant(_D(1, 1, 8192, (8000, 17, 4096), 32, 8, 128, 128)),
    "medium, d 64": DecodeVariant(_D(1, 1, 8192, (8191, 1), 12, 12, 64, 64)),
    "medium, four queries": DecodeVariant(_D(4, 4, 4096, (4000, 100), 32, 4, 128, 128)),
    "medium, prefill": DecodeVariant(_D(500, 500, 2048, (1500, 0), 8, 2, 128, 128)),
    "medium, pages": DecodeVariant(_D(1, 1, 8192, (8000, 17, 4096), 32, 8, 128, 128), page_size=16),
    "medium, large pages, rotary": DecodeVariant(
        _D(1, 1, 8192, (8000, 17), 32, 8, 128, 128), page_size=256, rotary_dim=128, interleaved=False
    ),
    "medium, fp8": DecodeVariant(
        _D(1, 1, 8192, (8000, 17), 32, 8, 128, 128), cache_dtype=_FP8, descale=(2, 8), page_size=64
    ),
    "medium, int8": DecodeVariant(
        _D(1, 1, 8192, (8000, 17), 32, 8, 128, 128), cache_dtype=_INT8, descale=(8,)
    ),
}


def make(case: DecodeCase, dtype: torch.dtype, fill: float = torch.nan) -> Any:
    """q, k_cache, v_cache, k, v, cache_seqlens; the cache holds `fill` behind each sequence's keys."""
    batch = len(case.lengths)
    q = torch.randn(batch, case.sq, case.nheads, case.headdim).to(dtype)
    caches = []
    for dim in (case.headdim, case.headdim_v):
        # A layer's slice of a larger cache, its heads further apart than they are wide.
        whole = torch.full((batch, 2, case.capacity, case.nheads_k, dim + 3), fill, dtype=torch.float32)
        for b, length in enumerate(case.lengths):
            whole[b, 1, :length, :, :dim] = torch.randn(length, case.nheads_k, dim)
        caches.append(whole.to(dtype)[:, 1, :, :, :dim])
    new = [
        torch.randn(batch, case.appended, case.nheads_k, dim).to(dtype) if case.appended else None
        for dim in (case.headdim, case.headdim_v)
    ]
    return q, *caches, *new, torch.tensor(case.lengths, dtype=torch.int32)


def plain(case: DecodeCase, dtype: torch.dtype, *tensors: Any) -> tuple[Tensor, Tensor]:
    """Each sequence by itself, its keys concatenated, every step in `dtype`; (out, lse)."""
    q, k_cache, v_cache, k, v, lengths = tensors
    outs, lses = [], []
    left, right = case.window
    right = 0 if case.causal else right
    for b, length in enumerate(lengths.tolist()):
        keys, values = (
            (cache[b, :length] if new is None else torch.cat([cache[b, :length], new[b]])).to(dtype)
            for cache, new in ((k_cache, k), (v_cache, v))
        )
        keys, values = (t.repeat_interleave(case.nheads // case.nheads_k, dim=1) for t in (keys, values))
        scores = torch.einsum("ihd,jhd->hij", q[b].to(dtype), keys) * case.headdim**-0.5
        i, j = torch.arange(case.sq)[:, None] + len(keys) - case.sq, torch.arange(len(keys))[None, :]
        hidden = torch.zeros(case.sq, len(keys), dtype=torch.bool)
        if left >= 0:
            hidden |= j < i - left
        if right >= 0:
            hidden |= j > i + right
        scores = scores.masked_fill(hidden, -torch.inf)
        probs = torch.softmax(scores, -1).masked_fill(hidden.all(-1)[:, None], 0)
        outs.append(torch.einsum("hij,jhd->ihd", probs, values))
        lses.append(torch.logsumexp(scores, dim=-1))
    return torch.stack(outs), torch.stack(lses)


def fused(*tensors: Any, **options: Any) -> Any:
    with as_called():
        return fastgpt.attention_with_kvcache(*tensors, **options, return_lse=True)


def options(case: DecodeCase) -> dict[str, Any]:
    return {"causal": case.causal, "window_size": case.window, "num_splits": case.num_splits}


class Paged:
    """A variant's caches as they lie in memory, and each sequence's rows in them."""

    def __init__(self, variant: DecodeVariant, dtype: torch.dtype) -> None:
        case, batch = variant.case, len(variant.case.lengths)
        self.pads = variant.leftpad or (0,) * batch
        self.dtype = variant.cache_dtype or dtype
        capacity, page = case.capacity, variant.page_size
        self.table: Tensor | None = None
        self.index: Tensor | None = None
        pages = capacity // max(page, 1)
        if page:
            self.table = torch.randperm(batch * pages + 3)[: batch * pages].view(batch, pages).int()
            leading = (batch * pages + 3, page)
        else:
            leading = (batch + 2 * variant.shuffled, capacity)
        if variant.shuffled:
            self.index = torch.randperm(batch + 2)[:batch].int()
        self.caches: list[Tensor] = []
        self.scales: list[Tensor] = []
        for dim in (case.headdim, case.headdim_v):
            cache = torch.full((*leading, case.nheads_k, dim), torch.nan)
            scale = torch.ones(batch, case.nheads_k)
            if variant.cache_dtype is not None:
                # Some of the values drawn below lie beyond the largest that can be stored.
                largest = 127 if variant.cache_dtype == torch.int8 else 448
                scale = (torch.rand(*variant.descale) + 0.5) * 3.0 / largest
            self.scales.append(scale)
            self.caches.append((cache.nan_to_num(99) if self.dtype == torch.int8 else cache).to(self.dtype))
        for b, length in enumerate(case.lengths):
            for cache, dim in zip(self.caches, (case.headdim, case.headdim_v), strict=True):
                values = torch.randn(length, case.nheads_k, dim)
                if variant.cache_dtype is not None:
                    values = (values * (40 if variant.cache_dtype == torch.int8 else 100)).clamp(-127, 127)
                cache[self.places(b, length)] = values.to(self.dtype)
        if self.table is not None:  # what is not needed must not be looked at
            for b, length in enumerate(case.lengths):
                used = -(-(self.pads[b] + length + case.appended) // page)
                self.table[b, used:] = torch.tensor([-5, 10**6])[torch.arange(pages - used) % 2].int()

    def places(self, b: int, length: int, first: int = 0) -> tuple[Any, Tensor]:
        rows = torch.arange(first, length) + self.pads[b]
        if self.table is not None:
            page = self.caches[0].shape[1]
            return self.table[b].long()[rows // page], rows % page
        return (int(self.index[b]) if self.index is not None else b), rows

    def keys(self, which: int, b: int, length: int, first: int = 0) -> Tensor:
        """A sequence's keys (0) or values (1), dequantized, in float64."""
        scale = self.scales[which].double()
        scale = scale if scale.dim() == 1 else scale[b]
        return self.caches[which][self.places(b, length, first)].double() * scale[:, None]


def rotated(x: Tensor, positions: Tensor, turns: Tensor, variant: DecodeVariant) -> Tensor:
    """x (seqlen, heads, dim) with its pairs turned by complex multiplication."""
    half = variant.rotary_dim // 2
    if not half:
        return x
    turned = x.double().clone()
    first, second = (
        (slice(0, 2 * half, 2), slice(1, 2 * half, 2))
        if variant.interleaved
        else (slice(0, half), slice(half, 2 * half))
    )
    z = torch.complex(turned[..., first], turned[..., second])
    z = z * turns[positions][:, None]
    turned[..., first], turned[..., second] = z.real, z.imag
    return turned.to(x.dtype)


def draw_untied(shape: tuple[int, ...], dtype: torch.dtype, turn: Callable[[Tensor], Tensor]) -> Tensor:
    """Normal numbers that fp32 arithmetic and float64 round alike after ``turn``: but for small ones, none is
    then near to the middle of two numbers of dtype."""
    x = torch.randn(shape).to(dtype)
    while dtype != torch.float32:
        exact = turn(x.double())
        margin = 2.0**-21 * x.double().abs().amax(-1, keepdim=True)
        tied = ((exact - margin).to(dtype) != (exact + margin).to(dtype)) & (exact.abs() > 2.0**-5)
        rows = tied.any(-1)
        if not rows.any():
            break
        x[rows] = torch.randn(int(rows.sum()), shape[-1]).to(dtype)
    return x


def variant_results(
    variant: DecodeVariant, backend: str, dtype: torch.dtype, by_reference: bool = False
) -> list[Result]:
    """(what, got, plain, exact) of out and lse, after a look at the cache. Plain and exact, ``by_reference``
    that of attention, read the keys as they then lie in the cache."""
    case, batch, new = variant.case, len(variant.case.lengths), variant.case.appended
    cache = Paged(variant, dtype)
    before = [c.clone() for c in cache.caches]
    k, v = (
        torch.randn(batch, new, case.nheads_k, dim).to(dtype) if new else None
        for dim in (case.headdim, case.headdim_v)
    )
    slopes = None if variant.slopes is None else torch.rand(variant.slopes)
    sink = torch.randn(case.nheads) if variant.sink else None
    angles = 3 * torch.rand(case.capacity + case.sq, variant.rotary_dim // 2, dtype=torch.float64)
    tables = dtype if dtype != torch.float32 and variant.interleaved else torch.float32
    cos, sin = angles.cos().to(tables), angles.sin().to(tables)
    angles = torch.complex(cos.double(), sin.double())  # rounded as the tables are
    steps = torch.arange(case.sq) if case.causal or max(case.window) >= 0 else torch.zeros(case.sq).long()

    def turned(b: int, x: Tensor) -> Tensor:
        return rotated(x, cache.pads[b] + case.lengths[b] + steps, angles, variant)

    rows = (case.sq, case.nheads, case.headdim)
    q = torch.stack([draw_untied(rows, dtype, functools.partial(turned, b)) for b in range(batch)])
    out, lse = fused(
        q,
        *cache.caches,
        k,
        v,
        cache_seqlens=torch.tensor([p + n for p, n in zip(cache.pads, case.lengths, strict=True)]).int(),
        softcap=variant.softcap,
        alibi_slopes=slopes,
        sink=sink,
        rotary_cos=cos if variant.rotary_dim else None,
        rotary_sin=sin if variant.rotary_dim else None,
        rotary_interleaved=variant.interleaved,
        cache_batch_idx=cache.index,
        cache_leftpad=None if variant.leftpad is None else torch.tensor(variant.leftpad).int(),
        block_table=cache.table,
        k_descale=cache.scales[0] if variant.cache_dtype else None,
        v_descale=cache.scales[1] if variant.cache_dtype else None,
        backend=backend,
        **options(case),
    )

    # The cache: the new keys in their places, nothing else touched.
    for which, fresh in enumerate((k, v)):
        for b, length in enumerate(case.lengths):
            if fresh is None:
                continue
            places = cache.places(b, length + new, length)
            wanted = fresh[b]
            if which == 0:
                wanted = rotated(wanted, cache.pads[b] + length + torch.arange(new), angles, variant)
            got = cache.keys(which, b, length + new, length)
            if variant.cache_dtype is None:
                tolerance: dict[str, Any] = {"rtol": 0, "atol": 0} if not variant.rotary_dim or which else {}
                torch.testing.assert_close(got.to(dtype), wanted, **tolerance)
            else:
                scale = cache.scales[which].double()
                scale = (scale if scale.dim() == 1 else scale[b])[:, None]
                limit = 127 if variant.cache_dtype == torch.int8 else 448
                wanted = wanted.double().clamp(-limit * scale, limit * scale)
                # Half a step: of 1, or of 1/8 of the power of two below (subnormal: 2^−9).
                step = torch.ones_like(wanted)
                if variant.cache_dtype != torch.int8:
                    step = torch.exp2((wanted / scale).abs().log2().floor().clamp(min=-6)) / 8
                near = (got - wanted).abs() <= scale * step * 0.5 + 1e-2 * step * scale + 1e-6
                require(bool(near.all()), f"{'kv'[which]}_cache: a new element is not the nearest")
            before[which][places] = cache.caches[which][places]
        raw = torch.uint8 if variant.cache_dtype else torch.int32 if dtype == torch.float32 else torch.int16
        untouched = torch.equal(cache.caches[which].view(raw), before[which].view(raw))
        require(untouched, f"{'kv'[which]}_cache: written beside the new rows")

    def sequences(attention: Callable[..., Any], precision: torch.dtype) -> tuple[Tensor, Tensor]:
        outs, lses = [], []
        for b, length in enumerate(case.lengths):
            keys, values = (cache.keys(which, b, length + new).to(precision) for which in (0, 1))
            of_batch = slopes if slopes is None or slopes.dim() == 1 else slopes[b : b + 1]
            query = turned(b, q[b]).to(precision)
            out, lse = attention(query[None], keys[None], values[None], of_batch)
            outs.append(out)
            lses.append(lse)
        return torch.cat(outs), torch.cat(lses)

    def plain(q: Tensor, k: Tensor, v: Tensor, slopes: Tensor | None) -> Any:
        terms: dict[str, Any] = {"softcap": variant.softcap, "slopes": slopes, "sink": sink}
        return plain_attention(q, k, v, case.causal, case.window, **terms)

    def reference(q: Tensor, k: Tensor, v: Tensor, slopes: Tensor | None) -> Any:
        terms: dict[str, Any] = {
            "softcap": variant.softcap,
            "alibi_slopes": slopes,
            "sink": sink,
            "return_lse": True,
        }
        window: dict[str, Any] = {"causal": case.causal, "window_size": case.window}
        return fastgpt.attention(q, k, v, **window, **terms, backend="reference")

    other = reference if by_reference else plain
    rough, exact = sequences(other, dtype), sequences(other, torch.float64)
    return [("out", out, rough[0], exact[0]), ("lse", lse, rough[1], exact[1])]


def case_results(case: DecodeCase, backend: str, dtype: torch.dtype) -> list[Result]:
    """(what, got, plain, exact) of out and lse, after a look at the cache."""
    q, *caches, k, v, lengths = make(case, dtype)
    before = [cache.clone() for cache in caches]
    got = fused(q, *caches, k, v, cache_seqlens=lengths, backend=backend, **options(case))
    rough, exact = (plain(case, precision, q, *before, k, v, lengths) for precision in (dtype, torch.float64))
    for name, cache, old, new in zip(("k_cache", "v_cache"), caches, before, (k, v), strict=True):
        for b, length in enumerate(case.lengths):
            if new is not None:
                old[b, length : length + case.appended] = new[b]
        same = torch.equal(cache.nan_to_num(7e3), old.nan_to_num(7e3))
        require(same, f"{name}: not the keys before and the new ones behind them")
    return list(zip(("out", "lse"), got, rough, exact, strict=True))
