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
    nvcc.write_text("#!/bin/sh\necho 'Cuda compilation tools, release 12.3, V12.3.107'\n")
    nvcc.chmod(0o755)
    code = "import sys, runpy; sys.argv = ['setup.py', '--name']; "
    done = run(code, CUDACXX=str(nvcc))
    assert (
        done.returncode == 0 and f"without CUDA kernels: {nvcc} is not of CUDA 12.4 or later" in done.stdout
    )


# Runs setup.py with builds that only say what they are of; one with CUDA fails when it comes to `failing`.
# pybind11 is in the environment that pip builds in, and need not be in this one.
BUILD = """
import runpy, shutil, subprocess, sys, types
sys.modules["pybind11"] = types.SimpleNamespace(get_cmake_dir=lambda: "")
run, cuda = subprocess.run, []
def fake(command, check=False, **options):
    if command[0] != "cmake":
        return run(command, check=check, **options)
    if "-S" in command:
        cuda[:] = ["-DFASTGPT_CUDA=ON" in command]
        print(next(part for part in command if part.startswith("-DFASTGPT_CUDA=")), flush=True)
    failed = cuda[0] and {failing!r} in command
    if failed and check:
        raise subprocess.CalledProcessError(1, "cmake")
    return subprocess.CompletedProcess(command, int(failed))
subprocess.run = fake
shutil.copy2 = lambda source, target: open(target, "w").write("")
sys.argv = ["setup.py", "build_ext", "--build-lib", {target!r}, "--build-temp", {target!r}]
"""


@pytest.fixture
def nvcc(tmp_path):
    nvcc = tmp_path / "nvcc"
    nvcc.write_text("#!/bin/sh\necho 'Cuda compilation tools, release 12.4, V12.4.131'\n")
    nvcc.chmod(0o755)
    return nvcc


@pytest.mark.parametrize("failing", ["-S", "--build"])
def test_an_nvcc_that_fails_is_as_none(failing, nvcc, tmp_path):
    target = tmp_path / "built"
    done = run(BUILD.format(failing=failing, target=str(target)), CUDACXX=str(nvcc))
    assert done.returncode == 0, done.stderr
    assert f"fastgpt: without CUDA kernels: {nvcc} failed" in done.stdout
    assert done.stdout.splitlines()[-1] == "-DFASTGPT_CUDA=OFF"
    assert [file.name.split(".")[0] for file in (target / "fastgpt").iterdir()] == ["_cpu"]


def test_asked_for_an_nvcc_that_fails_is_an_error(nvcc, tmp_path):
    code = BUILD.format(failing="--build", target=str(tmp_path / "built"))
    done = run(code, CUDACXX=str(nvcc), FASTGPT_CUDA="1")
    assert done.returncode == 1 and "-DFASTGPT_CUDA=OFF" not in done.stdout
    assert "FASTGPT_CUDA=0 leaves out the CUDA kernels" in done.stderr
