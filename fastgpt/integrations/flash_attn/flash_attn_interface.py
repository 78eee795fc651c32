"""The functions of flash-attn 2.8: its names, argument order, defaults, shapes and return values.

Beyond flash-attn: any device and backend, float32 too, any head dim up to 256, d_v ≠ d_qk, pages of any size,
softcap with dropout. Gradients are the same bits in two runs, whatever ``deterministic`` says.

Different from it: a row that sees no key has lse −inf, as its sum is, where flash-attn 2 gives +inf; and a
gradient that ``flash_attn_with_kvcache`` would have to give is an error, where flash-attn gives none.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from fastgpt.ops import checks
from fastgpt.ops.attention import reference
from fastgpt.ops.attention.api import attention, attention_varlen
from fastgpt.ops.attention.spec import AttentionSpec, AttentionTensors
from fastgpt.ops.checks import unit_rows
from fastgpt.ops.decode.api import attention_with_kvcache

Window = Sequence[int] | Tensor


def call(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """With the errors that flash-attn raises."""
    try:
        return function(*args, **kwargs)
    except (TypeError, ValueError) as error:
        raise RuntimeError(str(error)) from error


def window(window_size: Window) -> tuple[int, int]:
    """(left, right), −1 for any negative number."""
    sizes = window_size.tolist() if isinstance(window_size, Tensor) else window_size
    if not isinstance(sizes, (tuple, list)) or len(sizes) != 2:
        raise RuntimeError(f"window_size: got {window_size!r}, expected (left, right)")
    left, right = (-1 if isinstance(size, int) and size < 0 else size for size in sizes)
    return left, right


def _unpacked(packed: Tensor, name: str, parts: int) -> Any:
    """The parts of (..., parts, nheads, headdim)."""
    if not isinstance(packed, Tensor) or packed.dim() < 4 or packed.shape[-3] != parts:
        got = tuple(packed.shape) if isinstance(packed, Tensor) else type(packed).__name__
        raise RuntimeError(f"{name}: got {got}, expected a tensor (..., {parts}, nheads, headdim)")
    return packed.unbind(-3)


def _attend(
    tensors: tuple[Tensor, Tensor, Tensor],
    edges: tuple[Tensor, Tensor] | None,
    dropout_p: float,
    softmax_scale: float | None,
    causal: bool,
    window_size: Window,
    softcap: float,
    alibi_slopes: Tensor | None,
    return_attn_probs: bool,
) -> Any:
    q, k, v = map(unit_rows, tensors)
    options = {
        "causal": causal,
        "softmax_scale": softmax_scale,
        "window_size": window(window_size),
        "softcap": softcap,
        "alibi_slopes": alibi_slopes,
        "dropout_p": dropout_p,
        "return_lse": return_attn_probs,
    }
    if return_attn_probs and dropout_p and isinstance(q, Tensor):
        options["rng_state"] = call(checks.check_dropout, dropout_p, None, q)
    if edges is None:
        result = call(attention, q, k, v, **options)
    else:
        options |= {"cu_seqlens_q": edges[0], "cu_seqlens_k": edges[1]}
        result = call(attention_varlen, q, k, v, **options)
    if not return_attn_probs:
        return result
    out, lse = result
    return out, lse, _signed_probabilities(q, k, lse, edges, options) if dropout_p else None


@torch.no_grad()
def _signed_probabilities(
    q: Tensor, k: Tensor, lse: Tensor, edges: tuple[Tensor, Tensor] | None, options: dict[str, Any]
) -> Tensor:
    """(batch, nheads, seqlen_q, seqlen_k), float32: the probabilities, negative where dropout drops them; of
    packed sequences with the longest ones' lengths, 0 beyond their own."""
    left, right = checks.check_window(options["causal"], options["window_size"])
    scale = checks.check_scale(options["softmax_scale"], q.shape[-1])
    spec = AttentionSpec(scale, left, right, options["softcap"], options["dropout_p"])
    tensors = AttentionTensors(alibi_slopes=options["alibi_slopes"], rng_state=options["rng_state"])
    if edges is None:
        return reference.signed_probabilities(q, k, lse, spec, tensors)
    of_q, of_k = (e.tolist() for e in edges)
    batch = len(of_q) - 1
    most_q, most_k = (max(e[b + 1] - e[b] for b in range(batch)) for e in (of_q, of_k))
    padded = torch.zeros(batch, q.shape[1], most_q, most_k, device=q.device)
    for b in range(batch):
        rows, keys = slice(of_q[b], of_q[b + 1]), slice(of_k[b], of_k[b + 1])
        slopes = tensors.alibi_slopes
        own = tensors if slopes is None or slopes.dim() == 1 else tensors._replace(alibi_slopes=slopes[b])
        p = reference.signed_probabilities(q[None, rows], k[None, keys], lse[None, :, rows], spec, own, b)
        padded[b, :, : p.shape[2], : p.shape[3]] = p[0]
    return padded


