"""How Triton's kernels are launched: FASTGPT_AUTOTUNE=1. What they compile to is in test_compiled.py."""

from __future__ import annotations

import pytest
import torch

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


def test_without_it_the_table_rules(table, monkeypatch):
    function, used = table
    monkeypatch.delenv("FASTGPT_AUTOTUNE", raising=False)
    assert launch.tuned(function) is function
    function(torch.ones(3), 64)
    assert used == [Config(64, 64, 4, 2)]
