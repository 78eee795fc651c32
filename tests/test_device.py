"""fastgpt.ops.device in Triton's interpreter: what parity tests would show as a wrong result somewhere."""

from __future__ import annotations

import os

import pytest
import torch

triton = pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("the kernels here run in Triton's interpreter: TRITON_INTERPRET=1", allow_module_level=True)
tl = pytest.importorskip("triton.language")
device = pytest.importorskip("fastgpt.ops.device")

BITS = tl.constexpr(1 << 16)


@triton.jit
def _product(A, B, Out, N: tl.constexpr):
    i = tl.arange(0, N)
    at = i[:, None] * N + i[None, :]
    tl.store(Out + at, device.dot(tl.load(A + at), tl.load(B + at), None, "ieee"))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_products_in_the_interpreter(dtype):
    """Its own tl.dot multiplies the bit patterns of bf16."""
    a, b = (torch.randn(32, 32).to(dtype) for _ in range(2))
    out = torch.empty(32, 32)
    _product[(1,)](a, b, out, 32)
    torch.testing.assert_close(out.double(), a.double() @ b.double(), rtol=1e-5, atol=1e-5)


@triton.jit
def _rounded(X, Out):
    i = tl.arange(0, BITS)
    tl.store(Out + i, device.cast(tl.load(X + i), Out.dtype.element_ty))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_rounding_in_the_interpreter(dtype):
    """To nearest even, as on a GPU; its own conversion to bf16 truncates."""
    x = torch.randint(-(2**31), 2**31, (BITS.value,)).to(torch.int32)
    x[::2] = x[::2] >> 16 << 16 | 0x8000  # ties
    x = x.view(torch.float32)
    out = torch.empty(BITS.value, dtype=dtype)
    _rounded[(1,)](x, out)
    torch.testing.assert_close(out, x.to(dtype), rtol=0, atol=0, equal_nan=True)


@triton.jit
def _bounds(
    Out, first, last, shift, count, before, after, B: tl.constexpr, A: tl.constexpr, BLOCK: tl.constexpr
):
    begin, full_begin, full_end, end = device.in_sight(first, last, shift, count, before, after, B, A, BLOCK)
    tl.store(Out, begin)
    tl.store(Out + 1, full_begin)
    tl.store(Out + 2, full_end)
    tl.store(Out + 3, end)


def test_blocks_in_sight_are_all_that_is_visible():
    """Of random windows: nothing visible is left out, what needs no mask is visible to all, and no block is
    visited in which nothing can be seen beside those that a row of the block sees."""
    generator = torch.Generator().manual_seed(torch.seed() % 2**32)

    def draw(low, high):
        return int(torch.randint(low, high + 1, (), generator=generator))

    for _ in range(300):
        sq, sk, block = draw(1, 80), draw(0, 120), 16
        before, after = draw(-1, 60), draw(-1, 60)
        first = draw(0, (sq - 1) // block) * block
        last = min(first + block, sq) - 1
        out = torch.empty(4, dtype=torch.int32)
        _bounds[(1,)](out, first, last, sk - sq, sk, before, after, before >= 0, after >= 0, block)
        begin, full_begin, full_end, end = out.tolist()
        i = torch.arange(first, last + 1)[:, None] + sk - sq
        j = torch.arange(sk)[None]
        seen = ((j >= i - before) | (before < 0)) & ((j <= i + after) | (after < 0))
        case = (sq, sk, before, after, first), (begin, full_begin, full_end, end)
        assert not seen[:, :begin].any() and not seen[:, max(end, 0) :].any(), case
        assert seen[:, full_begin:full_end].all(), case
        if seen.any():
            assert begin <= full_begin <= full_end <= max(end, full_end), case
            assert begin % block == 0 and begin > int(seen.any(0).nonzero()[0]) - block, case
            assert end == int(seen.any(0).nonzero()[-1]) + 1, case


@triton.jit
def _tanh(X, Out, N: tl.constexpr):
    i = tl.arange(0, N)
    tl.store(Out + i, device.tanh(tl.load(X + i)))


def test_tanh_is_exact_where_it_is_small_and_where_it_is_one():
    x = torch.cat(
        (torch.randn(1021) * 10.0 ** torch.randint(-30, 3, (1021,)), torch.tensor([0.0, 1e30, -1e30]))
    )
    out = torch.empty(1024)
    _tanh[(1,)](x, out, 1024)
    torch.testing.assert_close(out.double(), x.double().tanh(), rtol=3e-7, atol=0)
