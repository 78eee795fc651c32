"""The ``torch.library`` operators of attention: schemas, fakes and the derivative.

``fastgpt::attention_fwd`` and ``fastgpt::attention_bwd`` have fixed arity, tensors first; the
backend has been chosen by then. The backward takes ``out`` and ``lse`` from outside.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastgpt import dispatch
from fastgpt.ops import autograd, sharding, vmap
from fastgpt.ops.attention.spec import AttentionSpec, AttentionTensors
from fastgpt.ops.checks import needs_autograd, own_precision

_OPTIONAL = (
    "Tensor? cu_seqlens_q, Tensor? cu_seqlens_k, Tensor? seqused_k, Tensor? leftpad_k, "
    "Tensor? alibi_slopes, Tensor? sink, Tensor? attn_bias, Tensor? rng_state, "
    "float softmax_scale, int window_left, int window_right, float softcap, float dropout_p, str backend"
)
_SCALARS = 6  # the last arguments of both schemas, from softmax_scale to backend

library = torch.library.Library("fastgpt", "FRAGMENT")
library.define(
    f"attention_fwd(Tensor q, Tensor k, Tensor v, {_OPTIONAL}) -> (Tensor, Tensor)",
    tags=(torch.Tag.pt2_compliant_tag,),
)
library.define(
    "attention_bwd(Tensor dout, Tensor? dlse, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, "
    f"bool bias_gradient, {_OPTIONAL}) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    tags=(torch.Tag.pt2_compliant_tag,),
)


def pack(spec: AttentionSpec, tensors: AttentionTensors, backend: str) -> tuple[Any, ...]:
    """The arguments of both operators that follow q, k, v (and the backward's own)."""
    return (*tensors, *spec[: _SCALARS - 1], backend)


def _unpack(args: tuple[Any, ...]) -> tuple[AttentionSpec, AttentionTensors, str]:
    tensors = AttentionTensors(*args[:-_SCALARS])
    scale, left, right, softcap, dropout_p, backend = args[-_SCALARS:]
    spec = AttentionSpec(
        scale,
        left,
        right,
        softcap,
        dropout_p,
        tensors.alibi_slopes is not None,
        tensors.sink is not None,
        tensors.attn_bias is not None,
        tensors.cu_seqlens_q is not None,
        tensors.seqused_k is not None or tensors.leftpad_k is not None,
    )
    return spec, tensors, backend


# The values of lengths are checked here and not in api.py, where torch.compile would have to trace them. On a
# GPU they are not read: that would stall it.


def _check_edges(name: str, edges: Tensor, total: int) -> None:
    values = edges.tolist()
    if values[0] != 0 or values[-1] != total or sorted(values) != values:
        raise ValueError(f"{name}: got {values}, expected 0 rising to {total}, the number of tokens")


def _check_key_ranges(k: Tensor, tensors: AttentionTensors) -> None:
    edges, batch = tensors.cu_seqlens_k, k.shape[0]
    rows = [k.shape[1]] * batch if edges is None else (edges[1:] - edges[:-1]).tolist()
    used = rows if tensors.seqused_k is None else tensors.seqused_k.tolist()
    if any(not 0 <= n <= most for n, most in zip(used, rows, strict=True)):
        raise ValueError(f"seqused_k: got {used}, expected 0 to {rows}, the keys of each sequence")
    if tensors.leftpad_k is not None:
        pads = tensors.leftpad_k.tolist()
        if any(not 0 <= pad <= n for pad, n in zip(pads, used, strict=True)):
            raise ValueError(f"leftpad_k: got {pads}, expected 0 to {used}, the keys that each sequence uses")


def _forward(
    q: Tensor, k: Tensor, v: Tensor, spec: AttentionSpec, tensors: AttentionTensors, backend: str
) -> tuple[Tensor, Tensor]:
    if spec.dropout_p and tensors.rng_state is None:
        raise ValueError("rng_state: got None, expected seed and offset with dropout")
    if q.is_cpu:
        if tensors.cu_seqlens_q is not None and tensors.cu_seqlens_k is not None:
            _check_edges("cu_seqlens_q", tensors.cu_seqlens_q, q.shape[0])
            _check_edges("cu_seqlens_k", tensors.cu_seqlens_k, k.shape[0])
        if spec.key_ranges:
            _check_key_ranges(k, tensors)
    with own_precision(q):
        out, lse = dispatch.implementation("attention", backend).forward(q, k, v, spec, tensors)
    return out.contiguous(), lse.contiguous()


def _forward_operator(q: Tensor, k: Tensor, v: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
    return _forward(q, k, v, *_unpack(args))


def _forward_fake(q: Tensor, k: Tensor, v: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
    out = q.new_empty(*q.shape[:-1], v.shape[-1])
    acc = torch.float64 if q.dtype == torch.float64 else torch.float32
    if q.dim() == 3:
        return out, q.new_empty(q.shape[1], q.shape[0], dtype=acc)
    return out, q.new_empty(q.shape[0], q.shape[2], q.shape[1], dtype=acc)


def _backward(
    dout: Tensor,
    dlse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    bias_gradient: bool,
    *args: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    spec, tensors, backend = _unpack(args)
    # autograd makes these, with any strides (a sum's gradient is expanded); kernels read unit rows.
    if dout.stride(-1) != 1:
        dout = dout.contiguous()
    if dlse is not None:
        dlse = dlse.contiguous()
    lse = lse.contiguous()
    if out.stride(-1) != 1:
        out = out.contiguous()
    implementation = dispatch.implementation("attention", backend)
    with own_precision(q):
        grads = implementation.backward(dout, dlse, q, k, v, out, lse, bias_gradient, spec, tensors)
    return tuple(q.new_empty(0) if grad is None else grad.contiguous() for grad in grads)  # type: ignore[return-value]


def _backward_fake(
    dout: Tensor,
    dlse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    bias_gradient: bool,
    *args: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    _, tensors, _ = _unpack(args)
    dq, dk, dv = (torch.empty(t.shape, dtype=t.dtype, device=t.device) for t in (q, k, v))
    sink, bias = tensors.sink, tensors.attn_bias
    dsink = q.new_empty(0) if sink is None else torch.empty_like(sink)
    dbias = bias.new_empty(bias.shape) if bias is not None and bias_gradient else q.new_empty(0)
    return dq, dk, dv, dsink, dbias


AttentionBackward, _differentiable_backward = autograd.backward_of(
    "attention_bwd",
    "fastgpt.attention has no second derivative; backend='torch' may have one, and "
    "F.scaled_dot_product_attention under sdpa_kernel(SDPBackend.MATH) has",
)


class Attention(torch.autograd.Function):
    """attention_fwd with its derivative."""

    jvp = autograd.no_forward_mode(
        "fastgpt.attention",
        "jacrev is of reverse mode, and "
        "F.scaled_dot_product_attention under sdpa_kernel(SDPBackend.MATH) has one",
    )

    @staticmethod
    def forward(*args: Any) -> tuple[Tensor, Tensor]:
        return _below_autograd(*args)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        q, k, v, *optional = inputs[:-_SCALARS]
        ctx.save_for_backward(q, k, v, *output, *optional)
        ctx.scalars = inputs[-_SCALARS:]
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, dout: Tensor | None, dlse: Tensor | None) -> tuple[Tensor | None, ...]:
        q, k, v, out, lse, *optional = ctx.saved_tensors
        if dout is None:
            dout = torch.zeros_like(out)
        needs = dict(zip(("q", "k", "v", *AttentionTensors._fields), ctx.needs_input_grad, strict=False))
        dq, dk, dv, dsink, dbias = _differentiable_backward(
            dout, dlse, q, k, v, out, lse, needs["attn_bias"], *optional, *ctx.scalars
        )
        grads = {"q": dq, "k": dk, "v": dv, "sink": dsink, "attn_bias": dbias}
        return (
            *(grads.get(name) if need else None for name, need in needs.items()),
            *(None,) * _SCALARS,
        )


def _below_autograd(*args: Any) -> tuple[Tensor, Tensor]:
    with torch._C._AutoDispatchBelowAutograd():
        return torch.ops.fastgpt.attention_fwd.default(*args)


def _forward_autograd(*args: Any) -> tuple[Tensor, Tensor]:
    if needs_autograd(*(a for a in args if isinstance(a, Tensor))):
        return Attention.apply(*args)
    return _below_autograd(*args)


def _fold_forward(call: Any, samples: int, in_dims: tuple[int | None, ...], *args: Any) -> Any:
    """Sequences of one call, where each sample has q, k and v of its own and there is nothing beside them."""
    qkv, rest = args[:3], args[3:]
    if None in in_dims[:3] or any(t is not None for t in rest[:-_SCALARS]):
        return NotImplemented
    batch = vmap.in_front(qkv[0], in_dims[0], samples).shape[1]  # type: ignore[union-attr]
    merged = (vmap.in_front(t, d, samples).flatten(0, 1) for t, d in zip(qkv, in_dims, strict=False))  # type: ignore[union-attr]
    out, lse = call(*merged, *rest)
    return (out.unflatten(0, (samples, batch)), lse.unflatten(0, (samples, batch))), (0, 0)


def _fold_backward(call: Any, samples: int, in_dims: tuple[int | None, ...], *args: Any) -> Any:
    tensors, rest = args[:7], args[7:]
    if None in in_dims[2:5] or any(t is not None for t in rest[1:-_SCALARS]):
        return NotImplemented
    apart = [vmap.in_front(t, d, samples) for t, d in zip(tensors, in_dims, strict=False)]
    merged = (None if t is None else t.flatten(0, 1) for t in apart)
    dq, dk, dv, *none = call(*merged, *rest)
    edges = apart[2].shape[:2]  # type: ignore[union-attr]
    grads = (t.unflatten(0, edges) for t in (dq, dk, dv))
    return (*grads, *none), (0, 0, 0, None, None)


def run(
    direct: bool,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    spec: AttentionSpec,
    tensors: AttentionTensors,
    backend: str,
) -> tuple[Tensor, Tensor]:
    """attention_fwd; ``direct``: past the dispatcher."""
    if direct:
        return _forward(q, k, v, spec, tensors, backend)
    args = pack(spec, tensors, backend)
    sharding.prepare()
    if torch.compiler.is_compiling():
        return torch.ops.fastgpt.attention_fwd.default(q, k, v, *args)
    return _forward_autograd(q, k, v, *args)


library.impl("attention_fwd", _forward_operator, "CompositeExplicitAutograd")
library.impl("attention_fwd", _forward_autograd, "Autograd")
library.impl("attention_bwd", _backward, "CompositeExplicitAutograd")
torch.library.register_fake("fastgpt::attention_fwd", _forward_fake, lib=library)
torch.library.register_fake("fastgpt::attention_bwd", _backward_fake, lib=library)
vmap.register(library, "attention_fwd", Attention, _fold_forward)
vmap.register(library, "attention_bwd", AttentionBackward, _fold_backward)
