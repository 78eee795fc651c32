"""The report of a run: its JSON, a table and a plot.

The JSON, one schema for every benchmark (SI units: seconds, bytes, FLOP):

    schema      1
    date        UTC, ISO 8601
    device      cpu or cuda
    backend     of fastgpt; where there are several, each row has a result of each
    budget      seconds of samples per row
    seed        of torch's generator, from which all inputs were drawn
    machine     str -> str or int, see ``machine.describe``
    ceilings    sgemm (FLOP/s), read (B/s), copy (B/s), of a GPU also bf16 gemm and fp16 gemm (FLOP/s), see
                ``machine.ceilings``
    results     a list, one entry per row and backend; a row's backends were timed in turn, with the same
                baselines, so their times and ratios may be compared:
        bench           attention, decode, linear, norm, model or launch
        workload        its name: b batch, h nheads[:nheads_k], s seqlen, k keys, d headdim, w window
        dtype           fp32, bf16 or fp16
        direction       forward or backward; prefill, decode, generate or train of a model; host, of a launch
        backend         of fastgpt
        status          ok, skipped (cannot run here) or failed (wrong numbers, never timed; or an
                        error, such as too little memory)
        reason          why it was skipped or failed, else null
        timing          how the samples were taken: by which clock, with what in the cache, as CUDA graphs
        parity          per tensor: largest absolute error against float64 of fastgpt (error) and of
                        torch in the same dtype (torch_error), and the largest allowed (bound)
        fastgpt_time    median, p20 and p80 seconds per call, over so many samples of so many calls;
                        null or empty where not timed, like all that follow
        baseline_times  the same for each way torch has of doing it, by name, and for an empty kernel beside
                        a launch
        refused         the ways of torch that do not work here, by name, and why
        baseline        the name of torch's fastest way, which the ratio is against
        ratio           its median / fastgpt's median: above 1, fastgpt is faster
        rate            of fastgpt: units of work per second at the median
        unit            of work: FLOP, B, token or call
        ceiling         the key of ``ceilings`` that the rate is held to; null if none
        share           rate / that ceiling
        memory          of a model's prefill and training: bytes that a call of fastgpt takes at its most,
                        beside what is there before it, weights among that; else null
        baseline_memory the same for each way of torch's, by name
"""

from __future__ import annotations

import dataclasses
import json
import os
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastgpt.bench.harness import Parity, Result, Timing

if TYPE_CHECKING:
    from matplotlib.axes import Axes

SCHEMA = 1
DTYPE_COLOURS = {"fp32": "#4477aa", "bf16": "#ee6677", "fp16": "#228833"}


@dataclass(frozen=True)
class Report:
    """A run; the fields are those of the JSON."""

    date: str
    device: str
    backend: str
    budget: float
    seed: int
    machine: dict[str, str | int]
    ceilings: dict[str, float]
    results: tuple[Result, ...]

    def timed(self) -> list[Result]:
        return [result for result in self.results if result.status == "ok"]

    def several_backends(self) -> bool:
        return len({result.backend for result in self.results}) > 1


def check_writable(path: Path) -> None:
    """Raises OSError if ``path`` could not be written at the end of a long run."""
    if path.is_dir():
        raise IsADirectoryError(f"{path} is a folder")
    with tempfile.TemporaryFile(dir=path.parent):
        pass


def _write(path: Path, data: bytes) -> None:
    """All or nothing: a reader never sees half a file."""
    with tempfile.NamedTemporaryFile(dir=path.parent, prefix=path.name, delete=False) as file:
        file.write(data)
    os.chmod(file.name, 0o644)
    os.replace(file.name, path)


def save(report: Report, path: Path) -> None:
    document = {"schema": SCHEMA, **dataclasses.asdict(report)}
    _write(path, json.dumps(document, indent=1, ensure_ascii=False, allow_nan=False).encode())


def load(path: Path) -> Report:
    """Raises ValueError if ``path`` holds something else."""
    document = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(document, dict) or document.pop("schema", None) != SCHEMA:
        raise ValueError(f"{path} is not a report of schema {SCHEMA}")
    document["results"] = tuple(_result(entry) for entry in document["results"])
    return Report(**document)


