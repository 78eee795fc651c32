"""Attention over a KV cache on the CUDA kernels: what the host's checks would not let through."""

from __future__ import annotations

import random

import pytest
import torch
from backends import AVAILABLE, assert_parity

from fastgpt.ops import cuda
from fastgpt.ops.decode.spec import DecodeSpec, DecodeTensors
from fastgpt.verify.decode import DecodeCase, DecodeVariant, variant_results

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

    # All sequences' keys together, in blocks of 264 at once or in as few waves as are nine tenths full.
    assert parts(8, 8, 8192) == parts(1, 8, 131072) == parts(64, 8, 8192) == 33
    assert parts(8, 96, 8192) == 5 and parts(8, 300, 8192) == 4
    assert parts(1, 1, 64) == 1 and parts(1, 1, 640) == 5 and parts(3, 1, 640) == 15
    assert parts(1, 1, 640, num_splits=7) == 7 and parts(1, 1, 640, num_splits=1000) == 10
    assert parts(1, 1, 2**20, num_splits=9, window_left=100) == 3


def ranges(tiles, parts):
    """{range: [(sequence, first tile, end)]} as the kernel cuts sequences of so many tiles."""
    from fastgpt import _cuda_emulated

    found: dict[int, list] = {}
    for i, *part in _cuda_emulated.decode_ranges(tiles, parts):
        found.setdefault(i, []).append(tuple(part))
    return found


def draw_tiles(generator):
    batch = generator.choice([1, 2, 5, 8, 33, 50, 300])
    most = generator.choice([0, 1, 3, 100, 4000])
    return [generator.choice([0, 1, most, generator.randint(0, most)]) for _ in range(batch)]


