"""The merge of two attention states in Triton, forward and backward: that of (m, l, acc) in Flash-Decoding
(Dao et al. 2023), of finished states, as FlashInfer's merge_state (Ye et al. 2025, arXiv:2501.01005).

    lse = log(exp(lse_a) + exp(lse_b)),  w_a = exp(lse_a − lse),  w_b = exp(lse_b − lse)
    out = w_a · out_a + w_b · out_b

out_a, out_b, dout (batch, seqlen, nheads, headdim_v) or packed (total, nheads, headdim_v) in fp32, bf16 or
fp16, any strides whose last is 1; lse_a, lse_b, dlse (batch, nheads, seqlen) or (nheads, total) fp32, any
strides. Results are contiguous, all arithmetic is fp32. A program owns BLOCK_M rows, queries of a head, and
each is computed by itself. A state of weight 0 is not read; where both have none, out = 0, lse = −inf and
every gradient is 0. Held by tests/test_merge.py.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from fastgpt.ops import launch
from fastgpt.ops.device import INF, cast, multiple
from fastgpt.ops.launch import Config
from fastgpt.ops.merge.spec import MergeCall

FEATURES = ("backward",)

LARGE = 2**31  # above every headdim

# (chip, headdim_v, kernel): block_m rows by block_n columns at a time.
CONFIGS = {
    ("default", 64, "merge"): Config(32, 64, 4, 1),
    ("default", 128, "merge"): Config(16, 128, 4, 1),
    ("default", LARGE, "merge"): Config(8, 256, 4, 1),
    ("interpreter", 128, "merge"): Config(256, 128, 4, 1),
    ("interpreter", LARGE, "merge"): Config(64, 1024, 4, 1),
}


def unsupported(call: MergeCall) -> list[str]:
    return launch.refusals(call.device, call.dtype, call.features, FEATURES)


class _Constants(NamedTuple):
    """What a kernel is compiled for, beside dtypes and whether there is dlse."""

    BLOCK_M: int  # rows
    BLOCK_N: int  # columns
    MULTIPLE: int  # divides headdim and the strides of what has out's layout


@triton.jit
def _place(nheads, seqlen, C: tl.constexpr):
    """What a program owns: batch, head, queries, and which of these there are. The heads of a query follow
    each other, as in memory."""
    pid = tl.program_id(0)
    blocks = tl.cdiv(seqlen, C.BLOCK_M)
    query = pid // nheads % blocks * C.BLOCK_M + tl.arange(0, C.BLOCK_M)
    batch = (pid // nheads // blocks).to(tl.int64)
    return batch, (pid % nheads).to(tl.int64), query.to(tl.int64), query < seqlen


@triton.jit
def _rows(base, batch, query, head, stride_b, stride_s, stride_h, C: tl.constexpr):
    """(BLOCK_M, 1): the rows of a tensor in out's layout."""
    base += batch * multiple(stride_b, C.MULTIPLE) + head * multiple(stride_h, C.MULTIPLE)
    return base + (query * multiple(stride_s, C.MULTIPLE))[:, None]


@triton.jit
def _result_rows(base, batch, query, head, seqlen, nheads, headdim, C: tl.constexpr):
    """The same of a contiguous one."""
    row = (batch * seqlen + query) * nheads + head
    return base + (row * multiple(headdim, C.MULTIPLE))[:, None]


@triton.jit
def _load_lse(base, batch, query, head, stride_b, stride_h, stride_s, inside):
    """−inf where not inside: a state of weight 0."""
    return tl.load(base + batch * stride_b + head * stride_h + query * stride_s, mask=inside, other=-INF)


@triton.jit
def _weights(lse_a, lse_b):
    """w_a, w_b and lse, by the difference of lse_a and lse_b: exact where they are close."""
    neither = (lse_a == -INF) & (lse_b == -INF)
    difference = tl.where(neither, 0.0, lse_a - lse_b)
    ratio = tl.exp(-tl.abs(difference))
    high = tl.where(neither, 0.0, 1 / (1 + ratio))
    low = ratio * high
    lse = tl.maximum(lse_a, lse_b) + tl.log(1 + ratio)
    return tl.where(difference > 0, high, low), tl.where(difference > 0, low, high), lse


