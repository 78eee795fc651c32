"""Products of a few rows on the CPU: what is computed, and which are left to torch."""

from __future__ import annotations

import warnings

import pytest
import torch
import torch.nn.functional as F
from backends import DTYPES, assert_parity
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import fastgpt.gpt.model
from fastgpt.ops.few_rows import api
from fastgpt.ops.few_rows.api import LIMITS, linear, served, serves_weight

# (in_features, out_features): whole lines of 64 bytes and blocks of rows or not, one of each, several threads
# and stretches, and, transposed, fewer rows than parts.
SIZES = [(64, 64), (40, 24), (75, 33), (1, 7), (9, 1), (3, 50), (576, 300), (5000, 33), (1100, 2000)]


def operands(rows, in_features, out_features, bias, transposed, dtype):
    """x with rows at a distance, weight, bias or None."""
    x = torch.randn(*rows, in_features + 3)[..., :in_features].to(dtype)
    shape = (in_features, out_features) if transposed else (out_features, in_features)
    return x, torch.randn(shape).to(dtype), torch.randn(out_features).to(dtype) if bias else None


def plain(x, weight, bias, transposed):
    return F.linear(x, weight.t() if transposed else weight, bias)


@torch.no_grad()
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_parity(sizes, transposed, dtype):
    shapes = [(), (1,), (2, 1), (3,), (2, 2), (1, 5), (6,), (7,), (2, 4)]
    for n, rows in enumerate(shapes):
        operand = operands(rows, *sizes, n % 2 == 0, transposed, dtype)
        got = linear(*operand, transposed)
        if torch.Size(rows).numel() > LIMITS[dtype].most_rows:
            assert got is None
            continue
        assert got.dtype == dtype and got.is_contiguous()
        exact = plain(*(None if t is None else t.double() for t in operand), transposed)
        assert_parity(f"out of rows {rows}", got, plain(*operand, transposed), exact)


@torch.no_grad()
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("transposed", [False, True])
def test_the_bits_depend_on_neither_threads_nor_the_other_rows(transposed, dtype):
    x, weight, bias = operands((6,), 1100, 2001, True, transposed, dtype)
    out = linear(x, weight, bias, transposed)
    threads = torch.get_num_threads()
    try:
        for n in (1, 2, 3, 16):
            torch.set_num_threads(n)
            assert torch.equal(linear(x, weight, bias, transposed), out)
    finally:
        torch.set_num_threads(threads)
    for rows in (slice(2, 3), slice(4), slice(1, 6)):
        assert torch.equal(linear(x[rows], weight, bias, transposed), out[rows])


@torch.no_grad()
@pytest.mark.parametrize("transposed", [False, True])
def test_what_is_not_finite_comes_through_and_goes_nowhere_else(transposed):
    x, weight, _ = operands((4,), 75, 33, False, transposed, torch.float32)
    weight[5, 7], x[2, 3] = torch.nan, torch.inf
    got, expected = linear(x, weight, None, transposed), plain(x, weight, None, transposed)
    assert torch.equal(got.isnan(), expected.isnan()) and torch.equal(got.isinf(), expected.isinf())


def taken(x=(1, 16), weight=(8, 16), bias=(8,), dtype=torch.float32, transposed=False):
    x, weight, bias = (torch.randn(shape).to(dtype) for shape in (x, weight, bias))
    return linear(x, weight, bias, transposed) is not None


@torch.no_grad()
def test_which_are_taken():
    assert taken() and taken(dtype=torch.bfloat16) and taken(weight=(16, 8), transposed=True)
    assert not taken(dtype=torch.float64)
    assert not taken(x=(0, 16)) and not taken(weight=(0, 16), bias=(0,))
    assert (
        not taken(x=(1, 15)) and not taken(bias=(7,)) and not taken(bias=(1, 8)) and not taken(weight=(16,))
    )
    for dtype, (most, _) in LIMITS.items():
        assert taken(x=(most, 16), dtype=dtype) and not taken(x=(most + 1, 16), dtype=dtype)


class Subclass(torch.Tensor):
    pass


class Watching(TorchDispatchMode):
    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        return function(*args, **(kwargs or {}))


@torch.no_grad()
def test_what_is_left_to_torch(monkeypatch):
    x, weight, bias = torch.randn(2, 16), torch.randn(8, 16), torch.randn(8)
    assert linear(x, weight, bias) is not None

    def left(x=x, weight=weight, bias=bias):
        return linear(x, weight, bias) is None

    assert left(x=x.bfloat16()) and left(bias=bias.double()) and left(weight=weight.bfloat16())
    assert left(weight=torch.randn(16, 8).t()) and left(bias=torch.randn(8, 2)[:, 0])
    assert (
        left(weight=weight.as_subclass(Subclass)) and left(x=x.to("meta")) and left(weight=weight.to("meta"))
    )
    conjugate = torch.complex(x, x).conj().imag  # negated when read
    assert conjugate.is_neg() and left(x=conjugate)
    with torch.autocast("cpu", torch.bfloat16):
        assert left()
    with Watching():
        assert left()
    with torch.enable_grad():
        assert not left() and left(weight=nn.Parameter(weight))
    with torch.autograd.forward_ad.dual_level():
        assert left()
    sample = torch.vmap(lambda x: x.sum() if left(x=x) else 1 / 0)(x)
    assert torch.equal(sample, x.sum(1))
    monkeypatch.setenv("FASTGPT_BACKEND", "torch")
    assert left() and linear(x, weight, bias, backend="cpu") is not None
    assert not served() and served("cpu") and serves_weight(weight)
    assert not serves_weight(weight.double()) and not serves_weight(weight.to("meta"))


def test_compiled_and_traced_calls_are_torchs():
    layer = nn.Linear(16, 8).requires_grad_(False)

    def call(x):
        out = linear(x, layer.weight, layer.bias)
        return F.linear(x, layer.weight, layer.bias) if out is None else out

    x, other = torch.randn(2, 16), torch.randn(2, 16)
    with warnings.catch_warnings(action="error", category=torch.jit.TracerWarning):
        by_jit = torch.jit.trace(call, x)
    by_fx = torch.fx.symbolic_trace(nn.Sequential(fastgpt.gpt.model.Linear(16, 8)))
    by_fx.load_state_dict(layer.state_dict(prefix="0."))
    for traced in (torch.compile(call, fullgraph=True, backend="eager"), by_jit, by_fx):
        torch.testing.assert_close(traced(other), layer(other))


@torch.no_grad()
def test_small_weights_are_torchs(monkeypatch):
    monkeypatch.undo()
    for dtype, (_, least) in LIMITS.items():
        assert taken((1, 64), (least // 64, 64), (least // 64,), dtype)
        assert not taken((1, 64), (least // 64 - 1, 64), (least // 64 - 1,), dtype)


def test_without_the_kernels_all_is_torchs(monkeypatch):
    monkeypatch.setattr(api.dispatch, "unavailable", lambda backend: "not built")
    assert linear(torch.randn(1, 16), torch.randn(8, 16), None) is None
