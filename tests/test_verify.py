"""`fastgpt verify`: what it runs, what it says, what it keeps."""

from __future__ import annotations

import functools
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from backends import AVAILABLE

from fastgpt import cli, dispatch, proof
from fastgpt.verify import attention, merge, norm, run
from fastgpt.verify.rule import FEW, ParityError, judge

RESULTS = Path(__file__).parents[1] / "benchmarks" / "results"
SMALL = [
    ("norm", "layer norm", "small", functools.partial(run._norm_results, norm.NormCase((5,), 33), "layer")),
    ("merge", "states", "few", functools.partial(run._merge_results, merge.MergeCase((2, 3, 4, 7)))),
]


def kills_the_gpu(backend, dtype):
    """The first check of a process that gets here does, and then no other passes in it."""
    if dtype == torch.float32 or run._answers is gone:
        run._answers = gone
        raise RuntimeError("an illegal memory access was encountered")
    return run._merge_results(merge.MergeCase((2, 3, 4, 7)), backend, dtype)


def gone(device):
    return False


@pytest.fixture
def small(monkeypatch):
    monkeypatch.setattr(run, "_cases", lambda medium: SMALL)


def dies(backend, dtype):
    if dtype == torch.bfloat16:
        os._exit(3)
    return run._merge_results(merge.MergeCase((2, 3, 4, 7)), backend, dtype)


def test_every_op_and_field_is_in_the_table():
    for full in (False, True):
        checks = run.table(dispatch.OPS, full, medium=True)
        assert len({run.key(check, "cpu") for check in checks}) == len(checks)
        assert {check.op for check in checks} == set(dispatch.OPS)
        fields = {check.field for check in checks}
        from fastgpt.ops.attention.spec import FEATURES

        assert set(FEATURES) - {"key_ranges", "lse", "backward"} <= fields
        assert {"rotary", "pages", "quantized", "left padding", "cache_batch_idx", "rms norm"} <= fields
    of_norms = run.table(("norm",), False, False)
    assert {check.dtype for check in of_norms} == set(run.DTYPES)


def test_what_has_passed_is_not_run_again(small, capsys, tmp_path, monkeypatch):
    argv = ["verify", "--backend", "cpu", "--json", str(tmp_path / "verdicts.json")]
    if "cpu" not in AVAILABLE:
        pytest.skip("no native CPU module")
    assert cli.main(argv) == 0
    out, err = capsys.readouterr()
    assert [line.split()[0] for line in out.splitlines()] == ["cpu", "op", "merge", "norm"]
    assert all(line.endswith("ok") for line in out.splitlines()[2:]) and len(err.splitlines()) == 2
    verdicts, facts = run.load(tmp_path / "verdicts.json")
    assert [v.status for v in verdicts] == ["ok", "ok"] and facts["machine"]["torch"] == torch.__version__
    monkeypatch.setattr(run, "judged", lambda *_: pytest.fail("it ran again"))
    assert cli.main(argv) == 0
    assert capsys.readouterr() == (out, "")
    (tmp_path / "verdicts.json").write_text("[]")
    assert cli.main(argv) == 2


def test_wrong_numbers_fail_their_op_alone(small, capsys, monkeypatch):
    right = norm.NORMS["layer"]
    monkeypatch.setitem(norm.NORMS, "layer", lambda *args, **options: _times(right(*args, **options), 1.001))
    monkeypatch.setattr(dispatch, "unavailable", lambda backend: None)
    assert cli.main(["verify", "--backend", "cpu"]) == 1
    out, err = capsys.readouterr()
    assert "1 FAILED" in next(line for line in out.splitlines() if line.startswith("norm"))
    assert next(line for line in out.splitlines() if line.startswith("merge")).endswith("ok")
    assert "ParityError: out: error" in err and "1 checks failed" in err and "seed" in err


def _times(values, factor):
    return tuple(t * factor for t in values) if isinstance(values, tuple) else values * factor


