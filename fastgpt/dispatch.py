"""Which backend serves a call.

The order is the ``backend=`` argument, then ``FASTGPT_BACKEND``, then ``auto``. What is asked
for by name never falls back: it raises :class:`BackendUnsupported` with every reason.

A backend is one file per op, ``fastgpt/ops/<op>/<backend>.py``, with a function
``unsupported(call) -> list[str]`` that reads metadata only and returns every reason why it
cannot serve the call, and a row in :data:`BACKENDS` here.
"""

from __future__ import annotations

import ctypes
import functools
import importlib
import logging
import os
import warnings
from collections.abc import Callable
from types import ModuleType
from typing import Any, Protocol, TypeVar

import torch

from fastgpt import proof
from fastgpt.ops import cuda

OPS = ("attention", "decode", "merge", "norm", "rotary")
AUTO_ORDER = {
    "cpu": ("cpu", "torch", "reference"),
    "cuda": ("cuda", "triton", "torch", "reference"),
}
# `auto` takes these where their parity is on record: by (backend, op, architecture), the file in
# benchmarks/results/ that shows it; else by what `fastgpt verify` has left on the user's own device.
GPU_KERNELS = ("triton", "cuda")
PROVEN: dict[tuple[str, str, str], str] = {}
LARGE_REFERENCE = 1 << 26  # elements of the matrix that `reference` materialises

F = TypeVar("F", bound=Callable[..., Any])
logger = logging.getLogger("fastgpt")
_said: set[str] = set()


def traced_as_constant(function: F) -> F:
    """torch.compile evaluates ``function`` while tracing, once per graph.

    What torch.compiler.assume_constant_result does, without importing torch._dynamo (1.5 s).
    """
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


class BackendUnsupported(RuntimeError):
    """The backend that was asked for cannot serve the call; the message lists every reason."""


class Call(Protocol):
    """The metadata of one call of an op; each op's ``spec.py`` has its own."""

    @property
    def op(self) -> str: ...
    @property
    def device(self) -> str: ...
    def describe(self) -> str: ...


def _probe_cpu() -> str | None:
    try:
        try:
            importlib.import_module("fastgpt._cpu")
        except ImportError as error:
            # The module takes OpenMP from whatever torch has loaded; this torch came without any.
            if "GOMP_" not in str(error) and "omp_" not in str(error):
                raise
            ctypes.CDLL("libgomp.so.1", mode=ctypes.RTLD_GLOBAL)
            importlib.import_module("fastgpt._cpu")
    except ModuleNotFoundError as error:
        if error.name != "fastgpt._cpu":
            return f"importing fastgpt._cpu failed: {error}"
        return "the native CPU module was not built (FASTGPT_BUILD=0 at installation, or a bare source tree)"
    except (ImportError, OSError) as error:
        return str(error)
    return None


def _probe_triton() -> str | None:
    try:
        triton = importlib.import_module("triton")
    except ImportError as error:
        return f"importing triton failed: {error}"
    version = tuple(int(part) for part in triton.__version__.split(".")[:2])
    if version < (3, 6):
        return f"triton {triton.__version__} is older than 3.6"
    if not (torch.cuda.is_available() or triton.knobs.runtime.interpret):
        return "torch sees no GPU (TRITON_INTERPRET=1 runs the kernels on the CPU, slowly, to test them)"
    return None


def _probe_always() -> None:
    return None


BACKENDS = {
    "reference": _probe_always,
    "torch": _probe_always,
    "cpu": _probe_cpu,
    "triton": _probe_triton,
    "cuda": cuda.unavailable,
}


@functools.cache
def unavailable(backend: str) -> str | None:
    """Why ``backend`` cannot be used in this process, in its original words; None if it can."""
    return BACKENDS[backend]()


@functools.cache
def implementation(op: str, backend: str) -> ModuleType:
    """The module ``fastgpt.ops.<op>.<backend>``, imported on first use."""
    return importlib.import_module(f"fastgpt.ops.{op}.{backend}")


@functools.cache
def unproven(backend: str, op: str) -> list[str]:
    """Of the GPUs that torch sees, on any of which a tensor may be, those for which the parity of GPU kernels
    is not on record."""
    return [
        f"{torch.cuda.get_device_name(gpu)} ({architecture})"
        for gpu in range(torch.cuda.device_count())
        if (backend, op, architecture := proof.architecture(gpu)) not in PROVEN
        and op not in proof.load(proof.identity(backend, gpu))
    ]


