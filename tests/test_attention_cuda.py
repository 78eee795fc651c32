"""Attention on the CUDA kernel: the cases of the common table that it has."""

from __future__ import annotations

import importlib
import threading
import time

import pytest
import torch
from backends import AVAILABLE, assert_parity, factor_of
from cases import ATTENTION

import fastgpt
from fastgpt.ops import cuda
from fastgpt.ops.attention.spec import AttentionSpec, AttentionTensors
from fastgpt.verify.attention import TILED, case_results, variant_results

pytestmark = [
    pytest.mark.skipif(
        "cuda" not in AVAILABLE, reason="no CUDA kernels here; FASTGPT_CUDA_EMULATE=1 emulates them"
    ),
    pytest.mark.usefixtures("device"),
]

CUDA_CASES = [case for case in ATTENTION if case.headdim in (64, 128, 256) and case.headdim == case.headdim_v]
HALVES = [torch.bfloat16, torch.float16]


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("case", CUDA_CASES, ids=str)
def test_parity(case, dtype):
    for what, *values in case_results(case, "cuda", dtype):
        assert_parity(what, *values)


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("name", TILED)
def test_variant_parity(name, dtype):
    for what, *values in variant_results(TILED[name], "cuda", dtype):
        assert_parity(what, *values)


@pytest.mark.parametrize("headdim", [64, 128, 256])
@pytest.mark.parametrize("scale", [0.0, -0.2, 1e-38, 3.0])
def test_softmax_scale(scale, headdim):
    inputs = [torch.randn(1, 150, 2, headdim).half() for _ in range(3)]
    dout = torch.randn(1, 150, 2, headdim).half()

    def results(backend, dtype):
        q, k, v = (t.detach().to(dtype).requires_grad_(headdim < 256) for t in inputs)
        out, lse = fastgpt.attention(q, k, v, softmax_scale=scale, return_lse=True, backend=backend)
        grads = torch.autograd.grad(out, (q, k, v), dout.to(dtype)) if headdim < 256 else ()
        return out.detach(), lse.detach(), *grads

    got, exact = results("cuda", torch.half), results("reference", torch.float64)
    plain = results("reference", torch.half)
    for name, *values in zip(("out", "lse", "dq", "dk", "dv"), got, plain, exact, strict=False):
        assert_parity(name, *values, factor_of(name))


def test_sequences_do_not_meet():
    """NaN in one packed sequence, and in rows that none uses, stays there."""
    edges_q, edges_k = (torch.tensor([0, *n]).cumsum(0).int() for n in ((70, 90, 60), (90, 100, 130)))
    q, k, v, dout = (torch.randn(n, 2, 64).bfloat16() for n in (220, 320, 320, 220))
    options = {"cu_seqlens_q": edges_q, "cu_seqlens_k": edges_k, "causal": True, "return_lse": True}

    def results():
        leaves = [t.detach().clone().requires_grad_() for t in (q, k, v)]
        out, lse = fastgpt.attention_varlen(*leaves, backend="cuda", **options)
        return out, lse.T, *torch.autograd.grad(out, leaves, dout)

    before = results()
    for t, first, last in ((q, 70, 160), (k, 90, 190), (v, 90, 190), (dout, 70, 160)):
        t[first:last] = torch.nan
    after = results()
    for name, was, now in zip(("out", "lse", "dq", "dk", "dv"), before, after, strict=True):
        first, last = (90, 190) if name in ("dk", "dv") else (70, 160)
        assert now[first:last].isnan().all(), name
        assert torch.equal(now[:first], was[:first]) and torch.equal(now[last:], was[last:]), name


def test_rows_that_are_no_keys_meet_no_gradient():
    """Nor does NaN in dout reach the gradients of rows behind a sequence's keys."""
    q, k, v, dout = (torch.randn(1, 128, 1, 64).bfloat16() for _ in range(4))
    dout[0, 7] = torch.nan
    leaves = [t.requires_grad_() for t in (q, k, v)]
    used = torch.tensor([100], dtype=torch.int32)
    out = fastgpt.attention(*leaves, seqused_k=used, causal=False, backend="cuda")
    _, dk, dv = torch.autograd.grad(out, leaves, dout)
    assert not dk[:, 100:].any() and not dv[:, 100:].any()


def test_lengths_beyond_the_tensors():
    """On a GPU nobody checks them: the kernels end, and touch no other memory."""
    kernels = importlib.import_module("fastgpt.ops.attention.cuda")
    edges = torch.tensor([0, 90, 400], dtype=torch.int32)
    used = torch.tensor([129, 9999], dtype=torch.int32)
    for shape, tensors in (
        ((2, 128, 2, 64), AttentionTensors(seqused_k=used)),
        ((128, 2, 64), AttentionTensors(edges, edges)),
        ((128, 2, 64), AttentionTensors(edges, edges, seqused_k=used)),
    ):
        q, k, v, dout = (torch.randn(shape).bfloat16() for _ in range(4))
        packed = tensors.cu_seqlens_q is not None
        key_ranges = tensors.seqused_k is not None
        spec = AttentionSpec(0.1, window_right=0, varlen=packed, key_ranges=key_ranges)
        out, lse = kernels.forward(q, k, v, spec, tensors)
        grads = kernels.backward(dout, None, q, k, v, out, lse, False, spec, tensors)[:3]
        assert not any(t.isnan().any() for t in (out, *grads))


