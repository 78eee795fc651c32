"""The ``torch.library`` operators that merge attention states: schemas, fakes and the derivative.

``fastgpt::merge_fwd`` and ``fastgpt::merge_bwd`` have fixed arity, tensors first; the backend has been
chosen by then. The backward needs neither ``out`` nor ``lse``: its weights come from lse_a and lse_b.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastgpt import dispatch
from fastgpt.ops import autograd, sharding, vmap
from fastgpt.ops.checks import needs_autograd, own_precision

library = torch.library.Library("fastgpt", "FRAGMENT")
library.define(
    "merge_fwd(Tensor out_a, Tensor lse_a, Tensor out_b, Tensor lse_b, str backend) "
    "-> (Tensor out, Tensor lse)",
    tags=(torch.Tag.pt2_compliant_tag,),
)
library.define(
    "merge_bwd(Tensor dout, Tensor? dlse, Tensor out_a, Tensor lse_a, Tensor out_b, Tensor lse_b, "
    "str backend) -> (Tensor dout_a, Tensor dlse_a, Tensor dout_b, Tensor dlse_b)",
    tags=(torch.Tag.pt2_compliant_tag,),
)


def _forward(
    out_a: Tensor, lse_a: Tensor, out_b: Tensor, lse_b: Tensor, backend: str
) -> tuple[Tensor, Tensor]:
    with own_precision(out_a):
        out, lse = dispatch.implementation("merge", backend).forward(out_a, lse_a, out_b, lse_b)
    return out.contiguous(), lse.contiguous()


def _forward_fake(
    out_a: Tensor, lse_a: Tensor, out_b: Tensor, lse_b: Tensor, backend: str
) -> tuple[Tensor, Tensor]:
    return out_a.new_empty(out_a.shape), lse_a.new_empty(lse_a.shape)


def _backward(
    dout: Tensor,
    dlse: Tensor | None,
    out_a: Tensor,
    lse_a: Tensor,
    out_b: Tensor,
    lse_b: Tensor,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    # autograd makes it, with any strides (a sum's gradient is expanded); kernels read unit rows.
    if dout.stride(-1) != 1:
        dout = dout.contiguous()
    with own_precision(out_a):
        grads = dispatch.implementation("merge", backend).backward(dout, dlse, out_a, lse_a, out_b, lse_b)
    dout_a, dlse_a, dout_b, dlse_b = grads
    return dout_a.contiguous(), dlse_a.contiguous(), dout_b.contiguous(), dlse_b.contiguous()


def _backward_fake(
    dout: Tensor,
    dlse: Tensor | None,
    out_a: Tensor,
    lse_a: Tensor,
    out_b: Tensor,
    lse_b: Tensor,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    dout_a, dlse_a, dout_b, dlse_b = (t.new_empty(t.shape) for t in (out_a, lse_a, out_b, lse_b))
    return dout_a, dlse_a, dout_b, dlse_b


MergeBackward, _differentiable_backward = autograd.backward_of(
    "merge_bwd", "fastgpt.merge_attention_states has no second derivative"
)


class Merge(torch.autograd.Function):
    """merge_fwd with its derivative."""

    jvp = autograd.no_forward_mode("fastgpt.merge_attention_states", "jacrev is of reverse mode")

    @staticmethod
    def forward(*args: Any) -> tuple[Tensor, Tensor]:
        return _below_autograd(*args)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        *tensors, ctx.backend = inputs
        ctx.save_for_backward(*tensors)
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, dout: Tensor | None, dlse: Tensor | None) -> tuple[Tensor | None, ...]:
        tensors = ctx.saved_tensors
        if dout is None:
            dout = torch.zeros_like(tensors[0])
        grads = _differentiable_backward(dout, dlse, *tensors, ctx.backend)
        needs = ctx.needs_input_grad[: len(grads)]
        return *(grad if need else None for grad, need in zip(grads, needs, strict=True)), None


def _below_autograd(*args: Any) -> tuple[Tensor, Tensor]:
    with torch._C._AutoDispatchBelowAutograd():
        return torch.ops.fastgpt.merge_fwd.default(*args)


def _forward_autograd(*args: Any) -> tuple[Tensor, Tensor]:
    if needs_autograd(*args[:-1]):
        return Merge.apply(*args)
    return _below_autograd(*args)


def run(direct: bool, *args: Any) -> tuple[Tensor, Tensor]:
    """merge_fwd; ``direct``: past the dispatcher."""
    if direct:
        return _forward(*args)
    sharding.prepare()
    if torch.compiler.is_compiling():
        return torch.ops.fastgpt.merge_fwd.default(*args)
    return _forward_autograd(*args)


library.impl("merge_fwd", _forward, "CompositeExplicitAutograd")
library.impl("merge_fwd", _forward_autograd, "Autograd")
library.impl("merge_bwd", _backward, "CompositeExplicitAutograd")
torch.library.register_fake("fastgpt::merge_fwd", _forward_fake, lib=library)
torch.library.register_fake("fastgpt::merge_bwd", _backward_fake, lib=library)
vmap.register(library, "merge_fwd", Merge)
vmap.register(library, "merge_bwd", MergeBackward)
