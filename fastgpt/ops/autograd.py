"""What the operators' derivatives have not: a derivative of their own, and forward mode."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


def refusal(message: str) -> Any:
    """A ``jvp`` or ``backward`` of a torch.autograd.Function that raises."""

    def refuse(ctx: Any, *args: Any) -> None:
        raise NotImplementedError(message)

    return staticmethod(refuse)


def no_forward_mode(name: str, way_out: str) -> Any:
    """The ``jvp`` of an operator that has reverse mode alone."""
    return refusal(f"{name} has no forward-mode derivative (jvp, jacfwd, hessian); {way_out}")


def backward_of(
    name: str, message: str
) -> tuple[type[torch.autograd.Function], Callable[..., tuple[Tensor, ...]]]:
    """The operator ``fastgpt::name``, a backward, as a torch.autograd.Function whose own derivatives are an
    error: create_graph=True and torch.func keep its history. And the function that calls either.
    """
    operator = getattr(torch.ops.fastgpt, name).default

    class Backward(torch.autograd.Function):
        @staticmethod
        def forward(*args: Any) -> tuple[Tensor, ...]:
            with torch._C._AutoDispatchBelowAutograd():
                return operator(*args)

        @staticmethod
        def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
            pass

        backward = jvp = refusal(message)

    def call(*args: Any) -> tuple[Tensor, ...]:
        return Backward.apply(*args) if torch.is_grad_enabled() else operator(*args)

    return Backward, call
