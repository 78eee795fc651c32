"""Memory: how much is free, how much a call takes, and what the C library does with what is freed."""

from __future__ import annotations

import ctypes
import gc
import os
import platform
from collections.abc import Callable
from pathlib import Path

import torch


def _glibc() -> ctypes.CDLL | None:
    return ctypes.CDLL(None) if platform.libc_ver()[0] == "glibc" else None


def keep_freed_memory() -> str:
    """Has the C library keep freed memory for the next tensors, as an allocator made for large ones does.

    By default glibc maps some outputs of more than a few MiB anew at every call, and the page faults, which
    take longer than a norm over the same bytes, hit candidate and baseline at random.

    Returns:
        What became of it, for a report.
    """
    mmap_max, trim_threshold = -4, -1  # of malloc.h
    libc = _glibc()
    if libc and libc.mallopt(mmap_max, 0) and libc.mallopt(trim_threshold, -1):
        return "kept for reuse (mallopt)"
    return "up to the allocator"


def free_memory(device: str) -> int:
    """Bytes that can be allocated on ``device`` now."""
    if device == "cuda":
        gc.collect()
        torch.cuda.empty_cache()
        return torch.cuda.mem_get_info()[0]
    if libc := _glibc():
        libc.malloc_trim(0)  # what keep_freed_memory has kept counts
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def peak_memory(run: Callable[[], object], device: str) -> int | None:
    """Bytes that a call takes at its most, beside what is there before; None if the system does not say."""
    gc.collect()
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        return torch.cuda.max_memory_allocated() - before
    if libc := _glibc():
        libc.malloc_trim(0)  # what earlier calls have freed
    try:
        Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
        before = _status("VmRSS")
    except OSError:
        return None
    run()
    return _status("VmHWM") - before


def least_peak_memory(run: Callable[[], object], device: str) -> int | None:
    """Of three calls: the allocator's gaps, which vary, are a fifth of what a prompt takes."""
    peaks = [peak_memory(run, device) for _ in range(3)]
    return min(peak for peak in peaks if peak is not None) if None not in peaks else None


def _status(name: str) -> int:
    """A line of /proc/self/status, in bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) * 1024
    raise OSError(f"/proc/self/status has no {name}")