def _result(entry: dict[str, Any]) -> Result:
    parsed = {
        "parity": tuple(Parity(**checked) for checked in entry["parity"]),
        "fastgpt_time": entry["fastgpt_time"] and Timing(**entry["fastgpt_time"]),
        "baseline_times": {name: Timing(**times) for name, times in (entry["baseline_times"] or {}).items()},
    }
    result = Result(**(entry | parsed))
    needed = (result.fastgpt_time, result.ratio, result.rate, result.unit)
    if result.status == "ok" and (None in needed or result.baseline not in result.baseline_times):
        raise ValueError(f"{result.bench} {result.workload} is ok and lacks a timing")
    return result


def _seconds(value: float) -> str:
    for unit, scale in (("s", 1.0), ("ms", 1e-3)):
        if value >= scale:
            return f"{value / scale:.3g} {unit}"
    return f"{value / 1e-6:.3g} µs"


def _timing(timing: Timing) -> str:
    return f"{_seconds(timing.median)} [{_seconds(timing.p20)} – {_seconds(timing.p80)}]"


def _rate(value: float, unit: str) -> str:
    if unit in ("token", "call"):
        return f"{value:.0f} {unit}s/s"
    return f"{value / 1e12:.3g} T{unit}/s" if value >= 1e12 else f"{value / 1e9:.3g} G{unit}/s"


LEAD = ("workload", "dtype", "direction")
HEADER = ("fastgpt [p20 – p80]", "baseline", "ratio", "rate", "of ceiling")


def _cells(result: Result, lead: tuple[str, ...]) -> tuple[str, ...]:
    lead = tuple(getattr(result, name) for name in lead)
    if result.status != "ok":
        return lead
    assert result.fastgpt_time and result.baseline and result.rate and result.unit
    return (
        *lead,
        _timing(result.fastgpt_time),
        _seconds(result.baseline_times[result.baseline].median),
        f"{result.ratio:.2f}×",
        _rate(result.rate, result.unit),
        f"{result.share:.0%} of {result.ceiling}" if result.share is not None else "",
    )


def _memory(result: Result) -> str:
    theirs = result.baseline_memory.get(result.baseline or "")
    if result.memory is None or theirs is None:
        return ""
    return f"  memory: {result.memory / 2**20:.0f} MiB, baseline {theirs / 2**20:.0f} MiB"


def _beside(result: Result, report: Report) -> str:
    """The result's time next to that of the row's first backend, if it is another."""
    first = next((other for other in report.timed() if other.key == result.key), result)
    if first is result or result.fastgpt_time is None or first.fastgpt_time is None:
        return ""
    return f"  {result.fastgpt_time.median / first.fastgpt_time.median:.2f}× the time of {first.backend}"


def machine_line(report: Report) -> str:
    machine = report.machine
    where = machine["gpu"] if report.device == "cuda" else f"{machine['cpu']}, {machine['threads']} threads"
    return f"{where}; torch {machine['torch']}, fastgpt {machine['fastgpt']} (backend {report.backend})"


def table(report: Report) -> str:
    """Plain text, a section per benchmark."""
    lead = (*LEAD, "backend") if report.several_backends() else LEAD
    header = lead + HEADER
    rows = [(result, _cells(result, lead)) for result in report.results]
    full = [header, *(cells for _, cells in rows if len(cells) == len(header))]
    widths = [max(len(cells[column]) for cells in full) for column in range(len(header))]
    for column in range(len(lead)):
        widths[column] = max([widths[column], *(len(cells[column]) for _, cells in rows)])

    def line(cells: tuple[str, ...]) -> str:
        return "  ".join(f"{cell:<{width}}" for cell, width in zip(cells, widths, strict=False)).rstrip()

    rates = ", ".join(
        f"{name} {_rate(value, 'FLOP' if name.endswith('gemm') else 'B')}"
        for name, value in report.ceilings.items()
    )
    lines = [machine_line(report), f"ceilings measured here: {rates}"]
    for bench in dict.fromkeys(result.bench for result in report.results):
        lines += ["", bench, line(header)]
        for result, cells in rows:
            if result.bench != bench:
                continue
            note = "" if result.reason is None else f"  {result.status}: {' '.join(result.reason.split())}"
            lines.append(line(cells) + note + _memory(result) + _beside(result, report))
        compared = dict.fromkeys(r.baseline for r in report.timed() if r.bench == bench and r.baseline)
        if compared:
            lines.append(f"baseline: {' | '.join(compared)}; ratio: baseline / fastgpt, medians")
    return "\n".join(lines)


