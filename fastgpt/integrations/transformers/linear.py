"""Products of a few rows, a token's at every step of generate(), on all threads of a CPU.

fp32 generation of one sequence spends most of its time there: but on Intel's processors, torch multiplies one
row by a matrix on one thread (:func:`fastgpt.nn.linear_of_few_rows`).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from fastgpt.nn import has_few_rows, linear_of_few_rows, serves_few_rows


def is_linear(module: nn.Module) -> bool:
    """Whether :func:`linear_forward` can be faster than the module's own ``forward``."""
    if type(module) is not nn.Linear and not _is_conv1d(module):
        return False
    return serves_few_rows(module.weight)  # type: ignore[arg-type]


def _is_conv1d(module: nn.Module) -> bool:
    """GPT-2's, whose weight is (in_features, out_features)."""
    if type(module).__name__ != "Conv1D":
        return False
    from transformers.pytorch_utils import Conv1D

    return type(module) is Conv1D


def linear_forward(module: Any, original: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    weight, transposed = module.weight, type(module) is not nn.Linear
    if torch.is_grad_enabled() or torch.compiler.is_compiling() or not has_few_rows(x, weight, transposed):
        return original(x)
    return linear_of_few_rows(x, weight, module.bias, transposed)
