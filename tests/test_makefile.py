"""The stages of `make gpu`, with a python and a compute-sanitizer that only note how they are called."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from fastgpt import dispatch
from fastgpt.verify import run
from fastgpt.verify.attention import TILED, VARIANTS
from fastgpt.verify.decode import DECODE_VARIANTS

ROOT = Path(__file__).parents[1]
TOOLKIT = "/usr/local/cuda/bin"

pytestmark = pytest.mark.skipif(
    not (ROOT / "Makefile").exists() or shutil.which("make") is None, reason="not a checkout, or no make"
)

# The name of the GPU, a failure where the test wants one, and a note of everything else.
PYTHON = """#!/bin/sh
[ "$1" = -c ] && { echo some-gpu; exit; }
echo "$*" >> calls
case "$*" in *$FAILING*) exit 3;; esac
"""
SANITIZER = """#!/bin/sh
echo "caching $PYTORCH_NO_CUDA_MEMORY_CACHING, $*" >> calls
case "$*" in *$FAILING*) exit 1;; esac
"""


class Machine:
    """With a GPU."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        shutil.copy(ROOT / "Makefile", folder)
        (folder / "fastgpt").mkdir()
        self.add("python", PYTHON)

    def add(self, name: str, text: str) -> None:
        (self.folder / name).write_text(text)
        (self.folder / name).chmod(0o755)

    def make(self, stage: str, failing: str = "nothing fails") -> tuple[int, str, list[str]]:
        """The exit status, what was said, and the calls but for the build's."""
        calls = self.folder / "calls"
        calls.write_text("")
        path = f"{self.folder}:{os.environ['PATH']}"
        done = subprocess.run(
            ["make", "--silent", "-C", str(self.folder), stage, "GPU_PYTHON=./python", "DATE=today"],
            capture_output=True,
            text=True,
            timeout=100,
            env={**os.environ, "PATH": path, "FAILING": failing},
        )
        noted = [line for line in calls.read_text().splitlines() if "setup.py" not in line]
        return done.returncode, done.stdout + done.stderr, noted


@pytest.fixture
def machine(tmp_path):
    return Machine(tmp_path)


@pytest.fixture
def with_cuda(machine):
    (machine.folder / "fastgpt" / "_cuda.so.so").touch()
    machine.add("compute-sanitizer", SANITIZER)
    return machine


@pytest.mark.parametrize("stage", ["gpu-cuda", "gpu-sanitize"])
def test_without_nvcc_a_stage_says_that_it_is_skipped(machine, stage):
    (machine.folder / "fastgpt" / "_cuda_emulated.so.so").touch()
    status, said, calls = machine.make(stage)
    assert status == 0 and not calls
    assert f"make {stage}: skipped, no nvcc" in said


def test_every_backend_is_verified_into_one_file(with_cuda):
    calls = [call for stage in ("gpu-parity", "gpu-cuda") for call in with_cuda.make(stage)[2]]
    assert [re.findall("--backend (.*?) --full", call) for call in calls] == [["triton"], ["cpu"], ["cuda"]]
    assert {call.partition("--json ")[2] for call in calls} == {
        "benchmarks/results/some-gpu-today-parity.json"
    }


def test_the_stages_follow_one_another_whatever_fails(with_cuda):
    status, _, calls = with_cuda.make("gpu", failing="--backend cuda")
    assert status != 0
    assert [re.findall("(verify --backend \\w+|bench|report|--tool \\w+)", call)[0] for call in calls] == [
        "verify --backend triton",
        "verify --backend cpu",
        "verify --backend cuda",
        "bench",
        "report",
        "--tool memcheck",
        "--tool racecheck",
        "--tool synccheck",
    ]
    assert with_cuda.make("gpu")[0] == 0


def test_a_finding_fails_the_stage_and_the_other_tools_still_run(with_cuda):
    status, said, calls = with_cuda.make("gpu-sanitize", failing="racecheck")
    assert status != 0 and "racecheck failed (1;" in said and len(calls) == 3
    for call in calls:
        assert call.startswith("caching 1, ") and "--error-exitcode 1 " in call
        assert "./python -m fastgpt.cli verify --backend cuda --full --jobs 1 -k " in call
    assert with_cuda.make("gpu-sanitize")[0] == 0


@pytest.mark.skipif(
    shutil.which("compute-sanitizer", path=f"{os.environ['PATH']}:{TOOLKIT}") is not None,
    reason="there is a compute-sanitizer",
)
def test_a_missing_sanitizer_is_an_error(with_cuda):
    (with_cuda.folder / "compute-sanitizer").unlink()
    status, said, calls = with_cuda.make("gpu-sanitize")
    assert status != 0 and not calls
    assert "make gpu-sanitize: compute-sanitizer not found; it comes with the CUDA toolkit" in said


def test_what_is_sanitized_reaches_every_family_of_kernels(with_cuda):
    pattern = with_cuda.make("gpu-sanitize")[2][0].partition(" -k ")[2]
    checks = run.table(dispatch.OPS, full=True, medium=True)
    chosen = [check for check in checks if re.search(pattern, " ".join(run.key(check, "cuda")[:3]))]
    assert len(chosen) < 150  # small, under tools that take 10 to 100 times as long
    fields = {op: {check.field for check in chosen if check.op == op} for op in dispatch.OPS}
    assert fields["attention"] >= {"causal", "window", "varlen", "key ranges"}
    assert fields["decode"] >= {"append", "rotary", "pages", "quantized", "softcap", "combinations"}
    assert fields["norm"] >= {"layer norm", "layer norm, dropout", "rms norm, residual"}
    for op, named in (("attention", VARIANTS | TILED), ("decode", DECODE_VARIANTS)):
        dims = {
            named[check.case].case.headdim
            if check.case in named
            else int(check.case.split("-d")[1].split("-")[0])
            for check in chosen
            if check.op == op
        }
        assert dims >= {64, 128, 256}
    caches = {DECODE_VARIANTS[check.case].cache_dtype for check in chosen if check.case in DECODE_VARIANTS}
    assert len(caches) == 3
