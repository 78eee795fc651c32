"""torch.func, activation checkpointing and autocast around the operators and the modules."""

import functools

import pytest
import torch
import torch.nn.functional as F
from backends import AVAILABLE, assert_parity
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, jvp, vjp, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
)

import fastgpt
from fastgpt import nn as fused
from fastgpt.ops.attention import library

BACKENDS = [name for name in AVAILABLE if name in ("cpu", "reference", "torch")]
KERNELS = [name for name in BACKENDS if name != "torch"]  # with operators of their own
SAMPLES = 3


def loop(function, in_dims, *args):
    """What vmap is by definition."""
    samples = [a.unbind(d) if d is not None else [a] * SAMPLES for a, d in zip(args, in_dims, strict=True)]
    results = [function(*sample) for sample in zip(*samples, strict=True)]
    if isinstance(results[0], tuple):
        return tuple(torch.stack(parts) for parts in zip(*results, strict=True))
    return torch.stack(results)


def assert_is_the_loop(function, in_dims, *args):
    got, expected = vmap(function, in_dims)(*args), loop(function, in_dims, *args)
    torch.testing.assert_close(got, expected)


def qkv(*lead, seqlen=7):
    """GQA, more keys than queries, a headdim of its own for v."""
    return (
        torch.randn(*lead, 2, seqlen, 4, 8),
        torch.randn(*lead, 2, seqlen + 3, 2, 8),
        torch.randn(*lead, 2, seqlen + 3, 2, 16),
    )


OPTIONS = {  # what each sample has of its own
    "plain": lambda: {"window_size": (3, 0), "softcap": 5.0},
    "sink": lambda: {"sink": torch.randn(SAMPLES, 4)},
    "alibi": lambda: {"alibi_slopes": torch.rand(SAMPLES, 2, 4)},
    "bias": lambda: {"attn_bias": torch.randn(SAMPLES, 1, 4, 7, 10)},
    "lengths": lambda: {"seqused_k": torch.tensor([[3, 10], [5, 9], [1, 0]], dtype=torch.int32)},
    "dropout": lambda: {"rng_state": torch.tensor([[1, 2], [3, 4], [5, 6]]), "dropout_p": 0.3},
}


def split_options(name):
    options = OPTIONS[name]()
    tensors = {key: t for key, t in options.items() if isinstance(t, torch.Tensor)}
    return tensors, {key: value for key, value in options.items() if key not in tensors}


@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("backend", KERNELS)
def test_vmapped_attention_is_the_loop(backend, name):
    tensors, scalars = split_options(name)

    def attend(q, k, v, *own):
        named = dict(zip(tensors, own, strict=True))
        return fastgpt.attention(q, k, v, **named, **scalars, return_lse=True, backend=backend)

    q, k, v = qkv(SAMPLES)
    own, zeros = tensors.values(), (0,) * len(tensors)
    assert_is_the_loop(attend, (0, 0, 0, *zeros), q, k, v, *own)
    assert_is_the_loop(attend, (None, 0, 0, *zeros), q[0], k, v, *own)
    assert_is_the_loop(attend, (2, 1, None, *zeros), q.movedim(0, 2), k.movedim(0, 1), v[0], *own)


@pytest.mark.parametrize("name", [name for name in OPTIONS if name != "lengths"])
@pytest.mark.parametrize("backend", KERNELS)
def test_gradients_of_each_sample_of_attention(backend, name):
    tensors, scalars = split_options(name)
    differentiable = [key for key in tensors if key in ("sink", "attn_bias")]

    def loss(q, k, v, weight, *own):
        named = dict(zip(tensors, own, strict=True))
        out, lse = fastgpt.attention(q, k, v, **named, **scalars, return_lse=True, backend=backend)
        return (out * weight).sum() + lse.sin().sum()

    q, k, v = qkv(SAMPLES)
    weight = torch.randn(2, 7, 4, 16)
    gradients = grad(loss, (0, 1, 2, *range(4, 4 + len(differentiable))))
    in_dims = (0, 0, 0, None, *(0,) * len(tensors))
    assert_is_the_loop(gradients, in_dims, q, k, v, weight, *tensors.values())
    assert_is_the_loop(gradients, (None, 0, 0, *in_dims[3:]), q[0], k, v, weight, *tensors.values())


