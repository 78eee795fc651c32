"""The merge of attention states on the native CPU kernels: ``csrc/cpu/merge.h``.

Passes pointers, sizes and strides; storage fp32, bf16 or fp16, arithmetic fp32.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastgpt.ops.merge.spec import MergeCall
from fastgpt.ops.native import DTYPES, NO_TENSOR, pass_tensor, refusals

FEATURES = ("backward",)


def unsupported(call: MergeCall) -> list[str]:
    return refusals(call.device, call.dtype, call.features, FEATURES)


def _sizes(out: Tensor) -> tuple[int, ...]:
    """batch, seqlen, nheads, headdim_v; a packed tensor is a batch of one."""
    return tuple(out.shape) if out.dim() == 4 else (1, *out.shape)


def _pass_lse(lse: Tensor | None) -> tuple[int, ...]:
    """Pointer; batch, seq and head stride of a (batch, nheads, seqlen) or (nheads, total) tensor."""
    if lse is None:
        return NO_TENSOR
    of_batch = lse.stride(0) if lse.dim() == 3 else 0
    return lse.data_ptr(), of_batch, lse.stride(-1), lse.stride(-2)


def forward(out_a: Tensor, lse_a: Tensor, out_b: Tensor, lse_b: Tensor) -> tuple[Tensor, Tensor]:
    from fastgpt import _cpu

    out, lse = out_a.new_empty(out_a.shape), lse_a.new_empty(lse_a.shape)
    _cpu.merge_forward(
        DTYPES[out_a.dtype],
        _sizes(out_a),
        pass_tensor(out_a),
        _pass_lse(lse_a),
        pass_tensor(out_b),
        _pass_lse(lse_b),
        pass_tensor(out),
        _pass_lse(lse),
        torch.get_num_threads(),
    )
    return out, lse


def backward(
    dout: Tensor, dlse: Tensor | None, out_a: Tensor, lse_a: Tensor, out_b: Tensor, lse_b: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    from fastgpt import _cpu

    dout_a, dout_b = (out_a.new_empty(out_a.shape) for _ in range(2))
    dlse_a, dlse_b = (lse_a.new_empty(lse_a.shape) for _ in range(2))
    _cpu.merge_backward(
        DTYPES[out_a.dtype],
        _sizes(out_a),
        pass_tensor(out_a),
        _pass_lse(lse_a),
        pass_tensor(out_b),
        _pass_lse(lse_b),
        pass_tensor(dout),
        _pass_lse(dlse),
        pass_tensor(dout_a),
        _pass_lse(dlse_a),
        pass_tensor(dout_b),
        _pass_lse(dlse_b),
        torch.get_num_threads(),
    )
    return dout_a, dlse_a, dout_b, dlse_b
