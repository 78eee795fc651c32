"""Compiles the Triton kernels for chips that need not be there, and says what came of each.

    python benchmarks/compile_report.py --output benchmarks/results/triton-compile-report.md

The calls below go through the ops' own launchers, so what is compiled is what they would launch, with its
configuration. Exits with 1 if a kernel does not compile, takes more shared or tensor memory than the chip
has, does without Hopper's HGMMA (attention in 16 bits on sm_90, but for dropout, dbias and every option at
head dim 256), is compiled again for other lengths, or spills on a chip that the tables were made for. Known
to spill: see KNOWN.
"""

from __future__ import annotations

import argparse
import collections
import importlib
import importlib.util
import multiprocessing
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from fastgpt.ops import launch
from fastgpt.ops.attention.spec import AttentionSpec, AttentionTensors
from fastgpt.ops.decode.spec import DecodeSpec, DecodeTensors
from fastgpt.ops.norm.spec import NormSpec
from fastgpt.ops.rotary.spec import RotarySpec, RotaryTensors

FP32, BF16, FP16 = torch.float32, torch.bfloat16, torch.float16
INT8, FP8 = torch.int8, torch.float8_e4m3fn
DTYPES = BF16, FP16, FP32


NAMES = {FP32: "fp32", BF16: "bf16", FP16: "fp16", INT8: "int8", FP8: "fp8"}


class Chip(NamedTuple):
    """What a multiprocessor has for its programs."""

    target: tuple[str, int | str, int]  # of triton.backends.compiler.GPUTarget
    registers: int  # 32-bit ones, of each of its 4 partitions
    warps: int
    programs: int
    shared: int  # bytes
    program_shared: int  # bytes, the most that a program may have
    reserved: int  # bytes, of each program's


TUNED = ("sm_80", "sm_90")
KNOWN = """\
Known to spill: kernels for chips other than sm_80 and sm_90; dk/dv in fp32 with every option of the
specification at once; decoding in fp32 with head dim 256. There q alone, 16 × 256 elements in two parts of
tf32 (three products of which make one of fp32), takes 256 registers of each thread, whatever the tile.
Multiplied in parts, as by attention, it would take less and break up the pipeline of loads, by which decoding
is bound.
"""

CHIPS = {
    "sm_80": Chip(("cuda", 80, 32), 16384, 64, 32, 164 * 1024, 163 * 1024, 1024),
    "sm_89": Chip(("cuda", 89, 32), 16384, 48, 24, 100 * 1024, 99 * 1024, 1024),  # by the default rows
    "sm_90": Chip(("cuda", 90, 32), 16384, 64, 32, 228 * 1024, 227 * 1024, 1024),
    "sm_100": Chip(("cuda", 100, 32), 16384, 64, 32, 228 * 1024, 227 * 1024, 1024),
    "gfx942": Chip(("hip", "gfx942", 64), 32768, 32, 16, 64 * 1024, 64 * 1024, 0),
}
QUICK_CHIPS = ("sm_90",)
# Depths of calls. QUICK: in `make test`, too. CORE: every row of the launch tables, all chips. REST: sm_90.
QUICK, CORE, REST = range(3)
TENSOR_MEMORY = 512  # columns, of a multiprocessor of sm_100


class Call(NamedTuple):
    """A call of an op; ``launch(module, lengths)`` makes it, on tensors without memory."""

    op: str
    label: str
    dtype: torch.dtype
    launch: Callable[[ModuleType, int], None]
    depth: int


