"""What the GPU kernels compile to for chips that are not here; all of it is in `make gpu-compile`."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

OPS = ("attention", "decode", "merge", "norm", "rotary")
SCRIPT = Path(__file__).parents[1] / "benchmarks" / "compile_report.py"


pytestmark = [
    pytest.mark.skipif(not importlib.util.find_spec("triton"), reason="triton is not installed"),
    pytest.mark.skipif(not SCRIPT.exists(), reason="not a checkout"),
]


def test_shipped_configurations():
    """No spills, shared memory within the chip, HGMMA on sm_90, and other lengths compile nothing."""
    environ = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, str(SCRIPT), "--quick"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=environ)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("op", OPS)
def test_every_row_of_the_launch_tables_is_compiled(op, monkeypatch):
    """For one of the report's chips; the interpreter's rows are not."""
    monkeypatch.syspath_prepend(str(SCRIPT.parent))
    compile_report = importlib.import_module("compile_report")
    launch = importlib.import_module("fastgpt.ops.launch")
    module = importlib.import_module(f"fastgpt.ops.{op}.triton")
    monkeypatch.setattr(launch, "launch", lambda *args, **constants: None)
    monkeypatch.setattr(launch, "_asked", {})
    monkeypatch.setattr(launch, "INTERPRETED", False)
    for chip, index in compile_report.jobs(quick=False):
        if compile_report.CALLS[index].op == op:
            with launch.compile_only(*compile_report.CHIPS[chip].target):
                compile_report.CALLS[index].launch(module, compile_report.LENGTHS[0])
    asked = {(width, kernel, row) for (_, _, width, kernel), row in launch._asked.items()}
    shipped = {
        (width, kernel, row) for (chip, width, kernel), row in module.CONFIGS.items() if chip != "interpreter"
    }
    assert shipped - asked == set()


@pytest.mark.skipif(not importlib.util.find_spec("fastgpt._cuda"), reason="built without nvcc")
def test_cuda_kernels_do_not_spill():
    """For sm_80 and sm_90; and the module stays small."""
    command = [sys.executable, str(SCRIPT.with_name("cuda_report.py"))]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
    module = importlib.util.find_spec("fastgpt._cuda").origin
    assert Path(module).stat().st_size < 30 * 2**20
