"""Products of a few rows, a token's at every step of generate(): most of its time, on a CPU."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn

from fastgpt.ops.few_rows import api as few_rows


def is_linear(module: nn.Module, backend: str) -> bool:
    """Whether :func:`linear_forward` can be faster than the module's own ``forward``."""
    if type(module) is not nn.Linear and not is_transposed(module):
        return False
    return few_rows.served(backend) and few_rows.serves_weight(module.weight)  # type: ignore[arg-type]


def is_transposed(module: nn.Module) -> bool:
    """Whether it is GPT-2's, whose weight is (in_features, out_features)."""
    if type(module).__name__ != "Conv1D":
        return False
    from transformers.pytorch_utils import Conv1D

    return type(module) is Conv1D


def linear_forward(
    module: nn.Module,
    original: Callable[..., Tensor],
    transposed: bool,
    backend: str,
    *args: Tensor,
    **named: Tensor,
) -> Tensor:
    parameters = module._parameters  # a module's own attributes take several times as long to look up
    weight = parameters.get("weight")
    # Pruning, parametrisation and offloading put something else in a parameter's place.
    if weight is None or "bias" not in parameters or named or len(args) != 1:
        return original(*args, **named)
    out = few_rows.linear(args[0], weight, parameters["bias"], transposed, backend)
    return original(*args) if out is None else out