def test_a_seed_repeats_a_check():
    case = functools.partial(run._merge_results, merge.MergeCase((2, 3, 4, 7)))
    check = run.Check("merge", "states", "few", torch.float32, case)
    first = run.judged(check, "reference", "cpu")
    torch.manual_seed(first.seed)
    again = merge.results(merge.MergeCase((2, 3, 4, 7)), torch.float32, "reference")
    assert first.status == "ok" and {what for what, *_ in again} == first.shares.keys()


def test_a_process_that_dies_fails_its_check_alone():
    checks = [run.Check("merge", "states", "few", dtype, dies) for dtype in run.DTYPES]
    verdicts = {v.dtype: v for v in run.run(checks, "reference", "cpu", 2)}
    assert {name: v.status for name, v in verdicts.items()} == {
        "float32": "ok",
        "bfloat16": "failed",
        "float16": "ok",
    }
    assert "died" in verdicts["bfloat16"].reason


def test_a_gpu_that_answers_no_more_fails_its_check_alone():
    checks = [run.Check("merge", "states", "0", torch.float32, kills_the_gpu)]
    checks += [run.Check("merge", "states", str(n), torch.bfloat16, kills_the_gpu) for n in range(1, 9)]
    verdicts = {v.case: (v.status, v.fatal) for v in run.run(checks, "reference", "cpu", 2)}
    assert verdicts == {"0": ("failed", True)} | {str(n): ("ok", False) for n in range(1, 9)}


@pytest.fixture
def gpu(monkeypatch, tmp_path):
    """A machine with a GPU, and verdicts on it that the test gives."""
    identity = {"backend": "triton", "device": "a GPU"}
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(dispatch, "unavailable", lambda name: None if name == "triton" else "not built")
    monkeypatch.setattr(cli, "_written", lambda op, backend: True)
    monkeypatch.setattr(proof, "identity", lambda backend, device: identity)
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.get_device_name", lambda: "a GPU")
    monkeypatch.setattr("torch.cuda.current_device", lambda: 0)
    monkeypatch.setattr(cli, "_gpu_jobs", lambda: 1)
    monkeypatch.setattr("fastgpt.bench.machine.describe", lambda: {})

    def judge_as(states):
        def judged(checks, backend, device, jobs):
            assert (backend, device) == ("triton", "cuda")
            for check in checks:
                op, case, dtype, _ = run.key(check, backend)
                yield run.Verdict(op, check.field, case, dtype, backend, states[op], 1, shares={"out": 0.5})

        monkeypatch.setattr(run, "run", judged)
        return identity

    return judge_as


def test_the_ops_that_pass_on_a_gpu_are_put_on_record(gpu, small, capsys):
    identity = gpu({"norm": "ok", "merge": "failed"})
    assert cli.main(["verify"]) == 1
    assert proof.load(identity) == ["norm"]
    gpu({"norm": "failed", "merge": "ok"})
    assert cli.main(["verify", "--op", "merge"]) == 0
    assert proof.load(identity) == ["merge", "norm"]
    assert cli.main(["verify"]) == 1  # what no longer passes is taken back
    assert proof.load(identity) == ["merge"]
    gpu({"norm": "unsupported", "merge": "ok"})
    assert cli.main(["verify"]) == 0
    assert proof.load(identity) == ["merge"]
    assert "on record for `auto`: merge" in capsys.readouterr().out


def test_what_ships_as_proven_is_shown_by_a_file():
    """A file of `fastgpt verify --full --json` (`make gpu-parity`)."""
    for (backend, op, architecture), name in dispatch.PROVEN.items():
        verdicts, facts = run.load(RESULTS / name)
        assert facts["identity"][backend]["architecture"] == architecture
        own = [v for v in verdicts if (v.backend, v.op) == (backend, op)]
        assert run.passed(own) == [op]
        assert {v.field for v in own} == {c.field for c in run.table((op,), full=True, medium=True)}
        assert {v.dtype for v in own} == {"float32", "bfloat16", "float16"}