@pytest.mark.parametrize("backend", KERNELS)
def test_vmapped_packed_attention_is_the_loop(backend):
    edges = torch.tensor([0, 3, 11], dtype=torch.int32)

    def loss(q):
        out = fastgpt.attention_varlen(q, q, q, cu_seqlens_q=edges, cu_seqlens_k=edges, backend=backend)
        return out.sin().sum()

    assert_is_the_loop(grad(loss), (0,), torch.randn(SAMPLES, 11, 2, 8))


@pytest.mark.parametrize("rms", [False, True], ids=["layer", "rms"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_vmapped_norms_are_the_loop(backend, rms):
    norm = fastgpt.rms_norm if rms else fastgpt.layer_norm
    x, residual, factor = (torch.randn(SAMPLES, 2, 5, 9) for _ in range(3))
    weight, bias = torch.randn(2, SAMPLES, 9)

    def forward(x, residual, weight, bias):
        return norm(x, weight, bias, residual=residual, prenorm=True, backend=backend)

    def loss(x, residual, weight, bias, factor):
        out, residual_out = forward(x, residual, weight, bias)
        return (out * factor + residual_out.sin()).sum()

    def bare(x, factor):
        return (norm(x, backend=backend) * factor).sum()

    gradients = grad(loss, (0, 1, 2, 3))
    for own in (0, None):
        parameters = (weight, bias) if own == 0 else (weight[0], bias[0])
        assert_is_the_loop(forward, (0, 0, own, own), x, residual, *parameters)
        assert_is_the_loop(forward, (0, None, own, own), x, residual[0], *parameters)
        assert_is_the_loop(gradients, (0, 0, own, own, 0), x, residual, *parameters, factor)
    assert_is_the_loop(forward, (1, 2, 1, None), x.movedim(0, 1), residual.movedim(0, 2), weight.T, bias[0])
    assert_is_the_loop(grad(bare), (0, None), x, factor[0])
    assert_is_the_loop(lambda x: norm(x, backend=backend), (0,), x[:, 0, 0])  # samples of one row


@pytest.mark.parametrize("rms", [False, True], ids=["layer", "rms"])
def test_jacobian_of_a_norm(rms):
    norm, plain = (fastgpt.rms_norm, F.rms_norm) if rms else (fastgpt.layer_norm, F.layer_norm)
    x, weight = torch.randn(2, 5), torch.randn(5)
    expected = jacrev(lambda x, w: plain(x, (5,), w, eps=1e-5), (0, 1))(x, weight)
    got = jacrev(lambda x, w: norm(x, w, eps=1e-5), (0, 1))(x, weight)
    torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("backend", ["reference", "torch"])
def test_vmapped_rotary_is_the_loop(backend):
    cos, sin = torch.randn(2, 9, 4)

    def loss(x):
        return fastgpt.rotary_embedding(x, cos, sin, backend=backend).sin().sum()

    x = torch.randn(SAMPLES, 2, 9, 3, 8)
    assert_is_the_loop(grad(loss), (0,), x)
    assert_is_the_loop(grad(lambda x: grad(loss)(x).sin().sum()), (0,), x)


@pytest.mark.parametrize("backend", KERNELS)
def test_vmapped_merge_is_the_loop(backend):
    def loss(out_a, lse_a, out_b, lse_b):
        out, lse = fastgpt.merge_attention_states(out_a, lse_a, out_b, lse_b, backend=backend)
        return out.sin().sum() + lse.cos().sum()

    out_a, out_b = torch.randn(2, SAMPLES, 2, 5, 3, 8)
    lse_a, lse_b = torch.randn(2, SAMPLES, 2, 3, 5)
    assert_is_the_loop(grad(loss, (0, 1, 2, 3)), (0, 0, 0, 0), out_a, lse_a, out_b, lse_b)
    assert_is_the_loop(grad(loss, (0, 1)), (0, 0, None, None), out_a, lse_a, out_b[0], lse_b[0])


@pytest.mark.parametrize("backend", BACKENDS)
def test_vmap_inside_of_a_gradient(backend):
    """A gradient that is asked for outside of vmap does not show inside."""

    def run(q, k, v, x, weight):
        out = vmap(lambda *qkv: fastgpt.attention(*qkv, backend=backend))(q, k, v).sin().sum()
        norm = vmap(lambda x, w: fastgpt.layer_norm(x, w, backend=backend), (0, None))(x, weight)
        return out + norm.sin().sum()

    def looped(q, k, v, x, weight):
        out = loop(lambda *qkv: fastgpt.attention(*qkv, backend=backend), (0, 0, 0), q, k, v).sin().sum()
        return out + fastgpt.layer_norm(x, weight, backend=backend).sin().sum()

    inputs = (*qkv(SAMPLES), torch.randn(SAMPLES, 4, 9), torch.randn(9))
    leaves = [t.clone().requires_grad_() for t in inputs]
    expected = torch.autograd.grad(looped(*leaves), leaves)
    torch.testing.assert_close(torch.autograd.grad(run(*leaves), leaves), expected)
    torch.testing.assert_close(grad(run, (0, 1, 2, 3, 4))(*inputs), expected)


def merged(x, **options):
    lse = x[..., 0].transpose(-1, -2)
    return fastgpt.merge_attention_states(x, lse, x, lse, **options)[0]


def rotated(x, **options):
    tables = torch.ones(2, 7, 2)
    return fastgpt.rotary_embedding(x, *tables, **options)


OPERATORS = {  # each of x (batch, seqlen, nheads, headdim), and its name
    "attention": (lambda x, **o: fastgpt.attention(x, x, x, **o), "fastgpt.attention"),
    "norm": (fastgpt.layer_norm, "a norm of fastgpt"),
    "merge": (merged, "fastgpt.merge_attention_states"),
    "rotary": (rotated, "fastgpt.rotary_embedding"),
}


def dual(function, x):
    with torch.autograd.forward_ad.dual_level():
        function(torch.autograd.forward_ad.make_dual(x, torch.ones_like(x)))


FORWARD_MODE = {
    "dual": dual,
    "jvp": lambda function, x: jvp(function, (x,), (x,)),
    "jacfwd": lambda function, x: jacfwd(function)(x),
}


@pytest.mark.parametrize("transform", FORWARD_MODE)
@pytest.mark.parametrize("name", OPERATORS)
def test_forward_mode_is_refused_by_name(name, transform):
    function, named = OPERATORS[name]
    function = functools.partial(function, backend="reference")
    with pytest.raises(NotImplementedError, match=rf"^{named} has no forward-mode derivative.*jacrev is of"):
        FORWARD_MODE[transform](function, torch.randn(1, 7, 2, 4))


@pytest.mark.parametrize("name", [name for name in OPERATORS if name != "rotary"])
def test_second_derivatives_of_forward_mode_are_refused(name):
    function, _ = OPERATORS[name]
    x, dout = torch.randn(2, 1, 7, 2, 4)
    with pytest.raises(NotImplementedError, match="has no forward-mode derivative"):
        hessian(lambda x: function(x).sum())(x)
    with pytest.raises(NotImplementedError, match="no second derivative"):
        jvp(vjp(function, x)[1], (dout,), (dout,))


@pytest.mark.parametrize("name", ["attention", "norm", "rotary"])
def test_the_way_out_of_forward_mode(name):
    function, _ = OPERATORS[name]
    x = torch.randn(1, 7, 2, 4)
    with sdpa_kernel(SDPBackend.MATH):
        got = jacfwd(lambda x: function(x, backend="torch"))(x)
    torch.testing.assert_close(got, jacrev(function)(x))


def test_nested_vmap():
    x = torch.randn(2, SAMPLES, 5, 3, 8)[:, :, None]
    expected = torch.stack([loop(lambda q: fastgpt.attention(q, q, q), (0,), half) for half in x])
    assert torch.equal(vmap(vmap(lambda q: fastgpt.attention(q, q, q)))(x), expected)


@pytest.mark.parametrize("backend", KERNELS)
def test_dropout_follows_the_randomness_of_vmap(backend):
    x = torch.randn(1, 2, 6, 2, 8).expand(SAMPLES, -1, -1, -1, -1)

    def attend(q):
        return fastgpt.attention(q, q, q, dropout_p=0.5, backend=backend)

    with pytest.raises(RuntimeError, match="randomness"):
        vmap(attend)(x)
    same, different = (vmap(attend, randomness=kind)(x) for kind in ("same", "different"))
    assert torch.equal(same[0], same[1]) and not torch.equal(different[0], different[1])


def test_a_cache_is_refused_under_vmap():
    q, cache = torch.randn(SAMPLES, 2, 1, 2, 8), torch.randn(SAMPLES, 2, 9, 2, 8)
    with torch.no_grad(), pytest.raises(RuntimeError, match=r"appends to its caches in place.*one batch"):
        vmap(lambda q, c: fastgpt.attention_with_kvcache(q, c, c.clone(), cache_seqlens=5))(q, cache)


@pytest.mark.parametrize("kind", ["attention", "gpt"])
def test_gradients_of_each_sample_of_a_module(kind):
    if kind == "attention":
        module, x = fused.FusedCausalSelfAttention(32, 4, 2), torch.randn(SAMPLES, 1, 6, 32)

        def loss(parameters, x):
            return functional_call(module, parameters, (x,)).square().sum()
    else:
        module = fastgpt.GPT(fastgpt.GPTConfig(50, 16, hidden_size=32, num_layers=2, nheads=4))
        x = torch.randint(50, (SAMPLES, 1, 7))

        def loss(parameters, ids):
            return functional_call(module, parameters, (ids[:, :-1], ids[:, 1:]))[1]

    parameters = {name: p.detach() for name, p in module.named_parameters()}
    got = vmap(grad(loss), (None, 0))(parameters, x)
    for i in range(SAMPLES):
        for name, expected in grad(loss)(parameters, x[i]).items():
            torch.testing.assert_close(got[name][i], expected, rtol=1e-4, atol=1e-5)


class Block(torch.nn.Module):
    """Both norms and the attention, all with dropout."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.randn(32))
        self.attention = fused.FusedCausalSelfAttention(32, 4, 2, dropout=0.2)
        self.norm = fused.FusedRMSNorm(32)

    def forward(self, x):
        y, x = fastgpt.layer_norm(x, self.weight, residual=x.sin(), prenorm=True, dropout_p=0.3)
        return self.norm(self.attention(y), x)


def gradients(module, x, run):
    torch.manual_seed(5)
    x = x.clone().requires_grad_()
    run(module, x).square().sum().backward()
    grads = [x.grad, *(p.grad for p in module.parameters())]
    for p in module.parameters():
        p.grad = None
    return grads


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_draws_the_same_dropout(reentrant):
    module, x = Block(), torch.randn(2, 9, 32)
    expected = gradients(module, x, lambda module, x: module(module(x)))

    def run(module, x):
        for _ in range(2):
            x = checkpoint(module, x, use_reentrant=reentrant)
        return x

    got = gradients(module, x, run)
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))
    other = gradients(module, x, lambda m, x: checkpoint(m, x, use_reentrant=reentrant).sin())
    assert not torch.equal(other[0], expected[0])


def test_selective_checkpointing_saves_attention(monkeypatch):
    module, x = Block(), torch.randn(2, 9, 32)
    expected = gradients(module, x, lambda module, x: module(x))
    computed = []
    forward = library._forward
    monkeypatch.setattr(library, "_forward", lambda *args: computed.append(1) or forward(*args))

    def run(saved):
        def policy(ctx, op, *args, **kwargs):
            save = op in saved
            return CheckpointPolicy.MUST_SAVE if save else CheckpointPolicy.PREFER_RECOMPUTE

        contexts = functools.partial(create_selective_checkpoint_contexts, policy)
        return lambda m, x: checkpoint(m, x, use_reentrant=False, context_fn=contexts)

    for saved, times in (((torch.ops.fastgpt.attention_fwd.default,), 1), ((), 2)):
        computed.clear()
        got = gradients(module, x, run(saved))
        assert len(computed) == times
        assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


def test_a_pre_norm_block_under_autocast():
    """As torch.nn.LayerNorm: the residual stream stays float32, where a projection gives bfloat16."""
    linear, x = torch.nn.Linear(32, 32), torch.randn(2, 9, 32)
    for module, plain in (
        (fused.FusedLayerNorm(32), torch.nn.LayerNorm(32)),
        (fused.FusedRMSNorm(32), torch.nn.RMSNorm(32)),
    ):
        exact = plain.double()((linear(x) + x).double())
        plain.float()
        with torch.autocast("cpu", torch.bfloat16):
            out, stream = module(linear(x), residual=x, prenorm=True)
            narrow = module(linear(x))
            other = plain(linear(x) + x)
        assert out.dtype == stream.dtype == torch.float32 and narrow.dtype == torch.bfloat16
        assert_parity("out", out, other, exact)
    with pytest.raises(TypeError, match=r"residual: got dtype torch.float32, expected torch.bfloat16 like x"):
        module(x.bfloat16(), residual=x)


@pytest.mark.parametrize("kv_heads", [4, 2])
def test_attention_module_under_autocast(kv_heads):
    module, x = fused.FusedCausalSelfAttention(32, 4, kv_heads), torch.randn(2, 9, 32)
    exact = module.double()(x.double())
    module.float()

    def plain(x):
        q, k, v = module.qkv_proj(x).unflatten(-1, (-1, 8)).split((4, kv_heads, kv_heads), 2)
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        return module.out_proj(out.transpose(1, 2).flatten(2))

    with torch.autocast("cpu", torch.bfloat16):
        out, other = module(x), plain(x)
    assert out.dtype == torch.bfloat16
    assert_parity("out", out, other, exact)
    out.float().square().sum().backward()
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in module.parameters())


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_attention_of_several_dtypes_under_autocast(backend, compiled):
    """As rotary embeddings in float32 leave them: in autocast's dtype, like scaled_dot_product_attention."""
    q, k, v = (t.requires_grad_() for t in qkv())
    attend = functools.partial(fastgpt.attention, backend=backend)
    if compiled:
        attend = torch.compile(attend, backend="eager", fullgraph=True)
    half = [t.detach().bfloat16().requires_grad_() for t in (q, k, v)]
    expected = fastgpt.attention(*half, backend=backend)
    dout = torch.randn_like(expected)
    for _ in range(2):  # the second time, its metadata is known
        with torch.autocast("cpu", torch.bfloat16):
            out = attend(q, k, v.bfloat16())
        assert out.dtype == torch.bfloat16 and torch.equal(out, expected)
    gradients = torch.autograd.grad(out, (q, k, v), dout)
    for got, exact in zip(gradients, torch.autograd.grad(expected, half, dout), strict=True):
        assert got.dtype == torch.float32 and torch.equal(got, exact.float())
    with pytest.raises(TypeError, match=r"v: got dtype torch.bfloat16, expected torch.float32 like q"):
        fastgpt.attention(q, k, v.bfloat16(), backend=backend)
    with torch.autocast("cpu", torch.bfloat16), pytest.raises(TypeError, match=r"k: got dtype torch.float64"):
        fastgpt.attention(q, k.double(), v, backend=backend)
    with torch.autocast("cpu", torch.bfloat16), pytest.raises(TypeError, match="q: got int"):
        fastgpt.attention(3, k, v.bfloat16(), backend=backend)
