"""Layer norm and RMS norm in Triton, forward and backward (Ba et al. 2016, arXiv:1607.06450; Zhang & Sennrich
2019, arXiv:1910.07467).

    z = dropout(x) + residual, rounded to their dtype; dropout(x) = x · keep / (1 − dropout_p)
    layer norm: mean = Σ z / hidden, rstd = (Σ (z − mean)² / hidden + eps) ** −0.5
    RMS norm:   mean = 0,            rstd = (Σ z² / hidden + eps) ** −0.5
    xhat = (z − mean) · rstd,  out = xhat · weight + bias

x, residual, dout, dresidual_out (rows, hidden) in fp32, bf16 or fp16, any row stride; out, residual_out, dx,
dresidual the same, contiguous; weight, bias, dweight, dbias (hidden) in x's dtype or fp32; mean, rstd (rows)
fp32, as is all arithmetic. A program keeps whole rows in registers: each byte is read once and written once.
Longer rows are walked through twice, some columns at a time, by the ``_long`` kernels. A row's bits depend on
that row alone, those of dweight and dbias on shape and chip: no atomics. Held by tests/test_norm.py.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastgpt.ops import launch, philox
from fastgpt.ops.device import cast, multiple, philox_keep
from fastgpt.ops.launch import Config
from fastgpt.ops.native import contiguous
from fastgpt.ops.norm.spec import NormCall, NormSpec

FEATURES = ("rms", "weight", "bias", "mixed_weight", "residual", "dropout", "backward")

LONG = 2**31  # above every hidden

# (chip, hidden, kernel): tiles of block_m rows by block_n columns. A thread has 32 elements in forward, 16 in
# backward, where it has the columns' sums, too. LONG: the ``_long`` kernels and norm_reduce.
CONFIGS = {
    ("default", 64, "forward"): Config(64, 64, 4, 1),
    ("default", 256, "forward"): Config(16, 256, 4, 1),
    ("default", 1024, "forward"): Config(4, 1024, 4, 1),
    ("default", 2048, "forward"): Config(2, 2048, 4, 1),
    ("default", 4096, "forward"): Config(1, 4096, 4, 1),
    ("default", 8192, "forward"): Config(1, 8192, 8, 1),
    ("default", 16384, "forward"): Config(1, 16384, 16, 1),
    ("default", LONG, "forward"): Config(1, 4096, 16, 1),
    ("default", 64, "backward"): Config(32, 64, 8, 3),
    ("default", 256, "backward"): Config(16, 256, 8, 3),
    ("default", 1024, "backward"): Config(4, 1024, 8, 3),
    ("default", 2048, "backward"): Config(2, 2048, 8, 3),
    ("default", 4096, "backward"): Config(1, 4096, 8, 3),
    ("default", 8192, "backward"): Config(1, 8192, 16, 2),
    ("default", LONG, "backward"): Config(4, 2048, 8, 1),
    ("default", LONG, "reduce"): Config(128, 32, 4, 1),
    ("interpreter", 64, "forward"): Config(128, 64, 16, 1),
    ("interpreter", 1024, "forward"): Config(64, 1024, 16, 1),
    ("interpreter", LONG, "forward"): Config(2, 4096, 16, 1),
    ("interpreter", 64, "backward"): Config(128, 64, 16, 1),
    ("interpreter", 1024, "backward"): Config(64, 1024, 16, 1),
    ("interpreter", LONG, "backward"): Config(2, 4096, 16, 1),
    ("interpreter", LONG, "reduce"): Config(1, 16384, 16, 1),
}


def unsupported(call: NormCall) -> list[str]:
    return launch.refusals(call.device, call.dtype, call.features, FEATURES)


class _Tensors(NamedTuple):
    """What a call may have or not; (rows, hidden) but for the last six."""

    residual: Tensor | None = None
    residual_out: Tensor | None = None
    dresidual_out: Tensor | None = None
    dresidual: Tensor | None = None
    weight: Tensor | None = None  # (hidden)
    bias: Tensor | None = None  # (hidden)
    dweight: Tensor | None = None  # (programs, hidden) in fp32: what each program adds to it
    dbias: Tensor | None = None  # (programs, hidden) in fp32
    mean: Tensor | None = None  # (rows); RMS norm has none
    rng_state: Tensor | None = None  # (2); without dropout there is none


class _Constants(NamedTuple):
    """What a kernel is compiled for, beside dtypes and which optional tensors there are.

    A tile is (BLOCK_M, PIECES, BLOCK_N): a row's columns are in PIECES of BLOCK_N, which its threads load at
    once, 16 bytes each. So a row is with as few warps as may be, and sums over it take few shuffles.
    """

    BLOCK_M: int  # rows
    PIECES: int
    BLOCK_N: int  # columns of a piece
    WIDTH: int  # PIECES · BLOCK_N
    STAGES: int  # of the pipeline that loads blocks of rows ahead
    MULTIPLE: int  # divides hidden and the row strides


class _Sum(NamedTuple):
    """What z = dropout(x) + residual is made of."""

    x: Any
    stride_x: Any
    residual: Any  # or None
    stride_residual: Any
    dropout: Any


class _Dropout(NamedTuple):
    rng_state: Any  # or None
    threshold: Any
    scale: Any


@triton.jit
def _rows(block, rows, C: tl.constexpr):
    """(BLOCK_M): those of a block; and (BLOCK_M, 1, 1), which of them there are."""
    row = tl.cast(block, tl.int64) * C.BLOCK_M + tl.arange(0, C.BLOCK_M)
    return row, (row < rows)[:, None, None]


@triton.jit
def _columns(first, hidden, C: tl.constexpr):
    """(1, PIECES, BLOCK_N): those from ``first`` on, and which there are: all or none of a vector."""
    column = tl.arange(0, C.PIECES)[None, :, None] * C.BLOCK_N + tl.arange(0, C.BLOCK_N)[None, None, :]
    column += first
    return column, column < multiple(hidden, C.MULTIPLE)


@triton.jit
def _load(base, row, stride, column, inside, C: tl.constexpr):
    """A tile in fp32, 0 where not inside."""
    pointers = base + (row * multiple(stride, C.MULTIPLE))[:, None, None] + column
    return tl.load(pointers, mask=inside, other=0.0).to(tl.float32)


@triton.jit
def _store(base, row, hidden, column, inside, value, C: tl.constexpr):
    pointers = base + (row * multiple(hidden, C.MULTIPLE))[:, None, None] + column
    tl.store(pointers, cast(value, base.dtype.element_ty), mask=inside)


@triton.jit
def _load_parameter(base, column, inside):
    """Weight or bias in fp32, for every row of a tile: each thread reads what it needs, mostly from the
    cache, which is quicker than to pass it on."""
    column = tl.broadcast_to(column, inside.shape)
    return tl.load(base + column, mask=inside, other=0.0).to(tl.float32)


@triton.jit
def _mean(x, hidden):
    """(BLOCK_M, 1, 1): over the rows of a tile that is 0 beyond ``hidden``; of one element, that element."""
    return tl.sum(tl.sum(x, 1, keep_dims=True), 2, keep_dims=True) * (1.0 / hidden)


@triton.jit
def _dropped(x, row, first, dropout, C: tl.constexpr):
    """x · keep / (1 − dropout_p) of a tile whose columns begin at ``first``."""
    if dropout.rng_state is not None:
        high = (row >> 32)[:, None]
        keep = philox_keep(dropout.rng_state, row, first, high, dropout.threshold, C.WIDTH)
        keep = tl.reshape(keep, (C.BLOCK_M, C.PIECES, C.BLOCK_N))
        x = x * tl.where(keep, dropout.scale, 0.0)
    return x


@triton.jit
def _load_sum(terms, row, first, column, inside, C: tl.constexpr):
    """A tile of z, rounded, in fp32."""
    z = _load(terms.x, row, terms.stride_x, column, inside, C)
    if terms.residual is None:
        z = _dropped(z, row, first, terms.dropout, C)
    else:
        residual = _load(terms.residual, row, terms.stride_residual, column, inside, C)
        z = _dropped(z, row, first, terms.dropout, C) + residual
    return cast(z, terms.x.dtype.element_ty).to(tl.float32)


@triton.jit
def _affine(xhat, column, inside, tensors):
    """xhat · weight + bias."""
    if tensors.weight is not None and tensors.bias is not None:
        weight = _load_parameter(tensors.weight, column, inside)
        xhat = tl.fma(xhat, weight, _load_parameter(tensors.bias, column, inside))
    elif tensors.weight is not None:
        xhat *= _load_parameter(tensors.weight, column, inside)
    elif tensors.bias is not None:
        xhat += _load_parameter(tensors.bias, column, inside)
    return xhat


# A new length or stride compiles nothing.
_LENGTHS = ["rows", "hidden", "dropout_threshold"]


@triton.jit(do_not_specialize=[*_LENGTHS, "stride_x", "stride_residual"])
def norm_forward(
    X,
    Out,
    Rstd,
    tensors,
    stride_x,
    stride_residual,
    rows,
    hidden,
    eps,
    dropout_threshold,
    dropout_scale,
    C: tl.constexpr,
):
    """out, mean, rstd and, where there is a tensor for it, z of BLOCK_M rows of at most BLOCK_N elements."""
    row, has_row = _rows(tl.program_id(0), rows, C)
    column, has_column = _columns(0, hidden, C)
    inside = has_row & has_column
    dropout = _Dropout(tensors.rng_state, dropout_threshold, dropout_scale)
    terms = _Sum(X, stride_x, tensors.residual, stride_residual, dropout)
    z = _load_sum(terms, row, 0, column, inside, C)
    if tensors.residual_out is not None:
        _store(tensors.residual_out, row, hidden, column, inside, z, C)
    if tensors.mean is None:
        rstd = tl.rsqrt(_mean(z * z, hidden) + eps)
        xhat = z * rstd
    else:
        mean = _mean(z, hidden)
        z -= tl.where(inside, mean, 0.0)
        # What rounding has taken from a large mean: where it matters, z − mean is exact.
        rest = _mean(z, hidden)
        rstd = tl.rsqrt(tl.maximum(_mean(z * z, hidden) - rest * rest, 0.0) + eps)
        xhat = tl.fma(z, rstd, -rest * rstd)
        tl.store(tensors.mean + row[:, None, None], mean + rest, mask=has_row)
    tl.store(Rstd + row[:, None, None], rstd, mask=has_row)
    out = _affine(xhat, column, inside, tensors)
    _store(Out, row, hidden, column, inside, out, C)


@triton.jit(do_not_specialize=[*_LENGTHS, "stride_x", "stride_residual"])
def norm_forward_long(
    X,
    Out,
    Rstd,
    tensors,
    stride_x,
    stride_residual,
    rows,
    hidden,
    eps,
    dropout_threshold,
    dropout_scale,
    C: tl.constexpr,
):
    """norm_forward of longer rows: a walk for z and its statistics, and one for out.

    Each lane follows the mean of what it sees, and the squares about it (Welford 1962), of z less a pivot,
    the mean of the first columns; then the lanes are joined (Chan, Golub & LeVeque 1983). So no variance is a
    difference of large moments, and a large mean's rounding is not seen.
    """
    row, has_row = _rows(tl.program_id(0), rows, C)
    dropout = _Dropout(tensors.rng_state, dropout_threshold, dropout_scale)
    terms = _Sum(X, stride_x, tensors.residual, stride_residual, dropout)
    means = tl.full((C.BLOCK_M, C.PIECES, C.BLOCK_N), 0.0, tl.float32)
    squares = tl.full((C.BLOCK_M, C.PIECES, C.BLOCK_N), 0.0, tl.float32)
    if tensors.mean is not None:
        column, has_column = _columns(0, hidden, C)
        z = _load_sum(terms, row, 0, column, has_row & has_column, C)
        pivot = _mean(z, tl.minimum(hidden, C.WIDTH))
    for first in tl.range(0, hidden, C.WIDTH):
        column, has_column = _columns(first, hidden, C)
        inside = has_row & has_column
        z = _load_sum(terms, row, first, column, inside, C)
        if tensors.residual_out is not None:
            _store(tensors.residual_out, row, hidden, column, inside, z, C)
        if tensors.mean is None:
            squares += z * z
        else:
            seen = tl.cast(first // C.WIDTH + 1, tl.float32)
            step = tl.where(inside, z - pivot - means, 0.0)
            means += step * (1 / seen)
            squares += step * step * (1 - 1 / seen)
    if tensors.mean is not None:
        lane, _ = _columns(0, hidden, C)
        seen = tl.cast((hidden - lane + C.WIDTH - 1) // C.WIDTH, tl.float32)
        rest = _mean(means * seen, hidden)
        means -= rest
        squares += means * means * seen
        tl.store(tensors.mean + row[:, None, None], pivot + rest, mask=has_row)
    rstd = tl.rsqrt(_mean(squares, hidden) + eps)
    tl.store(Rstd + row[:, None, None], rstd, mask=has_row)
    for first in tl.range(0, hidden, C.WIDTH):
        column, has_column = _columns(first, hidden, C)
        inside = has_row & has_column
        z = _load_sum(terms, row, first, column, inside, C)
        if tensors.mean is not None:
            z = z - pivot - rest
        out = _affine(z * rstd, column, inside, tensors)
        _store(Out, row, hidden, column, inside, out, C)


@triton.jit
def _load_statistics(Rstd, row, has_row, tensors):
    """mean, 0 in RMS norm, and rstd of each row."""
    rstd = tl.load(Rstd + row[:, None, None], mask=has_row, other=0.0)
    mean = 0.0
    if tensors.mean is not None:
        mean = tl.load(tensors.mean + row[:, None, None], mask=has_row, other=0.0)
    return mean, rstd


@triton.jit
def _store_gradients(
    DX, dz, stride_dresidual, row, first, column, inside, hidden, dropout, tensors, C: tl.constexpr
):
    """dx and dresidual; dz is so far what reaches z = dropout(x) + residual by way of out."""
    if tensors.dresidual_out is not None:
        dz += _load(tensors.dresidual_out, row, stride_dresidual, column, inside, C)
    if tensors.dresidual is not None:
        _store(tensors.dresidual, row, hidden, column, inside, dz, C)
    _store(DX, row, hidden, column, inside, _dropped(dz, row, first, dropout, C), C)


@triton.jit(do_not_specialize=[*_LENGTHS, "stride_dout", "stride_z", "stride_dresidual"])
def norm_backward(
    DOut,
    Z,
    Rstd,
    DX,
    tensors,
    stride_dout,
    stride_z,
    stride_dresidual,
    rows,
    hidden,
    dropout_threshold,
    dropout_scale,
    C: tl.constexpr,
):
    """dx, and dresidual where there is a tensor for it, of every num_programs-th block of rows, and what
    these rows add to dweight and dbias. Of norm_forward's out = xhat · weight + bias, with g = dout · weight:

        dz = rstd · (g − xhat · mean(g · xhat) − mean(g)) + dresidual_out, without mean(g) in RMS norm
        dx = dropout(dz),  dresidual = dz,  dweight = Σ dout · xhat and dbias = Σ dout over the rows
    """
    pid = tl.program_id(0)
    dropout = _Dropout(tensors.rng_state, dropout_threshold, dropout_scale)
    column, has_column = _columns(0, hidden, C)
    weight = 1.0
    if tensors.weight is not None:
        every_row = tl.broadcast_to(has_column, (C.BLOCK_M, C.PIECES, C.BLOCK_N))
        weight = _load_parameter(tensors.weight, column, every_row)
    dweight = tl.full((C.BLOCK_M, C.PIECES, C.BLOCK_N), 0.0, tl.float32)
    dbias = tl.full((C.BLOCK_M, C.PIECES, C.BLOCK_N), 0.0, tl.float32)
    for block in tl.range(pid, tl.cdiv(rows, C.BLOCK_M), tl.num_programs(0), num_stages=C.STAGES):
        row, has_row = _rows(block, rows, C)
        inside = has_row & has_column
        dout = _load(DOut, row, stride_dout, column, inside, C)
        z = _load(Z, row, stride_z, column, inside, C)
        mean, rstd = _load_statistics(Rstd, row, has_row, tensors)
        xhat = (z - mean) * rstd
        g = dout * weight
        dz = tl.fma(xhat, -_mean(g * xhat, hidden), g)
        if tensors.mean is not None:
            dz -= _mean(g, hidden)
        _store_gradients(
            DX, dz * rstd, stride_dresidual, row, 0, column, inside, hidden, dropout, tensors,
            C,
        )  # fmt: skip
        dweight = tl.fma(dout, xhat, dweight)
        dbias += dout
    at = pid.to(tl.int64) * hidden + column
    if tensors.dweight is not None:
        tl.store(tensors.dweight + at, tl.sum(dweight, 0, keep_dims=True), mask=has_column)
    if tensors.dbias is not None:
        tl.store(tensors.dbias + at, tl.sum(dbias, 0, keep_dims=True), mask=has_column)


@triton.jit
def _add_rows(sums, x, at, has_column, is_first):
    """Adds the rows of x to this program's sums, which the first block of rows begins."""
    before = tl.load(sums + at, mask=has_column & (not is_first), other=0.0)
    tl.store(sums + at, before + tl.sum(x, 0, keep_dims=True), mask=has_column)


