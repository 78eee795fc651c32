"""The random bits of dropout, of which the specifications are made; ``csrc/include/fastgpt/philox.h``."""

from __future__ import annotations

import torch
from torch import Tensor

LOW = 0xFFFFFFFF


def threshold(dropout_p: float) -> int:
    """Dropout keeps an element iff its random word, 32 bits, is at least this; 0 iff dropout is off."""
    return min(max(round(dropout_p * 2**32), 1), LOW) if dropout_p else 0


def keep(rng_state: Tensor, dropout_p: float, c0: Tensor, c1: Tensor, c2: Tensor) -> Tensor:
    """Philox4x32-10 (Salmon et al. 2011): bool, of the counters' common shape and a last axis of 4.

    The key is the 64 bits of the seed, the counter (c0, c1, c2, offset), each word of it mod 2^32; c0, c1
    and c2 are int64 and broadcast. The four outputs say whether four elements are kept.
    """
    seed, offset = rng_state[0], rng_state[1]
    key = [seed & LOW, (seed >> 32) & LOW]
    counter = list(torch.broadcast_tensors(c0, c1, c2, offset & LOW))
    for _ in range(10):
        # The product wraps in int64; its bits are the unsigned ones, and the mask drops the sign.
        a, b = counter[0] * 0xD2511F53, counter[2] * 0xCD9E8D57
        counter = [
            ((b >> 32) & LOW) ^ counter[1] ^ key[0],
            b & LOW,
            ((a >> 32) & LOW) ^ counter[3] ^ key[1],
            a & LOW,
        ]
        key = [(key[0] + 0x9E3779B9) & LOW, (key[1] + 0xBB67AE85) & LOW]
    return torch.stack(counter, dim=-1) >= threshold(dropout_p)
