"""Norms on the CUDA kernels: ``csrc/cuda/norm.cu``.

Storage fp32, bf16 or fp16, arithmetic fp32.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastgpt.ops import cuda
from fastgpt.ops.native import as_rows
from fastgpt.ops.norm.spec import NormCall, NormSpec

FEATURES = ("rms", "weight", "bias", "mixed_weight", "residual", "dropout", "backward")
_cuda = cuda.load()


def unsupported(call: NormCall) -> list[str]:
    return cuda.refusals(call.device, call.dtype, call.features, FEATURES)


def forward(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    rng_state: Tensor | None,
    store: bool,
    spec: NormSpec,
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor]:
    hidden = x.shape[-1]
    rows = x.numel() // hidden
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    residual_out = torch.empty_like(out) if store else None
    rstd = x.new_empty(rows, dtype=torch.float32)
    mean = None if spec.rms else torch.empty_like(rstd)
    x, x_stride = as_rows(x)
    residual, residual_stride = (None, 0) if residual is None else as_rows(residual)
    _cuda.norm_forward(
        cuda.queue(x),
        rows,
        hidden,
        x,
        x_stride,
        residual,
        residual_stride,
        weight,
        bias,
        out,
        residual_out,
        mean,
        rstd,
        cuda.pass_dropout(spec.dropout_p, rng_state),
        spec.eps,
    )
    return out, residual_out, mean, rstd


def _partial_rows(multiprocessors: int, rows: int, hidden: int) -> int:
    """Rows of partial sums of dweight and dbias, of which each block has one: up to two blocks for each
    multiprocessor, and fewer of long rows, which several blocks share."""
    most = 2 * multiprocessors if hidden <= 8192 else max(1, 1024 * multiprocessors // hidden)
    return min(most, rows)


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
    dx = torch.empty_like(z, memory_format=torch.contiguous_format)
    dresidual = torch.empty_like(dx) if rng_state is not None and residual_gradient else None
    dweight = None if weight is None else torch.empty_like(weight)
    dbias = None if bias is None else torch.empty_like(bias)
    hidden, rows = z.shape[-1], rstd.numel()
    multiprocessors = cuda.multiprocessors(z.device)
    partial_rows = _partial_rows(multiprocessors, rows, hidden)
    parameters = weight is not None or bias is not None
    partial = z.new_empty((2, partial_rows, hidden), dtype=torch.float32) if parameters else None
    z, z_stride = as_rows(z)
    dout, dout_stride = as_rows(dout)
    dresidual_out, dresidual_stride = (None, 0) if dresidual_out is None else as_rows(dresidual_out)
    _cuda.norm_backward(
        cuda.queue(z),
        multiprocessors,
        rows,
        hidden,
        dout,
        dout_stride,
        dresidual_out,
        dresidual_stride,
        z,
        z_stride,
        weight,
        mean,
        rstd,
        dx,
        dresidual,
        dweight,
        dbias,
        partial,
        partial_rows,
        cuda.pass_dropout(spec.dropout_p, rng_state),
    )
    return dx, dresidual, dweight, dbias
