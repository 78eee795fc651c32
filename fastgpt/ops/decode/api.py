"""``fastgpt.attention_with_kvcache``."""

from __future__ import annotations

import torch
from torch import Tensor

from fastgpt import dispatch
from fastgpt.ops import checks
from fastgpt.ops.decode import library
from fastgpt.ops.decode.spec import FEATURES, DecodeCall, DecodeSpec, DecodeTensors, capacity, used

MAX_SPLITS = 1024
_passed: set[checks.Signature] = set()


def _check_new(k: Tensor | None, v: Tensor | None, q: Tensor, k_cache: Tensor, v_cache: Tensor) -> None:
    if (k is None) != (v is None):
        raise ValueError(f"{'k' if k is None else 'v'}: got None, expected k and v together or neither")
    if k is None or v is None:
        return
    for name, new, cache, axes in (("k", k, k_cache, checks.K), ("v", v, v_cache, checks.V)):
        checks.check_tensor(name, new, axes)
        checks.check_same(name, new, q)
        expected = (q.shape[0], k.shape[1], *cache.shape[2:])
        if 0 in cache.stride() and cache.numel():
            raise ValueError(
                f"{name}_cache: got strides {cache.stride()}, expected no 0, "
                "which writes several keys to one place"
            )
        if new.shape != expected:
            raise ValueError(f"{name}: got shape {tuple(new.shape)}, expected {expected} to fit the cache")


def _check_rotary(tensors: DecodeTensors, q: Tensor) -> None:
    cos, sin = tensors.rotary_cos, tensors.rotary_sin
    if (cos is None) != (sin is None):
        missing = "rotary_cos" if cos is None else "rotary_sin"
        raise ValueError(f"{missing}: got None, expected rotary_cos and rotary_sin together or neither")
    if cos is None or sin is None:
        return
    if tensors.k is None:
        raise ValueError("rotary_cos: got a tensor, expected None without new keys k and v to rotate")
    headdim = q.shape[-1]
    for name, t in (("rotary_cos", cos), ("rotary_sin", sin)):
        checks.check_tensor(name, t, "(positions, rotary_dim / 2)")
        if not 1 <= t.shape[1] <= headdim // 2 or t.shape != cos.shape:
            raise ValueError(
                f"{name}: got shape {checks.shape_of(t)}, expected (positions, rotary_dim / 2) with "
                f"rotary_dim at most the headdim {headdim}, the same for both"
            )
        if t.device != q.device:
            raise ValueError(f"{name}: got device {t.device}, expected {q.device} like q")


def _check_options(q: Tensor, k_cache: Tensor, tensors: DecodeTensors) -> None:
    """Everything that a plain call does not have."""
    (batch, _, nheads, _), nheads_k = q.shape, k_cache.shape[2]
    checks.check_indices("cache_batch_idx", tensors.cache_batch_idx, q.shape[0], q)
    checks.check_indices("cache_leftpad", tensors.cache_leftpad, q.shape[0], q)
    checks.check_indices("block_table", tensors.block_table, q.shape[0], q, "(batch, blocks)")
    if tensors.block_table is not None and k_cache.shape[1] < 1:
        raise ValueError("k_cache: got page_size 0, expected at least 1 with a block_table")
    if tensors.block_table is not None and tensors.cache_batch_idx is not None:
        raise ValueError("cache_batch_idx: got a tensor, expected None with a block_table")
    checks.check_per_head("alibi_slopes", tensors.alibi_slopes, batch, nheads, True, q)
    checks.check_per_head("sink", tensors.sink, batch, nheads, False, q)
    quantized = k_cache.dtype in checks.QUANTIZED
    for name, t in (("k_descale", tensors.k_descale), ("v_descale", tensors.v_descale)):
        checks.check_per_head(name, t, batch, nheads_k, True, q)
        if (t is None) == quantized:
            expected = "a tensor with" if quantized else "None without"
            raise ValueError(
                f"{name}: got {'None' if t is None else 'a tensor'}, expected {expected} a cache in int8 or "
                f"float8_e4m3fn; it is in {str(k_cache.dtype).removeprefix('torch.')}"
            )
    k_descale, v_descale = tensors.k_descale, tensors.v_descale
    if k_descale is not None and v_descale is not None and v_descale.shape != k_descale.shape:
        raise ValueError(
            f"v_descale: got shape {checks.shape_of(v_descale)}, "
            f"expected {checks.shape_of(k_descale)} like k_descale"
        )


