"""Verifies a workload, then times fastgpt, by each of its backends, and torch on it in turn."""

from __future__ import annotations

import contextlib
import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from fastgpt.bench.memory import least_peak_memory
from fastgpt.dispatch import BackendUnsupported

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}

OUTPUT_FACTOR = 2.0  # the parity rule: error <= factor · torch's own error in the same dtype + FLOOR
GRADIENT_FACTOR = 3.0
FLOOR = 1e-5

SHORTEST_SAMPLE = 1e-3  # seconds; calls that are shorter are timed several at once
FEWEST_ROUNDS = 6  # 20th and 80th percentiles need some samples, however slow a call is

Timer = Callable[[Callable[[], object], int], float]  # seconds that so many calls of a callable take
Computation = Callable[[], tuple[Tensor, ...]]


@dataclass(frozen=True)
class Timing:
    """Seconds per call over ``samples`` samples of ``calls`` calls each."""

    median: float
    p20: float
    p80: float
    samples: int
    calls: int


@dataclass(frozen=True)
class Parity:
    """Largest absolute errors of one tensor against float64, and what fastgpt's may be."""

    tensor: str
    error: float
    torch_error: float
    bound: float


@dataclass(frozen=True)
class Work:
    """What one call amounts to, and the machine's own rate (a key of ``machine.ceilings``) it is held to."""

    amount: float
    unit: str  # FLOP, B, token or call: of the last, the time on the host counts
    ceiling: str | None


@dataclass(frozen=True)
class Case:
    """A workload made concrete: the same tensors by fastgpt, by torch and in float64."""

    tensors: tuple[str, ...]  # names of what the three return
    factor: float
    candidate: Callable[[str], Computation]  # by a backend; raises BackendUnsupported, or its calls do
    baselines: dict[str, Computation]  # torch's ways; the fastest here is the one that counts
    oracle: Computation
    timed: dict[str, Callable[[], object]] = field(default_factory=dict)  # beside them, without numbers
    refused: dict[str, str] = field(default_factory=dict)  # torch's ways that do not work here, and why
    memory: bool = False  # whether what a call takes at its most is of interest


class Workload(Protocol):
    @property
    def name(self) -> str: ...
    def memory(self, dtype: torch.dtype) -> int:
        """Bytes that verifying and timing take, roughly."""

    def work(self, dtype: torch.dtype, direction: str) -> Work: ...
    def case(self, device: str, dtype: torch.dtype, direction: str) -> Case: ...


@dataclass(frozen=True)
class Row:
    """One line of a report."""

    bench: str
    workload: Workload
    dtype: str  # a key of DTYPES
    direction: str

    @property
    def key(self) -> tuple[str, ...]:
        return self.bench, self.workload.name, self.dtype, self.direction

    @property
    def label(self) -> str:
        return " ".join(self.key)


@dataclass(frozen=True)
class Result:
    """What became of a row. The fields are the JSON's: ``report`` documents them."""

    bench: str
    workload: str
    dtype: str
    direction: str
    backend: str
    status: str
    reason: str | None = None
    timing: str | None = None
    parity: tuple[Parity, ...] = ()
    fastgpt_time: Timing | None = None
    baseline_times: dict[str, Timing] = field(default_factory=dict)
    refused: dict[str, str] = field(default_factory=dict)
    baseline: str | None = None
    ratio: float | None = None
    rate: float | None = None
    unit: str | None = None
    ceiling: str | None = None
    share: float | None = None
    memory: int | None = None
    baseline_memory: dict[str, int | None] = field(default_factory=dict)

    @property
    def key(self) -> tuple[str, ...]:
        """Of its row."""
        return self.bench, self.workload, self.dtype, self.direction


def wall_timer(run: Callable[[], object], calls: int) -> float:
    start = time.perf_counter()
    for _ in range(calls):
        run()
    return time.perf_counter() - start


def cuda_timer(run: Callable[[], object], calls: int) -> float:
    """Time on the device, between two events on the current stream."""
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda.synchronize()
    start.record()
    for _ in range(calls):
        run()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) * 1e-3


def host_timer(run: Callable[[], object], calls: int) -> float:
    """Time until the calls are on the GPU's queue, which they do not fill."""
    torch.cuda.synchronize()
    return wall_timer(run, calls)


