"""Attention forward and backward: every backend, the common cases, one parity rule."""

from __future__ import annotations

import functools
import math
import threading

import pytest
import torch
from backends import AVAILABLE, DTYPES, assert_parity, factor_of, judge
from cases import ATTENTION, VARIANTS, AttentionCase

import fastgpt
from fastgpt import dispatch
from fastgpt.ops.attention import library, reference
from fastgpt.ops.attention.spec import AttentionCall, AttentionSpec, AttentionTensors
from fastgpt.verify.attention import plain_attention, run, variant_results


def supports(backend, case, dtype, lse, backward):
    features = tuple(
        name
        for name, used in (("window", max(case.window) >= 0), ("lse", lse), ("backward", backward))
        if used
    )
    call = AttentionCall("cpu", dtype, case.headdim, case.headdim_v, features)
    return not dispatch.implementation("attention", backend).unsupported(call)


CASES = [pytest.param(case, id=str(case)) for case in ATTENTION]
# torch returns no lse, see test_torch_backend; cuda has some of the cases, see test_attention_cuda.py.
KERNELS = [name for name in AVAILABLE if name not in ("torch", "cuda")]


def forward_results(case: AttentionCase, backend, dtype):
    inputs = case.inputs(dtype)
    options = {"causal": case.causal, "window_size": case.window}

    def kernel(q, k, v):
        return fastgpt.attention(q, k, v, return_lse=True, backend=backend, **options)

    out, lse = run(kernel, inputs, dtype)
    assert out.dtype == dtype and lse.dtype == torch.float32
    plain = run(lambda *t: plain_attention(*t, case.causal, case.window), inputs, dtype)
    exact = run(lambda *t: plain_attention(*t, case.causal, case.window), inputs, torch.float64)
    return list(zip(("out", "lse"), (out, lse), plain, exact, strict=True))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("backend", KERNELS)
@pytest.mark.parametrize("case", CASES)
def test_forward_parity(case: AttentionCase, backend, dtype):
    judge(lambda: forward_results(case, backend, dtype), least=1)


def backward_results(case: AttentionCase, backend, dtype):
    inputs = case.inputs(dtype)
    dout = torch.randn(case.batch, case.sq, case.nheads, case.headdim_v).to(dtype)
    grads = dout, torch.randn(case.batch, case.nheads, case.sq)
    options = {"causal": case.causal, "window_size": case.window, "return_lse": True}
    got = run(lambda *t: fastgpt.attention(*t, backend=backend, **options), inputs, dtype, grads)
    exact = run(
        lambda *t: fastgpt.attention(*t, backend="reference", **options), inputs, torch.float64, grads
    )
    plain = run(lambda *t: plain_attention(*t, case.causal, case.window), inputs, dtype, grads)
    return list(zip(("out", "lse", "dq", "dk", "dv"), got, plain, exact, strict=True))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("backend", KERNELS)
@pytest.mark.parametrize("case", CASES)
def test_backward_parity(case: AttentionCase, backend, dtype):
    judge(lambda: backward_results(case, backend, dtype), least=1)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("backend", KERNELS)
@pytest.mark.parametrize("name", VARIANTS)
def test_variant_parity(name, backend, dtype):
    judge(lambda: variant_results(VARIANTS[name], backend, dtype), least=1)


OPTIONS = {
    "scale": {"scale": 0.37},
    "softcap": {"softcap": 1.5},
    "alibi": {"slopes": (4,)},
    "alibi per batch": {"slopes": (2, 4)},
    "bias": {"bias": (2, 4, 9, 14)},
    "bias of a head": {"bias": (1, 4, 1, 14)},
    "mask": {"bias": (2, 1, 9, 14), "mask": True},
    "sink": {"sink": (4,)},
    "dropout": {"dropout_p": 0.4},
    "all": {
        "scale": 0.2,
        "softcap": 3.0,
        "slopes": (2, 4),
        "bias": (2, 4, 9, 14),
        "sink": (4,),
        "dropout_p": 0.3,
    },
}


@pytest.mark.parametrize("window", [(-1, -1), (5, -1), (6, 2)], ids=str)
@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("backend", ["reference", "torch"])
def test_options_mean_what_the_design_says(backend, name, window):
    q, k, v = (torch.randn(2, n, heads, 8, dtype=torch.float64) for n, heads in ((9, 4), (14, 2), (14, 2)))
    chosen = dict(OPTIONS[name])
    mask = chosen.pop("mask", False)
    for key in ("slopes", "bias", "sink"):
        if key in chosen:
            chosen[key] = torch.rand(chosen[key], dtype=torch.float64)
    if mask:
        chosen["bias"] = chosen["bias"] < 0.6
    state = torch.tensor([12345678901, 42])
    keep = reference.philox_keep(state, chosen.get("dropout_p", 0.0), (2, 4, 9, 14))
    causal = window != (6, 2)
    expected = plain_attention(q, k, v, causal, window, keep=keep, **chosen)
    arguments = {
        "softmax_scale": chosen.get("scale"),
        "softcap": chosen.get("softcap", 0.0),
        "alibi_slopes": chosen.get("slopes"),
        "attn_bias": chosen.get("bias"),
        "sink": chosen.get("sink"),
        "dropout_p": chosen.get("dropout_p", 0.0),
        "rng_state": state if "dropout_p" in chosen else None,
        "causal": causal,
        "window_size": window,
    }
    if backend == "torch" and name not in ("scale", "bias", "bias of a head", "mask"):
        with pytest.raises(fastgpt.BackendUnsupported):
            fastgpt.attention(q, k, v, backend="torch", **arguments)
        return
    if backend == "torch":
        torch.testing.assert_close(fastgpt.attention(q, k, v, backend="torch", **arguments), expected[0])
        return
    out, lse = fastgpt.attention(q, k, v, return_lse=True, backend=backend, **arguments)
    torch.testing.assert_close(out, expected[0])
    torch.testing.assert_close(lse, expected[1])


