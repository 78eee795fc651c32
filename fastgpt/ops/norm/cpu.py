"""Norms on the native CPU kernels: ``csrc/cpu/norm.h``.

Passes pointers, sizes and row strides; storage fp32, bf16 or fp16, arithmetic fp32.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastgpt.ops.native import DTYPES, pass_dropout, pointer, refusals
from fastgpt.ops.norm.spec import NormCall, NormSpec

FEATURES = ("rms", "weight", "bias", "mixed_weight", "residual", "dropout", "backward")


def unsupported(call: NormCall) -> list[str]:
    return refusals(call.device, call.dtype, call.features, FEATURES)


def _rows(t: Tensor) -> tuple[Tensor, int]:
    """The tensor and its row stride; a copy of it where the leading axes have no common stride."""
    hidden = t.shape[-1]
    if t.is_contiguous():
        return t, hidden
    t = t.reshape(-1, hidden)
    return t, t.stride(0)


def _dropout(rng_state: Tensor | None, spec: NormSpec) -> tuple[int, int, int, float] | None:
    return None if rng_state is None else pass_dropout(spec.dropout_p, rng_state)


def forward(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    rng_state: Tensor | None,
    store: bool,
    spec: NormSpec,
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor]:
    from fastgpt import _cpu

    hidden = x.shape[-1]
    rows = x.numel() // hidden
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    residual_out = torch.empty_like(out) if store else None
    rstd = torch.empty(rows, dtype=torch.float32)
    mean = None if spec.rms else torch.empty(rows, dtype=torch.float32)
    parameter = weight if weight is not None else bias
    x, x_stride = _rows(x)
    residual, residual_stride = (None, 0) if residual is None else _rows(residual)
    _cpu.norm_forward(
        DTYPES[x.dtype],
        DTYPES[x.dtype if parameter is None else parameter.dtype],
        rows,
        hidden,
        x.data_ptr(),
        x_stride,
        pointer(residual),
        residual_stride,
        pointer(weight),
        pointer(bias),
        spec.eps,
        out.data_ptr(),
        pointer(residual_out),
        pointer(mean),
        rstd.data_ptr(),
        torch.get_num_threads(),
        _dropout(rng_state, spec),
    )
    return out, residual_out, mean, rstd


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
    from fastgpt import _cpu

    dx = torch.empty_like(z, memory_format=torch.contiguous_format)
    dresidual = torch.empty_like(dx) if rng_state is not None and residual_gradient else None
    dweight = None if weight is None else torch.empty_like(weight)
    dbias = None if bias is None else torch.empty_like(bias)
    parameter = weight if weight is not None else bias
    z, z_stride = _rows(z)
    dout, dout_stride = _rows(dout)
    dresidual_out, dresidual_stride = (None, 0) if dresidual_out is None else _rows(dresidual_out)
    _cpu.norm_backward(
        DTYPES[z.dtype],
        DTYPES[z.dtype if parameter is None else parameter.dtype],
        rstd.numel(),
        z.shape[-1],
        dout.data_ptr(),
        dout_stride,
        z.data_ptr(),
        z_stride,
        pointer(weight),
        pointer(dresidual_out),
        dresidual_stride,
        pointer(mean),
        rstd.data_ptr(),
        dx.data_ptr(),
        pointer(dresidual),
        pointer(dweight),
        pointer(dbias),
        torch.get_num_threads(),
        _dropout(rng_state, spec),
    )
    return dx, dresidual, dweight, dbias