def _check_tensors(q: Tensor, k_cache: Tensor, v_cache: Tensor, tensors: DecodeTensors) -> None:
    own_batch = tensors.block_table is not None or tensors.cache_batch_idx is not None
    names = ("q", "k_cache", "v_cache")
    checks.check_qkv(q, k_cache, v_cache, packed=False, names=names, caches=True, own_batch=own_batch)
    _check_new(tensors.k, tensors.v, q, k_cache, v_cache)
    checks.check_indices("cache_seqlens", tensors.cache_seqlens, q.shape[0], q)
    _check_options(q, k_cache, tensors)
    _check_rotary(tensors, q)
    if tensors.k is not None and tensors.k.shape[1] > (most := capacity(k_cache, tensors)):
        raise ValueError(f"k: got {tensors.k.shape[1]} new keys, expected at most the capacity {most}")


def _lengths(cache_seqlens: object, q: Tensor) -> Tensor:
    """(batch), int32, of one length for all."""
    if isinstance(cache_seqlens, bool) or not isinstance(cache_seqlens, int):
        kind = type(cache_seqlens).__name__
        raise TypeError(f"cache_seqlens: got {kind}, expected an int or an int32 tensor (batch,)")
    if not 0 <= cache_seqlens <= checks.INT32_MAX:
        raise ValueError(f"cache_seqlens: got {cache_seqlens}, expected 0 to the cache's capacity")
    checks.check_tensor("q", q, checks.Q)
    return torch.full((q.shape[0],), cache_seqlens, dtype=torch.int32, device=q.device)


