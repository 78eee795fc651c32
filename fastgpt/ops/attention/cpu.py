"""Attention on the native CPU kernels: ``csrc/cpu/attention_{forward,backward}.h``.

Storage fp32, bf16 or fp16, arithmetic fp32.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastgpt import _cpu
from fastgpt.ops.attention.spec import AttentionCall, AttentionSpec, AttentionTensors
from fastgpt.ops.native import DTYPES, contiguous, contiguous_fp32, pass_dropout, refusals

# All that a call may ask for today; a new feature is unsupported until it is written here.
FEATURES = (
    "window",
    "softcap",
    "dropout",
    "alibi",
    "sink",
    "bias",
    "varlen",
    "key_ranges",
    "lse",
    "backward",
)
BIAS_DTYPES = (*DTYPES, torch.bool)


def unsupported(call: AttentionCall) -> list[str]:
    headdim = max(call.headdim, call.headdim_v)
    return refusals(call.device, call.dtype, call.features, FEATURES, headdim)


def _bias(bias: Tensor | None) -> Tensor | None:
    """As the kernels read it: the last stride 0 or 1."""
    if bias is None:
        return None
    if bias.dtype not in BIAS_DTYPES:
        bias = bias.float()
    return bias if bias.stride(3) in (0, 1) or bias.shape[3] == 1 else bias.contiguous()


def _options(spec: AttentionSpec, tensors: AttentionTensors) -> tuple[Any, ...]:
    """The arguments of both kernels that follow their tensors."""
    return (
        contiguous(tensors.cu_seqlens_q),
        contiguous(tensors.cu_seqlens_k),
        contiguous(tensors.seqused_k),
        contiguous(tensors.leftpad_k),
        contiguous_fp32(tensors.alibi_slopes),
        contiguous_fp32(tensors.sink),
        _bias(tensors.attn_bias),
        pass_dropout(spec.dropout_p, tensors.rng_state),
        spec.softmax_scale,
        spec.window_left,
        spec.window_right,
        spec.softcap,
        torch.get_num_threads(),
    )


def forward(
    q: Tensor, k: Tensor, v: Tensor, spec: AttentionSpec, tensors: AttentionTensors
) -> tuple[Tensor, Tensor]:
    *batch, seqlen, nheads, _ = q.shape
    out = q.new_empty(*batch, seqlen, nheads, v.shape[-1])
    lse = q.new_empty(*batch, nheads, seqlen, dtype=torch.float32)
    _cpu.attention_forward(q, k, v, out, lse, *_options(spec, tensors))
    return out, lse


def backward(
    dout: Tensor,
    dlse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    bias_gradient: bool,
    spec: AttentionSpec,
    tensors: AttentionTensors,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None]:
    dq, dk, dv = (torch.empty(t.shape, dtype=t.dtype) for t in (q, k, v))
    edges, sink, bias = tensors.cu_seqlens_q, tensors.sink, tensors.attn_bias
    batch = q.shape[0] if edges is None else edges.shape[0] - 1
    dsink = None if sink is None else torch.empty(batch, sink.shape[0], dtype=torch.float32)
    dbias = torch.zeros(bias.shape, dtype=torch.float32) if bias is not None and bias_gradient else None
    grads = (dout, dlse, dq, dk, dv, dsink, dbias)
    _cpu.attention_backward(q, k, v, out, lse, *grads, *_options(spec, tensors))
    if sink is not None and dsink is not None:
        dsink = dsink.sum(0).to(sink.dtype)
    if bias is not None and dbias is not None:
        dbias = dbias.to(bias.dtype)
    return dq, dk, dv, dsink, dbias
