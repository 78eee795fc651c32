"""One small call of every native kernel, for tests/test_reliability.py and the processes that it starts.

Large enough for two threads, and below the 32,768 elements from which torch's own operators use several:
these hang in a forked process.
"""

from __future__ import annotations

import torch
from torch import Tensor

import fastgpt


def draw(seed: int, *shapes: tuple[int, ...]) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)  # torch's own is shared by all threads
    return [torch.randn(shape, generator=generator) for shape in shapes]


def attention(seed: int) -> tuple[Tensor, ...]:
    q, k, v, dout, dlse = draw(
        seed, (2, 90, 4, 32), (2, 120, 2, 32), (2, 120, 2, 40), (2, 90, 4, 40), (2, 4, 90)
    )
    inputs = [t.requires_grad_() for t in (q, k, v)]
    out, lse = fastgpt.attention(*inputs, softcap=5.0, return_lse=True, backend="cpu")
    return out, lse, *torch.autograd.grad((out, lse), inputs, (dout, dlse))


def few_queries(seed: int) -> tuple[Tensor, ...]:
    q, k, v = draw(seed, (2, 1, 8, 32), (2, 200, 2, 32), (2, 200, 2, 32))
    return (fastgpt.attention(q, k, v, backend="cpu"),)


def decode(seed: int, seqlen: int = 1) -> tuple[Tensor, ...]:
    new = (2, seqlen, 2, 32)
    q, k, v, k_cache, v_cache = draw(seed, (2, seqlen, 8, 32), new, new, (2, 200, 2, 32), (2, 200, 2, 32))
    cos, sin = draw(seed, (200, 16), (200, 16))
    with torch.no_grad():
        rotary = {"rotary_cos": cos, "rotary_sin": sin}
        out = fastgpt.attention_with_kvcache(
            q, k_cache, v_cache, k, v, cache_seqlens=150, **rotary, backend="cpu"
        )
    return out, k_cache, v_cache


def prefill(seed: int) -> tuple[Tensor, ...]:
    return decode(seed, seqlen=40)


def norm(seed: int) -> tuple[Tensor, ...]:
    x, residual, weight, dout, dsum = draw(seed, (60, 500), (60, 500), (500,), (60, 500), (60, 500))
    inputs = [t.requires_grad_() for t in (x, weight, residual)]
    options = {"dropout_p": 0.2, "rng_state": torch.tensor([seed, 1]), "prenorm": True, "backend": "cpu"}
    outputs = fastgpt.rms_norm(*inputs[:2], residual=residual, **options)
    return *outputs, *torch.autograd.grad(outputs, inputs, (dout, dsum))


def merge(seed: int) -> tuple[Tensor, ...]:
    shapes = (2, 100, 4, 32), (2, 4, 100)
    *states, dout, dlse = draw(seed, *shapes * 3)
    states = [t.requires_grad_() for t in states]
    outputs = fastgpt.merge_attention_states(*states, backend="cpu")
    return *outputs, *torch.autograd.grad(outputs, states, (dout, dlse))


STEPS = (attention, few_queries, decode, prefill, norm, merge)


def results(seed: int) -> list[Tensor]:
    return [t.detach() for step in STEPS for t in step(seed)]


def equal(a: list[Tensor], b: list[Tensor]) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))