@triton.jit(do_not_specialize=[*_LENGTHS, "stride_dout", "stride_z", "stride_dresidual"])
def norm_backward_long(
    DOut,
    Z,
    Rstd,
    DX,
    tensors,
    stride_dout,
    stride_z,
    stride_dresidual,
    rows,
    hidden,
    dropout_threshold,
    dropout_scale,
    C: tl.constexpr,
):
    """norm_backward of longer rows: a walk for the means of g and g · xhat, and one for the gradients."""
    pid = tl.program_id(0)
    dropout = _Dropout(tensors.rng_state, dropout_threshold, dropout_scale)
    for block in tl.range(pid, tl.cdiv(rows, C.BLOCK_M), tl.num_programs(0)):
        row, has_row = _rows(block, rows, C)
        mean, rstd = _load_statistics(Rstd, row, has_row, tensors)
        sum_g = tl.full((C.BLOCK_M, C.PIECES, C.BLOCK_N), 0.0, tl.float32)
        sum_gx = tl.full((C.BLOCK_M, C.PIECES, C.BLOCK_N), 0.0, tl.float32)
        for first in tl.range(0, hidden, C.WIDTH):
            column, has_column = _columns(first, hidden, C)
            inside = has_row & has_column
            g = _load(DOut, row, stride_dout, column, inside, C)
            if tensors.weight is not None:
                g *= _load_parameter(tensors.weight, column, inside)
            sum_g += g
            sum_gx += g * ((_load(Z, row, stride_z, column, inside, C) - mean) * rstd)
        mean_g = _mean(sum_g, hidden)
        mean_gx = _mean(sum_gx, hidden)
        for first in tl.range(0, hidden, C.WIDTH):
            column, has_column = _columns(first, hidden, C)
            inside = has_row & has_column
            dout = _load(DOut, row, stride_dout, column, inside, C)
            xhat = (_load(Z, row, stride_z, column, inside, C) - mean) * rstd
            dz = dout
            if tensors.weight is not None:
                dz *= _load_parameter(tensors.weight, column, inside)
            dz = tl.fma(xhat, -mean_gx, dz)
            if tensors.mean is not None:
                dz -= mean_g
            _store_gradients(
                DX, dz * rstd, stride_dresidual, row, first, column, inside, hidden, dropout, tensors,
                C,
            )  # fmt: skip
            at = pid.to(tl.int64) * hidden + column
            if tensors.dweight is not None:
                _add_rows(tensors.dweight, dout * xhat, at, has_column, block == pid)
            if tensors.dbias is not None:
                _add_rows(tensors.dbias, dout, at, has_column, block == pid)


