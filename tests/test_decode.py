"""Attention over a KV cache: every backend, the common cases, one parity rule."""

from __future__ import annotations

import pytest
import torch
from backends import AVAILABLE, DTYPES, assert_parity
from cases import DECODE, DECODE_VARIANTS, DecodeCase

import fastgpt
from fastgpt.ops.decode.spec import DecodeSpec, DecodeTensors
from fastgpt.verify.decode import make, options, plain, variant_results

CASES = [pytest.param(case, id=str(case)) for case in DECODE]
WITH_LSE = [name for name in AVAILABLE if name != "torch"]
KERNELS = [name for name in WITH_LSE if name != "reference"]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("backend", WITH_LSE)
@pytest.mark.parametrize("case", CASES)
def test_parity(case: DecodeCase, backend, dtype):
    q, k_cache, v_cache, k, v, lengths = make(case, dtype)
    before = [t.clone() for t in (k_cache, v_cache)]
    out, lse = fastgpt.attention_with_kvcache(
        q, k_cache, v_cache, k, v, cache_seqlens=lengths, return_lse=True, backend=backend, **options(case)
    )
    exact = plain(case, torch.float64, q, *before, k, v, lengths)
    rough = plain(case, dtype, q, *before, k, v, lengths)
    assert_parity("out", out, rough[0], exact[0])
    assert_parity("lse", lse, rough[1], exact[1])
    assert lengths.tolist() == list(case.lengths)
    for cache, old, new in ((k_cache, before[0], k), (v_cache, before[1], v)):
        for b, length in enumerate(case.lengths):
            if new is not None:
                old[b, length : length + case.appended] = new[b]
        assert torch.equal(cache.nan_to_num(7e3), old.nan_to_num(7e3))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("backend", WITH_LSE)
@pytest.mark.parametrize("name", DECODE_VARIANTS)
def test_variant_parity(name, backend, dtype):
    for what, *values in variant_results(DECODE_VARIANTS[name], backend, dtype):
        assert_parity(what, *values)


@pytest.mark.parametrize("case", CASES)
def test_torch_backend(case: DecodeCase):
    q, k_cache, v_cache, k, v, lengths = make(case, torch.float64)
    exact = plain(case, torch.float64, q, k_cache, v_cache, k, v, lengths)[0]
    got = fastgpt.attention_with_kvcache(
        q, k_cache, v_cache, k, v, cache_seqlens=lengths, backend="torch", **options(case)
    )
    torch.testing.assert_close(got, exact)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("num_splits", [0, 3])
def test_same_bits_at_any_thread_count_and_in_any_batch(num_splits, dtype):
    case = DecodeCase(1, 1, 2000, (1999, 30, 700), 6, 2, 64, 64, num_splits=num_splits)
    inputs = make(case, dtype)

    def f(rows=slice(None)):
        q, k_cache, v_cache, k, v, lengths = (t[rows].clone() for t in inputs)
        return fastgpt.attention_with_kvcache(
            q,
            k_cache,
            v_cache,
            k,
            v,
            cache_seqlens=lengths,
            return_lse=True,
            backend="cpu",
            num_splits=num_splits,
        )

    threads = torch.get_num_threads()
    try:
        results = []
        for n in (1, 2, 7):
            torch.set_num_threads(n)
            results.append(f())
    finally:
        torch.set_num_threads(threads)
    alone = f(slice(2, 3))
    for one, two, seven, single in zip(*results, alone, strict=True):
        assert torch.equal(one, two) and torch.equal(one, seven) and torch.equal(one[2:3], single)


@pytest.mark.parametrize("backend", KERNELS)
@pytest.mark.parametrize("num_splits", [1, 3])
def test_same_bits_in_any_batch(num_splits, backend):
    case = DecodeCase(2, 2, 400, (390, 3, 130), 4, 2, 24, 24)
    inputs = make(case, torch.float32)

    def f(rows=slice(None)):
        q, k_cache, v_cache, k, v, lengths = (t[rows].clone() for t in inputs)
        options = {"num_splits": num_splits, "return_lse": True, "backend": backend}
        return fastgpt.attention_with_kvcache(q, k_cache, v_cache, k, v, cache_seqlens=lengths, **options)

    for together, alone in zip(f(), f(slice(2, 3)), strict=True):
        assert torch.equal(together[2:3], alone)


