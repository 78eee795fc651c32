"""``torch.func.vmap`` of the operators: by one call where the samples are independent rows or sequences, else
by a call for each sample."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

# Of the call, how many samples there are, for each argument the axis that is vmapped over or None, and the
# arguments: outputs and their axes; NotImplemented for samples that cannot be taken together.
Fold = Callable[..., Any]


def _rule(call: Callable[..., Any], single: bool, fold: Fold | None) -> Callable[..., Any]:
    """As torch.library.register_vmap and autograd.Function.vmap have it."""

    def rule(info: Any, in_dims: tuple[int | None, ...], *args: Any) -> Any:
        if fold is not None:
            folded = fold(call, info.batch_size, in_dims, *args)
            if folded is not NotImplemented:
                return folded
        samples = [a if d is None else a.unbind(d) for a, d in zip(args, in_dims, strict=True)]
        results = [
            call(*(s if d is None else s[i] for s, d in zip(samples, in_dims, strict=True)))
            for i in range(info.batch_size)
        ]
        if single:
            return torch.stack(results), 0
        outputs = tuple(torch.stack(outputs) for outputs in zip(*results, strict=True))
        return outputs, (0,) * len(outputs)

    return rule


def register(library: torch.library.Library, name: str, function: Any, fold: Fold | None = None) -> None:
    """Rules for ``fastgpt::name`` and for the torch.autograd.Function of the same arguments."""
    operator = getattr(torch.ops.fastgpt, name).default
    single = len(operator._schema.returns) == 1
    torch.library.register_vmap(f"fastgpt::{name}", _rule(operator, single, fold), lib=library)
    # Not by way of the operator, inside which torch.func takes no autograd.Function any more.
    function.vmap = staticmethod(_rule(function.apply, single, fold))


def in_front(t: Tensor | None, dim: int | None, samples: int) -> Tensor | None:
    """The samples as the first axis; expanded where all have the same tensor."""
    if t is None:
        return None
    return t.expand(samples, *t.shape) if dim is None else t.movedim(dim, 0)
