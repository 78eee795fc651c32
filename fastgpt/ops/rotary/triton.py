"""Rotary embedding in Triton (Su et al. 2021, arXiv:2104.09864); backward is forward with the sines negated.

One program owns a block of tokens and of heads: the rows of cos and sin that its tokens need are read once
for all its heads, x is read and out written once, 16 bytes at a time where strides allow. Bound by memory.
Storage fp32, bf16 or fp16, any strides whose last is 1; arithmetic fp32. Held by tests/test_rotary.py.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from fastgpt.ops import launch
from fastgpt.ops.device import cast, offset, rotate
from fastgpt.ops.launch import Config
from fastgpt.ops.rotary.spec import RotaryCall, RotarySpec, RotaryTensors

# All that a call may ask for today; a new feature is unsupported until it is written here.
FEATURES = ("interleaved", "seqlen_offsets", "varlen")

# (chip, row in bytes, direction): block_m tokens by block_n heads (fewer heads: more tokens), warps, stages.
CONFIGS = {
    ("default", 128, "forward"): Config(16, 4, 4, 1),
    ("default", 256, "forward"): Config(8, 4, 4, 1),
    ("default", 512, "forward"): Config(4, 4, 4, 1),
    ("default", 1024, "forward"): Config(2, 4, 4, 1),
    ("interpreter", 1024, "forward"): Config(64, 4, 4, 1),
}


def unsupported(call: RotaryCall) -> list[str]:
    return launch.refusals(call.device, call.dtype, call.features, FEATURES, call.headdim)


class _Constants(NamedTuple):
    """What the kernel is compiled for, beside dtypes and which optional tensors there are."""

    PAIRS: int  # rotary_dim / 2
    BLOCK_PAIRS: int  # the power of two that holds them
    HEADDIM: int
    BLOCK_REST: int  # the power of two that holds the elements from rotary_dim on, 0 without any
    BLOCK_M: int  # tokens
    BLOCK_H: int  # heads
    INTERLEAVED: bool
    CONJUGATE: bool
    MULTIPLE: int  # divides all strides of x and out (device.offset)
    MULTIPLE_TABLE: int  # those of cos and sin


@triton.jit
def _sequence_of(tokens, cu_seqlens, batch):
    """Which packed sequence each of the tokens (M) is in: the last that does not begin behind it."""
    low = tokens * 0  # of the sequences that remain, ``left`` of them
    left = batch
    while left > 1:
        middle = low + left // 2
        low = tl.where(tl.load(cu_seqlens + middle) <= tokens, middle, low)
        left -= left // 2
    return low


@triton.jit
def _rows(base, b, first, first_head, stride_b, stride_s, stride_h, C: tl.constexpr):
    """Where the rows of the program's tokens and heads begin, (M, H, 1)."""
    base += offset(b, stride_b, C.MULTIPLE) + offset(first, stride_s, C.MULTIPLE)
    base += offset(first_head, stride_h, C.MULTIPLE)
    tokens = offset(tl.arange(0, C.BLOCK_M), stride_s, C.MULTIPLE)
    heads = offset(tl.arange(0, C.BLOCK_H), stride_h, C.MULTIPLE)
    return base + tokens[:, None, None] + heads[None, :, None]


