"""Verifies a workload, then times fastgpt and torch on it in turn."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from fastgpt.dispatch import BackendUnsupported

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}

OUTPUT_FACTOR = 2.0  # the parity rule: error <= factor · torch's own error in the same dtype + FLOOR
GRADIENT_FACTOR = 3.0
FLOOR = 1e-5

SHORTEST_SAMPLE = 1e-3  # seconds; calls that are shorter are timed several at once
FEWEST_ROUNDS = 6  # 20th and 80th percentiles need some samples, however slow a call is

Timer = Callable[[Callable[[], object], int], float]  # seconds that so many calls of a callable take


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
    unit: str  # FLOP, B or token
    ceiling: str | None


@dataclass(frozen=True)
class Case:
    """A workload made concrete: the same tensors by fastgpt, by torch and in float64."""

    tensors: tuple[str, ...]  # names of what the three return
    factor: float
    candidate: Callable[[], tuple[Tensor, ...]]
    baselines: dict[
        str, Callable[[], tuple[Tensor, ...]]
    ]  # torch's ways; the fastest here is the one that counts
    oracle: Callable[[], tuple[Tensor, ...]]


class Workload(Protocol):
    @property
    def name(self) -> str: ...
    def memory(self, dtype: torch.dtype) -> int:
        """Bytes that verifying and timing take, roughly."""

    def work(self, dtype: torch.dtype, direction: str) -> Work: ...
    def case(self, device: str, dtype: torch.dtype, direction: str, backend: str) -> Case:
        """Raises BackendUnsupported where ``backend`` cannot serve the call."""


@dataclass(frozen=True)
class Row:
    """One line of a report."""

    bench: str
    workload: Workload
    dtype: str  # a key of DTYPES
    direction: str

    @property
    def label(self) -> str:
        return f"{self.bench} {self.workload.name} {self.dtype} {self.direction}"


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
    parity: tuple[Parity, ...] = ()
    fastgpt_time: Timing | None = None
    baseline_times: dict[str, Timing] = field(default_factory=dict)
    baseline: str | None = None
    ratio: float | None = None
    rate: float | None = None
    unit: str | None = None
    ceiling: str | None = None
    share: float | None = None


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


def timer_for(device: str) -> Timer:
    return cuda_timer if device == "cuda" else wall_timer


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


def verify(case: Case) -> tuple[Parity, ...]:
    """Holds fastgpt's numbers to the parity rule.

    Raises:
        ParityError: a tensor has another shape or dtype than torch's, or misses its bound.
    """
    checked = []
    exact_tensors = case.oracle()
    torch_tensors = [baseline() for baseline in case.baselines.values()]
    for name, value, exact, *torch_values in zip(
        case.tensors, case.candidate(), exact_tensors, *torch_tensors, strict=True
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


def run(
    row: Row,
    *,
    device: str,
    backend: str,
    budget: float,
    ceilings: Mapping[str, float],
    free_memory: int,
) -> Result:
    """Verifies and times one row. What fails verification is never timed.

    Returns:
        A result that is ``ok``; ``skipped``, where the machine or the backend cannot run it; or
        ``failed``, where the numbers are wrong or an error ended it.
    """
    workload, dtype = row.workload, DTYPES[row.dtype]

    def result(status: str, **fields: Any) -> Result:
        return Result(row.bench, workload.name, row.dtype, row.direction, backend, status, **fields)

    if (needed := workload.memory(dtype)) > free_memory:
        return result(
            "skipped",
            reason=f"takes about {needed / 2**30:.1f} GiB, {free_memory / 2**30:.1f} GiB are free",
        )
    try:
        case = workload.case(device, dtype, row.direction, backend)
        parity = verify(case)
        times = measure({"fastgpt": case.candidate, **case.baselines}, budget=budget, timer=timer_for(device))
    except BackendUnsupported as error:
        return result("skipped", reason=str(error))
    except ParityError as error:
        return result("failed", reason=str(error))
    except Exception as error:  # out of memory, say: the other rows may still be measured
        return result("failed", reason=f"{type(error).__name__}: {error}")
    ours = times.pop("fastgpt")
    fastest = min(times, key=lambda name: times[name].median)
    work = workload.work(dtype, row.direction)
    rate = work.amount / ours.median
    return result(
        "ok",
        parity=parity,
        fastgpt_time=ours,
        baseline_times=times,
        baseline=fastest,
        ratio=times[fastest].median / ours.median,
        rate=rate,
        unit=work.unit,
        ceiling=work.ceiling,
        share=rate / ceilings[work.ceiling] if work.ceiling else None,
    )
