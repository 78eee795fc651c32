"""Training a GPT on text: the loop of ``fastgpt train``, in one file.

A run lives in a folder: ``tokens.bin``, the text; ``checkpoint.pt``, all else; ``loss.png``. On the CPU,
with the same number of threads, a run that was stopped and resumed ends in the very bits of one that was not:
which sequences a step takes is a pure function of seed and step, and the generators' states are saved.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import math
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from fastgpt.dispatch import BackendUnsupported
from fastgpt.gpt import checkpoint, data, tokenizer
from fastgpt.gpt.files import replacing
from fastgpt.gpt.model import GPT
from fastgpt.gpt.settings import SHAPE, SettingError, Settings

if TYPE_CHECKING:
    from tqdm import tqdm

TOKENS, CHECKPOINT, CURVE = "tokens.bin", "checkpoint.pt", "loss.png"
BETAS = (0.9, 0.95)  # of AdamW, as for GPT-3 (Brown et al. 2020, arXiv:2005.14165, appendix B)
LOG_EVERY = 10  # steps
VALIDATED = 32  # sequences, at equal distances in the validation text, at most
MATMUL_SIZE = {"cpu": 1024, "cuda": 8192}
MATMUL_ROUNDS = 10

HEADER = "   step |     loss |       lr | grad norm |     tok/s |    MFU"


class Diverged(RuntimeError):
    """The loss or the gradient is no longer finite. The last checkpoint is from before."""


@dataclasses.dataclass
class History:
    """What became of each step: loss, learning rate, gradient norm before clipping, seconds; and validations.

    ``val_steps`` are the numbers of steps done before a validation, ``val_loss`` what it gave.
    """

    loss: list[float] = dataclasses.field(default_factory=list)
    lr: list[float] = dataclasses.field(default_factory=list)
    grad_norm: list[float] = dataclasses.field(default_factory=list)
    seconds: list[float] = dataclasses.field(default_factory=list)
    val_steps: list[float] = dataclasses.field(default_factory=list)
    val_loss: list[float] = dataclasses.field(default_factory=list)

    def tensors(self) -> dict[str, Tensor]:
        """Each list in float64, which takes a checkpoint less room."""
        return {name: torch.tensor(values, dtype=torch.float64) for name, values in vars(self).items()}

    @classmethod
    def of(cls, tensors: dict[str, Tensor]) -> History:
        return cls(**{name: values.tolist() for name, values in tensors.items()})


class Trainer:
    """A model in training.

    Args:
        model: is trained in place, on ``settings.device``.
        tokens: the whole text; its last part is for validation.
        settings: the run's; the shape of the model in it is not looked at.

    Raises:
        SettingError: the text is too short.
    """

    def __init__(self, model: GPT, tokens: data.Tokens, settings: Settings) -> None:
        self.settings = settings
        self.model = model.to(settings.device)
        cut = data.training_tokens(len(tokens), settings)
        self.tokens, self.val_tokens = tokens[:cut], tokens[cut:]
        groups: list[dict[str, Any]] = [
            {"params": [p for p in model.parameters() if p.dim() >= 2]},
            {"params": [p for p in model.parameters() if p.dim() < 2], "weight_decay": 0.0},  # biases, norms
        ]
        self.optimizer = torch.optim.AdamW(
            groups, betas=BETAS, weight_decay=settings.weight_decay, fused=True
        )
        self.history = History()

    @property
    def done(self) -> int:
        return len(self.history.loss)

    def _loss(self, sequences: Tensor) -> Tensor:
        s = self.settings
        sequences = sequences.to(s.device)
        with torch.autocast(s.device, torch.bfloat16, enabled=s.dtype == "bf16"):
            return self.model(sequences[:, :-1], sequences[:, 1:], backend=s.backend)[1]

    def step(self) -> None:
        """One optimizer step, recorded in ``history``.

        Raises:
            Diverged: the gradient is not finite; the weights are as they were.
        """
        s, start = self.settings, time.perf_counter()
        lr = s.learning_rate(self.done)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        sequences = data.sample(self.tokens, s.seqlen, s.batch_size * s.grad_accum, s.seed, self.done)
        self.model.train()
        self.optimizer.zero_grad()
        loss = 0.0
        for part in sequences.split(s.batch_size):
            part_loss = (
                self._loss(part) / s.grad_accum
            )  # parts of one size: the mean of their means is theirs
            part_loss.backward()
            loss += part_loss.item()
        norm = nn.utils.clip_grad_norm_(self.model.parameters(), s.grad_clip or math.inf).item()
        if not math.isfinite(loss + norm):
            raise Diverged(f"step {self.done + 1}: the loss is {loss}, the gradient's norm {norm}")
        self.optimizer.step()
        h = self.history
        for record, value in ((h.loss, loss), (h.lr, lr), (h.grad_norm, norm)):
            record.append(value)
        h.seconds.append(time.perf_counter() - start)

    @torch.no_grad()
    def validate(self) -> None:
        """The mean loss of some sequences of the validation text, always the same; into ``history``."""
        self.model.eval()
        sequences = data.spread(self.val_tokens, self.settings.seqlen, VALIDATED)
        total = sum(self._loss(part).item() * len(part) for part in sequences.split(self.settings.batch_size))
        self.history.val_steps.append(self.done)
        self.history.val_loss.append(total / len(sequences))

    def state(self) -> dict[str, Any]:
        """What, beside the model and its tokens, :meth:`restore` needs, as a checkpoint can hold it."""
        cuda = self.settings.device == "cuda"
        return {
            "settings": dataclasses.asdict(self.settings),
            "optimizer": self.optimizer.state_dict(),
            "history": self.history.tensors(),
            "rng": torch.get_rng_state(),
            "cuda_rng": torch.cuda.get_rng_state() if cuda else None,
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Goes on where :meth:`state` was taken; torch's global generators too."""
        self.optimizer.load_state_dict(state["optimizer"])
        self.history = History.of(state["history"])
        torch.set_rng_state(state["rng"])
        if state["cuda_rng"] is not None:
            torch.cuda.set_rng_state(state["cuda_rng"])


