"""What the ops' CPU backends share: how a tensor is passed to ``fastgpt._cpu``."""

from __future__ import annotations

import torch
from torch import Tensor

from fastgpt.ops import philox

DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}  # DType in csrc/include/fastgpt/params.h
MAX_HEADDIM = 256
NO_TENSOR = (0, 0, 0, 0)


def refusals(
    device: str, dtype: torch.dtype, features: tuple[str, ...], supported: tuple[str, ...], headdim: int = 1
) -> list[str]:
    """Why native kernels that have the ``supported`` features cannot serve a call."""
    reasons = []
    if device != "cpu":
        reasons.append(f"the tensors are on {device}, not on the CPU")
    if dtype not in DTYPES:
        reasons.append(f"dtype {dtype} is not float32, bfloat16 or float16")
    if headdim > MAX_HEADDIM:
        reasons.append(f"headdim {headdim} is above {MAX_HEADDIM}")
    missing = [name for name in features if name not in supported]
    return reasons + [f"{name} is not written for the CPU kernels yet" for name in missing]


def pass_tensor(t: Tensor | None) -> tuple[int, ...]:
    """Pointer; batch, seq and head stride of a (batch, seq, head, dim) or packed (seq, head, dim) tensor."""
    if t is None:
        return NO_TENSOR
    return (t.data_ptr(), *t.stride()[:3]) if t.dim() == 4 else (t.data_ptr(), 0, *t.stride()[:2])


def pointer(t: Tensor | None) -> int:
    return 0 if t is None else t.data_ptr()


def pass_dropout(dropout_p: float, rng_state: Tensor | None) -> tuple[int, int, int, float]:
    """The fields of Dropout in csrc/include/fastgpt/params.h: threshold, offset, seed and scale."""
    seed, offset = (0, 0) if rng_state is None else rng_state.tolist()
    return philox.threshold(dropout_p), offset & philox.LOW, seed & (2**64 - 1), 1 / (1 - dropout_p)
