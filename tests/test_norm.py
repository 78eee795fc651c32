"""Layer norm and RMS norm, forward and backward: every backend, one table of cases, one parity rule."""

from __future__ import annotations

import copy
import inspect
import math
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from backends import AVAILABLE, DTYPES, assert_parity

import fastgpt
from fastgpt import dispatch
from fastgpt.nn import FusedCausalSelfAttention, FusedLayerNorm, FusedRMSNorm
from fastgpt.ops.norm.spec import FEATURES, NormCall

KINDS = ("layer", "rms")
NORMS = {"layer": fastgpt.layer_norm, "rms": fastgpt.rms_norm}
NAMES = ("x", "residual", "weight", "bias")
EPS = 1e-5


class NormCase(NamedTuple):
    """One call; ``weight`` is none, same (x's dtype) or float32, ``layout`` that of every (..., hidden)."""

    lead: tuple[int, ...]
    hidden: int
    weight: str = "same"
    bias: bool = True
    residual: bool = False
    prenorm: bool = False
    layout: str = "contiguous"
    offset: float = 0.0  # mean of x over its standard deviation

    def __str__(self) -> str:
        used = [name for name in ("bias", "residual", "prenorm") if getattr(self, name)]
        size = "x".join(map(str, (*self.lead, self.hidden)))
        weight = "no-weight" if self.weight == "none" else f"{self.weight}-weight"
        return "-".join([size, weight, *used, *([self.layout] if self.layout != "contiguous" else [])]) + (
            f"-offset{self.offset:g}" if self.offset else ""
        )


CASES = [
    NormCase((0,), 768, residual=True, prenorm=True),
    NormCase((), 7),
    NormCase((3,), 1, residual=True),
    NormCase((257,), 1, weight="none", bias=False),
    NormCase((3,), 7, weight="none", bias=True, residual=True, prenorm=True),
    NormCase((257,), 7, residual=True, prenorm=True),
    NormCase((257,), 64),
    NormCase((3, 1, 5), 64, weight="float32", residual=True),
    NormCase((1,), 576, bias=False, residual=True, prenorm=True),
    NormCase((2, 17), 576, weight="float32", bias=False, residual=True, prenorm=True),
    NormCase((257,), 768, residual=True, prenorm=True),
    NormCase((33,), 768, prenorm=True),
    NormCase((65,), 768, offset=1e4),
    NormCase((65,), 768, residual=True, offset=1e4),
    NormCase((33,), 768, layout="slice", residual=True, prenorm=True),
    NormCase((33,), 1000, weight="none", bias=False),
    NormCase((4, 5), 1000, layout="transpose", residual=True, prenorm=True),
    NormCase((9,), 1000, layout="expand", residual=True, prenorm=True),
    NormCase((17,), 4096 + 3, weight="float32", residual=True, prenorm=True),
    NormCase((2,), 131072, weight="none", bias=True, residual=True, prenorm=True),
]


def laid_out(t, layout):
    """The values of t (of one row of t, for expand) in another memory layout."""
    if layout == "slice":  # what lies beside a row is NaN
        wide = torch.full((*t.shape[:-1], t.shape[-1] + 5), torch.nan, dtype=t.dtype)
        wide[..., 3:-2] = t
        return wide[..., 3:-2]
    if layout == "transpose":
        return t.transpose(0, 1).contiguous().transpose(0, 1)
    if layout == "expand":
        return t[:1].expand_as(t)
    return t


def make_inputs(case, dtype):
    """x, residual, weight, bias, and the gradients of out and of the sum."""
    shape = (*case.lead, case.hidden)
    x, residual, dout, dsum = (laid_out(torch.randn(shape).to(dtype), case.layout) for _ in range(4))
    weight_dtype = torch.float32 if case.weight == "float32" else dtype
    weight, bias = (torch.randn(case.hidden).to(weight_dtype) for _ in range(2))
    return (
        laid_out((x.float() + case.offset).to(dtype), case.layout),
        residual if case.residual else None,
        None if case.weight == "none" else weight,
        bias if case.bias else None,
        dout,
        dsum,
    )


