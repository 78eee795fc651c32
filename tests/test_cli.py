"""The command line: what it refuses, and how it says so."""

import json
import subprocess
import sys
import types

import pytest
from test_bench import FakeWorkload

from fastgpt import cli, dispatch
from fastgpt.bench import harness, machine, memory, report, workloads


def failure(capsys, *argv):
    """The one line on stderr of a command that exits with 2."""
    try:
        code = cli.main(list(argv))
    except SystemExit as error:
        code = error.code
    out, err = capsys.readouterr()
    assert code == 2 and not out
    (line,) = err.splitlines()
    return line


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        ([], "COMMAND"),
        (["bench"], "BENCH"),
        (["bench", "matmul"], "'matmul'"),
        (["bench", "norm", "--dtype", "fp32,fp8"], "'fp8'"),
        (["bench", "norm", "--backend", "auto"], "'auto'"),
        (["bench", "launch"], "--device cuda"),
        (["verify", "--op", "matmul"], "'matmul'"),
        (["bench", "norm", "--budget", "0"], "seconds above 0, or quick"),
        (["bench", "norm", "--budget", "nan"], "seconds above 0, or quick"),
        (["bench", "norm", "--json", "nowhere/at/all.json"], "--json: nowhere/at/all.json cannot be written"),
        (["demo", "--max-new-tokens", "-1"], "'-1'"),
        (["report", "nowhere.json"], "nowhere.json cannot be read"),
    ],
)
def test_parse_errors_are_one_line(capsys, argv, words):
    assert words in failure(capsys, *argv)


@pytest.fixture
def no_measurement(monkeypatch):
    monkeypatch.setattr(machine, "ceilings", lambda *_: pytest.fail("the measurement started"))


def test_outputs_are_checked_before_the_measurement(capsys, tmp_path, no_measurement):
    pytest.importorskip("matplotlib")
    line = failure(capsys, "bench", "attention", "--json", str(tmp_path))
    assert "--json" in line and "folder" in line
    assert "cannot be written" in failure(capsys, "bench", "attention", "--plot", "nowhere/plot.png")
    assert "ends in none of" in failure(capsys, "bench", "attention", "--plot", str(tmp_path / "plot.txt"))
    assert list(tmp_path.iterdir()) == []


def test_missing_matplotlib_names_the_remedy(capsys, tmp_path, monkeypatch, no_measurement):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    line = failure(capsys, "bench", "attention", "--plot", str(tmp_path / "plot.png"))
    assert 'pip install "fastgpt-kernels[bench]"' in line


def test_a_device_without_kernels_says_why(capsys, monkeypatch, no_measurement):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert "no CUDA device" in failure(capsys, "bench", "attention", "--device", "cuda")
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr(dispatch, "unavailable", lambda backend: f"the reason of {backend}")
    line = failure(capsys, "bench", "attention", "--device", "cuda")
    assert "cuda: the reason of cuda; triton: the reason of triton" in line


@pytest.fixture
def fake_table(monkeypatch):
    def install(*fakes):
        for number, fake in enumerate(fakes):
            fake.directions = ("forward",)
            fake.name += str(number)
        monkeypatch.setitem(workloads.TABLES, "attention", fakes)
        monkeypatch.setattr(machine, "ceilings", lambda *_: {"sgemm": 1e9, "read": 1e9, "copy": 1e9})

    return install


ARGS = ["bench", "attention", "--backend", "cpu", "--dtype", "fp32", "--budget", "0.01"]


def test_failed_verification_exits_with_1_and_is_in_the_json(capsys, tmp_path, fake_table):
    fake_table(FakeWorkload(), FakeWorkload(error=1.0))
    assert cli.main([*ARGS, "--json", str(tmp_path / "out.json")]) == 1
    out, err = capsys.readouterr()
    assert "failed: out: off by 1" in out and "1 of 2 rows failed" in err
    assert [result.status for result in report.load(tmp_path / "out.json").results] == ["ok", "failed"]


