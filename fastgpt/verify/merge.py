"""The merge's table of cases, and each of them computed three times (see :mod:`fastgpt.verify.attention`)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

import fastgpt
from fastgpt.verify.rule import Result, as_called, require

Merge = Callable[..., tuple[Tensor, Tensor]]  # out and lse of out_a, lse_a, out_b, lse_b
NAMES = ("out_a", "lse_a", "out_b", "lse_b")


class MergeCase(NamedTuple):
    """``shape`` of out; ``spread`` of lse; a share of the rows is empty in a, in b or in both."""

    shape: tuple[int, ...]
    spread: float = 1.0
    offset: float = 0.0  # of both lse
    empty: bool = False
    layout: str = "contiguous"

    def __str__(self) -> str:
        size = "x".join(map(str, self.shape))
        return f"{size}-spread{self.spread:g}-offset{self.offset:g}-{self.layout}" + "-empty" * self.empty


CASES = [
    MergeCase((1, 1, 1, 1)),
    MergeCase((2, 3, 4, 7), empty=True),
    MergeCase((3, 65, 5, 64), empty=True),
    MergeCase((2, 17, 3, 128), spread=50, empty=True),
    MergeCase((2, 17, 3, 33), spread=1e-3, offset=1e3),
    MergeCase((1, 300, 2, 80), spread=200, empty=True),  # where one weight is 0 in float32
    MergeCase((1, 9, 2, 300), layout="strided", empty=True),
    MergeCase((2, 5, 3, 17), layout="strided"),
    MergeCase((2, 5, 3, 17), layout="expanded"),
    MergeCase((129, 4, 64), empty=True),
    MergeCase((33, 3, 17), layout="strided", empty=True),
    MergeCase((1, 5, 2, 2**15), empty=True),  # a head larger than a unit of work
    MergeCase((0, 4, 8)),
    MergeCase((2, 0, 4, 8)),
    MergeCase((0, 3, 4, 8)),
    MergeCase((2, 3, 0, 8)),
]


MEDIUM = [MergeCase((2, 2048, 16, 128), empty=True), MergeCase((4096, 32, 64))]


def laid_out(t: Tensor, layout: str, unit: bool = True) -> Tensor:
    """The values of t in other strides, with NaN beside them; the last stride stays 1 if ``unit``."""
    if layout == "strided":
        places = [slice(1, 2 * n + 1, 2) for n in t.shape]
        wide = torch.full([2 * n + 1 for n in t.shape], torch.nan, dtype=t.dtype)
        if unit:
            places[-1] = slice(1, t.shape[-1] + 1)
        wide[tuple(places)] = t
        return wide[tuple(places)]
    if layout == "expanded":
        return t[:1].expand_as(t)
    return t


def make_inputs(case: MergeCase, dtype: torch.dtype) -> tuple[Tensor, ...]:
    """out_a, lse_a, out_b, lse_b and the gradients of out and lse; NaN in the out of an empty state."""
    *lead, tokens, nheads, _ = case.shape
    lse_shape = (*lead, nheads, tokens)
    outs = [torch.randn(case.shape).to(dtype) for _ in range(3)]
    lses = [torch.randn(lse_shape) for _ in range(3)]
    for i, out in enumerate(outs[:2]):
        lses[i] = lses[i] * case.spread + case.offset
        if case.empty:
            lses[i][torch.rand(lse_shape) < 0.4] = -torch.inf
            out[(lses[i] == -torch.inf).transpose(-1, -2)] = torch.nan
    outs = [laid_out(t, case.layout) for t in outs]
    lses = [laid_out(t, case.layout, unit=False) for t in lses]
    return outs[0], lses[0], outs[1], lses[1], outs[2], lses[2]


def plain_merge(out_a: Tensor, lse_a: Tensor, out_b: Tensor, lse_b: Tensor) -> tuple[Tensor, Tensor]:
    """(out, lse) as anyone would write it, weights in out's dtype; differentiable in empty rows, too."""
    no_a, no_b = lse_a == -torch.inf, lse_b == -torch.inf
    neither = no_a & no_b
    lse = torch.logaddexp(*(t.masked_fill(neither, 0) for t in (lse_a, lse_b)))

    def part(out: Tensor, lse_x: Tensor, none: Tensor) -> Tensor:
        weight = torch.exp(lse_x.masked_fill(neither, -torch.inf) - lse).transpose(-1, -2)[..., None]
        return weight.to(out.dtype) * out.masked_fill(none.transpose(-1, -2)[..., None], 0)

    out = part(out_a, lse_a, no_a) + part(out_b, lse_b, no_b)
    return out, lse.masked_fill(neither, -torch.inf)


def fused_merge(backend: str) -> Merge:
    def merge(*tensors: Tensor) -> tuple[Tensor, Tensor]:
        with as_called():
            return fastgpt.merge_attention_states(*tensors, backend=backend)

    return merge


def gradients(
    merge: Merge, inputs: Sequence[Tensor], of: tuple[str, ...] = ("out", "lse")
) -> dict[str, Tensor]:
    """The gradient of each input, by name, from those of out, lse or both."""
    *tensors, dout, dlse = inputs
    leaves = [t.detach().requires_grad_() for t in tensors]
    out, lse = merge(*leaves)
    results = {"out": (out, dout), "lse": (lse, dlse)}
    outputs, grads = zip(*(results[name] for name in of), strict=True)
    return dict(zip(NAMES, torch.autograd.grad(outputs, leaves, grads, materialize_grads=True), strict=True))


def double(tensors: Sequence[Tensor]) -> list[Tensor]:
    return [t.double() for t in tensors]


def results(
    case: MergeCase,
    dtype: torch.dtype,
    backend: str,
    of: tuple[str, ...] = ("out", "lse"),
    other: Merge = plain_merge,
) -> list[Result]:
    """(what, got, plain, exact) of the outputs and, from the gradients ``of`` these, those of the inputs."""
    inputs = make_inputs(case, dtype)
    merges = (fused_merge(backend), inputs), (other, inputs), (other, double(inputs))
    outputs = [merge(*tensors[:4]) for merge, tensors in merges]
    require([t.dtype for t in outputs[0]] == [dtype, torch.float32], "out or lse: another dtype")
    require(all(t.is_contiguous() for t in outputs[0]), "out or lse: not contiguous")
    grads = [gradients(merge, tensors, of) for merge, tensors in merges]
    require(all(grads[0][name].dtype == grads[1][name].dtype for name in NAMES), "a gradient's dtype")
    of_inputs = [(f"d{name}", *(grad[name] for grad in grads)) for name in NAMES]
    return [*zip(("out", "lse"), *outputs, strict=True), *of_inputs]
