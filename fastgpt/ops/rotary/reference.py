"""Rotary embedding as it is defined, in eager PyTorch: the oracle of every other backend.

Computes in fp64 for fp64 tensors and in fp32 otherwise.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastgpt.ops.rotary.spec import RotaryCall, RotarySpec, RotaryTensors, token_positions


def unsupported(call: RotaryCall) -> list[str]:
    return []


def forward(x: Tensor, spec: RotarySpec, tensors: RotaryTensors) -> Tensor:
    """out, in the layout and dtype of x."""
    acc = torch.float64 if x.dtype == torch.float64 else torch.float32
    positions = token_positions(x, spec, tensors)
    cos, sin = (t[positions].to(acc).unsqueeze(-2) for t in (tensors.cos, tensors.sin))  # (..., 1, pairs)
    if spec.conjugate:
        sin = -sin
    rotary_dim = 2 * cos.shape[-1]
    out = x.clone()
    turned = out[..., :rotary_dim]
    pairs = (turned[..., ::2], turned[..., 1::2]) if spec.interleaved else turned.chunk(2, -1)
    x1, x2 = (t.to(acc, copy=True) for t in pairs)
    pairs[0].copy_(x1 * cos - x2 * sin)
    pairs[1].copy_(x2 * cos + x1 * sin)
    return out
