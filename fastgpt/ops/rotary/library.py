"""The ``torch.library`` operator of rotary embedding: schema, fake and the derivative.

``fastgpt::rotary`` has fixed arity, tensors first; the backend has been chosen by then. Its derivative is
itself with conjugate the other way, so there is one of every order.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastgpt import dispatch
from fastgpt.ops import autograd, sharding, vmap
from fastgpt.ops.checks import needs_autograd
from fastgpt.ops.rotary.spec import RotarySpec, RotaryTensors

library = torch.library.Library("fastgpt", "FRAGMENT")
library.define(
    "rotary(Tensor x, Tensor cos, Tensor sin, Tensor? seqlen_offsets, Tensor? cu_seqlens, "
    "SymInt seqlen_offset, bool interleaved, bool conjugate, str backend) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag,),
)
_TENSORS = len(RotaryTensors._fields)


def check_lengths(x: Tensor, spec: RotarySpec, tensors: RotaryTensors) -> None:
    """The values of lengths, on the CPU: on a GPU reading them would stall it."""
    edges, offsets, positions = tensors.cu_seqlens, tensors.seqlen_offsets, tensors.cos.shape[0]
    if edges is None:
        ends = [x.shape[1]] * x.shape[0]
    else:
        values = edges.tolist()
        if values[0] != 0 or values[-1] != x.shape[0] or sorted(values) != values:
            raise ValueError(
                f"cu_seqlens: got {values}, expected 0 rising to {x.shape[0]}, the number of tokens"
            )
        ends = (edges[1:] - edges[:-1]).tolist()
    starts = [spec.seqlen_offset] * len(ends) if offsets is None else offsets.tolist()
    if min(starts, default=0) < 0:
        raise ValueError(f"seqlen_offsets: got {starts}, expected none below 0")
    needed = max((start + length for start, length in zip(starts, ends, strict=True) if length), default=0)
    if needed > positions:
        raise ValueError(f"cos: got {positions} positions, expected at least {needed}")


def _forward(x: Tensor, spec: RotarySpec, tensors: RotaryTensors, backend: str) -> Tensor:
    if x.is_cpu:
        check_lengths(x, spec, tensors)
    # autograd makes gradients with any strides (a sum's is expanded); kernels read unit rows.
    if x.stride(-1) != 1:
        x = x.contiguous()
    return dispatch.implementation("rotary", backend).forward(x, spec, tensors).contiguous()


def _forward_operator(x: Tensor, *args: Any) -> Tensor:
    return _forward(x, RotarySpec(*args[_TENSORS:-1]), RotaryTensors(*args[:_TENSORS]), args[-1])


def _forward_fake(x: Tensor, *args: Any) -> Tensor:
    return x.new_empty(x.shape)


class Rotary(torch.autograd.Function):
    """rotary with its derivative, which is its transpose: the inverse rotation."""

    jvp = autograd.no_forward_mode(
        "fastgpt.rotary_embedding", "backend='torch' has one, and jacrev is of reverse mode"
    )

    @staticmethod
    def forward(*args: Any) -> Tensor:
        return _below_autograd(*args)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        _, *tensors = inputs[: 1 + _TENSORS]
        ctx.save_for_backward(*tensors)
        ctx.scalars = inputs[1 + _TENSORS :]

    @staticmethod
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        seqlen_offset, interleaved, conjugate, backend = ctx.scalars
        dx = _forward_autograd(dout, *ctx.saved_tensors, seqlen_offset, interleaved, not conjugate, backend)
        return dx, *(None,) * (len(ctx.needs_input_grad) - 1)


def _below_autograd(*args: Any) -> Tensor:
    with torch._C._AutoDispatchBelowAutograd():
        return torch.ops.fastgpt.rotary.default(*args)


def _forward_autograd(x: Tensor, *args: Any) -> Tensor:
    if needs_autograd(x):
        return Rotary.apply(x, *args)
    return _below_autograd(x, *args)


def run(direct: bool, x: Tensor, spec: RotarySpec, tensors: RotaryTensors, backend: str) -> Tensor:
    """rotary; ``direct``: past the dispatcher."""
    if direct:
        return _forward(x, spec, tensors, backend)
    args = (x, *tensors, *spec, backend)
    sharding.prepare()
    if torch.compiler.is_compiling():
        return torch.ops.fastgpt.rotary.default(*args)
    return _forward_autograd(*args)


library.impl("rotary", _forward_operator, "CompositeExplicitAutograd")
library.impl("rotary", _forward_autograd, "Autograd")
torch.library.register_fake("fastgpt::rotary", _forward_fake, lib=library)
vmap.register(library, "rotary", Rotary)
