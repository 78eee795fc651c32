"""Random specifications of every op against `reference`: 25 of each in `make test`, 600 in `make nightly`.

A failing case prints itself and its seed, which hypothesis has made as small as it can.
"""

from __future__ import annotations

import os

import pytest
import torch
from backends import AVAILABLE, DTYPES, judge
from cases import AttentionCase, DecodeCase, DecodeVariant, Variant
from hypothesis import given
from hypothesis import strategies as st

from fastgpt.verify import attention, decode, merge, norm, rotary

KERNELS = [name for name in AVAILABLE if name not in ("reference", "torch")]
# In Triton's interpreter a program takes longer than a case elsewhere, and in the emulator a block.
SLOW = "1" in map(os.environ.get, ("TRITON_INTERPRET", "FASTGPT_CUDA_EMULATE"))
SEEDS = st.integers(0, 2**16)
HEADDIMS = st.integers(1, 140) | st.sampled_from([64, 128, 255, 256])
WINDOWS = st.tuples(st.integers(-1, 150), st.integers(-1, 150)) | st.just((-1, -1))
SOFTCAPS = st.sampled_from([0.0, 0.5, 20.0])


def maybe(strategy):
    return st.none() | strategy


def within(lengths):
    """For each of the lengths, from 0 to as much."""
    return st.tuples(*(st.integers(0, n) for n in lengths))


@st.composite
def attention_variants(draw) -> Variant:
    nheads_k = draw(st.integers(1, 3))
    nheads = nheads_k * draw(st.integers(1, 4))
    batch = draw(st.integers(1, 3))
    lengths_q = lengths_k = bias = None
    mask = 0.0
    if draw(st.booleans()):
        lengths_q = draw(st.tuples(*[st.integers(0, 130)] * batch))
        lengths_k = draw(st.tuples(*[st.integers(0, 200)] * batch))
        sq, sk, rows, keys = sum(lengths_q), sum(lengths_k), 1, lengths_k
    else:
        sq, sk, rows = draw(st.integers(0, 130)), draw(st.integers(0, 260)), batch
        keys = (sk,) * batch
        full = (batch, nheads, sq, sk)
        bias = draw(maybe(st.tuples(*(st.sampled_from([1, n]) for n in full))))
        mask = draw(st.sampled_from([0.0, 0.02, 0.7])) if bias else 0.0
    case = AttentionCase(
        rows,
        sq,
        sk,
        nheads,
        nheads_k,
        draw(HEADDIMS),
        draw(HEADDIMS),
        causal=draw(st.booleans()),
        window=draw(WINDOWS),
        layout=draw(st.sampled_from(["bshd", "bhsd", "packed"])),
    )
    seqused_k = draw(maybe(within(keys)))
    return Variant(
        case,
        softcap=draw(SOFTCAPS),
        slopes=draw(maybe(st.sampled_from([(nheads,), (batch, nheads)]))),
        bias=bias,
        mask=mask,
        sink=draw(st.booleans()),
        dropout_p=draw(st.sampled_from([0.0, 0.1, 0.5])),
        lengths_q=lengths_q,
        lengths_k=lengths_k,
        seqused_k=seqused_k,
        leftpad_k=draw(maybe(within(seqused_k or keys))),
    )