@triton.jit
def _load(pointers, weight, has_column):
    """A state's elements in fp32, 0 where its weight is 0."""
    return tl.load(pointers, mask=has_column & (weight != 0)[:, None], other=0.0).to(tl.float32)


@triton.jit
def _store(pointers, value, mask):
    tl.store(pointers, cast(value, pointers.dtype.element_ty), mask=mask)


@triton.jit
def _weighted(x, weight):
    """weight · x, 0 where the weight is 0, whatever x."""
    return tl.where(weight == 0, 0.0, weight * x)


_SIZES = ["nheads", "seqlen", "headdim"]


def _strides(names: str) -> list[str]:
    return [f"stride_{name}{axis}" for name in names.split() for axis in "bsh"]


@triton.jit(do_not_specialize=_SIZES + _strides("oa ob la lb"))
def merge_forward(
    OutA,
    LseA,
    OutB,
    LseB,
    Out,
    Lse,
    stride_oab,
    stride_oas,
    stride_oah,
    stride_obb,
    stride_obs,
    stride_obh,
    stride_lab,
    stride_lah,
    stride_las,
    stride_lbb,
    stride_lbh,
    stride_lbs,
    nheads,
    seqlen,
    headdim,
    C: tl.constexpr,
):
    """out and lse of BLOCK_M rows."""
    batch, head, query, inside = _place(nheads, seqlen, C)
    lse_a = _load_lse(LseA, batch, query, head, stride_lab, stride_lah, stride_las, inside)
    lse_b = _load_lse(LseB, batch, query, head, stride_lbb, stride_lbh, stride_lbs, inside)
    w_a, w_b, lse = _weights(lse_a, lse_b)
    tl.store(Lse + (batch * nheads + head) * seqlen + query, lse, mask=inside)
    OutA = _rows(OutA, batch, query, head, stride_oab, stride_oas, stride_oah, C)
    OutB = _rows(OutB, batch, query, head, stride_obb, stride_obs, stride_obh, C)
    Out = _result_rows(Out, batch, query, head, seqlen, nheads, headdim, C)
    for first in tl.range(0, headdim, C.BLOCK_N):
        column = (first + tl.arange(0, C.BLOCK_N))[None, :]
        has_column = column < multiple(headdim, C.MULTIPLE)
        a = _load(OutA + column, w_a, has_column) * w_a[:, None]
        b = _load(OutB + column, w_b, has_column) * w_b[:, None]
        _store(Out + column, a + b, inside[:, None] & has_column)


