"""``fastgpt.rotary_embedding``."""

from __future__ import annotations

import torch
from torch import Tensor

from fastgpt import dispatch
from fastgpt.ops import checks
from fastgpt.ops.rotary import library
from fastgpt.ops.rotary.spec import FEATURES, RotaryCall, RotarySpec, RotaryTensors
from fastgpt.ops.rotary.torch import composite

BATCHED, PACKED = "(batch, seqlen, nheads, headdim)", "(total, nheads, headdim)"
_passed: set[checks.Signature] = set()


def _check_tables(x: Tensor, cos: Tensor, sin: Tensor) -> None:
    headdim = x.shape[-1]
    for name, t in (("cos", cos), ("sin", sin)):
        checks.check_tensor(name, t, "(positions, rotary_dim / 2)")
        if t.shape != cos.shape or not 1 <= t.shape[1] <= headdim // 2:
            raise ValueError(
                f"{name}: got shape {checks.shape_of(t)}, expected (positions, rotary_dim / 2) with "
                f"rotary_dim at most the headdim {headdim}, the same for both"
            )
        if t.dtype not in (x.dtype, torch.float32) or t.dtype != cos.dtype:
            raise TypeError(
                f"{name}: got dtype {t.dtype}, expected {x.dtype} like x, or torch.float32, the same for both"
            )
        if t.device != x.device:
            raise ValueError(f"{name}: got device {t.device}, expected {x.device} like x")


def _check_edges(edges: Tensor, x: Tensor) -> None:
    if edges.dtype != torch.int32 or edges.dim() != 1 or edges.shape[0] < 2 or not edges.is_contiguous():
        raise ValueError(
            f"cu_seqlens: got {edges.dtype} {checks.shape_of(edges)} of strides {edges.stride()}, "
            "expected torch.int32 (batch + 1,), contiguous"
        )
    if edges.device != x.device:
        raise ValueError(f"cu_seqlens: got device {edges.device}, expected {x.device} like x")


def _check_tensors(x: Tensor, tensors: RotaryTensors) -> None:
    edges = tensors.cu_seqlens
    checks.check_optional("cu_seqlens", edges, "(batch + 1)")
    checks.check_tensor("x", x, BATCHED if edges is None else PACKED)
    _check_tables(x, tensors.cos, tensors.sin)
    batch = x.shape[0]
    if edges is not None:
        _check_edges(edges, x)
        batch = edges.shape[0] - 1
    checks.check_indices("seqlen_offsets", tensors.seqlen_offsets, batch, x, like="x")
    if torch.compiler.is_compiling():
        return  # the bound would become a guard on every dynamic length
    if (tokens := x.shape[-3]) > checks.INT32_MAX:
        raise ValueError(f"x: got {tokens} tokens, expected at most {checks.INT32_MAX}")


def _check_offset(seqlen_offset: int, x: Tensor, tensors: RotaryTensors) -> None:
    """One offset for all sequences; library.check_lengths does it where each has its own."""
    if isinstance(seqlen_offset, bool) or not isinstance(seqlen_offset, int):
        kind = type(seqlen_offset).__name__
        raise TypeError(f"seqlen_offsets: got {kind}, expected an int or an int32 tensor (batch,)")
    if torch.compiler.is_compiling():
        return
    if not 0 <= seqlen_offset <= checks.INT32_MAX:
        raise ValueError(f"seqlen_offsets: got {seqlen_offset}, expected 0 to {checks.INT32_MAX}")
    positions, needed = tensors.cos.shape[0], seqlen_offset + x.shape[1]
    if tensors.cu_seqlens is None and needed > positions:
        raise ValueError(f"cos: got {positions} positions, expected at least {needed}")


def rotary_embedding(
    x: Tensor,
    cos: Tensor,
    sin: Tensor,
    *,
    interleaved: bool = True,
    seqlen_offsets: Tensor | int = 0,
    cu_seqlens: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """Rotary embedding of queries or keys (Su et al. 2021, arXiv:2104.09864), with its derivatives.

    Each pair (x1, x2) of a token becomes ``(x1 · cos − x2 · sin, x2 · cos + x1 · sin)``, cos and sin being
    their rows at the token's position. Arithmetic is in float32. flash-attn's ``apply_rotary_emb``, but for
    the default of ``interleaved``, which is that of :func:`fastgpt.attention_with_kvcache`.

    Args:
        x: (batch, seqlen, nheads, headdim) or, with cu_seqlens, (total, nheads, headdim); float32, bfloat16,
            float16, or float64 on ``reference`` and ``torch``. Any strides whose last is 1. One projection's
            queries and keys, side by side as heads, are turned in one call.
        cos, sin: (positions, rotary_dim / 2), in float32 or x's dtype. They have no gradient. Elements of x
            from rotary_dim on stay as they are.
        interleaved: pairs are neighbours, x[2i] and x[2i + 1] (GPT-J); else x[i] and
            x[i + rotary_dim / 2] (GPT-NeoX, Llama).
        seqlen_offsets: the position of each sequence's first token: an int for all, or (batch), int32.
        cu_seqlens: (batch + 1), int32: the tokens of sequence b are ``cu_seqlens[b] : cu_seqlens[b + 1]``.
        backend: ``auto``, ``torch``, ``reference``, ``triton`` or ``cuda`` (not written for ``cpu``); default
            ``FASTGPT_BACKEND``, else ``auto``.

    Returns:
        out, contiguous, of x's shape and dtype.

    Raises:
        ValueError, TypeError: an argument is not as above, or (on the CPU) a position is not in the tables;
            the message names it. Elsewhere seqlen_offsets and cu_seqlens are not read by the host, and
            ``triton`` gives NaN for a position that is not in the tables.
        fastgpt.BackendUnsupported: the backend asked for cannot serve the call; the message says why.
    """
    own_offsets = seqlen_offsets if isinstance(seqlen_offsets, Tensor) else None
    tensors = RotaryTensors(cos, sin, own_offsets, cu_seqlens)
    signature = checks.signature(x, *tensors)
    if signature is None or signature not in _passed:
        _check_tensors(x, tensors)
        checks.remember(_passed, signature)
    if not isinstance(seqlen_offsets, Tensor):
        _check_offset(seqlen_offsets, x, tensors)
    if not isinstance(interleaved, bool):
        raise TypeError(f"interleaved: got {interleaved!r}, expected True or False")
    if checks.needs_autograd(cos, sin) and (cos.requires_grad or sin.requires_grad):
        raise ValueError("cos, sin: got requires_grad=True, expected False: they have no gradient")
    spec = RotarySpec(0 if isinstance(seqlen_offsets, Tensor) else seqlen_offsets, interleaved)
    uses = interleaved, own_offsets is not None, cu_seqlens is not None
    asked = dispatch.requested(backend)
    headdim = checks.concrete(x.shape[-1])
    name = dispatch.choose(asked, RotaryCall, FEATURES, uses, checks.device_type(x), x.dtype, headdim)
    plain = not (signature is None or checks.watched())
    if name == "torch":
        if plain and x.is_cpu:
            library.check_lengths(x, spec, tensors)
        return composite(x, spec, tensors)
    if name == "reference":
        dispatch.warn_if_slow(asked, "rotary", x.numel(), stacklevel=3)
    return library.run(plain and not checks.needs_autograd(x), x, spec, tensors, name)