def test_a_run_is_resumed_where_it_was(capsys, tmp_path, fake_table, monkeypatch):
    path = tmp_path / "out.json"
    first, second = FakeWorkload(), FakeWorkload(error=1.0)
    fake_table(first, second)
    argv = [*ARGS, "--json", str(path)]
    assert cli.main([*argv, "--resume"]) == 1  # there is nothing yet
    begun = report.load(path)
    second.error = 0.0
    first.calls.clear()
    monkeypatch.setattr(machine, "ceilings", lambda *_: pytest.fail("measured again"))
    assert cli.main([*argv, "--resume"]) == 0
    done = report.load(path)
    assert not first.calls and [result.status for result in done.results] == ["ok", "ok"]
    assert done.results[0] == begun.results[0] and done.date == begun.date
    monkeypatch.setattr(machine, "describe", lambda: {**begun.machine, "torch": "another"})
    capsys.readouterr()
    assert "is of another device, backend or version" in failure(capsys, *argv, "--resume")


def test_every_backend_with_kernels_is_measured(capsys, tmp_path, fake_table, monkeypatch):
    path = tmp_path / "out.json"
    fake_table(FakeWorkload(error=1.0))
    monkeypatch.setattr(dispatch, "AUTO_ORDER", {"cpu": ("cpu", "other", "gone", "torch", "reference")})
    monkeypatch.setattr(dispatch, "unavailable", lambda name: "not built" if name == "gone" else None)
    argv = [arg for arg in ARGS if arg not in ("--backend", "cpu")]
    assert cli.main([*argv, "--json", str(path)]) == 1
    done = report.load(path)
    assert done.backend == "cpu, other"
    assert [(own.backend, own.status) for own in done.results] == [("cpu", "failed"), ("other", "ok")]
    fake_table(FakeWorkload())  # a row of which one backend has failed is run again
    assert cli.main([*argv, "--json", str(path), "--resume"]) == 0
    assert [own.status for own in report.load(path).results] == ["ok", "ok"]
    capsys.readouterr()
    assert "is of another device, backend" in failure(capsys, *ARGS, "--json", str(path), "--resume")


def test_a_gpu_that_answers_no_more_ends_the_run(capsys, tmp_path, fake_table, monkeypatch):
    path, fakes = tmp_path / "out.json", [FakeWorkload(), FakeWorkload(), FakeWorkload()]
    fake_table(*fakes)

    def kills(*_):
        monkeypatch.setattr(memory, "free_memory", lambda device: gone("an illegal memory access"))
        gone("an illegal memory access")

    def gone(reason):
        raise RuntimeError(reason)

    monkeypatch.setattr(fakes[0], "case", kills, raising=False)
    argv = [*ARGS, "--json", str(path), "--resume"]
    assert cli.main(argv) == 1
    out, err = capsys.readouterr()
    assert "the GPU answers no more: --resume goes on in another process" in err and "illegal" in out
    assert [own.status for own in report.load(path).results] == ["failed"]
    monkeypatch.setattr(memory, "free_memory", lambda device: 1000)
    assert cli.main(argv) == 1  # the others come first now
    capsys.readouterr()
    assert [(own.workload, own.status) for own in report.load(path).results] == [
        ("fake0", "failed"),
        ("fake1", "ok"),
        ("fake2", "ok"),
    ]


def test_a_report_is_written_after_every_row(tmp_path, fake_table, monkeypatch):
    path = tmp_path / "out.json"
    second = FakeWorkload()

    def interrupted(*_):
        assert [result.status for result in report.load(path).results] == ["ok"]
        raise KeyboardInterrupt

    monkeypatch.setattr(second, "case", interrupted, raising=False)
    fake_table(FakeWorkload(), second)
    assert cli.main([*ARGS, "--json", str(path)]) == 130
    assert len(report.load(path).results) == 1


