"""Every case of every op, judged; in several processes, as most of the time on a GPU goes into compiling."""

from __future__ import annotations

import dataclasses
import datetime
import functools
import json
import multiprocessing
import os
import warnings
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch

from fastgpt import dispatch
from fastgpt.verify import attention, decode, merge, norm, rotary
from fastgpt.verify.rule import DTYPES, Result, judge

SCHEMA = 1


class Check(NamedTuple):
    """A case in a dtype. ``results(backend, dtype)`` computes it for fresh random inputs."""

    op: str
    field: str  # of the specification
    case: str
    dtype: torch.dtype
    results: Callable[[str, torch.dtype], list[Result]]


@dataclass(frozen=True)
class Verdict:
    """What became of a check; the fields are the JSON's."""

    op: str
    field: str
    case: str
    dtype: str
    backend: str
    status: str  # ok, failed, or unsupported: the backend says that it cannot serve this
    seed: int  # of torch's generator, before the inputs are drawn
    reason: str | None = None
    shares: dict[str, float] = dataclasses.field(
        default_factory=dict
    )  # of each tensor: its error / the error allowed
    fatal: bool = False  # the GPU answers no more in this process

    @property
    def key(self) -> tuple[str, ...]:
        return self.op, self.case, self.dtype, self.backend

    @property
    def label(self) -> str:
        return " ".join((*self.key, self.status))


def _field(used: Iterable[tuple[str, object]], otherwise: str) -> str:
    """The one field that a case is about."""
    names = [name for name, value in used if value]
    return names[0] if len(names) == 1 else "combinations" if names else otherwise


def _attention_field(v: attention.Variant) -> str:
    used = (
        ("window", max(v.case.window) >= 0),
        ("softcap", v.softcap),
        ("alibi", v.slopes),
        ("bias", v.bias and not v.mask),
        ("mask", v.mask),
        ("sink", v.sink),
        ("dropout", v.dropout_p),
        ("varlen", v.lengths_q),
        ("key ranges", v.seqused_k or v.leftpad_k),
    )
    return _field(used, "causal" if v.case.causal else "not causal")


def _decode_field(v: decode.DecodeVariant) -> str:
    used = (
        ("window", max(v.case.window) >= 0),
        ("softcap", v.softcap),
        ("alibi", v.slopes),
        ("sink", v.sink),
        ("rotary", v.rotary_dim),
        ("left padding", v.leftpad),
        ("cache_batch_idx", v.shuffled),
        ("pages", v.page_size),
        ("quantized", v.cache_dtype),
    )
    return _field(used, "append" if v.case.appended else "no append")


def _norm_results(case: norm.NormCase, kind: str, backend: str, dtype: torch.dtype) -> list[Result]:
    both = norm.forward_results, norm.backward_results
    return [result for results in both for result in results(case, kind, dtype, backend)]


def _merge_results(case: merge.MergeCase, backend: str, dtype: torch.dtype) -> list[Result]:
    return merge.results(case, dtype, backend)


def _rotary_results(
    case: rotary.RotaryCase, interleaved: bool, backend: str, dtype: torch.dtype
) -> list[Result]:
    return rotary.results(case, dtype, interleaved, backend)


def _cases(medium: bool) -> Iterator[tuple[str, str, str, Callable[..., list[Result]]]]:
    """(op, field, case, results) of every case."""
    for plain in attention.ATTENTION:
        field_ = _attention_field(attention.Variant(plain))
        yield "attention", field_, str(plain), functools.partial(attention.case_results, plain)
    variants = attention.VARIANTS | attention.TILED | (attention.MEDIUM if medium else {})
    for name, variant in variants.items():
        results = functools.partial(attention.variant_results, variant)
        yield "attention", _attention_field(variant), name, results
    for cached in decode.DECODE:
        field_ = _decode_field(decode.DecodeVariant(cached))
        yield "decode", field_, str(cached), functools.partial(decode.case_results, cached)
    for name, of_cache in (decode.DECODE_VARIANTS | (decode.MEDIUM if medium else {})).items():
        yield "decode", _decode_field(of_cache), name, functools.partial(decode.variant_results, of_cache)
    for rows in norm.CASES + (norm.MEDIUM if medium else []):
        for kind in norm.KINDS:
            field_ = f"{kind} norm" + (
                ", dropout" if rows.dropout_p else ", residual" if rows.residual else ""
            )
            yield "norm", field_, f"{kind} {rows}", functools.partial(_norm_results, rows, kind)
    for states in merge.CASES + (merge.MEDIUM if medium else []):
        yield "merge", "states", str(states), functools.partial(_merge_results, states)
    for turned in rotary.CASES + (rotary.MEDIUM if medium else []):
        for style, interleaved in (("neighbours", True), ("halves", False)):
            field_ = f"{style}, packed" if turned.lengths is not None else style
            results = functools.partial(_rotary_results, turned, interleaved)
            yield "rotary", field_, f"{style} {turned}", results


def table(ops: Iterable[str], full: bool, medium: bool) -> list[Check]:
    """The checks: each case in one of the dtypes in turn or, ``full``, in all; ``medium`` sizes, too."""
    return [
        Check(op, field_, case, DTYPES[(number + turn) % len(DTYPES)], results)
        for turn in range(len(DTYPES) if full else 1)
        for number, (op, field_, case, results) in enumerate(_cases(medium))
        if op in ops
    ]


