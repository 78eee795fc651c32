"""flash-attn's interface: its signatures, its meaning, and how it is installed under its name."""

from __future__ import annotations

import inspect
import subprocess
import sys
import textwrap

import pytest
import torch

import fastgpt
from fastgpt.integrations import flash_attn, flash_attn_3
from fastgpt.integrations.flash_attn.bert_padding import (
    index_first_axis,
    index_put_first_axis,
    pad_input,
    unpad_input,
    unpad_input_for_concatenated_sequences,
)
from fastgpt.integrations.flash_attn.layers.rotary import RotaryEmbedding, apply_rotary_emb
from fastgpt.integrations.flash_attn.ops.triton.layer_norm import RMSNorm, layer_norm_fn, rms_norm_fn
from fastgpt.verify.attention import plain_attention

_PLAIN = "dropout_p softmax_scale causal window_size softcap alibi_slopes deterministic return_attn_probs"
_EDGES = "cu_seqlens_q cu_seqlens_k max_seqlen_q max_seqlen_k"
# Of flash-attn 2.8, in their order.
SIGNATURES = {
    "flash_attn_func": f"q k v {_PLAIN}",
    "flash_attn_qkvpacked_func": f"qkv {_PLAIN}",
    "flash_attn_kvpacked_func": f"q kv {_PLAIN}",
    "flash_attn_varlen_func": f"q k v {_EDGES} {_PLAIN} block_table",
    "flash_attn_varlen_qkvpacked_func": f"qkv cu_seqlens max_seqlen {_PLAIN}",
    "flash_attn_varlen_kvpacked_func": f"q kv {_EDGES} {_PLAIN}",
    "flash_attn_with_kvcache": (
        "q k_cache v_cache k v rotary_cos rotary_sin cache_seqlens cache_batch_idx cache_leftpad "
        "block_table softmax_scale causal window_size softcap rotary_interleaved alibi_slopes num_splits "
        "return_softmax_lse"
    ),
}
DEFAULTS = {
    "dropout_p": 0.0,
    "causal": False,
    "window_size": (-1, -1),
    "softcap": 0.0,
    "rotary_interleaved": True,
    "num_splits": 0,
    "deterministic": False,
    "return_attn_probs": False,
    "return_softmax_lse": False,
}

_SCALES = "q_descale k_descale v_descale"
_LAST = (
    f"softmax_scale causal qv {_SCALES} window_size attention_chunk softcap num_splits pack_gqa deterministic"
)
# Of flash-attn 3.
SIGNATURES_3 = {
    "flash_attn_func": f"q k v {_LAST} sm_margin return_attn_probs",
    "flash_attn_varlen_func": f"q k v {_EDGES} seqused_q seqused_k {_LAST} sm_margin return_attn_probs",
    "flash_attn_with_kvcache": (
        "q k_cache v_cache k v qv rotary_cos rotary_sin cache_seqlens cache_batch_idx cache_leftpad "
        "page_table cu_seqlens_q cu_seqlens_k_new max_seqlen_q rotary_seqlens "
        f"{_SCALES} softmax_scale causal window_size attention_chunk softcap rotary_interleaved "
        "scheduler_metadata num_splits pack_gqa sm_margin return_softmax_lse"
    ),
}


@pytest.mark.parametrize("name", SIGNATURES_3)
def test_signatures_of_flash_attn_3(name):
    parameters = inspect.signature(getattr(flash_attn_3, name)).parameters
    assert list(parameters) == SIGNATURES_3[name].split()
    defaults = DEFAULTS | {"attention_chunk": 0, "sm_margin": 0, "num_splits": int("kvcache" not in name)}
    for parameter in parameters.values():
        if parameter.default is not inspect.Parameter.empty:
            assert parameter.default == defaults.get(parameter.name)


@pytest.mark.parametrize("name", SIGNATURES)
def test_signatures(name):
    parameters = inspect.signature(getattr(flash_attn, name)).parameters
    assert list(parameters) == SIGNATURES[name].split()
    required = {"q", "k", "v", "kv", "qkv", "k_cache", "v_cache", "cu_seqlens", "max_seqlen", *_EDGES.split()}
    for parameter in parameters.values():
        optional = name == "flash_attn_with_kvcache" and parameter.name in ("k", "v")
        if parameter.name in required and not optional:
            assert parameter.default is inspect.Parameter.empty
        else:
            assert parameter.default == DEFAULTS.get(parameter.name)