def test_a_row_that_cannot_be_run_does_not_end_the_run(capsys, fake_table, monkeypatch):
    broken = FakeWorkload()
    monkeypatch.setattr(broken, "case", lambda *_: 1 / 0, raising=False)
    fake_table(broken, FakeWorkload())
    assert cli.main(ARGS) == 1
    out, err = capsys.readouterr()
    assert "failed: ZeroDivisionError: division by zero" in out and "1 of 2 rows failed" in err
    assert "×" in out  # of the other row


@pytest.mark.parametrize(
    "change",
    [
        {"results": None},
        {"results": [None]},
        {"ceilings": []},
        {"machine": {}},
        {"baseline_times": None},
        {"baseline_times": []},
        {"baseline": None},
        {"rate": None},
        {"fastgpt_time": None},
    ],
    ids=str,
)
def test_a_report_of_another_form_is_refused(capsys, tmp_path, fake_table, change):
    path = tmp_path / "out.json"
    fake_table(FakeWorkload())
    assert cli.main([*ARGS, "--json", str(path)]) == 0
    document = json.loads(path.read_text())
    changed = document if change.keys() & document.keys() else document["results"][0]
    changed.update(change)
    path.write_text(json.dumps(document))
    capsys.readouterr()
    assert "is not a report of `fastgpt bench --json`" in failure(capsys, "report", str(path))


def test_nothing_measured_exits_with_1(capsys, fake_table):
    fake_table(FakeWorkload(unsupported=True))
    assert cli.main(ARGS) == 1
    assert "nothing could be measured" in capsys.readouterr().err


def test_interrupt_is_clean(capsys, fake_table, monkeypatch):
    def interrupted(*_, **__):
        raise KeyboardInterrupt

    fake_table(FakeWorkload())
    monkeypatch.setattr(harness, "run", interrupted)
    assert cli.main(ARGS) == 130
    assert capsys.readouterr().err.endswith("interrupted\n")


def test_bench_end_to_end(capsys, tmp_path, monkeypatch):
    """The real thing, small: the reference stands for the kernels, which may not have been built."""
    monkeypatch.setattr(machine, "SGEMM_SIZE", 128)
    monkeypatch.setattr(machine, "SMALLEST_BUFFER", 2**20)
    monkeypatch.setattr(machine, "LLC_FACTOR", 0)
    monkeypatch.setitem(
        workloads.TABLES,
        "attention",
        (workloads.Attention(1, 2, 64, 16), workloads.Attention(1, 1, 4096, 16)),
    )
    monkeypatch.setitem(workloads.TABLES, "decode", (workloads.Decode(1, 2, 1, 64, 16),))
    path = tmp_path / "out.json"
    argv = [
        "bench",
        "attention",
        "decode",
        "--budget",
        "quick",
        "--backend",
        "reference",
        "--json",
        str(path),
    ]
    assert cli.main(argv) == 0
    out, err = capsys.readouterr()
    loaded = report.load(path)
    assert report.table(loaded) + "\n" == out
    assert len(loaded.timed()) == len(loaded.results) == len(err.splitlines()) - 1 == 2 * 3 + 2
    assert {result.workload for result in loaded.results} == {"b1 h2 s64 d16", "b1 h2:1 k64 d16"}
    assert all(result.share > 0 and result.parity for result in loaded.results)
    assert loaded.machine["torch"] and all(rate > 0 for rate in loaded.ceilings.values())

    assert cli.main(["report", str(path)]) == 0
    assert capsys.readouterr().out == out


