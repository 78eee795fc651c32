"""Which backends the tests run; the rule by which their results are judged is the package's."""

from __future__ import annotations

import os
from collections.abc import Callable

import torch

import fastgpt
from fastgpt import dispatch
from fastgpt.verify import rule
from fastgpt.verify.rule import DTYPES, assert_parity, factor_of

__all__ = ["AVAILABLE", "DTYPES", "REQUIRED", "assert_parity", "factor_of", "judge", "poison_scratch"]

REQUIRED = tuple(filter(None, os.environ.get("FASTGPT_REQUIRE_BACKENDS", "").split(",")))

# A required backend is tested even where it is unavailable: its tests then fail with the reason.
AVAILABLE = tuple(name for name in dispatch.BACKENDS if name in REQUIRED or not dispatch.unavailable(name))


def poison_scratch() -> None:
    """NaN into what the CPU kernels keep of their scratch memory."""
    if dispatch.unavailable("cpu"):
        return
    nan = [torch.full((1, 128, 4, 64), torch.nan, requires_grad=True) for _ in range(3)]
    with torch.enable_grad():
        fastgpt.attention(*nan, backend="cpu").sum().backward()


def judge(draw: Callable[[], list[rule.Result]], least: int = 64) -> None:
    """:func:`fastgpt.verify.rule.judge`; what the example before has left in scratch memory is finite."""
    poison_scratch()
    rule.judge(draw, least)
