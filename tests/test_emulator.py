"""What csrc/cuda/emulator.h promises, by the kernels of csrc/emulated/self_test.cu."""

from __future__ import annotations

import importlib.util

import pytest
import torch

from fastgpt.ops import cuda

pytestmark = pytest.mark.skipif(
    not importlib.util.find_spec("fastgpt._cuda_emulated"), reason="built by FASTGPT_EMULATE=1"
)


def run(kernel, given=None, size=256):
    from fastgpt import _cuda_emulated

    out = torch.full((size,), -1.0)
    _cuda_emulated.self_test(kernel, given, out)
    return out


def set_schedule(seed):
    from fastgpt import _cuda_emulated

    _cuda_emulated.set_schedule(seed)


@pytest.fixture(autouse=True)
def in_turn():
    set_schedule(0)


@pytest.fixture(params=range(4))
def seed(request, in_turn):
    """Threads in turn, and in an order that is drawn."""
    set_schedule(request.param)
    return request.param


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


def test_orders_are_drawn():
    """Some hold back a warp until the others have returned; a seed draws the same one every time."""

    def turns(seed):
        set_schedule(seed)
        return run("turns")[:24].view(3, 8)

    first = turns(0)
    assert torch.equal(first, turns(0)) and (first[:, 1:] - first[:, :-1] < 6).all()
    drawn = [turns(seed) for seed in range(1, 60)]
    assert torch.equal(turns(1), drawn[0])
    for warp in range(3):
        assert any(turn[warp].tolist() == list(range(16, 24)) for turn in drawn)
    assert any(turn[0, 0] < turn[1, 0] < turn[0, 7] < turn[1, 7] for turn in drawn)


def test_mbarriers(seed):
    assert torch.equal(run("ring"), torch.arange(256.0))


def test_tiles_are_copied(seed):
    given = torch.randn(2, 12, 3, 128).half()
    expected = torch.zeros(64, 64)
    expected[:7] = given[1, 5:, 1, 64:]
    stored = given.clone()
    stored[0, 6:, 2, 65:] = given[1, 5:11, 1, 64:127]  # column 128 and rows from 12 on are not the tensor's
    out = run("tiles", given, 65 * 64)
    assert torch.equal(out[: 64 * 64].view(64, 64), expected)
    early = out[64 * 64 :]
    assert early.isnan().all() or torch.equal(early, expected[0])
    assert seed != 0 or early.isnan().all()
    assert torch.equal(given, stored)


def test_bytes_are_copied(seed):
    given = torch.randn(192, 64).half()
    assert torch.equal(run("bulk", given)[:64].view(2, 32), given[:2, :32].float())


def test_a_tile_is_read_as_late_as_it_may(seed):
    stored = []
    for _ in range(8):
        run("reused_tile", given := torch.zeros(192, 64, dtype=torch.float16))
        assert (given.flatten()[1 : 64 * 64] == 1).all() and (given[64:] == 0).all()
        stored.append(given[0, 0].item())
    assert set(stored) == ({1, 2} if seed else {2})


@pytest.mark.parametrize(
    "kernel,product",
    [
        ("product_shared", lambda a, b: a @ b.T),
        ("written_factor", lambda a, b: a @ b.T),
        ("product_registers", lambda a, b: a @ torch.cat([b[:64], b[64:]], 1)),
        ("product_transposed", lambda a, b: a.T @ b[:64]),
    ],
)
def test_products(kernel, product, seed):
    given = torch.randint(-9, 9, (192, 64)).half()  # whose sums are exact
    out = run(kernel, given, 64 * 128 + 128)
    expected = product(given[:64].float(), given[64:].float())
    assert torch.equal(out[: expected.numel()].view_as(expected), expected)
    if kernel == "product_shared":
        assert out[64 * 128 :].isnan().all()


@pytest.mark.parametrize("kernel", ["tiles", "bulk"])
def test_the_engine_wants_whole_16_bytes(kernel):
    given = torch.zeros(2 * 192 * 64 + 8).half()
    with pytest.raises(RuntimeError, match="cuTensorMapEncodeTiled: error 1 of sizes"):
        run(kernel, given[4:])


@pytest.mark.parametrize(
    "kernel,message",
    [
        (
            "lapped",
            r"thread \(31, 0, 0\) at mbarrier_wait .* phase 0 of the barrier has ended, and 1 after it",
        ),
        ("uninitialized_barrier", "the barrier was not initialized"),
        ("unread_store", "has ended with copies from shared memory that were not waited for"),
        ("unseen_load", "has ended with copies to shared memory under way"),
        ("unseen_product", "has ended with products that were not waited for"),
        ("unaligned_tile", "the tile is not aligned to 128 bytes"),
        ("unfenced_store", r"at tma_store .* reads what thread \(1, 0, 0\) has written without fence_proxy"),
        (
            "unfenced_factor",
            r"at wgmma_shared .* reads what thread \(0, 0, 0\) has written without fence_proxy",
        ),
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
        run(kernel, torch.zeros(192, 64, dtype=torch.float16), 64 * 128)
    run("shuffles")  # and the next one is not touched by it


def test_emulated_kernels_take_cpu_tensors_only_when_asked():
    refused = cuda.refusals("cpu", torch.float32, (), ())
    assert refused == ([] if cuda.EMULATED else ["the tensors are on cpu, not on a GPU"])


def test_more_blocks_than_a_grid_has_are_an_error():
    """Rows were left out."""
    from fastgpt import _cuda_emulated

    x, rows, stride = torch.zeros(1, 8), 2**40, 8
    tensors = (x, stride, None, 0, None, None, x, None, None, x)
    with pytest.raises(RuntimeError, match=f"a grid cannot have {rows // 16} blocks"):
        _cuda_emulated.norm_forward((0, 0), rows, 8, *tensors, None, 1e-5)