def test_some_checks_alone(gpu, small, capsys, tmp_path):
    identity = gpu({"norm": "ok", "merge": "failed"})
    path = tmp_path / "verdicts.json"
    assert cli.main(["verify", "--full", "-k", "norm small .*16", "--json", str(path)]) == 0
    verdicts, _ = run.load(path)
    assert {v.key[:3] for v in verdicts} == {("norm", "small", "bfloat16"), ("norm", "small", "float16")}
    assert proof.load(identity) == [] and "on record" not in capsys.readouterr().out
    assert cli.main(["verify", "-k", "norm smaller"]) == 2
    assert "there is no such check" in capsys.readouterr().err
    with pytest.raises(SystemExit, match="2"):
        cli.main(["verify", "-k", "("])
    assert "'(', no regular expression" in capsys.readouterr().err


def test_another_backends_failures_in_the_file_are_its_own(gpu, small, capsys, monkeypatch, tmp_path):
    gpu({"norm": "ok", "merge": "failed"})
    argv = ["verify", "--json", str(tmp_path / "verdicts.json")]
    assert cli.main([*argv, "--backend", "triton"]) == 1
    monkeypatch.setattr(dispatch, "unavailable", lambda name: None)
    monkeypatch.setattr(run, "run", lambda checks, *_: iter([_ok(check, "cpu") for check in checks]))
    assert cli.main([*argv, "--backend", "cpu"]) == 0
    assert len(run.load(tmp_path / "verdicts.json")[0]) == 4


def _ok(check, backend):
    op, case, dtype, _ = run.key(check, backend)
    return run.Verdict(op, check.field, case, dtype, backend, "ok", 1)


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_one_job_is_this_process(device, monkeypatch):
    """As debuggers and sanitizers want it."""
    monkeypatch.setattr(run, "judged", lambda check, backend, device: os.getpid())
    assert list(run.run(["check"], "reference", device, 1)) == [os.getpid()]


def test_nothing_to_verify_says_why(capsys, monkeypatch):
    monkeypatch.setattr(dispatch, "unavailable", lambda name: f"the reason of {name}")
    assert cli.main(["verify"]) == 2
    assert "triton: the reason of triton; cuda: the reason of cuda" in capsys.readouterr().err


@pytest.mark.skipif("triton" not in AVAILABLE, reason="Triton's interpreter is not here")
def test_a_dry_run_in_tritons_interpreter(capsys, monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    case = attention.AttentionCase(1, 20, 33, 2, 1, 16, 16)
    cases = [("attention", "causal", str(case), functools.partial(attention.case_results, case))]
    monkeypatch.setattr(run, "_cases", lambda medium: cases)
    assert cli.main(["verify", "--backend", "triton"]) == 0
    out = capsys.readouterr().out
    assert "triton on the CPU" in out and "on record" not in out
    assert list(tmp_path.iterdir()) == []


def test_it_judges_without_assertions_too():
    code = (
        "import torch\nfrom fastgpt.verify.rule import judge\n"
        "judge(lambda: [('out', torch.ones(3), torch.zeros(3), torch.zeros(3).double())])"
    )
    done = subprocess.run([sys.executable, "-O", "-c", code], capture_output=True, text=True)
    assert done.returncode == 1 and "ParityError: out: error 1.000e+00" in done.stderr


def off_by(error, plain, size):
    """Results of `size` elements, off by ``error``, of plain PyTorch by ``plain``."""
    exact = torch.zeros(size, dtype=torch.float64)
    return ("out", exact + error, exact + plain, exact)


def test_bad_luck_in_a_few_elements_is_looked_at_again():
    lucky = [[off_by(3e-3, 1e-3, 64)], *[[off_by(1e-3, 2e-3, 64)]] * 3]
    draws = iter(lucky)
    assert judge(lambda: next(draws)) == {"out": pytest.approx(3e-3 / 4.01e-3)}
    with pytest.raises(ParityError, match="error 5"):  # what is wrong stays wrong among more
        judge(lambda: [off_by(5e-3, 2e-3, 64)])
    draws = iter([[off_by(3e-3, 1e-3, FEW + 1), off_by(0, 0, 64)], *lucky])
    with pytest.raises(ParityError):  # in many elements it is no luck, whatever else the case has
        judge(lambda: next(draws))
    assert len(list(draws)) == 4
