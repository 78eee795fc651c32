"""What the GPU kernels compile to for chips that are not here; all of it is in `make gpu-compile`."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPTS = Path(__file__).parents[1] / "benchmarks"
SCRIPT = SCRIPTS / "compile_report.py"


@pytest.mark.skipif(not importlib.util.find_spec("triton"), reason="triton is not installed")
@pytest.mark.skipif(not SCRIPT.exists(), reason="not a checkout")
def test_shipped_configurations():
    """No spills, shared memory within the chip, HGMMA on sm_90, and other lengths compile nothing."""
    environ = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, str(SCRIPT), "--quick"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=environ)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.skipif(not importlib.util.find_spec("fastgpt._cuda"), reason="built without nvcc")
@pytest.mark.skipif(not SCRIPT.exists(), reason="not a checkout")
def test_cuda_kernels_do_not_spill():
    """For sm_80 and sm_90; and the module stays small."""
    command = [sys.executable, str(SCRIPTS / "cuda_report.py")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    if done.returncode == 2 and "cuobjdump" in done.stderr:
        pytest.skip("no cuobjdump")
    assert done.returncode == 0, done.stdout + done.stderr
    module = importlib.util.find_spec("fastgpt._cuda").origin
    assert Path(module).stat().st_size < 30 * 2**20
