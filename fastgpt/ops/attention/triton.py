"""Attention in Triton, forward and backward (Dao et al. 2022, arXiv:2205.14135; Dao 2023, arXiv:2307.08691).

A program owns a block of queries of one head (out and lse; dq), a block of keys of one head of k (dk and dv),
or a tile of the bias (dbias), and walks over the blocks of the other side that the mask lets it see: those in
sight whole without a mask, those at the edges with one. Storage fp32, bf16 or fp16, any strides whose last is
1; products accumulate in fp32, and softmax states, lse and delta are fp32. No atomics: two runs give the same
bits. Held by the parity tables of tests/test_attention.py.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastgpt.ops import launch, philox
from fastgpt.ops.attention.spec import AttentionCall, AttentionSpec, AttentionTensors
from fastgpt.ops.device import (
    INF,
    LARGEST,
    LOG2E,
    cast,
    dot,
    in_sight,
    load_rows,
    offset,
    philox_keep,
    rows_from,
    score,
    softmax_end,
    softmax_step,
    store_rows,
    visible,
)
from fastgpt.ops.launch import Config
from fastgpt.ops.native import DTYPES

# All that a call may ask for today; a new feature is unsupported until it is written here.
FEATURES = (
    "window",
    "softcap",
    "dropout",
    "alibi",
    "sink",
    "bias",
    "varlen",
    "key_ranges",
    "lse",
    "backward",
)

_SCORES = ("", " general", " fp32")  # 16 bits and causal or full; 16 bits with anything more; fp32


def _table(chips: str, kernel: str, *configs: tuple[int, int, int, int]) -> dict[Any, Config]:
    """Rows for head dims up to 64, 128 and 256: queries by keys of a tile, warps, stages."""
    rows = [(64 << n, Config(*config)) for n, config in enumerate(configs)]
    return {(chip, width, kernel): config for chip in chips.split() for width, config in rows}


# By chip, head dim and kernel. Of the candidates that neither spill nor outgrow the chip's shared memory the
# largest tile (benchmarks/compile_report.py); not one of them has been timed on a GPU yet.
CONFIGS = {
    **_table("default", "forward", (64, 64, 4, 2), (64, 32, 4, 2), (32, 32, 4, 1)),
    **_table("default", "forward general", (64, 32, 4, 2), (32, 32, 4, 1), (32, 16, 4, 1)),
    **_table("default", "forward fp32", (32, 32, 8, 1), (32, 32, 8, 1), (32, 32, 8, 1)),
    **_table("default", "dq", (64, 32, 4, 2), (32, 32, 4, 1), (16, 16, 4, 1)),
    **_table("default", "dq general", (64, 32, 4, 1), (32, 16, 4, 1), (16, 32, 8, 1)),
    **_table("default", "dq fp32", (32, 32, 8, 1), (32, 32, 8, 1), (32, 32, 8, 1)),
    **_table("default", "dkdv", (32, 64, 4, 1), (32, 32, 4, 1), (16, 32, 8, 1)),
    **_table("default", "dkdv packed", (32, 64, 4, 1), (32, 32, 4, 1), (16, 32, 8, 1)),
    **_table("default", "dkdv general", (32, 32, 8, 1), (16, 32, 8, 1), (16, 32, 8, 1)),
    **_table("default", "dkdv dropout", (32, 32, 8, 1), (16, 32, 8, 1), (16, 16, 8, 1)),
    **_table("default", "dkdv fp32", (16, 32, 8, 1), (16, 32, 8, 1), (16, 16, 8, 1)),
    ("default", 256, "rows"): Config(32, 32, 8, 1),
    **_table("default", "dbias", (16, 16, 4, 1), (16, 32, 8, 1), (16, 32, 8, 1)),
    **_table("sm_80", "forward", (128, 64, 8, 3), (64, 64, 4, 3), (32, 32, 4, 2)),
    **_table("sm_80", "dq", (64, 32, 4, 2), (64, 32, 4, 2), (16, 16, 4, 1)),
    **_table("sm_90 sm_100", "forward", (128, 128, 8, 3), (128, 128, 8, 3), (128, 64, 8, 2)),
    **_table("sm_90 sm_100", "forward general", (128, 64, 8, 2), (128, 64, 8, 3), (64, 32, 8, 2)),
    **_table("sm_90 sm_100", "dq", (128, 128, 8, 2), (128, 128, 8, 2), (64, 64, 8, 2)),
    **_table("sm_90 sm_100", "dkdv general", (64, 64, 8, 1), (32, 64, 8, 1)),
    **_table("sm_90", "forward fp32", (64, 32, 8, 1), (32, 32, 8, 1), (32, 32, 8, 1)),
    **_table("sm_90", "dq fp32", (64, 32, 8, 1), (32, 32, 8, 1), (32, 32, 8, 1)),
    **_table("sm_90", "dq general", (64, 32, 4, 2), (64, 64, 8, 2), (64, 16, 8, 2)),
    **_table("sm_90", "dkdv", (64, 128, 8, 2), (32, 128, 8, 2), (16, 64, 8, 2)),
    **_table("sm_90", "dkdv packed", (32, 128, 8, 2), (32, 64, 8, 2), (16, 64, 8, 2)),
    **_table("sm_100", "dq general", (128, 64, 8, 2), (128, 64, 8, 2), (64, 32, 8, 2)),
    **_table("sm_100", "dkdv", (64, 128, 8, 2), (64, 128, 8, 1), (64, 64, 8, 1)),
    **_table("sm_100", "dkdv packed", (64, 128, 8, 2), (64, 128, 8, 1), (64, 64, 8, 1)),
    **_table("sm_100", "dkdv dropout", (64, 64, 8, 1), (32, 64, 8, 1)),
    **_table("gfx942", "forward", (128, 64, 8, 2), (128, 64, 8, 2), (64, 32, 8, 1)),
    **_table("gfx942", "dkdv dropout", (16, 64, 4, 1), (16, 32, 4, 1)),
    **{("interpreter", 256, "forward" + kind): Config(128, 64, 4, 1) for kind in _SCORES},
    **{("interpreter", 256, "dq" + kind): Config(64, 128, 4, 1) for kind in _SCORES},
    **{("interpreter", 256, "dkdv" + kind): Config(128, 64, 4, 1) for kind in _SCORES},
    **{("interpreter", 256, "dkdv " + kind): Config(128, 64, 4, 1) for kind in ("packed", "dropout")},
    ("interpreter", 256, "rows"): Config(128, 128, 8, 1),
    ("interpreter", 256, "dbias"): Config(128, 64, 4, 1),
}


def unsupported(call: AttentionCall) -> list[str]:
    headdim = max(call.headdim, call.headdim_v)
    return launch.refusals(call.device, call.dtype, call.features, FEATURES, headdim)


CHUNK = tl.constexpr(32)  # columns


@triton.jit
def _sequence_of_block(block, cu_seqlens, batch, BLOCK: tl.constexpr):
    """Which packed sequence the block-th block of rows belongs to, and the first block of that sequence.

    Sequence b's blocks start at cu_seqlens[b] // BLOCK + b, which leaves it room for all it can have.
    """
    low = tl.cast(0, tl.int32)
    high = tl.cast(batch, tl.int32)
    while high - low > 1:
        middle = (low + high) // 2
        if tl.load(cu_seqlens + middle) // BLOCK + middle <= block:
            low = middle
        else:
            high = middle
    return low, tl.load(cu_seqlens + low) // BLOCK + low


@triton.jit
def _place(
    pid,
    cu_seqlens,
    batch,
    heads,
    seqlen,
    BLOCK: tl.constexpr,
):
    """What a program owns: sequence b, head h and block. The blocks of a head follow each other, which share
    its keys in the cache, the last ones first: where the mask is causal, they have the most to do."""
    if cu_seqlens is not None:
        blocks = seqlen // BLOCK + batch
        block = blocks - 1 - pid % blocks
        b, first = _sequence_of_block(block, cu_seqlens, batch, BLOCK)
        block -= first
        h = pid // blocks
    else:
        blocks = tl.cdiv(seqlen, BLOCK)
        block = blocks - 1 - pid % blocks
        h = (pid // blocks) % heads
        b = pid // (blocks * heads)
    return b, h, block


@triton.jit
def _rows(b, cu_seqlens, seqlen):
    """The first row of sequence b in its tensor, beside what stride_b accounts for, and how many it has."""
    first = tl.cast(0, tl.int32)
    count = seqlen
    if cu_seqlens is not None:
        first = tl.load(cu_seqlens + b)
        count = tl.load(cu_seqlens + b + 1) - first
    return first, count


@triton.jit
def _key_rows(b, cu_seqlens_k, seqused_k, leftpad_k, seqlen_k):
    """The same of its keys, rows [leftpad_k, seqused_k) of those it has."""
    first, count = _rows(b, cu_seqlens_k, seqlen_k)
    if seqused_k is not None:
        count = tl.load(seqused_k + b)
    if leftpad_k is not None:
        pad = tl.load(leftpad_k + b)
        first += pad
        count = tl.maximum(count - pad, 0)
    return first, count


@triton.jit
def _start(b, row, h, stride_b, stride_s, stride_h, MULTIPLE: tl.constexpr):
    """Where that row of that head begins; stride_b is 0 for packed sequences."""
    return offset(b, stride_b, MULTIPLE) + offset(row, stride_s, MULTIPLE) + offset(h, stride_h, MULTIPLE)


@triton.jit
def _load_once(
    base, first, count, stride, WIDTH: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, C: tl.constexpr
):
    source = rows_from(base, count, stride, WIDTH, ROWS, BLOCK, C.TMA)
    return load_rows(source, first, count, stride, WIDTH, ROWS, BLOCK, C.MULTIPLE, C.TMA, True)


@triton.jit
def _factor(
    base, first, count, stride, WIDTH: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, C: tl.constexpr
):
    """What _product takes of a block that stays for the whole program: its rows, or where they begin."""
    if C.CHUNKED:
        return _pointers(base, first, stride, ROWS, C)
    else:
        return _load_once(base, first, count, stride, WIDTH, ROWS, BLOCK, C)


@triton.jit
def _pointers(base, first, stride, ROWS: tl.constexpr, C: tl.constexpr):
    return base + offset(first, stride, C.MULTIPLE) + offset(tl.arange(0, ROWS), stride, C.MULTIPLE)


@triton.jit
def _product(a, b, inside_a, inside_b, WIDTH: tl.constexpr, BLOCK: tl.constexpr, C: tl.constexpr):
    """a bᵀ of rows (M, BLOCK) and (N, BLOCK) or, if CHUNKED, of rows of WIDTH that begin at a and b."""
    if C.CHUNKED:
        product = tl.full((inside_a.shape[0], inside_b.shape[0]), 0.0, tl.float32)
        for first in tl.range(0, BLOCK, CHUNK):
            column = first + tl.arange(0, CHUNK)
            mask = (column < WIDTH)[None, :]
            a_part = tl.load(a[:, None] + column[None, :], mask=inside_a[:, None] & mask, other=0.0)
            b_part = tl.load(b[:, None] + column[None, :], mask=inside_b[:, None] & mask, other=0.0)
            product = dot(a_part, tl.trans(b_part), product, C.PRECISION)
    else:
        product = dot(a, tl.trans(b), None, C.PRECISION)
    return product


@triton.jit
def _lse_row(b, h, first_q, cu_seqlens_q, nheads, seqlen_q):
    """Where query 0 of (b, h) is in lse."""
    if cu_seqlens_q is not None:
        return tl.cast(h, tl.int64) * seqlen_q + first_q
    return (tl.cast(b, tl.int64) * nheads + h) * seqlen_q


class _Scores(NamedTuple):
    """What the scores of one head of one sequence are made of."""

    seqlen_q: Any
    seqlen_k: Any
    window_left: Any
    window_right: Any
    softmax_scale: Any
    softcap: Any
    slope: Any
    bias_start: Any  # where the bias has query 0 and key 0
    stride_bias_q: Any
    stride_bias_k: Any
    philox_column: Any
    dropout_threshold: Any
    dropout_scale: Any  # 1 / (1 − dropout_p)


class _Constants(NamedTuple):
    """What a kernel is compiled for, beside dtypes and which optional tensors there are."""

    HEADDIM: int
    HEADDIM_V: int
    BLOCK_D: int  # the powers of two that hold rows of HEADDIM, and of HEADDIM_V
    BLOCK_DV: int
    BLOCK_M: int  # queries
    BLOCK_N: int  # keys
    HAS_LEFT: bool  # whether the window ends there
    HAS_RIGHT: bool
    PLAIN: bool  # s = softmax_scale · q·k with softmax_scale > 0, and nothing else
    SOFTCAP: bool
    MULTIPLE: int  # divides all strides of q, k, v and what has their dtype (device.offset)
    TMA: bool  # device.rows_from
    CHUNKED: bool  # rows are too wide for the registers: _product reads them in parts
    PRECISION: str  # device.dot


@triton.jit
def _scores(
    b, h, sq, sk, tensors, nheads, stride_bias_b, stride_bias_h, stride_bias_q, stride_bias_k, stride_alibi_b,
    window_left, window_right, softmax_scale, softcap, dropout_threshold, dropout_scale,
):  # fmt: skip
    slope = 0.0
    if tensors.alibi_slopes is not None:
        slope = tl.load(tensors.alibi_slopes + b * stride_alibi_b + h)
    bias_start = tl.cast(b, tl.int64) * stride_bias_b + tl.cast(h, tl.int64) * stride_bias_h
    if tensors.leftpad_k is not None:
        bias_start += tl.load(tensors.leftpad_k + b).to(tl.int64) * stride_bias_k
    return _Scores(
        sq, sk, window_left, window_right, softmax_scale, softcap, slope, bias_start, stride_bias_q,
        stride_bias_k, b * nheads + h, dropout_threshold, dropout_scale,
    )  # fmt: skip


@triton.jit
def _score_tile(qk, i, j, spec, tensors, C: tl.constexpr, MASKED: tl.constexpr):
    """The scores, in base 2, are the first result times the second; the third is d softcap(x) / dx.

    s = softcap(softmax_scale · qk) + bias − slope · |i + shift − j|, −inf where key j is hidden from query i,
    which only MASKED tiles have to ask. i and j are columns and rows of the tile, or rows and columns.
    """
    shift = spec.seqlen_k - spec.seqlen_q
    inside = (i < spec.seqlen_q) & (j < spec.seqlen_k)
    x, factor, derivative = score(
        qk, i + shift - j, spec.softmax_scale, spec.softcap, spec.slope, C.PLAIN, C.SOFTCAP
    )
    if tensors.attn_bias is not None:
        at = spec.bias_start + i.to(tl.int64) * spec.stride_bias_q + j.to(tl.int64) * spec.stride_bias_k
        bias = tl.load(tensors.attn_bias + at, mask=inside, other=0)
        if tensors.attn_bias.dtype.element_ty == tl.int1:
            x = tl.where(bias, x, -INF)
        else:
            # The product is infinite for the largest finite numbers, which some masks have for infinity.
            term = bias.to(tl.float32) * LOG2E
            term = tl.where((term == -INF) & (bias != -INF), -LARGEST, term)
            x += tl.where((term == INF) & (bias != INF), LARGEST, term)
    if MASKED:
        seen = visible(i, j, shift, spec.window_left, spec.window_right, C.HAS_LEFT, C.HAS_RIGHT)
        x = tl.where(seen & inside, x, -INF)
    return x, factor, derivative


@triton.jit
def _keep(i, first, spec, tensors, C: tl.constexpr):
    """(BLOCK_M, BLOCK_N): which probabilities of queries i and keys from ``first`` dropout keeps."""
    return philox_keep(tensors.rng_state, i, first, spec.philox_column, spec.dropout_threshold, C.BLOCK_N)


@triton.jit
def _forward_tiles(
    begin, end, m, l, acc, q, i, K, V, stride_ks, stride_vs, spec, tensors,
    C: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """The softmax state after the blocks of keys from begin to end."""
    rows = tl.arange(0, C.BLOCK_N)
    for first in tl.range(begin, end, C.BLOCK_N):
        j = first + rows
        sk = spec.seqlen_k
        if C.CHUNKED:
            k = _pointers(K, first, stride_ks, C.BLOCK_N, C)
        else:
            k = load_rows(K, first, sk, stride_ks, C.HEADDIM, C.BLOCK_N, C.BLOCK_D, C.MULTIPLE, C.TMA, MASKED)
        v = load_rows(V, first, sk, stride_vs, C.HEADDIM_V, C.BLOCK_N, C.BLOCK_DV, C.MULTIPLE, C.TMA, MASKED)
        qk = _product(q, k, i < spec.seqlen_q, j < sk, C.HEADDIM, C.BLOCK_D, C)
        s, factor, _ = _score_tile(qk, i[:, None], j[None, :], spec, tensors, C, MASKED)
        p, alpha, m, l = softmax_step(s, m, l, factor)
        if tensors.rng_state is not None:
            p = tl.where(_keep(i, first, spec, tensors, C), p, 0.0)
        acc = dot(cast(p, v.dtype), v, acc * alpha[:, None], C.PRECISION)
    return m, l, acc


DBIAS_PROGRAMS = 4  # of attention_dbias that a multiprocessor has, if there is as much to do
ROWS = tl.constexpr(128)  # of queries, of which the backward kernels take some at a time

# A new length or stride compiles nothing.
_NUMBERS = [
    *("batch", "nheads", "group", "seqlen_q", "seqlen_k", "window_left", "window_right", "dropout_threshold"),
    *("stride_bias_b", "stride_bias_h", "stride_bias_q", "stride_bias_k", "stride_alibi_b"),
]


def _numbers(tensors: str) -> list[str]:
    return _NUMBERS + [f"stride_{name}{axis}" for name in tensors.split() for axis in "bsh"]


@triton.jit(do_not_specialize=_numbers("q k v o"))
def attention_forward(
    Q, K, V, Out, Lse, tensors,
    stride_qb, stride_qs, stride_qh, stride_kb, stride_ks, stride_kh, stride_vb, stride_vs, stride_vh,
    stride_ob, stride_os, stride_oh,
    stride_bias_b, stride_bias_h, stride_bias_q, stride_bias_k, stride_alibi_b,
    batch, nheads, group, seqlen_q, seqlen_k, window_left, window_right, softmax_scale, softcap,
    dropout_threshold, dropout_scale,
    C: tl.constexpr,
):  # fmt: skip
    """out = softmax(s) V and lse = log Σ exp(s) of one block of queries of one head.

    Lse: (batch, nheads, seqlen_q) or packed (nheads, seqlen_q), contiguous; of packed sequences seqlen_q and
    seqlen_k are the totals.
    """
    b, h, block = _place(tl.program_id(0), tensors.cu_seqlens_q, batch, nheads, seqlen_q, C.BLOCK_M)
    first_q, sq = _rows(b, tensors.cu_seqlens_q, seqlen_q)
    first_k, sk = _key_rows(b, tensors.cu_seqlens_k, tensors.seqused_k, tensors.leftpad_k, seqlen_k)
    first = block * C.BLOCK_M
    if first >= sq:
        return
    rows = tl.arange(0, C.BLOCK_M)
    i = first + rows
    spec = _scores(
        b, h, sq, sk, tensors, nheads, stride_bias_b, stride_bias_h, stride_bias_q, stride_bias_k,
        stride_alibi_b, window_left, window_right, softmax_scale, softcap, dropout_threshold, dropout_scale,
    )  # fmt: skip
    Q += _start(b, first_q, h, stride_qb, stride_qs, stride_qh, C.MULTIPLE)
    K += _start(b, first_k, h // group, stride_kb, stride_ks, stride_kh, C.MULTIPLE)
    V += _start(b, first_k, h // group, stride_vb, stride_vs, stride_vh, C.MULTIPLE)
    q = _factor(Q, first, sq, stride_qs, C.HEADDIM, C.BLOCK_M, C.BLOCK_D, C)
    K = rows_from(K, sk, stride_ks, C.HEADDIM, C.BLOCK_N, C.BLOCK_D, C.TMA)
    V = rows_from(V, sk, stride_vs, C.HEADDIM_V, C.BLOCK_N, C.BLOCK_DV, C.TMA)

    m = tl.full((C.BLOCK_M,), -INF, tl.float32)
    l = tl.full((C.BLOCK_M,), 0.0, tl.float32)
    if tensors.sink is not None:  # as a key seen first, of value 0
        m = tl.full((C.BLOCK_M,), 0.0, tl.float32) + tl.load(tensors.sink + h) * LOG2E
        l = tl.where(m == -INF, 0.0, 1.0)
    acc = tl.full((C.BLOCK_M, C.BLOCK_DV), 0.0, tl.float32)
    last = tl.minimum(first + C.BLOCK_M, sq) - 1
    begin, full_begin, full_end, end = in_sight(
        first, last, sk - sq, sk, window_left, window_right, C.HAS_LEFT, C.HAS_RIGHT, C.BLOCK_N
    )
    if C.HAS_LEFT:
        m, l, acc = _forward_tiles(
            begin, full_begin, m, l, acc, q, i, K, V, stride_ks, stride_vs, spec, tensors, C, True
        )
    m, l, acc = _forward_tiles(
        full_begin, full_end, m, l, acc, q, i, K, V, stride_ks, stride_vs, spec, tensors, C, False
    )
    m, l, acc = _forward_tiles(
        full_end, end, m, l, acc, q, i, K, V, stride_ks, stride_vs, spec, tensors, C, True
    )

    inverse, lse = softmax_end(m, l)
    acc *= (inverse * dropout_scale)[:, None]
    Out += _start(b, first_q, h, stride_ob, stride_os, stride_oh, C.MULTIPLE)
    store_rows(Out, first, sq, stride_os, acc, C.HEADDIM_V, C.BLOCK_M, C.BLOCK_DV, C.MULTIPLE, C.TMA)
    Lse += _lse_row(b, h, first_q, tensors.cu_seqlens_q, nheads, seqlen_q)
    tl.store(Lse + i, lse, mask=i < sq)


@triton.jit
def _row_start(b, h, cu_seqlens_q, batch, nheads, seqlen_q):
    """Where query 0 of (b, h) is in what attention_rows makes, whose sequences begin at multiples of ROWS."""
    if cu_seqlens_q is not None:
        first = tl.load(cu_seqlens_q + b) // ROWS + b
        return (tl.cast(h, tl.int64) * (seqlen_q // ROWS + batch) + first) * ROWS
    else:
        return (tl.cast(b, tl.int64) * nheads + h) * tl.cdiv(seqlen_q, ROWS) * ROWS


@triton.jit(do_not_specialize=_numbers("o do"))
def attention_rows(
    Out, dOut, Lse, dLse, Lse2, Delta, dSink, cu_seqlens_q, sink,
    stride_ob, stride_os, stride_oh, stride_dob, stride_dos, stride_doh,
    batch, nheads, seqlen_q,
    C: tl.constexpr,
):  # fmt: skip
    """What the backward kernels need of each query: lse in base 2 and delta = Σ_d dout · out − dlse.

    Lse, dLse (or None): as of attention_forward. A query that saw no key, or is none, gets Lse2 = inf: its
    probabilities 2^(s − Lse2) are 0. dSink (or None): a number a program, which add up to sink's gradient.
    """
    b, h, block = _place(tl.program_id(0), cu_seqlens_q, batch, nheads, seqlen_q, ROWS)
    first_q, sq = _rows(b, cu_seqlens_q, seqlen_q)
    first = block * ROWS
    if first >= sq:
        return
    Out += _start(b, first_q, h, stride_ob, stride_os, stride_oh, C.MULTIPLE)
    dOut += _start(b, first_q, h, stride_dob, stride_dos, stride_doh, C.MULTIPLE)
    from_row = _lse_row(b, h, first_q, cu_seqlens_q, nheads, seqlen_q)
    to_row = _row_start(b, h, cu_seqlens_q, batch, nheads, seqlen_q)
    dsink = tl.full((C.BLOCK_M,), 0.0, tl.float32)
    for at in tl.range(first, first + ROWS, C.BLOCK_M):
        i = at + tl.arange(0, C.BLOCK_M)
        out = _load_once(Out, at, sq, stride_os, C.HEADDIM_V, C.BLOCK_M, C.BLOCK_DV, C)
        dout = _load_once(dOut, at, sq, stride_dos, C.HEADDIM_V, C.BLOCK_M, C.BLOCK_DV, C)
        delta = tl.sum(out.to(tl.float32) * dout.to(tl.float32), 1)
        lse = tl.load(Lse + from_row + i, mask=i < sq, other=INF)
        if dLse is not None:
            delta -= tl.load(dLse + from_row + i, mask=i < sq, other=0.0)
        lse = tl.where(lse == -INF, INF, lse * LOG2E)
        tl.store(Lse2 + to_row + i, lse)
        tl.store(Delta + to_row + i, delta)
        if sink is not None:  # a key of value 0: its dp is 0
            dsink -= tl.exp2(tl.load(sink + h) * LOG2E - lse) * delta
    if sink is not None:
        tl.store(dSink + tl.program_id(0), tl.sum(dsink))


@triton.jit
def _numbers_from(base, seqlen_q, C: tl.constexpr):
    """device.rows_from, for what attention_rows makes."""
    tl.static_assert(ROWS % C.BLOCK_M == 0)
    if C.TMA:
        return tl.make_tensor_descriptor(
            base, shape=[tl.maximum(tl.cdiv(seqlen_q, ROWS), 1) * ROWS], strides=[1], block_shape=[C.BLOCK_M]
        )
    else:
        return base


@triton.jit
def _load_numbers(source, first, C: tl.constexpr):
    if C.TMA:
        numbers = source.load([tl.cast(first, tl.int32)])
    else:
        numbers = tl.load(source + first + tl.arange(0, C.BLOCK_M))
    return numbers


@triton.jit
def _ds_tile(
    q, dout, lse, delta, i, first, K, V, stride_ks, stride_vs, spec, tensors,
    C: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """ds = p · (dp − delta) of queries i and the keys from ``first``, with p = exp(s − lse) and dp = dout Vᵀ,
    dropped out like p. Also d softcap(x) / dx, and k."""
    rows = tl.arange(0, C.BLOCK_N)
    j = first + rows
    sk = spec.seqlen_k
    if C.CHUNKED:
        k = _pointers(K, first, stride_ks, C.BLOCK_N, C)
        v = _pointers(V, first, stride_vs, C.BLOCK_N, C)
    else:
        k = load_rows(K, first, sk, stride_ks, C.HEADDIM, C.BLOCK_N, C.BLOCK_D, C.MULTIPLE, C.TMA, MASKED)
        v = load_rows(V, first, sk, stride_vs, C.HEADDIM_V, C.BLOCK_N, C.BLOCK_DV, C.MULTIPLE, C.TMA, MASKED)
    qk = _product(q, k, i < spec.seqlen_q, j < sk, C.HEADDIM, C.BLOCK_D, C)
    s, factor, derivative = _score_tile(qk, i[:, None], j[None, :], spec, tensors, C, MASKED)
    p = tl.exp2(s * factor - lse[:, None])
    dp = _product(dout, v, i < spec.seqlen_q, j < sk, C.HEADDIM_V, C.BLOCK_DV, C)
    if tensors.rng_state is not None:
        dp = tl.where(_keep(i, first, spec, tensors, C), dp, 0.0) * spec.dropout_scale
    return p * (dp - delta[:, None]), derivative, k


@triton.jit
def _dq_tiles(
    begin, end, dq, q, dout, lse, delta, i, K, V, stride_ks, stride_vs, spec, tensors,
    C: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """dq / softmax_scale after the blocks of keys from begin to end: _forward_tiles' derivative by q."""
    for first in tl.range(begin, end, C.BLOCK_N):
        ds, derivative, k = _ds_tile(
            q, dout, lse, delta, i, first, K, V, stride_ks, stride_vs, spec, tensors, C, MASKED
        )
        if C.CHUNKED:
            sk = spec.seqlen_k
            k = load_rows(K, first, sk, stride_ks, C.HEADDIM, C.BLOCK_N, C.BLOCK_D, C.MULTIPLE, C.TMA, True)
        dq = dot(cast(ds * derivative, k.dtype), k, dq, C.PRECISION)
    return dq


