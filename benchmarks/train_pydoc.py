"""One byte-level GPT trained three times from one seed: by the reference, by the CPU kernels and by torch.

The text is that of Python's own ``pydoc_data.topics``. The three take their steps in turn, so that whatever
else the machine does meets them alike. Writes PREFIX.json and PREFIX.png and prints a table: how far each
loss curve is from the reference's, and how long a step takes. Two correct ways to compute differ by rounding,
which training magnifies; torch's distance from the reference is the measure of it.

    python benchmarks/train_pydoc.py                      # nothing else running
    python benchmarks/train_pydoc.py --steps 20 --out /tmp/try
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import pydoc_data.topics
import statistics
import tempfile
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from tqdm import tqdm

from fastgpt import GPT
from fastgpt.bench import machine
from fastgpt.gpt import data, tokenizer
from fastgpt.gpt.files import replacing
from fastgpt.gpt.settings import Settings
from fastgpt.gpt.train import Trainer

BACKENDS = ("reference", "torch", "cpu")
COLOURS = {"reference": "#cbd5e0", "torch": "#dd6b20", "cpu": "#2b6cb0"}
WARM_UP = 3  # steps that are not timed


def tokens_of_topics(folder: Path) -> data.Tokens:
    text, path, chosen = folder / "topics.txt", folder / "tokens.bin", tokenizer.load("bytes")
    text.write_text("\n".join(pydoc_data.topics.topics.values()), encoding="utf-8")
    with replacing(path) as file:
        data.write([text], chosen, file, lambda _: None)
    return data.load(path, chosen.vocab_size)


def train(settings: Settings) -> dict[str, Trainer]:
    with tempfile.TemporaryDirectory() as folder:
        tokens = tokens_of_topics(Path(folder))
        trainers = {}
        for backend in BACKENDS:
            torch.manual_seed(settings.seed)
            model = GPT(settings.config(tokenizer.VOCAB_SIZES["bytes"]))
            trainers[backend] = Trainer(model, tokens, dataclasses.replace(settings, backend=backend))
        for step in tqdm(range(settings.steps), unit="step", disable=None):
            for turn in range(len(BACKENDS)):
                trainers[BACKENDS[(step + turn) % len(BACKENDS)]].step()
    return trainers


def summary(trainer: Trainer, reference: Trainer) -> dict[str, Any]:
    history = trainer.history
    p20, *_, p80 = statistics.quantiles(history.seconds[WARM_UP:], n=5, method="inclusive")
    return {
        "loss": history.loss,
        "largest distance": max(
            abs(a - b) for a, b in zip(history.loss, reference.history.loss, strict=True)
        ),
        "step seconds": {"median": statistics.median(history.seconds[WARM_UP:]), "p20": p20, "p80": p80},
    }


def table(results: dict[str, dict[str, Any]]) -> str:
    torch_time = results["torch"]["step seconds"]["median"]
    heads = f"{'last loss':>10} {'from reference':>15} {'step':>10} {'p20–p80':>16} {'against torch':>14}"
    lines = [f"{'':<10} {heads}"]
    for backend, result in results.items():
        time = result["step seconds"]
        spread = f"{time['p20'] * 1e3:.0f}–{time['p80'] * 1e3:.0f} ms"
        lines.append(
            f"{backend:<10} {result['loss'][-1]:>10.4f} {result['largest distance']:>15.1e} "
            f"{time['median'] * 1e3:>7.0f} ms {spread:>16} {torch_time / time['median']:>12.2f} ×"
        )
    return "\n".join(lines)


def plot(results: dict[str, dict[str, Any]], title: str, path: Path) -> None:
    figure = Figure(figsize=(13, 4.2), layout="constrained")
    curves, distances, times = figure.subplots(1, 3, width_ratios=(3, 3, 2))
    for width, (backend, result) in zip((7.0, 3.5, 1.0), results.items(), strict=True):
        steps = range(1, len(result["loss"]) + 1)
        curves.plot(steps, result["loss"], color=COLOURS[backend], linewidth=width, label=backend)
        if backend != "reference":
            pairs = zip(result["loss"], results["reference"]["loss"], strict=True)
            largest = itertools.accumulate((abs(a - b) for a, b in pairs), max)
            distances.plot(steps, list(largest), color=COLOURS[backend], linewidth=1.5, label=backend)
    curves.set_ylabel("loss, nats per byte")
    distances.set_ylabel("largest distance from the reference's loss so far")
    distances.set_yscale("log")
    for axes in (curves, distances):
        axes.set_xlabel("steps")
        axes.legend(frameon=False)
    medians = [result["step seconds"]["median"] * 1e3 for result in results.values()]
    bars = times.bar(list(results), medians, color=[COLOURS[backend] for backend in results], width=0.6)
    times.bar_label(bars, fmt="%.0f")
    times.set_ylabel("step, ms (median)")
    for axes in (curves, distances, times):
        axes.spines[["top", "right"]].set_visible(False)
    figure.suptitle(title, fontsize=10)
    figure.savefig(path, dpi=110)


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    shape = {"layers": 4, "heads": 4, "hidden": 256, "seqlen": 512, "batch_size": 4, "steps": 300, "seed": 0}
    for name, default in shape.items():
        arguments.add_argument(f"--{name.replace('_', '-')}", type=int, default=default, metavar="N")
    arguments.add_argument("--out", type=Path, default=Path("train-pydoc"), metavar="PREFIX")
    args = arguments.parse_args()
    if args.steps < WARM_UP + 2:
        arguments.error(f"--steps: got {args.steps}, expected at least {WARM_UP + 2}")

    settings = Settings(tokenizer="bytes", val_fraction=0.0, **{name: getattr(args, name) for name in shape})
    trainers = train(settings)
    results = {backend: summary(trainer, trainers["reference"]) for backend, trainer in trainers.items()}
    about = machine.describe()
    document = {"machine": about, "settings": dataclasses.asdict(settings), "results": results}
    with replacing(Path(f"{args.out}.json")) as file:
        file.write(json.dumps(document, indent=1, ensure_ascii=False).encode())
    title = (
        f"byte-level GPT, {settings.layers} layers of {settings.hidden}, {settings.batch_size} × "
        f"{settings.seqlen} tokens a step, fp32, on {about['cpu']}, threads: {about['threads']}"
    )
    plot(results, title, Path(f"{args.out}.png"))
    print(table(results))


if __name__ == "__main__":
    main()
