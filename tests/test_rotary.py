"""Rotary embedding, forward and backward: every backend, one table of cases, one parity rule."""

from __future__ import annotations

import pytest
import torch
from backends import AVAILABLE, DTYPES, assert_parity, factor_of

import fastgpt
from fastgpt import dispatch
from fastgpt.ops.rotary.spec import FEATURES, RotaryCall, RotarySpec, RotaryTensors
from fastgpt.verify.rotary import (
    CASES,
    RotaryCase,
    fused_rotary,
    lengths_of,
    make_inputs,
    results,
)

ROTATING = [name for name in AVAILABLE if name != "cpu"]  # whose kernels have it inside decode alone
STYLES = pytest.mark.parametrize("interleaved", [True, False], ids=["neighbours", "halves"])


TABLE = [pytest.param(case, id=str(case)) for case in CASES]


@STYLES
@pytest.mark.parametrize("backend", ROTATING)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", TABLE)
def test_parity(case, dtype, backend, interleaved):
    for what, *values in results(case, dtype, interleaved, backend):
        assert_parity(what, *values, factor=factor_of(what))


@STYLES
@pytest.mark.parametrize("backend", ["reference", "torch"])
@pytest.mark.parametrize("case", TABLE)
def test_float64(case, backend, interleaved):
    for _, got, exact, _ in results(case._replace(narrow=True), torch.float64, interleaved, backend):
        torch.testing.assert_close(got, exact, rtol=1e-14, atol=1e-14)


@STYLES
@pytest.mark.parametrize("backend", ["reference", "torch"])
@pytest.mark.parametrize(
    "case", [RotaryCase((2, 3, 2, 6), 4), RotaryCase((4, 2, 4), 4, (2, 0), (3, 1))], ids=str
)
def test_gradcheck(case, backend, interleaved):
    x, _, *tables = (t.double() for t in make_inputs(case, torch.float32))
    x.requires_grad_()
    rotary = fused_rotary(backend)
    assert torch.autograd.gradcheck(lambda x: rotary(x, *tables, case, interleaved), x)
    assert torch.autograd.gradgradcheck(lambda x: rotary(x, *tables, case, interleaved).square(), x)


@STYLES
@pytest.mark.parametrize("backend", ROTATING)
def test_second_derivatives(backend, interleaved):
    """Through create_graph: the derivative's derivative is the rotation again."""
    case = RotaryCase((2, 5, 3, 8), 6)
    x, dout, *tables = make_inputs(case, torch.float32)
    x.requires_grad_(), dout.requires_grad_()
    out = fused_rotary(backend)(x, *tables, case, interleaved)
    (dx,) = torch.autograd.grad(out, x, dout, create_graph=True)
    (ddout,) = torch.autograd.grad(dx, dout, x.detach())
    torch.testing.assert_close(ddout, out, rtol=0, atol=0)


@STYLES
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("backend", ROTATING)
def test_is_the_rotation_of_attention_with_kvcache(backend, dtype, interleaved):
    """Of the keys that it appends, by default too."""
    k, offsets = torch.randn(2, 7, 3, 24).to(dtype), torch.tensor([5, 0], dtype=torch.int32)
    angles = 7 * torch.rand(20, 8)
    tables = angles.cos().to(dtype), angles.sin().to(dtype)
    k_cache, v_cache = (torch.zeros(2, 20, 3, 24, dtype=dtype) for _ in range(2))
    style, rotary_style = ({}, {}) if interleaved else ({"interleaved": False}, {"rotary_interleaved": False})
    fastgpt.attention_with_kvcache(
        k, k_cache, v_cache, k, k, cache_seqlens=offsets, rotary_cos=tables[0], rotary_sin=tables[1],
        **rotary_style, backend="reference",
    )  # fmt: skip
    out = fastgpt.rotary_embedding(k, *tables, **style, seqlen_offsets=offsets, backend=backend)
    torch.testing.assert_close(out, torch.stack((k_cache[0, 5:12], k_cache[1, :7])))


