"""How the Triton kernels of all ops are launched: on what chip, in which configuration."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
VECTOR = 16  # bytes that a thread loads at once


class Config(NamedTuple):
    """A launch configuration: the tile's sizes, warps of a program, stages of its loads' pipeline."""

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int


def refusals(
    device: str, dtype: torch.dtype, features: tuple[str, ...], supported: tuple[str, ...], headdim: int = 1
) -> list[str]:
    """Why Triton kernels that have the ``supported`` features cannot serve a call."""
    reasons = []
    if device == "cpu" and not triton.knobs.runtime.interpret:
        reasons.append("the tensors are on the CPU, where Triton runs under TRITON_INTERPRET=1 alone")
    if device not in ("cpu", "cuda"):
        reasons.append(f"the tensors are on {device}, not on a GPU")
    if dtype not in DTYPES:
        reasons.append(f"dtype {dtype} is not float32, bfloat16 or float16")
    if headdim > 256:
        reasons.append(f"headdim {headdim} is above 256")
    missing = [name for name in features if name not in supported]
    return reasons + [f"{name} is not written for the Triton kernels yet" for name in missing]


@functools.cache
def _architecture(index: int) -> str:
    target = triton.runtime.driver.active.get_current_target()
    return f"sm_{target.arch}" if target.backend == "cuda" else str(target.arch)


def architecture() -> str:
    """The key of launch tables: sm_90, gfx942, ...; ``interpreter`` under TRITON_INTERPRET=1."""
    if triton.knobs.runtime.interpret:
        return "interpreter"
    if _compiling is not None:
        return _compiling.architecture
    return _architecture(torch.cuda.current_device())


@functools.cache
def _multiprocessors(index: int) -> int:
    return torch.cuda.get_device_properties(index).multi_processor_count


def multiprocessors() -> int:
    """Of the current GPU; elsewhere a number that makes tests at small sizes use several."""
    if triton.knobs.runtime.interpret or _compiling is not None:
        return 4
    return _multiprocessors(torch.cuda.current_device())


def precision() -> str:
    """Of products of fp32: see fastgpt.ops.device.dot."""
    return "ieee" if architecture().startswith("gfx") else "tf32x3"


def choose(table: Mapping[tuple[str, int, str], Config], width: int, direction: str) -> Config:
    """The table's row for this chip, or for unknown chips ``default``: of the least width that is enough."""
    arch = architecture()
    known = any(key[0] == arch for key in table)
    rows = {
        key[1]: row
        for key, row in table.items()
        if key[0] == (arch if known else "default") and key[2] == direction
    }
    return rows[min(w for w in rows if w >= width)]


def block_dim(headdim: int) -> int:
    """The power of two that holds a row; tl.dot wants 16 at least."""
    return max(16, triton.next_power_of_2(headdim))


def vector_multiple(*tensors: Tensor) -> int:
    """Elements of 16 bytes if that divides every stride but the last of all these tensors, of one dtype; else 1."""
    return multiple([stride for t in tensors for stride in t.stride()[:-1]], tensors[0].element_size())


def multiple(strides: Iterable[int], element_size: int) -> int:
    """The same of strides."""
    vector = VECTOR // element_size
    return vector if all(stride % vector == 0 for stride in strides) else 1


class _Compiling(NamedTuple):
    architecture: str
    kernels: list[Any]  # triton.compiler.CompiledKernel


_compiling: _Compiling | None = None


def launch(
    kernel: Any, programs: int, config: Config, device: torch.device, *args: Any, **constants: Any
) -> None:
    """Runs ``programs`` programs of a kernel on the current stream of ``device``."""
    if programs == 0:
        return
    constants |= {"num_warps": config.num_warps, "num_stages": config.num_stages}
    if _compiling is not None:
        _compiling.kernels.append(kernel.warmup(*args, grid=(programs,), **constants))
    elif device.type == "cuda" and device.index != torch.cuda.current_device():
        with torch.cuda.device(device):
            kernel[(programs,)](*args, **constants)
    else:
        kernel[(programs,)](*args, **constants)


class _Offline:
    """Stands where Triton looks for a GPU's driver, and names a chip that need not be there."""

    def __init__(self, backend: str, arch: int | str, warp_size: int) -> None:
        from triton.backends.compiler import GPUTarget

        self._target = GPUTarget(backend, arch, warp_size)

    def get_current_target(self) -> Any:
        return self._target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int = 0) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("meta")


@contextlib.contextmanager
def compile_only(backend: str, arch: int | str, warp_size: int) -> Iterator[list[Any]]:
    """Launches inside compile for a chip (``("cuda", 90, 32)``, say) instead, on tensors of the device meta.

    Yields:
        The list to which each launch adds its ``triton.compiler.CompiledKernel``.
    """
    global _compiling
    key = f"sm_{arch}" if backend == "cuda" else str(arch)
    _compiling = _Compiling(key, [])
    drivers, before = triton.runtime.driver, triton.runtime.driver._active
    drivers.set_active(_Offline(backend, arch, warp_size))
    try:
        yield _compiling.kernels
    finally:
        _compiling = None
        drivers._active = before