def flops_per_token(model: GPT, seqlen: int) -> int:
    """Floating-point operations of forward and backward: ``6 N + 12 L H Q T``.

    The convention of Chowdhery et al. 2022 (PaLM, arXiv:2204.02311), appendix B: N parameters that are
    multiplied (a table that is only looked up is not), L layers, H heads of dimension Q, T = seqlen, and
    scores that the causal mask hides counted like the others.
    """
    tables = ("token_embedding.weight", "position_embedding.weight")
    parameters = sum(p.numel() for name, p in model.named_parameters() if name not in tables)
    c = model.config
    return 6 * parameters + 12 * c.num_layers * c.nheads * c.headdim * seqlen


def matmul_rate(device: str, dtype: str) -> float:
    """FLOP/s of torch's product of two square matrices, the best of a few: what MFU is a share of."""
    size = MATMUL_SIZE[device]
    kind = torch.bfloat16 if dtype == "bf16" else torch.float32
    a, b = (torch.ones(size, size, dtype=kind, device=device) for _ in range(2))

    def seconds() -> float:
        start = time.perf_counter()
        torch.mm(a, b)
        if device == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - start

    return 2 * size**3 / min(seconds() for _ in range(MATMUL_ROUNDS))


def plot(history: History, path: Path) -> None:
    """The loss curve, as a PNG."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.subplots()
    axes.plot(range(1, len(history.loss) + 1), history.loss, linewidth=0.8, label="training, each step")
    if history.val_loss:
        axes.plot(history.val_steps, history.val_loss, marker="o", markersize=3, label="validation")
    axes.set_xlabel("steps")
    axes.set_ylabel("cross-entropy, nats per token")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    with replacing(path) as file:
        figure.savefig(file, format="png", dpi=150)


def _require_packages() -> None:
    missing = [name for name in ("numpy", "tqdm", "matplotlib") if importlib.util.find_spec(name) is None]
    if missing:
        raise ImportError(f'training needs {", ".join(missing)}: pip install "fastgpt-kernels[train]"')


@contextmanager
def _writing(out: Path) -> Iterator[None]:
    """Turns the system's refusal to write into an error of ``out``."""
    try:
        yield
    except OSError as error:
        raise SettingError("out", f"{error.filename or out} cannot be written: {error.strerror}") from error


def _pretrained(path: Path, name: str | None) -> tuple[GPT, str]:
    """The model to start from and its tokenizer, of which ``name`` was asked for."""
    if path.is_dir() and (path / CHECKPOINT).exists():
        path = path / CHECKPOINT
    if path.is_dir():
        model, own = _from_transformers(path), name or Settings.tokenizer
    else:
        try:
            content = checkpoint.load(path)
        except OSError as error:
            raise SettingError("finetune", f"{path} cannot be read: {error.strerror}") from error
        except ValueError as error:
            raise SettingError("finetune", str(error)) from error
        model, own = checkpoint.model_of(content), content["tokenizer"]
        if name not in (None, own):
            raise SettingError("tokenizer", f"got {name!r}, the model in {path} was trained with {own!r}")
    size = tokenizer.VOCAB_SIZES[own]
    if model.config.vocab_size != size:
        raise SettingError(
            "finetune",
            f"the model in {path} has a vocabulary of {model.config.vocab_size} tokens, "
            f"expected the {size} of tokenizer {own!r}",
        )
    return model, own


