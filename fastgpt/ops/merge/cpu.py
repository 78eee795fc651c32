"""The merge of attention states on the native CPU kernels: ``csrc/cpu/merge.h``.

Storage fp32, bf16 or fp16, arithmetic fp32.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastgpt import _cpu
from fastgpt.ops.merge.spec import MergeCall
from fastgpt.ops.native import refusals

FEATURES = ("backward",)


def unsupported(call: MergeCall) -> list[str]:
    return refusals(call.device, call.dtype, call.features, FEATURES)


def forward(out_a: Tensor, lse_a: Tensor, out_b: Tensor, lse_b: Tensor) -> tuple[Tensor, Tensor]:
    out, lse = out_a.new_empty(out_a.shape), lse_a.new_empty(lse_a.shape)
    _cpu.merge_forward(out_a, lse_a, out_b, lse_b, out, lse, torch.get_num_threads())
    return out, lse


def backward(
    dout: Tensor, dlse: Tensor | None, out_a: Tensor, lse_a: Tensor, out_b: Tensor, lse_b: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    dout_a, dout_b = (out_a.new_empty(out_a.shape) for _ in range(2))
    dlse_a, dlse_b = (lse_a.new_empty(lse_a.shape) for _ in range(2))
    grads = (dout, dlse, dout_a, dlse_a, dout_b, dlse_b)
    _cpu.merge_backward(out_a, lse_a, out_b, lse_b, *grads, torch.get_num_threads())
    return dout_a, dlse_a, dout_b, dlse_b