def plain_norm(kind, x, residual, weight, bias):
    """(out, sum) as anyone would write it with what torch ships."""
    z = x if residual is None else x + residual
    wide = z.to(torch.promote_types(z.dtype, next((t for t in (weight, bias) if t is not None), z).dtype))
    if kind == "layer":
        return F.layer_norm(wide, x.shape[-1:], weight, bias, EPS).to(x.dtype), z
    out = F.rms_norm(wide, x.shape[-1:], weight, EPS)
    return (out if bias is None else out + bias).to(x.dtype), z


def fused_norm(backend):
    def norm(kind, x, residual, weight, bias):
        return NORMS[kind](x, weight, bias, EPS, residual=residual, prenorm=True, backend=backend)

    return norm


def gradients(norm, kind, case, inputs):
    """The gradient of each input that the case has, by name."""
    *tensors, dout, dsum = inputs
    leaves = [None if t is None else t.detach().requires_grad_() for t in tensors]
    out, total = norm(kind, *leaves)
    if case.prenorm:
        torch.autograd.backward([out, total], [dout, dsum])
    else:
        out.backward(dout)
    return {name: t.grad for name, t in zip(NAMES, leaves, strict=True) if t is not None}


def double(tensors):
    return [None if t is None else t.double() for t in tensors]


@pytest.fixture(autouse=True)
def poisoned_outputs(poison):
    """The way in which every backend takes memory really is poisoned."""
    x = torch.ones(2, 3)
    for t in (torch.empty(5), x.new_empty(5), torch.empty_like(x), torch.empty_like(x.bfloat16())):
        assert t.isnan().all()


@pytest.mark.parametrize("backend", AVAILABLE)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("case", [pytest.param(case, id=str(case)) for case in CASES])
def test_forward_parity(case, kind, dtype, backend):
    *tensors, _, _ = make_inputs(case, dtype)
    x, residual, weight, bias = tensors
    got = NORMS[kind](x, weight, bias, EPS, residual=residual, prenorm=case.prenorm, backend=backend)
    got = got if case.prenorm else (got,)
    plain, exact = plain_norm(kind, *tensors), plain_norm(kind, *double(tensors))
    for what, *values in zip(("out", "sum"), got, plain, exact, strict=False):
        assert values[0].dtype == dtype
        assert_parity(what, *values)
    assert got[0].is_contiguous()


@pytest.mark.parametrize("backend", AVAILABLE)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("case", [pytest.param(case, id=str(case)) for case in CASES])
def test_backward_parity(case, kind, dtype, backend):
    inputs = make_inputs(case, dtype)
    got = gradients(fused_norm(backend), kind, case, inputs)
    plain = gradients(plain_norm, kind, case, inputs)
    exact = gradients(plain_norm, kind, case, double(inputs))
    assert got.keys() == exact.keys()
    for name in got:
        assert got[name].dtype == plain[name].dtype
        assert_parity(f"d{name}", got[name], plain[name], exact[name], factor=3)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("backend", [name for name in AVAILABLE if name == "cpu"])
def test_a_large_mean_costs_no_digits(backend, kind):
    # Not even those of the mean's own rounding, 5e-4 here.
    x, weight = torch.randn(33, 768) + 1e4, torch.randn(768)
    exact, _ = plain_norm(kind, x.double(), None, weight.double(), None)
    got = NORMS[kind](x, weight, eps=EPS, backend=backend)
    assert_parity("out", got, exact, exact)