@pytest.mark.parametrize("backend", KERNELS)
def test_softmax_scale_reaches_the_kernels(backend):
    q, k, v = (torch.randn(1, 40, 2, 16) for _ in range(3))
    out = fastgpt.attention(q, k, v, softmax_scale=0.7, backend=backend)
    torch.testing.assert_close(out, plain_attention(q, k, v, True, (-1, -1), scale=0.7)[0])


@pytest.mark.parametrize("scale", [-0.2, 0.0])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("backend", KERNELS)
def test_a_softmax_scale_that_is_not_positive(backend, dtype, scale):
    inputs = [torch.randn(1, n, 2, 40).to(dtype) for n in (70, 90, 90)]
    grads = torch.randn(1, 70, 2, 40).to(dtype), torch.randn(1, 2, 70)

    def plain(q, k, v):
        return plain_attention(q, k, v, True, (-1, -1), scale=scale)

    got = run(
        lambda *t: fastgpt.attention(*t, softmax_scale=scale, return_lse=True, backend=backend),
        inputs,
        dtype,
        grads,
    )
    rough, exact = (run(plain, inputs, precision, grads) for precision in (dtype, torch.float64))
    for name, *tensors in zip(("out", "lse", "dq", "dk", "dv"), got, rough, exact, strict=True):
        assert_parity(name, *tensors, factor=factor_of(name))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)  # fp16's least is not as little
@pytest.mark.parametrize("backend", KERNELS)
def test_a_row_hidden_by_finite_numbers_sees_all_keys_alike(backend, dtype):
    """As in PyTorch. transformers' masks have the least finite number where others have -inf."""
    q, k, v = (torch.randn(1, 20, 2, 16).to(dtype) for _ in range(3))
    bias = torch.zeros(1, 1, 20, 20, dtype=dtype)
    bias[..., 3:7, :] = torch.finfo(dtype).min
    out, lse = fastgpt.attention(q, k, v, causal=False, attn_bias=bias, return_lse=True, backend=backend)
    mean = v.double().mean(1, keepdim=True).expand(1, 4, 2, 16)
    bound = 1e-6 if dtype == torch.float32 else 1e-2
    torch.testing.assert_close(out[:, 3:7].double(), mean, atol=bound, rtol=0)
    assert lse.isfinite().all()


def test_torch_backend_keeps_an_fp32_bias_for_16_bit_tensors():
    q, k, v = (torch.randn(1, 16, 2, 8).bfloat16() for _ in range(3))
    bias = 300 + 5 * torch.randn(1, 1, 16, 16)  # bf16 would round it by up to 1
    out = fastgpt.attention(q, k, v, attn_bias=bias, backend="torch")
    exact = plain_attention(q.double(), k.double(), v.double(), True, (-1, -1), bias=bias)[0]
    assert (out.double() - exact).abs().max() < 0.05


def test_reference_gradient_is_the_derivative():
    q = torch.randn(2, 5, 4, 8, dtype=torch.float64, requires_grad=True)
    k = torch.randn(2, 7, 2, 8, dtype=torch.float64, requires_grad=True)
    v = torch.randn(2, 7, 2, 3, dtype=torch.float64, requires_grad=True)
    sink = torch.randn(4, dtype=torch.float64, requires_grad=True)
    bias = torch.randn(2, 1, 5, 7, dtype=torch.float64, requires_grad=True)
    slopes, state = torch.rand(2, 4), torch.tensor([5, 9])

    def f(q, k, v, sink, bias):
        return fastgpt.attention(
            q,
            k,
            v,
            sink=sink,
            attn_bias=bias,
            softcap=2.0,
            window_size=(4, 0),
            alibi_slopes=slopes,
            dropout_p=0.3,
            rng_state=state,
            return_lse=True,
            backend="reference",
        )

    assert torch.autograd.gradcheck(f, (q, k, v, sink, bias))


def test_reference_gradient_with_rows_that_see_no_key():
    q = torch.randn(1, 5, 2, 4, dtype=torch.float64, requires_grad=True)
    k, v = (torch.randn(1, 3, 1, 4, dtype=torch.float64, requires_grad=True) for _ in range(2))
    assert torch.autograd.gradcheck(lambda *t: fastgpt.attention(*t, backend="reference"), (q, k, v))


@pytest.mark.parametrize("case", CASES)
def test_torch_backend(case: AttentionCase):
    inputs = case.inputs(torch.float64)
    options = {"causal": case.causal, "window_size": case.window}
    got = fastgpt.attention(*inputs, backend="torch", **options)
    torch.testing.assert_close(got, plain_attention(*inputs, case.causal, case.window)[0])


