"""Attention over a KV cache on the native CPU kernel: ``csrc/cpu/decode.h``."""

from __future__ import annotations

import torch
from torch import Tensor

from fastgpt.dispatch import native_dtype
from fastgpt.ops.decode.spec import DecodeCall, DecodeSpec

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
MAX_HEADDIM = 256


def unsupported(call: DecodeCall) -> list[str]:
    reasons = []
    if call.device != "cpu":
        reasons.append(f"the tensors are on {call.device}, not on the CPU")
    if call.dtype not in DTYPES:
        reasons.append(f"dtype {call.dtype} is not float32, bfloat16 or float16")
    if max(call.headdim, call.headdim_v) > MAX_HEADDIM:
        reasons.append(f"headdim {max(call.headdim, call.headdim_v)} is above {MAX_HEADDIM}")
    return reasons


def _tensor(t: Tensor) -> tuple[int, ...]:
    return (t.data_ptr(), *t.stride()[:3])


NO_TENSOR = (0, 0, 0, 0)


def forward(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    k: Tensor | None,
    v: Tensor | None,
    cache_seqlens: Tensor,
    spec: DecodeSpec,
) -> tuple[Tensor, Tensor]:
    from fastgpt import _cpu

    (batch, seqlen_q, nheads, headdim), (_, capacity, nheads_k, headdim_v) = q.shape, v_cache.shape
    out = q.new_empty(batch, seqlen_q, nheads, headdim_v)
    lse = torch.empty(batch, nheads, seqlen_q, dtype=torch.float32)
    _cpu.decode(
        native_dtype(q.dtype),
        (batch, seqlen_q, capacity, nheads, nheads_k, headdim, headdim_v),
        _tensor(q),
        _tensor(k_cache),
        _tensor(v_cache),
        _tensor(out),
        lse.data_ptr(),
        cache_seqlens.data_ptr(),
        0 if k is None else k.shape[1],
        NO_TENSOR if k is None else _tensor(k),
        NO_TENSOR if v is None else _tensor(v),
        spec.softmax_scale,
        spec.window_left,
        spec.window_right,
        spec.num_splits,
        torch.get_num_threads(),
    )
    return out, lse
