"""The ``torch.library`` operator of attention over a KV cache: schema and fake.

``fastgpt::attention_kvcache`` appends in place and has no derivative.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastgpt import dispatch
from fastgpt.ops.checks import own_precision
from fastgpt.ops.decode.spec import DecodeSpec

library = torch.library.Library("fastgpt", "FRAGMENT")
library.define(
    "attention_kvcache(Tensor q, Tensor(a!) k_cache, Tensor(b!) v_cache, Tensor? k, Tensor? v, "
    "Tensor cache_seqlens, float softmax_scale, int window_left, int window_right, int num_splits, "
    "str backend) -> (Tensor, Tensor)",
    tags=(torch.Tag.pt2_compliant_tag,),
)


def _check_lengths(cache_seqlens: Tensor, seqlen_new: int, capacity: int) -> None:
    # Here and not in api.py, where torch.compile would have to trace the values. On a GPU they are not
    # read: that would stall it.
    if cache_seqlens.device.type != "cpu":
        return
    lengths = cache_seqlens.tolist()
    if lengths and not 0 <= min(lengths) <= max(lengths) <= capacity - seqlen_new:
        new = f" less {seqlen_new} new keys" if seqlen_new else ""
        raise ValueError(
            f"cache_seqlens: got {lengths}, expected 0 to {capacity - seqlen_new} "
            f"(the cache's capacity {capacity}{new}); nothing was written"
        )


def _forward(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    k: Tensor | None,
    v: Tensor | None,
    cache_seqlens: Tensor,
    softmax_scale: float,
    window_left: int,
    window_right: int,
    num_splits: int,
    backend: str,
) -> tuple[Tensor, Tensor]:
    _check_lengths(cache_seqlens, 0 if k is None else k.shape[1], k_cache.shape[1])
    spec = DecodeSpec(softmax_scale, window_left, window_right, num_splits)
    implementation = dispatch.implementation("decode", backend)
    with own_precision(q):
        out, lse = implementation.forward(q, k_cache, v_cache, k, v, cache_seqlens, spec)
    return out.contiguous(), lse.contiguous()


def _fake(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    k: Tensor | None,
    v: Tensor | None,
    cache_seqlens: Tensor,
    softmax_scale: float,
    window_left: int,
    window_right: int,
    num_splits: int,
    backend: str,
) -> tuple[Tensor, Tensor]:
    out = q.new_empty(*q.shape[:-1], v_cache.shape[-1])
    if backend == "torch":
        return out, q.new_empty(0, dtype=torch.float32)
    acc = torch.float64 if q.dtype == torch.float64 else torch.float32
    return out, q.new_empty(q.shape[0], q.shape[2], q.shape[1], dtype=acc)


def _forward_inplace(*args: Any) -> tuple[Tensor, Tensor]:
    if args[3] is not None:  # autograd has to see that a cache it may have saved has changed
        torch.autograd.graph.increment_version((args[1], args[2]))
    with torch._C._AutoDispatchBelowADInplaceOrView():
        return torch.ops.fastgpt.attention_kvcache.default(*args)


library.impl("attention_kvcache", _forward_inplace, "ADInplaceOrView")
library.impl("attention_kvcache", _forward, "CompositeExplicitAutograd")
torch.library.register_fake("fastgpt::attention_kvcache", _fake, lib=library)
