"""The one rule by which numbers are judged."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

# What is compared: its name, the backend's, plain PyTorch's in the same dtype, and the same in float64.
Result = tuple[str, Tensor, Tensor, Tensor]
FEW = 1 << 14  # elements
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


class ParityError(AssertionError):
    """A result is not what it should be; the message says by how much."""

    elements = 0  # of the tensor


def require(holds: bool, message: str) -> None:
    if not holds:
        raise ParityError(message)


def as_called() -> torch.device:
    """Around a call under test: cases are made on torch's default device, and no kernel may lean on that."""
    return torch.device("cpu")


def assert_parity(
    what: str, got: Tensor, plain: Tensor, exact: Tensor, factor: float = 2, floor: float = 1e-5
) -> float:
    """max|got − exact| ≤ factor · max|plain − exact| + floor · max(1, max|exact|).

    ``plain`` is the same computation by plain PyTorch in the same dtype, ``exact`` in float64. factor
    is 2 for outputs and 3 for gradients. Infinities must stand in the same places.

    Returns:
        The error, as a share of what it may be.

    Raises:
        ParityError: it is larger.
    """
    require(got.shape == exact.shape, f"{what}: shape {tuple(got.shape)}, expected {tuple(exact.shape)}")
    require(not got.isnan().any(), f"{what}: {int(got.isnan().sum())} of {got.numel()} are NaN")
    got, plain = got.double(), plain.double()
    infinite = exact.isinf()
    if infinite.any():
        require(torch.equal(got[infinite], exact[infinite]), f"{what}: infinities differ")
        got, plain, exact = (t[~infinite] for t in (got, plain, exact))
    if exact.numel() == 0:
        return 0.0
    error = (got - exact).abs().max().item()
    plain_error = (plain - exact).abs().max().item()
    bound = factor * plain_error + floor * max(1.0, exact.abs().max().item())
    require(error <= bound, f"{what}: error {error:.3e}, bound {bound:.3e} (plain PyTorch {plain_error:.3e})")
    return error / bound


def factor_of(what: str) -> int:
    return 3 if what.startswith("d") else 2


def judge(draw: Callable[[], list[Result]], least: int = 64) -> dict[str, float]:
    """:func:`assert_parity` of what ``draw`` gives for fresh random inputs, by name.

    Over a few elements the error of plain PyTorch is a matter of luck, and may be 0. There, several draws are
    judged as one: ``least`` elements, or 16 draws. One case in a thousand still has bad luck in 64, and in
    bf16 in thousands, where the few largest alone count (both seen, of correct kernels); so where a tensor of
    up to FEW elements fails, all are judged once more among 4 times as many draws, with these.
    """
    draws = [draw()]
    fewest = min((exact.numel() for *_, exact in draws[0] if exact.numel()), default=least)
    draws += [draw() for _ in range(min(least // fewest, 16) - 1)]
    try:
        return _judged(draws)
    except ParityError as error:
        if error.elements > FEW:
            raise
    return _judged(draws + [draw() for _ in range(3 * len(draws))])


def _judged(draws: list[list[Result]]) -> dict[str, float]:
    shares = {}
    for results in zip(*draws, strict=True):
        what = results[0][0]
        got, plain, exact = (torch.stack([r[i].double() for r in results]) for i in (1, 2, 3))
        try:
            shares[what] = assert_parity(what, got, plain, exact, factor_of(what))
        except ParityError as error:
            error.elements = exact.numel()
            raise
    return shares
