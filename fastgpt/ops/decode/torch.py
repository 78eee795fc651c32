"""Attention over a KV cache by what torch ships: indexed writes and scaled_dot_product_attention."""

from __future__ import annotations

import torch
from torch import Tensor

from fastgpt.ops.decode.spec import DecodeCall, DecodeSpec, DecodeTensors
from fastgpt.ops.torch import own_sdpa

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)

REFUSED = {
    "softcap": "scaled_dot_product_attention has no softcap",
    "alibi": "scaled_dot_product_attention has no ALiBi",
    "sink": "scaled_dot_product_attention has no sink",
    "rotary": "torch has no rotary embedding",
    "cache_batch_idx": "scaled_dot_product_attention reads its keys in order, without an index of sequences",
    "cache_leftpad": "scaled_dot_product_attention has no padding but by a mask",
    "paged": "scaled_dot_product_attention has no paged keys",
    "quantized": "scaled_dot_product_attention has no quantized keys",
    "lse": "scaled_dot_product_attention does not return lse",
}


def unsupported(call: DecodeCall) -> list[str]:
    reasons = []
    if call.dtype not in DTYPES:
        reasons.append(f"dtype {call.dtype} is not one of float32, bfloat16, float16, float64")
    return reasons + [REFUSED[name] for name in call.features if name in REFUSED]


def forward(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, spec: DecodeSpec, tensors: DecodeTensors
) -> tuple[Tensor, Tensor]:
    """out (batch, seqlen_q, nheads, headdim_v) in q's dtype, and an empty lse."""
    k, v, cache_seqlens = tensors.k, tensors.v, tensors.cache_seqlens
    batch, sq, nheads, _ = q.shape
    lengths = cache_seqlens.long()[:, None]
    if k is not None and v is not None:
        rows = torch.arange(batch, device=q.device)[:, None]
        positions = lengths + torch.arange(k.shape[1], device=q.device)
        k_cache[rows, positions], v_cache[rows, positions] = k, v
        lengths = lengths + k.shape[1]

    # On the CPU the lengths are at hand; elsewhere reading them would stall the device.
    limit = int(lengths.max()) if q.device.type == "cpu" and batch else k_cache.shape[1]
    keys, values = k_cache[:, :limit], v_cache[:, :limit]
    full = q.device.type == "cpu" and batch > 0 and int(lengths.min()) == limit
    unmasked = full and spec.window_left < 0 and (spec.window_right < 0 or sq == 1)
    mask = None
    if not unmasked:
        j = torch.arange(limit, device=q.device)
        i = torch.arange(sq, device=q.device)[:, None] + (lengths - sq)[..., None]
        mask = (j < lengths)[:, None, :].expand(-1, sq, -1)
        if spec.window_left >= 0:
            mask = mask & (j >= i - spec.window_left)
        if spec.window_right >= 0:
            mask = mask & (j <= i + spec.window_right)
        mask = mask[:, None]
        if not full:
            # Behind a sequence's keys the cache may hold NaN, which 0 · NaN would let through.
            behind = (j >= lengths)[..., None, None]
            keys, values = keys.masked_fill(behind, 0), values.masked_fill(behind, 0)
    out = own_sdpa(
        q.transpose(1, 2),
        keys.transpose(1, 2),
        values.transpose(1, 2),
        attn_mask=mask,
        scale=spec.softmax_scale,
        enable_gqa=nheads != k_cache.shape[2],
    )
    return out.transpose(1, 2), q.new_empty(0, dtype=torch.float32)
