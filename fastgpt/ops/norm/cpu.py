"""Norms on the native CPU kernels: ``csrc/cpu/norm.h``.

Storage fp32, bf16 or fp16, arithmetic fp32.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastgpt import _cpu
from fastgpt.ops.native import as_rows, pass_dropout, refusals
from fastgpt.ops.norm.spec import NormCall, NormSpec

FEATURES = ("rms", "weight", "bias", "mixed_weight", "residual", "dropout", "backward")


def unsupported(call: NormCall) -> list[str]:
    return refusals(call.device, call.dtype, call.features, FEATURES)


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
    rstd = torch.empty(rows, dtype=torch.float32)
    mean = None if spec.rms else torch.empty(rows, dtype=torch.float32)
    x, x_stride = as_rows(x)
    residual, residual_stride = (None, 0) if residual is None else as_rows(residual)
    _cpu.norm_forward(
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
        pass_dropout(spec.dropout_p, rng_state),
        spec.eps,
        torch.get_num_threads(),
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
    dx = torch.empty_like(z, memory_format=torch.contiguous_format)
    dresidual = torch.empty_like(dx) if rng_state is not None and residual_gradient else None
    dweight = None if weight is None else torch.empty_like(weight)
    dbias = None if bias is None else torch.empty_like(bias)
    hidden = z.shape[-1]
    z, z_stride = as_rows(z)
    dout, dout_stride = as_rows(dout)
    dresidual_out, dresidual_stride = (None, 0) if dresidual_out is None else as_rows(dresidual_out)
    _cpu.norm_backward(
        rstd.numel(),
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
        pass_dropout(spec.dropout_p, rng_state),
        torch.get_num_threads(),
    )
    return dx, dresidual, dweight, dbias
