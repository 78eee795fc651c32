"""Generation with a KV cache: the prompt in one step, then token by token."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fastgpt.gpt import sampling
from fastgpt.gpt.config import check_size, is_integer

if TYPE_CHECKING:
    from fastgpt.gpt.model import GPT


def stream(
    model: GPT,
    input_ids: Tensor,
    max_new_tokens: int,
    *,
    temperature: float = 0.0,
    top_k: int | None = None,
    eos_token_id: int | Sequence[int] | None = None,
    generator: torch.Generator | None = None,
    backend: str | None = None,
) -> Iterator[Tensor]:
    """The tokens of :meth:`fastgpt.GPT.generate`, (batch) each, as they come."""
    if not isinstance(input_ids, Tensor):
        raise TypeError(
            f"input_ids: got {type(input_ids).__name__}, expected a torch.Tensor (batch, seqlen), int64"
        )
    if input_ids.dtype != torch.int64:
        raise TypeError(f"input_ids: got dtype {input_ids.dtype}, expected torch.int64")
    if input_ids.dim() != 2 or 0 in input_ids.shape:
        raise ValueError(
            f"input_ids: got shape {tuple(input_ids.shape)}, expected (batch, seqlen), not empty"
        )
    check_size("max_new_tokens", max_new_tokens)
    limit = model.config.max_seqlen
    if input_ids.shape[1] + max_new_tokens > limit:
        raise ValueError(
            f"max_new_tokens: got {max_new_tokens} after a prompt of {input_ids.shape[1]} tokens, "
            f"expected at most max_seqlen {limit} together"
        )
    sampling.check(model.config.vocab_size, temperature, top_k)
    ends = _ends(eos_token_id)
    eos = torch.tensor(ends, dtype=torch.int64, device=input_ids.device)
    return _steps(model, input_ids, max_new_tokens, temperature, top_k, eos, generator, backend)


def _ends(eos_token_id: int | Sequence[int] | None) -> list[int]:
    if eos_token_id is None:
        return []
    ends = list(eos_token_id) if isinstance(eos_token_id, Sequence) else [eos_token_id]
    if not all(is_integer(token) for token in ends):
        raise ValueError(
            f"eos_token_id: got {eos_token_id!r}, expected an integer, a sequence of them, or None"
        )
    return ends


@torch.inference_mode()
def _steps(
    model: GPT,
    input_ids: Tensor,
    max_new_tokens: int,
    temperature: float,
    top_k: int | None,
    eos: Tensor,
    generator: torch.Generator | None,
    backend: str | None,
) -> Iterator[Tensor]:
    batch, seqlen = input_ids.shape
    # The last token is never fed back, so it needs no place.
    cache = model.new_cache(batch, seqlen + max_new_tokens - 1)
    finished = torch.zeros(batch, dtype=torch.bool, device=input_ids.device)
    for _ in range(max_new_tokens):
        logits = model(input_ids, cache=cache, last_only=True, backend=backend)
        tokens = sampling.sample(logits[:, 0], temperature, top_k, generator)
        if len(eos):
            tokens = torch.where(finished, eos[0], tokens)
            finished |= torch.isin(tokens, eos)
        yield tokens
        if len(eos) and finished.all():
            return
        input_ids = tokens[:, None]