def empty(*shape: int, dtype: torch.dtype = FP32) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def attention(
    headdim: int,
    dtype: torch.dtype,
    features: str = "",
    headdim_v: int | None = None,
    window: tuple[int, int] = (-1, 0),
    depth: int = REST,
) -> Call:
    """Forward and, where it is written, backward, with the gradient of the bias if there is one."""
    has = features.split()
    headdim_v = headdim_v or headdim

    def make(module: ModuleType, lengths: int) -> None:
        batch, nheads, sq, sk = lengths % 5 + 1, 8, lengths, 2 * lengths + 1
        lead_q, lead_k = ((batch * sq,), (batch * sk,)) if "varlen" in has else ((batch, sq), (batch, sk))
        q = empty(*lead_q, nheads, headdim, dtype=dtype)
        k = empty(*lead_k, nheads // 2, headdim, dtype=dtype)
        v = empty(*lead_k, nheads // 2, headdim_v, dtype=dtype)
        edges = empty(batch + 1, dtype=torch.int32) if "varlen" in has else None
        bias = None
        if "bias" in has or "mask" in has:
            bias = empty(batch, nheads, sq, sk, dtype=torch.bool if "mask" in has else dtype)
        tensors = AttentionTensors(
            edges,
            edges,
            empty(batch, dtype=torch.int32) if "key_ranges" in has else None,
            empty(batch, dtype=torch.int32) if "key_ranges" in has else None,
            empty(nheads) if "alibi" in has else None,
            empty(nheads) if "sink" in has else None,
            bias,
            empty(2, dtype=torch.int64) if "dropout" in has else None,
        )
        spec = AttentionSpec(
            headdim**-0.5,
            *window,
            softcap=30.0 if "softcap" in has else 0.0,
            dropout_p=0.1 if "dropout" in has else 0.0,
            alibi="alibi" in has,
            sink="sink" in has,
            bias=bias is not None,
            varlen="varlen" in has,
            key_ranges="key_ranges" in has,
        )
        out, lse = module.forward(q, k, v, spec, tensors)
        if hasattr(module, "backward"):
            module.backward(torch.empty_like(out), None, q, k, v, out, lse, "bias" in has, spec, tensors)

    dims = f"{headdim}" if headdim == headdim_v else f"{headdim}/{headdim_v}"
    mask = {(-1, 0): "causal", (-1, -1): "full"}.get(window, "window")
    return Call("attention", f"d {dims} {mask} {features}".rstrip(), dtype, make, depth)


def decode(
    headdim: int,
    dtype: torch.dtype,
    features: str = "",
    cache_dtype: torch.dtype | None = None,
    group: int = 4,
    seqlen_q: int = 1,
    depth: int = REST,
) -> Call:
    has = features.split()

    def make(module: ModuleType, lengths: int) -> None:
        batch, nheads_k, capacity = lengths % 5 + 1, 8, 64 * lengths
        rows = (64 * batch * lengths // 16, 16) if "paged" in has else (batch, capacity)
        caches = [empty(*rows, nheads_k, headdim, dtype=cache_dtype or dtype) for _ in range(2)]
        new = [None if "static" in has else empty(batch, seqlen_q, nheads_k, headdim, dtype=dtype)] * 2
        per_batch = empty(batch, dtype=torch.int32)
        angles = empty(capacity, headdim // 2) if "rotary" in has else None
        descale = empty(batch, nheads_k) if cache_dtype else None
        tensors = DecodeTensors(
            *new,
            per_batch,
            angles,
            angles,
            None,
            per_batch if "leftpad" in has else None,
            empty(batch, capacity // 16, dtype=torch.int32) if "paged" in has else None,
            empty(nheads_k * group) if "alibi" in has else None,
            empty(nheads_k * group) if "sink" in has else None,
            descale,
            descale,
        )
        spec = DecodeSpec(
            headdim**-0.5,
            window_left=1000 if "window" in has else -1,
            window_right=0,
            softcap=30.0 if "softcap" in has else 0.0,
            rotary_interleaved="neighbours" in has,
            num_splits=8 if "splits" in has else 0,
        )
        q = empty(batch, seqlen_q, nheads_k * group, headdim, dtype=dtype)
        module.forward(q, *caches, spec, tensors)

    cache = "" if cache_dtype is None else f" {NAMES[cache_dtype]} cache"
    label = f"d {headdim} group {group} q {seqlen_q}{cache} {features}".rstrip()
    return Call("decode", label, dtype, make, depth)


def norm(hidden: int, dtype: torch.dtype, rms: bool, features: str = "", depth: int = REST) -> Call:
    """Forward and backward."""
    has = features.split()

    def make(module: ModuleType, lengths: int) -> None:
        def rows() -> Tensor:
            return empty(lengths, hidden, dtype=dtype)

        weight = empty(hidden, dtype=dtype)
        bias = None if rms else empty(hidden, dtype=dtype)
        residual = rows() if "residual" in has else None
        state = empty(2, dtype=torch.int64) if "dropout" in has else None
        spec = NormSpec(rms, 1e-5, 0.1 if "dropout" in has else 0.0)
        stored = residual is not None or state is not None
        _, _, mean, rstd = module.forward(rows(), residual, weight, bias, state, stored, spec)
        dsum = rows() if stored else None
        module.backward(rows(), dsum, rows(), weight, bias, mean, rstd, state, residual is not None, spec)

    label = f"{'rms' if rms else 'layer'} {hidden} {features}".rstrip()
    return Call("norm", label, dtype, make, depth)


def merge(headdim: int, dtype: torch.dtype, depth: int = REST) -> Call:
    """Forward and backward."""

    def make(module: ModuleType, lengths: int) -> None:
        outs = [empty(3, lengths, 8, headdim, dtype=dtype) for _ in range(3)]
        lses = [empty(3, 8, lengths) for _ in range(3)]
        module.forward(outs[0], lses[0], outs[1], lses[1])
        module.backward(outs[2], lses[2], outs[0], lses[0], outs[1], lses[1])

    return Call("merge", f"d {headdim}", dtype, make, depth)


def rotary(headdim: int, dtype: torch.dtype, features: str = "", depth: int = REST) -> Call:
    has = features.split()

    def make(module: ModuleType, lengths: int) -> None:
        packed, tables = "varlen" in has, [empty(2 * lengths, headdim // 2) for _ in range(2)]
        lead = (3 * lengths,) if packed else (3, lengths)
        edges = empty(4, dtype=torch.int32) if packed else None
        offsets = empty(3, dtype=torch.int32) if "offsets" in has else None
        spec = RotarySpec(0, interleaved="neighbours" in has)
        x = empty(*lead, 8, headdim, dtype=dtype)
        module.forward(x, spec, RotaryTensors(tables[0], tables[1], offsets, edges))

    return Call("rotary", f"d {headdim} {features}".rstrip(), dtype, make, depth)


UNDROPPED = "softcap alibi sink bias"
GENERAL = f"{UNDROPPED} dropout"  # with a window: everything that a score may be
CALLS = [
    *(attention(headdim, BF16, depth=QUICK) for headdim in (64, 128, 256)),
    attention(128, BF16, GENERAL, window=(255, 0), depth=QUICK),
    *(attention(headdim, FP32, depth=CORE) for headdim in (64, 128, 256)),
    *(attention(headdim, BF16, GENERAL, window=(255, 0), depth=CORE) for headdim in (64, 256)),
    attention(128, FP32, GENERAL, window=(255, 0), depth=CORE),
    *(attention(headdim, BF16, "varlen", depth=CORE) for headdim in (64, 128, 256)),
    *(attention(headdim, BF16, UNDROPPED, window=(255, 0), depth=CORE) for headdim in (64, 128, 256)),
    attention(128, FP16),
    attention(128, BF16, window=(-1, -1)),
    attention(128, BF16, window=(255, 0)),
    attention(128, BF16, "varlen key_ranges", window=(255, 0)),
    *(attention(128, BF16, feature) for feature in ("softcap", "alibi sink", "bias", "dropout")),
    attention(64, BF16, "mask", window=(-1, -1)),
    attention(40, BF16),
    attention(80, BF16),
    attention(80, FP32),
    attention(192, BF16, headdim_v=128),
    *(decode(128, BF16, features, depth=QUICK) for features in ("splits", "paged rotary")),
    *(decode(headdim, BF16, depth=CORE) for headdim in (64, 128, 256)),
    *(decode(headdim, FP32, "splits", depth=CORE) for headdim in (64, 128, 256)),
    *(decode(headdim, BF16, seqlen_q=64, depth=CORE) for headdim in (64, 128, 256)),
    *(decode(headdim, FP32, seqlen_q=64, depth=CORE) for headdim in (128, 256)),
    *(decode(128, BF16, cache_dtype=cache, depth=CORE) for cache in (INT8, FP8)),
    decode(128, FP16),
    decode(128, BF16, group=1),
    decode(128, BF16, group=16),
    decode(128, BF16, seqlen_q=4),
    decode(80, BF16, "static"),
    *(decode(128, BF16, features) for features in ("paged", "rotary", "rotary neighbours")),
    decode(128, BF16, "softcap alibi sink window leftpad"),
    decode(128, BF16, "paged rotary leftpad", cache_dtype=FP8),
    *(norm(4096, BF16, rms, depth=QUICK) for rms in (False, True)),
    *(norm(hidden, BF16, False, "residual", depth=CORE) for hidden in (256, 768, 2048, 8192, 16384, 131072)),
    *(norm(hidden, FP32, False, depth=CORE) for hidden in (768, 4096, 131072)),
    *(norm(hidden, BF16, True) for hidden in (64, 768, 1000, 2048, 8192, 131072)),
    *(norm(hidden, BF16, False, "residual dropout") for hidden in (768, 4096, 131072)),
    norm(4096, FP16, False),
    *(merge(headdim, dtype, depth=CORE) for headdim in (64, 128, 256) for dtype in (BF16, FP32)),
    *(rotary(headdim, dtype, depth=CORE) for headdim in (64, 128, 256) for dtype in (BF16, FP32)),
    rotary(128, BF16, "neighbours"),
    rotary(128, BF16, "offsets varlen", depth=QUICK),
]
LENGTHS = 1000, 77  # of sequences, or rows


@dataclass
class Row:
    """A kernel that a call launches; the fields are the report's columns."""

    chip: str
    op: str
    call: str
    dtype: str
    kernel: str = ""
    tile: str = ""
    warps: int = 0
    stages: int = 0
    registers: int = 0
    spilled: int = 0  # bytes
    shared: int = 0  # bytes
    occupancy: float = 0.0  # of the warps that a multiprocessor can hold
    wide_loads: str = ""  # of 16 bytes a thread, of all from global memory
    matrix: str = ""  # instructions that multiply matrices
    faults: list[str] = field(default_factory=list)


def _counted(pattern: str, text: str) -> collections.Counter[str]:
    return collections.Counter(re.findall(pattern, text))


def _tool(*command: str) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def _read_cubin(row: Row, cubin: bytes) -> None:
    cuobjdump = str(Path(triton.__path__[0]) / "backends/nvidia/bin/cuobjdump")
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage, sass = (_tool(cuobjdump, option, file.name) for option in ("-res-usage", "-sass"))
    numbers = {name: int(value) for name, value in re.findall(r"\b(REG|STACK|LOCAL):(\d+)", usage)}
    row.registers, row.spilled = numbers["REG"], numbers["STACK"] + numbers["LOCAL"]
    spilling = sum(_counted(r"\b(LDL|STL)\b", sass).values())
    if spilling and not row.spilled:
        row.faults.append(f"{spilling} instructions on local memory")
    loads = re.findall(r"\b((?:LDG|LDGSTS)\.\S+)", sass)
    row.wide_loads = f"{sum('.128' in load for load in loads)}/{len(loads)}"
    if bulk := sass.count("UTMALDG"):
        row.wide_loads += f" + {bulk} TMA"
    matrix = _counted(r"\b(HGMMA|QGMMA|IGMMA|UTC\w*MMA|HMMA|IMMA|QMMA)\b", sass)
    row.matrix = ", ".join(f"{count} {name}" for name, count in matrix.items())


def _read_amdgcn(row: Row, text: str) -> None:
    numbers = {
        name: int(value)
        for name, value in re.findall(r"\.(vgpr_count|private_segment_fixed_size):\s+(\d+)", text)
    }
    row.registers, row.spilled = numbers["vgpr_count"], numbers["private_segment_fixed_size"]
    loads = re.findall(r"\b((?:global|buffer)_load_\S+)", text)
    row.wide_loads = f"{sum('dwordx4' in load for load in loads)}/{len(loads)}"
    row.matrix = f"{len(re.findall(r'v_mfma_', text))} mfma"


def _occupancy(row: Row, chip: Chip, warp_size: int, tensor_memory: int) -> float:
    warp_registers = -(-max(row.registers, 1) // 8) * 8 * warp_size
    warps = 4 * min(chip.warps // 4, chip.registers // warp_registers)
    programs = min(chip.programs, warps // row.warps)
    if row.shared + chip.reserved:
        programs = min(programs, chip.shared // (row.shared + chip.reserved))
    if tensor_memory:
        programs = min(programs, TENSOR_MEMORY // tensor_memory)
    return programs * row.warps / chip.warps


def _tile(kernel: Any) -> str:
    """The kernel's own constants that are sizes, BLOCK_M=128 say."""
    constants = [c for c in kernel.src.constants.values() if hasattr(c, "_asdict")]
    sizes = {name: value for c in constants for name, value in c._asdict().items()}
    values = {name: getattr(value, "value", value) for name, value in sizes.items()}
    return " ".join(
        f"{name.removeprefix('BLOCK_')}{value}"
        for name, value in values.items()
        if type(value) is int and name not in ("HEADDIM", "HEADDIM_V", "MULTIPLE")
    )


def _row(chip_name: str, call: Call, kernel: Any) -> Row:
    chip, made = CHIPS[chip_name], kernel.metadata
    row = Row(chip_name, call.op, call.label, NAMES[call.dtype], made.name, _tile(kernel))
    row.warps, row.stages, row.shared = made.num_warps, made.num_stages, made.shared
    if "cubin" in kernel.asm:
        _read_cubin(row, kernel.asm["cubin"])
    else:
        _read_amdgcn(row, kernel.asm["amdgcn"])
    tensor_memory = getattr(made, "tmem_size", 0)
    row.occupancy = _occupancy(row, chip, chip.target[2], tensor_memory)
    if tensor_memory > TENSOR_MEMORY:
        row.faults.append(f"takes {tensor_memory} columns of tensor memory, {TENSOR_MEMORY} are there")
    wide_decode = call.op == "decode" and call.label.startswith("d 256")
    known = call.dtype == FP32 and ("dropout" in call.label or wide_decode)
    if row.spilled and chip_name in TUNED and not known:
        row.faults.append(f"spills {row.spilled} bytes")
    if row.shared > chip.program_shared:
        row.faults.append(f"takes {row.shared} bytes of shared memory, {chip.program_shared} are there")
    hopper = chip_name == "sm_90" and call.op == "attention" and call.dtype != FP32
    # Tiles of 16 and 32 rows, for want of registers.
    small = "dbias" in row.kernel or "dropout" in call.label or call.label.startswith("d 256 window")
    if hopper and not small and "tt.dot" in kernel.asm["ttir"] and "HGMMA" not in row.matrix:
        row.faults.append("has no HGMMA")
    return row


def _distinct(kernels: list[Any]) -> list[Any]:
    return list({id(kernel): kernel for kernel in kernels}.values())


def compile_call(job: tuple[str, int]) -> list[Row]:
    """What CALLS[index] launches on a chip."""
    chip, call = job[0], CALLS[job[1]]
    module = importlib.import_module(f"fastgpt.ops.{call.op}.triton")
    try:
        with launch.compile_only(*CHIPS[chip].target) as kernels:
            call.launch(module, LENGTHS[0])
            first = _distinct(kernels)
            call.launch(module, LENGTHS[1])
        rows = [_row(chip, call, kernel) for kernel in first]
    except Exception as error:  # whatever a compiler comes up with; the other calls go on
        text = " ".join(str(error).split())
        fault = f"does not compile: {type(error).__name__}: {text[-300:]}"
        return [Row(chip, call.op, call.label, NAMES[call.dtype], faults=[fault])]
    again = [kernel.metadata.name for kernel in _distinct(kernels)[len(first) :]]
    for row in rows:
        if row.kernel in again:
            row.faults.append("is compiled again for other lengths")
    return rows


HEADER = (
    "chip", "call", "dtype", "kernel", "tile", "warps", "stages", "registers", "spilled", "shared KiB",
    "occupancy", "16-byte loads", "matrix instructions",
)  # fmt: skip


def _cells(row: Row) -> tuple[str, ...]:
    lead = (row.chip, f"{row.op} {row.call}", row.dtype)
    if not row.kernel:
        return (*lead, *("",) * (len(HEADER) - 4), "; ".join(row.faults))
    numbers = (row.warps, row.stages, row.registers, row.spilled, f"{row.shared / 1024:g}")
    return (
        *lead, row.kernel, row.tile, *map(str, numbers), f"{row.occupancy:.0%}", row.wide_loads, row.matrix,
    )  # fmt: skip


def markdown(rows: list[Row]) -> str:
    lines = [
        "# What the Triton kernels compile to",
        "",
        f"By `make gpu-compile`: triton {triton.__version__}, without a GPU. tile: the sizes that a",
        "kernel is compiled for; spilled: bytes of a thread in local memory; shared: of a program;",
        "occupancy: share of the warps that a multiprocessor can hold, as registers and shared memory allow;",
        "16-byte loads: of all instructions that load from global memory.",
        "",
        KNOWN,
    ]
    if faulty := [row for row in rows if row.faults]:
        lines += ["**Not as it should be:**", "", *(f"- {_fault(row)}" for row in faulty), ""]
    lines += ["| " + " | ".join(HEADER) + " |", "|---" * len(HEADER) + "|"]
    lines += ["| " + " | ".join(_cells(row)) + " |" for row in rows]
    return "\n".join(lines) + "\n"


def _fault(row: Row) -> str:
    return f"{row.chip} {row.op} {row.call} {row.dtype} {row.kernel}: {'; '.join(row.faults)}"


def jobs(quick: bool) -> list[tuple[str, int]]:
    """(chip, index of CALLS); a call whose op has no Triton kernels yet is left out."""
    written = {
        op for op in {call.op for call in CALLS} if importlib.util.find_spec(f"fastgpt.ops.{op}.triton")
    }
    return [
        (chip, index)
        for chip in (QUICK_CHIPS if quick else CHIPS)
        for index, call in enumerate(CALLS)
        if call.op in written and call.depth <= (QUICK if quick else REST if chip == "sm_90" else CORE)
    ]


def main() -> int:
    options = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    options.add_argument("--quick", action="store_true", help="a few calls, for sm_90")
    options.add_argument("--only", metavar="TEXT", default="", help="calls whose description has this text")
    options.add_argument("--output", type=Path, metavar="FILE", help="write the report, in Markdown")
    args = options.parse_args()
    if triton.knobs.runtime.interpret:
        print("compile_report: TRITON_INTERPRET is set, under which nothing is compiled", file=sys.stderr)
        return 2
    start = time.monotonic()
    todo = [(c, i) for c, i in jobs(args.quick) if args.only in f"{c} {CALLS[i].op} {CALLS[i].label}"]
    rows: list[Row] = []
    spawned = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(max_workers=2, mp_context=spawned) as pool:
        for number, done in enumerate(pool.map(compile_call, todo), 1):
            rows += done
            for row in done:
                print(f"[{number}/{len(todo)}] " + "  ".join(filter(None, _cells(row))), flush=True)
    faulty = [row for row in rows if row.faults]
    for row in faulty:
        print(f"FAULT: {_fault(row)}")
    print(
        f"{len(rows)} kernels, {len(faulty)} of them not as they should be, {time.monotonic() - start:.0f} s"
    )
    if args.output:
        args.output.write_text(markdown(rows), encoding="utf-8")
    return 1 if faulty or not rows else 0


if __name__ == "__main__":
    sys.exit(main())