@triton.jit
def _columns(inside, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    """(1, 1, BLOCK), and what of them is in a row of WIDTH elements that is inside (M, H, 1)."""
    column = tl.arange(0, BLOCK)[None, None, :]
    if WIDTH != BLOCK:
        inside = inside & (column < WIDTH)
    return column, inside


@triton.jit(
    do_not_specialize=[
        *("stride_xb", "stride_xs", "stride_xh", "stride_ob", "stride_os", "stride_oh", "stride_cos"),
        *("stride_sin", "batch", "seqlen", "nheads", "positions", "seqlen_offset"),
    ]
)
def rotary(
    X,
    Out,
    tensors,
    stride_xb,
    stride_xs,
    stride_xh,
    stride_ob,
    stride_os,
    stride_oh,
    stride_cos,
    stride_sin,
    batch,
    seqlen,
    nheads,
    positions,
    seqlen_offset,
    C: tl.constexpr,
):
    """X, Out: (batch, seqlen, nheads, HEADDIM), or packed (seqlen, nheads, HEADDIM) with stride_xb = 0;
    tensors: RotaryTensors, cos and sin (positions, PAIRS). A token whose position is not in them gives NaN.
    """
    pid = tl.program_id(0)
    head_blocks = tl.cdiv(nheads, C.BLOCK_H)
    blocks = tl.cdiv(seqlen, C.BLOCK_M)
    first_head = pid % head_blocks * C.BLOCK_H
    pid //= head_blocks
    first = pid % blocks * C.BLOCK_M
    b = pid // blocks
    tokens = first + tl.arange(0, C.BLOCK_M)
    heads = first_head + tl.arange(0, C.BLOCK_H)

    position = tokens
    if tensors.cu_seqlens is not None:
        sequence = _sequence_of(tokens, tensors.cu_seqlens, batch)
        position -= tl.load(tensors.cu_seqlens + sequence)
        if tensors.seqlen_offsets is not None:
            position += tl.load(tensors.seqlen_offsets + sequence)
    elif tensors.seqlen_offsets is not None:
        position += tl.load(tensors.seqlen_offsets + b)
    if tensors.seqlen_offsets is None:
        position += seqlen_offset

    pair = tl.arange(0, C.BLOCK_PAIRS)[None, None, :]
    known = ((position >= 0) & (position < positions))[:, None, None] & (pair < C.PAIRS)
    nan = float("nan")
    at = offset(position, stride_cos, C.MULTIPLE_TABLE)[:, None, None] + pair
    cos = tl.load(tensors.cos + at, mask=known, other=nan).to(tl.float32)  # (M, 1, pairs)
    at = offset(position, stride_sin, C.MULTIPLE_TABLE)[:, None, None] + pair
    sin = tl.load(tensors.sin + at, mask=known, other=nan).to(tl.float32)
    if C.CONJUGATE:
        sin = -sin

    x = _rows(X, b, first, first_head, stride_xb, stride_xs, stride_xh, C)
    out = _rows(Out, b, first, first_head, stride_ob, stride_os, stride_oh, C)
    inside = (tokens < seqlen)[:, None, None] & (heads < nheads)[None, :, None]
    dtype: tl.constexpr = Out.dtype.element_ty
    if C.INTERLEAVED:
        column, mask = _columns(inside, 2 * C.PAIRS, 2 * C.BLOCK_PAIRS)
        pairs = tl.load(x + column, mask=mask).to(tl.float32)
        x1, x2 = tl.split(tl.reshape(pairs, (C.BLOCK_M, C.BLOCK_H, C.BLOCK_PAIRS, 2)))
        pairs = tl.join(rotate(x1, x2, cos, sin, True), rotate(x2, x1, cos, sin, False))
        pairs = tl.reshape(pairs, (C.BLOCK_M, C.BLOCK_H, 2 * C.BLOCK_PAIRS))
        tl.store(out + column, cast(pairs, dtype), mask=mask)
    else:
        column, mask = _columns(inside, C.PAIRS, C.BLOCK_PAIRS)
        x1 = tl.load(x + column, mask=mask).to(tl.float32)
        x2 = tl.load(x + C.PAIRS + column, mask=mask).to(tl.float32)
        tl.store(out + column, cast(rotate(x1, x2, cos, sin, True), dtype), mask=mask)
        tl.store(out + C.PAIRS + column, cast(rotate(x2, x1, cos, sin, False), dtype), mask=mask)
    if C.BLOCK_REST:
        column, mask = _columns(inside, C.HEADDIM - 2 * C.PAIRS, C.BLOCK_REST)
        tl.store(out + 2 * C.PAIRS + column, tl.load(x + 2 * C.PAIRS + column, mask=mask), mask=mask)


@functools.cache
def _power(n: int) -> int:
    """The least power of two that is enough, 0 for 0."""
    return 1 << (n - 1).bit_length() if n else 0


@launch.tuned
def forward(x: Tensor, spec: RotarySpec, tensors: RotaryTensors) -> Tensor:
    """out, contiguous, of x's shape and dtype."""
    out = x.new_empty(x.shape)
    if out.numel() == 0:
        return out
    *lead, seqlen, nheads, headdim = x.shape
    rows = lead[0] if lead else 1
    batch = rows if tensors.cu_seqlens is None else tensors.cu_seqlens.shape[0] - 1
    positions, pairs = tensors.cos.shape
    multiples = launch.vector_multiple(x, out), launch.vector_multiple(tensors.cos, tensors.sin)
    architecture = launch.chip(x.device).architecture
    config = launch.choose(CONFIGS, headdim * x.element_size(), "forward", architecture)
    heads = min(config.block_n, _power(nheads))  # not more than there are
    config = config._replace(block_m=config.block_m * config.block_n // heads, block_n=heads)
    sizes = pairs, _power(pairs), headdim, _power(headdim - 2 * pairs), config.block_m, config.block_n
    constants = launch.constants(_Constants, *sizes, spec.interleaved, spec.conjugate, *multiples)
    launch.launch(
        rotary,
        rows * -(-seqlen // config.block_m) * -(-nheads // config.block_n),
        config,
        x.device,
        *(x, out, tensors),
        *launch.strides(x, out),
        *(tensors.cos.stride(0), tensors.sin.stride(0)),
        *(batch, seqlen, nheads, positions, spec.seqlen_offset),
        constants,
    )
    return out
