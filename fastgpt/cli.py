"""The ``fastgpt`` command: benchmarks, what can run here, training, and a demonstration."""

from __future__ import annotations

import argparse
import importlib
import os
import re
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn, Protocol, TypeVar

from fastgpt import dispatch
from fastgpt.gpt.settings import CHOICES, SettingError, Settings

if TYPE_CHECKING:
    from fastgpt.bench import report

BENCHES = ("attention", "decode", "linear", "norm", "model", "launch")
DTYPES = ("fp32", "bf16", "fp16")
BUDGET = 2.0  # seconds of samples per row
QUICK_BUDGET = 0.2
CEILINGS_BUDGET = 2.0


class CommandError(Exception):
    """The command cannot be carried out as asked; the message is for the user."""


class HasLabel(Protocol):
    @property
    def label(self) -> str: ...


Labelled = TypeVar("Labelled", bound=HasLabel)


class Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {message}\n")


def _dtypes(text: str) -> tuple[str, ...]:
    names = tuple(dict.fromkeys(text.split(",")))
    for name in names:
        if name not in DTYPES:
            raise argparse.ArgumentTypeError(f"got {name!r}, expected some of {','.join(DTYPES)}")
    return names


def _budget(text: str) -> float | None:
    """None for quick."""
    if text == "quick":
        return None
    try:
        seconds = float(text)
    except ValueError:
        seconds = 0.0
    if not 0 < seconds < float("inf"):
        raise argparse.ArgumentTypeError(f"got {text!r}, expected seconds above 0, or quick")
    return seconds


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"got {text!r}, expected a whole number above 0")
    return int(text)


def _ops(text: str) -> tuple[str, ...]:
    names = tuple(dict.fromkeys(text.split(",")))
    for name in names:
        if name not in dispatch.OPS:
            raise argparse.ArgumentTypeError(f"got {name!r}, expected some of {','.join(dispatch.OPS)}")
    return names


def _pattern(text: str) -> re.Pattern[str]:
    try:
        return re.compile(text)
    except re.error as error:
        raise argparse.ArgumentTypeError(f"got {text!r}, no regular expression: {error}") from None


def _number(text: str) -> float:
    """Settings says which numbers it takes, and the option's name."""
    try:
        return float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"got {text!r}, expected a number") from None


def _whole(text: str) -> int:
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"got {text!r}, expected a whole number")
    return int(text)


# Fields of Settings: how their options are read, and their help.
TRAIN_OPTIONS: dict[str, tuple[Callable[[str], object], str, str]] = {
    "tokenizer": (str, "", "gpt2: its byte-pair encoding; bytes: for small runs"),
    "finetune": (str, "PATH", "start from these weights: a checkpoint, a run's folder, one of transformers"),
    "family": (str, "", "norm, MLP and positions of this family"),
    "layers": (_whole, "N", "blocks"),
    "heads": (_whole, "N", "query heads"),
    "kv_heads": (_whole, "N", "key and value heads, default as many as heads"),
    "hidden": (_whole, "N", "width"),
    "seqlen": (_whole, "N", "tokens in a sequence"),
    "dropout": (_number, "P", "probability of dropping, in training"),
    "steps": (_whole, "N", "optimizer steps"),
    "batch_size": (_whole, "N", "sequences in a forward pass"),
    "grad_accum": (_whole, "N", "forward passes in a step"),
    "lr": (_number, "RATE", "largest learning rate; a cosine leads to a tenth of it"),
    "warmup": (_whole, "N", "steps over which the rate rises, default a twentieth of all"),
    "weight_decay": (_number, "X", "of matrices, by AdamW"),
    "grad_clip": (_number, "NORM", "largest norm of the gradient, 0 for no limit"),
    "dtype": (str, "", "of the computation; bf16 by autocast, the weights stay fp32"),
    "val_fraction": (_number, "X", "of the text, its end, for validation"),
    "eval_every": (_whole, "N", "steps between validations"),
    "save_every": (_whole, "N", "steps between checkpoints"),
    "seed": (_whole, "N", "of weights, sequences and dropout"),
    "device": (str, "", "where to train"),
    "backend": (str, "", "of attention and norms; default FASTGPT_BACKEND, else auto"),
}