@st.composite
def decode_variants(draw) -> DecodeVariant:
    nheads_k = draw(st.integers(1, 4))
    nheads = nheads_k * draw(st.integers(1, 5))
    batch = draw(st.integers(1, 3))
    sq, appended = (draw(st.integers(0, 4) | st.integers(0, 50)) for _ in range(2))
    lengths = draw(st.tuples(*[st.integers(0, 600)] * batch))
    leftpad = draw(maybe(st.tuples(*[st.integers(0, 60)] * batch)))
    page_size = draw(st.sampled_from([0, 0, 1, 7, 16, 256]))
    needed = max(n + appended + pad for n, pad in zip(lengths, leftpad or (0,) * batch, strict=True))
    capacity = max(1, needed + draw(st.integers(0, 40)))
    if page_size:
        capacity = -(-capacity // page_size) * page_size
    headdim = draw(HEADDIMS)
    case = DecodeCase(
        sq,
        appended,
        capacity,
        lengths,
        nheads,
        nheads_k,
        headdim,
        draw(HEADDIMS),
        causal=draw(st.booleans()),
        window=draw(WINDOWS),
        num_splits=draw(st.just(0) | st.integers(0, 20)),
    )
    cache_dtype = draw(st.sampled_from([None, None, torch.int8, torch.float8_e4m3fn]))
    return DecodeVariant(
        case,
        softcap=draw(SOFTCAPS),
        slopes=draw(maybe(st.sampled_from([(nheads,), (batch, nheads)]))),
        sink=draw(st.booleans()),
        rotary_dim=2 * draw(st.integers(0, headdim // 2)) if appended else 0,
        interleaved=draw(st.booleans()),
        leftpad=leftpad,
        shuffled=not page_size and draw(st.booleans()),
        page_size=page_size,
        cache_dtype=cache_dtype,
        descale=draw(st.sampled_from([(nheads_k,), (batch, nheads_k)])) if cache_dtype else (),
    )


@st.composite
def norm_cases(draw) -> norm.NormCase:
    lead = draw(st.lists(st.integers(0, 6 if SLOW else 12), max_size=3).map(tuple))
    layouts = ["contiguous", "slice", *["transpose"] * (len(lead) >= 2), *["expand"] * (0 not in lead[:1])]
    return norm.NormCase(
        lead,
        draw(st.integers(1, 300) | st.integers(1, 5000)),
        weight=draw(st.sampled_from(["none", "same", "float32"])),
        bias=draw(st.booleans()),
        residual=draw(st.booleans()),
        prenorm=draw(st.booleans()),
        layout=draw(st.sampled_from(layouts)) if lead else "contiguous",
        offset=draw(st.sampled_from([0.0, 5.0])),
        dropout_p=draw(st.sampled_from([0.0, 0.1, 0.5])),
    )


@st.composite
def merge_cases(draw) -> merge.MergeCase:
    lead = draw(st.just(()) | st.tuples(st.integers(0, 3)))
    nheads = draw(st.integers(0, 2 if SLOW else 6))
    shape = (*lead, draw(st.integers(0, 150)), nheads, draw(st.integers(1, 300)))
    return merge.MergeCase(
        shape,
        spread=draw(st.sampled_from([1e-3, 1.0, 50.0, 200.0])),
        offset=draw(st.sampled_from([0.0, -30.0, 1e3])),
        empty=draw(st.booleans()),
        layout=draw(st.sampled_from(["contiguous", "strided", *["expanded"] * (lead > (0,))])),
    )


@st.composite
def rotary_cases(draw) -> rotary.RotaryCase:
    batch, headdim = draw(st.integers(0, 3)), draw(st.integers(2, 140) | st.sampled_from([64, 128, 256]))
    lengths = draw(maybe(st.tuples(*[st.integers(0, 80)] * max(batch, 1))))
    lead = (batch, draw(st.integers(0, 130))) if lengths is None else (sum(lengths),)
    starts = st.tuples(*[st.integers(0, 50)] * (batch if lengths is None else len(lengths)))
    return rotary.RotaryCase(
        (*lead, draw(st.integers(0, 9)), headdim),
        2 * draw(st.integers(1, headdim // 2)),
        draw(st.integers(0, 50) | starts),
        lengths,
        draw(st.sampled_from(["contiguous", "strided", *["expanded"] * (lead > (0,))])),
        narrow=draw(st.booleans()),
    )


@pytest.mark.parametrize("backend", KERNELS)
@given(variant=attention_variants(), dtype=st.sampled_from(DTYPES), seed=SEEDS)
def test_random_attention(backend, variant, dtype, seed):
    torch.manual_seed(seed)
    judge(lambda: attention.variant_results(variant, backend, dtype, by_reference=True))


@pytest.mark.parametrize("backend", KERNELS)
@given(variant=decode_variants(), dtype=st.sampled_from(DTYPES), seed=SEEDS)
def test_random_decode(backend, variant, dtype, seed):
    torch.manual_seed(seed)
    judge(lambda: decode.variant_results(variant, backend, dtype, by_reference=True))


@pytest.mark.parametrize("backend", KERNELS)
@given(case=norm_cases(), kind=st.sampled_from(norm.KINDS), dtype=st.sampled_from(DTYPES), seed=SEEDS)
def test_random_norm(backend, case, kind, dtype, seed):
    torch.manual_seed(seed)
    reference = norm.fused_norm("reference")
    judge(lambda: norm.forward_results(case, kind, dtype, backend, reference))
    judge(lambda: norm.backward_results(case, kind, dtype, backend, reference))


@pytest.mark.parametrize("backend", KERNELS)
@given(case=merge_cases(), dtype=st.sampled_from(DTYPES), seed=SEEDS)
def test_random_merge(backend, case, dtype, seed):
    torch.manual_seed(seed)
    reference = merge.fused_merge("reference")
    judge(lambda: merge.results(case, dtype, backend, other=reference))


@pytest.mark.parametrize("backend", [name for name in KERNELS if name != "cpu"])
@given(case=rotary_cases(), interleaved=st.booleans(), dtype=st.sampled_from(DTYPES), seed=SEEDS)
def test_random_rotary(backend, case, interleaved, dtype, seed):
    torch.manual_seed(seed)
    reference = rotary.fused_rotary("reference")
    judge(lambda: rotary.results(case, dtype, interleaved, backend, other=reference))
