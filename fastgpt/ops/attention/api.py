"""``fastgpt.attention`` and ``fastgpt.attention_varlen``."""

from __future__ import annotations

import torch
from torch import Tensor

from fastgpt import dispatch
from fastgpt.ops import checks
from fastgpt.ops.attention import library
from fastgpt.ops.attention.spec import FEATURES, AttentionCall, AttentionSpec, AttentionTensors, used
from fastgpt.ops.attention.torch import scaled_dot_product_attention


def _check_options(
    q: Tensor,
    batch: int,
    seqused_k: Tensor | None,
    leftpad_k: Tensor | None,
    softcap: float,
    dropout_p: float,
    alibi_slopes: Tensor | None,
    sink: Tensor | None,
    attn_bias: Tensor | None,
    rng_state: Tensor | None,
    bias_shape: tuple[int, int, int, int] | None,
) -> Tensor | None:
    """Checks the rest of the specification; returns the dropout state, drawn if none was given."""
    tensors = (seqused_k, leftpad_k, alibi_slopes, sink, attn_bias)
    if softcap == 0 and dropout_p == 0 and all(t is None for t in (*tensors, rng_state)):
        return None
    nheads = q.shape[-2]
    checks.check_indices("seqused_k", seqused_k, batch, q)
    checks.check_indices("leftpad_k", leftpad_k, batch, q)
    checks.check_softcap(softcap)
    checks.check_per_head("alibi_slopes", alibi_slopes, batch, nheads, True, q)
    checks.check_per_head("sink", sink, batch, nheads, False, q)
    if alibi_slopes is not None and alibi_slopes.requires_grad and torch.is_grad_enabled():
        raise ValueError("alibi_slopes: got requires_grad=True, expected False: they have no gradient")
    checks.check_optional("attn_bias", attn_bias, "(batch, nheads, seqlen_q, seqlen_k)")
    if attn_bias is not None:
        if bias_shape is None:
            raise ValueError("attn_bias: got a tensor, expected None with packed sequences")
        if attn_bias.dim() != 4 or any(
            a not in (1, b) for a, b in zip(attn_bias.shape, bias_shape, strict=True)
        ):
            raise ValueError(
                f"attn_bias: got shape {checks.shape_of(attn_bias)}, "
                f"expected {bias_shape} or 1 in any of its places"
            )
        if attn_bias.dtype != torch.bool and not attn_bias.dtype.is_floating_point:
            raise TypeError(f"attn_bias: got dtype {attn_bias.dtype}, expected bool or floating point")
        if attn_bias.device != q.device:
            raise ValueError(f"attn_bias: got device {attn_bias.device}, expected {q.device} like q")
    return checks.check_dropout(dropout_p, rng_state, q.device)


