"""What only a GPU shows of the CUDA kernels: streams, graphs, threads, several devices."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from backends import AVAILABLE
from test_structure import python

import fastgpt
from fastgpt import dispatch
from fastgpt.ops import cuda
from fastgpt.ops.attention.spec import AttentionCall

HALF = {"dtype": torch.float16}
OPS = ("attention", "decode", "norm")


def reason() -> str:
    if cuda.EMULATED:
        return "FASTGPT_CUDA_EMULATE=1 has no GPU"
    return "" if "cuda" in AVAILABLE else str(dispatch.unavailable("cuda"))


pytestmark = pytest.mark.skipif(bool(reason()), reason=reason())


def inputs(op, device="cuda"):
    if op == "norm":
        return [torch.randn(500, 768, device=device, **HALF), torch.randn(768, device=device, **HALF)]
    rows = 300 if op == "attention" else 1
    q = torch.randn(2, rows, 4, 64, device=device, **HALF)
    return [q, *(torch.randn(2, 300, 4, 64, device=device, **HALF) for _ in range(2))]


def call(op, tensors, backend="cuda"):
    if op == "norm":
        return fastgpt.layer_norm(tensors[0], tensors[1], backend=backend)
    if op == "attention":
        return fastgpt.attention(*tensors, backend=backend)
    lengths = torch.full((2,), 300, dtype=torch.int32, device=tensors[0].device)
    return fastgpt.attention_with_kvcache(*tensors, cache_seqlens=lengths, backend=backend)


@pytest.fixture(params=OPS)
def op(request):
    if request.param == "attention":
        call = AttentionCall("cuda", torch.float16, 64, 64, ())
        if refused := dispatch.implementation("attention", "cuda").unsupported(call):
            pytest.skip("; ".join(refused))
    return request.param


def assert_like_reference(op, tensors, got):
    expected = call(op, [t.double() for t in tensors], "reference")
    torch.testing.assert_close(got.double(), expected, rtol=1e-2, atol=1e-2)


def test_kernels_run_on_the_current_stream(op):
    """They see what work queued there before has written, and what follows there sees theirs."""
    tensors, later = inputs(op), inputs(op)
    call(op, tensors)
    torch.cuda.synchronize()
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        torch.cuda._sleep(100_000_000)
        for t, new in zip(tensors, later, strict=True):
            t.copy_(new)
        out = call(op, tensors).clone()
    side.synchronize()
    assert_like_reference(op, later, out)


def test_graphs_hold_the_kernels(op):
    tensors, later = inputs(op), inputs(op)
    call(op, tensors)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = call(op, tensors)
    for t, new in zip(tensors, later, strict=True):
        t.copy_(new)
    graph.replay()
    assert_like_reference(op, later, out)


FIRST_CALL = f"""
import sys, threading, torch
sys.path.insert(0, {str(Path(__file__).parent)!r})
import test_gpu as gpu
"""
FIRST_CALL += """
tensors = gpu.inputs({op!r}, {device!r})
torch.cuda.synchronize({device!r})
results = []
def run():
    results.append(gpu.call({op!r}, tensors))
    torch.cuda.synchronize({device!r})
thread = threading.Thread(target=run)
thread.start()
thread.join()
gpu.assert_like_reference({op!r}, tensors, results[0])
"""


def test_the_first_call_may_be_of_another_thread(op):
    """Which has no context of the driver yet."""
    done = python(FIRST_CALL.format(op=op, device="cuda"))
    assert done.returncode == 0, done.stderr


def test_another_device_than_the_current_one(op):
    if torch.cuda.device_count() < 2:
        pytest.skip("there is one GPU")
    tensors = inputs(op, "cuda:1")
    with torch.cuda.device(0):
        assert_like_reference(op, tensors, call(op, tensors))
        assert torch.cuda.current_device() == 0


def test_a_device_that_is_not_used_gets_no_context(op):
    if torch.cuda.device_count() < 2:
        pytest.skip("there is one GPU")
    code = FIRST_CALL.format(op=op, device="cuda:1")
    done = python(
        code + "assert not torch._C._cuda_hasPrimaryContext(0)\nassert torch.cuda.current_device() == 0"
    )
    assert done.returncode == 0, done.stderr
