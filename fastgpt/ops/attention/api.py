"""``fastgpt.attention`` and ``fastgpt.attention_varlen``."""

from __future__ import annotations

import torch
from torch import Tensor

from fastgpt import dispatch
from fastgpt.ops import checks
from fastgpt.ops.attention import library
from fastgpt.ops.attention.spec import FEATURES, AttentionCall, AttentionSpec, AttentionTensors, used
from fastgpt.ops.attention.torch import scaled_dot_product_attention

_passed: set[checks.Signature] = set()
_passed_packed: set[checks.Signature] = set()


def _check_bias(bias: Tensor, shape: tuple[int, int, int, int], q: Tensor) -> None:
    if bias.dim() != 4 or any(a not in (1, b) for a, b in zip(bias.shape, shape, strict=True)):
        raise ValueError(
            f"attn_bias: got shape {checks.shape_of(bias)}, expected {shape} or 1 in any of its places"
        )
    if bias.dtype != torch.bool and not bias.dtype.is_floating_point:
        raise TypeError(f"attn_bias: got dtype {bias.dtype}, expected bool or floating point")
    if bias.device != q.device:
        raise ValueError(f"attn_bias: got device {bias.device}, expected {q.device} like q")


def _check_edges(name: str, edges: object, like: Tensor | None, q: Tensor) -> None:
    if not isinstance(edges, Tensor):
        raise TypeError(f"{name}: got {type(edges).__name__}, expected a torch.Tensor (batch + 1)")
    if edges.dim() != 1 or edges.shape[0] < 2 or (like is not None and edges.shape != like.shape):
        raise ValueError(
            f"{name}: got shape {checks.shape_of(edges)}, expected (batch + 1,), the same for q and k"
        )
    if edges.dtype != torch.int32 or edges.device != q.device:
        raise TypeError(f"{name}: got {edges.dtype} on {edges.device}, expected int32 on {q.device}")


def _check_tensors(q: Tensor, k: Tensor, v: Tensor, tensors: AttentionTensors, packed: bool) -> None:
    checks.check_qkv(q, k, v, packed)
    batch, nheads = q.shape[0], q.shape[-2]
    if packed:
        _check_edges("cu_seqlens_q", tensors.cu_seqlens_q, None, q)
        _check_edges("cu_seqlens_k", tensors.cu_seqlens_k, tensors.cu_seqlens_q, q)
        batch = tensors.cu_seqlens_q.shape[0] - 1  # type: ignore[union-attr]
    checks.check_indices("seqused_k", tensors.seqused_k, batch, q)
    checks.check_indices("leftpad_k", tensors.leftpad_k, batch, q)
    checks.check_per_head("alibi_slopes", tensors.alibi_slopes, batch, nheads, True, q)
    checks.check_per_head("sink", tensors.sink, batch, nheads, False, q)
    checks.check_optional("attn_bias", tensors.attn_bias, "(batch, nheads, seqlen_q, seqlen_k)")
    if tensors.attn_bias is not None:
        _check_bias(tensors.attn_bias, (batch, nheads, q.shape[1], k.shape[1]), q)


def _attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    tensors: AttentionTensors,
    packed: bool,
    causal: bool,
    softmax_scale: float | None,
    window_size: tuple[int, int],
    softcap: float,
    dropout_p: float,
    return_lse: bool,
    backend: str | None,
) -> Tensor | tuple[Tensor, Tensor]:
    signature = checks.signature(q, k, v, *tensors)
    passed = _passed_packed if packed else _passed
    if signature is None or signature not in passed:
        if (dtype := checks.differ_under_autocast(q, k, v)) is not None:
            q, k, v = q.to(dtype), k.to(dtype), v.to(dtype)
            signature = checks.signature(q, k, v, *tensors)
        _check_tensors(q, k, v, tensors, packed)
        checks.remember(passed, signature)
    left, right = checks.check_window(causal, window_size)
    if softcap != 0:
        checks.check_softcap(softcap)
    if type(dropout_p) is not float or dropout_p != 0 or tensors.rng_state is not None:
        rng_state = checks.check_dropout(dropout_p, tensors.rng_state, q)
        tensors = tensors._replace(rng_state=rng_state)
    slopes = tensors.alibi_slopes
    if slopes is not None and slopes.requires_grad and torch.is_grad_enabled():
        raise ValueError("alibi_slopes: got requires_grad=True, expected False: they have no gradient")
    spec = AttentionSpec(
        checks.check_scale(softmax_scale, q.shape[-1]),
        left,
        right,
        float(softcap),
        float(dropout_p),
        slopes is not None,
        tensors.sink is not None,
        tensors.attn_bias is not None,
        packed,
        tensors.seqused_k is not None or tensors.leftpad_k is not None,
    )
    backward = checks.needs_autograd(q, k, v, tensors.sink, tensors.attn_bias)
    asked = dispatch.requested(backend)
    headdims = checks.concrete(q.shape[-1]), checks.concrete(v.shape[-1])
    uses = used(spec, return_lse, backward)
    name = dispatch.choose(asked, AttentionCall, FEATURES, uses, checks.device_type(q), q.dtype, *headdims)
    if name == "reference":
        dispatch.warn_if_slow(asked, "attention", q.numel() // q.shape[-1] * k.shape[-3], stacklevel=4)
    elif name == "torch":
        with checks.own_precision(q):
            return scaled_dot_product_attention(q, k, v, spec, tensors)
    direct = not (signature is None or backward or checks.watched())
    out, lse = library.run(direct, q, k, v, spec, tensors, name)
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

    DTensors sharded by batch or by heads are computed where they are, forward and backward; where the ranks
    do not divide the heads of k, the sequences are sharded, or with dropout, DTensor redistributes first. All
    tensors of a call have to be DTensors then. Under torch.func.vmap the samples are sequences of one call,
    or each is a call, where they share one of q, k and v or have any of the optional tensors.

    Args:
        q: (batch, seqlen_q, nheads, headdim), float32, bfloat16, float16 (float64 on ``reference``).
            Any strides whose last is 1.
        k: (batch, seqlen_k, nheads_k, headdim); nheads is a multiple of nheads_k (GQA, MQA).
        v: (batch, seqlen_k, nheads_k, headdim_v). Under torch.autocast, q, k and v of different dtypes are
            taken in its own; those of one dtype stay in it.
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
            if bool, True where a key is visible. But on ``reference``, a row hidden only by finite numbers
            beyond about 1e6 (a float mask of -1e9 everywhere, say) has the right output but no usable
            gradient: hide by -inf or by a boolean mask.
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
    tensors = AttentionTensors(None, None, seqused_k, leftpad_k, alibi_slopes, sink, attn_bias, rng_state)
    scalars = (causal, softmax_scale, window_size, softcap, dropout_p, return_lse, backend)
    return _attend(q, k, v, tensors, False, *scalars)


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
    tensors = AttentionTensors(
        cu_seqlens_q, cu_seqlens_k, seqused_k, leftpad_k, alibi_slopes, sink, None, rng_state
    )
    scalars = (causal, softmax_scale, window_size, softcap, dropout_p, return_lse, backend)
    return _attend(q, k, v, tensors, True, *scalars)
