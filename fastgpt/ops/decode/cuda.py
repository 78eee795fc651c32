"""Attention over a KV cache on the CUDA kernels: ``csrc/cuda/decode.cu``.

Storage fp32, bf16 or fp16, caches also int8 or fp8; accumulation fp32.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastgpt.ops import cuda
from fastgpt.ops.decode.spec import DecodeCall, DecodeSpec, DecodeTensors, capacity
from fastgpt.ops.native import contiguous, contiguous_fp32

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
_cuda = cuda.load()


def unsupported(call: DecodeCall) -> list[str]:
    headdim = max(call.headdim, call.headdim_v)
    return cuda.refusals(call.device, call.dtype, call.features, FEATURES, headdim)


def forward(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, spec: DecodeSpec, tensors: DecodeTensors
) -> tuple[Tensor, Tensor]:
    batch, seqlen_q, nheads, headdim = q.shape
    nheads_k, headdim_v = v_cache.shape[2:]
    k, v, cache_seqlens, cos, sin, index, pads, table, *per_head = tensors
    if cos is not None and sin is not None:
        tables = q.dtype if cos.dtype == sin.dtype == q.dtype else torch.float32
        cos, sin = cos.to(tables).contiguous(), sin.to(tables).contiguous()
    if table is not None and table.stride(1) != 1:
        table = table.contiguous()
    keys = capacity(k_cache, tensors)
    parts = _cuda.decode_parts(
        cuda.multiprocessors(q.device),
        q,
        k_cache,
        *(batch, seqlen_q, 0 if k is None else k.shape[1], nheads, nheads_k, headdim, headdim_v, keys),
        spec.window_left,
        spec.num_splits,
    )
    out = q.new_empty(batch, seqlen_q, nheads, headdim_v)
    lse = q.new_empty(batch, nheads, seqlen_q, dtype=torch.float32)
    part_out = part_lse = cuts = None
    if parts > 1:
        slots = batch * parts if spec.num_splits else 2 * parts
        part_out = q.new_empty(slots, seqlen_q, nheads, headdim_v, dtype=torch.float32)
        part_lse = q.new_empty(slots, nheads, seqlen_q, dtype=torch.float32)
    if spec.num_splits == 0:
        cuts = q.new_empty(min(batch, parts), 3, dtype=torch.int32)
    _cuda.decode(
        cuda.queue(q),
        q,
        k_cache,
        v_cache,
        k,
        v,
        keys,
        out,
        lse,
        parts,
        part_out,
        part_lse,
        cuts,
        cache_seqlens.contiguous(),
        cos,
        sin,
        contiguous(index),
        contiguous(pads),
        table,
        *map(contiguous_fp32, per_head),
        *spec[:-1],
    )
    return out, lse
