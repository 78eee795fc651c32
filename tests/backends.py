"""Which backends the tests run, and the one rule by which their results are judged."""

from __future__ import annotations

import os
from collections.abc import Callable

import torch

import fastgpt
from fastgpt import dispatch

REQUIRED = tuple(filter(None, os.environ.get("FASTGPT_REQUIRE_BACKENDS", "").split(",")))

# A required backend is tested even where it is unavailable: its tests then fail with the reason.
AVAILABLE = tuple(name for name in dispatch.BACKENDS if name in REQUIRED or not dispatch.unavailable(name))

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def poison_scratch() -> None:
    """NaN into what the CPU kernels keep of their scratch memory."""
    if dispatch.unavailable("cpu"):
        return
    nan = [torch.full((1, 128, 4, 64), torch.nan, requires_grad=True) for _ in range(3)]
    with torch.enable_grad():
        fastgpt.attention(*nan, backend="cpu").sum().backward()


def assert_parity(
    what: str,
    got: torch.Tensor,
    plain: torch.Tensor,
    exact: torch.Tensor,
    factor: float = 2,
    floor: float = 1e-5,
) -> None:
    """max|got − exact| ≤ factor · max|plain − exact| + floor · max(1, max|exact|).

    ``plain`` is the same computation by plain PyTorch in the same dtype, ``exact`` in float64. factor
    is 2 for outputs and 3 for gradients. Infinities must stand in the same places.
    """
    assert got.shape == exact.shape, f"{what}: shape {tuple(got.shape)}, expected {tuple(exact.shape)}"
    assert not got.isnan().any(), f"{what}: {int(got.isnan().sum())} of {got.numel()} are NaN"
    got, plain = got.double(), plain.double()
    infinite = exact.isinf()
    if infinite.any():
        assert torch.equal(got[infinite], exact[infinite]), f"{what}: infinities differ"
        got, plain, exact = (t[~infinite] for t in (got, plain, exact))
    if exact.numel() == 0:
        return
    error = (got - exact).abs().max().item()
    plain_error = (plain - exact).abs().max().item()
    bound = factor * plain_error + floor * max(1.0, exact.abs().max().item())
    assert error <= bound, f"{what}: error {error:.3e}, bound {bound:.3e} (plain PyTorch {plain_error:.3e})"


def factor_of(what: str) -> int:
    return 3 if what.startswith("d") else 2


def judge(draw: Callable[[], list[tuple[str, torch.Tensor, torch.Tensor, torch.Tensor]]]) -> None:
    """:func:`assert_parity` of the (what, got, plain, exact) that ``draw`` gives for fresh random inputs.

    Over a few elements the error of plain PyTorch is a matter of luck, and may be 0. There, several draws are
    judged as one.
    """
    poison_scratch()  # what the example before has left there is finite
    draws = [draw()]
    fewest = min((exact.numel() for *_, exact in draws[0] if exact.numel()), default=64)
    draws += [draw() for _ in range(min(64 // fewest, 16) - 1)]
    for results in zip(*draws, strict=True):
        names, *values = zip(*results, strict=True)
        got, plain, exact = (torch.stack([t.double() for t in tensors]) for tensors in values)
        assert_parity(names[0], got, plain, exact, factor_of(names[0]))