@STYLES
@pytest.mark.parametrize("backend", ROTATING)
def test_same_bits_in_any_batch(backend, interleaved):
    case = RotaryCase((150, 5, 24), 16, (4, 0, 9), (64, 1, 85))
    x, _, *tables = make_inputs(case, torch.bfloat16)
    together = fused_rotary(backend)(x, *tables, case, interleaved)
    for part, start, whole in zip(
        x.split(case.lengths), case.offsets, together.split(case.lengths), strict=True
    ):
        alone = fastgpt.rotary_embedding(
            part[None, :, 1:3], *tables, interleaved=interleaved, seqlen_offsets=start, backend=backend
        )
        assert torch.equal(alone[0], whole[:, 1:3])


@STYLES
@pytest.mark.parametrize("backend", ROTATING)
def test_nonfinite_values_stay_in_their_pair(backend, interleaved):
    x, table = torch.randn(2, 5, 3, 8), torch.rand(5, 3)
    x[1, 2, 1, 2], x[0, 4, 2, 7] = torch.nan, torch.inf
    out = fastgpt.rotary_embedding(x, table, table, interleaved=interleaved, backend=backend)
    expected = torch.zeros(x.shape, dtype=torch.bool)
    expected[1, 2, 1, [2, 3] if interleaved else [2, 5]] = True
    expected[0, 4, 2, 7] = True
    assert torch.equal(~out.isfinite(), expected)


@pytest.mark.skipif("triton" not in AVAILABLE, reason="Triton is not available")
@pytest.mark.parametrize("packed", [False, True])
def test_positions_outside_the_tables(packed):
    """Where the host does not read the lengths, no memory beside the tables is read."""
    x, wide = torch.randn(2, 4, 3, 10), torch.rand(9, 4)
    offsets = torch.tensor([-2, 3], dtype=torch.int32)
    edges = torch.tensor([0, 4, 8], dtype=torch.int32) if packed else None
    tensors = RotaryTensors(wide[2:7], wide[2:7], offsets, edges)
    triton = dispatch.implementation("rotary", "triton")
    out = triton.forward(x.flatten(0, 1) if packed else x, RotarySpec(), tensors).view(x.shape)
    bad = torch.zeros(x.shape, dtype=torch.bool)
    bad[0, :2, :, :8] = bad[1, 2:, :, :8] = True
    assert torch.equal(out.isnan(), bad)


def test_what_each_backend_supports():
    def refused(backend, *call):
        return dispatch.implementation("rotary", backend).unsupported(RotaryCall(*call))

    for dtype in DTYPES:
        for backend in ROTATING:
            assert not refused(backend, "cpu", dtype, 256, FEATURES)
        (reason,) = refused("cpu", "cpu", dtype, 64, ())
        assert "is not written for the CPU kernels" in reason
    for backend in ("reference", "torch"):
        assert not refused(backend, "cpu", torch.float64, 1000, FEATURES)
    x, table = torch.randn(2, 3, 4).double(), torch.rand(2, 1)
    lengths = lengths_of(RotaryCase((2, 3, 4), 2, (0,), (2,)))
    call = r"rotary\(float64 on cpu, headdim 4, interleaved, seqlen_offsets, varlen\)"
    with pytest.raises(fastgpt.BackendUnsupported, match=rf"'cpu' cannot serve {call}"):
        fastgpt.rotary_embedding(x, table, table, **lengths, backend="cpu")
    x = x[None]
    with pytest.raises(fastgpt.BackendUnsupported, match=r"rotary\(float64 on cpu, headdim 4\)"):
        fastgpt.rotary_embedding(x, table, table, interleaved=False, backend="cpu")
    assert dispatch.resolve(RotaryCall("cpu", torch.float32, 64, FEATURES), "auto") == "torch"
    assert torch.equal(
        fastgpt.rotary_embedding(x, table, table), fastgpt.rotary_embedding(x, table, table, backend="torch")
    )


