"""The functions of flash-attn 3 (``flash_attn_interface``): its names, argument order, defaults and results.

What only steers its kernels is accepted and not read: ``pack_gqa``, ``sm_margin``, ``scheduler_metadata``,
``deterministic``, ``num_splits`` but for caches. What fastgpt has not raises RuntimeError: ``qv``,
``attention_chunk``, queries in fp8 (``q_descale``), ragged new keys (``cu_seqlens_k_new``).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastgpt.integrations.flash_attn.flash_attn_interface import (
    Window,
    call,
    ragged_with_kvcache,
    window,
)
from fastgpt.ops.attention.api import attention, attention_varlen
from fastgpt.ops.checks import unit_rows
from fastgpt.ops.decode.api import attention_with_kvcache
from fastgpt.ops.rotary.api import rotary_embedding


def _refuse(**given: Any) -> None:
    for name, value in given.items():
        if value is not None and not (isinstance(value, int) and value == 0):
            got = "a tensor" if isinstance(value, Tensor) else repr(value)
            expected = 0 if name == "attention_chunk" else None
            raise RuntimeError(f"{name}: got {got}, expected {expected}: fastgpt has not written it")


def flash_attn_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    softmax_scale: float | None = None,
    causal: bool = False,
    qv: Tensor | None = None,
    q_descale: Tensor | None = None,
    k_descale: Tensor | None = None,
    v_descale: Tensor | None = None,
    window_size: Window = (-1, -1),
    attention_chunk: int = 0,
    softcap: float = 0.0,
    num_splits: int = 1,
    pack_gqa: bool | None = None,
    deterministic: bool = False,
    sm_margin: int = 0,
    return_attn_probs: bool = False,
) -> Any:
    """:func:`fastgpt.attention` under flash-attn's name, with its defaults: not causal.

    Args:
        q: (batch, seqlen_q, nheads, headdim). k: (batch, seqlen_k, nheads_k, headdim).
        v: (batch, seqlen_k, nheads_k, headdim_v).
        window_size: (left, right), a tuple, list or tensor; negative = unlimited.
        return_attn_probs: also return lse (batch, nheads, seqlen_q), float32.

    Raises:
        RuntimeError: an argument is not as above, or has not been written; the message names it.
    """
    _refuse(
        qv=qv, q_descale=q_descale, k_descale=k_descale, v_descale=v_descale, attention_chunk=attention_chunk
    )
    return call(
        attention,
        unit_rows(q),
        unit_rows(k),
        unit_rows(v),
        causal=causal,
        softmax_scale=softmax_scale,
        window_size=window(window_size),
        softcap=softcap,
        return_lse=return_attn_probs,
    )


def flash_attn_varlen_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    seqused_q: Tensor | None = None,
    seqused_k: Tensor | None = None,
    softmax_scale: float | None = None,
    causal: bool = False,
    qv: Tensor | None = None,
    q_descale: Tensor | None = None,
    k_descale: Tensor | None = None,
    v_descale: Tensor | None = None,
    window_size: Window = (-1, -1),
    attention_chunk: int = 0,
    softcap: float = 0.0,
    num_splits: int = 1,
    pack_gqa: bool | None = None,
    deterministic: bool = False,
    sm_margin: int = 0,
    return_attn_probs: bool = False,
) -> Any:
    """:func:`fastgpt.attention_varlen` under flash-attn's name, with its defaults.

    Args:
        q: (total_q, nheads, headdim). k: (total_k, nheads_k, headdim). v: (total_k, nheads_k, headdim_v).
        cu_seqlens_q, cu_seqlens_k: (batch + 1), int32.
        max_seqlen_q, max_seqlen_k: not read.
        seqused_q, seqused_k: (batch), int32: of each sequence's rows, how many are queries, or keys; None for
            all. Rows that are no query get out 0 and lse −inf, and masks count from the last that is one.
        return_attn_probs: also return lse (nheads, total_q), float32.

    Raises:
        RuntimeError: an argument is not as above, or has not been written; the message names it.
    """
    _refuse(
        qv=qv, q_descale=q_descale, k_descale=k_descale, v_descale=v_descale, attention_chunk=attention_chunk
    )
    used = None
    if seqused_q is not None:
        total = q.shape[0]
        ends, token = cu_seqlens_q[1:].long(), torch.arange(total, device=q.device)
        sequence = torch.bucketize(token, ends, right=True).clamp(max=len(ends) - 1)
        used = (token - cu_seqlens_q[sequence] < seqused_q[sequence]).nonzero().flatten()
        q = q[used]
        cu_seqlens_q = torch.nn.functional.pad(seqused_q.cumsum(0, dtype=torch.int32), (1, 0))
    out, lse = call(
        attention_varlen,
        unit_rows(q),
        unit_rows(k),
        unit_rows(v),
        cu_seqlens_q=cu_seqlens_q,
        cu_seqlens_k=cu_seqlens_k,
        seqused_k=seqused_k,
        causal=causal,
        softmax_scale=softmax_scale,
        window_size=window(window_size),
        softcap=softcap,
        return_lse=True,
    )
    if used is not None:
        out = out.new_zeros(total, *out.shape[1:]).index_put((used,), out)
        lse = lse.new_full((total, lse.shape[0]), -torch.inf).index_put((used,), lse.T).T.contiguous()
    return (out, lse) if return_attn_probs else out


def flash_attn_with_kvcache(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    k: Tensor | None = None,
    v: Tensor | None = None,
    qv: Tensor | None = None,
    rotary_cos: Tensor | None = None,
    rotary_sin: Tensor | None = None,
    cache_seqlens: Tensor | int | None = None,
    cache_batch_idx: Tensor | None = None,
    cache_leftpad: Tensor | None = None,
    page_table: Tensor | None = None,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k_new: Tensor | None = None,
    max_seqlen_q: int | None = None,
    rotary_seqlens: Tensor | None = None,
    q_descale: Tensor | None = None,
    k_descale: Tensor | None = None,
    v_descale: Tensor | None = None,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Window = (-1, -1),
    attention_chunk: int = 0,
    softcap: float = 0.0,
    rotary_interleaved: bool = True,
    scheduler_metadata: Tensor | None = None,
    num_splits: int = 0,
    pack_gqa: bool | None = None,
    sm_margin: int = 0,
    return_softmax_lse: bool = False,
) -> Any:
    """:func:`fastgpt.attention_with_kvcache` under flash-attn's name, with its defaults: not causal.

    Args:
        q: (batch, seqlen_q, nheads, headdim) or, with cu_seqlens_q, (total_q, nheads, headdim).
        cache_seqlens: an int, (batch,) int32, or None: the whole cache is keys, and nothing can be appended.
        page_table: (batch, pages), int32; pages of any size.
        cu_seqlens_q: (batch + 1), int32, with max_seqlen_q, the longest one; then nothing can be appended or
            turned.
        rotary_seqlens: (batch), int32: the position of each sequence's first new key and query; None for
            cache_seqlens.
        k_descale, v_descale: (batch, nheads_k) of a cache in int8 or float8_e4m3fn.

    Returns:
        out of q's shape, up to the headdim; with ``return_softmax_lse`` also lse (batch, nheads, seqlen_q) or
        (nheads, total_q), float32.

    Raises:
        RuntimeError: an argument is not as above, or has not been written; the message names it.
    """
    _refuse(qv=qv, q_descale=q_descale, cu_seqlens_k_new=cu_seqlens_k_new, attention_chunk=attention_chunk)
    if cu_seqlens_q is not None:
        _refuse(k=k, v=v, rotary_cos=rotary_cos, rotary_sin=rotary_sin, rotary_seqlens=rotary_seqlens)
    if cache_seqlens is None:
        if k is not None:
            raise RuntimeError(
                "cache_seqlens: got None, expected where in the cache k and v are to be appended"
            )
        cache_seqlens = k_cache.shape[1] * (1 if page_table is None else page_table.shape[1])
    sizes = window(window_size)
    if rotary_seqlens is not None and rotary_cos is not None and rotary_sin is not None and k is not None:
        moving = causal or sizes != (-1, -1)  # else all queries have the first one's position
        q = _turned(q, rotary_cos, rotary_sin, rotary_interleaved, rotary_seqlens, moving)
        k = _turned(k, rotary_cos, rotary_sin, rotary_interleaved, rotary_seqlens, True)
        rotary_cos = rotary_sin = None
    options: dict[str, Any] = {
        "cache_seqlens": cache_seqlens,
        "causal": causal,
        "window_size": sizes,
        "softmax_scale": softmax_scale,
        "softcap": softcap,
        "cache_batch_idx": cache_batch_idx,
        "cache_leftpad": cache_leftpad,
        "block_table": page_table,
        "k_descale": k_descale,
        "v_descale": v_descale,
        "num_splits": num_splits,
    }
    if cu_seqlens_q is not None:
        if max_seqlen_q is None:
            raise RuntimeError(
                "max_seqlen_q: got None, expected the longest sequence's queries with cu_seqlens_q"
            )
        if not isinstance(cache_seqlens, Tensor):
            options["cache_seqlens"] = torch.full_like(cu_seqlens_q[1:], cache_seqlens)
        out, lse = ragged_with_kvcache(q, k_cache, v_cache, cu_seqlens_q, int(max_seqlen_q), **options)
        return (out, lse) if return_softmax_lse else out
    return call(
        attention_with_kvcache,
        unit_rows(q),
        k_cache,
        v_cache,
        unit_rows(k),
        unit_rows(v),
        rotary_cos=unit_rows(rotary_cos),
        rotary_sin=unit_rows(rotary_sin),
        rotary_interleaved=rotary_interleaved,
        return_lse=return_softmax_lse,
        **options,
    )


def _turned(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool, offsets: Tensor, moving: bool) -> Tensor:
    """x (batch, seqlen, nheads, headdim) by the rows from ``offsets`` on, or each sequence by that one."""
    shape = x.shape
    if not moving:
        x, offsets = x.flatten(0, 1)[:, None], offsets.repeat_interleave(shape[1])
    turned = call(rotary_embedding, x, cos, sin, interleaved=interleaved, seqlen_offsets=offsets)
    return turned.view(shape)
