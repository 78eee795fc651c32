"""Which backend serves a call, and what it says when none can."""

from __future__ import annotations

import importlib.util
import logging
import platform
import re
import runpy
import subprocess
import types
from pathlib import Path

import pytest
import torch
from backends import AVAILABLE, REQUIRED
from test_structure import PACKAGE, python

import fastgpt
from fastgpt import dispatch, proof
from fastgpt.ops import checks, cuda
from fastgpt.ops.attention.spec import AttentionCall
from fastgpt.ops.native import refusals

Q = torch.zeros(1, 4, 2, 8)


def call(**changes):
    fields = {"device": "cpu", "dtype": torch.float32, "headdim": 8, "headdim_v": 8, "features": ()}
    return AttentionCall(**{**fields, **changes})


def test_required_backends_are_known():
    assert set(REQUIRED) <= set(dispatch.BACKENDS)


def test_auto_prefers_the_native_kernels():
    assert dispatch.resolve(call(), "auto") == ("cpu" if "cpu" in AVAILABLE else "torch")
    assert dispatch.resolve(call(dtype=torch.float64), "auto") == "torch"
    assert dispatch.resolve(call(dtype=torch.float64, features=("sink",)), "auto") == "reference"


def test_every_reason_is_given():
    asked = call(dtype=torch.float64, headdim=300, features=("softcap", "sink", "backward"))
    reasons = dispatch.explain(asked)
    assert reasons["reference"] == []
    assert [r.split()[-1] for r in reasons["torch"]] == ["softcap", "sink"]
    if "cpu" in AVAILABLE:
        assert [r.split()[0] for r in reasons["cpu"]] == ["dtype", "headdim"]
        with pytest.raises(fastgpt.BackendUnsupported) as error:
            dispatch.resolve(asked, "cpu")
        text = str(error.value)
        assert "attention(float64 on cpu, headdim 300/8, softcap, sink, backward)" in text
        assert text.count("\n  - ") == 2
    if "cuda" not in AVAILABLE:
        assert reasons["cuda"] == [dispatch.unavailable("cuda")]


def test_a_feature_is_unsupported_until_a_backend_lists_it():
    assert refusals("cpu", torch.float32, ("window", "new"), ("window",)) == [
        "new is not written for the CPU kernels yet"
    ]


def test_a_named_backend_never_falls_back():
    with pytest.raises(fastgpt.BackendUnsupported, match="'cuda' cannot serve"):
        fastgpt.attention(Q, Q, Q, backend="cuda")
    with pytest.raises(fastgpt.BackendUnsupported, match="does not return lse"):
        fastgpt.attention(Q, Q, Q, backend="torch", return_lse=True)


def test_the_argument_goes_before_the_environment(monkeypatch):
    monkeypatch.setenv("FASTGPT_BACKEND", "cuda")
    with pytest.raises(fastgpt.BackendUnsupported, match="cuda"):
        fastgpt.attention(Q, Q, Q)
    fastgpt.attention(Q, Q, Q, backend="reference")
    fastgpt.attention(Q, Q, Q, backend="auto")
    monkeypatch.setenv("FASTGPT_BACKEND", "gpu")
    with pytest.raises(ValueError, match="FASTGPT_BACKEND: got 'gpu', expected one of auto, reference"):
        fastgpt.attention(Q, Q, Q)
    monkeypatch.setenv("FASTGPT_BACKEND", "")
    fastgpt.attention(Q, Q, Q)


def test_a_passed_over_backend_is_logged_once(caplog, monkeypatch):
    monkeypatch.setattr(dispatch, "_said", set())
    with caplog.at_level(logging.DEBUG, logger="fastgpt"):
        for dtype in (torch.float64, torch.float64):
            dispatch.resolve(call(dtype=dtype), "auto")
    assert len([r for r in caplog.records if "cpu passed over" in r.message]) == 1


def test_landing_on_reference_warns_once(monkeypatch):
    monkeypatch.setattr(dispatch, "_said", set())
    monkeypatch.setattr(dispatch, "LARGE_REFERENCE", 10)
    q, sink = Q.double(), torch.zeros(2)
    with pytest.warns(RuntimeWarning, match="slow 'reference' backend"):
        fastgpt.attention(q, q, q, sink=sink)
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fastgpt.attention(q, q, q, sink=sink)
        monkeypatch.setattr(dispatch, "_said", set())
        fastgpt.attention(q, q, q, sink=sink, backend="reference")