def _add_train_options(train: argparse.ArgumentParser) -> None:
    train.add_argument("--data", nargs="+", type=Path, default=[], metavar="FILE", help="text to train on")
    train.add_argument(
        "--out", type=Path, required=True, metavar="DIR", help="for tokens, checkpoint and loss curve"
    )
    train.add_argument(
        "--resume", action="store_true", help="go on with the run in DIR, exactly; its options are remembered"
    )
    for name, (kind, metavar, text) in TRAIN_OPTIONS.items():
        if (default := getattr(Settings, name)) is not None and "default" not in text:
            text += f", default {default}"
        train.add_argument(
            f"--{name.replace('_', '-')}",
            type=kind,
            choices=CHOICES.get(name),
            metavar=metavar or None,
            default=argparse.SUPPRESS,  # what is not given is not compared with a run that is resumed
            help=text,
        )


def parser() -> Parser:
    top = Parser(prog="fastgpt", description="Fused attention, norms and KV-cache decoding for PyTorch.")
    commands = top.add_subparsers(dest="command", metavar="COMMAND", required=True)

    def command(name: str, run: Callable[[argparse.Namespace], int], text: str) -> argparse.ArgumentParser:
        added = commands.add_parser(name, help=text, description=text)
        added.set_defaults(run=run)
        return added

    bench = command("bench", _bench, "Measure fastgpt against torch on this machine, after verifying it.")
    bench.add_argument("bench", nargs="+", choices=BENCHES, metavar="BENCH", help=", ".join(BENCHES))
    bench.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="default cpu")
    bench.add_argument(
        "--dtype", type=_dtypes, metavar="LIST", help="some of fp32,bf16,fp16; default: each benchmark's own"
    )
    bench.add_argument(
        "--backend",
        choices=tuple(dispatch.BACKENDS),
        help="default: every one with kernels for the device that is here",
    )
    bench.add_argument(
        "--budget",
        type=_budget,
        default=BUDGET,
        metavar="SECONDS",
        help=f"of samples per row, default {BUDGET:g}; 'quick': {QUICK_BUDGET:g}, small workloads only",
    )
    bench.add_argument("--json", type=Path, metavar="FILE", help="write the report, after every row")
    bench.add_argument(
        "--resume", action="store_true", help="take what FILE has of this device and these versions as done"
    )
    bench.add_argument("--plot", type=Path, metavar="FILE", help="draw the ratios (.png, .svg, .pdf)")

    report = command("report", _report, "Show a report that `bench --json` has written.")
    report.add_argument("file", type=Path, metavar="FILE")
    report.add_argument("--plot", type=Path, metavar="FILE", help="draw the ratios (.png, .svg, .pdf)")

    verify = command("verify", _verify, "Prove parity on this device: then `auto` takes its GPU kernels.")
    verify.add_argument("--op", type=_ops, default=dispatch.OPS, metavar="LIST", help="default: every op")
    verify.add_argument(
        "--backend", choices=("cpu", *dispatch.GPU_KERNELS), help="default: every one for GPUs that is here"
    )
    verify.add_argument("--full", action="store_true", help="every case in every dtype")
    verify.add_argument(
        "-k",
        type=_pattern,
        metavar="REGEX",
        help="only checks where it is found in 'OP CASE DTYPE'; of these alone nothing goes on record",
    )
    verify.add_argument(
        "--jobs",
        type=_count,
        metavar="N",
        help="processes, 1: this one; default: half of the cores, 2 to 8; on the CPU 1",
    )
    verify.add_argument(
        "--json", type=Path, metavar="FILE", help="write each verdict, and go on where FILE has left off"
    )

    command("backends", _backends, "What can run here, per op and backend, and why the rest cannot.")
    command("env", _env, "Describe this machine, for bug reports.")

    _add_train_options(command("train", _train, "Pretrain or fine-tune a GPT on text."))

    demo = command("demo", _demo, "Generate text with a small model, by fastgpt and by torch.")
    demo.add_argument("--prompt", metavar="TEXT")
    demo.add_argument("--max-new-tokens", type=_count, metavar="N")
    demo.add_argument("--plot", type=Path, metavar="FILE")
    return top


def _check_output(path: Path | None, option: str) -> None:
    from fastgpt.bench import report

    if path is None:
        return
    try:
        report.check_writable(path)
    except OSError as error:
        raise CommandError(f"{option}: {path} cannot be written: {error.strerror or error}") from error