@pytest.mark.parametrize("backend", KERNELS)
def test_varlen_equals_each_sequence_alone(backend):
    lengths_q, lengths_k = [3, 0, 17, 1], [5, 4, 17, 0]
    q = torch.randn(sum(lengths_q), 4, 16, requires_grad=True)
    k = torch.randn(sum(lengths_k), 2, 16, requires_grad=True)
    v = torch.randn(sum(lengths_k), 2, 8, requires_grad=True)
    edges = [torch.tensor([0, *torch.tensor(x).cumsum(0)], dtype=torch.int32) for x in (lengths_q, lengths_k)]
    sink, dout, slopes = torch.randn(4), torch.randn(sum(lengths_q), 4, 8), torch.rand(4, 4)
    options = {"sink": sink, "window_size": (9, 0), "backend": backend, "return_lse": True}
    out, lse = fastgpt.attention_varlen(
        q, k, v, cu_seqlens_q=edges[0], cu_seqlens_k=edges[1], alibi_slopes=slopes, **options
    )
    grads = torch.autograd.grad(out, (q, k, v), dout)
    pieces = zip(
        q.split(lengths_q), k.split(lengths_k), v.split(lengths_k), dout.split(lengths_q), strict=True
    )
    outs, lses, piece_grads = [], [], []
    for b, (qb, kb, vb, doutb) in enumerate(pieces):
        o, s = fastgpt.attention(qb[None], kb[None], vb[None], alibi_slopes=slopes[b], **options)
        outs.append(o[0])
        lses.append(s[0])
        piece_grads.append(torch.autograd.grad(o, (qb, kb, vb), doutb[None]))
    torch.testing.assert_close(out, torch.cat(outs))
    torch.testing.assert_close(lse, torch.cat(lses, dim=1))
    for whole, parts in zip(grads, zip(*piece_grads, strict=True), strict=True):
        torch.testing.assert_close(whole, torch.cat(parts))


def test_varlen_dropout_counts_the_sequence_as_the_batch():
    q, state = torch.randn(3 * 8, 2, 16), torch.tensor([7, 1])
    edges = torch.tensor([0, 8, 16, 24], dtype=torch.int32)
    options = {"dropout_p": 0.5, "rng_state": state, "backend": "reference"}
    packed = fastgpt.attention_varlen(q, q, q, cu_seqlens_q=edges, cu_seqlens_k=edges, **options)
    dense = q.view(3, 8, 2, 16)
    torch.testing.assert_close(packed.view(3, 8, 2, 16), fastgpt.attention(dense, dense, dense, **options))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("backend", KERNELS)