@triton.jit(do_not_specialize=_numbers("q k v do dq"))
def attention_dq(
    Q, K, V, dOut, Lse2, Delta, dQ, tensors,
    stride_qb, stride_qs, stride_qh, stride_kb, stride_ks, stride_kh, stride_vb, stride_vs, stride_vh,
    stride_dob, stride_dos, stride_doh, stride_dqb, stride_dqs, stride_dqh,
    stride_bias_b, stride_bias_h, stride_bias_q, stride_bias_k, stride_alibi_b,
    batch, nheads, group, seqlen_q, seqlen_k, window_left, window_right, softmax_scale, softcap,
    dropout_threshold, dropout_scale,
    C: tl.constexpr,
):  # fmt: skip
    """dq = softmax_scale · (ds · d softcap(x) / dx) K of one block of queries of one head, ds as in _ds_tile:
    attention_forward's derivative by Q."""
    b, h, block = _place(tl.program_id(0), tensors.cu_seqlens_q, batch, nheads, seqlen_q, C.BLOCK_M)
    first_q, sq = _rows(b, tensors.cu_seqlens_q, seqlen_q)
    first_k, sk = _key_rows(b, tensors.cu_seqlens_k, tensors.seqused_k, tensors.leftpad_k, seqlen_k)
    first = block * C.BLOCK_M
    if first >= sq:
        return
    rows = tl.arange(0, C.BLOCK_M)
    i = first + rows
    spec = _scores(
        b, h, sq, sk, tensors, nheads, stride_bias_b, stride_bias_h, stride_bias_q, stride_bias_k,
        stride_alibi_b, window_left, window_right, softmax_scale, softcap, dropout_threshold, dropout_scale,
    )  # fmt: skip
    Q += _start(b, first_q, h, stride_qb, stride_qs, stride_qh, C.MULTIPLE)
    K += _start(b, first_k, h // group, stride_kb, stride_ks, stride_kh, C.MULTIPLE)
    V += _start(b, first_k, h // group, stride_vb, stride_vs, stride_vh, C.MULTIPLE)
    dOut += _start(b, first_q, h, stride_dob, stride_dos, stride_doh, C.MULTIPLE)
    at = _row_start(b, h, tensors.cu_seqlens_q, batch, nheads, seqlen_q)
    q = _factor(Q, first, sq, stride_qs, C.HEADDIM, C.BLOCK_M, C.BLOCK_D, C)
    K = rows_from(K, sk, stride_ks, C.HEADDIM, C.BLOCK_N, C.BLOCK_D, C.TMA)
    V = rows_from(V, sk, stride_vs, C.HEADDIM_V, C.BLOCK_N, C.BLOCK_DV, C.TMA)
    dout = _factor(dOut, first, sq, stride_dos, C.HEADDIM_V, C.BLOCK_M, C.BLOCK_DV, C)
    lse = tl.load(Lse2 + at + i)
    delta = tl.load(Delta + at + i)

    dq = tl.full((C.BLOCK_M, C.BLOCK_D), 0.0, tl.float32)
    last = tl.minimum(first + C.BLOCK_M, sq) - 1
    begin, full_begin, full_end, end = in_sight(
        first, last, sk - sq, sk, window_left, window_right, C.HAS_LEFT, C.HAS_RIGHT, C.BLOCK_N
    )
    if C.HAS_LEFT:
        dq = _dq_tiles(
            begin, full_begin, dq, q, dout, lse, delta, i, K, V, stride_ks, stride_vs, spec, tensors, C, True
        )
    dq = _dq_tiles(
        full_begin, full_end, dq, q, dout, lse, delta, i, K, V, stride_ks, stride_vs, spec, tensors, C, False
    )
    dq = _dq_tiles(
        full_end, end, dq, q, dout, lse, delta, i, K, V, stride_ks, stride_vs, spec, tensors, C, True
    )
    dQ += _start(b, first_q, h, stride_dqb, stride_dqs, stride_dqh, C.MULTIPLE)
    store_rows(
        dQ, first, sq, stride_dqs, dq * softmax_scale, C.HEADDIM, C.BLOCK_M, C.BLOCK_D, C.MULTIPLE, C.TMA
    )


@triton.jit
def _dkdv_tiles(
    begin, end, dk, dv, k, v, j, first_key, Q, dOut, Lse2, Delta, stride_qs, stride_dos, spec, tensors,
    C: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """dk / softmax_scale and dv · (1 − dropout_p) after the blocks of queries from begin to end:
    _forward_tiles' derivatives by k and v. Keys are the tile's rows, so p and ds need no transposition.

    Keys and queries beyond the last need no mask: the former have rows of dk and dv of their own, which are
    not stored, and the latter's p is 0 (attention_rows)."""
    rows = tl.arange(0, C.BLOCK_M)
    for first in tl.range(begin, end, C.BLOCK_M):
        i = first + rows
        sq = spec.seqlen_q
        q = load_rows(Q, first, sq, stride_qs, C.HEADDIM, C.BLOCK_M, C.BLOCK_D, C.MULTIPLE, C.TMA, True)
        dout = load_rows(
            dOut, first, sq, stride_dos, C.HEADDIM_V, C.BLOCK_M, C.BLOCK_DV, C.MULTIPLE, C.TMA, True
        )
        lse = _load_numbers(Lse2, first, C)
        delta = _load_numbers(Delta, first, C)
        q_factor = q
        dout_factor = dout
        if C.CHUNKED:
            q_factor = _pointers(Q, first, stride_qs, C.BLOCK_M, C)
            dout_factor = _pointers(dOut, first, stride_dos, C.BLOCK_M, C)
        kq = _product(k, q_factor, j < spec.seqlen_k, i < sq, C.HEADDIM, C.BLOCK_D, C)
        s, factor, derivative = _score_tile(kq, i[None, :], j[:, None], spec, tensors, C, MASKED)
        p = tl.exp2(s * factor - lse[None, :])
        dp = _product(v, dout_factor, j < spec.seqlen_k, i < sq, C.HEADDIM_V, C.BLOCK_DV, C)
        dropped = p
        if tensors.rng_state is not None:
            keep = tl.trans(_keep(i, first_key, spec, tensors, C))
            dropped = tl.where(keep, p, 0.0)
            dp = tl.where(keep, dp, 0.0) * spec.dropout_scale
        dv = dot(cast(dropped, dout.dtype), dout, dv, C.PRECISION)
        ds = p * (dp - delta[None, :]) * derivative
        dk = dot(cast(ds, q.dtype), q, dk, C.PRECISION)
    return dk, dv


@triton.jit(do_not_specialize=_numbers("q k v do dk dv"))
def attention_dkdv(
    Q, K, V, dOut, Lse2, Delta, dK, dV, tensors,
    stride_qb, stride_qs, stride_qh, stride_kb, stride_ks, stride_kh, stride_vb, stride_vs, stride_vh,
    stride_dob, stride_dos, stride_doh,
    stride_dkb, stride_dks, stride_dkh, stride_dvb, stride_dvs, stride_dvh,
    stride_bias_b, stride_bias_h, stride_bias_q, stride_bias_k, stride_alibi_b,
    batch, nheads, group, seqlen_q, seqlen_k, window_left, window_right, softmax_scale, softcap,
    dropout_threshold, dropout_scale,
    C: tl.constexpr,
):  # fmt: skip
    """dk = softmax_scale · (ds · d softcap(x) / dx)ᵀ Q and dv = pᵀ dout of a block of keys of one head of k,
    over the query heads of its group in turn: attention_forward's derivatives by K and V. ds: see _ds_tile.

    Blocks are counted from a sequence's first key; rows of k that no sequence uses are left as they are.
    """
    nheads_k = nheads // group
    b, h_k, block = _place(tl.program_id(0), tensors.cu_seqlens_k, batch, nheads_k, seqlen_k, C.BLOCK_N)
    first_q, sq = _rows(b, tensors.cu_seqlens_q, seqlen_q)
    first_k, sk = _key_rows(b, tensors.cu_seqlens_k, tensors.seqused_k, tensors.leftpad_k, seqlen_k)
    first = block * C.BLOCK_N
    if first >= sk:
        return
    rows = tl.arange(0, C.BLOCK_N)
    j = first + rows
    K += _start(b, first_k, h_k, stride_kb, stride_ks, stride_kh, C.MULTIPLE)
    V += _start(b, first_k, h_k, stride_vb, stride_vs, stride_vh, C.MULTIPLE)
    k = _factor(K, first, sk, stride_ks, C.HEADDIM, C.BLOCK_N, C.BLOCK_D, C)
    v = _factor(V, first, sk, stride_vs, C.HEADDIM_V, C.BLOCK_N, C.BLOCK_DV, C)

    dk = tl.full((C.BLOCK_N, C.BLOCK_D), 0.0, tl.float32)
    dv = tl.full((C.BLOCK_N, C.BLOCK_DV), 0.0, tl.float32)
    last = tl.minimum(first + C.BLOCK_N, sk) - 1
    begin, full_begin, full_end, end = in_sight(
        first, last, sq - sk, sq, window_right, window_left, C.HAS_RIGHT, C.HAS_LEFT, C.BLOCK_M
    )
    if not C.HAS_LEFT:
        full_end = end
    for h in tl.range(h_k * group, (h_k + 1) * group):
        spec = _scores(
            b, h, sq, sk, tensors, nheads, stride_bias_b, stride_bias_h, stride_bias_q, stride_bias_k,
            stride_alibi_b, window_left, window_right, softmax_scale, softcap, dropout_threshold,
            dropout_scale,
        )  # fmt: skip
        q_base = Q + _start(b, first_q, h, stride_qb, stride_qs, stride_qh, C.MULTIPLE)
        do_base = dOut + _start(b, first_q, h, stride_dob, stride_dos, stride_doh, C.MULTIPLE)
        q_rows = rows_from(q_base, sq, stride_qs, C.HEADDIM, C.BLOCK_M, C.BLOCK_D, C.TMA)
        do_rows = rows_from(do_base, sq, stride_dos, C.HEADDIM_V, C.BLOCK_M, C.BLOCK_DV, C.TMA)
        at = _row_start(b, h, tensors.cu_seqlens_q, batch, nheads, seqlen_q)
        lse_rows = _numbers_from(Lse2 + at, sq, C)
        delta_rows = _numbers_from(Delta + at, sq, C)
        if C.HAS_RIGHT:
            dk, dv = _dkdv_tiles(
                begin, full_begin, dk, dv, k, v, j, first, q_rows, do_rows, lse_rows, delta_rows,
                stride_qs, stride_dos, spec, tensors, C, True,
            )  # fmt: skip
        dk, dv = _dkdv_tiles(
            full_begin, full_end, dk, dv, k, v, j, first, q_rows, do_rows, lse_rows, delta_rows,
            stride_qs, stride_dos, spec, tensors, C, False,
        )  # fmt: skip
        if C.HAS_LEFT:
            dk, dv = _dkdv_tiles(
                full_end, end, dk, dv, k, v, j, first, q_rows, do_rows, lse_rows, delta_rows,
                stride_qs, stride_dos, spec, tensors, C, True,
            )  # fmt: skip
    dK += _start(b, first_k, h_k, stride_dkb, stride_dks, stride_dkh, C.MULTIPLE)
    dV += _start(b, first_k, h_k, stride_dvb, stride_dvs, stride_dvh, C.MULTIPLE)
    store_rows(
        dK, first, sk, stride_dks, dk * softmax_scale, C.HEADDIM, C.BLOCK_N, C.BLOCK_D, C.MULTIPLE, C.TMA
    )
    store_rows(
        dV, first, sk, stride_dvs, dv * dropout_scale, C.HEADDIM_V, C.BLOCK_N, C.BLOCK_DV, C.MULTIPLE, C.TMA
    )


@triton.jit(do_not_specialize=[*_numbers("q k v do"), "parts", "bias_b", "bias_h", "bias_q", "bias_k"])
def attention_dbias(
    Q, K, V, dOut, Lse2, Delta, dBias, tensors,
    stride_qb, stride_qs, stride_qh, stride_kb, stride_ks, stride_kh, stride_vb, stride_vs, stride_vh,
    stride_dob, stride_dos, stride_doh, parts, bias_b, bias_h, bias_q, bias_k,
    stride_bias_b, stride_bias_h, stride_bias_q, stride_bias_k, stride_alibi_b,
    batch, nheads, group, seqlen_q, seqlen_k, window_left, window_right, softmax_scale, softcap,
    dropout_threshold, dropout_scale,
    C: tl.constexpr,
):  # fmt: skip
    """dbias = ds (_ds_tile), summed over what the bias is broadcast over, of one tile of it:
    attention_forward's derivative by attn_bias.

    dBias: (parts, bias_b, bias_h, bias_q, bias_k), contiguous, fp32, zero-filled: each part is over some of
    the sequences and heads that the bias is broadcast over. Not broadcast over the batch where leftpad_k
    makes a column another key in every sequence.
    """
    blocks_q = tl.cdiv(bias_q, C.BLOCK_M)
    blocks_k = tl.cdiv(bias_k, C.BLOCK_N)
    tile = tl.program_id(0)
    first_j = tile % blocks_k * C.BLOCK_N
    first_i = tile // blocks_k % blocks_q * C.BLOCK_M
    bias_row = tile // (blocks_k * blocks_q)  # of (parts, bias_b, bias_h)
    part = bias_row // (bias_b * bias_h)
    first_h = bias_row % bias_h
    first_b = bias_row // bias_h % bias_b
    # What the bias has one of, it has for all.
    heads = tl.where(bias_h == 1, nheads, 1)
    pairs = tl.where(bias_b == 1, batch, 1) * heads
    end_i = tl.where(bias_q == 1, seqlen_q, tl.minimum(first_i + C.BLOCK_M, seqlen_q))
    end_j = tl.where(bias_k == 1, seqlen_k, tl.minimum(first_j + C.BLOCK_N, seqlen_k))
    rows_m = tl.arange(0, C.BLOCK_M)
    rows_n = tl.arange(0, C.BLOCK_N)
    dbias = tl.full((C.BLOCK_M, C.BLOCK_N), 0.0, tl.float32)
    for pair in tl.range(pairs * part // parts, pairs * (part + 1) // parts):
        b = first_b + pair // heads
        h = first_h + pair % heads
        first_k, sk = _key_rows(b, None, tensors.seqused_k, tensors.leftpad_k, seqlen_k)
        spec = _scores(
            b, h, seqlen_q, sk, tensors, nheads, stride_bias_b, stride_bias_h, stride_bias_q, stride_bias_k,
            stride_alibi_b, window_left, window_right, softmax_scale, softcap, dropout_threshold,
            dropout_scale,
        )  # fmt: skip
        q_base = Q + _start(b, 0, h, stride_qb, stride_qs, stride_qh, C.MULTIPLE)
        do_base = dOut + _start(b, 0, h, stride_dob, stride_dos, stride_doh, C.MULTIPLE)
        k_base = K + _start(b, first_k, h // group, stride_kb, stride_ks, stride_kh, C.MULTIPLE)
        v_base = V + _start(b, first_k, h // group, stride_vb, stride_vs, stride_vh, C.MULTIPLE)
        k_rows = rows_from(k_base, sk, stride_ks, C.HEADDIM, C.BLOCK_N, C.BLOCK_D, C.TMA)
        v_rows = rows_from(v_base, sk, stride_vs, C.HEADDIM_V, C.BLOCK_N, C.BLOCK_DV, C.TMA)
        at = _row_start(b, h, None, batch, nheads, seqlen_q)
        for i_block in tl.range(first_i, end_i, C.BLOCK_M):
            i = i_block + rows_m
            q = _factor(q_base, i_block, seqlen_q, stride_qs, C.HEADDIM, C.BLOCK_M, C.BLOCK_D, C)
            dout = _factor(do_base, i_block, seqlen_q, stride_dos, C.HEADDIM_V, C.BLOCK_M, C.BLOCK_DV, C)
            lse = tl.load(Lse2 + at + i)
            delta = tl.load(Delta + at + i)
            last = tl.minimum(i_block + C.BLOCK_M, seqlen_q) - 1
            begin, _, _, end = in_sight(
                i_block, last, sk - seqlen_q, sk, window_left, window_right, C.HAS_LEFT, C.HAS_RIGHT,
                C.BLOCK_N,
            )  # fmt: skip
            for j_block in tl.range(tl.maximum(first_j, begin), tl.minimum(end_j, end), C.BLOCK_N):
                dbias += _ds_tile(
                    q, dout, lse, delta, i, j_block, k_rows, v_rows, stride_ks, stride_vs, spec, tensors, C,
                    True,
                )[0]  # fmt: skip
    i = first_i + rows_m
    j = first_j + rows_n
    if bias_q == 1:
        dbias = tl.where((rows_m == 0)[:, None], tl.sum(dbias, 0)[None, :], 0.0)
    if bias_k == 1:
        dbias = tl.where((rows_n == 0)[None, :], tl.sum(dbias, 1)[:, None], 0.0)
    elif tensors.leftpad_k is not None:
        j += tl.load(tensors.leftpad_k + first_b)
    row = (tl.cast(bias_row, tl.int64) * bias_q + i) * bias_k
    tl.store(dBias + row[:, None] + j[None, :], dbias, mask=(i < bias_q)[:, None] & (j < bias_k)[None, :])


def _bias(bias: Tensor | None) -> Tensor | None:
    return bias if bias is None or bias.dtype in (*DTYPES, torch.bool) else bias.float()


def _normalized(tensors: AttentionTensors) -> AttentionTensors:
    """As the kernels read them."""

    def contiguous(t: Tensor | None, dtype: torch.dtype) -> Tensor | None:
        return None if t is None else t.to(dtype).contiguous()

    lengths = (contiguous(t, torch.int32) for t in tensors[:4])
    heads = (contiguous(t, torch.float32) for t in (tensors.alibi_slopes, tensors.sink))
    return AttentionTensors._make(
        (*lengths, *heads, _bias(tensors.attn_bias), contiguous(tensors.rng_state, torch.int64))
    )


def _multiple(*tensors: Tensor) -> int:
    """launch.vector_multiple, and 1 where rows lie on each other, which no tensor descriptor describes."""
    return launch.vector_multiple(*tensors) if all(t.stride(-3) for t in tensors) else 1


def _common(q: Tensor, k: Tensor, spec: AttentionSpec, tensors: AttentionTensors) -> list[Any]:
    """The arguments that the kernels have after the strides of their own tensors."""
    bias, slopes, edges = tensors.attn_bias, tensors.alibi_slopes, tensors.cu_seqlens_q
    bias_strides = [0] * 4
    if bias is not None:
        bias_strides = [0 if size == 1 else n for size, n in zip(bias.shape, bias.stride(), strict=True)]
    slopes_stride = slopes.stride(0) if slopes is not None and slopes.dim() == 2 else 0
    batch, seqlen_q, seqlen_k = q.shape[0], q.shape[1], k.shape[1]
    if edges is not None:
        batch, seqlen_q, seqlen_k = edges.shape[0] - 1, q.shape[0], k.shape[0]
    # Beyond both lengths a window hides nothing, and sums with it stay in 32 bits.
    windows = [min(side, seqlen_q + seqlen_k) for side in (spec.window_left, spec.window_right)]
    heads = [q.shape[-2], q.shape[-2] // k.shape[-2]]
    dropout = [philox.threshold(spec.dropout_p), 1 / (1 - spec.dropout_p)]
    lengths = [batch, *heads, seqlen_q, seqlen_k]
    return [*bias_strides, slopes_stride, *lengths, *windows, spec.softmax_scale, spec.softcap, *dropout]


def _constants(
    q: Tensor, v: Tensor, spec: AttentionSpec, multiple: int, kernel: str
) -> tuple[_Constants, Config]:
    block_d, block_dv = launch.block_dim(q.shape[-1]), launch.block_dim(v.shape[-1])
    chip = launch.chip(q.device)
    plain = not (spec.softcap or spec.alibi or spec.bias) and spec.softmax_scale > launch.LEAST_SCALE
    if kernel in ("forward", "dq", "dkdv"):
        simple, general, fp32 = _SCORES
        is_simple = plain and not spec.dropout_p and spec.window_left < 0
        kernel += fp32 if q.dtype == torch.float32 else simple if is_simple else general
        if kernel == "dkdv" and spec.varlen:
            kernel = "dkdv packed"
        elif kernel == "dkdv general" and spec.dropout_p:
            kernel = "dkdv dropout"
    config = launch.choose(CONFIGS, max(block_d, block_dv), kernel, chip.architecture)
    sizes = q.shape[-1], v.shape[-1], block_d, block_dv, config.block_m, config.block_n
    flags = spec.window_left >= 0, spec.window_right >= 0, plain, spec.softcap != 0
    width = max(block_d, block_dv)
    chunked = width > CHUNK.value if q.dtype == torch.float32 else kernel in ("dkdv general", "dkdv dropout")
    loads = multiple, multiple > 1 and chip.tma and not chunked, chunked
    return launch.constants(_Constants, *sizes, *flags, *loads, chip.precision), config


def _grid(t: Tensor, cu_seqlens: Tensor | None, block: int) -> tuple[int, int, int]:
    """Sequences (packed ones count as one), heads, blocks of rows: one of each makes a program (_place)."""
    if cu_seqlens is not None:
        return 1, t.shape[1], t.shape[0] // block + cu_seqlens.shape[0] - 1
    return t.shape[0], t.shape[2], triton.cdiv(t.shape[1], block)


@launch.tuned
def forward(
    q: Tensor, k: Tensor, v: Tensor, spec: AttentionSpec, tensors: AttentionTensors
) -> tuple[Tensor, Tensor]:
    *lead, seqlen, nheads, _ = q.shape
    out = q.new_empty(*lead, seqlen, nheads, v.shape[-1])
    lse = q.new_empty(*lead, nheads, seqlen, dtype=torch.float32)
    tensors = _normalized(tensors)
    constants, config = _constants(q, v, spec, _multiple(q, k, v, out), "forward")
    programs = math.prod(_grid(q, tensors.cu_seqlens_q, config.block_m))
    args = (q, k, v, out, lse, tensors, *launch.strides(q, k, v, out), *_common(q, k, spec, tensors))
    launch.launch(attention_forward, programs, config, q.device, *args, constants)
    return out, lse


def _bias_gradient(
    bias: Tensor,
    args: tuple[Any, ...],
    spec: AttentionSpec,
    tensors: AttentionTensors,
    multiple: int,
) -> Tensor:
    """Of attn_bias, in its dtype; args: q, k, v, dout, and what attention_rows makes."""
    q, k, v, dout, *_ = args
    shape = list(bias.shape)
    if tensors.leftpad_k is not None and shape[3] > 1:
        shape[0] = q.shape[0]
    constants, config = _constants(q, v, spec, multiple, "dbias")
    tiles = shape[1] * triton.cdiv(shape[2], config.block_m) * triton.cdiv(shape[3], config.block_n)
    # A tile of a bias that all share has much to sum: in as many parts as fill the chip. A bias that has a
    # batch axis is cut as that of one sequence, whose bits then do not depend on the others.
    pairs = math.prod(full for own, full in zip(shape, (q.shape[0], q.shape[2]), strict=False) if own == 1)
    wanted = DBIAS_PROGRAMS * launch.chip(q.device).multiprocessors
    parts = max(1, min(pairs, triton.cdiv(wanted, max(tiles, 1))))
    dbias = torch.zeros((parts, *shape), dtype=torch.float32, device=q.device)
    numbers = (*launch.strides(q, k, v, dout), parts, *shape, *_common(q, k, spec, tensors))
    programs = parts * shape[0] * tiles
    launch.launch(attention_dbias, programs, config, q.device, *args, dbias, tensors, *numbers, constants)
    return (dbias[0] if parts == 1 else dbias.sum(0)).sum_to_size(bias.shape).to(bias.dtype)


@launch.tuned
def backward(
    dout: Tensor,
    dlse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    bias_gradient: bool,
    spec: AttentionSpec,
    tensors: AttentionTensors,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None]:
    bias, sink = tensors.attn_bias, tensors.sink
    tensors = _normalized(tensors)
    dq = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    make = torch.zeros if spec.key_ranges else torch.empty  # rows of k that no sequence uses
    dk, dv = (make(t.shape, dtype=t.dtype, device=t.device) for t in (k, v))
    multiple = _multiple(q, k, v, out, dout, dq, dk, dv)
    common = _common(q, k, spec, tensors)
    edges_q, edges_k = tensors.cu_seqlens_q, tensors.cu_seqlens_k

    constants, config = _constants(q, v, spec, multiple, "rows")
    grid = _grid(q, edges_q, ROWS.value)
    lse2, delta = (lse.new_empty(math.prod(grid) * ROWS.value) for _ in range(2))
    dsinks = None if sink is None else lse.new_zeros(grid)
    batch, nheads, _, seqlen_q, *_ = common[5:]
    read = (out, dout, lse, dlse, lse2, delta, dsinks, edges_q, tensors.sink)
    numbers = (*launch.strides(out, dout), batch, nheads, seqlen_q)
    launch.launch(attention_rows, math.prod(grid), config, q.device, *read, *numbers, constants)
    dsink = None if sink is None or dsinks is None else dsinks.sum((0, 2)).to(sink.dtype)

    constants, config = _constants(q, v, spec, multiple, "dkdv")
    args = (q, k, v, dout, lse2, delta)
    programs = math.prod(_grid(k, edges_k, config.block_n))
    numbers = (*launch.strides(q, k, v, dout, dk, dv), *common)
    launch.launch(attention_dkdv, programs, config, q.device, *args, dk, dv, tensors, *numbers, constants)

    constants, config = _constants(q, v, spec, multiple, "dq")
    programs = math.prod(_grid(q, edges_q, config.block_m))
    numbers = (*launch.strides(q, k, v, dout, dq), *common)
    launch.launch(attention_dq, programs, config, q.device, *args, dq, tensors, *numbers, constants)

    dbias = None
    if bias is not None and bias_gradient:
        dbias = _bias_gradient(bias, args, spec, tensors, multiple)
    return dq, dk, dv, dsink, dbias