def _check_plot(path: Path | None) -> None:
    from fastgpt.bench import report

    if path is None:
        return
    _check_output(path, "--plot")
    try:
        report.check_plot(path)
    except ImportError as error:
        raise CommandError(
            f'--plot needs matplotlib ({error}): pip install "fastgpt-kernels[bench]"'
        ) from error
    except ValueError as error:
        raise CommandError(f"--plot: {error}") from error


def _check_device(device: str) -> None:
    import torch

    if device == "cuda" and not torch.cuda.is_available():
        raise CommandError(f"--device cuda: torch {torch.__version__} sees no CUDA device")


def _kernels(device: str) -> list[str]:
    """The backends with kernels of fastgpt's own for the device that are here, in the order of `auto`."""
    names = [name for name in dispatch.AUTO_ORDER[device] if name not in ("torch", "reference")]
    reasons = {name: dispatch.unavailable(name) for name in names}
    if here := [name for name in names if reasons[name] is None]:
        return here
    why = "; ".join(f"{name}: {reason}" for name, reason in reasons.items())
    raise CommandError(f"no fastgpt kernels for {device} here ({why})")


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _progress(rows: Iterable[Labelled], total: int) -> Iterator[Labelled]:
    """The rows, with a bar on a terminal that has tqdm, else a line for each."""
    try:
        from tqdm import tqdm
    except ImportError:
        tqdm = None
    if tqdm is None or not sys.stderr.isatty():
        for number, row in enumerate(rows, 1):
            _say(f"[{number}/{total}] {row.label}")
            yield row
        return
    with tqdm(rows, total=total, unit="row", leave=False) as bar:
        for row in bar:
            bar.set_description(row.label)
            yield row


VERSIONS = ("cpu", "gpu", "torch", "triton", "fastgpt", "commit")  # what a run that is resumed has to share


def _begun(
    args: argparse.Namespace, backends: list[str], facts: dict[str, str | int]
) -> report.Report | None:
    """The report that is to be gone on with."""
    if not args.resume or not (args.json and args.json.exists()):
        return None
    begun = _loaded(args.json)
    of = [(args.device, ", ".join(backends)), (begun.device, begun.backend)]
    if of[0] != of[1] or any(facts.get(name) != begun.machine.get(name) for name in VERSIONS):
        raise CommandError(f"--resume: {args.json} is of another device, backend or version")
    return begun


def _bench(args: argparse.Namespace) -> int:
    import dataclasses
    import datetime
    import itertools

    import torch

    from fastgpt.bench import harness, machine, memory, report, workloads

    _check_output(args.json, "--json")
    _check_plot(args.plot)
    _check_device(args.device)
    if args.device == "cpu" and "launch" in args.bench:
        raise CommandError("launch: measures how kernels are launched on a GPU: --device cuda")
    if args.device == "cuda" and "linear" in args.bench:
        raise CommandError("linear: measures kernels of the CPU: --device cpu")
    backends = [args.backend] if args.backend else _kernels(args.device)
    budget = QUICK_BUDGET if args.budget is None else args.budget
    rows = workloads.plan(dict.fromkeys(args.bench), args.dtype, args.budget is None, args.device)
    facts = {**machine.describe(), "freed memory": memory.keep_freed_memory()}
    done = _begun(args, backends, facts)
    if done is None:
        seed = torch.seed()
        date = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
        _say("measuring this machine's own rates")
        ceilings = machine.ceilings(args.device, min(budget, CEILINGS_BUDGET))
        done = report.Report(date, args.device, ", ".join(backends), budget, seed, facts, ceilings, ())
    results: dict[tuple[str, ...], list[harness.Result]] = {}  # of each row
    for result in done.results:
        results.setdefault(result.key, []).append(result)
    failed = {result.key for result in done.results if result.status == "failed"}
    rows = [row for row in rows if row.key not in results or row.key in failed]
    rows.sort(key=lambda row: row.key in failed)  # last: what has ended a run may end this one
    for row in _progress(rows, len(rows)):
        try:
            free_memory = memory.free_memory(args.device)
        except RuntimeError as error:
            _say(f"the GPU answers no more: --resume goes on in another process ({error})")
            break
        results[row.key] = harness.run(
            row,
            device=args.device,
            backends=backends,
            budget=budget,
            ceilings=done.ceilings,
            free_memory=free_memory,
        )
        done = dataclasses.replace(done, results=tuple(itertools.chain(*results.values())))
        if args.json:
            report.save(done, args.json)
    print(report.table(done))
    if args.plot and done.timed():
        report.plot(done, args.plot)
    wrong = sum(result.status == "failed" for result in done.results)
    if wrong:
        _say(f"fastgpt bench: {wrong} of {len(done.results)} rows failed")
    elif not done.timed():
        _say("fastgpt bench: nothing could be measured")
    return 1 if wrong or not done.timed() else 0


