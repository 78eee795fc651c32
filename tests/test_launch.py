"""How Triton's kernels are launched: FASTGPT_AUTOTUNE=1. What they compile to is in test_compiled.py."""

from __future__ import annotations

from typing import NamedTuple

import pytest
import torch
from backends import AVAILABLE

import fastgpt

triton = pytest.importorskip("triton")
launch = pytest.importorskip("fastgpt.ops.launch")
Config = launch.Config


@pytest.fixture
def table(monkeypatch):
    """A table, and a function that computes wrongly with too small a tile and is fastest with (128, 32)."""
    rows = {
        ("default", 128, "forward"): Config(64, 64, 4, 2),
        ("default", 256, "forward"): Config(32, 32, 4, 2),
    }
    used = []

    def function(x, width):
        used.append(launch.choose(rows, width, "forward", "sm_86"))
        return (x if used[-1].block_n >= 32 else x + 1, None)

    def do_bench(run):
        run()
        m, n, warps, stages = used[-1]
        if warps == 8:
            raise RuntimeError("out of resources")
        return abs(m - 128) + abs(n - 32) + abs(stages - 3) + 1.0

    monkeypatch.setattr(launch, "_found", {})
    monkeypatch.setattr(launch, "_rows", {})
    monkeypatch.setattr(triton.testing, "do_bench", do_bench)
    return function, used


def test_a_search_prints_the_row_and_goes_on_with_it(table, monkeypatch, capsys):
    function, used = table
    monkeypatch.setenv("FASTGPT_AUTOTUNE", "1")
    tuned, x = launch.tuned(function), torch.ones(3)
    assert torch.equal(tuned(x, 100)[0], x)
    assert used[-1] == Config(128, 32, 4, 3)
    printed = capsys.readouterr().out
    assert printed.startswith('("sm_86", 128, "forward"): Config(128, 32, 4, 3),  # 1.0000 ms')
    calls = len(used)
    tuned(x, 128)
    assert len(used) == calls + 2 and used[-1] == Config(128, 32, 4, 3) and capsys.readouterr().out == ""
    tuned(x, 256)
    assert capsys.readouterr().out.startswith('("sm_86", 256, "forward")')


def test_a_chips_rows_stand_before_the_defaults():
    rows = {("default", n, "forward"): Config(n, n, 4, 2) for n in (64, 256)}
    rows |= {
        ("default", 256, "backward"): Config(16, 16, 4, 2),
        ("sm_90", 128, "forward"): Config(1, 2, 8, 3),
    }
    chosen = {
        (width, chip): launch.choose(rows, width, "forward", chip).block_m
        for width in (1, 64, 65, 128, 129, 256)
        for chip in ("sm_90", "sm_80")
    }
    assert [chosen[w, "sm_90"] for w in (1, 64, 65, 128, 129, 256)] == [1, 1, 1, 1, 256, 256]
    assert [chosen[w, "sm_80"] for w in (1, 64, 65, 128, 129, 256)] == [64, 64, 256, 256, 256, 256]
    assert launch.choose(rows, 100, "backward", "sm_90") == Config(16, 16, 4, 2)


def test_equal_constants_are_one_object():
    class Constants(NamedTuple):
        WIDTH: int
        MASKED: bool

    first = launch.constants(Constants, 1, True)
    assert first is launch.constants(Constants, 1, True)
    assert launch.constants(Constants, 1, 1) is not first and first.MASKED.value is True


@pytest.mark.skipif("triton" not in AVAILABLE, reason="Triton's interpreter is not here")
def test_every_op_of_triton_asks_for_its_row_at_each_call(monkeypatch):
    """Else FASTGPT_AUTOTUNE=1 would time one row under several names."""
    x, lse = torch.randn(1, 4, 2, 16), torch.randn(1, 2, 4)
    lengths = torch.tensor([4], dtype=torch.int32)
    calls = {
        "attention": lambda: fastgpt.attention(x, x, x, backend="triton"),
        "decode": lambda: fastgpt.attention_with_kvcache(x, x, x, cache_seqlens=lengths, backend="triton"),
        "norm": lambda: fastgpt.rms_norm(x, backend="triton"),
        "merge": lambda: fastgpt.merge_attention_states(x, lse, x, lse, backend="triton"),
        "rotary": lambda: fastgpt.rotary_embedding(x, x[0, :, 0, :8], x[0, :, 0, 8:], backend="triton"),
    }
    for call in calls.values():
        asked = []
        for _ in range(2):
            monkeypatch.setattr(launch, "_asked", {})
            call()
            asked.append(launch._asked)
        assert asked[0] and asked[0] == asked[1]


def test_without_it_the_table_rules(table, monkeypatch):
    function, used = table
    monkeypatch.delenv("FASTGPT_AUTOTUNE", raising=False)
    assert launch.tuned(function) is function
    function(torch.ones(3), 64)
    assert used == [Config(64, 64, 4, 2)]
