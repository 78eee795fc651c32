"""Attention over a KV cache in Triton: split-KV with a merge (Flash-Decoding, Dao et al. 2023).

One program owns one part of the keys of one head of k of one sequence, for up to BLOCK_M rows. A row is one
query of one head; all heads of a group share their keys, so row r is query r // group of head r % group of
the group. Parts are of equal size, cut from the keys that the sequence has, a number which the program reads
on the device: the grid depends on shapes alone. Each row has one softmax state per part; where there are
several, a second kernel merges them in order. Storage fp32, bf16 or fp16, caches also int8 or fp8, any
strides whose last is 1; products accumulate in fp32, and lse and the parts' results are fp32. No atomics: two
runs give the same bits. Held by tests/test_decode.py.

New keys are rotated, quantised and appended here as well: a launch for them would take as long as a short
cache. No program reads from a cache what another writes. All take the keys that were there from the caches,
and the new ones, as they are to be stored, from k and v; of the programs of the part to which new keys
belong, that of the first rows writes them, whether its rows see them or not.
"""

from __future__ import annotations

import functools
import math
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastgpt.ops import launch
from fastgpt.ops.decode.spec import DecodeCall, DecodeSpec, DecodeTensors, capacity
from fastgpt.ops.device import (
    INF,
    LOG2E,
    blocks_of_keys,
    cast,
    dot,
    from_fp8,
    from_int8,
    gather_rows,
    key_range,
    offset,
    rotate,
    scatter_rows,
    score,
    softmax_end,
    softmax_step,
    to_fp8,
    to_int8,
    visible,
)
from fastgpt.ops.launch import Config

# All that a call may ask for today; a new feature is unsupported until it is written here.
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

FEW_ROWS = 16  # the most that "decode" is for: one block

# (chip, elements of a row, kernel): block_m rows by block_n keys, warps, stages. "decode" is bound by memory:
# what counts are the bytes under way to a multiprocessor, some 40 KiB on an H100, in the stages of all its
# programs. "prefill" is for more rows; "merge" has one row by block_n parts.
CONFIGS = {
    ("default", 64, "decode"): Config(16, 64, 4, 3),
    ("default", 128, "decode"): Config(16, 64, 4, 3),
    ("default", 256, "decode"): Config(16, 32, 8, 3),
    ("default", 64, "decode fp32"): Config(16, 64, 4, 3),
    ("default", 128, "decode fp32"): Config(16, 32, 8, 3),
    ("default", 256, "decode fp32"): Config(16, 16, 8, 3),
    ("default", 64, "prefill"): Config(64, 64, 8, 2),
    ("default", 128, "prefill"): Config(32, 64, 8, 2),
    ("default", 256, "prefill"): Config(16, 32, 8, 2),
    ("default", 128, "prefill fp32"): Config(16, 32, 8, 2),
    ("default", 256, "prefill fp32"): Config(16, 16, 8, 2),
    ("default", 256, "merge"): Config(1, 16, 4, 1),
    ("interpreter", 256, "decode"): Config(16, 128, 4, 1),
    ("interpreter", 256, "decode fp32"): Config(16, 128, 4, 1),
    ("interpreter", 256, "prefill"): Config(64, 64, 4, 1),
    ("interpreter", 256, "prefill fp32"): Config(64, 64, 4, 1),
    ("interpreter", 256, "merge"): Config(1, 4, 4, 1),
    ("gfx942", 128, "decode"): Config(16, 64, 4, 2),
    ("gfx942", 256, "decode"): Config(16, 32, 8, 2),
    ("gfx942", 128, "decode fp32"): Config(16, 32, 8, 2),
    ("gfx942", 256, "decode fp32"): Config(16, 16, 8, 2),
    **{(chip, 64, "decode"): Config(16, 128, 4, 3) for chip in ("sm_90", "sm_100")},
    **{(chip, 128, "decode"): Config(16, 64, 4, 3) for chip in ("sm_90", "sm_100")},
    **{(chip, 256, "decode"): Config(16, 64, 8, 3) for chip in ("sm_90", "sm_100")},
    ("sm_90", 128, "decode fp32"): Config(16, 64, 8, 3),
    ("sm_90", 256, "decode fp32"): Config(16, 16, 8, 3),
    ("sm_90", 128, "prefill"): Config(64, 64, 8, 2),
    ("sm_90", 256, "prefill"): Config(32, 32, 8, 2),
    ("sm_100", 128, "prefill"): Config(64, 64, 8, 2),
    ("sm_100", 256, "prefill"): Config(64, 32, 8, 2),
}
NEW_KEYS = 32  # of a block at most: rotary embedding takes many registers
RESIDENT = 2  # programs of a multiprocessor that num_splits = 0 provides for
LEAST_BLOCKS = 2  # of keys in a part of num_splits = 0