@pytest.mark.parametrize("kind", KINDS)
def test_reference_in_float64(kind):
    case = NormCase((5, 3), 33, residual=True, prenorm=True)
    tensors = double(make_inputs(case, torch.float32))
    for got, exact in zip(
        fused_norm("reference")(kind, *tensors[:4]), plain_norm(kind, *tensors[:4]), strict=True
    ):
        torch.testing.assert_close(got, exact, rtol=1e-12, atol=1e-12)
    exact = gradients(plain_norm, kind, case, tensors)
    for name, got in gradients(fused_norm("reference"), kind, case, tensors).items():
        torch.testing.assert_close(got, exact[name], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("prenorm", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_gradcheck(kind, prenorm):
    case = NormCase((3, 2), 5, residual=True)
    leaves = [t.requires_grad_() for t in double(make_inputs(case, torch.float32)[:4])]

    def f(x, residual, weight, bias):
        return NORMS[kind](x, weight, bias, residual=residual, prenorm=prenorm, backend="reference")

    assert torch.autograd.gradcheck(f, leaves)


@pytest.mark.parametrize("backend", AVAILABLE)
@pytest.mark.parametrize("kind", KINDS)
def test_gradient_of_the_sum_alone(kind, backend):
    x, residual = (torch.randn(3, 33, requires_grad=True) for _ in range(2))
    _, total = NORMS[kind](x, residual=residual, prenorm=True, backend=backend)
    grad = torch.randn(3, 33)
    for got in torch.autograd.grad(total, (x, residual), grad):
        torch.testing.assert_close(got, grad, rtol=0, atol=0)


@pytest.mark.parametrize("backend", AVAILABLE)
def test_prenorm_without_a_residual_gives_x_itself(backend):
    x = torch.randn(3, 33)
    assert fastgpt.layer_norm(x, prenorm=True, backend=backend)[1] is x


@pytest.mark.parametrize("backend", AVAILABLE)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_nonfinite_values_stay_in_their_row(dtype, backend):
    x = torch.randn(4, 100).to(dtype)
    x[1, 7], x[2, 99] = torch.nan, torch.inf
    for norm in NORMS.values():
        bad = norm(x, backend=backend).isnan()
        assert bad[1].all() and bad[2].any() and not bad[[0, 3]].any()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("lead,hidden", [((257,), 1000), ((9,), 131072)])
def test_same_bits_at_any_thread_count(lead, hidden, kind, dtype):
    case = NormCase(lead, hidden, residual=True, prenorm=True)
    inputs = make_inputs(case, dtype)
    threads = torch.get_num_threads()
    results = []
    try:
        for count in (1, 2, 3, 2):
            torch.set_num_threads(count)
            out = fused_norm(None)(kind, *inputs[:4])
            results.append([*out, *gradients(fused_norm(None), kind, case, inputs).values()])
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        for a, b in zip(results[0], other, strict=True):
            assert torch.equal(a, b)


@pytest.mark.parametrize("backend", [name for name in AVAILABLE if name == "cpu"])
def test_a_row_does_not_depend_on_the_batch(backend):
    x, weight, bias = torch.randn(100, 1000), torch.randn(1000), torch.randn(1000)
    whole = fastgpt.layer_norm(x, weight, bias, backend=backend)
    for row in (0, 57, 99):
        assert torch.equal(fastgpt.layer_norm(x[row], weight, bias, backend=backend), whole[row])


def test_what_each_backend_supports():
    def refused(backend, *call):
        return dispatch.implementation("norm", backend).unsupported(NormCall(*call))

    for backend in ("reference", "torch", "cpu"):
        for dtype in DTYPES:
            assert not refused(backend, "cpu", dtype, FEATURES)
    assert not refused("torch", "cpu", torch.float64, FEATURES)
    assert len(refused("cpu", "cuda", torch.float64, ("rms", "something new"))) == 3
    with pytest.raises(fastgpt.BackendUnsupported, match=r"'cpu' cannot serve norm\(float64 on cpu, rms, we"):
        fastgpt.rms_norm(torch.zeros(2, 4).double(), torch.ones(4), backend="cpu")


X, R = torch.zeros(2, 3, 8), torch.zeros(2, 3, 8)
BAD = {
    "x: got list, expected a torch.Tensor": ([1.0], {}),
    "x: got shape (), expected (..., hidden)": (torch.tensor(1.0), {}),
    "x: got shape (2, 0), expected (..., hidden) with hidden >= 1": (torch.zeros(2, 0), {}),
    "x: got dtype torch.int64, expected float32": (torch.zeros(2, 8, dtype=torch.int64), {}),
    "x: got strides (1, 8), expected the last one to be 1": (torch.zeros(4, 8).t(), {}),
    "weight: got float, expected a torch.Tensor (hidden)": (X, {"weight": 1.0}),
    "weight: got shape (7,), expected (8,)": (X, {"weight": torch.ones(7)}),
    "weight: got shape (3, 8), expected (8,)": (X, {"weight": torch.ones(3, 8)}),
    "weight: got dtype torch.float64, expected torch.float32": (X, {"weight": torch.ones(8).double()}),
    "weight: got dtype torch.bfloat16, expected torch.float16 like x, or torch.float32": (
        X.half(),
        {"weight": torch.ones(8).bfloat16()},
    ),
    "weight: got device meta, expected cpu": (X, {"weight": torch.ones(8, device="meta")}),
    "weight: got stride 2, expected 1": (X, {"weight": torch.ones(16)[::2]}),
    "bias: got shape (1,), expected (8,)": (X, {"bias": torch.ones(1)}),
    "bias: got dtype torch.float32, expected torch.float16 like weight": (
        X.half(),
        {"weight": torch.ones(8).half(), "bias": torch.ones(8)},
    ),
    "residual: got int, expected a torch.Tensor": (X, {"residual": 0}),
    "residual: got shape (3, 8), expected (2, 3, 8) like x": (X, {"residual": R[0]}),
    "residual: got dtype torch.bfloat16, expected torch.float32 like x": (X, {"residual": R.bfloat16()}),
    "residual: got device meta, expected cpu like x": (X, {"residual": R.to("meta")}),
    "residual: got strides (24, 1, 3), expected the last one to be 1": (
        X,
        {"residual": torch.zeros(2, 8, 3).transpose(1, 2)},
    ),
    "eps: got nan, expected a finite number that is not negative": (X, {"eps": math.nan}),
    "eps: got -1e-05, expected a finite number that is not negative": (X, {"eps": -1e-5}),
    "eps: got inf, expected a finite number": (X, {"eps": math.inf}),
    "eps: got str, expected a float": (X, {"eps": "1e-5"}),
    "prenorm: got 1, expected True or False": (X, {"prenorm": 1}),
    "backend: got 'gpu', expected one of auto": (X, {"backend": "gpu"}),
}


@pytest.mark.parametrize("norm", NORMS.values(), ids=NORMS)
@pytest.mark.parametrize("message", BAD)
def test_errors_name_the_argument(message, norm):
    x, options = BAD[message]
    with pytest.raises((TypeError, ValueError)) as error:
        norm(x, **options)
    assert message in str(error.value)


@pytest.mark.parametrize("rms,grad", [(False, True), (True, False)])
@pytest.mark.parametrize("backend", [name for name in AVAILABLE if name != "torch"])
def test_opcheck(backend, rms, grad):
    x, residual = (torch.randn(3, 5, 33, requires_grad=grad) for _ in range(2))
    weight, bias = (torch.randn(33, requires_grad=grad) for _ in range(2))
    dout, stats = torch.randn(3, 5, 33), torch.rand(15)
    forward, backward = torch.ops.fastgpt.norm_fwd.default, torch.ops.fastgpt.norm_bwd.default
    for args in (
        (x, residual, weight, bias, True),
        (x, None, None, bias, False),
        (x.detach(), residual.detach(), None, None, False),
    ):
        torch.library.opcheck(forward, (*args, rms, EPS, backend))
    mean = torch.empty(0) if rms else stats
    x, weight, bias = x.detach(), weight.detach(), bias.detach()
    torch.library.opcheck(backward, (dout, dout, x, weight, bias, mean, stats, rms, EPS, backend))
    torch.library.opcheck(backward, (dout, None, x, None, None, mean, stats, rms, EPS, backend))


@pytest.mark.parametrize("norm", NORMS.values(), ids=NORMS)
def test_second_derivatives_are_refused(norm):
    x = torch.randn(2, 8, requires_grad=True)
    (dx,) = torch.autograd.grad(norm(x, backend="reference").square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="no second derivative"):
        dx.sum().backward()


def test_the_operator_refuses_a_gradient_without_the_sum():
    x = torch.randn(2, 8, requires_grad=True)
    with pytest.raises(ValueError, match="store_sum: got False, expected True"):
        torch.ops.fastgpt.norm_fwd(x, x, None, None, False, False, EPS, "reference")


@pytest.mark.parametrize("kind,dynamic", [("layer", True), ("rms", False)])
@pytest.mark.parametrize("backend", AVAILABLE)
def test_compile_fullgraph(backend, kind, dynamic):
    def f(x, residual, weight):
        out, total = NORMS[kind](x.sin(), weight, residual=residual, prenorm=True, backend=backend)
        return out.exp() + total.cos()

    torch._dynamo.reset()
    compiled = torch.compile(f, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for rows in (4, 7):
        inputs = [torch.randn(*shape, requires_grad=True) for shape in ((rows, 33), (rows, 33), (33,))]
        with torch.no_grad():
            torch.testing.assert_close(compiled(*inputs), f(*inputs))
        out, expected = compiled(*inputs), f(*inputs)
        torch.testing.assert_close(out, expected)
        dout = torch.randn_like(out)
        for a, b in zip(
            torch.autograd.grad(out, inputs, dout), torch.autograd.grad(expected, inputs, dout), strict=True
        ):
            torch.testing.assert_close(a, b)


@pytest.mark.parametrize(
    "fused,plain",
    [
        (FusedLayerNorm(33), torch.nn.LayerNorm(33)),
        (FusedLayerNorm(33, 1e-3, bias=False), torch.nn.LayerNorm(33, 1e-3, bias=False)),
        (FusedLayerNorm(33, elementwise_affine=False), torch.nn.LayerNorm(33, elementwise_affine=False)),
        (FusedRMSNorm(33), torch.nn.RMSNorm(33)),
        (FusedRMSNorm(33, 1e-3, elementwise_affine=False), torch.nn.RMSNorm(33, 1e-3, False)),
    ],
    ids=str,
)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_norm_modules_are_drop_in(fused, plain, dtype):
    fused, plain = copy.deepcopy(fused).to(dtype), copy.deepcopy(plain).to(dtype)
    for parameter in plain.parameters():
        torch.nn.init.normal_(parameter)
    fused.load_state_dict(plain.state_dict())
    x, residual = (1e-3 * torch.randn(4, 33, dtype=dtype) for _ in range(2))
    torch.testing.assert_close(fused(x), plain(x))
    out, total = fused(x, residual, prenorm=True)
    torch.testing.assert_close(out, plain(x + residual))
    assert torch.equal(total, x + residual)


def test_norm_modules_take_torchs_arguments():
    for fused, plain in ((FusedLayerNorm, torch.nn.LayerNorm), (FusedRMSNorm, torch.nn.RMSNorm)):
        assert list(inspect.signature(fused).parameters) == list(inspect.signature(plain).parameters)


def test_norm_modules_take_one_axis():
    for module in (FusedLayerNorm, FusedRMSNorm):
        with pytest.raises(ValueError, match=r"normalized_shape: got \(4, 8\), expected one axis"):
            module((4, 8))


@pytest.mark.parametrize("num_kv_heads,window", [(None, (-1, -1)), (2, (3, -1)), (1, (-1, -1))])
def test_causal_self_attention(num_kv_heads, window):
    module = FusedCausalSelfAttention(24, 4, num_kv_heads, window_size=window)
    x = torch.randn(2, 9, 24)
    heads_k = num_kv_heads or 4
    heads = module.qkv_proj(x).view(2, 9, 4 + 2 * heads_k, 6).transpose(1, 2)
    q, k, v = heads[:, :4], heads[:, 4 : 4 + heads_k], heads[:, 4 + heads_k :]
    mask = torch.ones(9, 9, dtype=torch.bool).tril()
    if window[0] >= 0:
        mask = mask.triu(-window[0])
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True)
    torch.testing.assert_close(module(x), module.out_proj(out.transpose(1, 2).reshape(2, 9, 24)))


def test_causal_self_attention_drops_in_training_only():
    module = FusedCausalSelfAttention(24, 4, dropout=0.5)
    x = torch.randn(2, 9, 24)
    assert not torch.equal(module(x), module(x))
    assert torch.equal(module.eval()(x), module(x))


def test_causal_self_attention_checks_its_heads():
    with pytest.raises(ValueError, match="num_heads: got 5, expected a divisor of embed_dim 24"):
        FusedCausalSelfAttention(24, 5)
    with pytest.raises(ValueError, match="num_kv_heads: got 3, expected a divisor of num_heads 4"):
        FusedCausalSelfAttention(24, 4, 3)
