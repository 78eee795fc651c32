"""F.scaled_dot_product_attention, nn.MultiheadAttention and torch's flash attention hook on fastgpt."""

import copy
import threading

import pytest
import torch
import torch.nn.functional as F
from backends import assert_parity, judge
from test_gpt import random_model
from torch import nn
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention as imported_by_name

import fastgpt
from fastgpt import dispatch
from fastgpt.integrations import sdpa

OPERATORS = (
    "scaled_dot_product_attention",
    "_native_multi_head_attention",
    "_scaled_dot_product_flash_attention",
    "_scaled_dot_product_flash_attention_backward",
    "_flash_attention_forward",
    "_flash_attention_forward_no_dropout_inplace",
    "_flash_attention_backward",
)


def in_place():
    """What torch would run: its dispatcher's tables, and what else serving could change."""
    tables = [torch._C._dispatch_dump_table(f"aten::{name}") for name in OPERATORS]
    return tables, F.scaled_dot_product_attention, torch.backends.mha.get_fastpath_enabled()


@pytest.fixture(autouse=True)
def undone():
    before = in_place()
    yield
    sdpa.disable()
    assert in_place() == before


@pytest.fixture
def served(monkeypatch):
    """The calls of fastgpt.attention that come from here: the arguments of each."""
    calls, attention = [], sdpa.attention

    def record(*args, **options):
        calls.append((args, options))
        return attention(*args, **options)

    monkeypatch.setattr(sdpa, "attention", record)
    return calls


@pytest.fixture
def left(caplog, monkeypatch):
    """Why calls were left to torch."""
    monkeypatch.setattr(dispatch, "_said", set())
    caplog.set_level("DEBUG", "fastgpt")

    def reasons():
        text = " is left to torch: "
        return [r.getMessage().partition(text)[2] for r in caplog.records if text in r.getMessage()]

    return reasons


def randn(*shape, dtype=torch.float64):
    return torch.randn(*shape, dtype=dtype)


def hidden_rows(*shape):
    """A boolean mask with a row that sees no key."""
    mask = torch.rand(*shape) < 0.6
    mask[..., 1, :] = False
    return mask


def additive(*shape):
    return randn(*shape).masked_fill(~hidden_rows(*shape), -torch.inf)


