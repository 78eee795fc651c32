"""What the ops' kernels share on the host: the CPU's, Triton's and CUDA's."""

from __future__ import annotations

import torch
from torch import Tensor

from fastgpt.ops import philox

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
MAX_HEADDIM = 256


def limits(
    kernels: str, dtype: torch.dtype, features: tuple[str, ...], supported: tuple[str, ...], headdim: int
) -> list[str]:
    """Why kernels that have the ``supported`` features cannot serve a call, wherever its tensors are."""
    reasons = []
    if dtype not in DTYPES:
        reasons.append(f"dtype {dtype} is not float32, bfloat16 or float16")
    if headdim > MAX_HEADDIM:
        reasons.append(f"headdim {headdim} is above {MAX_HEADDIM}")
    missing = [name for name in features if name not in supported]
    return reasons + [f"{name} is not written for the {kernels} kernels yet" for name in missing]


def refusals(
    device: str, dtype: torch.dtype, features: tuple[str, ...], supported: tuple[str, ...], headdim: int = 1
) -> list[str]:
    """Why CPU kernels that have the ``supported`` features cannot serve a call."""
    place = [] if device == "cpu" else [f"the tensors are on {device}, not on the CPU"]
    return place + limits("CPU", dtype, features, supported, headdim)


def architecture(device: torch.device | int) -> str:
    """Of a GPU: sm_90, gfx942, ..."""
    properties = torch.cuda.get_device_properties(device)
    if torch.version.hip:
        return str(properties.gcnArchName).partition(":")[0]
    return f"sm_{properties.major}{properties.minor}"


def as_rows(t: Tensor) -> tuple[Tensor, int]:
    """(rows, hidden) of the tensor, and the row stride; a copy where the leading axes have no common one."""
    hidden = t.shape[-1]
    if t.is_contiguous():
        return t, hidden
    t = t.reshape(-1, hidden)
    return t, t.stride(0)


def contiguous(t: Tensor | None) -> Tensor | None:
    return None if t is None else t.contiguous()


def contiguous_fp32(t: Tensor | None) -> Tensor | None:
    return None if t is None else t.float().contiguous()


def pass_dropout(dropout_p: float, rng_state: Tensor | None) -> tuple[int, int, int, float] | None:
    """The fields of Dropout in csrc/include/fastgpt/params.h: threshold, offset, seed and scale."""
    if rng_state is None:
        return None
    seed, offset = rng_state.tolist()
    return philox.threshold(dropout_p), offset & philox.LOW, seed & (2**64 - 1), 1 / (1 - dropout_p)