@pytest.mark.parametrize("seed", range(40))
def test_ranges_have_equally_many_tiles(seed):
    """None has more than the mean, rounded up, and one; with more sequences than ranges, each of which counts
    as a tile, the mean of all, and one. Every tile is in one range, and each sequence without tiles."""
    generator = random.Random(seed)
    tiles, parts = draw_tiles(generator), generator.choice([1, 2, 7, 33, 264])
    found, ends, opened = ranges(tiles, parts), [0] * len(tiles), set()
    mean = -(-(sum(tiles) + len(tiles) * (len(tiles) > parts)) // parts)
    for i in sorted(found):
        assert 0 <= i < parts
        assert sum(end - begin for _, begin, end in found[i]) <= mean + 1
        for b, begin, end in found[i]:
            assert begin == ends[b] and (begin < end or (tiles[b] == 0 and b not in opened))
            ends[b] = end
            opened.add(b)
        assert all(end == tiles[b] for b, _, end in found[i][:-1])
        assert all(begin == 0 for _, begin, _ in found[i][1:])
    assert ends == tiles and len(opened) == len(tiles)


@pytest.mark.parametrize(
    "batch, parts, tiles", [(8, 33, 128), (8, 33, 4), (16, 33, 64), (1, 33, 66), (64, 33, 8)]
)
def test_equal_lengths_are_cut_equally(batch, parts, tiles):
    """As many parts of each sequence, none longer than another by more than one tile, or as many sequences in
    each range, where that gives no block more than a tile beyond the mean."""
    count = max(parts // batch, 1)
    found = ranges([tiles] * batch, parts)
    pieces = [end - begin for part in found.values() for _, begin, end in part]
    assert len(pieces) == batch * min(count, tiles)
    assert max(pieces) - min(pieces) <= 1
    assert {len(part) for part in found.values()} == {-(-batch // parts)}


def test_equal_lengths_are_not_cut_equally_for_two_tiles():
    assert len(ranges([128] * 8, 33)) == 32 and len(ranges([260] * 8, 33)) == 33


RAGGED = {
    "one long": DecodeVariant(DecodeCase(1, 0, 1400, (60, 1400, 3, 64, 0), 4, 2, 64, 64)),
    "appended": DecodeVariant(DecodeCase(1, 1, 1000, (0, 0, 999, 63, 64, 300), 4, 2, 64, 48)),
    "more sequences than ranges": DecodeVariant(
        DecodeCase(1, 1, 500, (400, 0, 3, 499, 64, 1, 130, 2, 300), 8, 2, 64, 64), sink=True
    ),
    "two of rows": DecodeVariant(DecodeCase(5, 5, 700, (600, 0, 90), 8, 2, 64, 64), sink=True),
    "window": DecodeVariant(
        DecodeCase(3, 3, 900, (890, 5, 300, 0), 4, 2, 64, 64, window=(200, 0)), sink=True
    ),
    "left padding": DecodeVariant(
        DecodeCase(1, 1, 900, (200, 800, 0), 4, 2, 64, 64), leftpad=(600, 0, 17), rotary_dim=64
    ),
    "pages": DecodeVariant(DecodeCase(1, 1, 960, (900, 0, 33, 200), 4, 2, 128, 128), page_size=16),
    "int8, pages": DecodeVariant(
        DecodeCase(2, 2, 960, (900, 0, 33, 200), 4, 1, 64, 64),
        page_size=64,
        cache_dtype=torch.int8,
        descale=(4, 1),
    ),
    "wide": DecodeVariant(DecodeCase(1, 1, 200, (190, 0, 20), 2, 1, 256, 200)),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("multiprocessors", [1, 3, 14])
@pytest.mark.parametrize("name", RAGGED)
def test_ragged_parity(name, multiprocessors, dtype, monkeypatch):
    """With more and with fewer ranges than sequences; what is not written is NaN, or the largest number."""
    monkeypatch.setattr(cuda, "multiprocessors", lambda device: multiprocessors)
    for what, *values in variant_results(RAGGED[name], "cuda", dtype):
        assert_parity(what, *values)


@pytest.mark.parametrize("name", RAGGED)
def test_ragged_parity_with_num_splits(name):
    for num_splits in (1, 5):
        variant = RAGGED[name]
        variant = variant._replace(case=variant.case._replace(num_splits=num_splits))
        for what, *values in variant_results(variant, "cuda", torch.float16):
            assert_parity(what, *values)


BLOCK_KEYS = 64  # a tile of four warps, at head dim 128 in 16 bits


@pytest.mark.parametrize("multiprocessors", [1, 2, 9, 40])
@pytest.mark.parametrize(
    "lengths", [(900, 0, 64, 65, 1000, 1), (1000,), (512,) * 6, (70, 3, 400) * 4, (0, 0, 30, 0, 0)]
)
def test_the_kernel_cuts_as_the_ranges_say(lengths, multiprocessors, monkeypatch):
    """Which sequences are to be merged, of which parts; and the parts of those alone are written."""
    monkeypatch.setattr(cuda, "multiprocessors", lambda device: multiprocessors)
    buffers, new_empty = {}, torch.Tensor.new_empty

    def record(t, *shape, dtype=None):
        kind = "out" if dtype is None else "cuts" if dtype == torch.int32 else len(shape)
        buffers[kind] = new_empty(t, *shape, dtype=dtype or t.dtype)
        return buffers[kind].fill_(2) if kind == "cuts" else buffers[kind]

    monkeypatch.setattr(torch.Tensor, "new_empty", record)
    q, cache = torch.randn(len(lengths), 1, 2, 128).half(), torch.randn(2, len(lengths), 1000, 1, 128).half()
    forward(q, *cache, DecodeSpec(0.1), DecodeTensors(None, None, int32(*lengths)))
    parts = len(buffers[3]) // 2
    expected, written = {}, set()
    for i, found in ranges([-(-n // BLOCK_KEYS) for n in lengths], parts).items():
        for b, begin, end in found:
            if end - begin < -(-lengths[b] // BLOCK_KEYS):
                expected.setdefault(b, []).append(i)
                written.add(i if begin else parts + i)
    cuts = {b: list(range(first, first + n)) for b, first, n in buffers["cuts"].tolist() if n > 1}
    assert cuts == expected
    for buffer in (buffers[3], buffers[4]):
        assert set(buffer.isfinite().flatten(1).all(1).nonzero().flatten().tolist()) == written
        assert buffer.isfinite().flatten(1).any(1).sum() == len(written)


@pytest.mark.parametrize("batch", [129, 300])
def test_more_sequences_than_threads(batch, monkeypatch):
    """Of which a thread sums up several."""
    monkeypatch.setattr(cuda, "multiprocessors", lambda device: 5)
    lengths = int32(*(37 * b % 150 for b in range(batch - 1)), 150)
    q, cache = torch.randn(batch, 1, 1, 64).half(), torch.randn(2, batch, 150, 1, 64).half()
    tensors = DecodeTensors(None, None, lengths)
    ranged, uncut = (forward(q, *cache, DecodeSpec(0.1, num_splits=n), tensors) for n in (0, 1))
    torch.testing.assert_close(ranged[0], uncut[0], rtol=0, atol=2e-3)
    torch.testing.assert_close(ranged[1], uncut[1], rtol=0, atol=1e-4)


@pytest.mark.parametrize("num_splits", [1, 2, 5])
def test_same_bits_in_any_batch_with_num_splits(num_splits, monkeypatch):
    """On any GPU: neither the other lengths nor the number of multiprocessors matter."""
    lengths = int32(700, 0, 64, 130, 1)
    q, cache = torch.randn(5, 2, 4, 64).half(), torch.randn(2, 5, 800, 2, 64).half()
    k, v = torch.randn(2, 5, 2, 2, 64).half()

    def run(multiprocessors, rows):
        monkeypatch.setattr(cuda, "multiprocessors", lambda device: multiprocessors)
        spec = DecodeSpec(0.1, 300, 0, num_splits=num_splits)
        tensors = DecodeTensors(k[rows], v[rows], lengths[rows])
        return forward(q[rows], *cache[:, rows].clone(), spec, tensors)

    together = run(2, slice(None))
    for b in range(5):
        for whole, alone in zip(together, run(40, slice(b, b + 1)), strict=True):
            assert torch.equal(whole[b : b + 1], alone)


def test_same_bits_in_ranges_of_the_same_lengths():
    """Twice the same call, with num_splits = 0, in the same buffers that something else has used."""
    q, cache = torch.randn(5, 1, 4, 64).half(), torch.randn(2, 5, 800, 2, 64).half()
    results = []
    for lengths in ((700, 0, 64, 130, 1), (1, 800, 800, 0, 90), (700, 0, 64, 130, 1)):
        tensors = DecodeTensors(None, None, int32(*lengths))
        results.append(forward(q, *cache, DecodeSpec(0.1), tensors))
    assert all(torch.equal(a, b) for a, b in zip(results[0], results[2], strict=True))