def unsupported(call: DecodeCall) -> list[str]:
    headdim = max(call.headdim, call.headdim_v)
    return launch.refusals(call.device, call.dtype, call.features, FEATURES, headdim)


class _Constants(NamedTuple):
    """What the kernels are compiled for, beside dtypes and which optional tensors there are."""

    HEADDIM: int
    HEADDIM_V: int
    BLOCK_D: int  # the powers of two that hold rows of HEADDIM, and of HEADDIM_V
    BLOCK_DV: int
    BLOCK_M: int  # rows
    BLOCK_N: int  # keys
    BLOCK_NEW: int  # new keys
    FEW_ROWS: bool  # one block of them: bound by memory
    HAS_LEFT: bool  # whether the window ends there
    HAS_RIGHT: bool
    PLAIN: bool  # s = softmax_scale · q·k with softmax_scale > 0, and nothing else
    SOFTCAP: bool
    PAIRS: int  # that rotary embedding turns, 0 without
    INTERLEAVED: bool  # whether pairs are neighbours
    PAGE_SIZE: int  # 0 without a block_table
    ONE_PAGE: bool  # a block of keys lies in one page
    MULTIPLE: int  # divides all strides of q, k and v (device.offset)
    CACHE_MULTIPLE: int  # divides all strides of the caches
    PRECISION: str  # device.dot


class _Sequence(NamedTuple):
    """Where one head of one sequence is in the caches, and what its scores are made of."""

    K: Any  # the head's first row in the caches
    V: Any
    stride_kb: Any
    stride_ks: Any
    stride_vb: Any
    stride_vs: Any
    index: Any  # of the sequence in caches without pages
    table: Any  # the sequence's pages, or None
    pad: Any  # rows before the first key
    cached: Any  # keys before the append
    positions: Any  # that the rotary tables have
    shift: Any  # keys after the append, less the queries
    window_left: Any
    window_right: Any
    k_descale: Any
    v_descale: Any
    softmax_scale: Any  # with k_descale in it
    softcap: Any
    slopes: Any  # (BLOCK_M), or None


@triton.jit
def _of_head(per_head, b, h, stride_b, default):
    """per_head (heads) or (batch, heads), at b and h."""
    if per_head is not None:
        return tl.load(per_head + b * stride_b + h)
    return default


