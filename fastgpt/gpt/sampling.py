"""Choosing the next token from its logits."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fastgpt.gpt.config import is_integer


def check(vocab_size: int, temperature: float, top_k: int | None) -> None:
    """A ValueError that names the argument, if they are not those of :func:`sample`."""
    number = isinstance(temperature, (int, float)) and not isinstance(temperature, bool)
    if not number or not 0 <= temperature < math.inf:
        raise ValueError(
            f"temperature: got {temperature!r}, expected a finite number of at least 0, which is greedy"
        )
    if top_k is not None and not (is_integer(top_k) and 1 <= top_k <= vocab_size):
        raise ValueError(
            f"top_k: got {top_k!r}, expected an integer from 1 to vocab_size {vocab_size}, or None"
        )


def sample(
    logits: Tensor, temperature: float, top_k: int | None, generator: torch.Generator | None
) -> Tensor:
    """The next tokens (batch), int64, from logits (batch, vocab_size).

    Args:
        temperature: the logits are divided by it; 0 takes the largest, whatever top_k is.
        top_k: only the k largest logits keep a probability; None keeps all.
        generator: torch's default one if None.
    """
    if temperature == 0:
        return logits.argmax(-1)
    logits = logits.float() / temperature
    if top_k is None:
        return torch.multinomial(logits.softmax(-1), 1, generator=generator)[:, 0]
    largest, tokens = logits.topk(top_k)
    choice = torch.multinomial(largest.softmax(-1), 1, generator=generator)
    return tokens.gather(1, choice)[:, 0]
