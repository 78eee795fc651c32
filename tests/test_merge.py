"""Merging attention states, forward and backward: every backend, one table of cases, one parity rule."""

from __future__ import annotations

import pytest
import torch
from backends import AVAILABLE, DTYPES, assert_parity, factor_of

import fastgpt
from fastgpt import dispatch
from fastgpt.ops.merge.spec import FEATURES, MergeCall
from fastgpt.verify.merge import (
    CASES,
    MergeCase,
    double,
    fused_merge,
    gradients,
    make_inputs,
    plain_merge,
    results,
)

MERGING = [name for name in AVAILABLE if name != "torch"]  # torch ships no such operator


@pytest.mark.parametrize("of", [("out", "lse"), ("out",), ("lse",)], ids=str)
@pytest.mark.parametrize("backend", MERGING)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", [pytest.param(case, id=str(case)) for case in CASES])
def test_parity(case, dtype, backend, of):
    for what, *values in results(case, dtype, backend, of):
        assert_parity(what, *values, factor=factor_of(what))


def test_reference_in_float64():
    case = MergeCase((2, 7, 3, 9), empty=True)
    inputs = double(make_inputs(case, torch.float32))
    for got, exact in zip(fused_merge("reference")(*inputs[:4]), plain_merge(*inputs[:4]), strict=True):
        assert got.dtype == torch.float64
        torch.testing.assert_close(got, exact, rtol=1e-12, atol=1e-12)
    exact = gradients(plain_merge, inputs)
    for name, got in gradients(fused_merge("reference"), inputs).items():
        torch.testing.assert_close(got, exact[name], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("shape", [(2, 3, 2, 5), (4, 2, 5)])
def test_gradcheck(shape):
    leaves = [t.requires_grad_() for t in double(make_inputs(MergeCase(shape), torch.float32)[:4])]
    assert torch.autograd.gradcheck(fused_merge("reference"), leaves)


def split_attention(merge, attend, q, k, v, causal):
    """Attention over the keys before and from the 20th, merged: the first are seen by every query."""
    first = attend(q, k[:, :20], v[:, :20], causal=False)
    return merge(*first, *attend(q, k[:, 20:], v[:, 20:], causal=causal))


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("backend", MERGING)
def test_equals_attention_over_all_keys(backend, dtype, causal):
    """The states are the backend's own; the gradients reach q, k and v through out and lse."""

    def attend(backend):
        return lambda *args, causal: fastgpt.attention(*args, causal=causal, return_lse=True, backend=backend)

    q, k, v = (torch.randn(2, n, h, 40).to(dtype) for n, h in ((45, 4), (70, 2), (70, 2)))
    dout, dlse = torch.randn(2, 45, 4, 40).to(dtype), torch.randn(2, 4, 45)
    results = []
    for tensors, merge, of in (
        ((q, k, v), fused_merge(backend), attend(backend)),
        ((q, k, v), plain_merge, attend("reference")),
        (double((q, k, v)), None, attend("reference")),
    ):
        leaves = [t.detach().requires_grad_() for t in tensors]
        whole = merge is None
        out, lse = of(*leaves, causal=causal) if whole else split_attention(merge, of, *leaves, causal)
        grads = torch.autograd.grad((out, lse), leaves, (dout.to(out.dtype), dlse.to(lse.dtype)))
        results.append((out, lse, *grads))
    for name, *values in zip(("out", "lse", "dq", "dk", "dv"), *results, strict=True):
        assert_parity(name, *(t.detach() for t in values), factor=3 if name[0] == "d" else 2)


@pytest.mark.parametrize("backend", MERGING)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_an_empty_state_changes_nothing(dtype, backend):
    """Not a bit, in either place, whatever its out holds; two of them give 0, −inf and gradients 0."""
    out, lse = torch.randn(2, 9, 3, 40).to(dtype), 100 * torch.randn(2, 3, 9)
    nothing, never = torch.full_like(out, torch.nan), torch.full_like(lse, -torch.inf)
    for states in ((out, lse, nothing, never), (nothing, never, out, lse)):
        merged, merged_lse = fused_merge(backend)(*states)
        assert torch.equal(merged, out) and torch.equal(merged_lse, lse)
    inputs = (
        nothing,
        never,
        nothing,
        never,
        torch.full_like(out, torch.inf),
        torch.full_like(lse, torch.nan),
    )
    merged, merged_lse = fused_merge(backend)(*inputs[:4])
    assert torch.equal(merged, torch.zeros_like(out)) and torch.equal(merged_lse, never)
    for grad in gradients(fused_merge(backend), inputs).values():
        assert torch.equal(grad, torch.zeros_like(grad))


@pytest.mark.parametrize("backend", MERGING)
def test_nonfinite_values_stay_in_their_row(backend):
    out_a, lse_a, out_b, lse_b = make_inputs(MergeCase((1, 6, 2, 20)), torch.float32)[:4]
    out_a[0, 1, 0, 7], lse_a[0, 1, 2], lse_b[0, 0, 3] = torch.nan, torch.nan, torch.nan
    bad, bad_lse = (t.isnan() for t in fused_merge(backend)(out_a, lse_a, out_b, lse_b))
    assert bad.sum() == 1 + 20 + 20 and bad[0, 1, 0, 7] and bad[0, 2, 1].all() and bad[0, 3, 0].all()
    assert bad_lse.sum() == 2 and bad_lse[0, 1, 2] and bad_lse[0, 0, 3]


@pytest.mark.parametrize("backend", MERGING)
def test_digits_of_a_large_lse(backend):
    """The weights are those of the difference: 1e4 has no more than three digits behind the point."""
    inputs = make_inputs(MergeCase((2, 50, 3, 64), spread=0.01, offset=1e4), torch.float32)
    exact = plain_merge(*double(inputs[:4]))[0]
    assert_parity("out", fused_merge(backend)(*inputs[:4])[0], exact, exact)
    exact = gradients(plain_merge, double(inputs))
    for name, got in gradients(fused_merge(backend), inputs).items():
        assert_parity(f"d{name}", got, exact[name], exact[name])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_same_bits_at_any_thread_count_and_in_any_batch(dtype):
    inputs = make_inputs(MergeCase((3, 200, 5, 64), empty=True), dtype)
    threads, results = torch.get_num_threads(), []
    try:
        for count in (1, 2, 3, 2):
            torch.set_num_threads(count)
            results.append([*fused_merge(None)(*inputs[:4]), *gradients(fused_merge(None), inputs).values()])
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        for a, b in zip(results[0], other, strict=True):
            assert torch.equal(a, b)
    alone = fused_merge(None)(*(t[1:2] for t in inputs[:4]))
    for a, b in zip(results[0], alone, strict=False):
        assert torch.equal(a[1:2], b)


def test_what_each_backend_supports():
    def refused(backend, *call):
        return dispatch.implementation("merge", backend).unsupported(MergeCall(*call))

    for dtype in DTYPES:
        for backend in ("reference", "cpu"):
            assert not refused(backend, "cpu", dtype, FEATURES)
        assert refused("torch", "cpu", dtype, ()) == ["torch has no operator that merges attention states"]
    assert not refused("reference", "cpu", torch.float64, FEATURES)
    assert len(refused("cpu", "cuda", torch.float64, ("backward", "something new"))) == 3
    double = [torch.zeros(1, 2, 3, 4).double(), torch.zeros(1, 3, 2).double()] * 2
    with pytest.raises(fastgpt.BackendUnsupported, match=r"'cpu' cannot serve merge\(float64 on cpu\)"):
        fastgpt.merge_attention_states(*double, backend="cpu")
    fastgpt.merge_attention_states(*double)


OUT, LSE = torch.zeros(2, 5, 3, 8), torch.zeros(2, 3, 5)
BAD = {
    "out_a: got list, expected a torch.Tensor (batch, seqlen, nheads, headdim_v)": {"out_a": [1.0]},
    "out_a: got shape (5, 3), expected (batch, seqlen, nheads, headdim_v) or (total, nheads, headdim_v)": {
        "out_a": torch.zeros(5, 3)
    },
    "out_a: got dtype torch.int64, expected one of float32": {"out_a": OUT.long()},
    "out_a: got strides (120, 24, 1, 3), expected the last one to be 1": {
        "out_a": torch.zeros(2, 5, 8, 3).transpose(2, 3)
    },
    "lse_a: got NoneType, expected a torch.Tensor (batch, nheads, seqlen)": {"lse_a": None},
    "lse_a: got shape (2, 5, 3), expected (2, 3, 5), (batch, nheads, seqlen) of out_a": {
        "lse_a": torch.zeros(2, 5, 3)
    },
    "lse_a: got shape (2, 3, 5), expected (3, 5), (nheads, total) of out_a": {"out_a": OUT[0]},
    "lse_a: got dtype torch.bfloat16, expected torch.float32 with out_a in torch.float32": {
        "lse_a": LSE.bfloat16()
    },
    "lse_a: got dtype torch.float32, expected torch.float64 with out_a in torch.float64": {
        "out_a": OUT.double()
    },
    "lse_a: got device meta, expected cpu like out_a": {"lse_a": LSE.to("meta")},
    "out_b: got int, expected a torch.Tensor": {"out_b": 0},
    "out_b: got shape (2, 5, 3, 9), expected (2, 5, 3, 8) like out_a": {"out_b": torch.zeros(2, 5, 3, 9)},
    "out_b: got dtype torch.float16, expected torch.float32 like out_a": {"out_b": OUT.half()},
    "out_b: got device meta, expected cpu like out_a": {"out_b": OUT.to("meta")},
    "lse_b: got shape (2, 3, 4), expected (2, 3, 5)": {"lse_b": torch.zeros(2, 3, 4)},
    "backend: got 'gpu', expected one of auto": {"backend": "gpu"},
}


@pytest.mark.parametrize("message", BAD)
def test_errors_name_the_argument(message):
    arguments = {"out_a": OUT, "lse_a": LSE, "out_b": OUT, "lse_b": LSE, **BAD[message]}
    with pytest.raises((TypeError, ValueError)) as error:
        fastgpt.merge_attention_states(**arguments)
    assert message in str(error.value)


@pytest.mark.parametrize("shape", [(2, 5, 3, 8), (5, 3, 8)])
@pytest.mark.parametrize("backend", MERGING)
def test_opcheck(backend, shape):
    *tensors, dout, dlse = make_inputs(MergeCase(shape), torch.float32)
    forward, backward = torch.ops.fastgpt.merge_fwd.default, torch.ops.fastgpt.merge_bwd.default
    torch.library.opcheck(forward, (*tensors, backend))
    torch.library.opcheck(forward, (*(t.clone().requires_grad_() for t in tensors), backend))
    for gradient in (dlse, None):
        torch.library.opcheck(backward, (dout, gradient, *tensors, backend))


@pytest.mark.parametrize("dynamic", [True, False])
@pytest.mark.parametrize("backend", MERGING)
def test_compile_fullgraph(backend, dynamic):
    def f(out_a, lse_a, out_b, lse_b):
        out, lse = fastgpt.merge_attention_states(out_a.sin(), lse_a, out_b, lse_b, backend=backend)
        return out.exp().sum(-1) + lse.cos().transpose(1, 2)

    torch._dynamo.reset()
    compiled = torch.compile(f, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for tokens in (4, 7):
        inputs = make_inputs(MergeCase((2, tokens, 3, 8)), torch.float32)[:4]
        inputs = [t.requires_grad_() for t in inputs]
        with torch.no_grad():
            torch.testing.assert_close(compiled(*inputs), f(*inputs))
        out, expected = compiled(*inputs), f(*inputs)
        torch.testing.assert_close(out, expected)
        dout = torch.randn_like(out)
        for a, b in zip(
            torch.autograd.grad(out, inputs, dout), torch.autograd.grad(expected, inputs, dout), strict=True
        ):
            torch.testing.assert_close(a, b)


@pytest.mark.parametrize("backend", MERGING)
def test_gradients_of_some_inputs_only(backend):
    *tensors, dout, _ = make_inputs(MergeCase((2, 5, 3, 8)), torch.float32)
    all_of_them = gradients(fused_merge(backend), (*tensors, dout, torch.zeros(2, 3, 5)), ("out",))
    tensors[1].requires_grad_()
    out, _ = fused_merge(backend)(*tensors)
    out.backward(dout)
    assert torch.equal(tensors[1].grad, all_of_them["lse_a"])
    assert all(t.grad is None for t in tensors if t is not tensors[1])


def test_second_derivatives_are_refused():
    tensors = [t.requires_grad_() for t in make_inputs(MergeCase((2, 5, 3, 8)), torch.float32)[:4]]
    out, _ = fused_merge("reference")(*tensors)
    (grad,) = torch.autograd.grad(out.square().sum(), tensors[0], create_graph=True)
    with pytest.raises(RuntimeError, match="no second derivative"):
        grad.sum().backward()
