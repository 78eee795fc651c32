"""Which calls of F.scaled_dot_product_attention fastgpt serves: a function of metadata."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from fastgpt import dispatch
from fastgpt.ops import checks
from fastgpt.ops.attention.spec import FEATURES, AttentionCall, AttentionSpec, used

# The fewest multiply-adds of q kᵀ for which fastgpt takes less time than torch, by whether storage has 16
# bits and whether gradients are asked for. Torch's time over fastgpt's, 2 threads, AVX-512, torch 2.13: fp32
# forward 0.5–1.0 from 2^15 to 2^18, 1.2–2.6 from 2^20; with backward 0.5 at 2^15, 0.8–1.1 at 2^20, 1.2–2.5
# from 2^21; bf16 forward 1–7; with backward 0.5 at 2^12, 1.4 at 2^15, 1.2–8 above. With dropout, where torch
# materialises the matrix, 1.1–16 at any size. With AVX2, from 2^20: fp32 0.8–1.2, bf16 1.1–2.5, fp16 1.5–10.
FEWEST = {(False, False): 1 << 18, (False, True): 1 << 21, (True, False): 0, (True, True): 1 << 15}
# Likewise for all of nn.MultiheadAttention in eval: fp32 0.7–1.1 to 2^23, 1.1–2.0 from 2^24; bf16 0.9–1.1 at
# any size; either with a mask 0.9–1.3 to 2^23, 1.1–5 from 2^24.
FEWEST_MHA = 1 << 24


class Shape(NamedTuple):
    """What q, k and v are broadcast to: the axes before the heads, q's heads, and those of k and v."""

    batch: tuple[int, ...]
    nheads: int
    nheads_k: int


def _broadcast(*shapes: tuple[int, ...]) -> tuple[int, ...] | None:
    result = []
    for sizes in zip(*shapes, strict=True):
        most = max(sizes)
        if any(size not in (1, most) for size in sizes):
            return None
        result.append(most)
    return tuple(result)


def shape_of(query: Tensor, key: Tensor, enable_gqa: bool) -> Shape | None:
    """None where torch refuses them."""
    rank = max(4, query.dim(), key.dim())
    (*batch_q, nheads), (*batch_k, nheads_k) = (
        (1,) * (rank - t.dim()) + tuple(t.shape[:-2]) for t in (query, key)
    )
    batch, heads = _broadcast(tuple(batch_q), tuple(batch_k)), _broadcast((nheads,), (nheads_k,))
    if batch is None:
        return None
    if nheads_k == 1 or (enable_gqa and nheads % nheads_k == 0):
        return Shape(batch, nheads, nheads_k)
    return None if enable_gqa or heads is None else Shape(batch, *heads, *heads)


def _refused(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None, dropout_p: float, scale: float | None
) -> str | None:
    """What fastgpt has not, or torch itself refuses, in which case it is torch that says so."""
    tensors = (query, key, value) if attn_mask is None else (query, key, value, attn_mask)
    if any(t.is_nested or t.layout != torch.strided or t.device != query.device for t in tensors):
        return "nested or sparse tensors, or several devices"
    if min(query.dim(), key.dim(), value.dim()) < 2 or not all(t.numel() for t in tensors):
        return "tensors without elements or rows"
    if query.shape[-1] != key.shape[-1] or key.shape[:-1] != value.shape[:-1]:
        return "query, key and value of sizes that differ"
    if query.dtype not in checks.FLOATING or not query.dtype == key.dtype == value.dtype:
        return f"query, key and value of {query.dtype}, {key.dtype} and {value.dtype}"
    if not 0 <= dropout_p < 1:
        return f"dropout_p {dropout_p:g}"
    if scale is not None and not math.isfinite(scale):
        return f"scale {scale:g}"
    return None


def _refused_mask(query: Tensor, key: Tensor, mask: Tensor, shape: Shape) -> str | None:
    if mask.dtype not in (torch.bool, torch.float32, query.dtype):
        return f"attn_mask of {mask.dtype} with query of {query.dtype}"
    full = (*shape.batch, shape.nheads, query.shape[-2], key.shape[-2])
    if not 2 <= mask.dim() <= max(query.dim(), key.dim()):
        return f"attn_mask of {mask.dim()} dimensions with query of {query.dim()}"
    if any(a not in (1, b) for a, b in zip(reversed(mask.shape), reversed(full), strict=False)):
        return "attn_mask of a shape that does not broadcast"
    return None


def unserved(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    backend: str | None = None,
) -> str | None:
    """Why a call of F.scaled_dot_product_attention is left to torch; None if fastgpt serves it.

    Reads metadata alone, of fake tensors as well. The arguments are those of torch's function, backend is
    that of :func:`enable`.
    """
    if reason := _refused(query, key, value, attn_mask, dropout_p, scale):
        return reason
    shape = shape_of(query, key, enable_gqa)
    if shape is None:
        return "query, key and value of batches or heads that do not broadcast"
    if attn_mask is not None:
        if is_causal:
            return "is_causal together with attn_mask"
        if reason := _refused_mask(query, key, attn_mask, shape):
            return reason
    asked, backward = dispatch.requested(backend), checks.needs_autograd(query, key, value, attn_mask)
    window = max(query.shape[-2] - key.shape[-2], 0) if is_causal else -1
    spec = AttentionSpec(1.0, -1, window, dropout_p=dropout_p, bias=attn_mask is not None)
    try:
        name = choose(asked, query, value, spec, False, backward)
    except dispatch.BackendUnsupported as error:
        return str(error)
    if name == "torch" or (name == "reference" and asked == "auto"):
        return f"{asked!r} has {query.dtype} on {query.device.type} served by {name}"
    if asked == "auto" and not dropout_p and query.is_cpu:
        fewest = FEWEST[query.dtype.itemsize == 2, backward]
        rows = math.prod(shape.batch) * shape.nheads * query.shape[-2]
        if rows * key.shape[-2] * query.shape[-1] < fewest:
            return f"under {fewest:,} multiply-adds of {query.dtype}, for which torch takes less time"
    return None


def choose(asked: str, query: Tensor, value: Tensor, spec: AttentionSpec, lse: bool, backward: bool) -> str:
    metadata = checks.device_type(query), query.dtype, query.shape[-1], value.shape[-1]
    return dispatch.choose(asked, AttentionCall, FEATURES, used(spec, lse, backward), *metadata)