def _qkv(*lead, nheads=4, nheads_k=2, headdim=24, headdim_v=None):
    shapes = ((nheads, headdim), (nheads_k, headdim), (nheads_k, headdim_v or headdim))
    return tuple(torch.randn(*lead, *shape, dtype=torch.float64).requires_grad_() for shape in shapes)


def _assert_same(call, plain, leaves):
    """The same results and the same gradients of a float32 call as of a float64 one."""
    got = call(*(t.float() for t in leaves))
    exact = plain(*leaves)
    torch.testing.assert_close(got.double(), exact, rtol=1e-4, atol=1e-5)
    dout = torch.randn_like(exact)
    ours, theirs = (torch.autograd.grad(out, leaves, dout.to(out.dtype)) for out in (got, exact))
    for mine, its in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, its, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("window", [(-1, -1), [9, 0], torch.tensor([5, -7])], ids=["none", "list", "tensor"])
def test_dense(causal, window):
    left, right = (max(int(n), -1) for n in window)
    slopes = torch.rand(4)

    def call(q, k, v):
        return flash_attn.flash_attn_func(
            q, k, v, 0.0, 0.3, causal, window, softcap=3.0, alibi_slopes=slopes, deterministic=True
        )

    def plain(q, k, v):
        return plain_attention(q, k, v, causal, (left, right), 0.3, 3.0, slopes.double())[0]

    _assert_same(call, plain, _qkv(2, 37, headdim_v=12))


def test_packed_tensors_are_read_where_they_are():
    qkv = torch.randn(2, 31, 3, 4, 24, requires_grad=True)
    kv = torch.randn(2, 31, 2, 2, 24, requires_grad=True)
    q = torch.randn(2, 31, 4, 24, requires_grad=True)
    for packed, call, parts in (
        (qkv, lambda: flash_attn.flash_attn_qkvpacked_func(qkv, causal=True), qkv.unbind(2)),
        (kv, lambda: flash_attn.flash_attn_kvpacked_func(q, kv, causal=True), (q, *kv.unbind(2))),
    ):
        out, plain = call(), flash_attn.flash_attn_func(*parts, causal=True)
        assert torch.equal(out, plain)
        dout = torch.randn_like(out)
        mine, its = (torch.autograd.grad(o, packed, dout)[0] for o in (out, plain))
        assert mine.shape == packed.shape and torch.equal(mine, its)


def _edges(*lengths):
    return torch.tensor([0, *lengths]).cumsum(0).int()


def test_varlen():
    of_q, of_k = _edges(3, 0, 20), _edges(9, 4, 20)
    q, k, v = (torch.randn(n, h, 16, requires_grad=True) for n, h in ((23, 4), (33, 2), (33, 2)))
    common = {"causal": True, "window_size": (12, 0)}
    out, lse, masked = flash_attn.flash_attn_varlen_func(
        q, k, v, of_q, of_k, 20, 20, return_attn_probs=True, **common
    )
    expected, expected_lse = fastgpt.attention_varlen(
        q, k, v, cu_seqlens_q=of_q, cu_seqlens_k=of_k, return_lse=True, **common
    )
    assert torch.equal(out, expected) and torch.equal(lse, expected_lse) and masked is None
    kv = torch.stack((k, v), 1)
    assert torch.equal(flash_attn.flash_attn_varlen_kvpacked_func(q, kv, of_q, of_k, 20, 20, **common), out)
    qkv = torch.randn(33, 3, 4, 16)
    out = flash_attn.flash_attn_varlen_qkvpacked_func(qkv, of_k, 20, causal=True)
    assert torch.equal(
        out, flash_attn.flash_attn_varlen_func(*qkv.unbind(1), of_k, of_k, 20, 20, causal=True)
    )


