"""Attention in Triton, forward and backward (Dao et al. 2022, arXiv:2205.14135; Dao 2023, arXiv:2307.08691).

One program owns a block of queries of one head (forward, dq), or a block of keys of one head of k (dk, dv), and
walks over the blocks of the other side that the mask lets it see: those in sight whole without a mask, those
at the edges with one. Storage fp32, bf16 or fp16, any strides whose last is 1; products accumulate in fp32, and
softmax states, lse and delta are fp32. No atomics: two runs give the same bits. Held by tests/test_attention.py.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastgpt.ops import launch, philox
from fastgpt.ops.attention.spec import AttentionCall, AttentionSpec, AttentionTensors
from fastgpt.ops.device import (
    INF,
    LOG2E,
    cast,
    dot,
    key_range,
    offset,
    philox_keep,
    softmax_end,
    softmax_step,
    tanh,
    visible,
)
from fastgpt.ops.launch import Config

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

# (chip, row in bytes, kernel): block_m queries by block_n keys, warps, stages.
CONFIGS = {
    ("default", 128, "forward"): Config(64, 64, 4, 2),
    ("default", 256, "forward"): Config(64, 32, 4, 2),
    ("default", 512, "forward"): Config(32, 32, 4, 1),
    ("default", 1024, "forward"): Config(16, 16, 4, 1),
    ("interpreter", 1024, "forward"): Config(32, 64, 4, 1),
    ("sm_90", 128, "forward"): Config(128, 128, 4, 3),
    ("sm_90", 256, "forward"): Config(128, 128, 8, 2),
    ("sm_90", 512, "forward"): Config(128, 64, 8, 2),
    ("sm_90", 1024, "forward"): Config(64, 32, 8, 1),
}


def unsupported(call: AttentionCall) -> list[str]:
    headdim = max(call.headdim, call.headdim_v)
    return launch.refusals(call.device, call.dtype, call.features, FEATURES, headdim)


@triton.jit
def _sequence_of_block(block, cu_seqlens, batch, BLOCK: tl.constexpr):
    """Which packed sequence the block-th block of rows belongs to, and the first block of that sequence.

    Sequence b's blocks start at cu_seqlens[b] // BLOCK + b, which leaves it room for all it can have.
    """
    low = block * 0
    high = low + batch
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
    first = b * 0
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
def _lse_row(b, h, first_q, cu_seqlens_q, nheads, seqlen_q):
    """Where query 0 of (b, h) is in lse."""
    if cu_seqlens_q is not None:
        return h.to(tl.int64) * seqlen_q + first_q
    return (b.to(tl.int64) * nheads + h) * seqlen_q


@triton.jit
def _load(base, offsets, inside, WIDTH: tl.constexpr, BLOCK: tl.constexpr, MASKED: tl.constexpr):
    """A tile of rows of WIDTH elements, 0 beyond WIDTH and, if MASKED, in rows that are not inside."""
    column = tl.arange(0, BLOCK)
    pointers = base + offsets[:, None] + column[None, :]
    if MASKED:
        if WIDTH == BLOCK:
            return tl.load(pointers, mask=inside[:, None], other=0.0)
        return tl.load(pointers, mask=inside[:, None] & (column < WIDTH)[None, :], other=0.0)
    if WIDTH == BLOCK:
        return tl.load(pointers)
    return tl.load(pointers, mask=(column < WIDTH)[None, :], other=0.0)


@triton.jit
def _store(base, offsets, inside, value, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    column = tl.arange(0, BLOCK)
    mask = inside[:, None]
    if WIDTH != BLOCK:
        mask = mask & (column < WIDTH)[None, :]
    tl.store(base + offsets[:, None] + column[None, :], cast(value, base.dtype.element_ty), mask=mask)


class _Scores(NamedTuple):
    """What the scores of one head of one sequence are made of."""

    softmax_scale: Any
    softcap: Any
    slope: Any
    seqlen_q: Any
    seqlen_k: Any
    window_left: Any
    window_right: Any
    bias: Any  # at query 0 and key 0, or None
    stride_bias_q: Any
    stride_bias_k: Any
    rng_state: Any  # or None
    philox_column: Any
    dropout_threshold: Any


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
    PRECISION: str  # device.dot


@triton.jit
def _slope(alibi_slopes, b, h, stride_b):
    if alibi_slopes is not None:
        return tl.load(alibi_slopes + b * stride_b + h)
    return 0.0


@triton.jit
def _bias_start(b, h, leftpad_k, stride_b, stride_h, stride_k):
    """Where key 0 of (b, h) is in the bias."""
    start = b.to(tl.int64) * stride_b + h.to(tl.int64) * stride_h
    if leftpad_k is not None:
        start += tl.load(leftpad_k + b).to(tl.int64) * stride_k
    return start


@triton.jit
def _score_tile(qk, i, j, spec, C: tl.constexpr, MASKED: tl.constexpr):
    """The scores, in base 2, are the first result times the second; the third is d softcap(x) / dx.

    s = softcap(softmax_scale · qk) + bias − slope · |i + shift − j|, −inf where key j is hidden from query i,
    which only MASKED tiles have to ask. i and j are columns and rows of the tile, or rows and columns.
    """
    shift = spec.seqlen_k - spec.seqlen_q
    inside = (i < spec.seqlen_q) & (j < spec.seqlen_k)
    derivative = 1.0
    if C.PLAIN:
        x = qk
        factor = spec.softmax_scale * LOG2E
    else:
        x = qk * spec.softmax_scale
        factor = 1.0
        if C.SOFTCAP:
            t = tanh(x / spec.softcap)
            x = t * spec.softcap
            derivative = 1 - t * t
        x = (x - spec.slope * tl.abs(i + shift - j).to(tl.float32)) * LOG2E
        if spec.bias is not None:
            at = spec.bias + i.to(tl.int64) * spec.stride_bias_q + j.to(tl.int64) * spec.stride_bias_k
            bias = tl.load(at, mask=inside, other=0)
            if spec.bias.dtype.element_ty == tl.int1:
                x = tl.where(bias, x, -INF)
            else:
                x += bias.to(tl.float32) * LOG2E
    if MASKED:
        seen = visible(i, j, shift, spec.window_left, spec.window_right, C.HAS_LEFT, C.HAS_RIGHT)
        x = tl.where(seen & inside, x, -INF)
    return x, factor, derivative


@triton.jit
def _kept(x, rows, first, spec, BLOCK_N: tl.constexpr):
    """x (M, BLOCK_N) of queries ``rows`` and keys from ``first``, 0 where dropout drops."""
    if spec.rng_state is not None:
        keep = philox_keep(spec.rng_state, rows, first, spec.philox_column, spec.dropout_threshold, BLOCK_N)
        x = tl.where(keep, x, 0.0)
    return x


@triton.jit
def _forward_tiles(
    begin, end, m, l, acc, q, i, K, V, stride_ks, stride_vs, spec, C: tl.constexpr, MASKED: tl.constexpr
):
    """The softmax state after the blocks of keys from begin to end."""
    rows = tl.arange(0, C.BLOCK_N)
    k_offsets = offset(rows, stride_ks, C.MULTIPLE)
    v_offsets = offset(rows, stride_vs, C.MULTIPLE)
    for first in tl.range(begin, end, C.BLOCK_N):
        j = first + rows
        inside = j < spec.seqlen_k
        k = _load(K + offset(first, stride_ks, C.MULTIPLE), k_offsets, inside, C.HEADDIM, C.BLOCK_D, MASKED)
        qk = dot(q, tl.trans(k), None, C.PRECISION)
        s, factor, _ = _score_tile(qk, i[:, None], j[None, :], spec, C, MASKED)
        p, alpha, m, l = softmax_step(s, m, l, factor)
        p = _kept(p, i, first, spec, C.BLOCK_N)
        v = _load(
            V + offset(first, stride_vs, C.MULTIPLE), v_offsets, inside, C.HEADDIM_V, C.BLOCK_DV, MASKED
        )
        acc = dot(cast(p, v.dtype), v, acc * alpha[:, None], C.PRECISION)
    return m, l, acc


# Lengths and strides: a new one compiles nothing.
_LENGTHS = ["batch", "nheads", "group", "seqlen_q", "seqlen_k", "window_left", "window_right", "dropout_threshold"]
_BIAS_STRIDES = ["stride_bias_b", "stride_bias_h", "stride_bias_q", "stride_bias_k", "stride_alibi_b"]


def _strides(names: str) -> list[str]:
    return [f"stride_{name}{axis}" for name in names.split() for axis in "bsh"]


@triton.jit(do_not_specialize=_LENGTHS + _BIAS_STRIDES + _strides("q k v o"))
def attention_forward(
    Q,
    K,
    V,
    Out,
    Lse,
    tensors,
    stride_qb,
    stride_qs,
    stride_qh,
    stride_kb,
    stride_ks,
    stride_kh,
    stride_vb,
    stride_vs,
    stride_vh,
    stride_ob,
    stride_os,
    stride_oh,
    stride_bias_b,
    stride_bias_h,
    stride_bias_q,
    stride_bias_k,
    stride_alibi_b,
    batch,
    nheads,
    group,
    seqlen_q,
    seqlen_k,
    window_left,
    window_right,
    dropout_threshold,
    dropout_scale,
    softmax_scale,
    softcap,
    C: tl.constexpr,
):
    """out = softmax(s) V and lse = log Σ exp(s) of one block of queries of one head.

    Lse: (batch, nheads, seqlen_q) or packed (nheads, seqlen_q), contiguous; seqlen_q and seqlen_k are then totals.
    """
    b, h, block = _place(tl.program_id(0), tensors.cu_seqlens_q, batch, nheads, seqlen_q, C.BLOCK_M)
    first_q, sq = _rows(b, tensors.cu_seqlens_q, seqlen_q)
    first_k, sk = _key_rows(b, tensors.cu_seqlens_k, tensors.seqused_k, tensors.leftpad_k, seqlen_k)
    first = block * C.BLOCK_M
    if first >= sq:
        return
    rows = tl.arange(0, C.BLOCK_M)
    i = first + rows
    bias = tensors.attn_bias
    if bias is not None:
        bias += _bias_start(b, h, tensors.leftpad_k, stride_bias_b, stride_bias_h, stride_bias_k)
    slope = _slope(tensors.alibi_slopes, b, h, stride_alibi_b)
    spec = _Scores(
        softmax_scale, softcap, slope, sq, sk, window_left, window_right, bias, stride_bias_q, stride_bias_k,
        tensors.rng_state, b * nheads + h, dropout_threshold,
    )  # fmt: skip
    Q += _start(b, first_q + first, h, stride_qb, stride_qs, stride_qh, C.MULTIPLE)
    Out += _start(b, first_q + first, h, stride_ob, stride_os, stride_oh, C.MULTIPLE)
    K += _start(b, first_k, h // group, stride_kb, stride_ks, stride_kh, C.MULTIPLE)
    V += _start(b, first_k, h // group, stride_vb, stride_vs, stride_vh, C.MULTIPLE)
    q = _load(Q, offset(rows, stride_qs, C.MULTIPLE), i < sq, C.HEADDIM, C.BLOCK_D, True)

    m = tl.full((C.BLOCK_M,), -INF, tl.float32)
    l = tl.full((C.BLOCK_M,), 0.0, tl.float32)
    if tensors.sink is not None:  # as a key seen first, of value 0
        m = tl.full((C.BLOCK_M,), 0.0, tl.float32) + tl.load(tensors.sink + h) * LOG2E
        l = tl.where(m == -INF, 0.0, 1.0)
    acc = tl.full((C.BLOCK_M, C.BLOCK_DV), 0.0, tl.float32)
    begin, end, full_begin, full_end = key_range(
        first,
        tl.minimum(first + C.BLOCK_M, sq) - 1,
        sk - sq,
        sk,
        window_left,
        window_right,
        C.HAS_LEFT,
        C.HAS_RIGHT,
    )
    # In blocks of keys: [begin, full_begin) at the left edge, [full_begin, full_end) seen whole, the rest.
    begin = begin // C.BLOCK_N * C.BLOCK_N
    full_begin = tl.minimum(tl.cdiv(full_begin, C.BLOCK_N) * C.BLOCK_N, tl.maximum(end, begin))
    full_end = tl.maximum(full_end // C.BLOCK_N * C.BLOCK_N, full_begin)
    if C.HAS_LEFT:
        m, l, acc = _forward_tiles(
            begin, full_begin, m, l, acc, q, i, K, V, stride_ks, stride_vs, spec,
            C, True,
)  # fmt: skip
    m, l, acc = _forward_tiles(
        full_begin, full_end, m, l, acc, q, i, K, V, stride_ks, stride_vs, spec,
        C, False,
)  # fmt: skip
    m, l, acc = _forward_tiles(
        full_end, end, m, l, acc, q, i, K, V, stride_ks, stride_vs, spec,
        C, True,
)  # fmt: skip
    inverse, lse = softmax_end(m, l)
    acc *= (inverse * dropout_scale)[:, None]
    _store(Out, offset(rows, stride_os, C.MULTIPLE), i < sq, acc, C.HEADDIM_V, C.BLOCK_DV)
    at = _lse_row(b, h, first_q, tensors.cu_seqlens_q, nheads, seqlen_q)
    tl.store(Lse + at + i, lse, mask=i < sq)


def _bias(bias: Tensor | None) -> Tensor | None:
    return bias if bias is None or bias.dtype in (*launch.DTYPES, torch.bool) else bias.float()


def _normalized(tensors: AttentionTensors) -> AttentionTensors:
    """As the kernels read them."""
    slopes, sink = (
        None if t is None else t.float().contiguous() for t in (tensors.alibi_slopes, tensors.sink)
    )
    edges = (None if t is None else t.contiguous() for t in tensors[:4])
    return AttentionTensors(*edges, slopes, sink, _bias(tensors.attn_bias), tensors.rng_state)


def _common(q: Tensor, k: Tensor, v: Tensor, spec: AttentionSpec, tensors: AttentionTensors) -> list[Any]:
    """The arguments that all kernels have after their tensors' strides."""
    bias, slopes, edges = tensors.attn_bias, tensors.alibi_slopes, tensors.cu_seqlens_q
    bias_strides = (
        [0 if size == 1 else stride for size, stride in zip(bias.shape, bias.stride(), strict=True)]
        if bias is not None
        else [0] * 4
    )
    alibi_stride = slopes.stride(0) if slopes is not None and slopes.dim() == 2 else 0
    packed = edges is not None
    batch = q.shape[0] if edges is None else edges.shape[0] - 1
    args = [
        *bias_strides,
        alibi_stride,
        batch,
        q.shape[-2],
        q.shape[-2] // k.shape[-2],
        q.shape[0 if packed else 1],
        k.shape[0 if packed else 1],
        spec.window_left,
        spec.window_right,
        philox.threshold(spec.dropout_p),
        1 / (1 - spec.dropout_p),
        spec.softmax_scale,
        spec.softcap,
    ]
    return args


