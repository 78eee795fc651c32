"""Layer norm and RMS norm, forward and backward: every backend, one table of cases, one parity rule."""

from __future__ import annotations

import copy
import inspect
import math

import pytest
import torch
import torch.nn.functional as F
from backends import AVAILABLE, DTYPES, assert_parity, judge

import fastgpt
from fastgpt import dispatch
from fastgpt.nn import FusedCausalSelfAttention, FusedLayerNorm, FusedRMSNorm, replace_norms
from fastgpt.ops.attention.reference import philox_keep as attention_keep
from fastgpt.ops.norm.reference import philox_keep
from fastgpt.ops.norm.spec import FEATURES, NormCall
from fastgpt.verify.norm import (
    CASES,
    EPS,
    KINDS,
    NORMS,
    STATE,
    NormCase,
    backward_results,
    double,
    forward_results,
    fused_norm,
    gradients,
    make_inputs,
    plain_norm,
)


def parity_calls():
    """Every case, kind and dtype on every backend; where kernels are interpreted or emulated, which is slow,
    kinds and dtypes take turns from one case to the next."""
    for n, case in enumerate(CASES):
        for backend in AVAILABLE:
            if backend == "torch" and case.dropout_p:  # it has other random bits
                continue
            pairs = [(kind, dtype) for kind in KINDS for dtype in DTYPES]
            turns = {"triton": [pairs[(n + n // 6) % 6]], "cuda": pairs[n % 2 :: 2]}
            for kind, dtype in turns.get(backend, pairs):
                yield pytest.param(case, kind, dtype, backend, id=f"{case}-{backend}-{kind}-{dtype}")


EXACT = [name for name in AVAILABLE if name in ("cpu", "triton", "cuda")]  # more so than plain PyTorch


@pytest.fixture(autouse=True)
def poisoned_outputs(poison):
    """The way in which every backend takes memory really is poisoned."""
    x = torch.ones(2, 3)
    for t in (torch.empty(5), x.new_empty(5), torch.empty_like(x), torch.empty_like(x.bfloat16())):
        assert t.isnan().all()


@pytest.mark.parametrize("case,kind,dtype,backend", parity_calls())
def test_forward_parity(case, kind, dtype, backend):
    judge(lambda: forward_results(case, kind, dtype, backend))


@pytest.mark.parametrize("case,kind,dtype,backend", parity_calls())
def test_backward_parity(case, kind, dtype, backend):
    judge(lambda: backward_results(case, kind, dtype, backend))


@pytest.mark.parametrize("hidden", [768, 8192 + 5])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("backend", EXACT)
def test_a_large_mean_costs_no_digits(backend, kind, hidden):
    # Not even those of the mean's own rounding, 5e-4 here.
    x, weight = torch.randn(9, hidden) + 1e4, torch.randn(hidden)
    exact, _ = plain_norm(kind, x.double(), None, weight.double(), None)
    got = NORMS[kind](x, weight, eps=EPS, backend=backend)
    assert_parity("out", got, exact, exact)


@pytest.mark.parametrize("backend", EXACT)
def test_squares_about_the_first_elements_may_overflow(backend):
    # Of all the others the square is 10³⁶, and there are 4,032 of them; the variance is 1.5·10³⁴.
    x = torch.zeros(3, 4096)
    x[:, :64] = 1e18
    plain, exact = (F.layer_norm(t, x.shape[-1:], eps=EPS) for t in (x, x.double()))
    assert_parity("out", fastgpt.layer_norm(x, eps=EPS, backend=backend), plain, exact)


@pytest.mark.parametrize("backend", [name for name in AVAILABLE if name == "cpu"])
def test_a_tensor_without_memory_is_refused(backend):
    with pytest.raises(TypeError, match="tensor without memory"):
        fastgpt.rms_norm(torch._efficientzerotensor((3, 8)), backend=backend)


@pytest.mark.parametrize("dtype", [torch.int8, torch.bool, torch.float64], ids=str)
@pytest.mark.parametrize("backend", [name for name in AVAILABLE if name == "cpu"])
def test_the_operator_reads_no_other_dtypes(backend, dtype):
    x, weight = torch.ones(3, 8), torch.ones(8).to(dtype)
    for args in ((x, None, weight), (x.to(dtype), None, None)):
        with pytest.raises(TypeError, match=r"tensor in float32, bfloat16 or float16|no kernel reads"):
            torch.ops.fastgpt.norm_fwd(*args, None, None, False, True, EPS, 0.0, backend)


@pytest.mark.parametrize("hidden", [8192, 131072])
@pytest.mark.parametrize("backend", EXACT)
def test_outliers_among_the_first_elements_cost_no_digits(backend, hidden):
    # About them, the mean of the squares is 127 or 2,047 times the variance; in the longer rows, the sum of
    # the squares would also lose what is added to it one by one.
    x = torch.randn(3, hidden)
    x[:, :64] += 1e5
    plain, exact = (F.layer_norm(t, x.shape[-1:], eps=EPS) for t in (x, x.double()))
    assert_parity("out", fastgpt.layer_norm(x, eps=EPS, backend=backend), plain, exact)


@pytest.mark.parametrize("dropout_p", [0.0, 0.4])
@pytest.mark.parametrize("kind", KINDS)
def test_reference_in_float64(kind, dropout_p):
    case = NormCase((5, 3), 33, residual=True, prenorm=True, dropout_p=dropout_p)
    tensors = double(make_inputs(case, torch.float32))
    results = (norm(kind, *tensors[:4], dropout_p) for norm in (fused_norm("reference"), plain_norm))
    for got, exact in zip(*results, strict=True):
        torch.testing.assert_close(got, exact, rtol=1e-12, atol=1e-12)
    exact = gradients(plain_norm, kind, case, tensors)
    for name, got in gradients(fused_norm("reference"), kind, case, tensors).items():
        torch.testing.assert_close(got, exact[name], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dropout_p", [0.0, 0.4])
@pytest.mark.parametrize("prenorm", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_gradcheck(kind, prenorm, dropout_p):
    case = NormCase((3, 2), 5, residual=True)
    leaves = [t.requires_grad_() for t in double(make_inputs(case, torch.float32)[:4])]

    def f(x, residual, weight, bias):
        options = {"prenorm": prenorm, "dropout_p": dropout_p, "rng_state": STATE, "backend": "reference"}
        return NORMS[kind](x, weight, bias, residual=residual, **options)

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


DROPPING = [name for name in AVAILABLE if name != "torch"]


@pytest.mark.parametrize("backend", DROPPING)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("hidden", [1, 3, 16, 17, 64, 65, 1000])
def test_dropout_keeps_what_philox_says(hidden, dtype, backend):
    """Forward and backward, with and without a residual; the rows are those of the leading axes as one."""
    x = torch.ones(3, 7, hidden, dtype=dtype)
    keep = philox_keep(STATE, 0.4, x.shape)
    assert torch.equal(keep.flatten(0, 1), attention_keep(STATE, 0.4, (1, 1, 21, hidden))[0, 0])
    kept = (keep / 0.6).to(dtype)
    leaf = x.clone().requires_grad_()
    for norm in NORMS.values():
        for residual, total in ((None, kept), (torch.zeros_like(x, requires_grad=True), kept)):
            options = {"residual": residual, "dropout_p": 0.4, "rng_state": STATE, "backend": backend}
            out, z = norm(leaf, prenorm=True, **options)
            torch.testing.assert_close(z, total, rtol=1e-6, atol=0)
            assert torch.equal(out, norm(z, backend=backend))
            with torch.no_grad():
                assert torch.equal(out, norm(x, **options))  # without a sum to write it to
            inputs = [t for t in (leaf, residual) if t is not None]
            dx, *dresidual = torch.autograd.grad(z, inputs, x)
            torch.testing.assert_close(dx, kept, rtol=1e-6, atol=0)
            assert all(torch.equal(grad, x) for grad in dresidual)


def test_dropout_is_a_function_of_its_state():
    base = philox_keep(STATE, 0.5, (50, 64))
    for other in (
        STATE + torch.tensor([1, 0]),
        STATE + torch.tensor([0, 1]),
        STATE - torch.tensor([2**40, 0]),
    ):
        assert 0.4 < (philox_keep(other, 0.5, (50, 64)) != base).float().mean() < 0.6
    assert torch.equal(philox_keep(STATE + torch.tensor([0, 2**32]), 0.5, (50, 64)), base)
    assert torch.equal(philox_keep(STATE, 0.5, (20, 37)), base[:20, :37])
    rate = philox_keep(STATE, 0.25, (1000, 100)).float().mean().item()
    assert abs(rate - 0.75) < 6 * math.sqrt(0.25 * 0.75 / 1e5)


@pytest.mark.parametrize("norm", NORMS.values(), ids=NORMS)
def test_dropout_draws_from_torchs_generator(norm):
    x = torch.randn(8, 64)
    torch.manual_seed(3)
    first = norm(x, dropout_p=0.5)
    assert not torch.equal(first, norm(x, dropout_p=0.5))
    torch.manual_seed(3)
    assert torch.equal(first, norm(x, dropout_p=0.5))
    assert torch.equal(norm(x, rng_state=STATE), norm(x))  # no dropout without dropout_p


@pytest.mark.parametrize("backend", DROPPING)
@pytest.mark.parametrize("dropout_p", [1e-12, 1 - 1e-7])
def test_the_least_and_the_most_dropout(dropout_p, backend):
    x, residual = torch.randn(40, 100), torch.randn(40, 100)
    leaves = [t.clone().requires_grad_() for t in (x, residual)]
    options = {"dropout_p": dropout_p, "rng_state": STATE, "prenorm": True, "backend": backend}
    _, z = fastgpt.rms_norm(leaves[0], residual=leaves[1], **options)
    expected = x + residual if dropout_p < 0.5 else residual
    torch.testing.assert_close(z, expected)
    dx, dresidual = torch.autograd.grad(z, leaves, residual)
    torch.testing.assert_close(dx, residual if dropout_p < 0.5 else torch.zeros_like(x))
    assert torch.equal(dresidual, residual)


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
@pytest.mark.parametrize("lead,hidden,dropout_p", [((257,), 1000, 0), ((257,), 1000, 0.1), ((9,), 131072, 0)])
def test_same_bits_at_any_thread_count(lead, hidden, dropout_p, kind, dtype):
    case = NormCase(lead, hidden, residual=True, prenorm=True, dropout_p=dropout_p)
    inputs = make_inputs(case, dtype)
    threads = torch.get_num_threads()
    results = []
    try:
        for count in (1, 2, 3, 2):
            torch.set_num_threads(count)
            out = fused_norm(None)(kind, *inputs[:4], dropout_p)
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

    without_dropout = tuple(name for name in FEATURES if name != "dropout")
    for dtype in DTYPES:
        for backend in ("reference", "cpu"):
            assert not refused(backend, "cpu", dtype, FEATURES)
        assert not refused("torch", "cpu", dtype, without_dropout)
    assert not refused("torch", "cpu", torch.float64, without_dropout)
    with pytest.raises(fastgpt.BackendUnsupported, match="torch's dropout bits are not fastgpt's"):
        fastgpt.layer_norm(torch.zeros(2, 4), dropout_p=0.1, backend="torch")
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
    "dropout_p: got 1.0, expected 0 <= dropout_p < 1": (X, {"dropout_p": 1.0}),
    "dropout_p: got -0.1, expected 0 <= dropout_p < 1": (X, {"dropout_p": -0.1}),
    "dropout_p: got nan, expected 0 <= dropout_p < 1": (X, {"dropout_p": math.nan}),
    "dropout_p: got NoneType, expected a float": (X, {"dropout_p": None}),
    "rng_state: got int, expected a torch.Tensor (2) or None": (X, {"dropout_p": 0.1, "rng_state": 1}),
    "rng_state: got torch.int64 (3,) on cpu, expected int64 (2,) on cpu: seed and offset": (
        X,
        {"dropout_p": 0.1, "rng_state": torch.zeros(3, dtype=torch.int64)},
    ),
    "rng_state: got torch.int32 (2,) on cpu, expected int64": (
        X,
        {"dropout_p": 0.1, "rng_state": torch.zeros(2, dtype=torch.int32)},
    ),
    "rng_state: got torch.int64 (2,) on meta, expected int64 (2,) on cpu": (
        X,
        {"dropout_p": 0.1, "rng_state": STATE.to("meta")},
    ),
    "backend: got 'gpu', expected one of auto": (X, {"backend": "gpu"}),
}


@pytest.mark.parametrize("norm", NORMS.values(), ids=NORMS)
@pytest.mark.parametrize("message", BAD)
def test_errors_name_the_argument(message, norm):
    x, options = BAD[message]
    norm(X)
    norm(X, torch.ones(8), residual=R)
    for _ in range(2):  # neither what passed the checks before nor what did not hides it
        with pytest.raises((TypeError, ValueError)) as error:
            norm(x, **options)
        assert message in str(error.value)


@pytest.mark.parametrize("rms,grad", [(False, True), (True, False)])
@pytest.mark.parametrize("backend", [name for name in AVAILABLE if name != "torch"])
def test_opcheck(backend, rms, grad):
    x, residual = (torch.randn(3, 5, 33, requires_grad=grad) for _ in range(2))
    weight, bias = (torch.randn(33, requires_grad=grad) for _ in range(2))
    dout, stats = torch.randn(3, 5, 33), torch.rand(3, 5)
    forward, backward = torch.ops.fastgpt.norm_fwd.default, torch.ops.fastgpt.norm_bwd.default
    for *args, dropout_p in (
        (x, residual, weight, bias, None, True, 0.0),
        (x, None, None, bias, None, False, 0.0),
        (x.detach(), residual.detach(), None, None, None, False, 0.0),
        (x, residual, weight, bias, STATE, True, 0.3),
        (x, None, weight, None, STATE, True, 0.3),
        (x.detach(), None, None, None, STATE, False, 0.3),
    ):
        torch.library.opcheck(forward, (*args, rms, EPS, dropout_p, backend))
    mean = torch.empty(0) if rms else stats
    x, weight, bias = x.detach(), weight.detach(), bias.detach()
    for *args, dropout_p in (
        (dout, dout, x, weight, bias, mean, stats, None, True, 0.0),
        (dout, None, x, None, None, mean, stats, None, False, 0.0),
        (dout, dout, x, weight, bias, mean, stats, STATE, True, 0.3),
        (dout, None, x, None, None, mean, stats, STATE, False, 0.3),
    ):
        torch.library.opcheck(backward, (*args, rms, EPS, dropout_p, backend))


@pytest.mark.parametrize("norm", NORMS.values(), ids=NORMS)
def test_second_derivatives_are_refused(norm):
    x = torch.randn(2, 8, requires_grad=True)
    (dx,) = torch.autograd.grad(norm(x, backend="reference").square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="no second derivative"):
        dx.sum().backward()


def test_the_operator_refuses_a_gradient_without_the_sum():
    x = torch.randn(2, 8, requires_grad=True)
    with pytest.raises(ValueError, match="store_sum: got False, expected True"):
        torch.ops.fastgpt.norm_fwd(x, x, None, None, None, False, False, EPS, 0.0, "reference")
    with pytest.raises(ValueError, match="store_sum: got False, expected True"):
        torch.ops.fastgpt.norm_fwd(x, None, None, None, STATE, False, False, EPS, 0.1, "reference")


@pytest.mark.parametrize("kind,dynamic", [("layer", True), ("rms", False)])
@pytest.mark.parametrize(
    "backend,dropout_p", [*((name, 0.0) for name in AVAILABLE), *((name, 0.3) for name in DROPPING)]
)
def test_compile_fullgraph(backend, dropout_p, kind, dynamic):
    def f(x, residual, weight):
        options = {"prenorm": True, "dropout_p": dropout_p, "rng_state": STATE, "backend": backend}
        out, total = NORMS[kind](x.sin(), weight, residual=residual, **options)
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


FUSED_AND_PLAIN = [(FusedLayerNorm, torch.nn.LayerNorm), (FusedRMSNorm, torch.nn.RMSNorm)]


@pytest.mark.parametrize("fused,plain", FUSED_AND_PLAIN)
def test_norm_modules_take_any_strides(fused, plain):
    """As channels that a permutation puts last, and one number expanded."""
    for x in (torch.randn(2, 16, 5, 3).permute(0, 2, 3, 1), torch.randn(4, 1).expand(4, 16)):
        torch.testing.assert_close(fused(16)(x), plain(16)(x))
        out, total = fused(16)(x, residual=x, prenorm=True)
        torch.testing.assert_close((out, total), (plain(16)(2 * x), 2 * x))


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize("layout", [torch.jagged, torch.strided], ids=str)
@pytest.mark.parametrize("fused,plain", FUSED_AND_PLAIN)
def test_norm_modules_leave_nested_tensors_to_torch(fused, plain, layout):
    if plain is torch.nn.RMSNorm and layout == torch.strided:
        pytest.skip("torch has none of these")
    x = torch.nested.nested_tensor([torch.randn(n, 16) for n in (2, 3)], layout=layout)
    for got, expected in zip(fused(16)(x).unbind(), plain(16)(x).unbind(), strict=True):
        assert torch.equal(got, expected)


@pytest.mark.filterwarnings("ignore:Mismatch dtype between input and weight")
@pytest.mark.parametrize("weight", DTYPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rms_norm_module_takes_any_two_dtypes(dtype, weight):
    x = torch.randn(4, 16, dtype=dtype)
    got, expected = FusedRMSNorm(16, dtype=weight)(x), torch.nn.RMSNorm(16, dtype=weight)(x)
    torch.testing.assert_close(got, expected)
    assert got.dtype == expected.dtype


def test_norm_modules_take_torchs_arguments():
    for fused, plain in ((FusedLayerNorm, torch.nn.LayerNorm), (FusedRMSNorm, torch.nn.RMSNorm)):
        assert list(inspect.signature(fused).parameters) == list(inspect.signature(plain).parameters)


def test_norm_modules_take_one_axis():
    for module in (FusedLayerNorm, FusedRMSNorm):
        with pytest.raises(ValueError, match=r"normalized_shape: got \(4, 8\), expected one axis"):
            module((4, 8))


class Norms(torch.nn.Module):
    """Of every kind, one of them in two places."""

    def __init__(self):
        super().__init__()
        self.first, self.rms = torch.nn.LayerNorm(12), torch.nn.RMSNorm(12)
        self.inner = torch.nn.Sequential(
            torch.nn.Linear(12, 12), torch.nn.LayerNorm(12, bias=False), self.first
        )
        self.wide = torch.nn.LayerNorm((2, 12))
        self.own = type("OwnNorm", (torch.nn.LayerNorm,), {})(12)
        self.wrapped = torch.nn.LayerNorm(12)
        self.wrapped.forward = torch.sin

    def forward(self, x):
        return self.wrapped(self.own(self.wide(self.inner(self.rms(self.first(x))))))


def test_replace_norms():
    model, x = Norms(), torch.randn(3, 2, 12)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    seen = []
    model.rms.register_forward_hook(lambda *args: seen.append(args))
    exact, plain = copy.deepcopy(model).double()(x.double()), model(x)
    parameters, state = dict(model.named_parameters()), copy.deepcopy(model.state_dict())
    assert replace_norms(model.eval()) is model
    kinds = {
        name: type(module).__name__ for name, module in model.named_modules() if "Norm" in str(type(module))
    }
    assert kinds.pop("") == "Norms"
    assert kinds == {
        "first": "FusedLayerNorm",
        "rms": "FusedRMSNorm",
        "inner.1": "FusedLayerNorm",
        "wide": "LayerNorm",
        "own": "OwnNorm",
        "wrapped": "LayerNorm",
    }
    assert model.inner[2] is model.first and not model.first.training
    assert_parity("out", model(x), plain, exact)
    assert len(seen) == 3
    now = dict(model.named_parameters())
    assert now.keys() == parameters.keys() and all(now[name] is parameters[name] for name in now)
    before = model.first.weight.detach().clone()
    model(x).square().sum().backward()
    optimizer.step()
    assert not torch.equal(model.first.weight, before)
    model.load_state_dict(state)
    Norms().load_state_dict(model.state_dict())
    assert torch.equal(model.first.weight, before)


def test_replace_norms_of_a_norm_itself():
    norm = torch.nn.RMSNorm(12)
    fused = replace_norms(norm)
    assert type(norm) is torch.nn.RMSNorm and type(fused) is FusedRMSNorm and fused.weight is norm.weight
    assert replace_norms(fused) is fused
    with pytest.raises(TypeError, match=r"^model: got type, expected a torch.nn.Module"):
        replace_norms(torch.nn.LayerNorm)


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
