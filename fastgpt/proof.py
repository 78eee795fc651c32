"""What ``fastgpt verify`` has shown on the user's own device: a file in the user's cache.

It holds for that device, driver and versions alone; with others it is not found.
"""

from __future__ import annotations

import functools
import hashlib
import importlib.metadata
import json
import os
from pathlib import Path

import torch

from fastgpt.ops.native import architecture


def _driver() -> str:
    for path in ("/proc/driver/nvidia/version", "/sys/module/amdgpu/version"):
        try:
            return Path(path).read_text().splitlines()[0]
        except (OSError, IndexError):
            continue
    return "unknown"


def _version(distribution: str) -> str:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return "unknown"


@functools.cache
def _sources(backend: str) -> str:
    """A digest of the package's ops, and of the native module that has the kernels: a proof ends where they
    change, whatever the version says."""
    digest, package = hashlib.sha256(), Path(__file__).parent
    native = package.glob("_cuda.*") if backend == "cuda" else ()
    for file in sorted([*(package / "ops").rglob("*.py"), *native]):
        digest.update(file.read_bytes())
    return digest.hexdigest()[:16]


def identity(backend: str, device: torch.device | int) -> dict[str, str]:
    """What a proof made on this GPU holds for."""
    return {
        "backend": backend,
        "device": torch.cuda.get_device_name(device),
        "architecture": architecture(device),
        "driver": _driver(),
        "torch": torch.__version__,
        "triton": _version("triton"),
        "fastgpt": _version("fastgpt-kernels"),
        "sources": _sources(backend),
    }


def path(identity: dict[str, str]) -> Path:
    """Where the proof for it is kept."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    digest = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()
    return cache / "fastgpt" / f"verified-{digest[:16]}.json"


def save(identity: dict[str, str], ops: list[str]) -> Path:
    """Keeps that these ops have passed, and no others."""
    file = path(identity)
    file.parent.mkdir(parents=True, exist_ok=True)
    partial = file.with_suffix(f".{os.getpid()}")
    partial.write_text(json.dumps({**identity, "ops": ops}, indent=1))
    partial.replace(file)
    return file


def load(identity: dict[str, str]) -> list[str]:
    """The ops that have passed; none where the file is missing or is no proof of this."""
    try:
        kept = json.loads(path(identity).read_text())
        ops = kept.pop("ops")
    except (OSError, RuntimeError, ValueError, KeyError, AttributeError):  # also where there is no home
        return []
    return list(ops) if kept == identity else []
