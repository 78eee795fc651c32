"""How the Triton kernels of all ops are launched: on what chip, in which configuration."""

from __future__ import annotations

import contextlib
import contextvars
import functools
import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, NamedTuple, TypeVar

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastgpt.ops.native import architecture, limits

_C = TypeVar("_C")

INTERPRETED: bool = triton.knobs.runtime.interpret  # decided when kernels are decorated
VECTOR = 16  # bytes that a thread loads at once
LEAST_SCALE = 1e-37  # by which −inf can be multiplied: less may be 0 in fp32


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
    if device == "cpu" and not INTERPRETED:
        reasons.append("the tensors are on the CPU, where Triton runs under TRITON_INTERPRET=1 alone")
    if device == "cuda" and INTERPRETED:
        reasons.append("the tensors are on a GPU, and TRITON_INTERPRET=1 has Triton's kernels run on the CPU")
    if device not in ("cpu", "cuda"):
        reasons.append(f"the tensors are on {device}, not on a GPU")
    return reasons + limits("Triton", dtype, features, supported, headdim)


class Chip(NamedTuple):
    """What the launchers ask about a GPU."""

    architecture: str  # the key of launch tables: sm_90, gfx942, ...; "interpreter" under TRITON_INTERPRET=1
    multiprocessors: int

    @property
    def warp_size(self) -> int:
        """Threads of a warp."""
        return 64 if self.architecture.startswith("gfx9") else 32

    @property
    def precision(self) -> str:
        """Of products of fp32: see fastgpt.ops.device.dot."""
        return "ieee" if self.architecture.startswith("gfx") else "tf32x3"

    @property
    def tma(self) -> bool:
        """Whether it copies tiles by tensor descriptors."""
        return self.architecture == "interpreter" or (
            self.architecture.startswith("sm_") and int(self.architecture[3:]) >= 90
        )


@functools.cache
def _chip(device: torch.device) -> Chip:
    if INTERPRETED:
        return Chip("interpreter", 4)
    properties = torch.cuda.get_device_properties(device)
    return Chip(architecture(device), properties.multi_processor_count)


def chip(device: torch.device) -> Chip:
    """The GPU that a tensor is on; while compiling, the one that is compiled for."""
    return _chip(device) if _compiling is None else _compiling.chip


Key = tuple[int, str, int, str]  # of a row: its table's id, chip, width and direction
_rows: dict[Key, tuple[Key, Config]] = {}  # looked up before, by the width that was asked for
_found: dict[Key, Config] = {}  # what FASTGPT_AUTOTUNE=1 tries, or has found
_asked: dict[Key, Config] | None = None  # while it looks which rows a call asks for


def choose(
    table: Mapping[tuple[str, int, str], Config], width: int, direction: str, architecture: str
) -> Config:
    """The table's row of the least width that is enough: of this chip's, or else of ``default``."""
    asked = id(table), architecture, width, direction
    if asked not in _rows:
        for name in (architecture, "default"):
            rows = {w: row for (own, w, kind), row in table.items() if (own, kind) == (name, direction)}
            if enough := [w for w in rows if w >= width]:
                break
        _rows[asked] = (id(table), architecture, min(enough), direction), rows[min(enough)]
    key, row = _rows[asked]
    if _asked is not None:
        _asked[key] = row
    return _found.get(key, row)


@functools.lru_cache(maxsize=4096, typed=True)
def constants(kind: Callable[..., _C], *values: Any) -> _C:
    """The NamedTuple ``kind`` of constexprs. For the same values it is the same object: Triton finds a kernel
    by its arguments, and comparing other objects with them takes longer than all else that a launch does."""
    return kind(*map(tl.constexpr, values))


def tuned(function: Callable[..., Any]) -> Callable[..., Any]:
    """With FASTGPT_AUTOTUNE=1, ``function`` searches for a better row of its table wherever it uses one for
    the first time, goes on with it and prints it, to be committed."""
    if os.environ.get("FASTGPT_AUTOTUNE") != "1":
        return function

    @functools.wraps(function)
    def searching(*args: Any) -> Any:
        global _asked
        _asked = {}
        try:
            expected = function(*args)
        finally:
            asked, _asked = _asked, None
        for key, row in asked.items():
            if key not in _found:
                _search(key, row, functools.partial(function, *args), expected)
        return function(*args)

    return searching