@triton.jit
def _places(first, inside, at, C: tl.constexpr, MASKED: tl.constexpr):
    """Where keys first, first + 1, ... are in the caches, as many as ``inside`` has: the page (without a
    block_table a whole sequence), and the row there as a sum of a number and a vector. The entry of a key
    that is not inside is not read: it may be anything."""
    rows = tl.arange(0, inside.shape[0])
    first = tl.cast(first, tl.int32)  # the interpreter's loops count in Python's numbers
    if C.PAGE_SIZE == 0:
        page = at.index
        first += at.pad
    elif C.ONE_PAGE:
        page = tl.load(at.table + first // C.PAGE_SIZE)
        first = first % C.PAGE_SIZE
    else:
        rows += at.pad + first
        if MASKED:
            page = tl.load(at.table + rows // C.PAGE_SIZE, mask=inside, other=0)
        else:
            page = tl.load(at.table + rows // C.PAGE_SIZE)
        rows = rows % C.PAGE_SIZE
        first = 0
    return page, first, rows


@triton.jit
def _offsets(page, first, rows, stride_b, stride_s, C: tl.constexpr):
    return (
        offset(page, stride_b, C.CACHE_MULTIPLE)
        + offset(first, stride_s, C.CACHE_MULTIPLE)
        + offset(rows, stride_s, C.CACHE_MULTIPLE)
    )


@triton.jit
def _stored(x, descale, dtype: tl.constexpr):
    """x as a cache of ``dtype`` (fp8: uint8) holds it."""
    if dtype == tl.int8:
        x = to_int8(tl.div_rn(x.to(tl.float32), descale))
    elif dtype == tl.uint8:
        x = to_fp8(tl.div_rn(x.to(tl.float32), descale))
    return x


@triton.jit
def _read(x, dtype: tl.constexpr):
    """What a cache holds, but for its scale."""
    if x.dtype == tl.int8:
        x = from_int8(x, dtype)
    elif x.dtype == tl.uint8:
        x = from_fp8(x, dtype)
    return x


@triton.jit
def _in_vectors(column, PAIRS: tl.constexpr):
    """Columns of a table of PAIRS or of a half of them, which the compiler is told to be neighbours."""
    if PAIRS % 8 == 0:
        column = tl.max_contiguous(tl.multiple_of(column, 8), 8)
    return column


@triton.jit
def _rotated(x, base, offsets, inside, positions, known, cos, sin, C: tl.constexpr):
    """x, the rows of HEADDIM elements at base + offsets, rotated as at ``positions``: NaN from ``known`` on,
    which cos and sin have no rows for."""
    column = tl.arange(0, C.BLOCK_D)
    if C.INTERLEAVED:
        first = column % 2 == 0
        other = column ^ 1
        pair = column // 2
    else:
        first = column < C.PAIRS
        other = _in_vectors(tl.where(first, column + C.PAIRS, column - C.PAIRS), C.PAIRS)
        pair = _in_vectors(tl.where(first, column, other), C.PAIRS)
    turned = inside[:, None] & (column < 2 * C.PAIRS)[None, :]
    table = (tl.cast(positions, tl.int64) * C.PAIRS)[:, None] + pair[None, :]
    has_row = turned & (positions < known)[:, None]
    y = rotate(
        x.to(tl.float32),
        tl.load(base + offsets[:, None] + other[None, :], mask=turned, other=0.0).to(tl.float32),
        tl.load(cos + table, mask=has_row, other=float("nan")).to(tl.float32),
        tl.load(sin + table, mask=has_row, other=float("nan")).to(tl.float32),
        first[None, :],
    )
    return tl.where(turned, cast(y, x.dtype), x)


@triton.jit
def _tile(k, v, q, i, j, inside, m, l, acc, at, C: tl.constexpr, MASKED: tl.constexpr):
    """The softmax state after a block of keys j, as the caches hold them."""
    qk = dot(q, tl.trans(_read(k, q.dtype)), None, C.PRECISION)
    slopes = 0.0
    if at.slopes is not None:
        slopes = at.slopes[:, None]
    i = i[:, None]
    j = j[None, :]
    s, factor, _ = score(qk, i + at.shift - j, at.softmax_scale, at.softcap, slopes, C.PLAIN, C.SOFTCAP)
    if MASKED:
        seen = visible(i, j, at.shift, at.window_left, at.window_right, C.HAS_LEFT, C.HAS_RIGHT)
        s = tl.where(seen & inside[None, :], s, -INF)
    p, alpha, m, l = softmax_step(s, m, l, factor)
    v = _read(v, q.dtype)
    return m, l, dot(cast(p, v.dtype), v, acc * alpha[:, None], C.PRECISION)


@triton.jit
def _cached_tiles(begin, end, m, l, acc, q, i, at, C: tl.constexpr, MASKED: tl.constexpr):
    """The softmax state after the blocks of keys from begin to end, which lie in the caches."""
    for first in tl.range(begin, end, C.BLOCK_N):
        j = first + tl.arange(0, C.BLOCK_N)
        inside = j < end
        page, start, rows = _places(first, inside, at, C, MASKED)
        at_k = _offsets(page, start, rows, at.stride_kb, at.stride_ks, C)
        at_v = _offsets(page, start, rows, at.stride_vb, at.stride_vs, C)
        k = gather_rows(at.K, at_k, inside, C.HEADDIM, C.BLOCK_D, MASKED)
        v = gather_rows(at.V, at_v, inside, C.HEADDIM_V, C.BLOCK_DV, MASKED)
        m, l, acc = _tile(k, v, q, i, j, inside, m, l, acc, at, C, MASKED)
    return m, l, acc


@triton.jit
def _new_tiles(
    begin, end, m, l, acc, q, i, writes, K, V, stride_ks, stride_vs, cos, sin, at, C: tl.constexpr
):
    """The same of keys that are new, which it appends if it is this program that ``writes``."""
    for first in tl.range(begin // C.BLOCK_NEW * C.BLOCK_NEW, end, C.BLOCK_NEW, num_stages=1):
        j = first + tl.arange(0, C.BLOCK_NEW)
        inside = (j >= begin) & (j < end)
        k_offsets = offset(j - at.cached, stride_ks, C.MULTIPLE)
        v_offsets = offset(j - at.cached, stride_vs, C.MULTIPLE)
        k = gather_rows(K, k_offsets, inside, C.HEADDIM, C.BLOCK_D, True)
        v = gather_rows(V, v_offsets, inside, C.HEADDIM_V, C.BLOCK_DV, True)
        if C.PAIRS > 0:
            k = _rotated(k, K, k_offsets, inside, at.pad + j, at.positions, cos, sin, C)
        k = _stored(k, at.k_descale, at.K.dtype.element_ty)
        v = _stored(v, at.v_descale, at.V.dtype.element_ty)
        page, start, rows = _places(first, inside, at, C, True)
        at_k = _offsets(page, start, rows, at.stride_kb, at.stride_ks, C)
        at_v = _offsets(page, start, rows, at.stride_vb, at.stride_vs, C)
        scatter_rows(at.K, at_k, inside & writes, k, C.HEADDIM, C.BLOCK_D)
        scatter_rows(at.V, at_v, inside & writes, v, C.HEADDIM_V, C.BLOCK_DV)
        m, l, acc = _tile(k, v, q, i, j, inside, m, l, acc, at, C, True)
    return m, l, acc


def _strides(names: str) -> list[str]:
    return [f"stride_{name}{axis}" for name in names.split() for axis in "bsh"]


@triton.jit(
    do_not_specialize=[
        *_strides("q kc vc k v"),
        "stride_table",
        "stride_alibi_b",
        "stride_descale_b",
        "nheads_k",
        "group",
        "seqlen_q",
        "seqlen_new",
        "capacity",
        "positions",
        "splits",
        "window_left",
        "window_right",
    ]
)
def decode_forward(
    Q,
    KCache,
    VCache,
    Out,
    Lse,
    tensors,
    stride_qb,
    stride_qs,
    stride_qh,
    stride_kcb,
    stride_kcs,
    stride_kch,
    stride_vcb,
    stride_vcs,
    stride_vch,
    stride_kb,
    stride_ks,
    stride_kh,
    stride_vb,
    stride_vs,
    stride_vh,
    stride_table,
    stride_alibi_b,
    stride_descale_b,
    nheads_k,
    group,
    seqlen_q,
    seqlen_new,
    capacity,
    positions,
    splits,
    window_left,
    window_right,
    softmax_scale,
    softcap,
    C: tl.constexpr,
):
    """out = softmax(s) V and lse = log Σ exp(s) of one part of the keys of one head of k, for BLOCK_M rows.

    Out: (batch, seqlen_q, nheads, splits, HEADDIM_V), Lse: (batch, nheads, seqlen_q, splits), contiguous. A
    part without keys has lse −inf and leaves Out as it is, but for the first, which has the sink.
    """
    tiles = tl.maximum(tl.cdiv(seqlen_q * group, C.BLOCK_M), 1)
    pid = tl.program_id(0)
    block = pid % tiles  # these share their keys in the cache of the chip; then heads, neighbours in memory
    hk = pid // tiles % nheads_k
    part = pid // (tiles * nheads_k) % splits
    b = pid // (tiles * nheads_k * splits)
    row = block * C.BLOCK_M + tl.arange(0, C.BLOCK_M)
    valid = row < seqlen_q * group
    i = row // group
    h = tl.where(valid, hk * group + row % group, 0)
    nheads = nheads_k * group
    lse_at = ((tl.cast(b, tl.int64) * nheads + h) * seqlen_q + i) * splits + part

    # The keys that queries see, and those that are to be written, in parts.
    before = tl.maximum(tl.load(tensors.cache_seqlens + b), 0)
    pad = _of_head(tensors.cache_leftpad, b, 0, 1, 0)
    cached = before - pad
    # New keys without a place in the cache, or a row of the rotary tables, are neither read nor written.
    room = capacity
    if C.PAIRS > 0:
        room = tl.minimum(capacity, tl.maximum(before, positions))
    seqlen_k = tl.minimum(cached + seqlen_new, room - pad)
    shift = cached + seqlen_new - seqlen_q
    low, high, _, _ = key_range(
        0, seqlen_q - 1, shift, seqlen_k, window_left, window_right, C.HAS_LEFT, C.HAS_RIGHT
    )
    if tensors.k is not None:
        low = tl.minimum(low, cached)
        high = seqlen_k
    low = low // C.BLOCK_N * C.BLOCK_N
    size = tl.cdiv(tl.cdiv(tl.maximum(high - low, 0), splits), C.BLOCK_N) * C.BLOCK_N
    low += part * size
    high = tl.minimum(low + size, high)
    if (low >= high) & (part > 0):
        tl.store(Lse + lse_at, tl.full((C.BLOCK_M,), -INF, tl.float32), mask=valid)
        return

    k_descale = _of_head(tensors.k_descale, b, hk, stride_descale_b, 1.0)
    v_descale = _of_head(tensors.v_descale, b, hk, stride_descale_b, 1.0)
    slopes = None
    if tensors.alibi_slopes is not None:
        slopes = tl.load(tensors.alibi_slopes + b * stride_alibi_b + h)
    table = tensors.block_table
    if table is not None:
        table += tl.cast(b, tl.int64) * stride_table
    at = _Sequence(
        KCache + offset(hk, stride_kch, C.CACHE_MULTIPLE),
        VCache + offset(hk, stride_vch, C.CACHE_MULTIPLE),
        stride_kcb,
        stride_kcs,
        stride_vcb,
        stride_vcs,
        _of_head(tensors.cache_batch_idx, b, 0, 1, b),
        table,
        pad,
        cached,
        positions,
        shift,
        window_left,
        window_right,
        k_descale,
        v_descale,
        softmax_scale * k_descale,
        softcap,
        slopes,
    )
    Q += offset(b, stride_qb, C.MULTIPLE)
    q_offsets = offset(i, stride_qs, C.MULTIPLE) + offset(h, stride_qh, C.MULTIPLE)
    q = gather_rows(Q, q_offsets, valid, C.HEADDIM, C.BLOCK_D, True)
    if C.PAIRS > 0:
        position = before + i
        if not (C.HAS_LEFT or C.HAS_RIGHT):
            position = before + i * 0
        q = _rotated(q, Q, q_offsets, valid, position, positions, tensors.rotary_cos, tensors.rotary_sin, C)

    m = tl.full((C.BLOCK_M,), -INF, tl.float32)
    l = tl.full((C.BLOCK_M,), 0.0, tl.float32)
    if tensors.sink is not None:  # in the first part, as a key seen first, of value 0
        sink = tl.load(tensors.sink + h) * LOG2E
        m = tl.where(part == 0, sink, -INF)
        l = tl.where(m == -INF, 0.0, 1.0)
    acc = tl.full((C.BLOCK_M, C.BLOCK_DV), 0.0, tl.float32)
    first = block * C.BLOCK_M // group
    last = (tl.minimum((block + 1) * C.BLOCK_M, seqlen_q * group) - 1) // group
    begin, end, full_begin, full_end = key_range(
        first, last, shift, seqlen_k, window_left, window_right, C.HAS_LEFT, C.HAS_RIGHT
    )
    begin = tl.maximum(begin, low)
    end = tl.minimum(end, high)
    cached_end = tl.minimum(end, cached)
    cached_begin, full_begin, full_end = blocks_of_keys(
        begin, cached_end, tl.maximum(full_begin, low), tl.minimum(full_end, cached_end), C.BLOCK_N
    )
    if C.FEW_ROWS:  # a mask costs less than to fill the pipeline of loads a second time
        m, l, acc = _cached_tiles(cached_begin, cached_end, m, l, acc, q, i, at, C, True)
    else:
        if C.HAS_LEFT:
            m, l, acc = _cached_tiles(cached_begin, full_begin, m, l, acc, q, i, at, C, True)
        m, l, acc = _cached_tiles(full_begin, full_end, m, l, acc, q, i, at, C, False)
        m, l, acc = _cached_tiles(full_end, cached_end, m, l, acc, q, i, at, C, True)
    if tensors.k is not None:
        writes = block == 0
        K = tensors.k + offset(b, stride_kb, C.MULTIPLE) + offset(hk, stride_kh, C.MULTIPLE)
        V = tensors.v + offset(b, stride_vb, C.MULTIPLE) + offset(hk, stride_vh, C.MULTIPLE)
        m, l, acc = _new_tiles(
            tl.maximum(tl.where(writes, low, begin), cached),
            tl.where(writes, high, end),
            m, l, acc, q, i, writes, K, V, stride_ks, stride_vs, tensors.rotary_cos, tensors.rotary_sin, at,
            C,
        )  # fmt: skip

    inverse, lse = softmax_end(m, l)
    acc *= (inverse * v_descale)[:, None]
    out_at = ((tl.cast(b, tl.int64) * seqlen_q + i) * nheads + h) * splits + part
    scatter_rows(Out, out_at * C.HEADDIM_V, valid, cast(acc, Out.dtype.element_ty), C.HEADDIM_V, C.BLOCK_DV)
    tl.store(Lse + lse_at, lse, mask=valid)


@triton.jit(do_not_specialize=["nheads", "seqlen_q", "splits"])
def decode_merge(
    PartOut,
    PartLse,
    Out,
    Lse,
    nheads,
    seqlen_q,
    splits,
    HEADDIM_V: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    BLOCK_S: tl.constexpr,
):
    """out (batch, seqlen_q, nheads, HEADDIM_V) and lse (batch, nheads, seqlen_q) of one row, from its parts:
    attention over them, with lse for scores and out for values. Parts without keys are not read."""
    row = tl.cast(tl.program_id(0), tl.int64)
    h = row % nheads
    i = row // nheads % seqlen_q
    lse_at = (row // nheads // seqlen_q * nheads + h) * seqlen_q + i
    m = tl.full((1,), -INF, tl.float32)
    l = tl.full((1,), 0.0, tl.float32)
    acc = tl.full((1, BLOCK_DV), 0.0, tl.float32)
    for first in tl.range(0, splits, BLOCK_S):
        part = first + tl.arange(0, BLOCK_S)
        lse = tl.load(PartLse + lse_at * splits + part, mask=part < splits, other=-INF)
        at = (row * splits + part) * HEADDIM_V
        out = gather_rows(PartOut, at, lse > -INF, HEADDIM_V, BLOCK_DV, True)
        p, alpha, m, l = softmax_step(lse[None, :], m, l, LOG2E)
        acc = acc * alpha[:, None] + tl.sum(tl.trans(p) * out, 0)[None, :]
    inverse, lse = softmax_end(m, l)
    at = row * HEADDIM_V + tl.arange(0, 1)
    out = cast(acc * inverse[:, None], Out.dtype.element_ty)
    scatter_rows(Out, at, tl.arange(0, 1) == 0, out, HEADDIM_V, BLOCK_DV)
    tl.store(Lse + lse_at + tl.arange(0, 1), lse)


@functools.cache
def _automatic_splits(programs: int, most: int, slots: int) -> int:
    """The least number of parts, up to ``most``, with which waves of ``slots`` programs are about as full as
    they can be; ``programs`` is how many there are of each part."""

    def filled(splits: int) -> float:
        waves = max(programs, 1) * splits / slots
        return waves / math.ceil(waves)

    best = max(map(filled, range(1, most + 1)))
    return next(splits for splits in range(1, most + 1) if filled(splits) >= 0.9 * best)


def _splits(
    spec: DecodeSpec, seqlen_q: int, seqlen_new: int, keys: int, programs: int, block_n: int, slots: int
) -> int:
    """Into how many parts the keys are cut, ``keys`` at most. It depends on shapes alone."""
    if spec.window_left >= 0:  # no more than these belong to parts
        keys = min(keys, max(spec.window_left + seqlen_q, seqlen_new) + block_n)
    blocks = triton.cdiv(keys, block_n)
    if spec.num_splits:
        return max(min(spec.num_splits, blocks), 1)
    return _automatic_splits(programs, max(blocks // LEAST_BLOCKS, 1), slots)


class _Plan(NamedTuple):
    """How a call is launched."""

    programs: int  # of one part
    splits: int
    constants: _Constants


@functools.lru_cache(maxsize=1024)
def _plan(
    config: Config,
    few_rows: bool,
    precision: str,
    slots: int,
    q_shape: tuple[int, ...],
    q_bytes: int,
    cache_shape: tuple[int, ...],
    cache_bytes: int,
    headdim_v: int,
    strides: tuple[int, ...],
    spec: DecodeSpec,
    seqlen_new: int | None,
    pairs: int,
    pages: int | None,
    padded: bool,
    linear: bool,
) -> _Plan:
    """Of a call with these shapes, which takes longer to find than a short call may take. slots: programs
    that the GPU holds; pages: the block_table's columns; padded: there is a cache_leftpad; linear: scores are
    q·k times a number, but for softcap."""
    batch, seqlen_q, nheads, headdim = q_shape
    page_size, nheads_k = cache_shape[1:3]
    constants = (
        headdim,
        headdim_v,
        launch.block_dim(headdim),
        launch.block_dim(headdim_v),
        config.block_m,
        config.block_n,
        min(config.block_m, config.block_n, NEW_KEYS),
        few_rows,
        spec.window_left >= 0,
        spec.window_right >= 0,
        linear and not spec.softcap and spec.softmax_scale > launch.LEAST_SCALE,
        spec.softcap != 0,
        pairs,
        spec.rotary_interleaved,
        0 if pages is None else page_size,
        pages is not None and page_size % config.block_n == 0 and not padded,
        launch.stride_multiple(strides[:3] + strides[9:], q_bytes),
        launch.stride_multiple(strides[3:9], cache_bytes),
        precision,
    )
    tiles = triton.cdiv(seqlen_q * (nheads // nheads_k), config.block_m)
    programs = batch * nheads_k * (tiles if seqlen_new is None else max(tiles, 1))
    keys = page_size * (1 if pages is None else pages)
    splits = _splits(spec, seqlen_q, seqlen_new or 0, keys, programs, config.block_n, slots)
    return _Plan(programs, splits, launch.constants(_Constants, *constants))


def _normalized(tensors: DecodeTensors) -> DecodeTensors:
    """As the kernel reads them: what has no stride of its own there contiguous, scales in fp32."""
    k, v, cache_seqlens, cos, sin, index, pads, table, *per_head = tensors
    cos, sin, index, pads = (None if t is None else t.contiguous() for t in (cos, sin, index, pads))
    if table is not None and table.stride(1) != 1:
        table = table.contiguous()
    fp32 = [None if t is None else t.float().contiguous() for t in per_head]
    return DecodeTensors(k, v, cache_seqlens.contiguous(), cos, sin, index, pads, table, *fp32)


@launch.tuned
def forward(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, spec: DecodeSpec, tensors: DecodeTensors
) -> tuple[Tensor, Tensor]:
    batch, seqlen_q, nheads, headdim = q.shape
    nheads_k, headdim_v = v_cache.shape[2:]
    tensors = _normalized(tensors)
    k, table, slopes, descale = tensors.k, tensors.block_table, tensors.alibi_slopes, tensors.k_descale
    if k_cache.dtype == torch.float8_e4m3fn:
        k_cache, v_cache = k_cache.view(torch.uint8), v_cache.view(torch.uint8)
    group = nheads // nheads_k
    width, kind = max(headdim, headdim_v), " fp32" if q.dtype == torch.float32 else ""
    strides = launch.strides(q, k_cache, v_cache, k, tensors.v)
    chip = launch.chip(q.device)
    few_rows = seqlen_q * group <= FEW_ROWS
    kernel = ("decode" if few_rows else "prefill") + kind
    config = launch.choose(CONFIGS, width, kernel, chip.architecture)
    plan = _plan(
        config,
        few_rows,
        chip.precision,
        RESIDENT * chip.multiprocessors,
        q.shape,
        q.element_size(),
        k_cache.shape,
        k_cache.element_size(),
        headdim_v,
        tuple(strides),
        spec,
        None if k is None else k.shape[1],
        0 if tensors.rotary_cos is None else tensors.rotary_cos.shape[1],
        None if table is None else table.shape[1],
        tensors.cache_leftpad is not None,
        slopes is None and descale is None,
    )
    if table is not None:  # its entries are loaded as many stages before the keys
        config = config._replace(num_stages=2 * config.num_stages - 1)
    splits = plan.splits
    out = q.new_empty(batch, seqlen_q, nheads, headdim_v)
    lse = q.new_empty(batch, nheads, seqlen_q, dtype=torch.float32)
    parts = out, lse
    if splits > 1:
        parts = (
            q.new_empty(batch, seqlen_q, nheads, splits, headdim_v, dtype=torch.float32),
            q.new_empty(batch, nheads, seqlen_q, splits, dtype=torch.float32),
        )
    # Beyond all keys and queries a window hides nothing, and sums with it stay in 32 bits.
    keys, seqlen_new = capacity(k_cache, tensors), 0 if k is None else k.shape[1]
    most = keys + seqlen_q + seqlen_new
    windows = min(spec.window_left, most), min(spec.window_right, most)
    launch.launch(
        decode_forward,
        plan.programs * splits,
        config,
        q.device,
        *(q, k_cache, v_cache, *parts, tensors),
        *strides,
        0 if table is None else table.stride(0),
        nheads if slopes is not None and slopes.dim() == 2 else 0,
        nheads_k if descale is not None and descale.dim() == 2 else 0,
        nheads_k,
        group,
        seqlen_q,
        seqlen_new,
        keys,
        0 if tensors.rotary_cos is None else tensors.rotary_cos.shape[0],
        splits,
        *windows,
        spec.softmax_scale,
        spec.softcap,
        plan.constants,
    )
    if splits > 1:
        merge = launch.choose(CONFIGS, headdim_v, "merge", chip.architecture)
        launch.launch(
            decode_merge,
            batch * seqlen_q * nheads,
            merge,
            q.device,
            *(*parts, out, lse, nheads, seqlen_q, splits),
            HEADDIM_V=headdim_v,
            BLOCK_DV=launch.block_dim(headdim_v),
            BLOCK_S=merge.block_n,
        )
    return out, lse
