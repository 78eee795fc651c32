"""Attention over a KV cache on the native CPU kernel: ``csrc/cpu/decode.h``."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastgpt.ops.decode.spec import DecodeCall, DecodeSpec, DecodeTensors
from fastgpt.ops.native import DTYPES, pass_tensor, pointer, refusals

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
CACHE_TYPES = {torch.int8: 1, torch.float8_e4m3fn: 2}  # CacheType in csrc/include/fastgpt/params.h


def unsupported(call: DecodeCall) -> list[str]:
    headdim = max(call.headdim, call.headdim_v)
    return refusals(call.device, call.dtype, call.features, FEATURES, headdim)


def _extras(tensors: DecodeTensors) -> bool:
    """Whether there is any tensor beyond k, v and cache_seqlens."""
    return any(t is not None for t in tensors[3:])


def _batch_stride(t: Tensor | None) -> int:
    return 0 if t is None or t.dim() == 1 else t.stride(0)


def _options(
    q_source: Tensor, k_cache: Tensor, spec: DecodeSpec, tensors: DecodeTensors
) -> tuple[Any, ...] | None:
    """What varies a call beyond plain attention: PyDecodeOptions in csrc/cpu/module.cpp."""
    if not spec.softcap and not _extras(tensors):
        return None
    cos, table = tensors.rotary_cos, tensors.block_table
    return (
        spec.softcap,
        pointer(tensors.alibi_slopes),
        _batch_stride(tensors.alibi_slopes),
        pointer(tensors.sink),
        pointer(tensors.cache_batch_idx),
        pointer(tensors.cache_leftpad),
        pointer(table),
        _batch_stride(table),
        CACHE_TYPES.get(k_cache.dtype, 0),
        pointer(tensors.k_descale),
        pointer(tensors.v_descale),
        _batch_stride(tensors.k_descale),
        pointer(cos),
        pointer(tensors.rotary_sin),
        0 if cos is None else DTYPES[cos.dtype],
        0 if cos is None else 2 * cos.shape[1],
        spec.rotary_interleaved,
        pass_tensor(q_source),
    )


def _as_the_kernel_reads(t: Tensor | None, dtype: torch.dtype = torch.float32) -> Tensor | None:
    return None if t is None else t.to(dtype).contiguous()


def forward(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, spec: DecodeSpec, tensors: DecodeTensors
) -> tuple[Tensor, Tensor]:
    from fastgpt import _cpu

    (batch, seqlen_q, nheads, headdim), (_, capacity, nheads_k, headdim_v) = q.shape, v_cache.shape
    out = q.new_empty(batch, seqlen_q, nheads, headdim_v)
    lse = q.new_empty(batch, nheads, seqlen_q, dtype=torch.float32)
    q_source = q
    if _extras(tensors):
        if tensors.rotary_cos is not None and tensors.rotary_sin is not None:
            q = torch.empty_like(q, memory_format=torch.contiguous_format)
            tables = (tensors.rotary_cos, tensors.rotary_sin)
            dtype = q.dtype if all(t.dtype == q.dtype for t in tables) else torch.float32
            cos, sin = (_as_the_kernel_reads(t, dtype) for t in tables)
            tensors = tensors._replace(rotary_cos=cos, rotary_sin=sin)
        k_descale, v_descale = (_as_the_kernel_reads(t) for t in (tensors.k_descale, tensors.v_descale))
        tensors = tensors._replace(
            alibi_slopes=_as_the_kernel_reads(tensors.alibi_slopes),
            sink=_as_the_kernel_reads(tensors.sink),
            k_descale=k_descale,
            v_descale=v_descale,
        )
    k, v = tensors.k, tensors.v
    _cpu.decode(
        DTYPES[q.dtype],
        (batch, seqlen_q, capacity, nheads, nheads_k, headdim, headdim_v),
        pass_tensor(q),
        pass_tensor(k_cache),
        pass_tensor(v_cache),
        pass_tensor(out),
        lse.data_ptr(),
        tensors.cache_seqlens.data_ptr(),
        0 if k is None else k.shape[1],
        pass_tensor(k),
        pass_tensor(v),
        spec.softmax_scale,
        spec.window_left,
        spec.window_right,
        spec.num_splits,
        torch.get_num_threads(),
        _options(q_source, k_cache, spec, tensors),
    )
    return out, lse