def attention_with_kvcache(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    k: Tensor | None = None,
    v: Tensor | None = None,
    *,
    cache_seqlens: Tensor | int,
    causal: bool = True,
    window_size: tuple[int, int] = (-1, -1),
    softmax_scale: float | None = None,
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    sink: Tensor | None = None,
    rotary_cos: Tensor | None = None,
    rotary_sin: Tensor | None = None,
    rotary_interleaved: bool = True,
    cache_batch_idx: Tensor | None = None,
    cache_leftpad: Tensor | None = None,
    block_table: Tensor | None = None,
    k_descale: Tensor | None = None,
    v_descale: Tensor | None = None,
    return_lse: bool = False,
    num_splits: int = 0,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Attention of new queries over a KV cache, after appending their keys and values to it in place.

    The keys are split over threads where batch × heads is small, and all query heads of a group are
    served by one pass over their keys (Flash-Decoding, Dao et al. 2023). For inference: no backward.

    Args:
        q: (batch, seqlen_q, nheads, headdim), float32, bfloat16 or float16 (float64 on ``reference``).
        k_cache: (batch, capacity, nheads_k, headdim), in q's dtype, int8 or float8_e4m3fn. Any strides whose
            last is 1. With a block_table (num_blocks, page_size, nheads_k, headdim), any page_size.
        v_cache: the same with headdim_v, in k_cache's dtype.
        k, v: (batch, seqlen_new, nheads_k, headdim / headdim_v), written to the cache at
            ``cache_seqlens[b] : cache_seqlens[b] + seqlen_new`` first; None to append nothing.
        cache_seqlens: (batch), int32, or one int for all: the keys in the cache before the append. Not
            changed; what lies in the cache behind a sequence's keys is never read.
        causal: bottom-right aligned: the last query sees every key of its sequence,
            ``cache_seqlens[b] + seqlen_new`` of them.
        window_size: (left, right) in keys, as in :func:`fastgpt.attention`; −1 = unlimited.
        softmax_scale: factor of q·k; default ``headdim ** −0.5``.
        softcap, alibi_slopes, sink: as in :func:`fastgpt.attention`.
        rotary_cos, rotary_sin: (positions, rotary_dim / 2), float32 or q's dtype: q and the new keys are
            rotated by the row of their position (Su et al. 2021, arXiv:2104.09864), where the first
            new key and query of sequence b have ``cache_seqlens[b]``, padding included. Without causal or a
            window all queries have that position. Elements from rotary_dim on stay as they are.
        rotary_interleaved: pairs are neighbours, x[2i] and x[2i + 1] (GPT-J); else x[i] and
            x[i + rotary_dim / 2] (GPT-NeoX, Llama).
        cache_batch_idx: (batch), int32: the sequence of the caches that belongs to each of q.
        cache_leftpad: (batch), int32: rows before a sequence's first key, counted by cache_seqlens.
        block_table: (batch, blocks), int32: row r of sequence b is row ``r % page_size`` of block
            ``block_table[b, r // page_size]`` (PagedAttention, Kwon et al. 2023, arXiv:2309.06180).
        k_descale, v_descale: (nheads_k) or (batch, nheads_k), float32: what the elements of a cache in int8
            or float8_e4m3fn are multiplied by. New ones are divided by it, rounded to nearest and saturated.
        return_lse: also return the log-sum-exp of each row's scores.
        num_splits: into how many parts the keys of a sequence are cut. 0: on the CPU parts of a fixed size,
            so that the result depends neither on the batch nor on the number of threads; on a GPU as many
            as keep it busy, which depends on shapes, the batch's too, and, with ``cuda``, on all its lengths.
        backend: ``auto``, ``cpu``, ``torch``, ``reference``, ``triton`` or ``cuda``; default
            ``FASTGPT_BACKEND``, else ``auto``.

    Returns:
        out (batch, seqlen_q, nheads, headdim_v) in q's dtype; with ``return_lse`` also lse
        (batch, nheads, seqlen_q), float32, natural logarithm. A row that sees no key gives 0 and −inf.

    Raises:
        ValueError, TypeError: an argument is not as above, or (on the CPU) a sequence would not fit the
            cache; the message names it and nothing has been written.
        RuntimeError: a gradient would be needed.
        fastgpt.BackendUnsupported: the backend asked for cannot serve the call; the message says why.
    """
    tensors = DecodeTensors(
        k,
        v,
        cache_seqlens if isinstance(cache_seqlens, Tensor) else _lengths(cache_seqlens, q),
        rotary_cos,
        rotary_sin,
        cache_batch_idx,
        cache_leftpad,
        block_table,
        alibi_slopes,
        sink,
        k_descale,
        v_descale,
    )
    signature = checks.signature(q, k_cache, v_cache, *tensors)
    if signature is None or signature not in _passed:
        _check_tensors(q, k_cache, v_cache, tensors)
        checks.remember(_passed, signature)
    left, right = checks.check_window(causal, window_size)
    scale = checks.check_scale(softmax_scale, q.shape[-1])
    if softcap != 0:
        checks.check_softcap(softcap)
    if isinstance(num_splits, bool) or not isinstance(num_splits, int):
        raise TypeError(f"num_splits: got {num_splits!r}, expected an integer")
    if not 0 <= num_splits <= MAX_SPLITS:
        raise ValueError(f"num_splits: got {num_splits}, expected 0 (automatic) to {MAX_SPLITS}")
    if not isinstance(rotary_interleaved, bool):
        raise TypeError(f"rotary_interleaved: got {rotary_interleaved!r}, expected True or False")
    if checks.needs_autograd(q, k_cache, v_cache, *tensors):
        raise RuntimeError("attention_with_kvcache has no backward: call it under torch.no_grad()")
    spec = DecodeSpec(scale, left, right, float(softcap), rotary_interleaved, num_splits)
    asked = dispatch.requested(backend)
    headdims = checks.concrete(q.shape[-1]), checks.concrete(v_cache.shape[-1])
    uses = used(spec, tensors, return_lse)
    name = dispatch.choose(asked, DecodeCall, FEATURES, uses, checks.device_type(q), q.dtype, *headdims)
    if name == "reference":
        elements = q.numel() // q.shape[-1] * capacity(k_cache, tensors)
        dispatch.warn_if_slow(asked, "decode", elements, stacklevel=3)
    direct = not (signature is None or checks.watched())
    out, lse = library.run(direct, q, k_cache, v_cache, spec, tensors, name)
    return (out, lse) if return_lse else out
