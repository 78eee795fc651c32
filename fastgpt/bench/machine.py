"""The machine a benchmark ran on: its description, and the rates that it reaches by itself."""

from __future__ import annotations

import functools
import importlib.metadata
import os
import platform
import shutil
import subprocess
from pathlib import Path

import torch

from fastgpt import dispatch
from fastgpt.bench.harness import DTYPES, measure, timer_for

SGEMM_SIZE = 2048
GEMM_SIZE = 8192
SMALLEST_BUFFER = 256 * 2**20  # bytes; the buffers are this or LLC_FACTOR last-level caches, if that is more
LLC_FACTOR = 8


def _cpu_model() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def _os_name() -> str:
    try:
        return f"{platform.freedesktop_os_release()['PRETTY_NAME']}, {platform.system()} {platform.release()}"
    except (OSError, KeyError):
        return platform.platform()


def _version(distribution: str) -> str:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _output(*command: str) -> str | None:
    """What ``command`` prints; None where it is missing or fails."""
    if shutil.which(command[0]) is None:
        return None
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return done.stdout.strip() if done.returncode == 0 else None


def _commit() -> str | None:
    """The commit of the checkout that fastgpt is imported from, with -dirty if it was changed since."""
    root = Path(__file__).resolve().parents[2]
    if not (root / ".git").exists():
        return None
    return _output("git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*")


def isa() -> str:
    """The instruction set that the native CPU kernels chose, or why there are none."""
    if reason := dispatch.unavailable("cpu"):
        return f"no native CPU module: {reason}"
    from fastgpt import _cpu

    return f"{_cpu.isa} (built: {_cpu.built_isas})"


def describe() -> dict[str, str | int]:
    """What a reader of a number, or of a bug report, has to know. No paths, no host name."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    facts: dict[str, str | int] = {
        "cpu": _cpu_model(),
        "architecture": platform.machine(),
        "cores": cores,
        "threads": torch.get_num_threads(),
        "fastgpt ISA": isa(),
        "torch ISA": torch.backends.cpu.get_cpu_capability(),
        "memory": f"{memory / 2**30:.1f} GiB",
        "os": _os_name(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": _version("triton"),
        "fastgpt": _version("fastgpt-kernels"),
    }
    if commit := _commit():
        facts["commit"] = commit
    if torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(0)
        facts["gpu"] = f"{properties.name}, sm_{properties.major}{properties.minor}"
        facts["gpu memory"] = f"{properties.total_memory / 2**30:.1f} GiB"
        facts["gpu driver"] = (
            _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader", "--id=0")
            or "unknown"
        )
    return facts


def _last_level_cache(device: str) -> int:
    """Bytes; 0 if the system does not say."""
    if device == "cuda":
        return torch.cuda.get_device_properties(0).L2_cache_size
    units = {"K": 2**10, "M": 2**20, "G": 2**30}
    sizes = [
        int(text[:-1]) * units[text[-1]]
        for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size")
        if (text := path.read_text().strip()) and text[-1] in units
    ]
    return max(sizes, default=0)


def ceilings(device: str, budget: float) -> dict[str, float]:
    """The rates that torch's simplest calls reach here, which no kernel is expected to pass by much.

    Returns:
        ``sgemm`` in FLOP/s: a 2048³ float32 matrix product; on a GPU ``bf16 gemm`` and ``fp16 gemm``, of
        8192³. ``read`` in B/s: the sum of a buffer much
        larger than the last-level cache. ``copy`` in B/s, bytes read plus bytes written: that buffer
        copied to another.
    """
    a, b, c = (torch.randn(SGEMM_SIZE, SGEMM_SIZE, device=device) for _ in range(3))
    size = max(SMALLEST_BUFFER, LLC_FACTOR * _last_level_cache(device))
    source, target = (torch.ones(size // 4, device=device) for _ in range(2))
    calls = {
        "sgemm": lambda: torch.mm(a, b, out=c),
        "read": lambda: source.sum(),
        "copy": lambda: target.copy_(source),
    }
    amounts = {"sgemm": 2.0 * SGEMM_SIZE**3, "read": float(size), "copy": 2.0 * size}
    if device == "cuda":
        for name in ("bf16", "fp16"):
            # Random numbers: of zeros and ones the product takes less power, and less time.
            x, y, z = (torch.randn(GEMM_SIZE, GEMM_SIZE, device=device).to(DTYPES[name]) for _ in range(3))
            calls[f"{name} gemm"] = functools.partial(torch.mm, x, y, out=z)
            amounts[f"{name} gemm"] = 2.0 * GEMM_SIZE**3
    timings = measure(calls, budget=budget, timer=timer_for(device)[1])
    # A ceiling is what the machine can do, so the faster samples count; a share is then rather too small.
    return {name: amounts[name] / timing.p20 for name, timing in timings.items()}
