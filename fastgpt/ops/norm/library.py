"""The ``torch.library`` operators of the norms: schemas, fakes and the derivative.

``fastgpt::norm_fwd`` and ``fastgpt::norm_bwd`` have fixed arity, tensors first; the backend has been
chosen by then. An output that a call does not have is empty: ``residual_out`` without ``store_sum`` or
where the sum is x itself (neither residual nor dropout), ``mean`` of RMS norm, ``dresidual`` without
dropout (it is ``dx``) or ``residual_gradient``. ``mean`` and ``rstd`` have x's leading axes, so that what is
sharded or vmapped along one of these is so for all outputs. The backward takes ``z``, the sum dropout(x) +
residual, and the row statistics from outside. There is an ``rng_state`` iff ``dropout_p`` is not 0.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastgpt import dispatch
from fastgpt.ops import autograd, sharding, vmap
from fastgpt.ops.checks import needs_autograd, own_precision, unit_rows
from fastgpt.ops.norm.spec import NormSpec

library = torch.library.Library("fastgpt", "FRAGMENT")
library.define(
    "norm_fwd(Tensor x, Tensor? residual, Tensor? weight, Tensor? bias, Tensor? rng_state, bool store_sum, "
    "bool rms, float eps, float dropout_p, str backend) "
    "-> (Tensor out, Tensor residual_out, Tensor mean, Tensor rstd)",
    tags=(torch.Tag.pt2_compliant_tag,),
)
library.define(
    "norm_bwd(Tensor dout, Tensor? dresidual_out, Tensor z, Tensor? weight, Tensor? bias, Tensor mean, "
    "Tensor rstd, Tensor? rng_state, bool residual_gradient, bool rms, float eps, float dropout_p, "
    "str backend) -> (Tensor dx, Tensor dresidual, Tensor dweight, Tensor dbias)",
    tags=(torch.Tag.pt2_compliant_tag,),
)


def _has_sum(residual: Tensor | None, rng_state: Tensor | None) -> bool:
    """Whether what is normalised is anything but x."""
    return residual is not None or rng_state is not None


def _implementation_forward(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    rng_state: Tensor | None,
    store_sum: bool,
    rms: bool,
    eps: float,
    dropout_p: float,
    backend: str,
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor]:
    store = store_sum and _has_sum(residual, rng_state)
    with own_precision(x):
        return dispatch.implementation("norm", backend).forward(
            x, residual, weight, bias, rng_state, store, NormSpec(rms, eps, dropout_p)
        )


def _forward(x: Tensor, *args: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    out, residual_out, mean, rstd = _implementation_forward(x, *args)
    residual_out = x.new_empty(0) if residual_out is None else residual_out.contiguous()
    mean = rstd.new_empty(0) if mean is None else mean.contiguous().view(x.shape[:-1])
    return out.contiguous(), residual_out, mean, rstd.contiguous().view(x.shape[:-1])


def _forward_fake(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    rng_state: Tensor | None,
    store_sum: bool,
    rms: bool,
    eps: float,
    dropout_p: float,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    acc = torch.float64 if x.dtype == torch.float64 else torch.float32
    residual_out = x.new_empty(x.shape if store_sum and _has_sum(residual, rng_state) else (0,))
    mean = x.new_empty((0,) if rms else x.shape[:-1], dtype=acc)
    return x.new_empty(x.shape), residual_out, mean, x.new_empty(x.shape[:-1], dtype=acc)


def _backward(
    dout: Tensor,
    dresidual_out: Tensor | None,
    z: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    rng_state: Tensor | None,
    residual_gradient: bool,
    rms: bool,
    eps: float,
    dropout_p: float,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    grads = dispatch.implementation("norm", backend).backward(
        unit_rows(dout),  # autograd makes gradients with any strides: a sum's is expanded
        unit_rows(dresidual_out),
        z,
        weight,
        bias,
        None if rms else mean.flatten(),
        rstd.flatten(),
        rng_state,
        residual_gradient,
        NormSpec(rms, eps, dropout_p),
    )
    return tuple(z.new_empty(0) if grad is None else grad.contiguous() for grad in grads)  # type: ignore[return-value]


def _backward_fake(
    dout: Tensor,
    dresidual_out: Tensor | None,
    z: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    rng_state: Tensor | None,
    residual_gradient: bool,
    rms: bool,
    eps: float,
    dropout_p: float,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    dweight, dbias = (z.new_empty(0) if t is None else t.new_empty(t.shape) for t in (weight, bias))
    apart = rng_state is not None and residual_gradient
    return z.new_empty(z.shape), z.new_empty(z.shape if apart else (0,)), dweight, dbias


NormBackward, _differentiable_backward = autograd.backward_of(
    "norm_bwd", "fastgpt's norms have no second derivative; backend='torch' has one"
)


class Norm(torch.autograd.Function):
    """norm_fwd with its derivative."""

    jvp = autograd.no_forward_mode(
        "a norm of fastgpt", "backend='torch' has one, and jacrev is of reverse mode"
    )

    @staticmethod
    def forward(*args: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        return _below_autograd(*args)

    @staticmethod
    def setup_context(
        ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor, Tensor]
    ) -> None:
        x, residual, weight, bias, rng_state, store_sum, *ctx.scalars = inputs
        _, residual_out, mean, rstd = output
        has_sum = _has_sum(residual, rng_state)
        if has_sum and not store_sum:
            raise ValueError("store_sum: got False, expected True where a gradient is asked for")
        ctx.save_for_backward(residual_out if has_sum else x, weight, bias, mean, rstd, rng_state)
        ctx.mark_non_differentiable(mean, rstd, *([] if has_sum else [residual_out]))
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(
        ctx: Any, dout: Tensor | None, dresidual_out: Tensor | None, dmean: None, drstd: None
    ) -> tuple[Tensor | None, ...]:
        z, *saved = ctx.saved_tensors
        if dout is None:
            dout = torch.zeros_like(z)
        dx, dresidual, dweight, dbias = _differentiable_backward(
            dout, dresidual_out, z, *saved, ctx.needs_input_grad[1], *ctx.scalars
        )
        dropout = saved[-1] is not None
        grads = (dx, dresidual if dropout else dx, dweight, dbias)
        needs = ctx.needs_input_grad[: len(grads)]
        return (
            *(grad if need else None for grad, need in zip(grads, needs, strict=True)),
            *(None,) * (len(ctx.needs_input_grad) - len(grads)),
        )


def _below_autograd(*args: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    with torch._C._AutoDispatchBelowAutograd():
        return torch.ops.fastgpt.norm_fwd.default(*args)


def _forward_autograd(*args: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    if needs_autograd(*(a for a in args if isinstance(a, Tensor))):
        return Norm.apply(*args)
    return _below_autograd(*args)


def _fold_forward(
    call: Any, samples: int, in_dims: tuple[int | None, ...], x: Tensor, residual: Tensor | None, *args: Any
) -> Any:
    """The samples' rows are rows like any others, but for a weight and for dropout's bits of their own."""
    rng_state, store_sum, rms = args[2:5]
    if in_dims[0] is None or rng_state is not None or in_dims[2:4] != (None, None):
        return NotImplemented
    rows, residual = (vmap.in_front(t, d, samples) for t, d in zip((x, residual), in_dims, strict=False))
    outputs = call(rows, residual, *args)
    return outputs, (0, 0 if store_sum and residual is not None else None, None if rms else 0, 0)


def _fold_backward(call: Any, samples: int, in_dims: tuple[int | None, ...], *args: Any) -> Any:
    """Likewise; the gradients of weight and bias are sums, of each sample's rows apart."""
    dout, dresidual_out, z, weight, bias, mean, rstd, rng_state, *scalars = args
    rms = scalars[1]
    if in_dims[2] is None or weight is not None or bias is not None or rng_state is not None:
        return NotImplemented
    tensors = dout, dresidual_out, z, None, None, None if rms else mean, rstd, None
    rows = [vmap.in_front(t, d, samples) for t, d in zip(tensors, in_dims, strict=False)]
    rows[5] = mean if rms else rows[5]
    return call(*rows, *scalars), (0, None, None, None)


def run(direct: bool, *args: Any) -> tuple[Tensor, Tensor | None]:
    """out and residual_out of norm_fwd; ``direct``: past the dispatcher."""
    if direct:
        out, residual_out, _, _ = _implementation_forward(*args)
        return out.contiguous(), None if residual_out is None else residual_out.contiguous()
    sharding.prepare()
    if torch.compiler.is_compiling():
        return torch.ops.fastgpt.norm_fwd.default(*args)[:2]
    return _forward_autograd(*args)[:2]


library.impl("norm_fwd", _forward, "CompositeExplicitAutograd")
library.impl("norm_fwd", _forward_autograd, "Autograd")
library.impl("norm_bwd", _backward, "CompositeExplicitAutograd")
torch.library.register_fake("fastgpt::norm_fwd", _forward_fake, lib=library)
torch.library.register_fake("fastgpt::norm_bwd", _backward_fake, lib=library)
vmap.register(library, "norm_fwd", Norm, _fold_forward)
vmap.register(library, "norm_bwd", NormBackward, _fold_backward)