@pytest.mark.skipif("triton" not in AVAILABLE, reason="Triton is not available")
def test_what_triton_refuses():
    triton = dispatch.implementation("rotary", "triton")
    call = RotaryCall("cpu", torch.float64, 257, (*FEATURES, "something new"))
    assert [reason.split()[0] for reason in triton.unsupported(call)] == ["dtype", "headdim", "something"]


X, TABLES = torch.zeros(2, 5, 3, 8), torch.zeros(9, 4)
EDGES = torch.tensor([0, 4, 10], dtype=torch.int32)
PACKED = {"x": X.flatten(0, 1), "cu_seqlens": EDGES}
BAD = {
    "x: got list, expected a torch.Tensor (batch, seqlen, nheads, headdim)": {"x": [1.0]},
    "x: got shape (10, 3, 8), expected 4 dimensions (batch, seqlen, nheads, headdim)": {"x": PACKED["x"]},
    "x: got shape (2, 5, 3, 8), expected 3 dimensions (total, nheads, headdim)": {"cu_seqlens": EDGES},
    "x: got dtype torch.int64, expected one of float32": {"x": X.long()},
    "x: got strides (120, 24, 1, 3), expected the last one to be 1": {
        "x": torch.zeros(2, 5, 8, 3).transpose(2, 3)
    },
    "cos: got NoneType, expected a torch.Tensor (positions, rotary_dim / 2)": {"cos": None},
    "cos: got shape (9, 5), expected (positions, rotary_dim / 2) with rotary_dim at most the headdim 8": {
        "cos": torch.zeros(9, 5)
    },
    "cos: got shape (9, 0), expected (positions, rotary_dim / 2)": {"cos": torch.zeros(9, 0)},
    "sin: got shape (8, 4), expected (positions, rotary_dim / 2)": {"sin": torch.zeros(8, 4)},
    "cos: got dtype torch.float16, expected torch.float32 like x": {"cos": TABLES.half()},
    "sin: got dtype torch.float32, expected torch.float16 like x, or torch.float32, the same for both": {
        "x": X.half(),
        "cos": TABLES.half(),
    },
    "sin: got device meta, expected cpu like x": {"sin": TABLES.to("meta")},
    "sin: got strides (1, 9), expected the last one to be 1": {"sin": torch.zeros(4, 9).t()},
    "cos: got 9 positions, expected at least 10": {"seqlen_offsets": 5},
    "cos: got 9 positions, expected at least 11": {"seqlen_offsets": torch.tensor([6, 0], dtype=torch.int32)},
    "cos: got 9 positions, expected at least 12": {**PACKED, "seqlen_offsets": 6},
    "seqlen_offsets: got -1, expected 0 to 2147483647": {"seqlen_offsets": -1},
    "seqlen_offsets: got [0, -1], expected none below 0": {
        "seqlen_offsets": torch.tensor([0, -1], dtype=torch.int32)
    },
    "seqlen_offsets: got float, expected an int or an int32 tensor (batch,)": {"seqlen_offsets": 1.0},
    "seqlen_offsets: got torch.int64 (2,), expected torch.int32 (batch), batch 2": {
        "seqlen_offsets": torch.zeros(2, dtype=torch.int64)
    },
    "seqlen_offsets: got torch.int32 (3,), expected torch.int32 (batch), batch 2": {
        **PACKED,
        "seqlen_offsets": torch.zeros(3, dtype=torch.int32),
    },
    "seqlen_offsets: got device meta, expected cpu like x": {
        "seqlen_offsets": torch.zeros(2, dtype=torch.int32, device="meta")
    },
    "cu_seqlens: got list, expected a torch.Tensor (batch + 1) or None": {**PACKED, "cu_seqlens": [0, 10]},
    "cu_seqlens: got torch.int64 (3,) of strides (1,), expected torch.int32 (batch + 1,), contiguous": {
        **PACKED,
        "cu_seqlens": EDGES.long(),
    },
    "cu_seqlens: got torch.int32 (1,) of strides (1,)": {**PACKED, "cu_seqlens": EDGES[:1]},
    "cu_seqlens: got torch.int32 (2,) of strides (2,)": {**PACKED, "cu_seqlens": EDGES[::2]},
    "cu_seqlens: got device meta, expected cpu like x": {**PACKED, "cu_seqlens": EDGES.to("meta")},
    "cu_seqlens: got [0, 4, 9], expected 0 rising to 10": {
        **PACKED,
        "cu_seqlens": torch.tensor([0, 4, 9], dtype=torch.int32),
    },
    "cu_seqlens: got [0, 11, 10], expected 0 rising to 10": {
        **PACKED,
        "cu_seqlens": torch.tensor([0, 11, 10], dtype=torch.int32),
    },
    "interleaved: got 1, expected True or False": {"interleaved": 1},
    "cos, sin: got requires_grad=True, expected False": {"sin": TABLES.clone().requires_grad_()},
    "backend: got 'gpu', expected one of auto": {"backend": "gpu"},
}


