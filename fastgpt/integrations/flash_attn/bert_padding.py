"""``flash_attn.bert_padding``: batches with padding to packed sequences, and back."""

from __future__ import annotations

import torch
from torch import Tensor


def index_first_axis(input: Tensor, indices: Tensor) -> Tensor:
    """``input[indices]``: rows of (rows, ...)."""
    return input[indices]


def index_put_first_axis(values: Tensor, indices: Tensor, first_axis_dim: int) -> Tensor:
    """(first_axis_dim, ...), 0 but for the rows at ``indices``, which are ``values``."""
    return values.new_zeros(first_axis_dim, *values.shape[1:]).index_put((indices,), values)


def _packed(hidden_states: Tensor, tokens: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor, Tensor, int]:
    """The rows that are true in ``tokens`` (batch, seqlen), where they are, edges, the longest sequence."""
    indices = tokens.flatten().nonzero().flatten()
    edges = torch.nn.functional.pad(lengths.cumsum(0, dtype=torch.int32), (1, 0))
    longest = int(lengths.max()) if len(lengths) else 0
    return index_first_axis(hidden_states.flatten(0, 1), indices), indices, edges, longest


def unpad_input(
    hidden_states: Tensor, attention_mask: Tensor, unused_mask: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor, int, Tensor]:
    """Packs the tokens that a mask selects.

    Args:
        hidden_states: (batch, seqlen, ...).
        attention_mask: (batch, seqlen), bool or int, 1 = a token.
        unused_mask: the same, 1 = place that is to be kept, too.

    Returns:
        hidden_states (total, ...); indices (total), int64, of their rows in (batch · seqlen, ...); cu_seqlens
        (batch + 1), int32; the longest sequence; how many of each sequence are tokens, (batch), int32.
    """
    kept = attention_mask if unused_mask is None else attention_mask + unused_mask
    lengths = kept.sum(-1, dtype=torch.int32)
    packed = _packed(hidden_states, kept, lengths)
    return *packed, attention_mask.sum(-1, dtype=torch.int32)


def unpad_input_for_concatenated_sequences(
    hidden_states: Tensor, attention_mask_in_length: Tensor
) -> tuple[Tensor, Tensor, Tensor, int]:
    """The same of rows that hold several sequences: ``attention_mask_in_length`` (batch, seqlen), int, begins
    with their lengths, the rest is 0."""
    place = torch.arange(attention_mask_in_length.shape[-1], device=attention_mask_in_length.device)
    tokens = place < attention_mask_in_length.sum(-1, keepdim=True)
    lengths = attention_mask_in_length.flatten()
    return _packed(hidden_states, tokens, lengths[lengths > 0])


def pad_input(hidden_states: Tensor, indices: Tensor, batch: int, seqlen: int) -> Tensor:
    """(batch, seqlen, ...) of the packed (total, ...), 0 where there is no token."""
    return index_put_first_axis(hidden_states, indices, batch * seqlen).unflatten(0, (batch, seqlen))
