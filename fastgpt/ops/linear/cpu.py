"""The products of a few rows on the native CPU kernels: ``csrc/cpu/linear.h``.

Storage fp32, bf16 or fp16, arithmetic fp32.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastgpt import _cpu
from fastgpt.ops.checks import unit_rows
from fastgpt.ops.native import as_rows


def forward(x: Tensor, weight: Tensor, bias: Tensor | None, transposed: bool) -> Tensor:
    *lead, in_features = x.shape
    out_features = weight.shape[transposed]
    out = x.new_empty((*lead, out_features))
    x, stride = as_rows(unit_rows(x))
    _cpu.linear(
        out.numel() // out_features,
        in_features,
        out_features,
        x,
        stride,
        weight,
        transposed,
        bias,
        out,
        torch.get_num_threads(),
    )
    return out