@pytest.fixture
def gpu(monkeypatch, tmp_path):
    """A machine with a GPU, of which the user's cache says nothing."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(dispatch, "_said", set())
    monkeypatch.setattr(proof, "architecture", ("sm_90", "sm_80").__getitem__)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 1)
    monkeypatch.setattr("torch.cuda.get_device_name", ("a GPU", "another").__getitem__)
    kernels = types.SimpleNamespace(unsupported=lambda call: [])
    known = dispatch.implementation
    monkeypatch.setattr(dispatch, "unavailable", lambda backend: "not built" if backend == "cuda" else None)
    monkeypatch.setattr(
        dispatch, "implementation", lambda op, name: kernels if name == "triton" else known(op, name)
    )
    dispatch.unproven.cache_clear()
    yield
    dispatch.unproven.cache_clear()


def test_auto_takes_gpu_kernels_once_their_parity_is_on_record(gpu, caplog, monkeypatch):
    asked = call(device="cuda")
    with caplog.at_level(logging.WARNING, logger="fastgpt"):
        assert [dispatch.resolve(asked, "auto") for _ in range(2)] == ["torch", "torch"]
    (said,) = caplog.records
    assert "`auto` passes over triton kernels" in said.message and "`fastgpt verify`" in said.message
    assert dispatch.resolve(asked, "triton") == "triton"  # by name, an unproven kernel runs

    file = proof.save(proof.identity("triton", 0), ["attention", "norm"])
    dispatch.unproven.cache_clear()
    assert dispatch.resolve(asked, "auto") == "triton"
    assert (
        dispatch.unproven("triton", "decode") == dispatch.unproven("cuda", "attention") == ["a GPU (sm_90)"]
    )
    file.write_text("half a fi")
    dispatch.unproven.cache_clear()
    assert dispatch.resolve(asked, "auto") == "torch"

    monkeypatch.setitem(dispatch.PROVEN, ("triton", "attention", "sm_90"), "shown.json")
    dispatch.unproven.cache_clear()
    assert dispatch.resolve(asked, "auto") == "triton"

    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)  # a tensor may be on either
    dispatch.unproven.cache_clear()
    assert dispatch.resolve(asked, "auto") == "torch"
    assert dispatch.unproven("triton", "attention") == ["another (sm_80)"]
    proof.save(proof.identity("triton", 1), ["attention"])
    dispatch.unproven.cache_clear()
    assert dispatch.resolve(asked, "auto") == "triton"


@pytest.mark.parametrize("changed", ["device", "architecture", "driver", "torch", "triton", "fastgpt"])
def test_a_proof_holds_for_what_it_was_made_with(gpu, changed):
    identity = proof.identity("triton", 0)
    proof.save(identity, ["norm"])
    assert proof.load(identity) == ["norm"]
    other = identity | {changed: "another"}
    assert proof.load(other) == []
    proof.path(identity).rename(proof.path(other))
    assert proof.load(other) == []


@pytest.fixture
def built(monkeypatch):
    """The CUDA kernels as if they were built, on a machine that has what they need."""
    module = types.SimpleNamespace(unavailable=lambda major=0: "")
    monkeypatch.setattr(cuda, "EMULATED", False)
    monkeypatch.setattr(cuda, "load", lambda: module)
    monkeypatch.setattr("torch.version.cuda", "13.0")
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 1)
    monkeypatch.setattr("torch.cuda.get_device_capability", lambda gpu: (8, 0))
    monkeypatch.setattr("torch.cuda.get_device_name", ("a GPU", "another").__getitem__)
    return module


def test_cuda_kernels_say_what_is_missing(built, monkeypatch):
    assert cuda.unavailable() is None
    monkeypatch.setattr("torch.cuda.get_device_capability", lambda gpu: (7, 5))
    assert cuda.unavailable() == "the kernels need sm_80 or later, and cuda:0 (a GPU) is sm_75"
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert cuda.unavailable() == "torch sees no GPU"
    built.unavailable = lambda major=0: "no NVIDIA driver"
    assert cuda.unavailable() == "no NVIDIA driver"
    monkeypatch.setattr("torch.version.cuda", None)
    assert cuda.unavailable() == f"torch {torch.__version__} was built without CUDA"
    monkeypatch.setattr(cuda, "load", lambda: __import__("fastgpt._cuda_which_is_not_here"))
    monkeypatch.setattr(cuda, "MODULE", "fastgpt._cuda_which_is_not_here")
    assert "nvcc was not found when the package was built" in cuda.unavailable()


def test_one_unsuitable_gpu_is_named(built, monkeypatch):
    """A tensor may be on it."""
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    monkeypatch.setattr("torch.cuda.get_device_capability", ((8, 0), (7, 5)).__getitem__)
    hidden = "cuda:1 (another) is sm_75: CUDA_VISIBLE_DEVICES can hide it"
    assert cuda.unavailable() == f"the kernels need sm_80 or later, and {hidden}"
    monkeypatch.setattr("torch.cuda.get_device_capability", ((9, 0), (8, 0)).__getitem__)
    assert cuda.unavailable() is None
    attention = runpy.run_path(str(PACKAGE / "ops/attention/cuda.py"))
    reasons = attention["unsupported"](call(device="cuda", dtype=torch.float16, headdim=64, headdim_v=64))
    hidden = "cuda:1 (another) is sm_80: CUDA_VISIBLE_DEVICES can hide it"
    assert reasons == [f"the kernel is for sm_90, and {hidden}"]


def test_a_driver_must_compile_for_gpus_newer_than_the_kernels(built, monkeypatch):
    built.unavailable = lambda major=0: "an old driver" if major > 9 else ""
    assert cuda.unavailable() is None
    monkeypatch.setattr("torch.cuda.get_device_capability", lambda gpu: (12, 0))
    assert cuda.unavailable() == "an old driver"


@pytest.mark.skipif(not list(PACKAGE.glob("_cuda.*")), reason="built without nvcc")
def test_the_cuda_module_is_harmless_where_there_is_no_driver():
    """It is imported, finds no driver, or one, and starts nothing: a fork afterwards may still use CUDA."""
    code = (
        "import torch, os\nfrom fastgpt import _cuda\nreason = _cuda.unavailable()\n"
        "driver = os.path.exists('/proc/driver/nvidia/version')\n"
        "assert driver or reason.startswith('no NVIDIA driver'), reason\n"
        "assert not torch.cuda.is_initialized()\n"
    )
    result = python(code)
    assert result.returncode == 0, result.stderr


def test_an_op_without_kernels_of_a_backend_is_refused(monkeypatch):
    monkeypatch.setattr(dispatch, "unavailable", lambda backend: None)

    def missing(op, backend):
        raise ModuleNotFoundError(name=f"fastgpt.ops.{op}.{backend}")

    monkeypatch.setattr(dispatch, "implementation", missing)
    with pytest.raises(fastgpt.BackendUnsupported, match="has no cuda kernels for attention"):
        dispatch.resolve(call(), "cuda")


X86 = platform.machine() in ("x86_64", "AMD64")
BUILT = ("baseline", "avx2", "avx512", "amx") if X86 else ("baseline",)
AVX2 = {"avx2", "fma", "f16c"}
AVX512 = AVX2 | {"avx512f", "avx512bw", "avx512dq", "avx512vl"}
AMX = AVX512 | {"avx512_bf16", "amx_tile", "amx_bf16"}
NEEDED = {"baseline": set(), "avx2": AVX2, "avx512": AVX512, "amx": AMX, "amx_emulated": AVX512}
FLAGS = set(re.findall(r"^flags\s*:(.*)", Path("/proc/cpuinfo").read_text(), re.M)[0].split() if X86 else ())
ACCEPTED = [isa for isa in reversed(BUILT) if NEEDED[isa] <= FLAGS]  # best first
if X86 and importlib.util.find_spec("fastgpt._cuda_emulated"):  # what tests run in place of hardware
    BUILT += ("amx_emulated",)
    ACCEPTED += ["amx_emulated"] * (NEEDED["amx_emulated"] <= FLAGS)
SHOW = (
    "import torch\nfrom fastgpt import dispatch\nprint(dispatch.unavailable('cpu'))\n"
    "import fastgpt._cpu as c\nprint(c.isa, c.built_isas)"
)


def refusal(isa):
    return f"FASTGPT_CPU_ISA: got '{isa}', this processor and build accept: {', '.join(ACCEPTED)}"


@pytest.mark.parametrize("isa", BUILT)
def test_each_instruction_set_computes_the_same(isa):
    code = (
        "import torch, fastgpt\nfrom fastgpt import dispatch\n"
        "reason = dispatch.unavailable('cpu')\n"
        "if reason: print(reason); raise SystemExit\n"
        "import fastgpt._cpu\nprint(fastgpt._cpu.isa)\n"
        "torch.manual_seed(0)\n"
        "for dtype, bound in ((torch.float32, 1e-5), (torch.bfloat16, 2e-2), (torch.float16, 2e-3)):\n"
        "  for d, dv, sq, sk in ((64, 64, 150, 150), (33, 80, 130, 200), (1, 7, 2, 300), (128, 99, 1, 60)):\n"
        "    q, k, v = (torch.randn(s).to(dtype) for s in ((2, sq, 4, d), (2, sk, 2, d), (2, sk, 2, dv)))\n"
        "    results = []\n"
        "    for backend in ('cpu', 'reference'):\n"
        "        leaves = [t.clone().requires_grad_() for t in (q, k, v)]\n"
        "        out = fastgpt.attention(*leaves, backend=backend)\n"
        "        out.sum().backward()\n"
        "        x = torch.randn(5, 100, generator=torch.Generator().manual_seed(1)).to(dtype)\n"
        "        norm = fastgpt.layer_norm(x, backend=backend)\n"
        "        results.append([out, norm, *(t.grad for t in leaves)])\n"
        "    for a, b in zip(*results):\n"
        "        scale = max(1.0, b.abs().max().item())\n"
        "        assert (a - b).abs().max() <= bound * scale, (dtype, d, (a - b).abs().max())\n"
    )
    result = python(code, FASTGPT_CPU_ISA=isa)
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip() == (isa if isa in ACCEPTED else refusal(isa))


@pytest.mark.skipif("amx_emulated" not in ACCEPTED, reason="built without it, or a processor without AVX-512")
def test_parity_of_the_matrix_units_kernels():
    """In bf16, of which they are; where the processor has the unit, all tests of parity run them anyway."""
    code = (
        "from fastgpt.cli import main\n"
        "options = ['--full', '-k', '^attention (tiled|dropout|varlen, every|every).*bfloat16']\n"
        "raise SystemExit(main(['verify', '--backend', 'cpu', *options]))"
    )
    result = python(code, FASTGPT_CPU_ISA="amx_emulated")
    assert result.returncode == 0, result.stdout + result.stderr
    assert result.stderr.count(" ok\n") > 12


@pytest.mark.parametrize("environment", [{}, {"FASTGPT_CPU_ISA": ""}], ids=["unset", "empty"])
def test_the_best_instruction_set_is_the_default(environment, monkeypatch):
    monkeypatch.delenv("FASTGPT_CPU_ISA", raising=False)
    result = python(SHOW, **environment)
    assert result.stdout.split() == ["None", ACCEPTED[0], ",".join(BUILT)], result.stdout + result.stderr


def test_an_unknown_instruction_set_is_an_error():
    result = python(SHOW, FASTGPT_CPU_ISA="mmx")
    assert result.stdout.strip() == refusal("mmx")
    assert result.returncode == 1  # an ImportError, not an illegal instruction


def test_an_instruction_set_that_is_asked_for_is_never_passed_over():
    result = python(
        "import torch, fastgpt\nq = torch.zeros(1, 4, 2, 8)\nfastgpt.attention(q, q, q)",
        FASTGPT_CPU_ISA="mmx",
    )
    assert "BackendUnsupported: FASTGPT_CPU_ISA: got 'mmx'" in result.stderr


def test_openmp_is_torchs_own():
    """No second OpenMP runtime in the process, and none asked for by the module."""
    code = (
        "import torch, fastgpt, re\n"
        "q = torch.randn(1, 200, 2, 8)\n"
        "fastgpt.attention(q, q, q, backend='cpu')\n"
        "torch.randn(300, 300) @ torch.randn(300, 300)\n"
        "maps = open('/proc/self/maps').read()\n"
        "print(len(set(re.findall(r'\\S*lib[gi]*omp\\S*', maps))))\n"
    )
    result = python(code)
    assert result.stdout.strip() == "1", result.stdout + result.stderr


def test_kernels_of_one_instruction_set_share_no_function_with_another():
    """The linker may merge equal weak symbols and keep the copy this processor cannot run."""
    objects = sorted((PACKAGE.parent / "build").glob("cmake-*/CMakeFiles/kernels_*.dir/cpu/kernels.cpp.o"))
    if not objects:
        assert "site-packages" in str(PACKAGE), "no object files in the build folder of a checkout"
    for path in objects:
        listing = subprocess.run(["nm", "-C", str(path)], capture_output=True, text=True, check=True).stdout
        weak = [line for line in listing.splitlines() if re.match(r"\S* [WVu] ", line)]
        assert [line for line in weak if "DW.ref.__gxx_personality" not in line] == [], path


def test_signatures_are_forgotten_where_there_are_many():
    passed = set()
    for length in range(2 * checks.MOST_REMEMBERED):
        checks.remember(passed, checks.signature(torch.empty(length, device="meta")))
    assert 0 < len(passed) <= checks.MOST_REMEMBERED
