"""What the CUDA kernels in the built module take: registers, spills and shared memory, by chip.

    python benchmarks/cuda_report.py --output benchmarks/results/cuda-compile-report.md

Reads the machine code in fastgpt._cuda; no GPU is needed. Exits with 1 if a kernel spills, one of
WARP_SPECIALISED is not there, does without Hopper's matrix units (HGMMA) or copy engine (UTMALDG), waits for
each product before it issues the next, or has not the registers that it shares out anew, or if the module has
no kernel for a chip of CHIPS; with 2 if there is nothing to read. Shared memory is what a kernel has beside
the dynamic one that its launch asks for.
"""

from __future__ import annotations

import argparse
import importlib.util
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

CHIPS = ("sm_80", "sm_90", "sm_90a")
HOPPER = ("HGMMA", "UTMALDG", "DEPBAR")  # the last one: waits for products
WARP_SPECIALISED = ("attention_forward_kernel", "attention_backward_kernel")
REGISTERS = 168  # kLaunchedRegisters in csrc/cuda/attention_tiles.h


class Row(NamedTuple):
    """A kernel for a chip; the fields are the report's columns."""

    chip: str
    kernel: str
    registers: int
    spilled: int  # bytes
    shared: int  # bytes
    instructions: str  # that only Hopper has


def find_cuobjdump() -> str | None:
    """The CUDA toolkit's, else the one that comes with triton."""
    if found := shutil.which("cuobjdump") or shutil.which("/usr/local/cuda/bin/cuobjdump"):
        return found
    spec = importlib.util.find_spec("triton")
    if spec is None or not spec.submodule_search_locations:
        return None
    return shutil.which(f"{spec.submodule_search_locations[0]}/backends/nvidia/bin/cuobjdump")


def _short(kernel: str) -> str:
    """Without namespaces and parameters."""
    return re.sub(r"fastgpt::|\(anonymous namespace\)::|^void ", "", kernel).partition("(")[0]


def _unmangled(text: str) -> list[str]:
    named = subprocess.run(["c++filt"], input=text, capture_output=True, text=True, check=True)
    return named.stdout.splitlines()


def rows(cuobjdump: str, module: str) -> list[Row]:
    usage = subprocess.run(
        [cuobjdump, "-res-usage", module], capture_output=True, text=True, check=True
    ).stdout
    own = subprocess.run(
        [cuobjdump, "-sass", "-arch", "sm_90a", module], capture_output=True, text=True, check=True
    ).stdout
    hopper: dict[str, dict[str, int]] = {}
    for line in _unmangled(own):
        if match := re.match(r"\s*Function : (.*)", line):
            counted = hopper.setdefault(_short(match[1]), dict.fromkeys(HOPPER, 0))
        for name in HOPPER:
            if re.search(rf"\b{'WARPGROUP.DEPBAR' if name == 'DEPBAR' else name}\b", line):
                counted[name] += 1
    found, chip, kernel = [], "", ""
    for line in _unmangled(usage):
        if match := re.match(r"arch = (\w+)", line):
            chip = match[1]
        elif match := re.match(r"\s*Function (.*):$", line):
            kernel = _short(match[1])
        elif "REG:" in line:
            n = {name: int(value) for name, value in re.findall(r"\b(REG|STACK|LOCAL|SHARED):(\d+)", line)}
            used = hopper[kernel] if chip == "sm_90a" and kernel.startswith(WARP_SPECIALISED) else {}
            text = ", ".join(f"{count} {name}" for name, count in used.items())
            found.append(Row(chip, kernel, n["REG"], n["STACK"] + n["LOCAL"], n["SHARED"], text))
    return sorted(found)


def faults(table: list[Row]) -> list[str]:
    missing = [f"no kernel for {chip}" for chip in CHIPS if chip not in {row.chip for row in table}]
    for name in WARP_SPECIALISED:
        kernels = [row for row in table if row.chip == "sm_90a" and row.kernel.startswith(name)]
        missing += [] if kernels else [f"no {name} for sm_90a"]
        for row in kernels:
            products, copies, waits = (int(n) for n in re.findall(r"\d+", row.instructions))
            if not products or not copies or waits > products // 4:
                missing.append(f"{row.kernel} has {row.instructions}")
            if row.registers != REGISTERS:
                missing.append(f"{row.kernel} is launched with {row.registers} registers, not {REGISTERS}")
    return missing + [f"{row.chip} {row.kernel} spills {row.spilled} bytes" for row in table if row.spilled]


def markdown(table: list[Row]) -> str:
    lines = [
        "# What the CUDA kernels compile to",
        "",
        "By `make gpu-compile`, without a GPU. spilled: bytes of a thread in local memory; shared: bytes",
        "beside the dynamic shared memory of a launch. **Not run on hardware.**",
        "",
        *(f"- {fault}" for fault in faults(table)),
        "| " + " | ".join(Row._fields) + " |",
        "|---" * len(Row._fields) + "|",
        *("| " + " | ".join(map(str, row)) + " |" for row in table),
    ]
    return "\n".join(lines) + "\n"


def main() -> int:
    options = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    options.add_argument("--output", type=Path, metavar="FILE", help="write the report, in Markdown")
    args = options.parse_args()
    spec, cuobjdump = importlib.util.find_spec("fastgpt._cuda"), find_cuobjdump()
    if spec is None or spec.origin is None or cuobjdump is None:
        what = "cuobjdump was not found" if spec else "fastgpt._cuda was not built (nvcc was not found)"
        print(f"cuda_report: {what}", file=sys.stderr)
        return 2
    table = rows(cuobjdump, spec.origin)
    for row in table:
        print("  ".join(map(str, row)))
    for fault in faults(table):
        print(f"FAULT: {fault}")
    size = Path(spec.origin).stat().st_size
    most = max((row.registers for row in table), default=0)
    print(
        f"{len(table)} kernels, at most {most} registers, {len(faults(table))} faults, {size / 2**20:.1f} MiB"
    )
    if args.output:
        args.output.write_text(markdown(table), encoding="utf-8")
    return 1 if faults(table) else 0


if __name__ == "__main__":
    sys.exit(main())