def _verified_backends(asked: str | None) -> list[str]:
    reasons = {name: dispatch.unavailable(name) for name in ([asked] if asked else dispatch.GPU_KERNELS)}
    if here := [name for name, reason in reasons.items() if reason is None]:
        return here
    why = "; ".join(f"{name}: {reason}" for name, reason in reasons.items())
    raise CommandError(f"no kernels to verify here ({why})")


def _gpu_jobs() -> int:
    """Half of the cores, at most 8, and 4 GiB of the GPU's memory for each; not this process alone, which a
    check may end."""
    import os

    import torch

    memory = torch.cuda.get_device_properties(0).total_memory
    return max(2, min(8, (os.cpu_count() or 1) // 2, memory >> 32))


def _verify(args: argparse.Namespace) -> int:
    import torch

    from fastgpt import proof
    from fastgpt.bench import machine
    from fastgpt.verify import run

    _check_output(args.json, "--json")
    kept: list[run.Verdict] = []
    facts: dict[str, Any] = {"date": run.now(), "machine": machine.describe(), "identity": {}}
    if args.json and args.json.exists():
        try:
            kept, facts = run.load(args.json)
        except (ValueError, TypeError) as error:
            raise CommandError(f"--json: {error}") from error
    verdicts = {verdict.key: verdict for verdict in kept}
    judged: list[run.Verdict] = []
    for backend in _verified_backends(args.backend):
        elsewhere = {"triton": "TRITON_INTERPRET", "cuda": "FASTGPT_CUDA_EMULATE"}.get(backend, "")
        on_cpu = os.environ.get(elsewhere) == "1"  # that proves no GPU
        gpu = backend in dispatch.GPU_KERNELS and torch.cuda.is_available() and not on_cpu
        identity = proof.identity(backend, torch.cuda.current_device()) if gpu else None
        if facts["identity"].setdefault(backend, identity) != identity:
            raise CommandError(f"--json: {args.json} is of another device or another version")
        ops = [op for op in args.op if _written(op, backend)]
        # Medium sizes take hours in Triton's interpreter or the emulator, and most of a minute on a CPU.
        checks = run.table(ops, args.full, medium=gpu or backend == "cpu")
        wanted = {run.key(check, backend): check for check in checks}
        if args.k is not None:
            wanted = {key: check for key, check in wanted.items() if args.k.search(" ".join(key[:3]))}
        todo = [
            check for key, check in wanted.items() if key not in verdicts or verdicts[key].status == "failed"
        ]
        jobs = args.jobs or (_gpu_jobs() if gpu else 1)
        for verdict in _progress(run.run(todo, backend, "cuda" if gpu else "cpu", jobs), len(todo)):
            verdicts[verdict.key] = verdict
            if verdict.status == "failed":
                _say(f"{' '.join(verdict.key)} (seed {verdict.seed}): {verdict.reason}")
            if args.json:
                run.save(args.json, verdicts.values(), facts)
        own = [verdicts[key] for key in wanted]
        judged += own
        print(f"{backend} on {torch.cuda.get_device_name() if gpu else 'the CPU'}")
        print(_columns(run.summary(own)))
        if identity is not None and args.k is None:
            passed = run.passed(own)
            file = proof.save(identity, sorted({*proof.load(identity), *passed} - ({*ops} - {*passed})))
            print(f"on record for `auto`: {', '.join(proof.load(identity)) or 'nothing'} ({file})")
    if not judged:
        raise CommandError("there is no such check")
    failed = sum(verdict.status == "failed" for verdict in judged)
    if failed:
        _say(f"fastgpt verify: {failed} checks failed")
    return 1 if failed else 0


def _loaded(path: Path) -> report.Report:
    from fastgpt.bench import report

    try:
        loaded = report.load(path)
        report.table(loaded)
    except OSError as error:
        raise CommandError(f"{path} cannot be read: {error.strerror}") from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CommandError(f"{path} is not a report of `fastgpt bench --json`: {error}") from error
    return loaded


def _report(args: argparse.Namespace) -> int:
    from fastgpt.bench import report

    _check_plot(args.plot)
    loaded = _loaded(args.file)
    print(report.table(loaded))
    if args.plot:
        if not loaded.timed():
            raise CommandError(f"{args.file} has no timings to draw")
        report.plot(loaded, args.plot)
    return 0


def _columns(rows: Iterable[tuple[str, ...]]) -> str:
    rows = list(rows)
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join(f"{cell:<{width}}" for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    )


def _written(op: str, backend: str) -> bool:
    try:
        implementation = dispatch.implementation(op, backend)
    except ModuleNotFoundError as error:
        if error.name != f"fastgpt.ops.{op}.{backend}":
            raise
        return False
    return not hasattr(implementation, "WHY_NOT")  # one that only says why


def _hardware() -> str:
    """What is true of this version, on whatever machine."""
    if not dispatch.PROVEN:
        return (
            "no GPU kernel of this version has run on hardware: `auto` takes them on a device once "
            "`fastgpt verify` has passed there, and torch until then"
        )
    shown = ", ".join(f"{op} by {backend} on {chip}" for backend, op, chip in dispatch.PROVEN)
    return f"parity on hardware is on record of: {shown}"


def _backends(args: argparse.Namespace) -> int:
    import torch

    from fastgpt.bench import machine

    reasons = {backend: dispatch.unavailable(backend) for backend in dispatch.BACKENDS}

    def state(op: str, backend: str) -> str:
        if reasons[backend] is not None:
            return "no"
        if not _written(op, backend):
            return "not written"
        if backend not in dispatch.GPU_KERNELS:
            return "yes"
        if not torch.cuda.is_available():
            return "interpreted"
        return "unproven" if dispatch.unproven(backend, op) else "yes"

    print(
        _columns(
            [("op", *reasons)] + [(op, *(state(op, backend) for backend in reasons)) for op in dispatch.OPS]
        )
    )
    print()
    for backend, reason in reasons.items():
        if reason is not None:
            print(f"{backend} is not available: {reason}")
    print(f"cpu instruction set: {machine.isa()}")
    for device, order in dispatch.AUTO_ORDER.items():
        print(f"auto on {device} tensors: {', '.join(order)}")
    print(_hardware())
    return 0


def _env(args: argparse.Namespace) -> int:
    from fastgpt.bench import machine

    print(_columns((name, str(value)) for name, value in machine.describe().items()))
    return 0


def _train(args: argparse.Namespace) -> int:
    from fastgpt.gpt.train import Diverged, train

    given = {name: value for name, value in vars(args).items() if name in TRAIN_OPTIONS}
    if not args.resume and "backend" not in given:
        # What is found in the environment belongs to the run, and is remembered with it.
        try:
            given["backend"] = dispatch.requested(None)
        except ValueError as error:
            raise CommandError(str(error)) from error
    try:
        train(args.data, args.out, resume=args.resume, **given)
    except SettingError as error:
        raise CommandError(f"--{error.name.replace('_', '-')}: {error.problem}") from error
    except ImportError as error:
        raise CommandError(str(error)) from error
    except Diverged as error:
        _say(f"fastgpt train: {error}; the last checkpoint in {args.out} is kept (a lower --lr may help)")
        return 1
    return 0


def _demo(args: argparse.Namespace) -> int:
    _check_plot(args.plot)
    return importlib.import_module("fastgpt.demo").main(args)


def main(argv: list[str] | None = None) -> int:
    args = parser().parse_args(argv)
    try:
        return args.run(args)
    except CommandError as error:
        _say(f"fastgpt {args.command}: error: {error}")
        return 2
    except KeyboardInterrupt:
        _say("interrupted")
        return 130


if __name__ == "__main__":
    sys.exit(main())