def _search(key: Key, row: Config, run: Callable[[], Any], expected: Any) -> None:
    """The fastest of the row's neighbours: first in tile and warps, then in stages."""

    def milliseconds(config: Config) -> float:
        _found[key] = config
        try:  # what does not fit the chip raises; what leaves out a part of the work is no candidate
            torch.testing.assert_close(run(), expected, rtol=0.05, atol=0.05, equal_nan=True)
            return triton.testing.do_bench(run)
        except Exception:
            return math.inf

    def fastest(configs: Iterable[Config]) -> Config:
        times.update({config: milliseconds(config) for config in configs if config not in times})
        return min(times, key=lambda config: times[config])

    times = {row: milliseconds(row)}
    sizes = [[size // 2, size, 2 * size] if size > 1 else [1, 2] for size in row[:2]]
    best = fastest(
        Config(m, n, warps, row.num_stages) for m in sizes[0] for n in sizes[1] for warps in (4, 8)
    )
    best = fastest(best._replace(num_stages=stages) for stages in (1, 2, 3, 4))
    _found[key] = best
    entry = f'("{key[1]}", {key[2]}, "{key[3]}"): Config{tuple(best)},'
    print(f"{entry}  # {times[best]:.4f} ms, by {tuple(row)} {times[row]:.4f}", flush=True)


@functools.cache
def block_dim(headdim: int) -> int:
    """The power of two that holds a row; tl.dot wants 16 at least."""
    return max(16, triton.next_power_of_2(headdim))


def strides(*tensors: Tensor | None) -> list[int]:
    """Of (batch, seqlen, nheads, headdim) or packed (total, nheads, headdim): by batch, 0 if packed, sequence
    and head. All 0 of None."""
    found: list[int] = []
    for t in tensors:
        found += (0, 0, 0) if t is None else t.stride()[:3] if t.dim() == 4 else (0, *t.stride()[:2])
    return found


def stride_multiple(strides: Iterable[int], element_size: int) -> int:
    """Elements of 16 bytes, if that divides all of these strides, or 1."""
    vector = VECTOR // element_size
    return vector if all(stride % vector == 0 for stride in strides) else 1


def vector_multiple(*tensors: Tensor) -> int:
    """Elements of 16 bytes, if that divides the address and every stride but the last of these tensors of one
    dtype, or 1."""
    if any(t.data_ptr() % VECTOR for t in tensors):
        return 1
    return stride_multiple([stride for t in tensors for stride in t.stride()[:-1]], tensors[0].element_size())


class _Compiling(NamedTuple):
    chip: Chip
    kernels: list[Any]  # triton.compiler.CompiledKernel


_compiling: _Compiling | None = None


def _scratch(size: int, alignment: int, stream: int | None) -> Tensor:
    """Where a kernel keeps the tensor descriptors that it makes."""
    return torch.empty(size, dtype=torch.int8, device="cuda")


def _run(kernel: Any, programs: int, args: tuple[Any, ...], constants: dict[str, Any]) -> None:
    triton.set_allocator(_scratch)
    kernel[(programs,)](*args, **constants)


def launch(
    kernel: Any, programs: int, config: Config, device: torch.device, *args: Any, **constants: Any
) -> None:
    """Runs ``programs`` programs of a kernel on the current stream of ``device``."""
    if programs == 0:
        return
    constants |= {"num_warps": config.num_warps, "num_stages": config.num_stages}
    if _compiling is not None:
        _compiling.kernels.append(kernel.warmup(*args, grid=(programs,), **constants))
    elif INTERPRETED:
        kernel[(programs,)](*args, **constants)
    else:
        elsewhere = device.index != torch.cuda.current_device()
        with torch.cuda.device(device) if elsewhere else contextlib.nullcontext():
            # In a context of its own: the allocator that the user may have set stays.
            contextvars.copy_context().run(_run, kernel, programs, args, constants)


class _Offline:
    """Stands where Triton looks for a GPU's driver, and names a chip that need not be there."""

    def __init__(self, backend: str, arch: int | str, warp_size: int) -> None:
        from triton.backends.compiler import GPUTarget

        self._target = GPUTarget(backend, arch, warp_size)

    def get_current_target(self) -> Any:
        return self._target

    def get_current_device(self) -> Any:
        return self._target  # by which a kernel keeps what was compiled for a device

    def get_current_stream(self, device: Any = None) -> int:
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
    # With as many multiprocessors as an H100 has.
    _compiling = _Compiling(Chip(f"sm_{arch}" if backend == "cuda" else str(arch), 132), [])
    drivers, before = triton.runtime.driver, triton.runtime.driver._active
    drivers.set_active(_Offline(backend, arch, warp_size))
    try:
        yield _compiling.kernels
    finally:
        _compiling = None
        drivers._active = before