def test_two_runs_give_the_same_gradients_in_any_batch():
    q, k, v, dout = (torch.randn(2, 400, n, 128).bfloat16() for n in (4, 2, 2, 4))

    def grads(b):
        leaves = [t[b].detach().requires_grad_() for t in (q, k, v)]
        return torch.autograd.grad(fastgpt.attention(*leaves, backend="cuda"), leaves, dout[b])

    both = grads(slice(0, 2))
    for again, alone, of_both in zip(grads(slice(0, 2)), grads(slice(1, 2)), both, strict=True):
        assert torch.equal(again, of_both) and torch.equal(alone, of_both[1:])


@pytest.mark.skipif(not cuda.EMULATED, reason="a GPU's schedule is its own")
@pytest.mark.parametrize("headdim", [64, 128])
def test_the_schedule_changes_no_bit(headdim):
    """Copies, products and each warp may be as late as they like. Tiles without keys stand between others,
    and NaN behind the keys."""
    lengths = (300, 0, 30, 5, 0, 130, 20), (270, 0, 0, 0, 0, 200, 0)
    used = torch.tensor((250, 0, 0, 0, 0, 90, 0), dtype=torch.int32)
    edges_q, edges_k = (torch.tensor([0, *n]).cumsum(0).int() for n in lengths)
    leaves = [
        torch.randn(sum(n), 2, headdim).half().requires_grad_() for n in (lengths[0], *[lengths[1]] * 2)
    ]
    dout = torch.randn(sum(lengths[0]), 2, headdim).half()
    with torch.no_grad():
        for t in leaves[1:]:
            t[250:270] = t[360:] = torch.nan

    def results(seed):
        cuda.load().set_schedule(seed)
        options = {"cu_seqlens_q": edges_q, "cu_seqlens_k": edges_k, "seqused_k": used, "backend": "cuda"}
        out = fastgpt.attention_varlen(*leaves, causal=True, **options)
        return out, *torch.autograd.grad(out, leaves, dout)

    in_turn = results(0)
    assert all(t.isfinite().all() for t in in_turn)
    for seed in torch.randint(1, 2**31, (8,)).tolist():
        for expected, got in zip(in_turn, results(seed), strict=True):
            assert torch.equal(expected, got), seed


@pytest.mark.parametrize("backward", [False, True])
def test_other_headdims_are_errors(backward):
    """The kernels' own: the host has refused them before."""
    from fastgpt.ops.attention import cuda as module

    spec, tensors = AttentionSpec(1.0), AttentionTensors()
    t, lse = torch.zeros(1, 8, 2, 192).half(), torch.zeros(1, 2, 8)
    with pytest.raises(RuntimeError, match=r"headdim 192, fp16\): no kernel has this headdim"):
        if backward:
            module.backward(t, None, t, t, t, t, lse, False, spec, tensors)
        else:
            module.forward(t, t, t, spec, tensors)


@pytest.mark.skipif(not cuda.EMULATED, reason="launches are too short on a GPU")
def test_python_goes_on_while_kernels_are_launched():
    q = torch.randn(1, 500, 2, 64).half()
    results = [None] * 2
    threads = [
        threading.Thread(
            target=lambda i=i: results.__setitem__(i, fastgpt.attention(q, q, q, backend="cuda"))
        )
        for i in range(2)
    ]
    expected, ticks = fastgpt.attention(q, q, q, backend="cuda"), 0
    for thread in threads:
        thread.start()
    while any(thread.is_alive() for thread in threads):
        time.sleep(0.001)
        ticks += 1
    assert ticks > 20
    assert all(torch.equal(result, expected) for result in results)


def test_refuses_what_it_has_not():
    q = torch.randn(1, 8, 2, 96)
    with pytest.raises(fastgpt.BackendUnsupported) as caught:
        fastgpt.attention(q, q, q, sink=torch.zeros(2), backend="cuda")
    for reason in ("float32 is not of 16 bits", "headdim 96 is not 64, 128 or 256", "sink is not written"):
        assert reason in str(caught.value)
    q = torch.randn(1, 8, 2, 256).half().requires_grad_()
    with pytest.raises(fastgpt.BackendUnsupported, match="headdim 256 has no backward: 64 and 128 have"):
        fastgpt.attention(q, q, q, backend="cuda")
