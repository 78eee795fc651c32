"""What a training run is asked for, and the error that names what cannot be used."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

from fastgpt import dispatch
from fastgpt.gpt.config import GPTConfig, is_integer, is_number

CHOICES = {
    "tokenizer": ("gpt2", "bytes"),
    "family": ("gpt2", "llama"),
    "dtype": ("fp32", "bf16"),
    "device": ("cpu", "cuda"),
    "backend": ("auto", *dispatch.BACKENDS),
}
LEAST = dict.fromkeys(
    ("layers", "heads", "kv_heads", "hidden", "seqlen", "steps", "batch_size", "grad_accum"), 1
) | {"warmup": 0, "eval_every": 1, "save_every": 1, "seed": 0}
OPTIONAL = ("kv_heads", "warmup")
SHAPE = ("family", "layers", "heads", "kv_heads", "hidden")  # what pretrained weights bring themselves


class SettingError(ValueError):
    """A setting cannot be used.

    Attributes:
        name: a field of :class:`Settings`, or ``data``, ``out`` or ``resume``.
        problem: what was given and what is accepted.
    """

    def __init__(self, name: str, problem: str) -> None:
        super().__init__(f"{name}: {problem}")
        self.name, self.problem = name, problem


@dataclasses.dataclass(frozen=True)
class Settings:
    """Everything that, with the text, determines a training run.

    Attributes:
        tokenizer: ``gpt2``: its byte-pair encoding, 50,257 tokens; ``bytes``: 257, for small runs.
        family: ``gpt2`` or ``llama``: the family's norm, MLP and positions.
        layers, heads, hidden: blocks, query heads, width of the residual stream.
        kv_heads: key and value heads; None for as many as heads.
        seqlen: tokens in a training sequence, and the new model's longest.
        dropout: see :class:`fastgpt.GPTConfig`.
        finetune: path of the pretrained weights to start from; None for random ones.
        steps: optimizer steps.
        batch_size: sequences in a forward pass.
        grad_accum: forward passes in a step.
        lr: the largest learning rate, after the warm-up.
        warmup: steps over which the rate rises; None for a twentieth of all.
        weight_decay: AdamW's, of matrices only.
        grad_clip: largest norm of the gradient; 0 for no limit.
        dtype: ``bf16`` computes under autocast; weights and optimizer are fp32 either way.
        val_fraction: of the tokens, the last ones, kept for validation; 0 for none.
        eval_every, save_every: steps between validations and between checkpoints.
        seed: of the weights, the sequences and the dropout.
        device: ``cpu`` or ``cuda``.
        backend: of attention and norms.

    Raises:
        SettingError: a field is not as above.
    """

    tokenizer: str = "gpt2"
    family: str = "gpt2"
    layers: int = 4
    heads: int = 4
    kv_heads: int | None = None
    hidden: int = 256
    seqlen: int = 256
    dropout: float = 0.0
    finetune: str | None = None
    steps: int = 1000
    batch_size: int = 8
    grad_accum: int = 1
    lr: float = 1e-3
    warmup: int | None = None
    weight_decay: float = 0.1
    grad_clip: float = 1.0
    dtype: str = "fp32"
    val_fraction: float = 0.05
    eval_every: int = 100
    save_every: int = 100
    seed: int = 0
    device: str = "cpu"
    backend: str = "auto"

    def __post_init__(self) -> None:
        for name, choices in CHOICES.items():
            if (value := getattr(self, name)) not in choices:
                raise SettingError(name, f"got {value!r}, expected {' or '.join(choices)}")
        for name, least in LEAST.items():
            value = getattr(self, name)
            if value is None and name in OPTIONAL:
                continue
            if not is_integer(value) or not least <= value < 2**63:
                raise SettingError(name, f"got {value!r}, expected a whole number of at least {least}")
        for name in ("lr", "weight_decay", "grad_clip"):
            self._check_number(name, math.inf)
        if self.lr == 0:
            raise SettingError("lr", "got 0, expected a number above 0")
        for name in ("dropout", "val_fraction"):
            self._check_number(name, 1)
        if self.finetune is None:
            self._check_shape()

    def _check_number(self, name: str, above: float) -> None:
        value = getattr(self, name)
        if not is_number(value) or not 0 <= value < above:
            expected = "a finite number of at least 0" if above == math.inf else f"0 or more, below {above}"
            raise SettingError(name, f"got {value!r}, expected {expected}")

    def _check_shape(self) -> None:
        if self.hidden % self.heads:
            raise SettingError("heads", f"got {self.heads}, expected a divisor of hidden {self.hidden}")
        if self.family == "llama" and self.hidden // self.heads % 2:
            raise SettingError(
                "heads",
                f"got {self.heads}, expected a divisor of hidden {self.hidden} that leaves an even head "
                "dimension (family llama rotates pairs)",
            )
        if self.kv_heads is not None and self.heads % self.kv_heads:
            raise SettingError("kv_heads", f"got {self.kv_heads}, expected a divisor of heads {self.heads}")

    def config(self, vocab_size: int) -> GPTConfig:
        """Of the model that starts from random weights."""
        shape: dict[str, Any] = {
            "vocab_size": vocab_size,
            "max_seqlen": self.seqlen,
            "hidden_size": self.hidden,
            "num_layers": self.layers,
            "nheads": self.heads,
            "nheads_k": self.kv_heads or self.heads,
            "dropout": self.dropout,
        }
        if self.family == "gpt2":
            return GPTConfig(**shape)
        # SwiGLU has three matrices where GELU has two: 2/3 of the width keeps the size (arXiv:2002.05202).
        return GPTConfig.llama(**shape, intermediate_size=math.ceil(8 * self.hidden / 3 / 32) * 32)

    def learning_rate(self, step: int) -> float:
        """Of step 0, 1, …: a linear warm-up, then half a cosine to a tenth of ``lr`` in the last step."""
        warmup = self.steps // 20 if self.warmup is None else self.warmup
        if step < warmup:
            return self.lr * (step + 1) / warmup
        progress = (step - warmup) / max(1, self.steps - 1 - warmup)
        return self.lr * (0.1 + 0.9 * (1 + math.cos(math.pi * progress)) / 2)
