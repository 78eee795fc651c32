"""Attention on the CUDA kernel: the cases of the common table that it has."""

from __future__ import annotations

import pytest
import torch
from backends import AVAILABLE, assert_parity
from cases import ATTENTION

import fastgpt
from fastgpt.verify.attention import WIDE, case_results, variant_results

pytestmark = pytest.mark.skipif(
    "cuda" not in AVAILABLE, reason="no CUDA kernels here; FASTGPT_CUDA_EMULATE=1 emulates them"
)

CUDA_CASES = [c for c in ATTENTION if c.headdim in (64, 128, 256) and c.headdim == c.headdim_v]
HALVES = [torch.bfloat16, torch.float16]


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("case", CUDA_CASES, ids=str)
def test_parity(case, dtype):
    for what, *values in case_results(case, "cuda", dtype):
        assert_parity(what, *values)


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("name", WIDE)
def test_variant_parity(name, dtype):
    for what, *values in variant_results(WIDE[name], "cuda", dtype):
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
