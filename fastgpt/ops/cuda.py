"""What the ops' CUDA backends share: the native module, and where its kernels run."""

from __future__ import annotations

import functools
import importlib
import os
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fastgpt.ops import philox
from fastgpt.ops.native import limits

# The kernels on CPU tensors, slowly, to test them: csrc/cuda/emulator.h.
EMULATED = os.environ.get("FASTGPT_CUDA_EMULATE") == "1"
MODULE = "fastgpt._cuda_emulated" if EMULATED else "fastgpt._cuda"
OLDEST = (8, 0)  # compute capability

Queue = tuple[int, int]


def load() -> Any:
    """The native module."""
    return importlib.import_module(MODULE)


def unavailable() -> str | None:
    """Why the kernels cannot run in this process."""
    try:
        module = load()
    except ModuleNotFoundError as error:
        if error.name != MODULE:
            return f"importing {MODULE} failed: {error}"
        if EMULATED:
            return "the emulated CUDA kernels were not built (FASTGPT_EMULATE=1 at installation builds them)"
        return (
            "the CUDA kernels were not built: nvcc was not found when the package was built, or it was built "
            "with FASTGPT_CUDA=0 (FASTGPT_CUDA=1 builds them, or says what is missing)"
        )
    except ImportError as error:
        return str(error)
    if EMULATED:
        return None
    if torch.version.cuda is None:
        return f"torch {torch.__version__} was built without CUDA"
    if reason := module.unavailable():
        return str(reason)
    if not torch.cuda.is_available():
        return "torch sees no GPU"
    if older := gpus_not(lambda capability: capability >= OLDEST):
        return f"the kernels need sm_80 or later, and {older}"
    newest = max(torch.cuda.get_device_capability(gpu) for gpu in range(torch.cuda.device_count()))
    return module.unavailable(newest[0]) or None


def gpus_not(suitable: Callable[[tuple[int, int]], bool]) -> str:
    """Of the GPUs that torch sees, on any of which a tensor may be, those that are not ``suitable``."""
    others = []
    for gpu in range(torch.cuda.device_count()):
        major, minor = torch.cuda.get_device_capability(gpu)
        if not suitable((major, minor)):
            others.append(f"cuda:{gpu} ({torch.cuda.get_device_name(gpu)}) is sm_{major}{minor}")
    hidden = ": CUDA_VISIBLE_DEVICES can hide it" if len(others) < torch.cuda.device_count() else ""
    return " and ".join(others) + hidden if others else ""


def refusals(
    device: str, dtype: torch.dtype, features: tuple[str, ...], supported: tuple[str, ...], headdim: int = 1
) -> list[str]:
    """Why CUDA kernels that have the ``supported`` features cannot serve a call."""
    reasons = []
    if EMULATED and device != "cpu":
        reasons.append(
            f"the tensors are on {device}, and FASTGPT_CUDA_EMULATE=1 has the kernels run on the CPU"
        )
    if not EMULATED and device != "cuda":
        reasons.append(f"the tensors are on {device}, not on a GPU")
    return reasons + limits("CUDA", dtype, features, supported, headdim)


def queue(t: Tensor) -> Queue:
    """The device of a tensor, and torch's current stream there."""
    device = t.get_device()
    if EMULATED:
        return device, 0
    # torch.cuda.current_stream(device).cuda_stream, without the object, which takes longer than a launch.
    return device, torch._C._cuda_getCurrentRawStream(device)


@functools.cache
def multiprocessors(device: torch.device) -> int:
    if EMULATED:
        return 2
    return int(torch.cuda.get_device_properties(device).multi_processor_count)


def pass_dropout(dropout_p: float, rng_state: Tensor | None) -> tuple[Tensor, int, float] | None:
    """The fields of DeviceDropout in csrc/include/fastgpt/params.h."""
    if rng_state is None:
        return None
    return rng_state.contiguous(), philox.threshold(dropout_p), 1 / (1 - dropout_p)
