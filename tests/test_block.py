"""An MLP and an attention of a few rows as one call each on the CPU: what they compute and refuse."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from backends import DTYPES, judge

import fastgpt
from fastgpt.ops.few_rows import api
from fastgpt.ops.few_rows.spec import ACTIVATIONS, Around, Attention, Cache, Mlp, Norm, Projection, Rotary

ACTIVATION = {"silu": F.silu, "gelu_tanh": lambda x: F.gelu(x, approximate="tanh")}


def projection(in_features, out_features, bias, transposed, dtype):
    shape = (in_features, out_features) if transposed else (out_features, in_features)
    weight = torch.randn(shape) * in_features**-0.5
    return Projection(weight.to(dtype), torch.randn(out_features).to(dtype) if bias else None)


def to_double(spec):
    """The same of float64: of tensors, tuples of them, and what is in them."""
    if isinstance(spec, torch.Tensor):
        return spec.double() if spec.is_floating_point() else spec
    if isinstance(spec, tuple):
        items = [to_double(part) for part in spec]
        return type(spec)(*items) if hasattr(spec, "_fields") else tuple(items)
    return spec


def project(x, projections, transposed):
    return torch.cat([F.linear(x, w.t() if transposed else w, b) for w, b in projections], -1)


def norm_case(kind, hidden, dtype):
    """None, "rms", "rms + 1" or "layer"."""
    if kind is None:
        return None
    weight, bias = (1 + torch.rand(hidden)).to(dtype), torch.randn(hidden).to(dtype)
    if kind == "layer":
        return Norm(False, 1e-5, weight, bias)
    return Norm(True, 1e-6, weight) if kind == "rms" else Norm(True, 1e-6, weight - 1, None, 1.0)


def around_case(kinds, hidden, dtype):
    return None if kinds is None else Around(*(norm_case(kind, hidden, dtype) for kind in kinds))


def plain_norm(x, norm):
    if norm is None:
        return x
    weight = norm.weight if norm.weight_offset == 0 else norm.weight.to(wide(x)) + norm.weight_offset
    if norm.rms:  # Gemma's weight is rounded with the result
        return F.rms_norm(x.to(weight.dtype), x.shape[-1:], weight, norm.eps).to(x.dtype)
    return F.layer_norm(x, x.shape[-1:], weight, norm.bias, norm.eps)


def wide(x):
    return torch.promote_types(x.dtype, torch.float32)


def plain_around(x, around, half):
    if around is None:
        return half(x)
    return x + plain_norm(half(plain_norm(x, around.before)), around.after)


def plain_mlp(x, spec):
    return plain_around(x, spec.around, lambda x: plain_mlp_of(x, spec))


def plain_mlp_of(x, spec):
    up = project(x, spec.up, spec.transposed)
    if spec.gated:
        gate, up = up.chunk(2, -1)
        up = ACTIVATION[spec.activation](gate) * up
    else:
        up = ACTIVATION[spec.activation](up)
    return project(up, (spec.down,), spec.transposed)


def plain_rotary(x, rotary):
    if rotary is None:
        return x
    cos, sin = (torch.cat((t, t), -1) if rotary.alike else t for t in rotary[:2])
    x1, x2 = x.chunk(2, -1)
    return (x * cos[:, :, None] + torch.cat((-x2, x1), -1) * sin[:, :, None]).to(x.dtype)


def plain_attention(x, spec, rotary, cache, leftpad):
    """out, and what the cache holds then."""
    k_cache, v_cache = cache.k.clone(), cache.v.clone()

    def half(x):
        return plain_attention_of(x, spec, rotary, (k_cache, v_cache), cache.seqlens, leftpad)

    return plain_around(x, spec.around, half), k_cache, v_cache


def plain_attention_of(x, spec, rotary, caches, seqlens, leftpad):
    (k_cache, v_cache), (batch, seqlen, _) = caches, x.shape
    nheads_k, headdim = k_cache.shape[2:]
    qkv, of_k = project(x, spec.qkv, spec.transposed), nheads_k * headdim
    q, k, v = qkv.split((qkv.shape[2] - 2 * of_k, of_k, of_k), 2)
    if spec.heads_together:
        q, k = plain_norm(q, spec.q_norm), plain_norm(k, spec.k_norm)
    q, k, v = (t.unflatten(-1, (-1, headdim)) for t in (q, k, v))
    if not spec.heads_together:
        q, k = plain_norm(q, spec.q_norm), plain_norm(k, spec.k_norm)
    q, k = plain_rotary(q, rotary), plain_rotary(k, rotary)
    out = torch.empty_like(q)
    lengths = [seqlens] * batch if isinstance(seqlens, int) else seqlens.tolist()
    for b, past in enumerate(lengths):
        total = past + seqlen
        k_cache[b, past:total], v_cache[b, past:total] = k[b], v[b]
        keys, values = (
            t[b, leftpad[b] : total].repeat_interleave(q.shape[2] // nheads_k, 1) for t in (k_cache, v_cache)
        )
        scores = torch.einsum("ihd,jhd->hij", q[b], keys) * spec.softmax_scale
        if spec.softcap:
            scores = spec.softcap * torch.tanh(scores / spec.softcap)
        i, j = torch.arange(seqlen)[:, None] + len(keys) - seqlen, torch.arange(len(keys))
        hidden = (j > i) | ((j < i - spec.window_left) if spec.window_left >= 0 else False)
        out[b] = torch.einsum("hij,jhd->ihd", scores.masked_fill(hidden, -torch.inf).softmax(-1), values)
    return project(out.flatten(2), (spec.out,), spec.transposed)


# (rows, hidden, width, as how many projections, gated, bias, transposed, norms before and after)
MLPS = [
    ((1, 1), 64, 96, 2, True, False, False, None),
    ((2, 2), 40, 33, 2, True, True, False, ("rms", None)),
    ((3,), 24, 50, 1, True, False, False, None),
    ((1, 1), 48, 192, 1, False, True, True, ("layer", None)),
    ((2, 1), 17, 21, 1, False, True, False, ("layer", "layer")),
    ((6,), 75, 40, 1, True, True, True, None),
    ((1, 2), 33, 40, 2, True, False, False, ("rms + 1", "rms + 1")),
    ((2, 1), 40, 64, 2, True, False, False, (None, "rms")),
    ((1, 1), 576, 1536, 2, True, False, False, ("rms", None)),
]


def mlp_case(hidden, width, projections, gated, bias, transposed, around, activation, dtype):
    widths = [width] * 2 if projections == 2 else [2 * width if gated else width]
    up = tuple(projection(hidden, n, bias, transposed, dtype) for n in widths)
    down = projection(width, hidden, bias, transposed, dtype)
    return Mlp(up, down, gated, activation, transposed, around_case(around, hidden, dtype))


@torch.no_grad()
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("case", MLPS, ids=str)
def test_mlp_parity(case, activation, dtype):
    rows, hidden, *rest = case

    def draw():
        spec, x = mlp_case(hidden, *rest, activation, dtype), torch.randn(*rows, hidden + 3).to(dtype)
        x = x[..., :hidden]  # rows at a distance
        out = api.mlp(x, spec)
        assert out.dtype == dtype and out.is_contiguous()
        return [("out", out, plain_mlp(x, spec), plain_mlp(x.double(), to_double(spec)))]

    judge(draw)


@torch.no_grad()
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activations_far_from_zero(activation):
    """Both are x sigmoid(z), of which few digits are left in 0.5 x (1 + tanh(z / 2))."""
    x = torch.cat((torch.linspace(-120, 120, 4800), torch.tensor([1e30, -1e30, 3e38, -3e38, 0.0, -0.0])))
    for part in x.split(89):
        spec = Mlp((Projection(torch.diag(part)),), Projection(torch.eye(len(part))), False, activation)
        one, wide = torch.ones(1, len(part)), part.double()
        out = api.mlp(one, spec)[0]
        z = wide if activation == "silu" else (8 / torch.pi) ** 0.5 * (wide + 0.044715 * wide**3)
        exact = wide * z.sigmoid()
        assert ((out - exact).abs() <= (z.abs() + 2) * 2**-22 * exact.abs() + 2e-36).all()
        one[0, 5] = torch.nan
        assert api.mlp(one, spec).isnan().all()


# (batch, seqlen), nheads, nheads_k, headdim, tokens in the cache, and what else
ATTENTIONS = {
    "a token": ((1, 1), 9, 3, 64, 300, {}),
    "a token of GPT-2": (
        (1, 1),
        *(4, 4, 64, 70),
        {"fused": True, "transposed": True, "bias": True, "rotary": None, "around": ("layer", None)},
    ),
    "several tokens": ((1, 5), 4, 2, 32, 40, {"bias": True, "around": ("rms", None)}),
    "an empty cache": ((2, 3), 2, 1, 16, 0, {}),
    "several sequences": ((4, 1), 4, 2, 16, 33, {"batched": True, "around": ("rms", None)}),
    "each at its place": ((3, 2), 2, 2, 24, [3, 40, 0], {"rotary": "half"}),
    "padding before": ((3, 2), 4, 2, 16, 20, {"pads": [0, 7, 20]}),
    "a window and softcap": ((1, 3), 2, 2, 16, 50, {"window_left": 7, "softcap": 3.0}),
    "norms of heads": ((2, 2), 4, 2, 40, 9, {"norms": "rms", "fused": True}),
    "Gemma 3": ((1, 2), 4, 2, 24, 9, {"norms": "rms + 1", "around": ("rms + 1", "rms + 1")}),
    "OLMo 2": (
        (2, 1),
        4,
        2,
        16,
        9,
        {"norms": "rms", "together": True, "around": (None, "rms"), "wide": True},
    ),
    "odd": ((1, 1), 3, 1, 18, 11, {"bias": True, "rotary": "half"}),
    "odd, without rotary": ((1, 2), 3, 3, 7, 11, {"rotary": None, "fused": True}),
    "the largest head": ((1, 1), 2, 1, 256, 20, {}),
}


def attention_case(shape, nheads, nheads_k, headdim, past, options, dtype):
    (batch, seqlen), hidden, bias = shape, 24, options.get("bias", False)
    transposed = options.get("transposed", False)
    heads = [nheads, nheads_k, nheads_k]
    widths = [headdim * n for n in ([sum(heads)] if options.get("fused") else heads)]
    qkv = tuple(projection(hidden, n, bias, transposed, dtype) for n in widths)
    out = projection(nheads * headdim, hidden, bias, transposed, dtype)
    together = options.get("together", False)
    sizes = [n * headdim if together else headdim for n in (nheads, nheads_k)]
    norms = [norm_case(options.get("norms"), size, dtype) for size in sizes]
    spec = Attention(
        qkv,
        out,
        headdim**-0.5,
        options.get("window_left", -1),
        options.get("softcap", 0.0),
        *norms,
        together,
        transposed,
        around_case(options.get("around"), hidden, dtype),
    )
    rotary, kind = None, options.get("rotary", "full")
    if kind is not None:
        columns = headdim if kind == "full" else headdim // 2
        angles = 6 * torch.rand(batch if options.get("batched") else 1, seqlen, columns)
        of = torch.float32 if options.get("wide") else dtype
        rotary = Rotary(angles.cos().to(of), angles.sin().to(of), kind == "half")
    lengths = past if isinstance(past, int) else torch.tensor(past, dtype=torch.int32)
    longest = past if isinstance(past, int) else max(past)
    # Heads before rows, as a buffer cut out of a larger one: nothing but the strides say where a row is.
    k, v = (
        torch.randn(batch, longest + seqlen + 2, nheads_k, headdim + 2).to(dtype)[..., :headdim] for _ in "kv"
    )
    pads, ranges = options.get("pads"), None
    if pads is not None:
        ranges = torch.tensor([[pad, past + seqlen] for pad in pads], dtype=torch.int32)[:, None, None]
    x = torch.randn(batch, seqlen, hidden).to(dtype)
    return x, spec, rotary, Cache(k, v, lengths, ranges), pads or [0] * batch


@torch.no_grad()
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", ATTENTIONS)
def test_attention_parity(case, dtype):
    def draw():
        x, spec, rotary, cache, pads = attention_case(*ATTENTIONS[case], dtype)
        plain = plain_attention(x, spec, rotary, cache, pads)
        exact = plain_attention(x.double(), *map(to_double, (spec, rotary, cache)), pads)
        out = api.attention(x, spec, rotary, cache)
        assert out.dtype == dtype and out.is_contiguous()
        return list(zip(("out", "k", "v"), (out, cache.k, cache.v), plain, exact, strict=True))

    judge(draw)


@torch.no_grad()
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_bits_are_those_of_single_calls_and_depend_on_no_threads(dtype):
    """Of linear, and of attention over a cache: by a block whose other steps are exact."""
    options = {"rotary": None, "bias": True, "around": ("layer", None)}
    x, spec, _, cache, _ = attention_case((2, 2), 4, 2, 64, 300, options, dtype)
    mlp = mlp_case(24, 2000, 2, True, True, False, ("rms", "rms"), "silu", dtype)
    threads, found = torch.get_num_threads(), []
    try:
        for n in (1, 2, 3):
            torch.set_num_threads(n)
            own = cache._replace(k=cache.k.clone(), v=cache.v.clone())
            found.append((api.mlp(x, mlp), api.attention(x, spec, None, own), own.k, own.v))
    finally:
        torch.set_num_threads(threads)
    for others in found[1:]:
        assert all(map(torch.equal, found[0], others))
    normed = fastgpt.layer_norm(x, *spec.around.before[2:4], spec.around.before.eps)
    q, k, v = (api.linear(normed, *p).unflatten(-1, (-1, 64)) for p in spec.qkv)
    lengths = torch.full((2,), 300, dtype=torch.int32)
    attended = fastgpt.attention_with_kvcache(q, cache.k, cache.v, k, v, cache_seqlens=lengths)
    assert torch.equal(found[0][1], x + api.linear(attended.flatten(2), *spec.out))
    assert torch.equal(found[0][2][:, :302], cache.k[:, :302])


@torch.no_grad()
def test_what_is_refused_leaves_the_cache_as_it_was():
    x, spec, rotary, cache, _ = attention_case((2, 2), 4, 2, 16, 5, {}, torch.float32)
    before = cache.k.clone(), cache.v.clone()

    def refused(x=x, rotary=rotary, **changes):
        parts = {name: value for name, value in changes.items() if name in Cache._fields}
        rest = {name: value for name, value in changes.items() if name not in Cache._fields}
        return api.attention(x, spec._replace(**rest), rotary, cache._replace(**parts)) is None

    other = torch.float64
    (q, k, v), out = spec.qkv, spec.out
    assert refused(x=x.double()) and refused(x=x[:, :, :-1]) and refused(x=x[0]) and refused(x=x.bfloat16())
    assert refused(qkv=(q, k)) and refused(qkv=(k, q, v)) and refused(qkv=(q, k, q)) and refused(qkv=(q,) * 4)
    assert refused(qkv=(q, k, v._replace(weight=v.weight.to(other)))) and refused(out=q)
    assert refused(qkv=(q, k, v._replace(bias=torch.zeros(7))))
    assert refused(q_norm=Norm(True, 1e-5, torch.ones(8))) and refused(
        k_norm=Norm(True, 0.0, torch.ones(16, dtype=other))
    )
    assert (
        refused(k=cache.k.to(other)) and refused(v=cache.v[:, 1:]) and refused(k=cache.k[:1], v=cache.v[:1])
    )
    assert refused(seqlens=8) and refused(seqlens=-1) and refused(seqlens=torch.tensor([5, 5]))
    assert refused(seqlens=torch.tensor([5, 8], dtype=torch.int32))
    assert refused(rotary=Rotary(rotary.cos[:, :1], rotary.sin)) and refused(
        rotary=Rotary(rotary.cos[..., :7], rotary.sin)
    )
    assert refused(rotary=Rotary(*(t.to(other) for t in rotary[:2]))) and refused(
        rotary=rotary._replace(alike=True)
    )
    for ranges in ([[6, 7]] * 2, [[0, 6]] * 2, [[-1, 7]] * 2, [[0, 7]]):
        assert refused(key_ranges=torch.tensor(ranges, dtype=torch.int32))
    assert refused(x=torch.randn(3, 3, 24))
    assert refused(around=Around(Norm(True, 1e-5, torch.ones(23)))) and refused(
        around=Around(None, Norm(True, 1e-5, torch.ones(24, dtype=other)))
    )
    narrow = out._replace(weight=out.weight[:-1].clone())
    assert refused(around=Around(Norm(True, 1e-5, None)), out=narrow)
    with torch.enable_grad():
        assert refused(x=x.clone().requires_grad_())
    assert torch.equal(cache.k, before[0]) and torch.equal(cache.v, before[1])
    assert not refused()

    x, mlp = torch.randn(2, 24), mlp_case(24, 32, 2, True, True, False, None, "silu", torch.float32)
    gate, up = mlp.up
    assert api.mlp(x, mlp) is not None and api.mlp(x.double(), mlp) is None
    assert api.mlp(x, mlp._replace(up=(gate,))) is None  # half of it is no whole number of columns of down
    assert api.mlp(x, mlp._replace(up=(gate, Projection(up.weight[:-2])))) is None
    assert api.mlp(x, mlp._replace(gated=False)) is None and api.mlp(x, mlp._replace(up=())) is None
    assert api.mlp(x, mlp._replace(down=Projection(mlp.down.weight.t()))) is None
    assert api.mlp(x, mlp._replace(around=Around(Norm(False, 1e-5, torch.ones(24), torch.ones(23))))) is None
