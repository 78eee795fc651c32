"""Attention on the native CPU kernels: ``csrc/cpu/attention_{forward,backward}.h``.

Passes pointers, sizes and strides; storage fp32, bf16 or fp16, arithmetic fp32.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastgpt.dispatch import native_dtype
from fastgpt.ops.attention.spec import AttentionCall, AttentionSpec, AttentionTensors

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
MAX_HEADDIM = 256
FEATURES = ("window", "lse", "backward")


def unsupported(call: AttentionCall) -> list[str]:
    reasons = []
    if call.device != "cpu":
        reasons.append(f"the tensors are on {call.device}, not on the CPU")
    if call.dtype not in DTYPES:
        reasons.append(f"dtype {call.dtype} is not float32, bfloat16 or float16")
    if max(call.headdim, call.headdim_v) > MAX_HEADDIM:
        reasons.append(f"headdim {max(call.headdim, call.headdim_v)} is above {MAX_HEADDIM}")
    reasons += [
        f"{name} is not written for the CPU kernels yet" for name in call.features if name not in FEATURES
    ]
    return reasons


def _tensor(t: Tensor) -> tuple[int, ...]:
    return (t.data_ptr(), *t.stride()[:3])


def _sizes(q: Tensor, k: Tensor, v: Tensor) -> tuple[int, ...]:
    batch, seqlen_q, nheads, headdim = q.shape
    return batch, seqlen_q, k.shape[1], nheads, k.shape[2], headdim, v.shape[3]


def forward(
    q: Tensor, k: Tensor, v: Tensor, spec: AttentionSpec, tensors: AttentionTensors
) -> tuple[Tensor, Tensor]:
    from fastgpt import _cpu

    batch, seqlen_q, nheads, _ = q.shape
    out = q.new_empty(batch, seqlen_q, nheads, v.shape[3])
    lse = torch.empty(batch, nheads, seqlen_q, dtype=torch.float32)
    _cpu.attention_forward(
        native_dtype(q.dtype),
        _sizes(q, k, v),
        _tensor(q),
        _tensor(k),
        _tensor(v),
        _tensor(out),
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
        native_dtype(q.dtype),
        _sizes(q, k, v),
        _tensor(q),
        _tensor(k),
        _tensor(v),
        _tensor(out),
        lse.data_ptr(),
        _tensor(dout),
        0 if dlse is None else dlse.data_ptr(),
        _tensor(dq),
        _tensor(dk),
        _tensor(dv),
        spec.softmax_scale,
        spec.window_left,
        spec.window_right,
        torch.get_num_threads(),
    )
    return dq, dk, dv, None, None