@pytest.mark.parametrize("scale", [1e9, -1e30])
def test_reference_of_large_scores(scale):
    """Whose lse has no digits left for log(n): equal keys give the mean of their values."""
    q, cache, v = torch.ones(1, 1, 2, 8), torch.ones(1, 8, 2, 8), torch.randn(1, 8, 2, 8)
    for sink, share in ((None, 1), (torch.full((2,), 8 * scale), 8 / 9)):
        out = fastgpt.attention_with_kvcache(
            *(q, cache, v), cache_seqlens=8, softmax_scale=scale, sink=sink, backend="reference"
        )
        torch.testing.assert_close(out, share * v.mean(1, keepdim=True))


@pytest.mark.parametrize("backend", KERNELS)
@pytest.mark.parametrize("batch, seqlen_q", [(0, 1), (1, 0)])
def test_a_call_without_queries(batch, seqlen_q, backend):
    """An empty one: it divided by the number of rows. What it appends is written all the same."""
    q, cache = torch.randn(batch, seqlen_q, 4, 16), torch.randn(2, batch, 8, 2, 16)
    out = fastgpt.attention_with_kvcache(q, *cache, cache_seqlens=8, backend=backend)
    assert out.shape == q.shape
    k, v = torch.randn(2, batch, 3, 2, 16)
    out = fastgpt.attention_with_kvcache(q, *cache, k, v, cache_seqlens=5, backend=backend)
    assert out.shape == q.shape and torch.equal(cache[0, :, 5:], k) and torch.equal(cache[1, :, 5:], v)


@pytest.mark.skipif("triton" not in AVAILABLE, reason="Triton is not available")
@pytest.mark.parametrize("page_size", [0, 4])
def test_triton_writes_nothing_beyond_a_full_cache(page_size):
    """On a GPU no length is checked: keys that have no place are left out."""
    module = pytest.importorskip("fastgpt.ops.decode.triton")
    lengths, capacity = [7, 3], 8
    memory = torch.randn(2, 4, capacity, 1, 16)  # of both caches, with foreign rows before and behind
    k_cache, v_cache = memory[:, 1:3]
    before = memory.clone()
    q, k, v = torch.randn(2, 3, 2, 16), torch.randn(2, 3, 1, 16), torch.randn(2, 3, 1, 16)
    table = None
    if page_size:
        k_cache, v_cache = (c.reshape(4, page_size, 1, 16) for c in (k_cache, v_cache))
        table = torch.tensor([[0, 1, 999], [2, 3, 999]], dtype=torch.int32)[:, :2]
    tensors = DecodeTensors(k, v, torch.tensor(lengths, dtype=torch.int32), block_table=table)
    out, _ = module.forward(q, k_cache, v_cache, DecodeSpec(0.25, window_right=0), tensors)
    expected = before.clone()
    for i, new in enumerate((k, v)):
        for b, length in enumerate(lengths):
            room = min(3, capacity - length)
            expected[i, 1 + b, length : length + room] = new[b, :room]
    assert torch.equal(memory, expected)
    assert out.isfinite().all()


@pytest.mark.skipif("triton" not in AVAILABLE, reason="Triton is not available")
@pytest.mark.parametrize("num_splits", [1, 3])
def test_triton_gives_nan_where_the_rotary_tables_end(num_splits, monkeypatch):
    """On a GPU no length is checked: what lies behind the tables is not read, and keys that have no row there
    are left out."""
    module = pytest.importorskip("fastgpt.ops.decode.triton")
    # An output that is not written is not NaN by itself.
    monkeypatch.setattr(torch.Tensor, "new_empty", lambda t, *shape, **kind: t.new_full(shape, 7.0, **kind))
    k_cache, v_cache = torch.randn(2, 2, 600, 1, 16)
    q, k, v = torch.randn(2, 1, 2, 16), torch.randn(2, 1, 1, 16), torch.randn(2, 1, 1, 16)
    cos, sin = torch.randn(2, 520, 8)[:, :500]
    tensors = DecodeTensors(k, v, torch.tensor([500, 499], dtype=torch.int32), cos, sin)
    before = k_cache.clone()
    out, lse = module.forward(q, k_cache, v_cache, DecodeSpec(0.25, -1, 0, num_splits=num_splits), tensors)
    assert out[0].isnan().all() and lse[0].isnan().all()
    assert out[1].isfinite().all() and lse[1].isfinite().all()
    assert torch.equal(k_cache[0], before[0]) and not torch.equal(k_cache[1], before[1])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("cache_dtype", [None, torch.int8, torch.float8_e4m3fn], ids=str)
