"""Choosing the next token from its logits."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def check(vocab_size: int, temperature: float, top_k: int | None) -> None:
    """A ValueError that names the argument, if they are not those of :func:`sample`."""
    if not 0 <= temperature < math.inf:
        raise ValueError(f"temperature: got {temperature}, expected a finite number, 0 for greedy")
    if top_k is not None and not 1 <= top_k <= vocab_size:
        raise ValueError(f"top_k: got {top_k}, expected 1 to vocab_size {vocab_size}, or None")


def sample(
    logits: Tensor, temperature: float, top_k: int | None, generator: torch.Generator | None
) -> Tensor:
    """The next tokens (batch), int64, from logits (batch, vocab_size).

    Args:
        temperature: the logits are divided by it; 0 takes the largest.
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