@pytest.mark.parametrize("page_size", [16, 7])
def test_varlen_of_pages(page_size):
    of_q, of_k = _edges(3, 0, 20, 5), _edges(9, 4, 20, 61)
    pages = -(-61 // page_size)
    table = torch.randperm(4 * pages).view(4, pages).int()
    caches = [torch.full((4 * pages, page_size, 2, 16), torch.nan) for _ in range(2)]
    q, k, v = (torch.randn(n, h, 16) for n, h in ((28, 4), (94, 2), (94, 2)))
    for cache, rows in zip(caches, (k, v), strict=True):
        for b in range(4):
            for r, row in enumerate(rows[of_k[b] : of_k[b + 1]]):
                cache[table[b, r // page_size], r % page_size] = row
    options = {"causal": True, "window_size": (11, 0), "alibi_slopes": torch.rand(4, 4)}
    got = flash_attn.flash_attn_varlen_func(
        q, *caches, of_q, of_k, 20, 61, block_table=table, return_attn_probs=True, **options
    )
    expected = flash_attn.flash_attn_varlen_func(
        q, k, v, of_q, of_k, 20, 61, return_attn_probs=True, **options
    )
    for mine, its in zip(got[:2], expected[:2], strict=True):
        torch.testing.assert_close(mine, its, rtol=1e-5, atol=1e-5)
    with pytest.raises(RuntimeError, match=r"dropout_p: got 0\.1, expected 0 with a block_table"):
        flash_attn.flash_attn_varlen_func(q, *caches, of_q, of_k, 20, 61, 0.1, block_table=table)


@pytest.mark.parametrize("packed", [False, True])
def test_probabilities_with_the_signs_of_dropout(packed):
    """out is what they and v give, those that are kept scaled up."""
    of_q, of_k = _edges(5, 30), _edges(9, 40)
    lead = ((35,), (49,)) if packed else ((2, 35), (2, 49))
    q, k, v = torch.randn(*lead[0], 4, 16), torch.randn(*lead[1], 2, 16), torch.randn(*lead[1], 2, 16)
    options = {"causal": True, "alibi_slopes": torch.rand(2, 4), "return_attn_probs": True}
    if packed:
        out, lse, p = flash_attn.flash_attn_varlen_func(q, k, v, of_q, of_k, 30, 40, 0.4, **options)
        assert p.shape == (2, 4, 30, 40) and lse.shape == (4, 35)
        sequences = [(slice(of_q[b], of_q[b + 1]), slice(of_k[b], of_k[b + 1])) for b in range(2)]
        out, v = [out[i] for i, _ in sequences], [v[j] for _, j in sequences]
    else:
        out, lse, p = flash_attn.flash_attn_func(q, k, v, 0.4, **options)
        assert p.shape == (2, 4, 35, 49) and lse.shape == (2, 4, 35)
    for b in range(2):
        own = p[b, :, : len(out[b]), : len(v[b])]
        torch.testing.assert_close(own.abs().sum(-1), torch.ones(own.shape[:2]))
        kept = own.clamp(min=0) / 0.6
        expected = torch.einsum("hij,jhd->ihd", kept, v[b].repeat_interleave(2, 1))
        torch.testing.assert_close(out[b], expected, rtol=1e-4, atol=1e-5)
    assert 0.3 < (p < 0).sum() / (p != 0).sum() < 0.5


def test_kvcache():
    q, k, v = (torch.randn(2, 3, h, 32) for h in (4, 2, 2))
    k_cache, v_cache = torch.randn(2, 40, 2, 32), torch.randn(2, 40, 2, 32)
    cos, sin = (f(torch.rand(40, 8) * 6) for f in (torch.cos, torch.sin))
    lengths = torch.tensor([30, 5], dtype=torch.int32)
    ours, theirs = ((k_cache.clone(), v_cache.clone()) for _ in range(2))
    out, lse = flash_attn.flash_attn_with_kvcache(
        q, *ours, k, v, cos, sin, lengths, causal=True, rotary_interleaved=False, return_softmax_lse=True
    )
    expected, expected_lse = fastgpt.attention_with_kvcache(
        q,
        *theirs,
        k,
        v,
        cache_seqlens=lengths,
        rotary_cos=cos,
        rotary_sin=sin,
        rotary_interleaved=False,
        return_lse=True,
    )
    assert torch.equal(out, expected) and torch.equal(lse, expected_lse)
    assert torch.equal(ours[0], theirs[0]) and not torch.equal(ours[0], k_cache)

    whole = flash_attn.flash_attn_with_kvcache(q, k_cache, v_cache)
    torch.testing.assert_close(whole, flash_attn.flash_attn_func(q, k_cache, v_cache), rtol=1e-5, atol=1e-5)
    assert torch.equal(whole, flash_attn.flash_attn_with_kvcache(q, k_cache, v_cache, cache_seqlens=40))
    with pytest.raises(RuntimeError, match="cache_seqlens: got None, expected where in the cache"):
        flash_attn.flash_attn_with_kvcache(q, k_cache, v_cache, k, v)


def test_flash_attn_3():
    q, k, v = (torch.randn(2, 9, h, 16) for h in (4, 2, 2))
    out, lse = flash_attn_3.flash_attn_func(q, k, v, causal=True, sm_margin=4, return_attn_probs=True)
    expected = fastgpt.attention(q, k, v, return_lse=True)
    assert torch.equal(out, expected[0]) and torch.equal(lse, expected[1])
    for change in ({"qv": q}, {"attention_chunk": 64}, {"k_descale": torch.ones(2, 2)}):
        with pytest.raises(RuntimeError, match=f"{next(iter(change))}: got .*, expected .*: fastgpt has not"):
            flash_attn_3.flash_attn_func(q, k, v, **change)


def test_flash_attn_3_of_queries_that_are_not_all_used():
    of_q, of_k = _edges(7, 0, 20, 4), _edges(9, 4, 20, 6)
    q, k, v = (torch.randn(n, h, 16, requires_grad=True) for n, h in ((31, 4), (39, 2), (39, 2)))
    used_q, used_k = (torch.tensor(n, dtype=torch.int32) for n in ((3, 0, 20, 0), (9, 2, 15, 6)))
    out, lse = flash_attn_3.flash_attn_varlen_func(
        q, k, v, of_q, of_k, 20, 20, used_q, used_k, causal=True, return_attn_probs=True
    )
    dout = torch.randn_like(out)
    got = torch.autograd.grad(out, (q, k, v), dout)
    grads = [torch.zeros_like(t) for t in (q, k, v)]
    for b in range(4):
        rows = slice(of_q[b], of_q[b] + used_q[b])
        keys = slice(of_k[b], of_k[b] + used_k[b])
        rest = slice(of_q[b] + used_q[b], of_q[b + 1])
        assert not out[rest].any() and (lse[:, rest] == -torch.inf).all()
        if not used_q[b]:
            continue
        own = [t[None, r].detach().requires_grad_() for t, r in ((q, rows), (k, keys), (v, keys))]
        expected, expected_lse = fastgpt.attention(*own, return_lse=True)
        torch.testing.assert_close(out[rows], expected[0])
        torch.testing.assert_close(lse[:, rows], expected_lse[0])
        own_grads = torch.autograd.grad(expected[0], own, dout[rows])
        for grad, of, r in zip(grads, own_grads, (rows, keys, keys), strict=True):
            grad[r] = of[0]
    for mine, its in zip(got, grads, strict=True):
        torch.testing.assert_close(mine, its, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("paged", [False, True])
def test_flash_attn_3_of_packed_queries_over_caches(paged):
    of_q, lengths = _edges(3, 0, 5), torch.tensor([9, 4, 20], dtype=torch.int32)
    q, k_cache, v_cache = torch.randn(8, 4, 16), torch.randn(3, 24, 2, 16), torch.randn(3, 24, 2, 16)
    table = torch.arange(12, dtype=torch.int32).view(3, 4) if paged else None
    caches = [t.view(12, 6, 2, 16) if paged else t for t in (k_cache, v_cache)]
    options = {"cache_seqlens": lengths, "page_table": table, "cu_seqlens_q": of_q, "causal": True}
    out, lse = flash_attn_3.flash_attn_with_kvcache(
        q, *caches, max_seqlen_q=5, return_softmax_lse=True, **options
    )
    for b in (0, 2):
        rows, n = slice(of_q[b], of_q[b + 1]), lengths[b]
        own = q[None, rows], k_cache[b : b + 1, :n], v_cache[b : b + 1, :n]
        expected = fastgpt.attention(*own, return_lse=True)
        torch.testing.assert_close(out[rows], expected[0][0], rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(lse[:, rows], expected[1][0], rtol=1e-5, atol=1e-5)
    with pytest.raises(RuntimeError, match="max_seqlen_q: got None"):
        flash_attn_3.flash_attn_with_kvcache(q, *caches, **options)
    for name in ("k", "v", "rotary_cos", "rotary_sin", "rotary_seqlens"):
        with pytest.raises(RuntimeError, match=f"{name}: got a tensor, expected None"):
            flash_attn_3.flash_attn_with_kvcache(q, *caches, max_seqlen_q=5, **options, **{name: q})


def test_edges_of_queries_over_caches_are_checked():
    q, caches, lengths = torch.randn(8, 4, 16), torch.randn(2, 3, 24, 2, 16), torch.full((3,), 9).int()

    def of_3(q, edges, longest):
        options = {"cache_seqlens": lengths, "cu_seqlens_q": edges, "max_seqlen_q": longest}
        return flash_attn_3.flash_attn_with_kvcache(q, *caches, **options)

    def of_2(q, edges, longest):
        table = torch.arange(3).int()[:, None]
        options = {"max_seqlen_q": longest, "max_seqlen_k": 9, "block_table": table}
        return flash_attn.flash_attn_varlen_func(
            q, *caches, cu_seqlens_q=edges, cu_seqlens_k=_edges(9, 9, 9), **options
        )

    for call in (of_3, of_2):
        torch.testing.assert_close(call(q, _edges(3, 0, 5), 7), call(q, _edges(3, 0, 5), 5))
        with pytest.raises(RuntimeError, match="max_seqlen_q: got 4, expected at least 5"):
            call(q, _edges(3, 0, 5), 4)
        with pytest.raises(RuntimeError, match="cu_seqlens_q: got 7 as its last, expected 8"):
            call(q, _edges(3, 0, 4), 5)
        with pytest.raises(RuntimeError, match="q: got NoneType"):
            call(None, _edges(3, 0, 5), 5)


@pytest.mark.parametrize("causal", [False, True])
def test_flash_attn_3_with_positions_of_their_own(causal):
    """rotary_seqlens that are cache_seqlens change nothing; others turn q and k by as much."""
    q, k, v = (torch.randn(2, 3, h, 32) for h in (4, 2, 2))
    caches = torch.randn(2, 2, 40, 2, 32)
    angles = torch.rand(60, 8) * 6
    lengths = torch.tensor([30, 5], dtype=torch.int32)
    options = {"cache_seqlens": lengths, "causal": causal, "rotary_interleaved": False}
    tables = {"rotary_cos": angles.cos(), "rotary_sin": angles.sin()}
    plain, own, moved = (caches.clone() for _ in range(3))
    expected = flash_attn_3.flash_attn_with_kvcache(q, *plain, k, v, **tables, **options)
    out = flash_attn_3.flash_attn_with_kvcache(q, *own, k, v, rotary_seqlens=lengths, **tables, **options)
    torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(own, plain, rtol=1e-5, atol=1e-5)
    flash_attn_3.flash_attn_with_kvcache(q, *moved, k, v, rotary_seqlens=lengths + 7, **tables, **options)
    turned = _turned(k[1:], angles[12:15].cos(), angles[12:15].sin(), False)
    torch.testing.assert_close(moved[0, 1, 5:8].double(), turned[0], rtol=1e-5, atol=1e-5)


def test_errors_are_runtime_errors_that_name_the_argument():
    q, k, v = (torch.randn(2, 9, h, 16) for h in (4, 2, 2))
    for change, message in (
        ({"k": torch.randn(2, 9, 3, 16)}, r"v: got shape .*, expected \(2, 9, 3, headdim_v\) like k"),
        ({"q": torch.randn(2, 9, 64)}, "q: got"),
        ({"q": None}, "q: got NoneType"),
        ({"q": None, "dropout_p": 0.5, "return_attn_probs": True}, "q: got NoneType"),
        ({"window_size": (1, 2, 3)}, "window_size: got"),
        ({"dropout_p": 1.5}, r"dropout_p: got 1\.5"),
        ({"alibi_slopes": torch.rand(3)}, "alibi_slopes: got"),
    ):
        with pytest.raises(RuntimeError, match=message):
            flash_attn.flash_attn_func(**({"q": q, "k": k, "v": v} | change))
    with pytest.raises(
        RuntimeError, match=r"qkv: got \(2, 9, 4, 16\), expected a tensor \(..., 3, nheads, headd"
    ):
        flash_attn.flash_attn_qkvpacked_func(q)


def test_padding():
    mask = torch.tensor([[0, 1, 1, 0], [0, 0, 0, 0], [1, 1, 1, 1]])
    x = torch.randn(3, 4, 2, 5, requires_grad=True)
    packed, indices, edges, longest, used = unpad_input(x, mask)
    assert (
        torch.equal(packed, x[mask.bool()]) and edges.tolist() == [0, 2, 2, 6] and edges.dtype == torch.int32
    )
    assert indices.tolist() == [1, 2, 8, 9, 10, 11] and longest == 4 and used.tolist() == [2, 0, 4]
    padded = pad_input(packed, indices, 3, 4)
    assert torch.equal(padded, x * mask[..., None, None])
    dout = torch.randn_like(padded)
    assert torch.equal(torch.autograd.grad(padded, x, dout)[0], dout * mask[..., None, None])

    packed, indices, edges, longest, used = unpad_input(
        x, mask, torch.tensor([[1, 0, 0, 0], [0] * 4, [0] * 4])
    )
    assert indices.tolist() == [0, 1, 2, 8, 9, 10, 11] and edges.tolist() == [0, 3, 3, 7]
    assert used.tolist() == [2, 0, 4]
    lengths = torch.tensor([[2, 1, 0, 0], [0, 0, 0, 0], [4, 0, 0, 0]])
    packed, indices, edges, longest = unpad_input_for_concatenated_sequences(x, lengths)
    assert indices.tolist() == [0, 1, 2, 8, 9, 10, 11] and edges.tolist() == [0, 2, 3, 7] and longest == 4

    rows = torch.randn(6, 3)
    which = torch.tensor([4, 1])
    assert torch.equal(index_first_axis(rows, which), rows[which])
    assert torch.equal(index_put_first_axis(rows[:2], which, 6)[which], rows[:2])


def _turned(x, cos, sin, interleaved):
    """apply_rotary_emb as it is defined, in float64."""
    x, (cos, sin) = x.double(), (t.double()[:, None] for t in (cos, sin))
    n = cos.shape[-1]
    a, b = (x[..., : 2 * n : 2], x[..., 1 : 2 * n : 2]) if interleaved else (x[..., :n], x[..., n : 2 * n])
    pair = (a * cos - b * sin, b * cos + a * sin)
    turned = torch.stack(pair, -1).flatten(-2) if interleaved else torch.cat(pair, -1)
    return torch.cat((turned, x[..., 2 * n :]), -1)


@pytest.mark.parametrize("interleaved", [False, True])
def test_rotary(interleaved):
    x = torch.randn(2, 9, 4, 24)
    angles = torch.rand(12, 8) * 6
    cos, sin = angles.cos(), angles.sin()
    expected = _turned(x, cos[3:], sin[3:], interleaved)
    torch.testing.assert_close(
        apply_rotary_emb(x, cos, sin, interleaved, seqlen_offsets=3).double(), expected, rtol=1e-5, atol=1e-6
    )
    own = x.clone()
    assert apply_rotary_emb(own, cos, sin, interleaved, inplace=True, seqlen_offsets=3) is own
    torch.testing.assert_close(own.double(), expected, rtol=1e-5, atol=1e-6)
    with pytest.raises(RuntimeError, match="cos: got 12 positions, expected at least 13"):
        apply_rotary_emb(x, cos, sin, seqlen_offsets=4)

    leaf = x.clone().requires_grad_()
    out = apply_rotary_emb(leaf * 1, cos, sin, interleaved, inplace=True)
    dout = torch.randn_like(out)
    grad = torch.autograd.grad(out, leaf, dout)[0]
    expected = _turned(dout, cos[:9], -sin[:9], interleaved)
    torch.testing.assert_close(grad.double(), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("scale_base", [None, 512])
def test_rotary_module(scale_base):
    module = RotaryEmbedding(16, base=1000.0, scale_base=scale_base)
    assert module.inv_freq.shape == (8,)
    assert not module.state_dict()
    position = torch.arange(14, dtype=torch.float64)
    even = torch.arange(0, 16, 2, dtype=torch.float64)
    angles = position[:, None] * 1000.0 ** (-even / 16)
    scale = torch.ones(14, 8, dtype=torch.float64)
    if scale_base is not None:
        scale = ((even + 6.4) / 22.4) ** ((position - 7) / scale_base)[:, None]
    rows = slice(5, 14)
    of_q = ((angles.cos() * scale)[rows], (angles.sin() * scale)[rows], False)
    of_k = ((angles.cos() / scale)[rows], (angles.sin() / scale)[rows], False)

    qkv = torch.randn(2, 9, 3, 4, 24)
    before = qkv.clone()
    assert module(qkv, seqlen_offset=5) is qkv
    torch.testing.assert_close(qkv[:, :, 0].double(), _turned(before[:, :, 0], *of_q), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(qkv[:, :, 1].double(), _turned(before[:, :, 1], *of_k), rtol=1e-5, atol=1e-5)
    assert torch.equal(qkv[:, :, 2], before[:, :, 2])

    grouped = before.flatten(2, 3)[:, :, :8].clone()  # 4 heads of q, 2 of k, 2 of v
    module(grouped, seqlen_offset=5, num_heads_q=4)
    assert torch.equal(grouped[:, :, :4], qkv[:, :, 0])
    expected = _turned(before[:, :, 1, :2], *of_k)
    torch.testing.assert_close(grouped[:, :, 4:6].double(), expected, rtol=1e-5, atol=1e-5)
    assert torch.equal(grouped[:, :, 6:], before[:, :, 1, 2:])
    with pytest.raises(RuntimeError, match="num_heads_q: got None"):
        module(grouped)

    q, kv = before[:, :, 0].clone(), before[:, :, 1:].clone()
    offsets = torch.tensor([5, 5], dtype=torch.int32)
    with pytest.raises(RuntimeError, match="max_seqlen: got None"):
        module(q, kv, seqlen_offset=offsets)
    got_q, got_kv = module(q, kv, seqlen_offset=offsets, max_seqlen=14)
    assert torch.equal(got_q, qkv[:, :, 0]) and torch.equal(got_kv[:, :, 0], qkv[:, :, 1])


def _norm(z, weight, bias, rms, eps=1e-6):
    z = z if rms else z - z.mean(-1, keepdim=True)
    out = z * (z.square().mean(-1, keepdim=True) + eps).rsqrt() * weight
    return out if bias is None else out + bias


@pytest.mark.parametrize("rms", [False, True])
@pytest.mark.parametrize("residual", [None, torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "more", ["", "x1", "rowscale", "weight1", "residual_in_fp32", "zero_centered_weight"]
)
def test_norms(rms, residual, more):
    x, x1 = (torch.randn(5, 3, 64).bfloat16() for _ in range(2))
    weight, bias, weight1 = (torch.randn(64) for _ in range(3))
    other = None if residual is None else torch.randn(5, 3, 64).to(residual)
    scale = torch.rand(5, 3)
    given = {
        "": {},
        "x1": {"x1": x1},
        "rowscale": {"rowscale": scale},
        "weight1": {"weight1": weight1},
        "residual_in_fp32": {"residual_in_fp32": True},
        "zero_centered_weight": {"zero_centered_weight": True},
    }[more]
    function = rms_norm_fn if rms else layer_norm_fn
    got = function(x, weight, bias, other, prenorm=True, **given)
    z = x.double() * (scale[..., None].double() if more == "rowscale" else 1)
    if more == "x1":
        z = z + x1.double()
    if other is not None:
        z = z + other.double()
    dtype = residual or (torch.float32 if more == "residual_in_fp32" else torch.bfloat16)
    assert got[-1].dtype == dtype
    torch.testing.assert_close(
        got[-1], z.to(dtype), rtol=2e-2 if dtype == torch.bfloat16 else 1e-6, atol=1e-6
    )
    z, weight = got[-1].double(), weight.double() + int(more == "zero_centered_weight")
    torch.testing.assert_close(got[0], _norm(z, weight, bias.double(), rms).bfloat16(), rtol=1e-2, atol=1e-5)
    assert len(got) == 2 + (more == "weight1")
    if more == "weight1":
        torch.testing.assert_close(
            got[1], _norm(z, weight1.double(), None, rms).bfloat16(), rtol=1e-2, atol=1e-5
        )
    if more != "weight1":
        weight = weight.float() - int(more == "zero_centered_weight")
        torch.testing.assert_close(function(x, weight, bias, other, **given), got[0], rtol=1e-2, atol=1e-5)


def test_norm_with_dropout_and_buffers():
    x, x1, weight = torch.randn(40, 64), torch.randn(40, 64), torch.rand(64)
    _, z, kept, kept1 = layer_norm_fn(
        x, weight, None, x1=x1, dropout_p=0.25, prenorm=True, return_dropout_mask=True
    )
    torch.testing.assert_close(z, (x * kept + x1 * kept1) / 0.75)
    assert 0.65 < kept.float().mean() < 0.85 and not torch.equal(kept, kept1)
    buffers = torch.empty(40, 64), torch.empty(40, 64)
    got = rms_norm_fn(x, weight, None, residual=x1, prenorm=True, out=buffers[0], residual_out=buffers[1])
    assert got[0] is buffers[0] and got[1] is buffers[1] and torch.equal(got[1], x + x1)
    assert rms_norm_fn(x, weight, None, out_dtype=torch.float16).dtype == torch.float16
    with pytest.raises(RuntimeError, match="rowscale: got a tensor, expected None with x1"):
        rms_norm_fn(x, weight, None, x1=x1, rowscale=torch.rand(40))
    with pytest.raises(RuntimeError, match="weight: got shape"):
        rms_norm_fn(x, weight[:9], None)

    module = RMSNorm(64, dropout_p=0.5).eval()
    torch.testing.assert_close(module(x, x1), _norm(x + x1, 1.0, None, True, 1e-5))
    assert not torch.equal(module.train()(x), module.eval()(x))


def _fresh(code):
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_install():
    _fresh(
        """
        import importlib.metadata, importlib.util, sys, torch
        import fastgpt.integrations.flash_attn as own
        assert importlib.util.find_spec("flash_attn") is None
        with own.install() as installed:
            import flash_attn
            import flash_attn.layers.rotary
            from flash_attn import flash_attn_func
            from flash_attn.bert_padding import pad_input, unpad_input
            from flash_attn.flash_attn_interface import flash_attn_varlen_func
            from flash_attn.ops.triton.layer_norm import rms_norm_fn
            assert flash_attn is own and flash_attn_func is own.flash_attn_func
            assert flash_attn.layers.rotary.__name__ == "fastgpt.integrations.flash_attn.layers.rotary"
            assert importlib.metadata.version("flash_attn") == flash_attn.__version__ == "2.8.3"
            assert "flash-attn" in importlib.metadata.packages_distributions()["flash_attn"]
            try:
                import flash_attn.cute
            except ImportError as error:
                assert "flash_attn.cute" in str(error)
            try:
                own.install()
            except RuntimeError as error:
                assert "installed already" in str(error)
            q = torch.randn(1, 5, 2, 8)
            assert flash_attn_func(q, q, q).shape == q.shape
        installed.undo()  # a second time: nothing
        assert importlib.util.find_spec("flash_attn") is None and "flash_attn" not in sys.modules
        assert "flash_attn" not in importlib.metadata.packages_distributions()
        own.install().undo()
        """
    )


def test_install_leaves_the_real_one_alone(tmp_path, monkeypatch):
    (tmp_path / "flash_attn.py").write_text("")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(RuntimeError, match="flash_attn: the real one is installed"):
        flash_attn.install()


@pytest.mark.parametrize("first", ["transformers", "fastgpt"])
def test_transformers_with_flash_attention_2_on_a_cpu(first):
    _fresh(
        f"""
        import torch
        if {first == "transformers"}:
            import transformers.modeling_flash_attention_utils
        import fastgpt.integrations.flash_attn as own
        installed = own.install()
        from transformers import LlamaConfig, LlamaForCausalLM
        config = LlamaConfig(
            hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, vocab_size=99, dtype=torch.float32, bos_token_id=1, eos_token_id=2,
        )
        model = LlamaForCausalLM._from_config(config, attn_implementation="flash_attention_2").eval()
        tokens = torch.randint(3, 99, (2, 11))
        mask = torch.ones_like(tokens)
        mask[0, :4] = 0
        options = dict(attention_mask=mask, max_new_tokens=6, do_sample=False, pad_token_id=0)
        logits = model(tokens, attention_mask=mask).logits
        generated = model.generate(tokens, **options)
        model.set_attn_implementation("eager")
        expected = model(tokens, attention_mask=mask).logits
        torch.testing.assert_close(logits[mask.bool()], expected[mask.bool()], rtol=1e-4, atol=1e-5)
        assert torch.equal(generated, model.generate(tokens, **options))
        from transformers.utils import is_flash_attn_2_available
        assert is_flash_attn_2_available()
        installed.undo()
        import transformers
        assert not transformers.utils.is_flash_attn_2_available()
        try:
            LlamaForCausalLM._from_config(config, attn_implementation="flash_attention_2")
        except ImportError as error:
            assert "flash" in str(error).lower()
        else:
            raise AssertionError
        """
    )