@triton.jit
def _store_total(gradient, total, column, has_column):
    tl.store(
        gradient + column, cast(tl.sum(total, 0, keep_dims=True), gradient.dtype.element_ty), mask=has_column
    )


@triton.jit(do_not_specialize=["programs", "hidden"])
def norm_reduce(tensors, DWeight, DBias, programs, hidden, C: tl.constexpr):
    """dweight and dbias (hidden) from what each of the programs of norm_backward has added to them: BLOCK_N
    columns, BLOCK_M programs at a time."""
    column, has_column = _columns(tl.program_id(0) * C.WIDTH, hidden, C)
    dweight = tl.full((C.BLOCK_M, C.PIECES, C.BLOCK_N), 0.0, tl.float32)
    dbias = tl.full((C.BLOCK_M, C.PIECES, C.BLOCK_N), 0.0, tl.float32)
    for block in tl.range(0, tl.cdiv(programs, C.BLOCK_M)):
        row, has_row = _rows(block, programs, C)
        inside = has_row & has_column
        if DWeight is not None:
            dweight += _load(tensors.dweight, row, hidden, column, inside, C)
        if DBias is not None:
            dbias += _load(tensors.dbias, row, hidden, column, inside, C)
    if DWeight is not None:
        _store_total(DWeight, dweight, column, has_column)
    if DBias is not None:
        _store_total(DBias, dbias, column, has_column)


