"""Attention on the native CPU kernels: ``csrc/cpu/attention_{forward,backward}.h``.

Passes pointers, sizes and strides; storage fp32, bf16 or fp16, arithmetic fp32.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastgpt.ops.attention.spec import AttentionCall, AttentionSpec, AttentionTensors
from fastgpt.ops.native import DTYPES, pass_tensor, refusals

FEATURES = ("window", "lse", "backward")


def unsupported(call: AttentionCall) -> list[str]:
    headdim = max(call.headdim, call.headdim_v)
    return refusals(call.device, call.dtype, call.features, FEATURES, headdim)


def _sizes(q: Tensor, k: Tensor, v: Tensor) -> tuple[int, ...]:
    batch, seqlen_q, nheads, headdim = q.shape
    return batch, seqlen_q, k.shape[1], nheads, k.shape[2], headdim, v.shape[3]


def forward(
    q: Tensor, k: Tensor, v: Tensor, spec: AttentionSpec, tensors: AttentionTensors
) -> tuple[Tensor, Tensor]:
    from fastgpt import _cpu

    batch, seqlen_q, nheads, _ = q.shape
    out = q.new_empty(batch, seqlen_q, nheads, v.shape[3])
    lse = q.new_empty(batch, nheads, seqlen_q, dtype=torch.float32)
    _cpu.attention_forward(
        DTYPES[q.dtype],
        _sizes(q, k, v),
        pass_tensor(q),
        pass_tensor(k),
        pass_tensor(v),
        pass_tensor(out),
        lse.data_ptr(),
        spec.softmax_scale,
        spec.window_left,
        spec.window_right,
        torch.get_num_threads(),
    )
    return out, lse


def backward(
    dout: Tensor,
    dlse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    spec: AttentionSpec,
    tensors: AttentionTensors,
) -> tuple[Tensor, Tensor, Tensor, None, None]:
    from fastgpt import _cpu

    dq, dk, dv = (torch.empty(t.shape, dtype=t.dtype) for t in (q, k, v))
    _cpu.attention_backward(
        DTYPES[q.dtype],
        _sizes(q, k, v),
        pass_tensor(q),
        pass_tensor(k),
        pass_tensor(v),
        pass_tensor(out),
        lse.data_ptr(),
        pass_tensor(dout),
        0 if dlse is None else dlse.data_ptr(),
        pass_tensor(dq),
        pass_tensor(dk),
        pass_tensor(dv),
        spec.softmax_scale,
        spec.window_left,
        spec.window_right,
        torch.get_num_threads(),
    )
    return dq, dk, dv, None, None
