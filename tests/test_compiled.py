"""What the Triton kernels compile to for chips that are not here; all of it is in `make gpu-compile`."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[1] / "benchmarks" / "compile_report.py"


@pytest.mark.skipif(not importlib.util.find_spec("triton"), reason="triton is not installed")
@pytest.mark.skipif(not SCRIPT.exists(), reason="not a checkout")
def test_shipped_configurations():
    """No spills, shared memory within the chip, HGMMA on sm_90, and other lengths compile nothing."""
    environ = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, str(SCRIPT), "--quick"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=environ)
    assert done.returncode == 0, done.stdout + done.stderr