def cold_timer() -> Timer:
    """Time on the device, with nothing of use in its cache when a call begins."""
    # Read, not written: lines that have still to go back to memory would take time of the call.
    other = torch.zeros(2 * torch.cuda.get_device_properties(0).L2_cache_size // 4, device="cuda")
    total = torch.zeros((), device="cuda")

    def timer(run: Callable[[], object], calls: int) -> float:
        events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(calls)]
        for start, end in events:
            torch.sum(other, 0, out=total)
            start.record()
            run()
            end.record()
        torch.cuda.synchronize()
        return sum(start.elapsed_time(end) for start, end in events) * 1e-3

    return timer


def timer_for(device: str, work: Work | None = None) -> tuple[str, Timer]:
    """How a sample is taken, in words and as a function."""
    if device == "cpu":
        return "wall clock", wall_timer
    if work and work.unit == "call":
        return "wall clock of the host", host_timer
    if work and work.unit == "B":
        return "events, cold L2", cold_timer()
    return "events", cuda_timer


def graphed(run: Callable[[], object]) -> Callable[[], object] | None:
    """What ``run`` puts on the current stream, as a CUDA graph: no time of the host. None if that fails."""
    graph = torch.cuda.CUDAGraph()
    try:
        run()
        torch.cuda.synchronize()
        with torch.cuda.graph(graph, stream=torch.cuda.current_stream()):
            run()
        graph.replay()
        torch.cuda.synchronize()
    except Exception:  # what cannot be captured says so in many ways
        return None
    return graph.replay


def measure(
    candidates: Mapping[str, Callable[[], object]], *, budget: float, timer: Timer = wall_timer
) -> dict[str, Timing]:
    """Times the candidates in turn, so that whatever slows the machine meanwhile meets them all.

    Args:
        candidates: what to run, by name. Each round takes one sample of every candidate, in an order
            that rotates.
        budget: seconds of samples, all candidates together. The last rotation is finished, and there
            are at least FEWEST_ROUNDS rounds.
        timer: how a sample is taken.
    """
    for run in candidates.values():  # the first call initialises what is lazy; it and the next warm caches up
        timer(run, 1)
    fastest = min(timer(run, 1) for run in candidates.values())
    calls = max(1, math.ceil(SHORTEST_SAMPLE / max(fastest, 1e-9)))
    names = list(candidates)
    samples: dict[str, list[float]] = {name: [] for name in names}
    rounds, spent = 0, 0.0
    while rounds < FEWEST_ROUNDS or rounds % len(names) or spent < budget:
        first = rounds % len(names)
        for name in names[first:] + names[:first]:
            seconds = timer(candidates[name], calls)
            samples[name].append(seconds / calls)
            spent += seconds
        rounds += 1
    return {name: _timing(samples[name], calls) for name in names}


def _timing(samples: list[float], calls: int) -> Timing:
    deciles = statistics.quantiles(samples, n=10, method="inclusive")
    return Timing(statistics.median(samples), deciles[1], deciles[7], len(samples), calls)


class ParityError(Exception):
    """fastgpt's numbers are further from float64 than the rule allows; the message says by how much."""


def _error(value: Tensor, reference: Tensor) -> float:
    return (value.to(torch.float64) - reference).abs().max().item()


Expected = tuple[tuple[Tensor, ...], list[tuple[Tensor, ...]]]


def expected(case: Case) -> Expected:
    """What is computed in float64, and by each of torch's ways."""
    return case.oracle(), [baseline() for baseline in case.baselines.values()]


def verify(case: Case, candidate: Computation, expected: Expected) -> tuple[Parity, ...]:
    """Holds fastgpt's numbers to the parity rule.

    Raises:
        ParityError: a tensor has another shape or dtype than torch's, or misses its bound.
    """
    checked = []
    exact_tensors, torch_tensors = expected
    for name, value, exact, *torch_values in zip(
        case.tensors, candidate(), exact_tensors, *torch_tensors, strict=True
    ):
        like = torch_values[0]
        if (value.shape, value.dtype) != (like.shape, like.dtype):
            raise ParityError(
                f"{name}: {value.dtype} {tuple(value.shape)}, torch's is {like.dtype} {tuple(like.shape)}"
            )
        torch_error = min(_error(torch_value, exact) for torch_value in torch_values)
        parity = Parity(name, _error(value, exact), torch_error, case.factor * torch_error + FLOOR)
        if not parity.error <= parity.bound:  # a NaN is no parity either
            raise ParityError(
                f"{name}: off by {parity.error:.3g} from float64, at most {parity.bound:.3g} is allowed "
                f"(torch's own error is {torch_error:.3g})"
            )
        checked.append(parity)
    return tuple(checked)


