"""The ``torch.library`` operator of attention over a KV cache: schema and fake.

``fastgpt::attention_kvcache`` appends in place and has no derivative.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastgpt import dispatch
from fastgpt.ops.checks import INT32_MAX, own_precision
from fastgpt.ops.decode.spec import DecodeSpec, DecodeTensors, capacity

library = torch.library.Library("fastgpt", "FRAGMENT")
library.define(
    "attention_kvcache(Tensor q, Tensor(a!) k_cache, Tensor(b!) v_cache, Tensor? k, Tensor? v, "
    "Tensor cache_seqlens, Tensor? rotary_cos, Tensor? rotary_sin, Tensor? cache_batch_idx, "
    "Tensor? cache_leftpad, Tensor? block_table, Tensor? alibi_slopes, Tensor? sink, Tensor? k_descale, "
    "Tensor? v_descale, float softmax_scale, int window_left, int window_right, float softcap, "
    "bool rotary_interleaved, int num_splits, str backend) -> (Tensor, Tensor)",
    tags=(torch.Tag.pt2_compliant_tag,),
)
_SCALARS = 7  # the last arguments of the schema, from softmax_scale to backend


def _check_values(q: Tensor, k_cache: Tensor, v_cache: Tensor, tensors: DecodeTensors) -> None:
    """The values of lengths and indices. Here and not in api.py, where torch.compile would have to trace
    them. On a GPU they are not read: that would stall it."""
    if not q.is_cpu:
        return
    seqlen_new = 0 if tensors.k is None else tensors.k.shape[1]
    lengths, table = tensors.cache_seqlens.tolist(), tensors.block_table
    most = min(capacity(k_cache, tensors), INT32_MAX)
    if lengths and not 0 <= min(lengths) <= max(lengths) <= most - seqlen_new:
        new = f" less {seqlen_new} new keys" if seqlen_new else ""
        raise ValueError(
            f"cache_seqlens: got {lengths}, expected 0 to {most - seqlen_new} "
            f"(the cache's capacity {most}{new}); nothing was written"
        )
    if seqlen_new and k_cache.numel() and k_cache.data_ptr() == v_cache.data_ptr():
        raise ValueError("v_cache: got the memory of k_cache, expected its own, into which new values can go")
    if tensors.cache_leftpad is not None:
        pads = tensors.cache_leftpad.tolist()
        if any(not 0 <= pad <= length for pad, length in zip(pads, lengths, strict=True)):
            raise ValueError(f"cache_leftpad: got {pads}, expected 0 to cache_seqlens {lengths}")
    if tensors.cache_batch_idx is not None:
        indices, sequences = tensors.cache_batch_idx.tolist(), k_cache.shape[0]
        if any(not 0 <= index < sequences for index in indices):
            raise ValueError(f"cache_batch_idx: got {indices}, expected 0 to {sequences - 1}")
        if seqlen_new and len(set(indices)) < len(indices):
            raise ValueError(f"cache_batch_idx: got {indices}, expected no index twice with new keys")
    if table is not None:
        _check_table(table, lengths, seqlen_new, k_cache)
    if tensors.rotary_cos is not None and lengths:
        positions = max(lengths) + max(seqlen_new, q.shape[1])
        if positions > tensors.rotary_cos.shape[0]:
            raise ValueError(
                f"rotary_cos: got {tensors.rotary_cos.shape[0]} positions, expected at least {positions}"
            )


def _check_table(table: Tensor, lengths: list[int], seqlen_new: int, k_cache: Tensor) -> None:
    blocks, page_size = k_cache.shape[:2]
    ends = [-(-(length + seqlen_new) // page_size) for length in lengths]  # of the blocks that are used
    written: list[int] = []
    for b, row in enumerate(table[:, : max(ends, default=0)].tolist()):
        used = row[: ends[b]]
        if used and not 0 <= min(used) <= max(used) < blocks:
            raise ValueError(
                f"block_table: got blocks {min(used)} to {max(used)} for sequence {b}, "
                f"expected 0 to {blocks - 1}; nothing was written"
            )
        written += used[lengths[b] // page_size :] if seqlen_new else []
    if len(set(written)) < len(written):
        raise ValueError(
            "block_table: got a block into which the new keys of two places go, expected each of them once; "
            "nothing was written"
        )


def _forward(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, spec: DecodeSpec, tensors: DecodeTensors, backend: str
) -> tuple[Tensor, Tensor]:
    _check_values(q, k_cache, v_cache, tensors)
    implementation = dispatch.implementation("decode", backend)
    with own_precision(q):
        out, lse = implementation.forward(q, k_cache, v_cache, spec, tensors)
    return out.contiguous(), lse.contiguous()


def _forward_operator(q: Tensor, k_cache: Tensor, v_cache: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
    *spec, backend = args[-_SCALARS:]
    return _forward(q, k_cache, v_cache, DecodeSpec(*spec), DecodeTensors(*args[:-_SCALARS]), backend)


def _fake(q: Tensor, k_cache: Tensor, v_cache: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
    out = q.new_empty(*q.shape[:-1], v_cache.shape[-1])
    if args[-1] == "torch":
        return out, q.new_empty(0, dtype=torch.float32)
    acc = torch.float64 if q.dtype == torch.float64 else torch.float32
    return out, q.new_empty(q.shape[0], q.shape[2], q.shape[1], dtype=acc)


def _note_append(k_cache: Tensor, v_cache: Tensor, k: Tensor | None) -> None:
    """Autograd has to see that a cache it may have saved has changed."""
    if k is not None:
        torch.autograd.graph.increment_version([t for t in (k_cache, v_cache) if not t.is_inference()])


def _forward_inplace(*args: Any) -> tuple[Tensor, Tensor]:
    _note_append(*args[1:4])
    with torch._C._AutoDispatchBelowADInplaceOrView():
        return torch.ops.fastgpt.attention_kvcache.default(*args)


def run(
    direct: bool,
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    spec: DecodeSpec,
    tensors: DecodeTensors,
    backend: str,
) -> tuple[Tensor, Tensor]:
    """attention_kvcache; ``direct``: past the dispatcher."""
    if not direct:
        if hasattr(q, "device_mesh") or hasattr(k_cache, "device_mesh"):
            raise TypeError(
                "q, k_cache: got DTensors, expected torch.Tensors, such as what each rank has, .to_local(): "
                "the caches are appended to in place"
            )
        return torch.ops.fastgpt.attention_kvcache.default(q, k_cache, v_cache, *tensors, *spec, backend)
    result = _forward(q, k_cache, v_cache, spec, tensors, backend)
    _note_append(k_cache, v_cache, tensors.k)
    return result


def _refuse_vmap(info: Any, in_dims: tuple[int | None, ...], *args: Any) -> Any:
    raise RuntimeError(
        "fastgpt.attention_with_kvcache appends to its caches in place, which torch.func.vmap cannot follow; "
        "give it the samples as sequences of one batch"
    )


library.impl("attention_kvcache", _forward_inplace, "ADInplaceOrView")
library.impl("attention_kvcache", _forward_operator, "CompositeExplicitAutograd")
torch.library.register_fake("fastgpt::attention_kvcache", _fake, lib=library)
torch.library.register_vmap("fastgpt::attention_kvcache", _refuse_vmap, lib=library)