def _reasons(call: Call, backend: str) -> list[str]:
    if reason := unavailable(backend):
        return [reason]
    try:
        module = implementation(call.op, backend)
    except ModuleNotFoundError as error:
        if error.name != f"fastgpt.ops.{call.op}.{backend}":
            raise
        return [f"this version of fastgpt has no {backend} kernels for {call.op}"]
    return list(module.unsupported(call))


def explain(call: Call) -> dict[str, list[str]]:
    """For every backend, each reason why it cannot serve ``call``; an empty list if it can."""
    return {backend: _reasons(call, backend) for backend in BACKENDS}


def requested(backend: str | None) -> str:
    """The name that was asked for: the argument, else ``FASTGPT_BACKEND``, else ``auto``.

    Raises:
        ValueError: the name is not a backend.
    """
    name, origin = backend, "backend"
    if backend is None:
        name, origin = os.environ.get("FASTGPT_BACKEND") or "auto", "FASTGPT_BACKEND"
    if not isinstance(name, str):
        raise TypeError(f"{origin}: got {name!r}, expected the name of a backend")
    if name != "auto" and name not in BACKENDS:
        raise ValueError(f"{origin}: got {name!r}, expected one of auto, {', '.join(BACKENDS)}")
    return name


def resolve(call: Call, name: str) -> str:
    """The backend that serves ``call``, ``name`` being what was asked for (see :func:`requested`).

    Raises:
        BackendUnsupported: the backend asked for, or with ``auto`` every one, cannot.
    """
    if name != "auto":
        if reasons := _reasons(call, name):
            raise BackendUnsupported(
                f"backend {name!r} cannot serve {call.describe()}:\n" + "\n".join(f"  - {r}" for r in reasons)
            )
        return name
    refused = {}
    for candidate in AUTO_ORDER.get(call.device, ("torch", "reference")):
        refused[candidate] = _reasons(call, candidate)
        if not refused[candidate]:
            if candidate not in GPU_KERNELS or not (gpus := unproven(candidate, call.op)):
                return candidate
            missing = " and ".join(sorted(set(gpus)))
            refused[candidate] = [f"its parity on {missing} is not on record"]
            say_once(
                logging.WARNING,
                f"fastgpt: `auto` passes over {candidate} kernels whose parity on {missing} is not on "
                f"record: run `fastgpt verify` once there, hide that GPU by CUDA_VISIBLE_DEVICES, or ask for "
                f"backend={candidate!r}",
            )
        if any("FASTGPT_CPU_ISA" in reason for reason in refused[candidate]):
            raise BackendUnsupported("; ".join(refused[candidate]))  # asked for, so not passed over
        say_once(logging.DEBUG, f"{call.op}: {candidate} passed over: {'; '.join(refused[candidate])}")
    listed = "\n".join(f"  - {name}: {reason}" for name, reasons in refused.items() for reason in reasons)
    raise BackendUnsupported(f"no backend can serve {call.describe()}:\n{listed}")


@functools.cache
def _chosen(
    asked: str,
    call_type: Callable[..., Call],
    features: tuple[str, ...],
    used: tuple[bool, ...],
    metadata: tuple[Any, ...],
) -> str:
    names = tuple(name for name, is_used in zip(features, used, strict=True) if is_used)
    return resolve(call_type(*metadata, names), asked)


_choose_while_tracing = traced_as_constant(lambda *key: _chosen(*key))


def choose(
    asked: str,
    call_type: Callable[..., Call],
    features: tuple[str, ...],
    used: tuple[bool, ...],
    *metadata: Any,
) -> str:
    """:func:`resolve` of ``call_type(*metadata, those of features that are used)``, remembered;
    torch.compile takes it for a constant.
    """
    if not torch.compiler.is_compiling():
        return _chosen(asked, call_type, features, used, metadata)
    # Comparing a symbolic number gives a symbolic answer; branching on it makes it a guard and a constant.
    features = tuple(name for name, is_used in zip(features, used, strict=True) if is_used)
    return _choose_while_tracing(asked, call_type, features, (True,) * len(features), metadata)


def warn_if_slow(asked: str, op: str, elements: int, stacklevel: int) -> None:
    """Warns once per op, at the caller's line, where ``auto`` has landed on `reference` for a large input."""
    if torch.compiler.is_compiling():
        return
    if asked == "auto" and elements > LARGE_REFERENCE and op not in _said:
        _said.add(op)
        warnings.warn(
            f"fastgpt: {op} of {elements:,} elements runs on the slow 'reference' backend; "
            "backend='cpu' (or another) says why it cannot serve this call",
            RuntimeWarning,
            stacklevel=stacklevel,
        )


def say_once(level: int, text: str) -> None:
    if text not in _said:
        _said.add(text)
        logger.log(level, text)