def _constants(
    q: Tensor, v: Tensor, spec: AttentionSpec, multiple: int, direction: str
) -> tuple[_Constants, Config]:
    block_d, block_dv = launch.block_dim(q.shape[-1]), launch.block_dim(v.shape[-1])
    config = launch.choose(CONFIGS, max(block_d, block_dv) * q.element_size(), direction)
    plain = not (spec.softcap or spec.alibi or spec.bias) and spec.softmax_scale > 0
    windows = spec.window_left >= 0, spec.window_right >= 0
    sizes = q.shape[-1], v.shape[-1], block_d, block_dv, config.block_m, config.block_n
    flags = *windows, plain, spec.softcap != 0
    constants = _Constants(*map(tl.constexpr, (*sizes, *flags, multiple, launch.precision())))
    return constants, config


def _bsh(*tensors: Tensor) -> list[int]:
    """Strides by batch (0 if packed), sequence and head."""
    return [stride for t in tensors for stride in ((0,) * (4 - t.dim()) + t.stride()[:-1])]


def _programs(q: Tensor, tensors: AttentionTensors, block: int) -> int:
    """Blocks of rows of all sequences (_place) times heads."""
    if tensors.cu_seqlens_q is not None:
        return (q.shape[0] // block + tensors.cu_seqlens_q.shape[0] - 1) * q.shape[1]
    return triton.cdiv(q.shape[1], block) * q.shape[0] * q.shape[2]


def forward(
    q: Tensor, k: Tensor, v: Tensor, spec: AttentionSpec, tensors: AttentionTensors
) -> tuple[Tensor, Tensor]:
    *lead, seqlen, nheads, _ = q.shape
    out = q.new_empty(*lead, seqlen, nheads, v.shape[-1])
    lse = q.new_empty(*lead, nheads, seqlen, dtype=torch.float32)
    tensors = _normalized(tensors)
    constants, config = _constants(q, v, spec, launch.vector_multiple(q, k, v, out), "forward")
    launch.launch(
        attention_forward,
        _programs(q, tensors, config.block_m),
        config,
        q.device,
        *(q, k, v, out, lse, tensors),
        *_bsh(q, k, v, out),
        *_common(q, k, v, spec, tensors),
        constants,
    )
    return out, lse