def key(check: Check, backend: str) -> tuple[str, ...]:
    """Of the check's verdict."""
    return check.op, check.case, str(check.dtype).removeprefix("torch."), backend


def judged(check: Check, backend: str, device: str) -> Verdict:
    """The verdict on one check."""
    seed = torch.seed() % 2**32
    torch.manual_seed(seed)
    op, case, dtype, _ = key(check, backend)
    verdict = functools.partial(Verdict, op, check.field, case, dtype, backend, seed=seed)
    before = (
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
    )
    torch.use_deterministic_algorithms(True, warn_only=True)  # with it, uninitialized memory is NaN
    try:
        with warnings.catch_warnings(), torch.device(device):
            warnings.simplefilter("ignore")
            return verdict("ok", shares=judge(lambda: check.results(backend, check.dtype)))
    except dispatch.BackendUnsupported as error:
        return verdict("unsupported", reason=str(error))
    except Exception as error:  # whatever a kernel comes up with; the other checks go on
        return verdict("failed", reason=f"{type(error).__name__}: {error}", fatal=not _answers(device))
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])


_dead = False  # whether a check of this process was fatal


def _judged_alive(check: Check, backend: str, device: str) -> Verdict | None:
    """The verdict, or None in a process where an earlier check was fatal: there all others fail, too."""
    global _dead
    if _dead:
        return None
    verdict = judged(check, backend, device)
    _dead = verdict.fatal
    return verdict


def _answers(device: str) -> bool:
    """Whether a GPU still does: once a kernel has touched foreign memory, not until the process ends."""
    try:
        if device == "cuda":
            torch.cuda.synchronize()
    except RuntimeError:
        return False
    return True


def run(checks: list[Check], backend: str, device: str, jobs: int) -> Iterator[Verdict]:
    """The verdicts, as they come; of one job, from this process."""
    if jobs == 1:
        for check in checks:
            yield judged(check, backend, device)
        return
    todo = {key(check, backend): check for check in checks}
    workers, threads = jobs, max(1, (os.cpu_count() or 1) // jobs)
    while todo:
        died = False
        spawned = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(workers, spawned, torch.set_num_threads, (threads,)) as pool:
            for future in as_completed(
                [pool.submit(_judged_alive, check, backend, device) for check in todo.values()]
            ):
                try:
                    verdict = future.result()
                except BrokenProcessPool:
                    died = True
                    continue
                if verdict is None:  # in new processes, then
                    continue
                del todo[verdict.key]
                yield verdict
        if died and workers == 1:  # at the first check that has no verdict
            check = todo.pop(next(iter(todo)))
            op, case, dtype, _ = key(check, backend)
            yield Verdict(op, check.field, case, dtype, backend, "failed", 0, "the process died of it")
        workers = 1 if died else jobs


def save(path: Path, verdicts: Iterable[Verdict], facts: dict[str, Any]) -> None:
    """All or nothing: a reader never sees half a file."""
    document = {"schema": SCHEMA, **facts, "results": [dataclasses.asdict(v) for v in verdicts]}
    partial = path.with_name(path.name + ".partial")
    partial.write_text(json.dumps(document, indent=1, ensure_ascii=False), encoding="utf-8")
    partial.replace(path)


def load(path: Path) -> tuple[list[Verdict], dict[str, Any]]:
    """The verdicts of a file and the facts around them.

    Raises:
        ValueError: it holds something else.
    """
    facts = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(facts, dict) or facts.pop("schema", None) != SCHEMA or "results" not in facts:
        raise ValueError(f"{path} is no file of `fastgpt verify --json`")
    return [Verdict(**entry) for entry in facts.pop("results")], facts


def now() -> str:
    return datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")


def summary(verdicts: Iterable[Verdict]) -> list[tuple[str, ...]]:
    """A line per op and field: how many checks, the largest share of the error allowed, the verdict."""
    groups: dict[tuple[str, str], list[Verdict]] = {}
    for v in verdicts:
        groups.setdefault((v.op, v.field), []).append(v)
    lines: list[tuple[str, ...]] = [("op", "field", "checks", "error / allowed", "verdict")]
    for (op, field_), own in sorted(groups.items()):
        states = [v.status for v in own]
        worst = max((share for v in own for share in v.shares.values()), default=0.0)
        failed, refused = states.count("failed"), states.count("unsupported")
        verdict = f"{failed} FAILED" if failed else "not supported" if refused == len(own) else "ok"
        checks = str(len(own)) if refused in (0, len(own)) else f"{len(own)} ({refused} not supported)"
        lines.append((op, field_, checks, f"{worst:.2f}" if worst else "", verdict))
    return lines


def passed(verdicts: Iterable[Verdict]) -> list[str]:
    """The ops of which something was computed and nothing was wrong."""
    states: dict[str, set[str]] = {}
    for v in verdicts:
        states.setdefault(v.op, set()).add(v.status)
    return [op for op, seen in states.items() if "ok" in seen and "failed" not in seen]