@pytest.mark.parametrize("backend", KERNELS)
def test_an_append_stores_what_reference_stores(backend, cache_dtype, dtype):
    """Bit by bit: ties, numbers that saturate, that round to 0 and to less than the least normal number. The
    rotation is by quarter turns, which no arithmetic rounds."""
    new, dim = 40, 64
    k, v = ((torch.randn(2, 1, new, 2, dim) * torch.randint(-9, 9, (new, 1, dim)).float().exp2()) * 8).to(
        dtype
    )
    k[:, ::2] = torch.randint(-2000, 2000, k[:, ::2].shape) / 8  # ties
    v[:, 1::2] = (torch.randint(-40, 40, v[:, 1::2].shape) * 2.0**-11).to(dtype)
    v[:, 2, :, :4] = torch.tensor([0.0, -0.0, -300.0, 5e4]).to(dtype)
    turns = torch.randint(4, (60, 8))
    table = torch.tensor([1.0, 0.0, -1.0, 0.0])
    scale = {"k_descale": torch.tensor([0.25, 0.3]), "v_descale": torch.tensor([0.5, 0.9])}
    caches = []
    for name in ("reference", backend):
        cache = [torch.zeros(1, 60, 2, dim).to(cache_dtype or dtype) for _ in range(2)]
        fastgpt.attention_with_kvcache(
            torch.zeros(1, 1, 2, dim, dtype=dtype),
            *cache,
            k,
            v,
            cache_seqlens=7,
            rotary_cos=table[turns],
            rotary_sin=table[turns - 1],
            rotary_interleaved=dtype == torch.float16,
            **(scale if cache_dtype else {}),
            backend=name,
        )
        caches.append([c.view(torch.uint8) for c in cache])
    for expected, got in zip(*caches, strict=True):
        assert torch.equal(expected, got)


@pytest.mark.parametrize("backend", AVAILABLE)
def test_steps_of_a_cache_equal_one_pass(backend):
    q = torch.randn(2, 40, 4, 16)
    k, v = torch.randn(2, 40, 2, 16), torch.randn(2, 40, 2, 16)
    cache = fastgpt.KVCache(2, 2, 40, 2, 16)
    outs, done = [], 0
    for step in (7, 1, 1, 30, 1):
        rows = slice(done, done + step)
        outs.append(cache.attend(1, q[:, rows], k[:, rows], v[:, rows], backend=backend))
        cache.advance(step)
        done += step
    torch.testing.assert_close(torch.cat(outs, dim=1), fastgpt.attention(q, k, v, backend="reference"))
    with pytest.raises(ValueError, match=r"cache_seqlens: got \[40, 40\], expected 0 to 39"):
        cache.attend(0, q[:, :1], k[:, :1], v[:, :1], backend=backend)
    cache.truncate(8)
    assert cache.seqlens.tolist() == [8, 8]
    again = cache.attend(1, q[:, 8:10], k[:, 8:10], v[:, 8:10], backend=backend)
    torch.testing.assert_close(again, torch.cat(outs, dim=1)[:, 8:10])


@pytest.mark.parametrize("backend", WITH_LSE)
def test_opcheck(backend):
    q, k_cache, v_cache, k, v, lengths = make(DecodeCase(1, 1, 20, (3, 9), 4, 2, 8, 8), torch.float32, fill=0)
    args = (q, k_cache, v_cache, *DecodeTensors(k, v, lengths), *DecodeSpec(0.3, -1, 0), backend)
    torch.library.opcheck(torch.ops.fastgpt.attention_kvcache.default, args)