@triton.jit(do_not_specialize=_SIZES + _strides("oa ob la lb d ld"))
def merge_backward(
    OutA,
    LseA,
    OutB,
    LseB,
    DOut,
    DLse,
    DOutA,
    DLseA,
    DOutB,
    DLseB,
    stride_oab,
    stride_oas,
    stride_oah,
    stride_obb,
    stride_obs,
    stride_obh,
    stride_db,
    stride_ds,
    stride_dh,
    stride_lab,
    stride_lah,
    stride_las,
    stride_lbb,
    stride_lbh,
    stride_lbs,
    stride_ldb,
    stride_ldh,
    stride_lds,
    nheads,
    seqlen,
    headdim,
    C: tl.constexpr,
):
    """The gradients of out_a, lse_a, out_b and lse_b of BLOCK_M rows. Of merge_forward's out and lse, with
    d w_a / d lse_a = w_a · w_b = −d w_b / d lse_a and d lse / d lse_a = w_a:

        dout_a = w_a · dout,  dlse_a = w_a · (dlse + w_b · s),  s = Σ dout · (out_a − out_b) over the row
        dout_b = w_b · dout,  dlse_b = w_b · (dlse − w_a · s)
    """
    batch, head, query, inside = _place(nheads, seqlen, C)
    lse_a = _load_lse(LseA, batch, query, head, stride_lab, stride_lah, stride_las, inside)
    lse_b = _load_lse(LseB, batch, query, head, stride_lbb, stride_lbh, stride_lbs, inside)
    w_a, w_b, _ = _weights(lse_a, lse_b)
    OutA = _rows(OutA, batch, query, head, stride_oab, stride_oas, stride_oah, C)
    OutB = _rows(OutB, batch, query, head, stride_obb, stride_obs, stride_obh, C)
    DOut = _rows(DOut, batch, query, head, stride_db, stride_ds, stride_dh, C)
    DOutA = _result_rows(DOutA, batch, query, head, seqlen, nheads, headdim, C)
    DOutB = _result_rows(DOutB, batch, query, head, seqlen, nheads, headdim, C)
    shift = tl.full((C.BLOCK_M,), 0.0, tl.float32)
    for first in tl.range(0, headdim, C.BLOCK_N):
        column = (first + tl.arange(0, C.BLOCK_N))[None, :]
        has_column = column < multiple(headdim, C.MULTIPLE)
        mask = inside[:, None] & has_column
        dout = _load(DOut + column, w_a + w_b, has_column)
        apart = _load(OutA + column, w_a, has_column) - _load(OutB + column, w_b, has_column)
        shift += tl.sum(dout * apart, 1)
        _store(DOutA + column, _weighted(dout, w_a[:, None]), mask)
        _store(DOutB + column, _weighted(dout, w_b[:, None]), mask)
    dlse = 0.0
    if DLse is not None:
        dlse = _load_lse(DLse, batch, query, head, stride_ldb, stride_ldh, stride_lds, inside)
    at = (batch * nheads + head) * seqlen + query
    tl.store(DLseA + at, _weighted(dlse + w_b * shift, w_a), mask=inside)
    tl.store(DLseB + at, _weighted(dlse - w_a * shift, w_b), mask=inside)


def _of_lse(*lses: Tensor) -> list[int]:
    """Strides by batch (0 if packed), head and sequence."""
    return [stride for t in lses for stride in ((0,) * (3 - t.dim()) + t.stride())]


def _launch(kernel: Any, tensors: list[Tensor | None], strides: list[int], outs: list[Tensor]) -> None:
    """``outs``: all that have the dtype and layout of out."""
    *_, seqlen, nheads, headdim = outs[0].shape
    config = launch.choose(CONFIGS, headdim, "merge", launch.chip(outs[0].device).architecture)
    block_n = min(config.block_n, launch.block_dim(headdim))
    batch = outs[0].numel() // max(1, seqlen * nheads * headdim)
    launch.launch(
        kernel,
        batch * nheads * triton.cdiv(seqlen, config.block_m),
        config,
        outs[0].device,
        *tensors,
        *strides,
        *(nheads, seqlen, headdim),
        launch.constants(_Constants, config.block_m, block_n, launch.vector_multiple(*outs)),
    )


@launch.tuned
def forward(out_a: Tensor, lse_a: Tensor, out_b: Tensor, lse_b: Tensor) -> tuple[Tensor, Tensor]:
    out, lse = out_a.new_empty(out_a.shape), lse_a.new_empty(lse_a.shape)
    strides = launch.strides(out_a, out_b) + _of_lse(lse_a, lse_b)
    _launch(merge_forward, [out_a, lse_a, out_b, lse_b, out, lse], strides, [out_a, out_b, out])
    return out, lse


@launch.tuned
def backward(
    dout: Tensor, dlse: Tensor | None, out_a: Tensor, lse_a: Tensor, out_b: Tensor, lse_b: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    dout_a, dout_b = (out_a.new_empty(out_a.shape) for _ in range(2))
    dlse_a, dlse_b = (lse_a.new_empty(lse_a.shape) for _ in range(2))
    strides = launch.strides(out_a, out_b, dout) + _of_lse(lse_a, lse_b, lse_a if dlse is None else dlse)
    inputs = [out_a, lse_a, out_b, lse_b, dout, dlse]
    grads = dout_a, dlse_a, dout_b, dlse_b
    _launch(merge_backward, [*inputs, *grads], strides, [out_a, out_b, dout, dout_a])
    return grads