def flash_attn_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Window = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Any:
    """:func:`fastgpt.attention` under flash-attn's name, with its defaults: not causal.

    Args:
        q: (batch, seqlen_q, nheads, headdim). k: (batch, seqlen_k, nheads_k, headdim).
        v: (batch, seqlen_k, nheads_k, headdim_v).
        window_size: (left, right), a tuple, list or tensor; negative = unlimited.
        deterministic: it always is.
        return_attn_probs: also return lse (batch, nheads, seqlen_q), float32, and, with dropout, the
            probabilities (batch, nheads, seqlen_q, seqlen_k), negative where they are dropped, else None.

    Raises:
        RuntimeError: an argument is not as above; the message names it.
    """
    return _attend(
        (q, k, v),
        None,
        dropout_p,
        softmax_scale,
        causal,
        window_size,
        softcap,
        alibi_slopes,
        return_attn_probs,
    )


def flash_attn_qkvpacked_func(
    qkv: Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Window = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Any:
    """:func:`flash_attn_func` of qkv (batch, seqlen, 3, nheads, headdim), read where it is."""
    q, k, v = _unpacked(qkv, "qkv", 3)
    return flash_attn_func(
        q,
        k,
        v,
        dropout_p,
        softmax_scale,
        causal,
        window_size,
        softcap,
        alibi_slopes,
        deterministic,
        return_attn_probs,
    )


def flash_attn_kvpacked_func(
    q: Tensor,
    kv: Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Window = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Any:
    """:func:`flash_attn_func` of q and kv (batch, seqlen_k, 2, nheads_k, headdim), read where it is."""
    k, v = _unpacked(kv, "kv", 2)
    return flash_attn_func(
        q,
        k,
        v,
        dropout_p,
        softmax_scale,
        causal,
        window_size,
        softcap,
        alibi_slopes,
        deterministic,
        return_attn_probs,
    )


def ragged_with_kvcache(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, cu_seqlens_q: Tensor, max_seqlen_q: int, **options: Any
) -> tuple[Tensor, Tensor]:
    """:func:`fastgpt.attention_with_kvcache` of packed queries (total_q, nheads, headdim): out likewise, and
    lse (nheads, total_q). The kernel has queries at fixed places: each sequence's stand at the end of its
    row, where masks count from. The edges of CPU tensors are checked; a GPU would have to be waited for."""
    call(checks.check_tensor, "q", unit_rows(q), checks.PACKED[0])
    if q.is_cpu and not torch.compiler.is_compiling():
        edges = cu_seqlens_q.tolist()
        longest = max((end - start for start, end in itertools.pairwise(edges)), default=0)
        if edges[-1] != q.shape[0]:
            raise RuntimeError(f"cu_seqlens_q: got {edges[-1]} as its last, expected {q.shape[0]}, q's rows")
        if longest > max_seqlen_q:
            raise RuntimeError(
                f"max_seqlen_q: got {max_seqlen_q}, expected at least {longest}, the longest of cu_seqlens_q"
            )
    ends = cu_seqlens_q[1:].long()
    token = torch.arange(q.shape[0], device=q.device)
    sequence = torch.bucketize(token, ends, right=True)
    place = token - ends[sequence] + max_seqlen_q
    rows = q.new_zeros(len(ends), max_seqlen_q, *q.shape[1:])
    rows[sequence, place] = q
    out, lse = call(attention_with_kvcache, rows, k_cache, v_cache, return_lse=True, **options)
    return out[sequence, place], lse[sequence, :, place].T.contiguous()


def flash_attn_varlen_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Window = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
    block_table: Tensor | None = None,
) -> Any:
    """:func:`fastgpt.attention_varlen` under flash-attn's name, with its defaults.

    Args:
        q: (total_q, nheads, headdim). k: (total_k, nheads_k, headdim). v: (total_k, nheads_k, headdim_v).
        cu_seqlens_q, cu_seqlens_k: (batch + 1), int32.
        max_seqlen_q, max_seqlen_k: the longest sequence's lengths; read with a block_table only.
        block_table: (batch, blocks), int32: k and v are (num_blocks, page_size, nheads_k, headdim), of which
            a sequence has its first ``cu_seqlens_k[b + 1] − cu_seqlens_k[b]`` keys. No gradient, no dropout.

    The other arguments are those of :func:`flash_attn_func`; lse is (nheads, total_q).
    """
    if block_table is None:
        return _attend(
            (q, k, v),
            (cu_seqlens_q, cu_seqlens_k),
            dropout_p,
            softmax_scale,
            causal,
            window_size,
            softcap,
            alibi_slopes,
            return_attn_probs,
        )
    if dropout_p:
        raise RuntimeError(f"dropout_p: got {dropout_p}, expected 0 with a block_table")
    out, lse = ragged_with_kvcache(
        q,
        k,
        v,
        cu_seqlens_q,
        int(max_seqlen_q),
        cache_seqlens=cu_seqlens_k[1:] - cu_seqlens_k[:-1],
        block_table=block_table,
        causal=causal,
        window_size=window(window_size),
        softmax_scale=softmax_scale,
        softcap=softcap,
        alibi_slopes=alibi_slopes,
    )
    return (out, lse, None) if return_attn_probs else out


def flash_attn_varlen_qkvpacked_func(
    qkv: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Window = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Any:
    """:func:`flash_attn_varlen_func` of qkv (total, 3, nheads, headdim), read where it is."""
    q, k, v = _unpacked(qkv, "qkv", 3)
    return flash_attn_varlen_func(
        q,
        k,
        v,
        cu_seqlens,
        cu_seqlens,
        max_seqlen,
        max_seqlen,
        dropout_p,
        softmax_scale,
        causal,
        window_size,
        softcap,
        alibi_slopes,
        deterministic,
        return_attn_probs,
    )


def flash_attn_varlen_kvpacked_func(
    q: Tensor,
    kv: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Window = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Any:
    """:func:`flash_attn_varlen_func` of q and kv (total_k, 2, nheads_k, headdim), read where it is."""
    k, v = _unpacked(kv, "kv", 2)
    return flash_attn_varlen_func(
        q,
        k,
        v,
        cu_seqlens_q,
        cu_seqlens_k,
        max_seqlen_q,
        max_seqlen_k,
        dropout_p,
        softmax_scale,
        causal,
        window_size,
        softcap,
        alibi_slopes,
        deterministic,
        return_attn_probs,
    )


def flash_attn_with_kvcache(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    k: Tensor | None = None,
    v: Tensor | None = None,
    rotary_cos: Tensor | None = None,
    rotary_sin: Tensor | None = None,
    cache_seqlens: Tensor | int | None = None,
    cache_batch_idx: Tensor | None = None,
    cache_leftpad: Tensor | None = None,
    block_table: Tensor | None = None,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Window = (-1, -1),
    softcap: float = 0.0,
    rotary_interleaved: bool = True,
    alibi_slopes: Tensor | None = None,
    num_splits: int = 0,
    return_softmax_lse: bool = False,
) -> Any:
    """:func:`fastgpt.attention_with_kvcache` under flash-attn's name, with its defaults: not causal.

    Args:
        cache_seqlens: an int, (batch,) int32, or None: the whole cache is keys, and nothing can be appended.

    Returns:
        out (batch, seqlen_q, nheads, headdim_v); with ``return_softmax_lse`` also lse
        (batch, nheads, seqlen_q).

    Raises:
        RuntimeError: an argument is not as :func:`fastgpt.attention_with_kvcache` wants it; the message
            names it.
    """
    if cache_seqlens is None:
        if k is not None:
            raise RuntimeError(
                "cache_seqlens: got None, expected where in the cache k and v are to be appended"
            )
        pages = 1 if block_table is None else block_table.shape[1]
        cache_seqlens = k_cache.shape[1] * pages
    return call(
        attention_with_kvcache,
        unit_rows(q),
        k_cache,
        v_cache,
        unit_rows(k),
        unit_rows(v),
        cache_seqlens=cache_seqlens,
        causal=causal,
        window_size=window(window_size),
        softmax_scale=softmax_scale,
        softcap=softcap,
        alibi_slopes=alibi_slopes,
        rotary_cos=unit_rows(rotary_cos),
        rotary_sin=unit_rows(rotary_sin),
        rotary_interleaved=rotary_interleaved,
        cache_batch_idx=cache_batch_idx,
        cache_leftpad=cache_leftpad,
        block_table=block_table,
        return_lse=return_softmax_lse,
        num_splits=num_splits,
    )
