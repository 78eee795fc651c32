"""Layer norm and RMS norm as they are defined, in eager PyTorch: the oracle of every other backend.

Computes in fp64 for fp64 tensors and in fp32 otherwise; ``mean`` and ``rstd`` are of that dtype.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fastgpt.ops import philox
from fastgpt.ops.norm.spec import NormCall, NormSpec


def unsupported(call: NormCall) -> list[str]:
    return []


def accumulator(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def philox_keep(rng_state: Tensor, dropout_p: float, shape: tuple[int, ...]) -> Tensor:
    """Of ``shape`` (..., hidden), bool: which elements dropout keeps; the counters are in ``spec.py``."""
    *lead, hidden = shape
    rows = torch.arange(math.prod(lead), device=rng_state.device)[:, None]
    blocks = torch.arange((hidden + 3) // 4, device=rng_state.device)
    kept = philox.keep(rng_state, dropout_p, blocks, rows & philox.LOW, rows >> 32)
    return kept.flatten(1)[:, :hidden].reshape(shape)


def _dropped(x: Tensor, rng_state: Tensor | None, spec: NormSpec) -> Tensor:
    """x · keep / (1 − dropout_p)."""
    if rng_state is None:
        return x
    return x * (philox_keep(rng_state, spec.dropout_p, x.shape).to(x.dtype) / (1 - spec.dropout_p))


def forward(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    rng_state: Tensor | None,
    store: bool,
    spec: NormSpec,
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor]:
    """out and the sum dropout(x) + residual (None unless ``store``), in x's dtype; mean (None for RMS norm)
    and rstd, (rows): x's leading axes as one."""
    acc = accumulator(x.dtype)
    total = _dropped(x.to(acc), rng_state, spec)
    total = (total if residual is None else total + residual.to(acc)).to(x.dtype)
    z = total.to(acc)
    mean = None if spec.rms else z.mean(-1, keepdim=True)
    centred = z if mean is None else z - mean
    rstd = torch.rsqrt((centred * centred).mean(-1, keepdim=True) + spec.eps)
    out = centred * rstd
    if weight is not None:
        out = out * weight.to(acc)
    if bias is not None:
        out = out + bias.to(acc)
    stats = None if mean is None else mean.flatten(), rstd.flatten()
    return out.to(x.dtype), total if store else None, *stats


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
    """Gradients of x, residual (with dropout and if asked for: without, it is x's), weight and bias (None
    where there is none)."""
    acc = accumulator(z.dtype)
    dout, rstd = dout.to(acc), rstd.view(*z.shape[:-1], 1)
    centred = z.to(acc) if mean is None else z.to(acc) - mean.view(*z.shape[:-1], 1)
    xhat = centred * rstd
    # out = xhat · weight + bias.
    g = dout if weight is None else dout * weight.to(acc)
    dweight = None if weight is None else (dout * xhat).sum_to_size(weight.shape).to(weight.dtype)
    dbias = None if bias is None else dout.sum_to_size(bias.shape).to(bias.dtype)
    # xhat = centred · rstd with d rstd / d centred = −rstd² · xhat / hidden.
    dz = g - xhat * (g * xhat).mean(-1, keepdim=True)
    # centred = z − mean, and xhat adds up to 0 over a row: the share of mean is that of g alone.
    if mean is not None:
        dz = dz - g.mean(-1, keepdim=True)
    dz = dz * rstd
    if dresidual_out is not None:
        dz = dz + dresidual_out.to(acc)
    # z = dropout(x) + residual.
    dx = _dropped(dz, rng_state, spec)
    dresidual = dz.to(z.dtype) if rng_state is not None and residual_gradient else None
    return dx.to(z.dtype), dresidual, dweight, dbias
