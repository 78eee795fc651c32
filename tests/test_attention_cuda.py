"""Attention on the CUDA kernel: the cases of the common table that it has, and its own."""

from __future__ import annotations

import pytest
import torch
from backends import AVAILABLE, assert_parity
from cases import ATTENTION, AttentionCase, Variant

import fastgpt
from fastgpt.verify.attention import case_results, variant_results

pytestmark = pytest.mark.skipif(
    "cuda" not in AVAILABLE, reason="no CUDA kernels here; FASTGPT_CUDA_EMULATE=1 emulates them"
)

_C = AttentionCase
CUDA_CASES = [
    *(case for case in ATTENTION if case.headdim in (64, 128, 256) and case.headdim == case.headdim_v),
    _C(2, 257, 383, 4, 2, 128, 128),
    _C(1, 300, 700, 3, 1, 64, 64, causal=False, layout="bhsd"),
    _C(1, 500, 500, 2, 2, 128, 128, window=(100, 0)),
    _C(1, 129, 400, 2, 1, 256, 256, causal=False, window=(40, 150)),
    _C(2, 0, 40, 2, 2, 64, 64),
    _C(2, 40, 0, 2, 2, 64, 64),
]
CUDA_VARIANTS = {
    "packed": Variant(
        _C(1, 530, 470, 4, 2, 128, 128), lengths_q=(1, 129, 0, 400), lengths_k=(0, 200, 20, 250)
    ),
    "packed, not causal": Variant(
        _C(1, 300, 340, 2, 1, 64, 64, causal=False), lengths_q=(170, 130), lengths_k=(300, 40)
    ),
    "packed, d 256": Variant(_C(1, 150, 150, 2, 1, 256, 256), lengths_q=(10, 140), lengths_k=(10, 140)),
    "key ranges": Variant(_C(3, 150, 300, 2, 1, 128, 128), seqused_k=(300, 170, 0), leftpad_k=(0, 33, 0)),
    "packed key ranges": Variant(
        _C(1, 200, 400, 2, 2, 64, 64, window=(60, 0)),
        lengths_q=(90, 110),
        lengths_k=(250, 150),
        seqused_k=(200, 150),
        leftpad_k=(5, 140),
    ),
}
HALVES = [torch.bfloat16, torch.float16]


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("case", CUDA_CASES, ids=str)
def test_parity(case, dtype):
    for what, *values in case_results(case, "cuda", dtype):
        assert_parity(what, *values)


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("name", CUDA_VARIANTS)
def test_variant_parity(name, dtype):
    for what, *values in variant_results(CUDA_VARIANTS[name], "cuda", dtype):
        assert_parity(what, *values)


@pytest.mark.parametrize("scale", [0.0, -0.2, 1e-38, 3.0])
def test_softmax_scale(scale):
    q, k, v = (torch.randn(1, 150, 2, 64).half() for _ in range(3))
    got = fastgpt.attention(q, k, v, softmax_scale=scale, return_lse=True, backend="cuda")
    exact = fastgpt.attention(*(t.double() for t in (q, k, v)), softmax_scale=scale, return_lse=True)
    plain = fastgpt.attention(q, k, v, softmax_scale=scale, return_lse=True, backend="reference")
    for name, *values in zip(("out", "lse"), got, plain, exact, strict=True):
        assert_parity(name, *values)


def test_sequences_do_not_meet():
    """NaN in one packed sequence, and in rows that none uses, stays there."""
    edges_q, edges_k = (torch.tensor([0, *n]).cumsum(0).int() for n in ((70, 90, 60), (90, 100, 130)))
    q, k, v = (torch.randn(n, 2, 64).bfloat16() for n in (220, 320, 320))
    options = {"cu_seqlens_q": edges_q, "cu_seqlens_k": edges_k, "causal": True, "return_lse": True}
    before = fastgpt.attention_varlen(q, k, v, backend="cuda", **options)
    for t, first, last in ((q, 70, 160), (k, 90, 190), (v, 90, 190)):
        t[first:last] = torch.nan
    out, lse = fastgpt.attention_varlen(q, k, v, backend="cuda", **options)
    assert out[70:160].isnan().all() and lse[:, 70:160].isnan().all()
    for rows in (slice(70), slice(160, 220)):
        assert torch.equal(out[rows], before[0][rows]) and torch.equal(lse[:, rows], before[1][:, rows])


def test_refuses_what_it_has_not():
    q = torch.randn(1, 8, 2, 96)
    with pytest.raises(fastgpt.BackendUnsupported) as caught:
        fastgpt.attention(q, q, q, sink=torch.zeros(2), backend="cuda")
    for reason in ("float32 is not of 16 bits", "headdim 96 is not 64, 128 or 256", "sink is not written"):
        assert reason in str(caught.value)