def math(query, key, value, attn_mask=None, is_causal=False, scale=None, enable_gqa=False):
    """The definition, in the precision it is given."""
    if enable_gqa:
        key, value = (t.repeat_interleave(query.shape[-3] // t.shape[-3], -3) for t in (key, value))
    scores = query @ key.transpose(-1, -2) * (query.shape[-1] ** -0.5 if scale is None else scale)
    if is_causal:
        scores = scores.masked_fill(~torch.ones_like(scores[0], dtype=torch.bool).tril(), -torch.inf)
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        scores = scores.masked_fill(~attn_mask, -torch.inf)
    elif attn_mask is not None:
        scores = scores + attn_mask
    empty = (scores == -torch.inf).all(-1, keepdim=True)
    return scores.masked_fill(empty, 0).softmax(-1).masked_fill(empty, 0) @ value


# q, k, v in float64, and the other arguments.
CASES = {
    "plain": lambda: (randn(2, 3, 9, 8), randn(2, 3, 7, 8), randn(2, 3, 7, 8), {}),
    "layout of a projection": lambda: (
        *randn(2, 9, 3, 4, 8).permute(2, 0, 3, 1, 4).unbind(),
        {"is_causal": True},
    ),
    "causal": lambda: (randn(2, 3, 9, 8), randn(2, 3, 9, 8), randn(2, 3, 9, 8), {"is_causal": True}),
    "causal, more keys": lambda: (
        randn(2, 3, 5, 8),
        randn(2, 3, 9, 8),
        randn(2, 3, 9, 8),
        {"is_causal": True},
    ),
    "causal, more queries": lambda: (
        *(randn(2, 3, 9, 8), randn(2, 3, 5, 8), randn(2, 3, 5, 8)),
        {"is_causal": True},
    ),
    "causal, one query": lambda: (
        randn(2, 8, 1, 8),
        randn(2, 8, 9, 8),
        randn(2, 8, 9, 8),
        {"is_causal": True},
    ),
    "scale": lambda: (randn(2, 3, 9, 8), randn(2, 3, 7, 8), randn(2, 3, 7, 8), {"scale": -0.7}),
    "headdims differ": lambda: (randn(2, 3, 9, 8), randn(2, 3, 7, 8), randn(2, 3, 7, 5), {}),
    "boolean mask (sq, sk)": lambda: (
        *(randn(2, 3, 9, 8), randn(2, 3, 7, 8), randn(2, 3, 7, 8)),
        {"attn_mask": hidden_rows(9, 7)},
    ),
    "boolean mask (batch, 1, 1, sk)": lambda: (
        *(randn(2, 3, 9, 8), randn(2, 3, 7, 8), randn(2, 3, 7, 8)),
        {"attn_mask": (torch.arange(7) < torch.tensor([[5], [7]]))[:, None, None]},
    ),
    "boolean mask (nheads, sq, 1)": lambda: (
        *(randn(2, 3, 9, 8), randn(2, 3, 7, 8), randn(2, 3, 7, 8)),
        {"attn_mask": hidden_rows(3, 9, 1)},
    ),
    "additive mask": lambda: (
        *(randn(2, 3, 9, 8), randn(2, 3, 7, 8), randn(2, 3, 7, 8)),
        {"attn_mask": randn(2, 3, 9, 7)},
    ),
    "additive mask, −inf": lambda: (
        *(randn(2, 3, 9, 8), randn(2, 3, 7, 8), randn(2, 3, 7, 8)),
        {"attn_mask": additive(3, 9, 7)},
    ),
    "additive mask, expanded": lambda: (
        *(randn(2, 3, 9, 8), randn(2, 3, 7, 8), randn(2, 3, 7, 8)),
        {"attn_mask": randn(2, 1, 9, 1).expand(2, 3, 9, 7)},
    ),
    "gqa": lambda: (randn(2, 6, 9, 8), randn(2, 2, 7, 8), randn(2, 2, 7, 8), {"enable_gqa": True}),
    "gqa, mask": lambda: (
        *(randn(2, 6, 9, 8), randn(2, 2, 7, 8), randn(2, 2, 7, 8)),
        {"enable_gqa": True, "attn_mask": randn(6, 9, 7)},
    ),
    "gqa, no batch": lambda: (randn(6, 9, 8), randn(2, 7, 8), randn(2, 7, 8), {"enable_gqa": True}),
    "one key head": lambda: (randn(2, 6, 9, 8), randn(2, 1, 7, 8), randn(2, 1, 7, 8), {}),
    "one query head": lambda: (randn(2, 1, 9, 8), randn(2, 6, 7, 8), randn(2, 6, 7, 8), {}),
    "3-D": lambda: (randn(6, 9, 8), randn(6, 7, 8), randn(6, 7, 8), {"attn_mask": randn(6, 1, 7)}),
    "3-D, causal": lambda: (randn(6, 9, 8), randn(6, 9, 8), randn(6, 9, 8), {"is_causal": True}),
    "2-D": lambda: (randn(19, 8), randn(17, 8), randn(17, 8), {"attn_mask": hidden_rows(19, 17)}),
    "5-D": lambda: (randn(2, 2, 3, 9, 8), randn(2, 2, 3, 7, 8), randn(2, 2, 3, 7, 8), {}),
    "5-D, mask": lambda: (
        *(randn(2, 2, 3, 9, 8), randn(2, 2, 3, 7, 8), randn(2, 2, 3, 7, 8)),
        {"attn_mask": randn(2, 1, 3, 9, 7)},
    ),
    "5-D, one mask": lambda: (
        *(randn(2, 2, 3, 9, 8), randn(2, 2, 3, 7, 8), randn(2, 2, 3, 7, 8)),
        {"attn_mask": hidden_rows(9, 7)},
    ),
    "batches broadcast": lambda: (randn(1, 2, 3, 9, 8), randn(2, 1, 3, 7, 8), randn(2, 1, 3, 7, 8), {}),
    "4-D and 3-D": lambda: (randn(2, 3, 9, 8), randn(3, 7, 8), randn(3, 7, 8), {}),
    "rows not dense": lambda: (
        *(randn(2, 3, 8, 9).transpose(-1, -2) for _ in range(3)),
        {"is_causal": True},
    ),
}


def leaves(args, options, dtype):
    """The same as leaves of their own, and those of them that have a gradient."""
    args = [t.to(dtype).detach().requires_grad_() for t in args]
    options = dict(options)
    mask = options.get("attn_mask")
    if mask is not None and mask.is_floating_point():
        options["attn_mask"] = mask.to(dtype).detach().requires_grad_()
        return args, options, [*args, options["attn_mask"]]
    return args, options, args


def run(function, args, options, dtype, dout=None):
    """out, and the gradients of all that has one."""
    args, options, inputs = leaves(args, options, dtype)
    out = function(*args, **options)
    dout = torch.randn_like(out) if dout is None else dout.to(dtype)
    return dout, [out.detach(), *torch.autograd.grad(out, inputs, dout)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", CASES)
def test_parity(name, dtype, served):
    def draw():
        *tensors, options = CASES[name]()
        tensors = [t.to(dtype).double() for t in tensors]  # which float64 then starts from, too
        if (mask := options.get("attn_mask")) is not None and mask.is_floating_point():
            options["attn_mask"] = mask.to(dtype).double()
        dout, own = run(F.scaled_dot_product_attention, tensors, options, dtype)
        assert not served
        with sdpa.enable("cpu"):
            _, got = run(F.scaled_dot_product_attention, tensors, options, dtype, dout)
        assert len(served) == 1, "torch's own ran"
        served.clear()
        assert [(t.shape, t.dtype) for t in got] == [(t.shape, t.dtype) for t in own]
        assert got[0].stride() == own[0].stride()
        plain, exact = (run(math, tensors, options, d, dout)[1] for d in (dtype, torch.float64))
        return list(zip(("out", "dq", "dk", "dv", "dmask"), got, plain, exact, strict=False))

    judge(draw)


LAYOUTS = {  # of (batch, nheads, seqlen, headdim), by the order of the axes in memory
    "dense": (0, 1, 2, 3),
    "of a projection": (0, 2, 1, 3),
    "seqlen first": (2, 0, 1, 3),
    "heads first": (1, 0, 2, 3),
    "rows not dense": (0, 1, 3, 2),
}


def laid_out(t, order):
    return t.permute(order).contiguous().permute([order.index(axis) for axis in range(4)])


OF_STRIDES = {
    "plain": {},
    "causal": {"is_causal": True},
    "dropout": {"dropout_p": 0.5},
    "mask": {"attn_mask": torch.ones(9, 9, dtype=torch.bool)},
    "mask of each key": {"attn_mask": torch.ones(2, 1, 1, 9, dtype=torch.bool)},
    "mask of each score": {"attn_mask": torch.zeros(2, 4, 9, 9)},
    "mask of three axes": {"attn_mask": torch.zeros(4, 9, 9)},
    "mask with a gradient": {"attn_mask": torch.zeros(9, 9, requires_grad=True)},
    "gqa": {"enable_gqa": True},
}


@pytest.mark.parametrize("requires_grad", [False, True])
@pytest.mark.parametrize("name", OF_STRIDES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_strides_are_torchs(layout, name, requires_grad, served):
    """They say which views can be had of the result."""
    options = OF_STRIDES[name]
    nheads_k = 2 if "enable_gqa" in options else 4
    q = laid_out(torch.randn(2, 4, 9, 8), LAYOUTS[layout]).requires_grad_(requires_grad)
    for order in LAYOUTS.values():
        for headdim_v in (8, 16):
            k = laid_out(torch.randn(2, nheads_k, 9, 8), order)
            v = laid_out(torch.randn(2, nheads_k, 9, headdim_v), order)
            expected = F.scaled_dot_product_attention(q, k, v, **options)
            with sdpa.enable("cpu"):
                got = F.scaled_dot_product_attention(q, k, v, **options)
            assert len(served) == 1 and got.stride() == expected.stride()
            served.clear()


@pytest.mark.filterwarnings("error")
def test_strides_where_torch_has_no_way(served):
    q, v = (torch.randn(2, 9, 4, n).transpose(1, 2) for n in (8, 16))
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION), sdpa.enable("cpu"):
        out = F.scaled_dot_product_attention(q, q, q, dropout_p=0.5)
        wider = F.scaled_dot_product_attention(q, q, v)
    assert len(served) == 2 and out.stride() == q.stride() and wider.is_contiguous()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_mask_in_float32(dtype, served):
    def draw():
        q, k, v = (randn(2, 3, 9, 8).to(dtype) for _ in range(3))
        mask = additive(9, 9).float().requires_grad_()
        with sdpa.enable("cpu"):
            out = F.scaled_dot_product_attention(q, k, v, mask)
        (grad,) = torch.autograd.grad(out, mask, torch.ones_like(out))
        assert grad.dtype == torch.float32 and len(served) == 1
        served.clear()
        plain = math(q, k, v, mask.detach().to(dtype))
        return [("out", out.detach(), plain, math(*(t.double() for t in (q, k, v, mask.detach()))))]

    judge(draw)


def test_dropout(served):
    """Uniform probabilities that v shows: which are kept, by which factor, in forward and backward."""
    q, v = torch.zeros(4, 8, 64, 16), torch.eye(64).expand(4, 8, 64, 64).clone().requires_grad_()
    with sdpa.enable():
        out = F.scaled_dot_product_attention(q, q, v, dropout_p=0.3)
        again = F.scaled_dot_product_attention(q, q, v, dropout_p=0.3)
    assert len(served) == 2
    kept = out != 0
    torch.testing.assert_close(out[kept], torch.full_like(out[kept], 1 / 64 / 0.7))
    # 131,072 places: 5 standard deviations are 0.0063.
    assert abs(kept.float().mean().item() - 0.7) < 0.0063
    both = (kept & (again != 0)).float().mean().item()
    assert abs(both - 0.49) < 0.007, "two calls drew the same"
    (grad,) = torch.autograd.grad(out, v, torch.eye(64).expand_as(out))
    torch.testing.assert_close(grad, out.transpose(-1, -2).detach())
    with sdpa.enable():
        torch.manual_seed(1)
        first = F.scaled_dot_product_attention(q, q, v, dropout_p=0.3)
        torch.manual_seed(1)
        assert torch.equal(F.scaled_dot_product_attention(q, q, v, dropout_p=0.3), first)


@pytest.mark.parametrize("mask", [None, (128, 128), (2, 4, 128, 128), (2, 1, 1, 128)], ids=str)
@pytest.mark.parametrize("layout", ["dense", "of a projection"])
def test_nothing_is_copied(layout, mask, served, monkeypatch):
    """But for the result of dense tensors with a mask of each sequence."""
    q, k, v = (laid_out(t, LAYOUTS[layout]) for t in tensors(2, 4, 128, 64))
    mask = None if mask is None else torch.randn(mask)
    outs, record = [], sdpa.attention  # the fixture's
    monkeypatch.setattr(sdpa, "attention", lambda *a, **o: outs.append(record(*a, **o)) or outs[-1])
    with sdpa.enable():
        out = F.scaled_dot_product_attention(q, k, v, mask)
    [(args, options)] = served
    assert [t.data_ptr() for t in args] == [t.data_ptr() for t in (q, k, v)]
    assert mask is None or options["attn_bias"].data_ptr() == mask.data_ptr()
    copied = layout == "dense" and mask is not None and mask.shape == (2, 1, 1, 128)
    assert (out.data_ptr() == outs[0].data_ptr()) is not copied


# --- what is left to torch ---------------------------------------------------------------------------------


def tensors(*shape, **options):
    return [torch.randn(*shape, **options) for _ in range(3)]


LEFT = {
    "float64": (
        lambda: (tensors(2, 4, 64, 64, dtype=torch.float64), {}),
        "torch.float64 on cpu served by torch",
    ),
    "complex": (lambda: (tensors(2, 4, 64, 64, dtype=torch.complex64), {}), "torch.complex64"),
    "integers": (lambda: ([torch.ones(2, 4, 64, 64, dtype=torch.int64)] * 3, {}), "torch.int64"),
    "dtypes that differ": (
        lambda: ([*tensors(2, 4, 64, 64)[:2], torch.randn(2, 4, 64, 64).bfloat16()], {}),
        "torch.float32 and torch.bfloat16",
    ),
    "few": (lambda: (tensors(1, 8, 16, 64), {}), "under 262,144 multiply-adds of torch.float32"),
    "mask and causal": (
        lambda: (tensors(2, 4, 64, 64), {"attn_mask": hidden_rows(64, 64), "is_causal": True}),
        "is_causal together with attn_mask",
    ),
    "mask of another dtype": (
        lambda: (tensors(2, 4, 64, 64), {"attn_mask": torch.zeros(64, 64, dtype=torch.bfloat16)}),
        "attn_mask of torch.bfloat16",
    ),
    "mask too large": (
        lambda: (tensors(2, 4, 64, 64), {"attn_mask": torch.zeros(64, 65)}),
        "does not broadcast",
    ),
    "mask of more batches": (
        lambda: (tensors(1, 4, 64, 64), {"attn_mask": torch.zeros(2, 1, 64, 64)}),
        "does not broadcast",
    ),
    "mask of one axis": (lambda: (tensors(2, 4, 64, 64), {"attn_mask": torch.zeros(64)}), "of 1 dimensions"),
    "mask of more axes": (
        lambda: (tensors(4, 64, 64), {"attn_mask": torch.zeros(2, 4, 64, 64)}),
        "of 4 dimensions",
    ),
    "heads that do not divide": (
        lambda: ([torch.randn(2, 4, 64, 64), *tensors(2, 3, 64, 64)[:2]], {"enable_gqa": True}),
        "do not broadcast",
    ),
    "heads without gqa": (
        lambda: ([torch.randn(2, 4, 64, 64), *tensors(2, 2, 64, 64)[:2]], {}),
        "do not broadcast",
    ),
    "batches": (lambda: ([torch.randn(2, 4, 64, 64), *tensors(3, 4, 64, 64)[:2]], {}), "do not broadcast"),
    "headdims": (lambda: ([torch.randn(2, 4, 64, 32), *tensors(2, 4, 64, 64)[:2]], {}), "sizes that differ"),
    "keys and values": (
        lambda: ([*tensors(4, 64, 64)[:2], torch.randn(4, 65, 64)], {}),
        "sizes that differ",
    ),
    "no queries": (lambda: ([torch.randn(2, 4, 0, 64), *tensors(2, 4, 64, 64)[:2]], {}), "without elements"),
    "no keys": (lambda: ([torch.randn(2, 4, 64, 64), *tensors(2, 4, 0, 64)[:2]], {}), "without elements"),
    "one axis": (lambda: (tensors(64), {}), "without elements or rows"),
    "dropout of all": (lambda: (tensors(2, 4, 64, 64), {"dropout_p": 1.0}), "dropout_p 1"),
    "dropout of more": (lambda: (tensors(2, 4, 64, 64), {"dropout_p": 1.5}), "dropout_p 1.5"),
    "infinite scale": (lambda: (tensors(2, 4, 64, 64), {"scale": float("inf")}), "scale inf"),
    "headdim": (lambda: (tensors(1, 2, 64, 300), {}), "served by torch"),
    "headdim and dropout": (lambda: (tensors(1, 2, 64, 300), {"dropout_p": 0.5}), "served by reference"),
}


def outcome(*args, **options):
    """What a call gives, or the error that it ends in."""
    torch.manual_seed(5)
    try:
        return F.scaled_dot_product_attention(*args, **options)
    except Exception as error:
        return type(error), str(error)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", LEFT)
def test_left_to_torch(name, served, left):
    draw, reason = LEFT[name]
    args, options = draw()
    expected = outcome(*args, **options)
    with sdpa.enable():
        got, again = outcome(*args, **options), outcome(*args, **options)
    assert not served
    assert len(left()) == 1 and reason in left()[0]  # once
    if isinstance(expected, torch.Tensor):
        torch.testing.assert_close((got, again), (expected, expected), rtol=0, atol=0, equal_nan=True)
    else:
        assert got == again == expected


@pytest.mark.parametrize(
    ("dtype", "requires_grad", "seqlen", "is_served"),
    [
        (torch.float32, False, 22, False),
        (torch.float32, False, 23, True),
        (torch.float32, True, 63, False),
        (torch.float32, True, 64, True),
        (torch.bfloat16, False, 1, True),
        (torch.float16, False, 1, True),
        (torch.bfloat16, True, 7, False),
        (torch.float16, True, 8, True),
    ],
)
def test_what_is_too_small_to_be_faster(dtype, requires_grad, seqlen, is_served):
    with torch._subclasses.FakeTensorMode():  # metadata alone
        q = torch.empty(2, 4, seqlen, 64, dtype=dtype, requires_grad=requires_grad)
        reason = sdpa.unserved(q, q, q)
        assert reason is None if is_served else "multiply-adds" in reason
        assert sdpa.unserved(q, q, q, dropout_p=0.1) is None  # which torch is slow at
        assert sdpa.unserved(q, q, q, backend="cpu") is None  # asked for by name


def test_by_environment(served, left, monkeypatch):
    q, k, v = tensors(2, 4, 64, 64)
    expected = F.scaled_dot_product_attention(q, k, v)
    monkeypatch.setenv("FASTGPT_BACKEND", "torch")
    with sdpa.enable():
        assert torch.equal(F.scaled_dot_product_attention(q, k, v), expected)
    assert not served and left() == ["'torch' has torch.float32 on cpu served by torch"]
    monkeypatch.setenv("FASTGPT_BACKEND", "reference")
    with sdpa.enable():
        F.scaled_dot_product_attention(q.double(), k.double(), v.double())
    assert len(served) == 1


def test_a_backend_that_cannot(served, left):
    q, k, v = tensors(2, 4, 64, 64, dtype=torch.float64)
    expected = F.scaled_dot_product_attention(q, k, v)
    with sdpa.enable("cpu"):
        assert torch.equal(F.scaled_dot_product_attention(q, k, v), expected)
    assert not served and "dtype torch.float64 is not float32, bfloat16 or float16" in left()[0]
    with pytest.raises(ValueError, match="backend: got 'fast', expected one of"):
        sdpa.enable("fast")
    with pytest.raises(TypeError, match="backend: got 3"):
        sdpa.enable(3)


def test_a_backend_that_is_not_here(monkeypatch):
    monkeypatch.setattr(dispatch, "unavailable", lambda name: "it was not built")
    with pytest.raises(fastgpt.BackendUnsupported, match=r"'cpu' cannot serve .*: it was not built"):
        sdpa.enable("cpu")


# --- who is reached ----------------------------------------------------------------------------------------


def attend(q, k, v):
    return F.scaled_dot_product_attention(q, k, v)


class Attention(nn.Module):
    def forward(self, q, k, v):
        return F.scaled_dot_product_attention(q, k, v)


CALLERS = {
    "by module": attend,
    "by name": imported_by_name,
    "operator": torch.ops.aten.scaled_dot_product_attention,
    "inference mode": torch.inference_mode()(attend),
}


@pytest.mark.parametrize("caller", CALLERS)
def test_every_caller_is_served(caller, served):
    q, k, v = tensors(2, 4, 64, 64)
    expected = CALLERS[caller](q, k, v)
    with sdpa.enable():
        got = CALLERS[caller](q, k, v)
    assert len(served) == 1 and got.grad_fn is None
    assert_parity("out", got, expected, math(q.double(), k.double(), v.double()))
    assert torch.equal(CALLERS[caller](q, k, v), expected) and len(served) == 1


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("compiled", [torch.jit.script, lambda m: torch.jit.trace(m, tensors(2, 4, 64, 64))])
def test_torchscript_is_served(compiled, served):
    q, k, v = tensors(2, 4, 64, 64)
    module = compiled(Attention())
    expected = module(q, k, v)
    with sdpa.enable():
        got = module(q, k, v)
    assert len(served) == 1
    assert_parity("out", got, expected, math(q.double(), k.double(), v.double()))


def test_a_transformers_model_is_served(served):
    model = random_model("llama")  # attn_implementation="sdpa"
    ids = torch.randint(101, (2, 33))
    with torch.no_grad():
        expected, plain = model(ids).logits, model.float()(ids).logits
        with sdpa.enable("cpu"):
            got = model(ids).logits
    assert model.config._attn_implementation == "sdpa"
    assert len(served) == model.config.num_hidden_layers
    assert_parity("logits", got, plain, expected)


def test_torch_backends_are_torchs_own(served):
    q, k, v = (torch.randn(2, 64, 4, 64) for _ in range(3))
    expected = fastgpt.attention(q, k, v, backend="torch")
    cached = fastgpt.attention_with_kvcache(q[:, :1], k.clone(), v.clone(), cache_seqlens=64, backend="torch")
    with sdpa.enable("cpu"):
        assert torch.equal(fastgpt.attention(q, k, v, backend="torch"), expected)
        again = fastgpt.attention_with_kvcache(
            q[:, :1], k.clone(), v.clone(), cache_seqlens=64, backend="torch"
        )
    assert torch.equal(again, cached) and not served


# --- what stands above or around it ------------------------------------------------------------------------


def test_autocast(served):
    def draw():
        q, k, v = (randn(2, 4, 64, 64) for _ in range(3))
        mask = randn(64, 64)
        with torch.autocast("cpu", torch.bfloat16):
            plain = F.scaled_dot_product_attention(q.float(), k.float(), v.float(), mask.float())
            with sdpa.enable():
                got = F.scaled_dot_product_attention(q.float(), k.float(), v.float(), mask.float())
        assert got.dtype == plain.dtype == torch.bfloat16
        assert {t.dtype for t in served.pop()[0]} == {torch.bfloat16}
        return [("out", got, plain, math(q, k, v, mask))]

    judge(draw)


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_a_graph_is_torchs(backend, served, left):
    """Compiled inside the block or before it, and called on either side of its end."""
    q, k, v = tensors(2, 4, 64, 64)
    q.requires_grad_()
    expected = attend(q, k, v)
    (grad,) = torch.autograd.grad(expected.sum(), q)
    with sdpa.enable():
        inside = torch.compile(
            lambda q, k, v: F.scaled_dot_product_attention(q, k, v), fullgraph=True, backend=backend
        )
        out = inside(q, k, v)
    for got in (out, inside(q, k, v)):
        torch.testing.assert_close(got, expected)
        torch.testing.assert_close(torch.autograd.grad(got.sum(), q)[0], grad)
    assert not served and any("Tensor in the place of a plain tensor" in reason for reason in left())


@pytest.mark.parametrize("pre_dispatch", [False, True])
@pytest.mark.parametrize("mode", ["real", "fake", "symbolic"])
def test_a_graph_of_make_fx_is_torchs(mode, pre_dispatch):
    args, options = tensors(2, 4, 64, 64), {"tracing_mode": mode, "pre_dispatch": pre_dispatch}
    expected = make_fx(attend, **options)(*args)
    with sdpa.enable():
        got = make_fx(attend, **options)(*args)
    assert got.code == expected.code


@pytest.mark.filterwarnings("ignore:.*treespec:FutureWarning")
@pytest.mark.parametrize("strict", [True, False])
def test_an_exported_program_is_torchs(strict, served):
    q, k, v = tensors(2, 4, 64, 64)
    expected = torch.export.export(Attention(), (q, k, v), strict=strict)
    with sdpa.enable():
        got = torch.export.export(Attention(), (q, k, v), strict=strict)
    assert not served and got.graph_module.code == expected.graph_module.code
    decomposed = [str(node.target) for node in expected.run_decompositions().graph.nodes]
    with sdpa.enable():
        assert [str(node.target) for node in got.run_decompositions().graph.nodes] == decomposed


FUNCTORCH = {
    "vmap": lambda q, k, v: torch.func.vmap(attend)(q, k, v),
    "grad": lambda q, k, v: torch.func.grad(lambda q: attend(q, k, v).sum())(q),
    "vjp": lambda q, k, v: torch.func.vjp(attend, q, k, v)[1](v),
    "vmap of grad": lambda q, k, v: torch.func.vmap(torch.func.grad(lambda q, k: attend(q, k, k).sum()))(
        q, k
    ),
}


@pytest.mark.parametrize("transform", FUNCTORCH)
def test_torch_func_is_torchs(transform, served):
    q, k, v = tensors(2, 4, 64, 64)
    expected = FUNCTORCH[transform](q, k, v)
    with sdpa.enable():
        got = FUNCTORCH[transform](q, k, v)
    torch.testing.assert_close(got, expected, rtol=0, atol=0)
    assert not served


def test_derivatives_that_fastgpt_has_not(served, left):
    q, k, v = tensors(2, 4, 64, 64)

    def forward_mode():
        return torch.func.jvp(lambda q: attend(q, k, v), (q,), (torch.ones_like(q),))[1]

    def dual():
        with torch.autograd.forward_ad.dual_level():
            out = attend(torch.autograd.forward_ad.make_dual(q, torch.ones_like(q)), k, v)
            return torch.autograd.forward_ad.unpack_dual(out).tangent

    def second():
        leaf = q.clone().requires_grad_()
        (grad,) = torch.autograd.grad(attend(leaf, k, v).square().sum(), leaf, create_graph=True)
        return torch.autograd.grad(grad.sum(), leaf)[0]

    with sdpa_kernel(SDPBackend.MATH):
        expected = [f() for f in (forward_mode, dual, second)]
        with sdpa.enable():
            for f, t in zip((forward_mode, dual, second), expected, strict=True):
                assert torch.equal(f(), t)
        assert not served
    assert left() == [
        "torch.func's transforms",
        "forward-mode derivatives",
        "flash attention is switched off (torch.nn.attention.sdpa_kernel)",
    ]
    with pytest.raises(RuntimeError, match="not implemented"):  # nor has torch's own flash attention
        second()
    with sdpa.enable(), pytest.raises(RuntimeError, match="no second derivative"):
        second()


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_subclasses_and_nested_tensors_are_torchs(served):
    from torch.nn.attention.bias import causal_lower_right

    q, k, v = tensors(2, 4, 64, 64)
    jagged = torch.nested.nested_tensor([torch.randn(n, 4, 16) for n in (30, 50)], layout=torch.jagged)
    jagged = jagged.transpose(1, 2)
    strided = torch.nested.nested_tensor([torch.randn(4, n, 16) for n in (30, 50)])

    def results():
        with torch.inference_mode():
            nested = F.scaled_dot_product_attention(strided, strided, strided)
        return [
            F.scaled_dot_product_attention(jagged, jagged, jagged).values(),
            nested.to_padded_tensor(0.0),
            F.scaled_dot_product_attention(q[:, :, :9], k, v, causal_lower_right(9, 64)),
        ]

    expected = results()
    with sdpa.enable():
        got = results()
    assert torch.equal(got[0], expected[0]) and torch.equal(got[1], expected[1])
    assert len(served) == 1  # what CausalBias makes of its call
    visible = torch.ones(9, 64, dtype=torch.bool).tril(55)
    assert_parity("out", got[2], expected[2], math(*(t.double() for t in (q[:, :, :9], k, v)), visible))


def test_fake_tensors(served):
    with torch._subclasses.FakeTensorMode(), sdpa.enable():
        q, k, v = (torch.empty(2, 4, 64, 64) for _ in range(3))
        assert F.scaled_dot_product_attention(q, k, v).shape == (2, 4, 64, 64)
    with sdpa.enable():
        meta = torch.empty(2, 4, 64, 64, device="meta")
        assert F.scaled_dot_product_attention(meta, meta, meta).is_meta
    assert not served


# --- beginning and end -------------------------------------------------------------------------------------


def serves(served):
    """The backend that a call is served with; False if it is not."""
    served.clear()
    q, k, v = tensors(2, 4, 64, 64)
    F.scaled_dot_product_attention(q, k, v)
    return served[0][1]["backend"] if served else False


def test_they_nest_and_end_in_any_order(served):
    before = in_place()
    outer = sdpa.enable()
    with sdpa.enable("cpu"):
        assert serves(served) == "cpu"
        with sdpa.enable("reference") as inner:
            assert serves(served) == "reference"
            inner.undo()
            assert serves(served) == "cpu"
        outer.undo()
        outer.undo()
        assert serves(served) == "cpu"
    assert serves(served) is False and in_place() == before
    with pytest.raises(ZeroDivisionError), sdpa.enable():
        assert serves(served) is None
        1 / 0  # noqa: B018
    assert serves(served) is False and in_place() == before
    sdpa.enable()
    sdpa.enable("cpu")
    sdpa.disable()
    assert serves(served) is False and in_place() == before
    sdpa.disable()  # nothing to do
    with sdpa.enable():
        assert serves(served) is None
    again = sdpa.enable("cpu")
    for _ in range(2):
        with again as entered:
            assert entered is again and serves(served) == "cpu"
        assert serves(served) is False and in_place() == before


def test_threads(served):
    """It holds in every thread, and may begin and end while others call."""
    q, k, v = tensors(1, 1, 4, 8)
    expected, done, outs = attend(q, k, v), threading.Event(), []

    def work():
        try:
            while not done.is_set():
                out = attend(q, k, v)
        except Exception as error:
            out = error
        outs.append(out)

    threads = [threading.Thread(target=work) for _ in range(3)]
    for thread in threads:
        thread.start()
    for _ in range(4000):
        with sdpa.enable():
            pass
    with sdpa.enable("cpu"):
        while len(served) < 10 and not outs:
            done.wait(0.001)
    done.set()
    for thread in threads:
        thread.join()
    for out in outs:
        torch.testing.assert_close(out, expected)


def test_below_autograd_there_is_no_gradient(served):
    q, k, v = (t.requires_grad_() for t in tensors(2, 4, 64, 64))
    with torch._C._AutoDispatchBelowAutograd(), sdpa.enable():
        out = F.scaled_dot_product_attention(q, k, v)
    assert len(served) == 1 and not out.requires_grad


# --- modules -----------------------------------------------------------------------------------------------

EMBED, HEADS = 512, 8


def hidden_keys(batch, seqlen):
    """A key padding mask: True where a key is hidden, none in the first sequence."""
    return torch.arange(seqlen) >= torch.linspace(seqlen, seqlen // 2, batch)[:, None]


def hidden_future(seqlen):
    return torch.ones(seqlen, seqlen, dtype=torch.bool).triu(1)


class SelfAttention(nn.Module):
    def __init__(self, **options):
        super().__init__()
        self.attention = nn.MultiheadAttention(EMBED, HEADS, **options)

    def forward(self, x, **options):
        return self.attention(x, x, x, **{"need_weights": False, **options})[0]


# Whether the batch is first; and the masks.
MASKS = {
    "plain": (True, lambda b, n: {}),
    "seqlen first": (False, lambda b, n: {}),
    "padding": (True, lambda b, n: {"key_padding_mask": hidden_keys(b, n)}),
    "mask": (True, lambda b, n: {"attn_mask": hidden_future(n)}),
    "additive mask": (True, lambda b, n: {"attn_mask": torch.randn(n, n)}),
    "causal": (True, lambda b, n: {"attn_mask": hidden_future(n), "is_causal": True}),
    "mask and padding": (
        False,
        lambda b, n: {"attn_mask": hidden_future(n), "key_padding_mask": hidden_keys(b, n)},
    ),
    "mask of each head": (True, lambda b, n: {"attn_mask": torch.rand(b * HEADS, n, n) < 0.3}),
}


def outputs(module, inputs, options, dtype, grad):
    """By name, what a module gives in dtype, and the gradients of inputs and parameters."""
    module = copy.deepcopy(module).to(dtype)
    inputs = [t.to(dtype).requires_grad_(grad) for t in inputs]
    options = {
        k: m.to(dtype) if getattr(m, "dtype", None) == torch.float32 else m for k, m in options.items()
    }
    with torch.set_grad_enabled(grad):
        out = module(*inputs, **options)
    results = {"out": out.detach()}
    if grad:
        leaves = {f"d{i}": t for i, t in enumerate(inputs)}
        leaves |= {f"d{name}": t for name, t in module.named_parameters()}
        dout = torch.arange(out.numel(), dtype=torch.float64).cos().view(out.shape).to(dtype)
        results |= zip(leaves, torch.autograd.grad(out, list(leaves.values()), dout), strict=True)
    return results


def assert_served(module, inputs, options, grad, served, calls, dtype=torch.float32):
    exact = outputs(module, inputs, options, torch.float64, grad)
    plain = outputs(module, inputs, options, dtype, grad)
    assert not served
    with sdpa.enable():
        got = outputs(module, inputs, options, dtype, grad)
    assert len(served) == calls
    for name, t in got.items():
        assert_parity(name, t, plain[name], exact[name], factor=2 if name == "out" else 3)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", MASKS)
def test_multihead_attention(name, training, served):
    """In training as F.scaled_dot_product_attention, in eval mostly by an operator of its own."""
    batch_first, masks = MASKS[name]
    batch, seqlen = (2, 80) if training else (4, 96)
    x = torch.randn(batch, seqlen, EMBED) if batch_first else torch.randn(seqlen, batch, EMBED)
    module = SelfAttention(batch_first=batch_first).train(training)
    assert_served(module, [x], masks(batch, seqlen), training, served, calls=1)


@pytest.mark.parametrize("name", ["padding", "mask", "mask of each head"])
def test_multihead_attention_in_bfloat16(name, served):
    x, options = torch.randn(4, 96, EMBED).bfloat16().float(), MASKS[name][1](4, 96)
    module = SelfAttention(batch_first=True).bfloat16().eval()
    assert_served(module, [x], options, False, served, calls=1, dtype=torch.bfloat16)


def test_what_multihead_attention_leaves_to_torch(served, left):
    module, x = SelfAttention(batch_first=True).eval(), torch.randn(1, 64, EMBED)
    with torch.no_grad():
        expected = module(x), module(x, need_weights=True)
        with sdpa.enable():
            assert torch.equal(module(x), expected[0])
            assert torch.equal(module(x, need_weights=True), expected[1])
            module.bfloat16()(torch.randn(8, 96, EMBED).bfloat16())
        with sdpa.enable(), torch.nn.attention.sdpa_kernel(SDPBackend.MATH):
            module(x.bfloat16())
    assert not served
    assert left() == [
        "under 16,777,216 multiply-adds, for which torch takes less time",
        "the weights are to be returned, which fastgpt never stores",
        "torch.bfloat16 without a mask, for which torch takes as little time",
        "flash attention is switched off (torch.nn.attention.sdpa_kernel)",
    ]


@pytest.mark.parametrize(
    "mask,mask_type,calls",
    [
        ((4, 96), 1, 1),
        ((4, HEADS, 96, 96), 0, 1),
        ((4, HEADS, 96, 96), 1, 1),
        ((4, HEADS, 96, 96), 2, 1),
        ((4, HEADS, 96, 96), None, 1),
        ((96, 96), 0, 0),
        ((96, 96), 1, 0),  # which torch refuses, and what follows
        ((96, 96), 2, 0),
        ((96, 96), None, 0),
        ((4, 96), 0, 0),
        ((4, 1, 96, 96), 2, 0),
        ((4, 1, 1, 96), 1, 0),
        ((1, 96), 1, 0),
    ],
)
def test_masks_of_native_multihead_attention(mask, mask_type, calls, served):
    mask = torch.rand(mask) < 0.3
    assert_same_native(served, calls, mask=mask, mask_type=mask_type)


@pytest.mark.parametrize(
    "changes",
    [
        {"embed_dim": 2 * EMBED},
        {"num_head": 7},
        {"key": torch.randn(4, 97, EMBED), "value": torch.randn(4, 97, EMBED)},
        {"query": torch.randn(96, EMBED)},
        {"qkv_weight": torch.randn(6 * EMBED, EMBED)},
    ],
    ids=" ".join,
)
def test_what_native_multihead_attention_refuses(changes, served):
    assert_same_native(served, 0, **changes)


def assert_same_native(served, calls, **changes):
    """torch._native_multi_head_attention gives torch's result, or ends in its error."""
    x = torch.randn(4, 96, EMBED)
    weights = [
        torch.randn(shape) / EMBED**0.5 for shape in ((3 * EMBED, EMBED), (3 * EMBED,), (EMBED, EMBED))
    ]
    arguments = {
        **dict.fromkeys(("query", "key", "value"), x),
        **{"embed_dim": EMBED, "num_head": HEADS, "need_weights": False},
        **dict(zip(("qkv_weight", "qkv_bias", "proj_weight"), weights, strict=True)),
        **{"proj_bias": torch.zeros(EMBED), **changes},
    }

    def result():
        try:
            return torch._native_multi_head_attention(**arguments)[0]
        except Exception as error:
            return type(error), str(error)

    expected = result()
    with sdpa.enable("cpu"):
        got = result()
    assert len(served) == calls
    if isinstance(expected, torch.Tensor):
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)
    else:
        assert got == expected


def test_multihead_attention_under_autocast(served):
    module, x = SelfAttention(batch_first=True).eval(), torch.randn(8, 96, EMBED)
    mask = hidden_keys(8, 96)
    with torch.no_grad():
        exact = copy.deepcopy(module).double()(x.double(), key_padding_mask=mask)
        with torch.autocast("cpu", torch.bfloat16):
            plain = module(x, key_padding_mask=mask)
            with sdpa.enable():
                got = module(x, key_padding_mask=mask)
    assert len(served) == 1 and got.dtype == plain.dtype == torch.bfloat16
    assert_parity("out", got, plain, exact)


def test_a_sequence_of_padding_alone(served):
    module, x = SelfAttention(batch_first=True).eval(), torch.randn(4, 96, EMBED)
    padding = torch.zeros(4, 96, dtype=torch.bool)
    padding[1] = True
    with torch.no_grad(), sdpa.enable():
        out = module(x, key_padding_mask=padding)
    assert len(served) == 1
    torch.testing.assert_close(out[1], module.attention.out_proj.bias.detach().expand(96, -1))


def stack(kind, layer, **options):
    layer = layer(EMBED, HEADS, 64, dropout=0.0, batch_first=True, **options)
    return kind(layer, 2)


STACKS = {
    "encoder": (lambda: stack(nn.TransformerEncoder, nn.TransformerEncoderLayer), 1, (), 2),
    "encoder, mask": (lambda: stack(nn.TransformerEncoder, nn.TransformerEncoderLayer), 1, ("mask",), 2),
    "encoder, norm first": (
        lambda: nn.TransformerEncoder(
            nn.TransformerEncoderLayer(EMBED, HEADS, 64, 0.0, batch_first=True, norm_first=True),
            *(2, None, False),
        ),
        *(1, (), 2),
    ),
    "decoder": (lambda: stack(nn.TransformerDecoder, nn.TransformerDecoderLayer), 2, ("tgt_mask",), 4),
}


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", STACKS)
def test_transformers_of_torch(name, training, served):
    make, inputs, masks, calls = STACKS[name]
    batch, seqlen = (2, 80) if training else (4, 96)
    options = {mask: hidden_future(seqlen) for mask in masks}
    x = [torch.randn(batch, seqlen, EMBED) for _ in range(inputs)]
    assert_served(make().train(training), x, options, training, served, calls)


def test_an_encoder_that_leaves_padding_out_is_torchs(served):
    """It computes on nested tensors, which saves more."""
    module = stack(nn.TransformerEncoder, nn.TransformerEncoderLayer).eval()
    x, padding = torch.randn(4, 96, EMBED), hidden_keys(4, 96)
    with torch.no_grad():
        expected = module(x, src_key_padding_mask=padding)
        with sdpa.enable():
            assert torch.equal(module(x, src_key_padding_mask=padding), expected)
    assert not served
    module.train()
    with sdpa.enable():
        module(x, src_key_padding_mask=padding).sum().backward()
    assert len(served) == 2


# --- torch's own hook for flash attention: what of it runs without a GPU -----------------------------------

FLASH = "_scaled_dot_product_flash_attention"


@pytest.fixture
def hook():
    """torch.nn.attention, whose registry is as before afterwards."""
    registry = torch.nn.attention._registry
    names = dict(registry._FLASH_ATTENTION_IMPLS)
    yield torch.nn.attention
    if torch.nn.attention.current_flash_attention_impl() is not None:
        torch.nn.attention.restore_flash_attention_impl()
    registry._FLASH_ATTENTION_IMPLS.clear()
    registry._FLASH_ATTENTION_IMPLS.update(names)


@pytest.fixture
def flash(request):
    """The overrides as CPU kernels, which torch has not: its autograd and dispatcher are real."""
    handle = sdpa.FlashAttention(getattr(request, "param", None), "CPU")
    yield handle
    handle.remove()


def has_kernel(name, key="CUDA"):
    return torch._C._dispatch_has_kernel_for_dispatch_key(f"aten::{name}", key)


def test_registration_and_restoration(hook, monkeypatch):
    before = in_place()
    assert sdpa.register() == "fastgpt" and sdpa.register("triton") == "fastgpt_triton"
    assert {"fastgpt", "fastgpt_triton"} <= set(hook.list_flash_attention_impls())
    assert in_place() == before  # nothing is active by then
    hook.activate_flash_attention_impl("fastgpt")
    assert hook.current_flash_attention_impl() == "fastgpt"
    assert all(has_kernel(name) for name in OPERATORS if "flash" in name)
    hook.activate_flash_attention_impl("fastgpt_triton")  # takes its place
    hook.restore_flash_attention_impl()
    assert hook.current_flash_attention_impl() is None and in_place() == before
    with pytest.raises(ValueError, match="backend: got 'fast'"):
        sdpa.register("fast")
    monkeypatch.delattr(torch.nn.attention, "register_flash_attention_impl")
    with pytest.raises(RuntimeError, match=r"has no torch\.nn\.attention\.register_flash"):
        sdpa.register()


def flash_sdpa(q, k, v, **options):
    return torch.ops.aten._scaled_dot_product_flash_attention(q, k, v, **options)[0]


@pytest.mark.parametrize("flash", [None, "reference"], indirect=True)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("name", ["plain", "layout of a projection", "causal", "scale", "gqa"])
def test_flash_attention_parity(name, dtype, flash):
    def draw():
        *tensors, options = CASES[name]()
        tensors = [t.to(dtype).double() for t in tensors]
        passed = {key: value for key, value in options.items() if key != "enable_gqa"}
        dout, got = run(lambda *a, **o: flash_sdpa(*a, **passed), tensors, options, dtype)
        plain, exact = (run(math, tensors, options, d, dout)[1] for d in (dtype, torch.float64))
        return list(zip(("out", "dq", "dk", "dv"), got, plain, exact, strict=True))

    judge(draw)


def dense(t):
    return t.transpose(1, 2)  # (batch, seqlen, nheads, headdim), as the operators without sdpa in their names


@pytest.mark.parametrize("layout", [lambda t: t, torch.Tensor.contiguous], ids=["bshd", "bhsd"])
def test_what_flash_attention_returns(layout, flash):
    """As torch's fake kernels say, which torch.compile goes by: shapes, dtypes and strides."""
    aten = torch.ops.aten
    q, k, v = (layout(t.bfloat16()) for t in CASES["layout of a projection"]()[:3])
    for p in (0.0, 0.5):
        lengths = (None, None, 9, 9, p, False, False)
        got = aten._scaled_dot_product_flash_attention(q, k, v, p)
        back = aten._scaled_dot_product_flash_attention_backward(
            *(q.clone(), q, k, v, *got[:6], p, False, *got[6:8])
        )
        forward = aten._flash_attention_forward(*map(dense, (q, k, v)), *lengths)
        with torch._subclasses.FakeTensorMode() as mode:
            fake = [mode.from_tensor(t) for t in (q, k, v)]
            expected = aten._scaled_dot_product_flash_attention(*fake, p)
            grads = [torch.empty_like(t) for t in fake]
            forward_expected = aten._flash_attention_forward(*map(dense, fake), *lengths)
        for results, fakes in ((got, expected), (back, grads), (forward, forward_expected)):
            for t, f in zip(results, fakes, strict=True):
                if isinstance(f, torch.Tensor):
                    assert (t.shape, t.dtype, t.stride()) == (f.shape, f.dtype, f.stride())
                else:
                    assert t == f
    lse = torch.logsumexp(q.double() @ k.double().transpose(-1, -2) / 8**0.5, -1)
    torch.testing.assert_close(got[1].double(), lse, atol=1e-4, rtol=1e-4)


def test_dropout_of_flash_attention(flash):
    """Forward and backward drop the same, and torch's generator decides what."""
    q, v = torch.zeros(2, 4, 64, 64), torch.eye(64).expand(2, 4, 64, 64).clone().requires_grad_()
    torch.manual_seed(3)
    out = flash_sdpa(q, q, v, dropout_p=0.25)
    assert abs((out != 0).float().mean().item() - 0.75) < 0.02
    (grad,) = torch.autograd.grad(out, v, torch.eye(64).expand_as(out))
    torch.testing.assert_close(grad, out.transpose(-1, -2).detach())
    torch.manual_seed(3)
    assert torch.equal(flash_sdpa(q, q, v, dropout_p=0.25), out)


def test_packed_sequences_and_windows(flash):
    """_flash_attention_forward: what torch.nn.attention.varlen and jagged tensors call."""
    edges = torch.tensor([0, 9, 9, 30], dtype=torch.int32)
    q, k, v = (torch.randn(30, 4, 16, requires_grad=True) for _ in range(3))
    args, window = (edges, edges, 21, 21, 0.0), {"window_size_left": 3, "window_size_right": 1}
    for causal, options in ((True, {}), (False, window), (True, {"window_size_left": 3})):
        out, lse, *_ = torch.ops.aten._flash_attention_forward(q, k, v, *args, causal, False, **options)
        size = (options.get("window_size_left", -1), options.get("window_size_right", -1))
        expected, expected_lse = fastgpt.attention_varlen(
            *(q, k, v),
            **{"cu_seqlens_q": edges, "cu_seqlens_k": edges},
            **{"causal": causal, "window_size": size, "return_lse": True},
        )
        assert torch.equal(out, expected) and torch.equal(lse, expected_lse)
        dout = torch.randn_like(out)
        for got, exact in zip(
            *(torch.autograd.grad(t, (q, k, v), dout) for t in (out, expected)), strict=True
        ):
            assert torch.equal(got, exact)
    q, k, v = (t.detach() for t in (q, k, v))
    slopes, used = torch.rand(4), torch.tensor([5, 0, 21], dtype=torch.int32)
    inplace, out = torch.full_like(q, torch.nan), None
    options = {"alibi_slopes": slopes, "seqused_k": used, "scale": 0.3}
    lse = torch.ops.aten._flash_attention_forward_no_dropout_inplace(
        *(inplace, q, k, v, *args, True, False), **options
    )
    options["softmax_scale"] = options.pop("scale")
    edges_ = {"cu_seqlens_q": edges, "cu_seqlens_k": edges}
    out, expected_lse = fastgpt.attention_varlen(q, k, v, **edges_, **options, return_lse=True)
    assert torch.equal(inplace, out) and torch.equal(lse, expected_lse)


def test_what_flash_attention_leaves_to_torch(left):
    """To the kernel in whose place it is; without one, as here, it says what it cannot."""
    q = torch.randn(1, 2, 9, 300)
    arguments = (*[torch.randn(2, 9, 2, 16)] * 3, None, None, 9, 9, 0.0, False)
    block_table = torch.zeros(1, 1, dtype=torch.int32)
    handle = sdpa.FlashAttention(None, "CPU")
    with pytest.raises(fastgpt.BackendUnsupported, match="'auto' has it served by reference"):
        flash_sdpa(q, q, q)  # headdim 300
    with pytest.raises(fastgpt.BackendUnsupported, match="a debug mask or a block table"):
        torch.ops.aten._flash_attention_forward(*arguments, False, block_table=block_table)
    handle.remove()

    torchs = torch.library.Library("aten", "IMPL")
    torchs.impl(
        FLASH, lambda q, k, v, *args, **options: (q + 1, *[q.new_zeros(1)] * 3, 7, 7, *[q] * 3), "CPU"
    )
    handle = sdpa.FlashAttention(None, "CPU")
    assert torch.equal(flash_sdpa(q, q, q), q + 1)
    assert left() == ["'auto' has it served by reference"]
    small = q[..., :16]
    assert not torch.equal(flash_sdpa(small, small, small), small + 1)
    handle.remove()
    assert torch.equal(flash_sdpa(small, small, small), small + 1)
    torchs._destroy()
    assert not has_kernel(FLASH, "CPU")


def test_a_debug_mask_with_dropout_is_refused(flash):
    """Torch's kernel would draw other bits for it than the backward here."""
    q = torch.randn(2, 4, 9, 16)
    with pytest.raises(ValueError, match=r"return_debug_mask: got True with dropout_p 0.5, expected False"):
        flash_sdpa(q, q, q, dropout_p=0.5, return_debug_mask=True)
    with pytest.raises(fastgpt.BackendUnsupported, match="a debug mask or a block table"):  # torch's, if any
        flash_sdpa(q, q, q, return_debug_mask=True)


def test_flash_attention_in_a_graph(flash):
    """aot_autograd's fake kernels, partitioner and strides; then the overrides."""
    q, k, v = (t.float().requires_grad_() for t in CASES["layout of a projection"]()[:3])
    compiled = torch.compile(flash_sdpa, fullgraph=True, backend="aot_eager")
    expected = math(q, k, v)
    got = compiled(q, k, v)
    torch.testing.assert_close(got, expected)
    dout = torch.randn_like(got)
    for t in (q, k, v):
        grads = (torch.autograd.grad(out, t, dout, retain_graph=True)[0] for out in (got, expected))
        torch.testing.assert_close(*grads)