def test_torchs_default_dtype_does_not_matter(backend, dtype):
    """The buffers that a kernel writes have its dtype, not torch's default."""
    q, k, v = (torch.randn(2, 64, 4, 16) for _ in range(3))
    sink, bias = torch.randn(4, requires_grad=True), torch.randn(1, 4, 1, 64, requires_grad=True)

    def gradients():
        out = fastgpt.attention(q, k, v, sink=sink, attn_bias=bias, backend=backend)
        return torch.autograd.grad(out.square().sum(), (sink, bias))

    expected = gradients()
    torch.set_default_dtype(dtype)
    try:
        got = gradients()
    finally:
        torch.set_default_dtype(torch.float32)
    for a, b in zip(got, expected, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("backend", KERNELS)
def test_what_a_dispatcher_would_do_is_done(backend):
    """Eager calls go past torch's dispatcher, but not where it has something to do."""
    q, k, v = (torch.randn(1, 20, 2, 16) for _ in range(3))
    expected = fastgpt.attention(-q, k, v, backend=backend)
    assert torch.equal(fastgpt.attention(torch._neg_view(q), k, v, backend=backend), expected)

    from torch.utils._python_dispatch import TorchDispatchMode

    seen = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            seen.append(str(function))
            return function(*args, **(kwargs or {}))

    with Watch():
        fastgpt.attention(q, k, v, backend=backend)
    assert "fastgpt.attention_fwd.default" in seen
    with torch.profiler.profile() as profile:
        fastgpt.attention(q, k, v, backend=backend)
    assert any(event.key == "fastgpt::attention_fwd" for event in profile.key_averages())
    traced = torch.fx.experimental.proxy_tensor.make_fx(lambda *t: fastgpt.attention(*t, backend=backend))(
        q, k, v
    )
    assert "fastgpt.attention_fwd" in traced.code


def test_gradient_of_a_sink_of_minus_infinity_where_no_key_is_seen():
    sink = torch.full((2,), -torch.inf, requires_grad=True)
    q, k = torch.randn(1, 6, 2, 8), torch.randn(1, 3, 2, 8)
    for backend in KERNELS:
        out = fastgpt.attention(q, k, k, sink=sink, backend=backend)
        assert not torch.autograd.grad(out.sum(), sink)[0].any()


def test_philox_matches_the_published_vectors():
    """Random123's known-answer test of philox4x32-10, through the counters of an attention call."""
    # kat_vectors: counter (0, 0, 0, 0), key (0, 0) -> 6627e8d5 e169c58d bc57ac4c 9b00dbd8.
    expected = [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]
    for j, value in enumerate(expected):
        for p, kept in ((value / 2**32, True), ((value + 1) / 2**32, False)):
            keep = reference.philox_keep(torch.tensor([0, 0]), p, (1, 1, 1, 4))
            assert keep[0, 0, 0, j].item() is kept
    # counter and key of all ones: 408f276d 41c83b0e a20bc7c6 6d5451fd needs i = head = 2^32 − 1, which no
    # tensor has; the offset and the key's halves are exercised instead by their effect.
    state = torch.tensor([2**40 + 3, 7])
    base = reference.philox_keep(state, 0.5, (2, 3, 16, 64))
    for other in ([3, 7], [2**40 + 4, 7], [2**40 + 3, 8]):
        changed = (reference.philox_keep(torch.tensor(other), 0.5, (2, 3, 16, 64)) != base).float().mean()
        assert 0.4 < changed < 0.6
    assert torch.equal(base[1:], reference.philox_keep(state, 0.5, (1, 3, 16, 64), first_batch=1))
    assert torch.equal(base[:, :, :5, :9], reference.philox_keep(state, 0.5, (2, 3, 5, 9)))
    rate = reference.philox_keep(state, 0.25, (4, 4, 64, 64)).float().mean().item()
    assert abs(rate - 0.75) < 6 * math.sqrt(0.25 * 0.75 / 4**2 / 64**2)


def test_dropout_draws_from_torchs_generator():
    q = torch.randn(1, 64, 2, 16)
    torch.manual_seed(3)
    first = fastgpt.attention(q, q, q, dropout_p=0.5)
    assert not torch.equal(first, fastgpt.attention(q, q, q, dropout_p=0.5))
    torch.manual_seed(3)
    assert torch.equal(first, fastgpt.attention(q, q, q, dropout_p=0.5))


KERNELS_CPU = [b for b in ("cpu",) if b in AVAILABLE]


@pytest.mark.parametrize("backend", KERNELS_CPU)
def test_same_bits_at_any_thread_count_and_in_any_batch(backend):
    inputs = [torch.randn(3, 333, heads, 48) for heads in (6, 2, 2)]
    grads = torch.randn(3, 333, 6, 48), torch.randn(3, 6, 333)

    def f(*t):
        return fastgpt.attention(*t, return_lse=True, backend=backend)

    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one = run(f, inputs, torch.float32, grads)
        torch.set_num_threads(2)
        two = run(f, inputs, torch.float32, grads)
        torch.set_num_threads(5)
        five = run(f, inputs, torch.float32, grads)
    finally:
        torch.set_num_threads(before)
    alone = run(f, [t[1:2] for t in inputs], torch.float32, [g[1:2] for g in grads])
    for a, b, c, d in zip(one, two, five, alone, strict=True):
        assert torch.equal(a, b) and torch.equal(a, c) and torch.equal(a[1:2], d)


@pytest.mark.parametrize("backend", KERNELS_CPU)
def test_several_python_threads_at_once(backend):
    inputs = [[torch.randn(1, 100 + 30 * n, 4, 32) for _ in range(3)] for n in range(4)]
    expected = [fastgpt.attention(*t, backend=backend) for t in inputs]
    wrong = []

    def work(n):
        for _ in range(10):
            if not torch.equal(fastgpt.attention(*inputs[n], backend=backend), expected[n]):
                wrong.append(n)

    threads = [threading.Thread(target=work, args=(n,)) for n in range(4)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert not wrong


@pytest.mark.parametrize("backend", KERNELS)
def test_large_scores_in_bf16_give_an_average_of_values(backend):
    """Of 1e10, whose rounding is hundreds. One key has them all, or two that are alike share them."""
    q, k = (3e4 * torch.randn(1, 70, 2, 64).bfloat16() for _ in range(2))
    v = torch.randn(1, 70, 2, 64).bfloat16()
    out, lse = fastgpt.attention(q, k, v, return_lse=True, backend=backend)
    scores = torch.einsum("bihd,bjhd->bhij", q.double(), k.double()).masked_fill(
        torch.ones(70, 70).triu(1).bool(), -torch.inf
    )
    best = scores.argmax(-1)  # (1, nheads, 70)
    expected = torch.stack([v[0, best[0, h], h] for h in range(2)], 1)[None]
    assert torch.equal(out, expected) and lse.isfinite().all()
    out, lse = fastgpt.attention(q, k[:, :1].expand(1, 70, 2, 64), v, return_lse=True, backend=backend)
    mean = v.double().cumsum(1) / torch.arange(1, 71)[:, None, None]
    torch.testing.assert_close(out.double(), mean, atol=2e-2, rtol=0)


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("backend", KERNELS)
def test_a_hidden_key_reaches_no_gradient(backend, dtype, value):
    q, k, v = (torch.randn(1, 40, 2, 16).to(dtype) for _ in range(3))
    k[:, 5] = value
    mask = torch.ones(1, 1, 40, 40, dtype=torch.bool)
    mask[..., 5] = False
    leaves = [t.requires_grad_() for t in (q, k, v)]
    out = fastgpt.attention(*leaves, causal=False, attn_bias=mask, backend=backend)
    _, dk, dv = torch.autograd.grad(out.float().sum(), leaves)
    assert out.isfinite().all() and (dk[:, 5] == 0).all() and (dv[:, 5] == 0).all()
    assert dv.isfinite().all()


@pytest.mark.parametrize("backend", KERNELS)
def test_large_scores_do_not_overflow(backend):
    # Scores of hundreds, where exp(88) is infinite; many rows, for the largest error to be typical.
    q, k = 12 * torch.randn(2, 300, 4, 32), 12 * torch.randn(2, 300, 4, 32)
    v = torch.randn(2, 300, 4, 32)
    out, lse = fastgpt.attention(q, k, v, return_lse=True, backend=backend)
    plain = plain_attention(q, k, v, True, (-1, -1))
    exact = plain_attention(q.double(), k.double(), v.double(), True, (-1, -1))
    assert_parity("out", out, plain[0], exact[0])
    assert_parity("lse", lse, plain[1], exact[1])


@pytest.mark.parametrize("low", [-1e5, -1e9, -1e30, torch.finfo(torch.float32).min])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_reference_of_rows_hidden_by_finite_numbers(dtype, low):
    """A softmax all the same, whose lse has no digits left for log(n); rows of -inf alone give 0."""
    q, k, v, dout = (torch.randn(2, 6, 3, 8, dtype=dtype) for _ in range(4))
    bias = torch.zeros(1, 1, 6, 6, dtype=dtype)
    bias[..., 0, :], bias[..., 1, :3], bias[..., 2, :] = low, low, -torch.inf
    leaves = [t.requires_grad_() for t in (q, k, v, torch.full((3,), low, dtype=dtype), bias)]

    def plain(q, k, v, sink, bias):
        scores = torch.einsum("bihd,bjhd->bhij", q, k) * 8**-0.5 + bias
        scores = torch.cat((scores, sink[:, None, None].expand(2, 3, 6, 1)), -1)
        p = scores.softmax(-1)[..., :-1]
        return torch.einsum("bhij,bjhd->bihd", p, v), scores.logsumexp(-1)

    out, lse = fastgpt.attention(
        *(q, k, v), causal=False, sink=leaves[3], attn_bias=bias, return_lse=True, backend="reference"
    )
    expected = plain(*leaves)
    torch.testing.assert_close((out, lse), expected)
    gradients = (torch.autograd.grad(o, leaves, dout) for o in (out, expected[0]))
    for got, exact in zip(*gradients, strict=True):
        torch.testing.assert_close(got, exact)


def test_reference_gradient_of_some_of_the_keys():
    """Which the backward gives where out and lse are those of more: so blocks of keys are put together."""
    q, k, v, dout = (torch.randn(1, 9, 2, 8) for _ in range(4))
    args = library.pack(AttentionSpec(0.3, -1, -1), AttentionTensors(), "reference")
    out, lse = torch.ops.fastgpt.attention_fwd(q, k, v, *args)
    dq, *whole = torch.ops.fastgpt.attention_bwd(dout, None, q, k, v, out, lse, False, *args)[:3]
    parts = [
        torch.ops.fastgpt.attention_bwd(dout, None, q, k[:, rows], v[:, rows], out, lse, False, *args)
        for rows in (slice(0, 4), slice(4, 9))
    ]
    torch.testing.assert_close(parts[0][0] + parts[1][0], dq)
    for i, got in enumerate(whole, 1):
        torch.testing.assert_close(torch.cat((parts[0][i], parts[1][i]), 1), got)


@pytest.mark.parametrize("deviation", [25, 400])
@pytest.mark.parametrize("backend", KERNELS_CPU)
def test_gradients_of_large_scores(backend, deviation):
    # exp(s − lse) keeps its digits only if the scores are forward's, bit by bit: of deviation 400, dv has
    # 7.5 times plain PyTorch's error else, and 3.6 by the rounding of lse alone (1.8 at 25).
    q, k, v, dout = (torch.randn(2, 300, 2, 64) for _ in range(4))
    inputs = [deviation * q, k, v]

    def gradients(function, tensors):
        tensors = [t.clone().requires_grad_() for t in tensors]
        function(*tensors).backward(dout.to(tensors[0].dtype))
        return [t.grad for t in tensors]

    def plain(q, k, v):
        return plain_attention(q, k, v, True, (-1, -1))[0]

    got = gradients(functools.partial(fastgpt.attention, backend=backend), inputs)
    expected = gradients(plain, inputs), gradients(plain, [t.double() for t in inputs])
    for name, *of_each in zip(("dq", "dk", "dv"), got, *expected, strict=True):
        assert_parity(name, *of_each, factor=3 if deviation < 400 else 5)


@pytest.mark.parametrize("backend", KERNELS_CPU)
def test_nan_input_gives_nan_only_where_it_is_seen(backend):
    q, k, v = (torch.randn(1, 100, 2, 32) for _ in range(3))
    k[0, 60, 1, 3] = torch.nan
    out = fastgpt.attention(q, k, v, backend=backend)
    assert out[0, 60:, 1].isnan().all()
    assert not out[0, :60].isnan().any() and not out[0, :, 0].isnan().any()


@pytest.mark.parametrize("sq", [1, 40])
@pytest.mark.parametrize("backend", KERNELS)
def test_nan_queries_give_nan(backend, sq):
    q, k, v = torch.full((1, sq, 2, 32), torch.nan), torch.randn(1, 40, 2, 32), torch.randn(1, 40, 2, 32)
    out, lse = fastgpt.attention(q, k, v, return_lse=True, backend=backend)
    assert out.isnan().all() and lse.isnan().all()


@pytest.mark.parametrize("backend", KERNELS_CPU)
def test_no_quadratic_memory(backend):
    """65,536 queries and keys: a (sq, sk) buffer of bytes alone would be 4 GiB."""
    import resource

    q = torch.randn(1, 65536, 1, 8)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    fastgpt.attention(q, q, q, window_size=(64, 0), backend=backend)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200 * 1024  # KiB


@pytest.mark.parametrize("backend", KERNELS)
@pytest.mark.parametrize("grad", [False, True])
def test_opcheck(backend, grad):
    q, k, v = (torch.randn(2, 9, heads, 8, requires_grad=grad) for heads in (4, 2, 2))
    args = (q, k, v, *library.pack(AttentionSpec(0.3, 3, 0), AttentionTensors(), backend))
    torch.library.opcheck(torch.ops.fastgpt.attention_fwd.default, args)


@pytest.mark.parametrize("backend", KERNELS)
def test_opcheck_of_every_option(backend):
    q, k, v = (torch.randn(2, 9, heads, 8, requires_grad=True) for heads in (4, 2, 2))
    tensors = AttentionTensors(
        alibi_slopes=torch.rand(2, 4),
        sink=torch.randn(4, requires_grad=True),
        attn_bias=torch.randn(1, 4, 9, 9, requires_grad=True),
        rng_state=torch.tensor([1, 2]),
    )
    args = (q, k, v, *library.pack(AttentionSpec(0.3, 3, 0, 5.0, 0.2), tensors, backend))
    torch.library.opcheck(torch.ops.fastgpt.attention_fwd.default, args)


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("backend", [b for b in AVAILABLE if b != "cuda"])
def test_compile_fullgraph(backend, dynamic):
    def f(q, k, v):
        return fastgpt.attention(q.sin(), k, v, backend=backend).cos()

    torch._dynamo.reset()
    compiled = torch.compile(f, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for seqlen in (20, 33):
        inputs = [torch.randn(1, seqlen, heads, 16, requires_grad=True) for heads in (4, 2, 2)]
        out, expected = compiled(*inputs), f(*inputs)
        torch.testing.assert_close(out, expected)
        dout = torch.randn_like(out)
        for a, b in zip(
            torch.autograd.grad(out, inputs, dout), torch.autograd.grad(expected, inputs, dout), strict=True
        ):
            torch.testing.assert_close(a, b)


@pytest.mark.parametrize("dynamic", [None, True])
def test_compile_with_numbers_that_vary(dynamic):
    """torch.compile makes a number symbolic that it meets with a second value."""
    state = torch.tensor([3, 4])

    def f(q, softcap, window, dropout_p, scale):
        return fastgpt.attention(
            q,
            q,
            q,
            softcap=softcap,
            window_size=(window, window),
            dropout_p=dropout_p,
            rng_state=state,
            softmax_scale=scale,
            backend="cpu",
        )

    torch._dynamo.reset()
    compiled = torch.compile(f, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    q = torch.randn(1, 9, 2, 8)
    for numbers in ((5.0, 4, 0.1, 0.3), (7.0, 3, 0.2, 0.4), (0.0, -1, 0.0, 0.5)):
        torch.testing.assert_close(compiled(q, *numbers), f(q, *numbers))


def test_export():
    class Module(torch.nn.Module):
        def forward(self, q):
            return fastgpt.attention(q, q, q)

    q = torch.randn(1, 12, 2, 8)
    exported = torch.export.export(
        Module(), (q,), dynamic_shapes={"q": {1: torch.export.Dim("seqlen", min=2)}}
    )
    longer = torch.randn(1, 30, 2, 8)
    torch.testing.assert_close(exported.module()(longer), fastgpt.attention(longer, longer, longer))


def test_inference_mode():
    with torch.inference_mode():
        q = torch.randn(1, 30, 2, 8)
        torch.testing.assert_close(
            fastgpt.attention(q, q, q), fastgpt.attention(q, q, q, backend="reference")
        )


def test_second_derivative_is_refused():
    q = torch.randn(1, 20, 2, 8, requires_grad=True)
    (dq,) = torch.autograd.grad(fastgpt.attention(q, q, q).sum(), q, create_graph=True)
    (expected,) = torch.autograd.grad(fastgpt.attention(q, q, q).sum(), q)
    assert torch.equal(dq, expected)
    with pytest.raises(RuntimeError, match="no second derivative"):
        dq.sum().backward()


def test_torch_func_grad():
    q = torch.randn(1, 20, 2, 8)

    def loss(q):
        return fastgpt.attention(q, q, q).square().sum()

    leaf = q.clone().requires_grad_()
    (expected,) = torch.autograd.grad(loss(leaf), leaf)
    torch.testing.assert_close(torch.func.grad(loss)(q), expected)


@pytest.mark.parametrize("backend", [b for b in AVAILABLE if b != "cuda"])
def test_autocast_does_not_change_the_precision(backend):
    """The dtype that a call is given rules, whichever backend serves it."""
    q, k, v = (torch.randn(1, 40, 2, 16, requires_grad=True) for _ in range(3))
    expected = fastgpt.attention(q, k, v, backend=backend)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = fastgpt.attention(q, k, v, backend=backend)
        norm = fastgpt.layer_norm(q, backend=backend)
        with torch.no_grad():
            step = fastgpt.attention_with_kvcache(q, k, v, cache_seqlens=40, backend=backend)
    for got in (out, step):
        assert got.dtype == torch.float32
        torch.testing.assert_close(got, expected, rtol=0, atol=1e-5)
    torch.testing.assert_close(norm, torch.nn.functional.layer_norm(q, (16,)), rtol=0, atol=1e-5)


@pytest.mark.parametrize("backend", KERNELS)
def test_backward_takes_out_and_lse_in_any_layout(backend):
    q, k, v, dout = (torch.randn(2, 30, 3, 16) for _ in range(4))
    args = library.pack(AttentionSpec(0.25, -1, 0), AttentionTensors(), backend)
    out, lse = torch.ops.fastgpt.attention_fwd(q, k, v, *args)
    expected = torch.ops.fastgpt.attention_bwd(dout, None, q, k, v, out, lse, False, *args)
    out, lse, dout = (t.transpose(-1, -2).contiguous().transpose(-1, -2) for t in (out, lse, dout))
    got = torch.ops.fastgpt.attention_bwd(dout, None, q, k, v, out, lse, False, *args)
    for a, b in zip(got, expected, strict=True):
        assert torch.equal(a, b)


Q, KV = (2, 6, 4, 8), (2, 9, 2, 8)


def tensors(q=Q, k=KV, v=KV, dtype=torch.float32):
    return [torch.randn(shape).to(dtype) for shape in (q, k, v)]


BAD_INPUT = {
    "rank": (
        lambda: fastgpt.attention(*tensors(q=(6, 4, 8))),
        ValueError,
        r"q: got shape \(6, 4, 8\).*4 dim",
    ),
    "no tensor": (lambda: fastgpt.attention(None, *tensors()[1:]), TypeError, r"q: got NoneType.*Tensor"),
    "batch": (
        lambda: fastgpt.attention(*tensors(k=(3, 9, 2, 8), v=(3, 9, 2, 8))),
        ValueError,
        "k: got batch 3",
    ),
    "headdim": (
        lambda: fastgpt.attention(*tensors(k=(2, 9, 2, 7))),
        ValueError,
        "k: got headdim 7, expected 8",
    ),
    "k and v": (lambda: fastgpt.attention(*tensors(v=(2, 8, 2, 8))), ValueError, r"v: got shape \(2, 8"),
    "heads": (
        lambda: fastgpt.attention(*tensors(k=(2, 9, 3, 8), v=(2, 9, 3, 8))),
        ValueError,
        "k: got 3 heads, expected a divisor of the 4",
    ),
    "no heads": (
        lambda: fastgpt.attention(*tensors(k=(2, 9, 0, 8), v=(2, 9, 0, 8))),
        ValueError,
        "k: got 0 heads",
    ),
    "no headdim": (lambda: fastgpt.attention(*tensors((2, 6, 4, 0), (2, 9, 2, 0))), ValueError, "headdims 0"),
    "dtype": (lambda: fastgpt.attention(*tensors(dtype=torch.int32)), TypeError, "q: got dtype torch.int32"),
    "mixed dtypes": (
        lambda: fastgpt.attention(tensors()[0].half(), *tensors()[1:]),
        TypeError,
        "k: got dtype torch.float32, expected torch.float16 like q",
    ),
    "mixed devices": (
        lambda: fastgpt.attention(tensors()[0], *(t.to("meta") for t in tensors()[1:])),
        ValueError,
        "k: got device meta, expected cpu",
    ),
    "last stride": (
        lambda: fastgpt.attention(torch.randn(2, 6, 4, 16)[..., ::2], *tensors()[1:]),
        ValueError,
        r"q: got strides .*expected the last one to be 1",
    ),
    "NaN scale": (
        lambda: fastgpt.attention(*tensors(), softmax_scale=math.nan),
        ValueError,
        "softmax_scale: got nan",
    ),
    "infinite scale": (
        lambda: fastgpt.attention(*tensors(), softmax_scale=math.inf),
        ValueError,
        "softmax_scale: got inf",
    ),
    "scale's type": (
        lambda: fastgpt.attention(*tensors(), softmax_scale="1"),
        TypeError,
        "softmax_scale: got str",
    ),
    "window": (
        lambda: fastgpt.attention(*tensors(), window_size=(-2, 0)),
        ValueError,
        r"window_size: got \(-2, 0\)",
    ),
    "window overflow": (
        lambda: fastgpt.attention(*tensors(), window_size=(2**31, 0)),
        ValueError,
        "window_size: got .2147483648",
    ),
    "window's type": (lambda: fastgpt.attention(*tensors(), window_size=5), TypeError, "window_size: got 5"),
    "causal's type": (lambda: fastgpt.attention(*tensors(), causal=None), TypeError, "causal: got None"),
    "packed after dense": (
        lambda: fastgpt.attention_varlen(*tensors(), cu_seqlens_q=None, cu_seqlens_k=None),
        ValueError,
        r"q: got shape \(2, 6, 4, 8\), expected 3 dimensions",
    ),
    "causal's number": (lambda: fastgpt.attention(*tensors(), causal=1), TypeError, "causal: got 1"),
    "window's numbers": (
        lambda: fastgpt.attention(*tensors(), window_size=(True, -1)),
        TypeError,
        r"window_size: got \(True, -1\)",
    ),
    "softcap": (lambda: fastgpt.attention(*tensors(), softcap=-1.0), ValueError, "softcap: got -1"),
    "softcap's size": (
        lambda: fastgpt.attention(*tensors(), softcap=1e-50),
        ValueError,
        "softcap: got 1e-50",
    ),
    "softcap's type": (lambda: fastgpt.attention(*tensors(), softcap="1"), TypeError, "softcap: got str"),
    "used keys": (
        lambda: fastgpt.attention(*tensors(), seqused_k=torch.tensor([3, 10], dtype=torch.int32)),
        ValueError,
        r"seqused_k: got \[3, 10\], expected 0 to \[9, 9\]",
    ),
    "padding": (
        lambda: fastgpt.attention(*tensors(), leftpad_k=torch.tensor([3, -1], dtype=torch.int32)),
        ValueError,
        r"leftpad_k: got \[3, -1\], expected 0 to \[9, 9\]",
    ),
    "padding's dtype": (
        lambda: fastgpt.attention(*tensors(), leftpad_k=torch.tensor([3, 1])),
        ValueError,
        r"leftpad_k: got torch.int64 \(2,\), expected torch.int32 \(batch\), batch 2",
    ),
    "dropout's type": (
        lambda: fastgpt.attention(*tensors(), dropout_p=None),
        TypeError,
        "dropout_p: got NoneType",
    ),
    "sink's type": (lambda: fastgpt.attention(*tensors(), sink=[1.0]), TypeError, "sink: got list"),
    "slopes' gradient": (
        lambda: fastgpt.attention(*tensors(), alibi_slopes=torch.rand(4, requires_grad=True)),
        ValueError,
        "alibi_slopes: got requires_grad=True",
    ),
    "backend's type": (
        lambda: fastgpt.attention(*tensors(), backend=["cpu"]),
        TypeError,
        "backend: got .'cpu'",
    ),
    "dropout": (lambda: fastgpt.attention(*tensors(), dropout_p=1.0), ValueError, "dropout_p: got 1.0"),
    "sink": (
        lambda: fastgpt.attention(*tensors(), sink=torch.randn(3)),
        ValueError,
        r"sink: got shape \(3,\)",
    ),
    "slopes": (
        lambda: fastgpt.attention(*tensors(), alibi_slopes=torch.randn(2, 3)),
        ValueError,
        r"alibi_slopes: got shape \(2, 3\)",
    ),
    "bias": (
        lambda: fastgpt.attention(*tensors(), attn_bias=torch.randn(6, 9)),
        ValueError,
        r"attn_bias: got shape \(6, 9\), expected \(2, 4, 6, 9\)",
    ),
    "backend": (
        lambda: fastgpt.attention(*tensors(), backend="gpu"),
        ValueError,
        "backend: got 'gpu', expected one of",
    ),
    "edges": (
        lambda: fastgpt.attention_varlen(
            *(torch.randn(9, 2, 8) for _ in range(3)),
            cu_seqlens_q=torch.tensor([0, 4, 8], dtype=torch.int32),
            cu_seqlens_k=torch.tensor([0, 4, 9], dtype=torch.int32),
        ),
        ValueError,
        r"cu_seqlens_q: got \[0, 4, 8\], expected 0 rising to 9",
    ),
}


@pytest.mark.parametrize("name", BAD_INPUT)
def test_bad_input(name):
    call, error, message = BAD_INPUT[name]
    fastgpt.attention(*tensors())
    for _ in range(2):  # neither what passed the checks before nor what did not hides it
        with pytest.raises(error, match=message):
            call()


def test_sizes_beyond_int32_are_refused():
    long = torch.zeros(1, dtype=torch.float32).expand(1, 2**31, 1, 1)
    with pytest.raises(ValueError, match="2147483648 tokens, expected at most 2147483647"):
        fastgpt.attention(long, long, long)


@pytest.mark.skipif("triton" not in AVAILABLE, reason="Triton is not available")
@pytest.mark.parametrize("heads", [1, 4])
def test_triton_bias_gradient_does_not_depend_on_the_batch(heads):
    q, k, v, dout = (torch.randn(5, 70, 4, 16) for _ in range(4))
    bias = torch.randn(5, heads, 70, 70)

    def gradient(n: int) -> torch.Tensor:
        own = bias[:n].clone().requires_grad_()
        out = fastgpt.attention(q[:n], k[:n], v[:n], attn_bias=own, backend="triton")
        return torch.autograd.grad(out, own, dout[:n])[0]

    assert torch.equal(gradient(1)[0], gradient(5)[0])