@pytest.mark.parametrize("backend", ["reference", "torch"])
@pytest.mark.parametrize("message", BAD)
def test_errors_name_the_argument(message, backend):
    fastgpt.rotary_embedding(X, TABLES, TABLES, backend=backend)  # these tensors have passed
    arguments = {"x": X, "cos": TABLES, "sin": TABLES, "backend": backend, **BAD[message]}
    with pytest.raises((TypeError, ValueError)) as error:
        fastgpt.rotary_embedding(**arguments)
    assert message in str(error.value)


@STYLES
@pytest.mark.parametrize(
    "case", [RotaryCase((2, 5, 3, 8), 6, (3, 0)), RotaryCase((5, 3, 8), 8, 2, (3, 2))], ids=str
)
@pytest.mark.parametrize("backend", [name for name in ROTATING if name != "torch"])
def test_opcheck(backend, case, interleaved):
    x, _, *tables = make_inputs(case, torch.float32)
    lengths = lengths_of(case)
    offsets, edges = lengths["seqlen_offsets"], lengths["cu_seqlens"]
    offset, offsets = (0, offsets) if isinstance(offsets, torch.Tensor) else (offsets, None)
    rest = (*tables, offsets, edges, offset, interleaved, False, backend)
    torch.library.opcheck(torch.ops.fastgpt.rotary.default, (x, *rest))
    torch.library.opcheck(torch.ops.fastgpt.rotary.default, (x.clone().requires_grad_(), *rest))


@pytest.mark.parametrize(
    ("packed", "dynamic"), [(False, False), (False, True), (True, True)], ids=["static", "dynamic", "packed"]
)
@pytest.mark.parametrize("backend", ROTATING)
def test_compile_fullgraph(backend, packed, dynamic):
    def f(x, cos, sin, offsets, edges):
        lengths = {"seqlen_offsets": offsets, "cu_seqlens": edges}
        return fastgpt.rotary_embedding(x.sin(), cos, sin, **lengths, backend=backend).exp()

    torch._dynamo.reset()
    compiled = torch.compile(f, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for tokens, offsets in ((4, 3), (7, 5), (7, (2, 0))):
        lengths = (tokens, 3) if packed else None
        shape = (tokens + 3, 3, 8) if packed else (2, tokens, 3, 8)
        case = RotaryCase(shape, 6, offsets, lengths)
        x, dout, *tables = make_inputs(case, torch.float32)
        arguments = (x.requires_grad_(), *tables, *lengths_of(case).values())
        with torch.no_grad():
            torch.testing.assert_close(compiled(*arguments), f(*arguments))
        (a,), (b,) = (torch.autograd.grad(g(*arguments), x, dout) for g in (compiled, f))
        torch.testing.assert_close(a, b)