def _run(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    spec: AttentionSpec,
    tensors: AttentionTensors,
    return_lse: bool,
    backend: str | None,
) -> Tensor | tuple[Tensor, Tensor]:
    inputs = (q, k, v, tensors.sink, tensors.attn_bias)
    backward = checks.needs_autograd(*inputs)
    asked = dispatch.requested(backend)
    headdims = checks.concrete(q.shape[-1]), checks.concrete(v.shape[-1])
    uses = used(spec, return_lse, backward)
    name = dispatch.choose(asked, AttentionCall, FEATURES, uses, checks.device_type(q), q.dtype, *headdims)
    if name == "reference":
        dispatch.warn_if_slow(asked, "attention", q.numel() // q.shape[-1] * k.shape[-3], stacklevel=4)
    elif name == "torch":
        with checks.own_precision(q):
            return scaled_dot_product_attention(q, k, v, spec, tensors)
    out, lse = library.run(backward, q, k, v, *library.pack(spec, tensors, name))
    return (out, lse) if return_lse else out


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool = True,
    softmax_scale: float | None = None,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    sink: Tensor | None = None,
    attn_bias: Tensor | None = None,
    dropout_p: float = 0.0,
    rng_state: Tensor | None = None,
    seqused_k: Tensor | None = None,
    leftpad_k: Tensor | None = None,
    return_lse: bool = False,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Fused attention, ``softmax(softmax_scale · q kᵀ + mask) v``, with its backward.

    No (seqlen_q, seqlen_k) matrix is stored (FlashAttention, Dao et al. 2022, arXiv:2205.14135).

    Args:
        q: (batch, seqlen_q, nheads, headdim), float32, bfloat16, float16 (float64 on ``reference``).
            Any strides whose last is 1.
        k: (batch, seqlen_k, nheads_k, headdim); nheads is a multiple of nheads_k (GQA, MQA).
        v: (batch, seqlen_k, nheads_k, headdim_v).
        causal: key j is visible to query i iff ``j <= i + seqlen_k − seqlen_q`` (the last query
            sees the last key): for seqlen_q = 2 and seqlen_k = 5 the mask is ``1 1 1 1 0 / 1 1 1 1 1``.
        softmax_scale: factor of q·k; default ``headdim ** −0.5``.
        window_size: (left, right): only keys with
            ``i + seqlen_k − seqlen_q − left <= j <= i + seqlen_k − seqlen_q + right`` are visible;
            −1 = unlimited. With ``causal``, right is 0 whatever is given.
        softcap: the scores become ``softcap · tanh(scores / softcap)``; 0 = off.
        alibi_slopes: (nheads) or (batch, nheads), float32: ``−slope · |i + seqlen_k − seqlen_q − j|`` is
            added (Press et al. 2021, arXiv:2108.12409).
        sink: (nheads), float32: a logit that joins the softmax's denominator only.
        attn_bias: (batch, nheads, seqlen_q, seqlen_k) or 1 in any place; added to the scores, or,
            if bool, True where a key is visible.
        dropout_p: probability of dropping a softmax probability.
        rng_state: (2), int64: Philox seed and offset of the dropout; drawn from torch's generator if None.
        seqused_k: (batch), int32: how many rows of k and v each sequence uses; None for all.
        leftpad_k: (batch), int32: how many of these are padding before the sequence's first key. The keys
            are the rows ``leftpad_k[b] : seqused_k[b]``, and alignment, windows, ALiBi and dropout count
            from the first of them (attn_bias has a place for every row). Other rows get gradient 0.
        return_lse: also return the log-sum-exp of each row's scores.
        backend: ``auto``, ``cpu``, ``torch``, ``reference``, ``triton`` or ``cuda``; default
            ``FASTGPT_BACKEND``, else ``auto``.

    Returns:
        out (batch, seqlen_q, nheads, headdim_v) in q's dtype; with ``return_lse`` also lse
        (batch, nheads, seqlen_q), float32, natural logarithm. A row that sees no key gives 0 and −inf.

    Raises:
        ValueError, TypeError: an argument is not as above; the message names it.
        fastgpt.BackendUnsupported: the backend asked for cannot serve the call; the message says why.
    """
    checks.check_qkv(q, k, v, packed=False)
    left, right = checks.check_window(causal, window_size)
    (batch, seqlen_q, nheads, headdim), seqlen_k = q.shape, k.shape[1]
    bias_shape = (batch, nheads, seqlen_q, seqlen_k)
    rng_state = _check_options(
        q,
        batch,
        seqused_k,
        leftpad_k,
        softcap,
        dropout_p,
        alibi_slopes,
        sink,
        attn_bias,
        rng_state,
        bias_shape,
    )
    spec = AttentionSpec(
        checks.check_scale(softmax_scale, headdim),
        left,
        right,
        float(softcap),
        float(dropout_p),
        alibi=alibi_slopes is not None,
        sink=sink is not None,
        bias=attn_bias is not None,
        key_ranges=seqused_k is not None or leftpad_k is not None,
    )
    tensors = AttentionTensors(None, None, seqused_k, leftpad_k, alibi_slopes, sink, attn_bias, rng_state)
    return _run(q, k, v, spec, tensors, return_lse, backend)


def attention_varlen(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    causal: bool = True,
    softmax_scale: float | None = None,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    sink: Tensor | None = None,
    dropout_p: float = 0.0,
    rng_state: Tensor | None = None,
    seqused_k: Tensor | None = None,
    leftpad_k: Tensor | None = None,
    return_lse: bool = False,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """:func:`attention` over sequences packed one after the other.

    Args:
        q: (total_q, nheads, headdim). k: (total_k, nheads_k, headdim). v: (total_k, nheads_k, headdim_v).
        cu_seqlens_q: (batch + 1), int32: the queries of sequence b are
            ``cu_seqlens_q[b] : cu_seqlens_q[b + 1]``.
        cu_seqlens_k: (batch + 1), int32, likewise for keys.

    The other arguments are those of :func:`attention`.

    Returns:
        out (total_q, nheads, headdim_v); with ``return_lse`` also lse (nheads, total_q), float32.

    Raises:
        ValueError, TypeError: an argument is not as above; the message names it.
        fastgpt.BackendUnsupported: the backend asked for cannot serve the call; the message says why.
    """
    checks.check_qkv(q, k, v, packed=True)
    left, right = checks.check_window(causal, window_size)
    for name, edges in (
        ("cu_seqlens_q", cu_seqlens_q),
        ("cu_seqlens_k", cu_seqlens_k),
    ):
        if not isinstance(edges, Tensor):
            raise TypeError(f"{name}: got {type(edges).__name__}, expected a torch.Tensor (batch + 1)")
        if edges.dim() != 1 or edges.shape[0] < 2 or edges.shape != cu_seqlens_q.shape:
            raise ValueError(
                f"{name}: got shape {checks.shape_of(edges)}, expected (batch + 1,), the same for q and k"
            )
        if edges.dtype != torch.int32 or edges.device != q.device:
            raise TypeError(f"{name}: got {edges.dtype} on {edges.device}, expected int32 on {q.device}")
    batch = cu_seqlens_q.shape[0] - 1
    rng_state = _check_options(
        q, batch, seqused_k, leftpad_k, softcap, dropout_p, alibi_slopes, sink, None, rng_state, None
    )
    spec = AttentionSpec(
        checks.check_scale(softmax_scale, q.shape[-1]),
        left,
        right,
        float(softcap),
        float(dropout_p),
        alibi=alibi_slopes is not None,
        sink=sink is not None,
        varlen=True,
        key_ranges=seqused_k is not None or leftpad_k is not None,
    )
    tensors = AttentionTensors(
        cu_seqlens_q, cu_seqlens_k, seqused_k, leftpad_k, alibi_slopes, sink, None, rng_state
    )
    return _run(q, k, v, spec, tensors, return_lse, backend)
