"""Attention over a KV cache on the native CPU kernel: ``csrc/cpu/decode.h``."""

from __future__ import annotations

import torch
from torch import Tensor

from fastgpt import _cpu
from fastgpt.ops.decode.spec import DecodeCall, DecodeSpec, DecodeTensors
from fastgpt.ops.native import contiguous_fp32, refusals

# All that a call may ask for today; a new feature is unsupported until it is written here.
FEATURES = (
    "window",
    "softcap",
    "alibi",
    "sink",
    "rotary",
    "cache_batch_idx",
    "cache_leftpad",
    "paged",
    "quantized",
    "lse",
)


def unsupported(call: DecodeCall) -> list[str]:
    headdim = max(call.headdim, call.headdim_v)
    return refusals(call.device, call.dtype, call.features, FEATURES, headdim)


def forward(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, spec: DecodeSpec, tensors: DecodeTensors
) -> tuple[Tensor, Tensor]:
    batch, seqlen_q, nheads, _ = q.shape
    out = q.new_empty(batch, seqlen_q, nheads, v_cache.shape[3])
    lse = q.new_empty(batch, nheads, seqlen_q, dtype=torch.float32)
    cos, sin, q_source = tensors.rotary_cos, tensors.rotary_sin, None
    if cos is not None and sin is not None:
        q, q_source = torch.empty_like(q, memory_format=torch.contiguous_format), q  # rotated from, and into
        if not cos.dtype == sin.dtype == q.dtype:
            cos, sin = cos.float(), sin.float()
        cos, sin = cos.contiguous(), sin.contiguous()
    _cpu.decode(
        q,
        k_cache,
        v_cache,
        out,
        lse,
        tensors.k,
        tensors.v,
        tensors.cache_seqlens,
        cos,
        sin,
        tensors.cache_batch_idx,
        tensors.cache_leftpad,
        tensors.block_table,
        contiguous_fp32(tensors.alibi_slopes),
        contiguous_fp32(tensors.sink),
        contiguous_fp32(tensors.k_descale),
        contiguous_fp32(tensors.v_descale),
        q_source,
        *spec,
        torch.get_num_threads(),
    )
    return out, lse
