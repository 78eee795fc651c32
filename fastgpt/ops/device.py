"""What the Triton kernels of all ops share on the device: each of these stands here once.

Scores and softmax states are in base 2: a score of the specification times log2(e). A state (m, l, acc) of a
row over the keys seen so far is the maximum m, the sum l = Σ 2^(s − m) and acc = Σ 2^(s − m) · v.
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.target_info import cuda_capability_geq, is_hip

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
INF = tl.constexpr(float("inf"))
LARGEST = tl.constexpr(3.4028234663852886e38)
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
    if not INTERPRETED and is_hip():  # where the hint is lost if rows differ in a tile
        return tl.cast(index, tl.int64) * multiple(stride, MULTIPLE)
    return tl.multiple_of(tl.cast(index, tl.int64) * stride, MULTIPLE)


@triton.jit
def multiple(n, MULTIPLE: tl.constexpr):
    """n, of which the launcher knows that MULTIPLE divides it, in a form from which every compiler sees that,
    in products with it and masks below it, too."""
    return n // MULTIPLE * MULTIPLE


@triton.jit
def gather_rows(base, offsets, inside, WIDTH: tl.constexpr, BLOCK: tl.constexpr, MASKED: tl.constexpr):
    """A tile of rows of WIDTH elements, 0 beyond WIDTH and, if MASKED, in rows that are not inside."""
    column = tl.arange(0, BLOCK)
    pointers = base + offsets[:, None] + column[None, :]
    if MASKED:
        if WIDTH == BLOCK:
            return tl.load(pointers, mask=inside[:, None], other=0)
        return tl.load(pointers, mask=inside[:, None] & (column < WIDTH)[None, :], other=0)
    if WIDTH == BLOCK:
        return tl.load(pointers)
    return tl.load(pointers, mask=(column < WIDTH)[None, :], other=0)


@triton.jit
def scatter_rows(base, offsets, inside, value, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    """Writes the rows of ``value``, in base's dtype, that are inside."""
    column = tl.arange(0, BLOCK)
    mask = inside[:, None]
    if WIDTH != BLOCK:
        mask = mask & (column < WIDTH)[None, :]
    tl.store(base + offsets[:, None] + column[None, :], value, mask=mask)


@triton.jit
def rows_from(
    base, count, stride, WIDTH: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, TMA: tl.constexpr
):  # fmt: skip
    """What load_rows takes its tiles (ROWS, BLOCK) from: count rows of WIDTH elements, ``stride`` apart. TMA:
    a tensor descriptor, by which Hopper and later copy tiles past the threads' registers; else ``base``."""
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
        source += offset(first, stride, MULTIPLE)
        tile = gather_rows(source, offset(rows, stride, MULTIPLE), first + rows < count, WIDTH, BLOCK, MASKED)
    return tile


@triton.jit
def store_rows(
    base, first, count, stride, value, WIDTH: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
    MULTIPLE: tl.constexpr, TMA: tl.constexpr,
):  # fmt: skip
    """The converse of load_rows, for fp32 values."""
    value = cast(value, base.dtype.element_ty)
    if TMA:
        rows_from(base, count, stride, WIDTH, ROWS, BLOCK, TMA).store([tl.cast(first, tl.int32), 0], value)
    else:
        rows = tl.arange(0, ROWS)
        base += offset(first, stride, MULTIPLE)
        scatter_rows(base, offset(rows, stride, MULTIPLE), first + rows < count, value, WIDTH, BLOCK)


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
def key_range(
    first, last, shift, seqlen_k, window_left, window_right, HAS_LEFT: tl.constexpr, HAS_RIGHT: tl.constexpr
):
    """Of queries first to last: [begin, end), the keys that any of them sees, and [full_begin, full_end),
    those that all of them see. The ends of a query's keys rise with the query."""
    begin = 0
    end = seqlen_k
    full_begin = 0
    full_end = seqlen_k
    if HAS_LEFT:
        begin = tl.maximum(first + shift - window_left, 0)
        full_begin = tl.maximum(last + shift - window_left, 0)
    if HAS_RIGHT:
        end = tl.minimum(last + shift + window_right + 1, seqlen_k)
        full_end = tl.minimum(first + shift + window_right + 1, seqlen_k)
    return begin, end, full_begin, full_end