def test_backends(capsys):
    assert cli.main(["backends"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["op", *dispatch.BACKENDS]
    attention = next(line for line in lines if line.startswith("attention")).split()
    assert attention[1:3] == ["yes", "yes"]
    assert attention[3] == ("no" if dispatch.unavailable("cpu") else "yes")
    merge = next(line for line in lines if line.startswith("merge"))
    assert "yes        not written" in merge  # torch's file for it only says why
    for backend in dispatch.BACKENDS:
        if reason := dispatch.unavailable(backend):
            assert f"{backend} is not available: {reason}" in lines
    assert "auto on cpu tensors: cpu, torch, reference" in lines


def test_backends_says_what_has_run_on_hardware(capsys, monkeypatch):
    assert cli.main(["backends"]) == 0
    said = capsys.readouterr().out.splitlines()[-1]
    assert said.startswith(
        "parity" if dispatch.PROVEN else "no GPU kernel of this version has run on hardware"
    )
    monkeypatch.setattr(dispatch, "PROVEN", {("triton", "norm", "sm_90"): "h200.json"})
    assert cli.main(["backends"]) == 0
    assert capsys.readouterr().out.endswith("on record of: norm by triton on sm_90\n")


@pytest.mark.parametrize(
    ("gpu", "proven", "state"), [(0, 0, "interpreted"), (1, 0, "unproven"), (1, 1, "yes")]
)
def test_backends_says_what_auto_would_take(capsys, monkeypatch, gpu, proven, state):
    monkeypatch.setattr(dispatch, "unavailable", lambda backend: None if backend == "triton" else "gone")
    monkeypatch.setattr(dispatch, "unproven", lambda backend, op: [] if proven else ["a GPU"])
    monkeypatch.setattr(cli, "_written", lambda op, backend: op != "merge")
    monkeypatch.setattr("torch.cuda.is_available", lambda: bool(gpu))
    assert cli.main(["backends"]) == 0
    lines = capsys.readouterr().out.splitlines()
    column = lines[0].index("triton")
    states = {line.split()[0]: line[column:].split("  ")[0] for line in lines[1:5]}
    assert states == {"attention": state, "decode": state, "merge": "not written", "norm": state}


def test_env(capsys):
    assert cli.main(["env"]) == 0
    printed = capsys.readouterr().out
    for name, value in machine.describe().items():
        assert any(line.startswith(name) and line.endswith(str(value)) for line in printed.splitlines()), (
            f"{name} is missing"
        )


def test_demo_hands_its_arguments_over(monkeypatch):
    got = []
    demo = types.SimpleNamespace(main=lambda args: got.append(args) or 0)
    monkeypatch.setitem(sys.modules, "fastgpt.demo", demo)
    assert cli.main(["demo", "--prompt", "Once", "--max-new-tokens", "5"]) == 0
    assert (got[0].prompt, got[0].max_new_tokens, got[0].plot) == ("Once", 5, None)


def test_demo_checks_its_plot_first(capsys, tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    demo = types.SimpleNamespace(main=lambda args: pytest.fail("the demonstration started"))
    monkeypatch.setitem(sys.modules, "fastgpt.demo", demo)
    assert "cannot be written" in failure(capsys, "demo", "--plot", "nowhere/plot.png")
    assert "ends in none of" in failure(capsys, "demo", "--plot", str(tmp_path / "plot.txt"))


def test_the_help_imports_no_more_than_fastgpt_does():
    code = (
        "import sys; from fastgpt import cli; cli.parser(); "
        "print([m for m in ('matplotlib', 'transformers', 'fastgpt.bench') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_products_of_a_few_rows_are_the_cpus(capsys, monkeypatch):
    monkeypatch.setattr(cli, "_check_device", lambda device: None)
    assert "linear: measures kernels of the CPU" in failure(capsys, "bench", "linear", "--device", "cuda")


def test_the_choices_are_the_tables():
    assert set(cli.BENCHES) == set(workloads.QUICK)
    assert set(workloads.GPU_TABLES) == set(workloads.GPU_DTYPES) == set(cli.BENCHES) - {"linear"}
    assert set(workloads.TABLES) == set(workloads.DEFAULT_DTYPES) == set(cli.BENCHES) - {"launch"}
    assert set(cli.DTYPES) == set(harness.DTYPES)
