"""Kernels in the places of torch's own, in its dispatcher, and back."""

from __future__ import annotations

import logging
import warnings
from collections import deque
from collections.abc import Callable
from typing import Any

import torch

from fastgpt import dispatch

# A call does not hold the kernel that torch's dispatcher has found for it. Freed meanwhile by another thread,
# one has been seen to run as some other function; so the last few hundred are kept.
_alive: deque[Any] = deque(maxlen=1024)


def left(operator: str, reason: str | None) -> bool:
    """Whether a call is left to torch, and says why."""
    if reason is not None:
        dispatch.say_once(logging.DEBUG, f"{operator} is left to torch: {reason}")
    return reason is not None


def original(operator: str, key: str) -> Callable[..., Any] | None:
    """The kernel that is in place now; None where this torch has none."""
    try:
        kernel = torch.library.get_kernel(f"aten::{operator}", key)
    except RuntimeError:
        return None
    return lambda first, *args, **kwargs: kernel.call_boxed(
        torch._C._dispatch_keys(first), first, *args, **kwargs
    )


def override(kernels: dict[tuple[str, str], Callable[..., Any]]) -> torch.library.Library:
    """Puts them, by operator and key, in the place of torch's until the library is destroyed."""
    library = torch.library.Library("aten", "IMPL")
    with warnings.catch_warnings():  # torch's, that there was a kernel
        warnings.simplefilter("ignore")
        for (operator, key), kernel in kernels.items():
            library.impl(operator, kernel, key, allow_override=True)
            _alive.append(torch.library.get_kernel(f"aten::{operator}", key))
    return library
