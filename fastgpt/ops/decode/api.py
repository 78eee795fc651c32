"""``fastgpt.attention_with_kvcache``."""

from __future__ import annotations

import torch
from torch import Tensor

from fastgpt import dispatch
from fastgpt.ops import checks
from fastgpt.ops.decode import library  # noqa: F401  registers the operator
from fastgpt.ops.decode.spec import DecodeCall

MAX_SPLITS = 1024


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
    if k.shape[1] > k_cache.shape[1]:
        raise ValueError(f"k: got {k.shape[1]} new keys, expected at most the capacity {k_cache.shape[1]}")


def _lengths(cache_seqlens: Tensor | int, q: Tensor) -> Tensor:
    if isinstance(cache_seqlens, int) and not isinstance(cache_seqlens, bool):
        if not 0 <= cache_seqlens <= checks.INT32_MAX:
            raise ValueError(f"cache_seqlens: got {cache_seqlens}, expected 0 to the cache's capacity")
        return torch.full((q.shape[0],), cache_seqlens, dtype=torch.int32, device=q.device)
    if not isinstance(cache_seqlens, Tensor):
        kind = type(cache_seqlens).__name__
        raise TypeError(f"cache_seqlens: got {kind}, expected an int or an int32 tensor (batch,)")
    if cache_seqlens.dtype != torch.int32 or cache_seqlens.shape != (q.shape[0],):
        raise ValueError(
            f"cache_seqlens: got {cache_seqlens.dtype} {tuple(cache_seqlens.shape)}, "
            f"expected torch.int32 ({q.shape[0]},)"
        )
    if cache_seqlens.device != q.device:
        raise ValueError(f"cache_seqlens: got device {cache_seqlens.device}, expected {q.device} like q")
    if not cache_seqlens.is_contiguous():
        raise ValueError(f"cache_seqlens: got stride {cache_seqlens.stride()}, expected contiguous")
    return cache_seqlens


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
    return_lse: bool = False,
    num_splits: int = 0,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Attention of new queries over a KV cache, after appending their keys and values to it in place.

    The keys are split over threads where batch × heads is small, and all query heads of a group are
    served by one pass over their keys (Flash-Decoding, Dao et al. 2023). For inference: no backward.

    Args:
        q: (batch, seqlen_q, nheads, headdim), float32, bfloat16 or float16 (float64 on ``reference``).
        k_cache: (batch, capacity, nheads_k, headdim). Any strides whose last is 1.
        v_cache: (batch, capacity, nheads_k, headdim_v).
        k, v: (batch, seqlen_new, nheads_k, headdim / headdim_v), written to the cache at
            ``cache_seqlens[b] : cache_seqlens[b] + seqlen_new`` first; None to append nothing.
        cache_seqlens: (batch), int32, or one int for all: the keys in the cache before the append. Not
            changed; what lies in the cache behind a sequence's keys is never read.
        causal: bottom-right aligned: the last query sees every key of its sequence,
            ``cache_seqlens[b] + seqlen_new`` of them.
        window_size: (left, right) in keys, as in :func:`fastgpt.attention`; −1 = unlimited.
        softmax_scale: factor of q·k; default ``headdim ** −0.5``.
        return_lse: also return the log-sum-exp of each row's scores.
        num_splits: into how many parts the keys of a sequence are cut. 0: parts of a fixed size, so that
            the result depends neither on the batch nor on the number of threads.
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
    checks.check_qkv(q, k_cache, v_cache, packed=False, names=("q", "k_cache", "v_cache"))
    _check_new(k, v, q, k_cache, v_cache)
    lengths = _lengths(cache_seqlens, q)
    left, right = checks.check_window(causal, window_size)
    scale = checks.check_scale(softmax_scale, q.shape[-1])
    if isinstance(num_splits, bool) or not isinstance(num_splits, int):
        raise TypeError(f"num_splits: got {num_splits!r}, expected an integer")
    if not 0 <= num_splits <= MAX_SPLITS:
        raise ValueError(f"num_splits: got {num_splits}, expected 0 (automatic) to {MAX_SPLITS}")
    if torch.is_grad_enabled() and any(
        t is not None and t.requires_grad for t in (q, k_cache, v_cache, k, v)
    ):
        raise RuntimeError("attention_with_kvcache has no backward: call it under torch.no_grad()")
    asked = dispatch.requested(backend)
    features = (("window",) if left >= 0 or right > 0 else ()) + (("lse",) if return_lse else ())
    headdims = checks.concrete(q.shape[-1]), checks.concrete(v_cache.shape[-1])
    name = dispatch.choose(asked, DecodeCall, q.device.type, q.dtype, *headdims, features)
    if name == "reference":
        dispatch.warn_if_slow(asked, "decode", q.numel() // q.shape[-1] * k_cache.shape[1], stacklevel=3)
    out, lse = torch.ops.fastgpt.attention_kvcache.default(
        q, k_cache, v_cache, k, v, lengths, scale, left, right, num_splits, name
    )
    return (out, lse) if return_lse else out
