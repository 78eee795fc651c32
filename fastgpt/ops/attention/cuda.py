"""Attention on the CUDA kernels: ``csrc/cuda/attention_forward.cu`` and ``attention_backward.cu``.

Storage bf16 or fp16, arithmetic fp32.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from fastgpt.ops import cuda
from fastgpt.ops.attention.spec import AttentionCall, AttentionSpec, AttentionTensors
from fastgpt.ops.native import contiguous

FEATURES = ("window", "varlen", "key_ranges", "lse", "backward")
HEADDIMS = (64, 128, 256)
BACKWARD_HEADDIMS = (64, 128)
VECTOR = 8  # elements of 16 bytes, which the copy engine wants strides to be multiples of
_cuda = cuda.load()


@functools.cache
def _other_chips() -> str:
    """The GPUs that are no Hopper."""
    return "" if cuda.EMULATED else cuda.gpus_not(lambda capability: capability == (9, 0))


def unsupported(call: AttentionCall) -> list[str]:
    reasons = cuda.refusals(call.device, call.dtype, call.features, FEATURES)
    if call.dtype == torch.float32:
        reasons.append("dtype torch.float32 is not of 16 bits")
    if call.headdim not in HEADDIMS or call.headdim_v != call.headdim:
        dims = f"{call.headdim}" + (f"/{call.headdim_v}" if call.headdim_v != call.headdim else "")
        reasons.append(f"headdim {dims} is not 64, 128 or 256")
    elif "backward" in call.features and call.headdim not in BACKWARD_HEADDIMS:
        reasons.append(f"headdim {call.headdim} has no backward: 64 and 128 have")
    if chips := _other_chips():
        reasons.append(f"the kernel is for sm_90, and {chips}")
    return reasons


def _aligned(t: Tensor) -> Tensor:
    """The tensor or, where the copy engine cannot read it, a copy."""
    taken = t.data_ptr() % 16 == 0 and all(
        size == 1 or (stride > 0 and stride % VECTOR == 0)
        for size, stride in zip(t.shape[:-1], t.stride()[:-1], strict=True)
    )
    return t if taken else t.clone(memory_format=torch.contiguous_format)


def _options(q: Tensor, spec: AttentionSpec, tensors: AttentionTensors) -> tuple[object, ...]:
    edges = tensors.cu_seqlens_q
    return (
        contiguous(edges),
        contiguous(tensors.cu_seqlens_k),
        contiguous(tensors.seqused_k),
        contiguous(tensors.leftpad_k),
        q.shape[0] if edges is None else edges.shape[0] - 1,
        spec.softmax_scale,
        spec.window_left,
        spec.window_right,
    )


def forward(
    q: Tensor, k: Tensor, v: Tensor, spec: AttentionSpec, tensors: AttentionTensors
) -> tuple[Tensor, Tensor]:
    *lead, seqlen, nheads, _ = q.shape
    out = q.new_empty(q.shape)
    lse = q.new_empty(*lead, nheads, seqlen, dtype=torch.float32)
    given = (_aligned(q), _aligned(k), _aligned(v), out, lse)
    _cuda.attention_forward(cuda.queue(q), cuda.multiprocessors(q.device), *given, _options(q, spec, tensors))
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
) -> tuple[Tensor, Tensor, Tensor, None, None]:
    # Rows that are no sequence's key are not written.
    make = torch.zeros if spec.key_ranges or q.numel() == 0 else torch.empty
    dq = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    dk, dv = (make(t.shape, dtype=t.dtype, device=t.device) for t in (k, v))
    options = _options(q, spec, tensors)
    bytes_needed = _cuda.attention_backward_workspace(q, k, options)
    workspace = torch.empty(bytes_needed, dtype=torch.uint8, device=q.device)
    given = (_aligned(q), _aligned(k), _aligned(v), _aligned(out), lse, _aligned(dout), dlse)
    _cuda.attention_backward(cuda.queue(q), *given, dq, dk, dv, workspace, options)
    return dq, dk, dv, None, None