def _as_rows(t: Tensor | None) -> Tensor | None:
    """(rows, hidden); a copy where the leading axes have no common stride."""
    return None if t is None else t.reshape(-1, t.shape[-1])


def _plan(direction: str, hidden: int, *tensors: Tensor | None) -> tuple[Config, _Constants, bool]:
    """How a kernel is launched on ``tensors`` (rows, hidden), and whether the long one."""
    present = [t for t in tensors if t is not None]
    chip = launch.chip(present[0].device)
    config = launch.choose(CONFIGS, hidden, direction, chip.architecture)
    width = min(config.block_n, launch.block_dim(hidden))
    long = hidden > width and direction != "reduce"
    threads = chip.warp_size * config.num_warps
    of_a_row = threads if long else max(8, threads // config.block_m)
    block_n = min(width, of_a_row * launch.VECTOR // present[0].element_size())
    sizes = config.block_m, width // block_n, block_n, width, config.num_stages
    return config, launch.constants(_Constants, *sizes, launch.vector_multiple(*present)), long


def _stride(t: Tensor | None) -> int:
    return 0 if t is None else t.stride(0)


@launch.tuned
def forward(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    rng_state: Tensor | None,
    store: bool,
    spec: NormSpec,
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor]:
    out = x.new_empty(x.shape)
    residual_out = x.new_empty(x.shape) if store else None
    hidden = x.shape[-1]
    rows = x.numel() // hidden
    mean = None if spec.rms else x.new_empty(rows, dtype=torch.float32)
    rstd = x.new_empty(rows, dtype=torch.float32)
    x, residual = x.reshape(-1, hidden), _as_rows(residual)
    config, constants, long = _plan("forward", hidden, x, residual, out.view(x.shape))
    launch.launch(
        norm_forward_long if long else norm_forward,
        triton.cdiv(rows, config.block_m),
        config,
        x.device,
        *(x, out, rstd),
        _Tensors(
            residual, residual_out, weight=weight, bias=bias, mean=mean, rng_state=contiguous(rng_state)
        ),
        *(x.stride(0), _stride(residual), rows, hidden, spec.eps),
        *(philox.threshold(spec.dropout_p), 1 / (1 - spec.dropout_p)),
        constants,
        enable_fp_fusion=False,  # statistics are those of the rounded z
    )
    return out, residual_out, mean, rstd


@launch.tuned
def backward(
    dout: Tensor,
    dresidual_out: Tensor | None,
    z: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor | None,
    rstd: Tensor,
    rng_state: Tensor | None,
    residual_gradient: bool,
    spec: NormSpec,
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
    dx = z.new_empty(z.shape)
    dresidual = z.new_empty(z.shape) if rng_state is not None and residual_gradient else None
    hidden, rows = z.shape[-1], rstd.numel()
    dout, z, dresidual_out = dout.reshape(-1, hidden), z.reshape(-1, hidden), _as_rows(dresidual_out)
    config, constants, long = _plan("backward", hidden, dout, z, dresidual_out, dx.view(z.shape))
    # As many programs as fit a chip at 128 registers a thread, at most two a multiprocessor.
    most = launch.chip(z.device).multiprocessors * min(2, 16 // config.num_warps)
    programs = min(most, triton.cdiv(rows, config.block_m))
    dweight, dbias = (None if t is None else torch.empty_like(t) for t in (weight, bias))
    sums = [None if t is None else t.new_empty(programs, hidden, dtype=torch.float32) for t in (weight, bias)]
    state = contiguous(rng_state)
    tensors = _Tensors(None, None, dresidual_out, dresidual, weight, None, sums[0], sums[1], mean, state)
    launch.launch(
        norm_backward_long if long else norm_backward,
        programs,
        config,
        z.device,
        *(dout, z, rstd, dx, tensors),
        *(dout.stride(0), z.stride(0), _stride(dresidual_out), rows, hidden),
        *(philox.threshold(spec.dropout_p), 1 / (1 - spec.dropout_p)),
        constants,
        enable_fp_fusion=False,  # g, multiplied again, would differ from its mean in rows of one element
    )
    if weight is not None or bias is not None:
        config, constants, _ = _plan("reduce", hidden, *sums)
        launch.launch(
            norm_reduce,
            triton.cdiv(hidden, config.block_n),
            config,
            z.device,
            *(tensors, dweight, dbias, programs, hidden),
            constants,
        )
    return dx, dresidual, dweight, dbias
