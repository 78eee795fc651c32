"""Attention over a KV cache on the CUDA kernels: what the host's checks would not let through."""

from __future__ import annotations

import pytest
import torch
from backends import AVAILABLE

from fastgpt.ops import cuda
from fastgpt.ops.decode.spec import DecodeSpec, DecodeTensors

pytestmark = [
    pytest.mark.skipif(
        "cuda" not in AVAILABLE, reason="no CUDA kernels here; FASTGPT_CUDA_EMULATE=1 emulates them"
    ),
    pytest.mark.usefixtures("device"),
]


def forward(*args):
    from fastgpt.ops.decode import cuda as module

    return module.forward(*args)


def int32(*values):
    return torch.tensor(values, dtype=torch.int32)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("page_size", [0, 4])
@pytest.mark.parametrize("lengths", [(7, 3), (100, -5)])
def test_nothing_is_written_beyond_a_cache(lengths, page_size, dtype):
    """On a GPU no length is checked: keys that have no place are left out, and negative lengths are 0."""
    capacity = 8
    memory = torch.randn(2, 4, capacity, 1, 16).to(
        dtype
    )  # of both caches, with foreign rows before and behind
    k_cache, v_cache = memory[:, 1:3]
    before = memory.clone()
    q, k, v = (torch.randn(2, 3, heads, 16).to(dtype) for heads in (2, 1, 1))
    table = None
    if page_size:
        k_cache, v_cache = (c.reshape(4, page_size, 1, 16) for c in (k_cache, v_cache))
        table = torch.tensor([[0, 1, 999], [2, 3, 999]], dtype=torch.int32)[:, :2]
    tensors = DecodeTensors(k, v, int32(*lengths), block_table=table, cache_leftpad=int32(0, -3))
    out, _ = forward(q, k_cache, v_cache, DecodeSpec(0.25, window_right=0), tensors)
    for i, new in enumerate((k, v)):
        for b, length in enumerate(lengths):
            first = min(max(length, 0), capacity)
            room = min(3, capacity - first)
            before[i, 1 + b, first : first + room] = new[b, :room]
    assert torch.equal(memory, before)
    assert out.isfinite().all()


@pytest.mark.parametrize("num_splits", [1, 3])
def test_nan_where_the_rotary_tables_end(num_splits, monkeypatch):
    """What lies behind the tables is not read, and keys that have no row there are left out."""
    # An output that is not written is not NaN by itself.
    monkeypatch.setattr(torch.Tensor, "new_empty", lambda t, *shape, **kind: t.new_full(shape, 7.0, **kind))
    k_cache, v_cache = torch.randn(2, 2, 600, 1, 16)
    q, k, v = torch.randn(2, 1, 2, 16), torch.randn(2, 1, 1, 16), torch.randn(2, 1, 1, 16)
    cos, sin = torch.randn(2, 520, 8)[:, :500]
    tensors = DecodeTensors(k, v, int32(500, 499), cos, sin)
    before = k_cache.clone()
    out, lse = forward(q, k_cache, v_cache, DecodeSpec(0.25, -1, 0, num_splits=num_splits), tensors)
    assert out[0].isnan().all() and lse[0].isnan().all()
    assert out[1].isfinite().all() and lse[1].isfinite().all()
    assert torch.equal(k_cache[0], before[0]) and not torch.equal(k_cache[1], before[1])


@pytest.mark.parametrize("codes", [torch.int8, torch.float8_e4m3fn], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("headdim", [64, 256])
def test_every_stored_value_is_read_as_torch_reads_it(headdim, dtype, codes):
    """As values and as keys: q picks one column of a key, whose score is then lse."""
    stored = torch.arange(256, dtype=torch.uint8).view(256 // headdim, 1, 1, headdim).view(codes)
    q = torch.eye(headdim, dtype=dtype).view(1, headdim, 1, headdim).expand(256 // headdim, -1, -1, -1)
    lengths = torch.ones(256 // headdim, dtype=torch.int32)
    ones = torch.ones(1)
    tensors = DecodeTensors(None, None, lengths, k_descale=ones, v_descale=ones)
    out, lse = forward(q, stored, stored, DecodeSpec(1.0), tensors)
    values = stored.float()[:, 0, 0]
    nan = values.isnan().any(1)  # 0 times it is NaN, too
    assert torch.equal(out[~nan], values[~nan, None, None].expand(-1, headdim, 1, -1).to(dtype))
    torch.testing.assert_close(lse[~nan, 0], values[~nan], rtol=1e-6, atol=0)
    assert out[nan].isnan().all() and lse[nan].isnan().all()


def test_parts_are_as_many_as_fill_the_gpu():
    half = torch.empty(0, dtype=torch.float16)

    def parts(batch, nheads_k, capacity, num_splits=0, window_left=-1):
        shape = batch, 1, 1, 4 * nheads_k, nheads_k, 128, 128, capacity
        return cuda.load().decode_parts(132, half, half, *shape, window_left, num_splits)

    assert parts(8, 8, 8192) == 4 and parts(1, 8, 131072) == 30 and parts(64, 8, 8192) == 1
    assert parts(1, 1, 64) == 1 and parts(1, 1, 640) == 5
    assert parts(1, 1, 640, num_splits=7) == 7 and parts(1, 1, 640, num_splits=1000) == 10
    assert parts(1, 1, 2**20, num_splits=9, window_left=100) == 3
