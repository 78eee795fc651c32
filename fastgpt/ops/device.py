"""What the Triton kernels of all ops share on the device: each of these stands here once.

Scores and softmax states are in base 2: a score of the specification times log2(e). A state (m, l, acc) of a
row over the keys seen so far is the maximum m, the sum l = Σ 2^(s − m) and acc = Σ 2^(s − m) · v.
"""

from __future__ import annotations

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
INF = tl.constexpr(float("inf"))
# In every Triton from 3.6 to 3.9 the interpreter multiplies the bit patterns of bf16 operands in tl.dot and
# truncates fp32 to bf16: `dot` and `cast` mend that, and nothing else may do what they do.
INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)


@triton.jit
def dot(a, b, acc, PRECISION: tl.constexpr):
    """acc + a @ b in fp32. PRECISION governs fp32 operands alone: 'ieee', or 'tf32x3' (three products of tf32
    parts, about as exact), never one of tf32."""
    if INTERPRETED and a.dtype == tl.bfloat16:
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, acc, input_precision=PRECISION)


@triton.jit
def cast(x, dtype: tl.constexpr):
    """fp32 in another floating type, rounded to nearest even."""
    if INTERPRETED and dtype == tl.bfloat16:
        bits = x.to(tl.uint32, bitcast=True)
        bits = tl.where(x == x, (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16, 0x7FC0)
        return bits.to(tl.uint16).to(tl.bfloat16, bitcast=True)
    return x.to(dtype)


@triton.jit
def offset(index, stride, MULTIPLE: tl.constexpr):
    """index · stride in 64 bits. MULTIPLE is what the launcher knows to divide every stride: where that
    makes 16 bytes, rows are read and written in vectors though strides are not specialised on."""
    return tl.multiple_of(tl.cast(index, tl.int64) * stride, MULTIPLE)


@triton.jit
def rows_from(
    base, count, stride, WIDTH: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, TMA: tl.constexpr
):  # fmt: skip
    """What load_rows takes its tiles (ROWS, BLOCK) from: count rows of WIDTH elements, ``stride`` apart. TMA: a
    tensor descriptor, by which Hopper and later copy a tile past the threads' registers; else ``base``."""
    if TMA:
        return tl.make_tensor_descriptor(
            base,
            shape=[tl.maximum(count, 1), WIDTH],
            strides=[tl.cast(stride, tl.int64), 1],
            block_shape=[ROWS, BLOCK],
        )
    else:
        return base


@triton.jit
def load_rows(
    source, first, count, stride,
    WIDTH: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, MULTIPLE: tl.constexpr, TMA: tl.constexpr,
    MASKED: tl.constexpr,
):  # fmt: skip
    """Rows first, ..., first + ROWS − 1 of what rows_from gave, 0 beyond WIDTH and beyond count, which a tile
    that is not MASKED must not reach."""
    if TMA:
        tile = source.load([tl.cast(first, tl.int32), 0])
    else:
        rows = tl.arange(0, ROWS)
        column = tl.arange(0, BLOCK)
        source += offset(first, stride, MULTIPLE)
        pointers = source + offset(rows, stride, MULTIPLE)[:, None] + column[None, :]
        if MASKED and WIDTH != BLOCK:
            mask = (first + rows < count)[:, None] & (column < WIDTH)[None, :]
            tile = tl.load(pointers, mask=mask, other=0.0)
        elif MASKED:
            tile = tl.load(pointers, mask=(first + rows < count)[:, None], other=0.0)
        elif WIDTH != BLOCK:
            tile = tl.load(pointers, mask=(column < WIDTH)[None, :], other=0.0)
        else:
            tile = tl.load(pointers)
    return tile


@triton.jit
def store_rows(
    base, first, count, stride, value, WIDTH: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
    MULTIPLE: tl.constexpr,
):  # fmt: skip
    """The converse of load_rows, for fp32 values."""
    rows = tl.arange(0, ROWS)
    column = tl.arange(0, BLOCK)
    base += offset(first, stride, MULTIPLE)
    mask = (first + rows < count)[:, None]
    if WIDTH != BLOCK:
        mask = mask & (column < WIDTH)[None, :]
    pointers = base + offset(rows, stride, MULTIPLE)[:, None] + column[None, :]
    tl.store(pointers, cast(value, base.dtype.element_ty), mask=mask)


@triton.jit
def visible(i, j, shift, window_left, window_right, HAS_LEFT: tl.constexpr, HAS_RIGHT: tl.constexpr):
    """The mask predicate: key j is visible to query i iff i + shift − left <= j <= i + shift + right, shift
    being seqlen_k − seqlen_q. HAS_LEFT and HAS_RIGHT say which ends there are."""
    seen = j == j
    if HAS_LEFT:
        seen = seen & (j >= i + shift - window_left)
    if HAS_RIGHT:
        seen = seen & (j <= i + shift + window_right)
    return seen


@triton.jit
def in_sight(
    first,
    last,
    shift,
    count,
    before,
    after,
    HAS_BEFORE: tl.constexpr,
    HAS_AFTER: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Which blocks of keys queries first to last see: all of them those in [full_begin, full_end), and no key
    outside [begin, end) by any. The ends of what a query sees rise with the query.

    shift = seqlen_k − seqlen_q, count = seqlen_k, before and after are the window's sides. For the blocks of
    queries that see keys first to last, shift changes its sign and the sides their places, with count =
    seqlen_q. begin, full_begin and full_end are multiples of BLOCK where anything is in [begin, end).
    """
    begin = 0
    end = count
    full_begin = 0
    full_end = count
    if HAS_BEFORE:
        begin = tl.maximum(first + shift - before, 0)
        full_begin = tl.maximum(last + shift - before, 0)
    if HAS_AFTER:
        end = tl.minimum(last + shift + after + 1, count)
        full_end = tl.minimum(first + shift + after + 1, count)
    begin = begin // BLOCK * BLOCK
    full_begin = tl.minimum(tl.cdiv(full_begin, BLOCK) * BLOCK, tl.maximum(end, begin))
    full_end = tl.maximum(full_end // BLOCK * BLOCK, full_begin)
    return begin, full_begin, full_end, end


@triton.jit
def finite_or_zero(m):
    """m, and 0 for the −inf of a row that has seen no key: what may be subtracted from scores of −inf."""
    return tl.where(m == -INF, 0.0, m)


@triton.jit
def softmax_step(s, m, l, factor):
    """One step of online softmax (Milakov & Gimelshein 2018): scores s · factor (M, N), factor > 0, join the
    state's m, l (M). Returns p = 2^(s · factor − m'), alpha = 2^(m − m'), by which acc is to be multiplied,
    m' and l'."""
    new_m = tl.maximum(m, tl.max(s, 1) * factor)
    safe_m = finite_or_zero(new_m)
    p = tl.exp2(s * factor - safe_m[:, None])
    alpha = tl.exp2(m - safe_m)
    return p, alpha, new_m, l * alpha + tl.sum(p, 1)


@triton.jit
def softmax_end(m, l):
    """1 / l, 0 for a row that saw no key; and lse = log Σ exp(score), −inf for it."""
    empty = l == 0
    lse = (finite_or_zero(m) + tl.log2(tl.where(empty, 1.0, l))) * LN2
    return tl.where(empty, 0.0, 1.0 / l), tl.where(empty, -INF, lse)


@triton.jit
def tanh(x):
    """|error| < 1e-7, and relative to x where it is small."""
    t = tl.exp2(tl.abs(x) * (-2 * LOG2E))
    far = (1 - t) / (1 + t)
    y = x * x
    near = 1 + y * (-1 / 3 + y * (2 / 15 + y * (-17 / 315 + y * (62 / 2835))))
    return tl.where(y < 0.0625, x * near, tl.where(x < 0, -far, far))


@triton.jit
def philox_keep(rng_state, rows, first, column, threshold, N: tl.constexpr):
    """(M, N) bool, which elements dropout keeps: Philox4x32-10 (Salmon et al. 2011) with the 64 bits of the
    seed as key. The four words of the counter (j // 4, rows, column, offset) decide for elements
    j = first, ..., first + N − 1; first and N are multiples of 4. rows: (M)."""
    seed = tl.load(rng_state)
    lane = tl.load(rng_state + 1).to(tl.uint32)
    blocks = (first // 4 + tl.arange(0, N // 4))[None, :].to(tl.uint32)
    zero = blocks * 0 + rows[:, None].to(tl.uint32) * 0
    w0, w1, w2, w3 = tl.philox(
        seed, blocks + zero, rows[:, None].to(tl.uint32) + zero, column.to(tl.uint32) + zero, lane + zero
    )
    words = tl.join(tl.join(w0, w2), tl.join(w1, w3))  # (M, N / 4, 2, 2): the last two axes count the words
    return tl.reshape(words, (rows.shape[0], N)) >= threshold.to(tl.uint32)


@triton.jit
def rotate(x, other, cos, sin, first):
    """Rotary embedding (Su et al. 2021, arXiv:2104.09864) of the elements x of pairs whose other ends are
    ``other``; first: whether x is the first of its pair."""
    return tl.where(first, x * cos - other * sin, x * cos + other * sin)