@triton.jit
def blocks_of_keys(begin, end, full_begin, full_end, BLOCK: tl.constexpr):
    """key_range's ends in blocks: those from begin to full_begin are seen in part, those to full_end whole,
    those to end in part again. Returns begin, full_begin and full_end."""
    begin = begin // BLOCK * BLOCK
    full_begin = tl.minimum(tl.cdiv(full_begin, BLOCK) * BLOCK, tl.maximum(end, begin))
    full_end = tl.maximum(full_end // BLOCK * BLOCK, full_begin)
    return begin, full_begin, full_end


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
    """begin, full_begin, full_end and end of blocks_of_keys for queries first to last, with shift = seqlen_k
    − seqlen_q, count = seqlen_k and the window's sides before and after. For the blocks of queries that see
    keys first to last, shift changes its sign and the sides their places, with count = seqlen_q."""
    begin, end, full_begin, full_end = key_range(
        first, last, shift, count, before, after, HAS_BEFORE, HAS_AFTER
    )
    begin, full_begin, full_end = blocks_of_keys(begin, end, full_begin, full_end, BLOCK)
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
def score(qk, distance, softmax_scale, softcap, slope, PLAIN: tl.constexpr, SOFTCAP: tl.constexpr):
    """softcap(softmax_scale · qk) − slope · |distance|, in base 2, is the first result times the second,
    which is positive; the third is the derivative of softcap. PLAIN: there is neither softcap nor slope, and
    softmax_scale > 0."""
    derivative = 1.0
    if PLAIN:
        x = qk
        factor = softmax_scale * LOG2E
    else:
        x = qk * softmax_scale
        factor = 1.0
        if SOFTCAP:
            t = tanh(x / softcap)
            x = t * softcap
            derivative = 1 - t * t
        x = (x - slope * tl.abs(distance).to(tl.float32)) * LOG2E
    return x, factor, derivative


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


@triton.jit
def from_int8(x, dtype: tl.constexpr):
    if INTERPRETED:
        x = x.to(tl.float32)
    return cast(x, dtype)


@triton.jit
def to_int8(x):
    """fp32 rounded to the nearest integer, ties to even, and saturated at ±127."""
    x = tl.where(x > 127, 127.0, tl.where(x < -127, -127.0, x))
    magic: tl.constexpr = 1.5 * 2**23  # a unit in the last place of a sum with it is 1
    return (x + magic - magic).to(tl.int8)


@triton.jit
def from_fp8(bits, dtype: tl.constexpr):
    """float8 e4m3, given as bits (uint8) as not every chip has the type, in one that holds all its values."""
    if not INTERPRETED and cuda_capability_geq(8, 9):
        return bits.to(tl.float8e4nv, bitcast=True).to(dtype)
    bits = bits.to(tl.uint32)
    x = (((bits & 0x80) << 24) | ((bits & 0x7F) << 20)).to(tl.float32, bitcast=True)
    x *= 2.0**120  # the exponent's bias is 127 here and 7 there; subnormal numbers come out right, too
    return cast(tl.where((bits & 0x7F) == 0x7F, float("nan"), x), dtype)


@triton.jit
def to_fp8(x):
    """The bits (uint8) of fp32 in float8 e4m3, rounded to nearest even and saturated at ±448."""
    bits = x.to(tl.uint32, bitcast=True)
    magnitude = tl.minimum(bits & 0x7FFFFFFF, 0x43E00000)  # 448
    # Below 2^−6, the least normal number, they are multiples of 2^−9, a unit in the last place of 2^14.
    small = (magnitude.to(tl.float32, bitcast=True) + 2.0**14).to(tl.uint32, bitcast=True)
    normal = (magnitude - (120 << 23) + 0x7FFFF + ((magnitude >> 20) & 1)) >> 20
    code = tl.where(magnitude < (121 << 23), small, normal)
    return (tl.where(x == x, code & 0x7F, 0x7F) | ((bits >> 24) & 0x80)).to(tl.uint8)