def _from_transformers(folder: Path) -> GPT:
    if not (folder / "config.json").exists():
        raise SettingError(
            "finetune", f"{folder} has neither {CHECKPOINT}, of fastgpt, nor config.json, of transformers"
        )
    if importlib.util.find_spec("transformers") is None:
        raise ImportError(
            f'the model in {folder} needs transformers: pip install "fastgpt-kernels[transformers]"'
        )
    import transformers

    try:
        loaded = transformers.AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch.float32, local_files_only=True
        )
        return GPT.from_hf(loaded)
    except (OSError, TypeError, ValueError) as error:
        raise SettingError("finetune", f"{folder}: {error}") from error


def _start(given: dict[str, Any]) -> tuple[Settings, GPT]:
    """Settings and model of a new run; the weights are the seed's, or the pretrained ones."""
    settings = Settings(**given)
    torch.manual_seed(settings.seed)
    if settings.finetune is None:
        return settings, GPT(settings.config(tokenizer.VOCAB_SIZES[settings.tokenizer]))
    if own := [name for name in SHAPE if name in given]:
        raise SettingError(own[0], f"got {given[own[0]]!r} beside finetune, whose weights bring their own")
    pretrained, name = _pretrained(Path(settings.finetune), given.get("tokenizer"))
    c = pretrained.config
    if "seqlen" in given and settings.seqlen > c.max_seqlen:
        raise SettingError(
            "seqlen", f"got {settings.seqlen}, the pretrained model has at most {c.max_seqlen}"
        )
    settings = dataclasses.replace(
        settings,
        tokenizer=name,
        family="llama" if c.norm == "rms_norm" else "gpt2",
        layers=c.num_layers,
        heads=c.nheads,
        kv_heads=c.nheads_k,
        hidden=c.hidden_size,
        seqlen=min(settings.seqlen, c.max_seqlen),
    )
    model = GPT(dataclasses.replace(c, dropout=settings.dropout))
    model.load_state_dict(pretrained.state_dict())
    return settings, model


def _check_runs(model: GPT, settings: Settings) -> None:
    """Whether device and backend can serve the model, before anything is written."""
    if settings.device == "cuda" and not torch.cuda.is_available():
        raise SettingError("device", f"got cuda, but torch {torch.__version__} sees no CUDA device")
    model.to(settings.device).train()
    token = torch.zeros(1, 1, dtype=torch.int64, device=settings.device)
    try:
        with torch.autocast(settings.device, torch.bfloat16, enabled=settings.dtype == "bf16"):
            model(token, backend=settings.backend)
    except BackendUnsupported as error:
        raise SettingError("backend", " ".join(str(error).split())) from error


def _saved(out: Path, given: dict[str, Any]) -> dict[str, Any]:
    """The checkpoint of the run in ``out``, whose settings must be those that are given."""
    try:
        content = checkpoint.load(out / CHECKPOINT)
    except FileNotFoundError as error:
        raise SettingError("resume", f"{out} has no {CHECKPOINT} to go on from") from error
    except (OSError, ValueError) as error:
        raise SettingError("resume", f"{out / CHECKPOINT} cannot be used: {error}") from error
    if "settings" not in content:
        raise SettingError("resume", f"{out / CHECKPOINT} is of a model, not of a run")
    for name, value in given.items():
        old = content["settings"][name]
        if value != old:
            raise SettingError(name, f"got {value!r}, the run in {out} has {old!r}: it goes on as it was")
    return content


def _old_tokens(paths: Sequence[Path], out: Path, digests: dict[str, str]) -> None:
    """Checks that the run in ``out`` goes on with the text that it was started with."""
    data.check_readable(paths)
    if paths and data.digest(paths) != digests["text"]:
        raise SettingError("data", f"got another text than the run in {out} was started with")
    try:
        same = data.digest([out / TOKENS]) == digests["tokens"]
    except OSError as error:
        raise SettingError("resume", f"{out / TOKENS} cannot be read: {error.strerror}") from error
    if not same:
        raise SettingError("resume", f"{out / TOKENS} is not what the run was started with")


