"""Attention on the native CPU kernels: ``csrc/cpu/attention_{forward,backward}.h``.

Passes pointers, sizes and strides; storage fp32, bf16 or fp16, arithmetic fp32.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastgpt.ops.attention.spec import AttentionCall, AttentionSpec, AttentionTensors
from fastgpt.ops.native import DTYPES, pass_dropout, pass_tensor, pointer, refusals

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
NO_STRIDES: tuple[int, ...] = (0, 0, 0, 0)
BIAS_TYPES = {**DTYPES, torch.bool: 3}  # BiasType in csrc/include/fastgpt/params.h


def unsupported(call: AttentionCall) -> list[str]:
    headdim = max(call.headdim, call.headdim_v)
    return refusals(call.device, call.dtype, call.features, FEATURES, headdim)


def _sizes(q: Tensor, k: Tensor, v: Tensor, tensors: AttentionTensors) -> tuple[int, ...]:
    edges = tensors.cu_seqlens_q
    batch = q.shape[0] if edges is None else edges.shape[0] - 1
    return batch, q.shape[-3], k.shape[-3], q.shape[-2], k.shape[-2], q.shape[-1], v.shape[-1]


def _bias_strides(bias: Tensor, q: Tensor, k: Tensor) -> tuple[int, ...]:
    """batch, head, query and key stride of a bias or its gradient, 0 where it is broadcast."""
    *strides, of_key = bias.expand(q.shape[0], q.shape[2], q.shape[1], k.shape[1]).stride()
    return (*strides, of_key if bias.shape[3] > 1 else 0)


class _Options:
    """What varies a call beyond plain attention, as ``_cpu`` takes it: PyOptions in csrc/cpu/module.cpp.

    ``packed`` is None for a plain call. Its pointers are into tensors that the object keeps alive.
    """

    def __init__(self, q: Tensor, k: Tensor, spec: AttentionSpec, tensors: AttentionTensors) -> None:
        self.packed: tuple[Any, ...] | None = None
        if not spec.softcap and all(t is None for t in tensors):
            return
        lengths = [
            None if t is None else t.contiguous()
            for t in (tensors.cu_seqlens_q, tensors.cu_seqlens_k, tensors.seqused_k, tensors.leftpad_k)
        ]
        slopes, sink = (
            None if t is None else t.float().contiguous() for t in (tensors.alibi_slopes, tensors.sink)
        )
        bias, strides = tensors.attn_bias, NO_STRIDES
        if bias is not None:
            if bias.dtype not in BIAS_TYPES:
                bias = bias.float()
            if bias.shape[3] > 1 and bias.stride(3) not in (0, 1):
                bias = bias.contiguous()
            strides = _bias_strides(bias, q, k)
        self.alive = (*lengths, slopes, sink, bias)
        self.packed = (
            *map(pointer, lengths),
            spec.softcap,
            pointer(slopes),
            0 if slopes is None or slopes.dim() == 1 else slopes.shape[1],
            pointer(sink),
            pointer(bias),
            0 if bias is None else BIAS_TYPES[bias.dtype],
            strides,
            *pass_dropout(spec.dropout_p, tensors.rng_state),
        )


def forward(
    q: Tensor, k: Tensor, v: Tensor, spec: AttentionSpec, tensors: AttentionTensors
) -> tuple[Tensor, Tensor]:
    from fastgpt import _cpu

    out = q.new_empty(*q.shape[:-1], v.shape[-1])
    lse_shape = (q.shape[1], q.shape[0]) if spec.varlen else (q.shape[0], q.shape[2], q.shape[1])
    lse = q.new_empty(lse_shape, dtype=torch.float32)
    options = _Options(q, k, spec, tensors)
    _cpu.attention_forward(
        DTYPES[q.dtype],
        _sizes(q, k, v, tensors),
        pass_tensor(q),
        pass_tensor(k),
        pass_tensor(v),
        pass_tensor(out),
        lse.data_ptr(),
        spec.softmax_scale,
        spec.window_left,
        spec.window_right,
        torch.get_num_threads(),
        options.packed,
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
    bias_gradient: bool,
    spec: AttentionSpec,
    tensors: AttentionTensors,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None]:
    from fastgpt import _cpu

    dq, dk, dv = (torch.empty(t.shape, dtype=t.dtype) for t in (q, k, v))
    sizes, options = _sizes(q, k, v, tensors), _Options(q, k, spec, tensors)
    sink, bias = tensors.sink, tensors.attn_bias
    dsink = None if sink is None else torch.empty(sizes[0], sink.shape[0], dtype=torch.float32)
    dbias = torch.zeros(bias.shape, dtype=torch.float32) if bias is not None and bias_gradient else None
    _cpu.attention_backward(
        DTYPES[q.dtype],
        sizes,
        pass_tensor(q),
        pass_tensor(k),
        pass_tensor(v),
        pass_tensor(out),
        lse.data_ptr(),
        pass_tensor(dout),
        pointer(dlse),
        pass_tensor(dq),
        pass_tensor(dk),
        pass_tensor(dv),
        pointer(dsink),
        pointer(dbias),
        NO_STRIDES if dbias is None else _bias_strides(dbias, q, k),
        spec.softmax_scale,
        spec.window_left,
        spec.window_right,
        torch.get_num_threads(),
        options.packed,
    )
    if sink is not None and dsink is not None:
        dsink = dsink.sum(0).to(sink.dtype)
    if bias is not None and dbias is not None:
        dbias = dbias.to(bias.dtype)
    return dq, dk, dv, dsink, dbias