def _measured(
    candidates: Mapping[str, Callable[[], object]], work: Work, device: str, budget: float
) -> tuple[str, dict[str, Timing]]:
    """How the candidates were timed, and what came of it; on a GPU as graphs, if all of them can be."""
    how, timer = timer_for(device, work)
    if device == "cuda" and work.unit != "call":
        graphs = {name: graphed(run) for name, run in candidates.items()}
        eager = [name for name, graph in graphs.items() if graph is None]
        candidates = {name: graphs[name] or run for name, run in candidates.items()}
        how += f", graphs{' but for ' * bool(eager)}{', '.join(eager)}"
    return how, measure(candidates, budget=budget, timer=timer)


def _ceiling(work: Work, dtype: str, device: str, ceilings: Mapping[str, float]) -> str | None:
    """Where products of this dtype have a rate of their own, it is that. What reads a GPU's memory is held to
    copying, which comes nearer to the memory's rate there than torch's sum."""
    if work.ceiling == "read" and device == "cuda":
        return "copy"
    own = f"{dtype} gemm"
    return own if work.ceiling == "sgemm" and own in ceilings else work.ceiling


def _result(row: Row, backend: str, status: str, **fields: Any) -> Result:
    return Result(row.bench, row.workload.name, row.dtype, row.direction, backend, status, **fields)


def _ended(row: Row, backend: str, error: Exception) -> Result:
    """What an error has made of the row."""
    if isinstance(error, BackendUnsupported):
        return _result(row, backend, "skipped", reason=str(error))
    name = "" if isinstance(error, ParityError) else f"{type(error).__name__}: "
    return _result(row, backend, "failed", reason=f"{name}{error}")


def run(
    row: Row,
    *,
    device: str,
    backends: Sequence[str],
    budget: float,
    ceilings: Mapping[str, float],
    free_memory: int,
) -> list[Result]:
    """Verifies one row by each backend and times, in turn, those that pass. What fails verification is
    never timed.

    Returns:
        A result for each backend, that is ``ok``; ``skipped``, where the machine or the backend cannot run
        it; or ``failed``, where the numbers are wrong or an error ended it.
    """
    workload, dtype = row.workload, DTYPES[row.dtype]
    if (needed := workload.memory(dtype)) > free_memory:
        reason = f"takes about {needed / 2**30:.1f} GiB, {free_memory / 2**30:.1f} GiB are free"
        return [_result(row, backend, "skipped", reason=reason) for backend in backends]
    work = workload.work(dtype, row.direction)
    parity: dict[str, tuple[Parity, ...]] = {}
    memory: dict[str, int | None] = {}
    ended: dict[str, Result] = {}
    try:
        with _own_stream(device):
            case = workload.case(device, dtype, row.direction)
            right = expected(case)
            candidates = {}
            for backend in backends:
                try:
                    candidate = case.candidate(backend)
                    parity[backend] = verify(case, candidate, right)
                    candidates[_ours(backend)] = candidate
                except Exception as error:  # the other backends may still be measured
                    ended[backend] = _ended(row, backend, error)
            del right
            if candidates and case.memory:
                everyone = {**candidates, **case.baselines}
                memory = {name: least_peak_memory(call, device) for name, call in everyone.items()}
            if candidates:
                how, times = _measured({**candidates, **case.baselines, **case.timed}, work, device, budget)
    except Exception as error:  # out of memory, say: the other rows may still be measured
        ended = {backend: _ended(row, backend, error) for backend in backends} | ended

    def timed(backend: str) -> Result:
        ours = times[_ours(backend)]
        fastest = min(case.baselines, key=lambda name: times[name].median)
        rate = work.amount / ours.median
        ceiling = _ceiling(work, row.dtype, device, ceilings)
        return _result(
            row,
            backend,
            "ok",
            timing=how,
            parity=parity[backend],
            fastgpt_time=ours,
            baseline_times={name: timing for name, timing in times.items() if name not in candidates},
            refused=case.refused,
            baseline=fastest,
            ratio=times[fastest].median / ours.median,
            rate=rate,
            unit=work.unit,
            ceiling=ceiling,
            share=rate / ceilings[ceiling] if ceiling else None,
            memory=memory.get(_ours(backend)),
            baseline_memory={name: memory[name] for name in memory if name not in candidates},
        )

    return [ended.get(backend) or timed(backend) for backend in backends]


def _ours(backend: str) -> str:
    """The name of a candidate among all that is timed."""
    return f"fastgpt by {backend}"


def _own_stream(device: str) -> contextlib.AbstractContextManager[Any]:
    """Backward runs on the stream of its forward, and no graph can be captured on the default stream."""
    return torch.cuda.stream(torch.cuda.Stream()) if device == "cuda" else contextlib.nullcontext()
