"""setup.py: which modules it builds, and what it says where it cannot."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

SETUP = Path(__file__).parents[1] / "setup.py"
# Runs setup.py where nothing is found, which is so on a machine without nvcc.
WITHOUT_NVCC = (
    "import shutil, sys, runpy; shutil.which = lambda name: None; sys.argv = ['setup.py', '--name']; "
)
RUN = f"runpy.run_path({str(SETUP)!r}, run_name='__main__')"

pytestmark = pytest.mark.skipif(not SETUP.exists(), reason="not a checkout")


def run(code, **environment):
    own = {name: value for name, value in os.environ.items() if not name.startswith("FASTGPT_")}
    return subprocess.run(
        [sys.executable, "-c", code + RUN],
        capture_output=True,
        text=True,
        timeout=100,
        env=own | environment,
        cwd=SETUP.parent,
    )


def test_without_nvcc_the_cuda_kernels_are_left_out():
    done = run(WITHOUT_NVCC)
    assert done.returncode == 0, done.stderr
    assert "fastgpt: without CUDA kernels: nvcc was not found" in done.stdout


def test_asked_for_without_nvcc_they_are_an_error():
    done = run(WITHOUT_NVCC, FASTGPT_CUDA="1")
    assert done.returncode == 1 and "FASTGPT_CUDA=1: nvcc was not found" in done.stderr


@pytest.mark.parametrize("variable", ["FASTGPT_CUDA", "FASTGPT_BUILD", "FASTGPT_EMULATE"])
def test_other_values_are_errors(variable):
    done = run(WITHOUT_NVCC, **{variable: "yes"})
    assert done.returncode == 1 and f"{variable}: got 'yes', expected '0' or '1'" in done.stderr


def test_an_old_nvcc_is_as_none(tmp_path):
    nvcc = tmp_path / "nvcc"
    nvcc.write_text("#!/bin/sh\necho 'Cuda compilation tools, release 11.8, V11.8.89'\n")
    nvcc.chmod(0o755)
    code = "import sys, runpy; sys.argv = ['setup.py', '--name']; "
    done = run(code, CUDACXX=str(nvcc))
    assert (
        done.returncode == 0 and f"without CUDA kernels: {nvcc} is not of CUDA 12.4 or later" in done.stdout
    )