def _new_tokens(paths: Sequence[Path], out: Path, settings: Settings) -> dict[str, str]:
    """Writes the tokens into ``out``; returns what :func:`_old_tokens` compares."""
    from tqdm import tqdm

    if not paths:
        raise SettingError("data", "got no file, expected at least one")
    size = data.check_readable(paths)
    chosen = tokenizer.load(settings.tokenizer)
    with _writing(out):
        out.mkdir(parents=True, exist_ok=True)
        with (
            replacing(out / TOKENS) as file,
            tqdm(total=size, desc="tokens", unit="B", unit_scale=True, leave=False, disable=None) as bar,
        ):
            count = data.write(paths, chosen, file, bar.update)
            data.training_tokens(count, settings)
    return {"text": data.digest(paths), "tokens": data.digest([out / TOKENS])}


def train(paths: Sequence[Path], out: Path, *, resume: bool = False, **given: Any) -> Trainer:
    """Trains a GPT and leaves checkpoint and loss curve in a folder; what ``fastgpt train`` does.

    Prints a line every few steps, with a progress bar on a terminal. Seeds torch's global generator.

    Args:
        paths: text files; with ``resume`` none, or those the run was started with.
        out: the run's folder, which must not hold another run.
        resume: go on from the checkpoint in ``out``, exactly as the run would have.
        given: fields of :class:`Settings`; with ``resume`` none, or those the run was started with.

    Returns:
        The trainer, after the last step.

    Raises:
        SettingError: an argument cannot be used; no file has been written then.
        ImportError: a package is missing; the message has the remedy.
        Diverged: the training has failed. The last checkpoint is kept.
    """
    _require_packages()
    if resume:
        content = _saved(out, given)
        settings, model = Settings(**content["settings"]), checkpoint.model_of(content)
        _check_runs(model, settings)
        digests = content["data"]
        _old_tokens(paths, out, digests)
    else:
        content = None
        if (out / CHECKPOINT).exists():
            raise SettingError(
                "out", f"{out} holds a run: resume continues it, a new one needs another folder"
            )
        settings, model = _start(given)
        _check_runs(model, settings)
        digests = _new_tokens(paths, out, settings)
    trainer = Trainer(model, data.load(out / TOKENS, model.config.vocab_size), settings)
    if content is not None:
        trainer.restore(content)

    def save() -> None:
        with _writing(out):
            checkpoint.save(
                out / CHECKPOINT, trainer.model, settings.tokenizer, data=digests, **trainer.state()
            )

    if content is None:
        save()  # from now on a run can be resumed; and a disk that is too small shows at once
    _loop(trainer, out, save)
    return trainer


def _loop(trainer: Trainer, out: Path, save: Callable[[], None]) -> None:
    from tqdm import tqdm

    s, model, history = trainer.settings, trainer.model, trainer.history
    flops = flops_per_token(model, s.seqlen)
    peak = matmul_rate(s.device, s.dtype)
    print(_title(trainer, peak), HEADER, sep="\n", flush=True)
    with tqdm(total=s.steps, initial=trainer.done, unit="step", leave=False, disable=None) as bar:
        logged = trainer.done
        while trainer.done < s.steps:
            trainer.step()
            bar.update()
            done, last = trainer.done, trainer.done == s.steps
            if done % LOG_EVERY == 0 or done == logged + 1 == 1 or last:
                steps, logged = done - logged, done
                rate = steps * s.batch_size * s.grad_accum * s.seqlen / sum(history.seconds[-steps:])
                _say(
                    bar,
                    f"{done:7} | {history.loss[-1]:8.4f} | {history.lr[-1]:8.2e} | "
                    f"{history.grad_norm[-1]:9.3f} | {rate:9,.0f} | {rate * flops / peak:6.1%}",
                )
            if done % s.eval_every == 0 or last:
                if s.val_fraction:
                    trainer.validate()
                    _say(bar, f"{done:7} | {history.val_loss[-1]:8.4f} | validation")
                with _writing(out):
                    plot(history, out / CURVE)
            if done % s.save_every == 0 or last:
                save()
    print(f"{trainer.done} steps done: {out / CHECKPOINT} and {out / CURVE}", flush=True)


def _title(trainer: Trainer, peak: float) -> str:
    s, model = trainer.settings, trainer.model
    parameters = sum(p.numel() for p in model.parameters())
    size = MATMUL_SIZE[s.device]
    return (
        f"{parameters:,} parameters, {len(trainer.tokens):,} tokens to train on, "
        f"{len(trainer.val_tokens):,} to validate\n"
        f"MFU: of this device's {peak / 1e9:,.0f} GFLOP/s in {s.dtype} products of {size}² matrices"
    )


def _say(bar: tqdm[Any], line: str) -> None:
    bar.write(line, file=sys.stdout)
    sys.stdout.flush()
