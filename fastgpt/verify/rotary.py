"""Rotary embedding's table of cases, each computed three times (see :mod:`fastgpt.verify.attention`)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

import fastgpt
from fastgpt.verify.merge import laid_out
from fastgpt.verify.rule import Result, as_called, require

Rotary = Callable[[Tensor, Tensor, Tensor, "RotaryCase", bool], Tensor]


class RotaryCase(NamedTuple):
    """``shape`` of x; ``lengths`` of the sequences if they are packed; the first position of all or of each;
    whether the tables are of x's dtype."""

    shape: tuple[int, ...]
    rotary_dim: int
    offsets: int | tuple[int, ...] = 0
    lengths: tuple[int, ...] | None = None
    layout: str = "contiguous"
    narrow: bool = False

    def __str__(self) -> str:
        size = "x".join(map(str, self.shape))
        kind = f"-packed{self.lengths}" * (self.lengths is not None) + "-narrow" * self.narrow
        return f"{size}-r{self.rotary_dim}-from{self.offsets}-{self.layout}{kind}"

    def sequences(self) -> list[tuple[int, int]]:
        """Of each sequence the first position and how many there are."""
        lengths = [self.shape[1]] * self.shape[0] if self.lengths is None else self.lengths
        starts = self.offsets if isinstance(self.offsets, tuple) else [self.offsets] * len(lengths)
        return list(zip(starts, lengths, strict=True))


CASES = [
    RotaryCase((1, 1, 1, 2), 2),
    RotaryCase((2, 5, 3, 7), 4, offsets=3),
    RotaryCase((3, 65, 5, 64), 64),
    RotaryCase((2, 17, 3, 128), 128, offsets=(0, 40), narrow=True),
    RotaryCase((2, 9, 6, 80), 32, offsets=(7, 0), layout="strided"),
    RotaryCase((2, 33, 9, 40), 30, offsets=5),
    RotaryCase((2, 130, 1, 16), 16, layout="strided", narrow=True),
    RotaryCase((3, 4, 2, 24), 16, layout="expanded"),
    RotaryCase((1, 3, 2, 256), 256),
    RotaryCase((70, 5, 24), 24, lengths=(70,)),
    RotaryCase((200, 3, 40), 34, lengths=(0, 1, 99, 0, 0, 100, 0), layout="strided"),
    RotaryCase((90, 2, 64), 64, offsets=11, lengths=(64, 1, 25), narrow=True),
    RotaryCase((90, 6, 8), 8, offsets=(0, 50, 3, 4, 5), lengths=(20, 0, 10, 1, 59)),
    RotaryCase((0, 4, 2, 8), 8),
    RotaryCase((2, 0, 2, 8), 8),
    RotaryCase((2, 4, 0, 8), 8),
    RotaryCase((0, 2, 8), 4, lengths=(0, 0)),
]


MEDIUM = [
    RotaryCase((2, 2048, 32, 128), 128, offsets=(0, 100)),
    RotaryCase((3000, 8, 64), 64, lengths=(1000, 7, 1993), narrow=True),
]


def make_inputs(case: RotaryCase, dtype: torch.dtype) -> tuple[Tensor, ...]:
    """x, dout, cos and sin, with NaN in the rows of the tables at which no token is."""
    x, dout = (laid_out(torch.randn(case.shape).to(dtype), case.layout) for _ in range(2))
    last = max(case.offsets, default=0) if isinstance(case.offsets, tuple) else case.offsets
    longest = case.shape[1] if case.lengths is None else max(case.lengths)
    used = torch.zeros(last + longest + 3, dtype=torch.bool)
    for start, length in case.sequences():
        used[start : start + length] = True
    angles = 7 * torch.rand(len(used), case.rotary_dim // 2) - 3.5
    tables = [t.masked_fill(~used[:, None], torch.nan) for t in (angles.cos(), angles.sin())]
    cos, sin = (t.to(dtype if case.narrow else t.dtype) for t in tables)
    return x, dout, laid_out(cos, "strided"), sin


def plain_rotary(x: Tensor, cos: Tensor, sin: Tensor, case: RotaryCase, interleaved: bool) -> Tensor:
    """As anyone would write it, in x's dtype, one sequence after the other."""

    def turn(x: Tensor, start: int) -> Tensor:  # (seqlen, nheads, headdim)
        rows = slice(start, start + x.shape[0])
        c, s = (t[rows, None].to(x.dtype) for t in (cos, sin))
        x, rest = x[..., : case.rotary_dim], x[..., case.rotary_dim :]
        if interleaved:
            c, s = (t.repeat_interleave(2, -1) for t in (c, s))
            other = torch.stack((-x[..., 1::2], x[..., ::2]), -1).flatten(-2)
        else:
            c, s = (torch.cat((t, t), -1) for t in (c, s))
            x1, x2 = x.chunk(2, -1)
            other = torch.cat((-x2, x1), -1)
        return torch.cat((x * c + other * s, rest), -1)

    starts, lengths = zip(*case.sequences(), strict=True) if case.sequences() else ((), ())
    parts = x.unbind() if case.lengths is None else x.split(lengths)
    turned = [turn(part, start) for part, start in zip(parts, starts, strict=True)]
    return (torch.stack(turned) if case.lengths is None else torch.cat(turned)) if turned else x.clone()


def lengths_of(case: RotaryCase) -> dict[str, Any]:
    """The arguments that say at which position each token is."""
    offsets, edges = case.offsets, None
    starts = torch.tensor(offsets, dtype=torch.int32) if isinstance(offsets, tuple) else offsets
    if case.lengths is not None:
        edges = torch.tensor((0, *case.lengths)).cumsum(0).int()
    return {"seqlen_offsets": starts, "cu_seqlens": edges}


def fused_rotary(backend: str) -> Rotary:
    def rotary(x: Tensor, cos: Tensor, sin: Tensor, case: RotaryCase, interleaved: bool) -> Tensor:
        arguments = {"interleaved": interleaved, **lengths_of(case), "backend": backend}
        with as_called():
            return fastgpt.rotary_embedding(x, cos, sin, **arguments)

    return rotary


def results(
    case: RotaryCase, dtype: torch.dtype, interleaved: bool, backend: str, other: Rotary = plain_rotary
) -> list[Result]:
    """(what, got, plain, exact) of out and of the gradient of x."""
    inputs = make_inputs(case, dtype)
    outputs = []
    for rotary, tensors in (
        (fused_rotary(backend), inputs),
        (other, inputs),
        (other, [t.double() for t in inputs]),
    ):
        x, dout, cos, sin = tensors
        x = x.detach().requires_grad_()
        out = rotary(x, cos, sin, case, interleaved)
        outputs.append((out.detach(), *torch.autograd.grad(out, x, dout)))
    for what, result, source in zip(("out", "dx"), outputs[0], inputs[:2], strict=True):
        require(result.dtype == dtype and result.is_contiguous(), f"{what}: not contiguous in x's dtype")
        same = torch.equal(result[..., case.rotary_dim :], source[..., case.rotary_dim :])
        require(same, f"{what}: not as they were from rotary_dim on")
    return list(zip(("out", "dx"), *outputs, strict=True))