def check_plot(path: Path) -> None:
    """Raises ImportError without matplotlib, ValueError for a suffix that it cannot write."""
    from matplotlib.figure import Figure

    formats = Figure().canvas.get_supported_filetypes()
    if path.suffix[1:].lower() not in formats:
        raise ValueError(f"{path} ends in none of .{', .'.join(sorted(formats))}")


def _plot_bench(axes: Axes, bench: str, results: list[Result], several_backends: bool) -> None:
    def group(result: Result) -> str:
        backend = f"  {result.backend}" if several_backends else ""
        return f"{result.workload}  {result.direction}{backend}"

    groups = list(dict.fromkeys(map(group, results)))
    dtypes = [d for d in DTYPE_COLOURS if any(result.dtype == d for result in results)]
    thickness = 0.8 / len(dtypes)
    for index, dtype in enumerate(dtypes):
        own = [result for result in results if result.dtype == dtype]
        places = [groups.index(group(result)) + (index - (len(dtypes) - 1) / 2) * thickness for result in own]
        bars = axes.barh(
            places,
            [(result.ratio or 1) - 1 for result in own],
            left=1,
            height=thickness,
            color=DTYPE_COLOURS[dtype],
        )
        axes.bar_label(bars, [f"{result.ratio:.2f}×" for result in own], padding=4, fontsize=8)
    axes.axvline(1.0, color="black", linewidth=1)
    axes.set_yticks(range(len(groups)), groups, fontsize=9)
    axes.set_ylim(len(groups) - 0.4, -0.6)
    axes.set_xscale("log")  # twice as fast and half as fast are as far from 1
    ratios = [result.ratio or 1 for result in results]
    axes.set_xlim(min(0.5, 0.6 * min(ratios)), 1.6 * max(2, *ratios))
    axes.xaxis.set_major_formatter("{x:g}×")
    axes.xaxis.set_minor_formatter("")
    axes.set_title(f"{bench}: speed relative to torch (right of 1 is faster)", loc="left", fontsize=10)
    axes.spines[["top", "right"]].set_visible(False)


def plot(report: Report, path: Path) -> None:
    """Bars of ``ratio``, a panel per benchmark; the format is that of the suffix of ``path``."""
    from io import BytesIO

    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    results = report.timed()
    benches = list(dict.fromkeys(result.bench for result in results))
    panels = [[result for result in results if result.bench == bench] for bench in benches]
    heights = [0.9 + 0.18 * len(panel) for panel in panels]
    figure = Figure(figsize=(9, sum(heights) + 0.6), layout="constrained")
    axes = figure.subplots(len(panels), 1, squeeze=False, gridspec_kw={"height_ratios": heights})
    for own, bench, panel in zip(axes[:, 0], benches, panels, strict=True):
        _plot_bench(own, bench, panel, report.several_backends())
    figure.suptitle(machine_line(report), fontsize=9, x=0.01, ha="left")
    shown = [dtype for dtype in DTYPE_COLOURS if any(result.dtype == dtype for result in results)]
    patches = [Patch(color=DTYPE_COLOURS[dtype], label=dtype) for dtype in shown]
    figure.legend(handles=patches, loc="outside upper right", ncols=len(shown), fontsize=9, frameon=False)
    buffer = BytesIO()
    figure.savefig(buffer, format=path.suffix[1:].lower(), dpi=150)
    _write(path, buffer.getvalue())
