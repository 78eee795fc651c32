"""What csrc/cuda/emulator.h promises, by the kernels of csrc/emulated/self_test.cu."""

from __future__ import annotations

import importlib.util

import pytest
import torch

from fastgpt.ops import cuda

pytestmark = pytest.mark.skipif(
    not importlib.util.find_spec("fastgpt._cuda_emulated"), reason="built by FASTGPT_EMULATE=1"
)


def run(kernel):
    from fastgpt import _cuda_emulated

    out = torch.full((256,), -1.0)
    _cuda_emulated.self_test(kernel, out)
    return out


def test_shuffles_and_votes():
    lanes = torch.arange(32)
    shuffled, first = run("shuffles")[:160].view(5, 32), lanes // 8 * 8
    down, up = lanes + 3, lanes - 3
    assert torch.equal(shuffled[0], (lanes ^ 5).float())
    assert torch.equal(shuffled[1], torch.where(down < first + 8, down, lanes).float())
    assert torch.equal(shuffled[2], torch.where(up >= first, up, lanes).float())
    assert torch.equal(shuffled[3], (first + 1).float())
    assert (shuffled[4] == sum(1 << i for i in range(32) if i % 3 == 0) >> 16).all()


def test_a_warp_may_meet_in_parts():
    part = run("shuffles")[160:165]
    assert part[0].isnan() and part[1:].tolist() == [0, 3, 2, 496]  # a lane that takes no part is undefined


def test_barriers_and_memory():
    out = run("barriers")
    assert out[:96].isnan().all()  # shared memory that nobody has written
    assert torch.equal(out[96:128], torch.arange(32.0))
    assert torch.equal(out[160:192], torch.arange(32.0).flip(0))


def test_a_missing_barrier_shows():
    out = run("missing_barrier")
    assert out[:31].isnan().all() and out[33:64].isnan().all()


def test_copies_are_done_when_they_are_waited_for():
    out = run("copies")[:64].view(2, 32)
    assert out[0].isnan().all()
    assert (out[1, ::2] == -1).all() and (out[1, 1::2] == 0).all()


@pytest.mark.parametrize(
    "kernel,message",
    [
        (
            "divergent_barrier",
            r"thread \(7, 0, 0\) at __syncthreads .* divergence: others wait at __syncthreads",
        ),
        ("divergent_shuffle", r"thread \(7, 0, 0\) at __shfl_xor_sync .* divergence: others wait"),
        ("missing_lane", r"deadlock: 31 threads wait at __syncwarp .* first \(0, 0, 0\); 1 have returned"),
        ("foreign_mask", r"thread \(8, 0, 0\) at __syncwarp .* not in its own mask"),
        ("missing_threads", r"deadlock: 32 threads wait at named_barrier_sync"),
        ("beyond_shared", "has written beside its 256 bytes of shared memory"),
        ("too_many_threads", r"invalid configuration: grid \(1, 1, 1\), block \(1025, 1, 1\)"),
        ("too_much_shared", "233472 bytes of shared memory"),
    ],
)
def test_faults_end_a_launch(kernel, message):
    with pytest.raises(RuntimeError, match=message):
        run(kernel)
    run("shuffles")  # and the next one is not touched by it


def test_emulated_kernels_take_cpu_tensors_only_when_asked():
    refused = cuda.refusals("cpu", torch.float32, (), ())
    assert refused == ([] if cuda.EMULATED else ["the tensors are on cpu, not on a GPU"])