@pytest.mark.parametrize("backend", WITH_LSE)
def test_opcheck_of_every_option(backend):
    q, k, v = (torch.randn(2, 1, heads, 8) for heads in (4, 2, 2))
    caches = [torch.randint(-100, 100, (5, 16, 2, 8), dtype=torch.int8) for _ in range(2)]
    tensors = DecodeTensors(
        k,
        v,
        torch.tensor([3, 17], dtype=torch.int32),
        rotary_cos=torch.rand(40, 4),
        rotary_sin=torch.rand(40, 4),
        cache_leftpad=torch.tensor([0, 5], dtype=torch.int32),
        block_table=torch.tensor([[0, 1], [4, 2]], dtype=torch.int32),
        alibi_slopes=torch.rand(2, 4),
        sink=torch.randn(4),
        k_descale=torch.rand(2),
        v_descale=torch.rand(2),
    )
    args = (q, *caches, *tensors, *DecodeSpec(0.3, 9, 0, 5.0, True, 2), backend)
    torch.library.opcheck(torch.ops.fastgpt.attention_kvcache.default, args)


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("backend", AVAILABLE)
def test_compile_fullgraph(backend, dynamic):
    @torch.no_grad()
    def f(q, k_cache, v_cache, k, v, lengths):
        return fastgpt.attention_with_kvcache(
            q.sin(), k_cache, v_cache, k, v, cache_seqlens=lengths, backend=backend
        )

    torch._dynamo.reset()
    compiled = torch.compile(f, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    inputs = make(DecodeCase(1, 1, 20, (3, 9), 4, 2, 8, 8), torch.float32, fill=0)
    copies = [t.clone() for t in inputs]
    torch.testing.assert_close(compiled(*inputs), f(*copies))
    for a, b in zip(inputs, copies, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("dynamic", [None, True])
def test_compile_with_numbers_that_vary(dynamic):
    @torch.no_grad()
    def f(q, cache, softcap, window, num_splits):
        return fastgpt.attention_with_kvcache(
            q,
            *cache,
            cache_seqlens=20,
            softcap=softcap,
            window_size=(window, -1),
            num_splits=num_splits,
            backend="cpu",
        )

    torch._dynamo.reset()
    compiled = torch.compile(f, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    q, cache = torch.randn(1, 1, 4, 8), torch.randn(2, 1, 30, 2, 8)
    for numbers in ((5.0, 4, 1), (7.0, 3, 2), (0.0, -1, 0)):
        torch.testing.assert_close(compiled(q, cache, *numbers), f(q, cache, *numbers))


GOOD = DecodeCase(1, 1, 20, (3, 9), 4, 2, 8, 8)


def bad(**changes):
    q, k_cache, v_cache, k, v, lengths = make(GOOD, torch.float32, fill=0)
    arguments = {"q": q, "k_cache": k_cache, "v_cache": v_cache, "k": k, "v": v, "cache_seqlens": lengths}
    arguments.update(changes)
    caches = arguments["k_cache"], arguments["v_cache"]
    before = [t.clone() for t in caches]
    try:
        fastgpt.attention_with_kvcache(**arguments)
    finally:
        for cache, old in zip(caches, before, strict=True):
            assert torch.equal(cache, old), "a refused call wrote to the cache"


def int32(*values):
    return torch.tensor(values, dtype=torch.int32)


BAD_INPUT = {
    "overflow": (
        {"cache_seqlens": int32(3, 20)},
        ValueError,
        r"cache_seqlens: got \[3, 20\], expected 0 to 19",
    ),
    "negative": ({"cache_seqlens": int32(-1, 3)}, ValueError, r"cache_seqlens: got \[-1, 3\], expected 0 to"),
    "int overflow": ({"cache_seqlens": 25}, ValueError, r"cache_seqlens: got \[25, 25\]"),
    "int32 overflow": ({"cache_seqlens": int32(2**31 - 1, 3)}, ValueError, "cache_seqlens: got .2147483647"),
    "lengths' dtype": ({"cache_seqlens": torch.tensor([3, 9])}, ValueError, "cache_seqlens: got torch.int64"),
    "lengths' shape": (
        {"cache_seqlens": int32(3)},
        ValueError,
        r"cache_seqlens: .*\(1,\), expected torch.int32 \(batch\), batch 2",
    ),
    "lengths' type": ({"cache_seqlens": 3.0}, TypeError, "cache_seqlens: got float"),
    "k without v": ({"v": None}, ValueError, "v: got None, expected k and v together"),
    "v without k": ({"k": None}, ValueError, "k: got None, expected k and v together"),
    "new heads": (
        {"k": torch.randn(2, 1, 4, 8), "v": torch.randn(2, 1, 4, 8)},
        ValueError,
        r"k: got shape \(2, 1, 4, 8\), expected \(2, 1, 2, 8\)",
    ),
    "new dtype": ({"k": torch.randn(2, 1, 2, 8).half()}, TypeError, "k: got dtype torch.float16"),
    "cache's rank": ({"k_cache": torch.randn(20, 2, 8)}, ValueError, "k_cache: got shape"),
    "cache's batch": (
        {"k_cache": torch.zeros(3, 20, 2, 8), "v_cache": torch.zeros(3, 20, 2, 8)},
        ValueError,
        "k_cache: got batch 3, expected 2 like q",
    ),
    "cache's dtype": (
        {"v_cache": torch.zeros(2, 20, 2, 8).half()},
        TypeError,
        "v_cache: got dtype torch.float16",
    ),
    "one place for two": (
        {"k_cache": torch.zeros(1, 20, 2, 8).expand(2, -1, -1, -1)},
        ValueError,
        "k_cache: got strides .*expected no 0",
    ),
    "int beyond int32": ({"cache_seqlens": 2**31}, ValueError, "cache_seqlens: got 2147483648"),
    "splits": ({"num_splits": -1}, ValueError, "num_splits: got -1"),
    "splits' type": ({"num_splits": 1.5}, TypeError, "num_splits: got 1.5"),
    "scale": ({"softmax_scale": float("nan")}, ValueError, "softmax_scale: got nan"),
    "gradient": ({"q": torch.randn(2, 1, 4, 8, requires_grad=True)}, RuntimeError, "no backward"),
    "softcap": ({"softcap": -1.0}, ValueError, "softcap: got -1"),
    "index's range": (
        {"cache_batch_idx": int32(0, 2)},
        ValueError,
        r"cache_batch_idx: got \[0, 2\].* 0 to 1",
    ),
    "index twice": ({"cache_batch_idx": int32(1, 1)}, ValueError, "cache_batch_idx: .*no index twice"),
    "padding": ({"cache_leftpad": int32(0, 10)}, ValueError, r"cache_leftpad: got \[0, 10\]"),
    "padding's dtype": (
        {"cache_leftpad": torch.tensor([0, 1])},
        ValueError,
        "cache_leftpad: got torch.int64",
    ),
    "padding's type": ({"cache_leftpad": 3}, TypeError, "cache_leftpad: got int"),
    "block": (
        {"block_table": int32(0, 1, 2, 0).view(2, 2)},
        ValueError,
        "block_table: got blocks 2 to 2 for sequence 1, expected 0 to 1",
    ),
    "block written twice": (
        {"block_table": int32(0, 1, 0, 1).view(2, 2)},
        ValueError,
        "block_table: got a block into which the new keys of two places go",
    ),
    "table's rank": (
        {"block_table": int32(0, 1)},
        ValueError,
        r"block_table: .*expected .*\(batch, blocks\)",
    ),
    "table and index": (
        {"block_table": int32(0, 1).view(2, 1), "cache_batch_idx": int32(0, 1)},
        ValueError,
        "cache_batch_idx: got a tensor, expected None with a block_table",
    ),
    "slopes": (
        {"alibi_slopes": torch.rand(3)},
        ValueError,
        r"alibi_slopes: got shape \(3,\), expected \(4,\)",
    ),
    "sink": ({"sink": torch.rand(2, 4)}, ValueError, r"sink: got shape \(2, 4\), expected \(4,\)"),
    "scale without need": (
        {"k_descale": torch.rand(2)},
        ValueError,
        "k_descale: got a tensor, expected None",
    ),
    "scale missing": (
        {
            "k_cache": torch.zeros(2, 20, 2, 8, dtype=torch.int8),
            "v_cache": torch.zeros(2, 20, 2, 8, dtype=torch.int8),
            "k_descale": torch.rand(2),
        },
        ValueError,
        "v_descale: got None, expected a tensor",
    ),
    "two cache dtypes": (
        {"k_cache": torch.zeros(2, 20, 2, 8, dtype=torch.int8)},
        TypeError,
        "v_cache: got dtype torch.float32, expected torch.int8 like k_cache",
    ),
    "rotary alone": ({"rotary_cos": torch.rand(30, 4)}, ValueError, "rotary_sin: got None"),
    "rotary without keys": (
        {"rotary_cos": torch.rand(30, 4), "rotary_sin": torch.rand(30, 4), "k": None, "v": None},
        ValueError,
        "rotary_cos: got a tensor, expected None without new keys",
    ),
    "rotary too wide": (
        {"rotary_cos": torch.rand(30, 5), "rotary_sin": torch.rand(30, 5)},
        ValueError,
        r"rotary_cos: got shape \(30, 5\)",
    ),
    "rotary too short": (
        {"rotary_cos": torch.rand(9, 4), "rotary_sin": torch.rand(9, 4)},
        ValueError,
        "rotary_cos: got 9 positions, expected at least 10",
    ),
    "lengths beyond int32 in pages": (
        {
            "k_cache": torch.zeros(2, 1 << 16, 2, 8),
            "v_cache": torch.zeros(2, 1 << 16, 2, 8),
            "block_table": torch.zeros(2, (1 << 15) + 1, dtype=torch.int32),
            "cache_seqlens": int32(2**31 - 1, 0),
        },
        ValueError,
        "cache_seqlens: got .2147483647, 0., expected 0 to 2147483646",
    ),
    "empty pages": (
        {
            "k_cache": torch.zeros(3, 0, 2, 8),
            "v_cache": torch.zeros(3, 0, 2, 8),
            "block_table": int32(0, 0).view(2, 1),
        },
        ValueError,
        "k_cache: got page_size 0",
    ),
    "one cache for both": (
        (lambda cache: {"k_cache": cache, "v_cache": cache})(torch.zeros(2, 20, 2, 8)),
        ValueError,
        "v_cache: got the memory of k_cache",
    ),
    "a table's gradient": (
        {"rotary_cos": torch.rand(30, 4, requires_grad=True), "rotary_sin": torch.rand(30, 4)},
        RuntimeError,
        "no backward",
    ),
    "rotary's style": ({"rotary_interleaved": 1}, TypeError, "rotary_interleaved: got 1"),
}


@pytest.mark.parametrize("name", BAD_INPUT)
def test_bad_input_writes_nothing(name):
    changes, error, message = BAD_INPUT[name]
    q, k_cache, v_cache, k, v, lengths = make(GOOD, torch.float32, fill=0)
    fastgpt.attention_with_kvcache(q, k_cache, v_cache, k, v, cache_seqlens=lengths)
    for _ in range(2):  # neither what passed the checks before nor what did not hides it
        with pytest.raises(error, match=message):
            bad(**changes)


def test_bad_cache_sizes():
    with pytest.raises(ValueError, match="capacity: got 0"):
        fastgpt.KVCache(1, 1, 0, 1, 8)
    with pytest.raises(ValueError, match="headdim_v: got 0"):
        fastgpt.KVCache(1, 1, 8, 1, 8, headdim_v=0)
    with pytest.raises(ValueError, match=r"batch: got 1\.5"):
        fastgpt.KVCache(1, 1.5, 8, 1, 8)
    with pytest.raises(TypeError, match=r"dtype: got torch.int8"):
        fastgpt.KVCache(1, 1, 8, 1, 8, dtype=torch.int8)
    cache = fastgpt.KVCache(1, 1, 8, 1, 8)
    with pytest.raises(ValueError, match="tokens: got 9, expected 0 to 8"):
        cache.truncate(9)
    cache.advance(5)
    for tokens in (4, -1):
        with pytest.raises(ValueError, match=f"tokens: got {tokens}, expected 0 to 3"):
            cache.advance(tokens)
    x = torch.randn(1, 1, 1, 8)
    for layer in (1, -1):
        with pytest.raises(ValueError, match=f"layer: got {layer}, expected 0 to 0"):
            cache.attend(layer, x, x, x)


def test_a_cache_passes_its_options_on():
    cache = fastgpt.KVCache(1, 1, 50, 2, 8)
    q, k, v = torch.randn(1, 40, 4, 8), torch.randn(1, 40, 2, 8), torch.randn(1, 40, 2, 8)
    out = cache.attend(0, q, k, v, window_size=(7, 0), softmax_scale=0.9)
    expected = fastgpt.attention(q, k, v, window_size=(7, 0), softmax_scale=0.9, backend="reference")
    torch.testing.assert_close(out, expected)


@pytest.mark.parametrize("backend", AVAILABLE)
def test_autograd_sees_that_the_cache_has_changed(backend):
    q, k_cache, v_cache, k, v, lengths = make(GOOD, torch.float32, fill=0)
    w = torch.randn(8, requires_grad=True)
    loss = (w * k_cache).sum()
    with torch.no_grad():
        fastgpt.attention_with_kvcache(q, k_cache, v_cache, k, v, cache_seqlens=lengths, backend=backend)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()
    with torch.inference_mode():
        fastgpt.attention_with_kvcache(
            *(t.clone() for t in (q, k_cache, v_cache, k, v)), cache_seqlens=lengths, backend=backend
        )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("backend", KERNELS)
def test_every_stored_fp8_value_is_read_as_torch_reads_it(backend, dtype):
    codes = torch.tensor([c for c in range(256) if c & 0x7F != 0x7F], dtype=torch.uint8)
    values = codes.view(torch.float8_e4m3fn).view(1, 1, 1, -1)
    q, k = torch.zeros(1, 1, 1, 1, dtype=dtype), torch.zeros(1, 1, 1, 1).to(torch.float8_e4m3fn)
    one = torch.ones(1)

    def read():
        return fastgpt.attention_with_kvcache(
            q, k, values, cache_seqlens=1, k_descale=one, v_descale=one, backend=backend
        )

    assert torch.equal(read(), values.to(dtype))
    if backend == "cpu" and torch.set_flush_denormal(True):
        try:
            flushed = read()
        finally:
            torch.set_flush_denormal(False)
        assert torch.equal(flushed, values.to(dtype))


def test_an_append_bumps_the_version_of_either_cache():
    q = torch.randn(1, 1, 2, 8)
    with torch.inference_mode():
        inference = torch.zeros(1, 4, 2, 8)
    usual = torch.zeros(1, 4, 2, 8)
    before = usual._version
    with torch.no_grad():
        fastgpt.attention_with_kvcache(q, inference, usual, q, q, cache_seqlens=0)
    assert usual._version == before + 1


@pytest.mark.parametrize("sq", [1, 5, 30])
def test_same_bits_of_every_option_at_any_thread_count(sq):
    q, k, v = torch.randn(3, sq, 8, 64), torch.randn(3, sq, 2, 64), torch.randn(3, sq, 2, 64)
    caches = [torch.randint(-100, 100, (64, 16, 2, 64), dtype=torch.int8) for _ in range(2)]
    arguments = {
        "cache_seqlens": int32(200, 0, 77),
        "block_table": torch.randperm(64)[:60].view(3, 20).int(),
        "k_descale": torch.rand(2) / 50,
        "v_descale": torch.rand(2) / 50,
        "rotary_cos": torch.rand(320, 32),
        "rotary_sin": torch.rand(320, 32),
        "sink": torch.randn(8),
        "softcap": 5.0,
        "backend": "cpu",
    }
    results, threads = [], torch.get_num_threads()
    try:
        for n in (1, 2, 5):
            torch.set_num_threads(n)
            own = [c.clone() for c in caches]
            results.append([fastgpt.attention_with_kvcache(q, *own, k, v, **arguments), *own])
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))
