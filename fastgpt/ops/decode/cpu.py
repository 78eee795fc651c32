"""Attention over a KV cache on the native CPU kernel: ``csrc/cpu/decode.h``."""

from __future__ import annotations

import torch
from torch import Tensor

from fastgpt.ops.decode.spec import DecodeCall, DecodeSpec
from fastgpt.ops.native import DTYPES, pass_tensor, refusals

FEATURES = ("window", "lse")


def unsupported(call: DecodeCall) -> list[str]:
    headdim = max(call.headdim, call.headdim_v)
    return refusals(call.device, call.dtype, call.features, FEATURES, headdim)


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
    lse = q.new_empty(batch, nheads, seqlen_q, dtype=torch.float32)
    _cpu.decode(
        DTYPES[q.dtype],
        (batch, seqlen_q, capacity, nheads, nheads_k, headdim, headdim_v),
        pass_tensor(q),
        pass_tensor(k_cache),
        pass_tensor(v_cache),
        pass_tensor(out),
        lse.data_ptr(),
        cache_seqlens.data_ptr(),
        0 if k is None else k.shape[1],
        pass_tensor(k),
        pass_tensor(v),
        spec.softmax_scale,
        spec.window_left,
        spec.window_right,
        spec.num_splits,
        torch.get_num_threads(),
    )
    return out, lse
