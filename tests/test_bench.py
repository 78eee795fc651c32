"""The harness on fake candidates and a fake clock, and the workloads' own arithmetic."""

import dataclasses
import json
import math
import time

import pytest
import torch
from backends import AVAILABLE

import fastgpt
from fastgpt.bench import baselines, harness, report, workloads
from fastgpt.bench.harness import FEWEST_ROUNDS, FLOOR, Case, Row, Work
from fastgpt.bench.memory import peak_memory
from fastgpt.ops.few_rows import api as few_rows
from fastgpt.ops.few_rows.api import LIMITS, Limits


class FakeClock:
    """A timer for which each candidate, a string here, takes the seconds that it is given."""

    def __init__(self, seconds):
        self.seconds = seconds
        self.samples = []

    def __call__(self, run, calls):
        self.samples.append(run)
        taken = self.seconds[run]
        return calls * (taken.pop(0) if isinstance(taken, list) else taken)


def test_measure_takes_medians_and_percentiles():
    a = [0.1, 0.1, 0.5, 0.1, 0.4, 0.2, 0.3, 0.6]  # two warm-up calls, then the samples
    clock = FakeClock({"a": a, "b": 0.25})
    timings = harness.measure({"a": "a", "b": "b"}, budget=0.001, timer=clock)
    assert timings["a"].median == pytest.approx(0.35)
    assert (timings["a"].p20, timings["a"].p80) == pytest.approx((0.2, 0.5))
    assert timings["b"].median == pytest.approx(0.25)
    assert timings["a"].samples == FEWEST_ROUNDS and timings["a"].calls == 1


def test_measure_interleaves_and_rotates():
    clock = FakeClock({"a": 1.0, "b": 1.0, "c": 1.0})
    harness.measure({name: name for name in "abc"}, budget=0.001, timer=clock)
    assert "".join(clock.samples[6:15]) == "abcbcacab"


def test_measure_fills_the_budget_with_whole_rotations():
    clock = FakeClock({"a": 0.1, "b": 0.2})
    timings = harness.measure({"a": "a", "b": "b"}, budget=3.1, timer=clock)
    assert timings["a"].samples == timings["b"].samples == 12  # 11 rounds are enough, a rotation is 2


def test_measure_times_short_calls_several_at_once():
    clock = FakeClock({"a": 1e-5, "b": 4e-5})
    timings = harness.measure({"a": "a", "b": "b"}, budget=0.1, timer=clock)
    assert timings["a"].calls == pytest.approx(harness.SHORTEST_SAMPLE / 1e-5, abs=1)
    assert timings["b"].median == pytest.approx(4e-5)


def test_measure_on_the_wall_clock():
    timings = harness.measure(
        {"short": lambda: time.sleep(0.002), "long": lambda: time.sleep(0.02)}, budget=0.1
    )
    assert 0.002 <= timings["short"].median < 0.015
    assert 0.02 <= timings["long"].median < 0.05


EXACT = torch.linspace(-1, 1, 8, dtype=torch.float64)
TORCH_ERROR = 1e-3


@dataclasses.dataclass
class FakeWorkload:
    """Computes EXACT with the given error, by "other" exactly; torch's own error is TORCH_ERROR."""

    error: float = 0.0
    needs: int = 0
    unsupported: bool = False  # by any backend but "other"
    name = "fake"
    calls: list = dataclasses.field(default_factory=list)

    def memory(self, dtype):
        return self.needs

    def work(self, dtype, direction):
        return Work(1e6, "FLOP", "sgemm")

    def case(self, device, dtype, direction):
        def computed(error):
            value = EXACT.clone()
            value[3] += error
            return (value.float(),)

        def candidate(backend):
            if self.unsupported and backend != "other":
                raise fastgpt.BackendUnsupported("not today")

            def run():
                self.calls.append(backend)
                return computed(0.0 if backend == "other" else self.error)

            return run

        return Case(("out",), 2.0, candidate, {"exact": lambda: computed(TORCH_ERROR)}, lambda: (EXACT,))


def run_by(backends, workload, budget=0.01):
    return harness.run(
        Row("attention", workload, "fp32", "forward"),
        device="cpu",
        backends=backends,
        budget=budget,
        ceilings={"sgemm": 1e9},
        free_memory=1000,
    )


def run(workload):
    (result,) = run_by(["cpu"], workload)
    return result


def verify(case, backend):
    return harness.verify(case, case.candidate(backend), harness.expected(case))


@pytest.mark.parametrize("error", [2.5 * TORCH_ERROR, 1.0, math.nan, math.inf])
def test_wrong_numbers_are_refused_before_timing(error, monkeypatch):
    monkeypatch.setattr(harness, "measure", lambda *_, **__: pytest.fail("wrong numbers were timed"))
    workload = FakeWorkload(error)
    result = run(workload)
    assert result.status == "failed"
    assert "out: off by" in result.reason
    assert result.fastgpt_time is None and result.ratio is None
    assert workload.calls == ["cpu"]


def test_a_wrong_shape_or_dtype_is_refused():
    good = FakeWorkload().case("cpu", torch.float32, "forward")
    for wrong in (lambda: (EXACT,), lambda: (EXACT.float()[:1],)):
        with pytest.raises(harness.ParityError, match="torch's is"):
            harness.verify(good, wrong, harness.expected(good))


def test_the_bound_comes_from_the_most_exact_of_torchs_ways():
    case = FakeWorkload(error=3 * TORCH_ERROR).case("cpu", torch.float32, "forward")
    loose = dict(case.baselines, loose=lambda: (EXACT.float() + 1,))
    with pytest.raises(harness.ParityError):
        verify(dataclasses.replace(case, baselines=loose), "cpu")


def test_right_numbers_are_timed():
    result = run(FakeWorkload(error=1.9 * TORCH_ERROR))
    (parity,) = result.parity
    assert parity.bound == pytest.approx(2 * TORCH_ERROR + FLOOR, rel=1e-3)
    assert parity.error == pytest.approx(1.9 * TORCH_ERROR, rel=1e-3)
    assert result.status == "ok"
    assert result.ratio == result.baseline_times["exact"].median / result.fastgpt_time.median
    assert result.rate == 1e6 / result.fastgpt_time.median
    assert result.share == result.rate / 1e9


@pytest.fixture
def clock(monkeypatch):
    """Seconds of a call, by name; what was timed together."""
    seconds = {"fastgpt by cpu": 1.0, "fastgpt by other": 2.0, "exact": 3.0, "slow": 30.0, "empty": 0.1}
    together = []

    def measure(candidates, **_):
        together.append(list(candidates))
        return {name: harness.Timing(seconds[name], 0, 0, 6, 1) for name in candidates}

    monkeypatch.setattr(harness, "measure", measure)
    return together


def test_the_ratio_is_against_torchs_fastest_way(clock, monkeypatch):
    case = FakeWorkload().case("cpu", torch.float32, "forward")
    slow = {"slow": case.baselines["exact"], **case.baselines}
    case = dataclasses.replace(case, baselines=slow, timed={"empty": lambda: None})
    workload = FakeWorkload()
    monkeypatch.setattr(workload, "case", lambda *_: case, raising=False)
    result = run(workload)
    assert (result.baseline, result.ratio) == ("exact", 3.0)
    assert {name: time.median for name, time in result.baseline_times.items()} == {
        "slow": 30.0,
        "exact": 3.0,
        "empty": 0.1,
    }


def test_backends_of_a_row_are_timed_in_turn(clock):
    cpu, other = run_by(["cpu", "other"], FakeWorkload())
    assert clock == [["fastgpt by cpu", "fastgpt by other", "exact"]]
    assert (cpu.backend, cpu.ratio, other.backend, other.ratio) == ("cpu", 3.0, "other", 1.5)
    assert cpu.baseline_times == other.baseline_times and list(cpu.baseline_times) == ["exact"]


@pytest.mark.parametrize(
    ("workload", "status", "reason"),
    [
        (FakeWorkload(error=1.0), "failed", "off by 1"),
        (FakeWorkload(unsupported=True), "skipped", "not today"),
    ],
    ids=["wrong", "unsupported"],
)
def test_a_backend_that_fails_leaves_the_others_in_the_row(workload, status, reason, clock):
    cpu, other = run_by(["cpu", "other"], workload)
    assert cpu.status == status and reason in cpu.reason and cpu.fastgpt_time is None
    assert other.status == "ok" and other.parity[0].error < TORCH_ERROR
    assert clock == [["fastgpt by other", "exact"]]


def test_what_cannot_run_is_skipped_with_its_reason():
    unsupported, large = run(FakeWorkload(unsupported=True)), run(FakeWorkload(needs=2000))
    assert (unsupported.status, unsupported.reason) == ("skipped", "not today")
    assert large.status == "skipped" and "GiB" in large.reason


@pytest.mark.parametrize("where", ["case", "candidate"])
@pytest.mark.parametrize("error", [MemoryError(), RuntimeError("not enough\nmemory")], ids=repr)
def test_an_unexpected_error_fails_its_row(where, error, monkeypatch):
    def broken(*_):
        raise error

    workload = FakeWorkload()
    if where == "candidate":
        case = workload.case("cpu", torch.float32, "forward")
        case = dataclasses.replace(case, candidate=lambda backend: broken)
        monkeypatch.setattr(workload, "case", lambda *_: case, raising=False)
    else:
        monkeypatch.setattr(workload, "case", broken, raising=False)
    result = run(workload)
    assert (result.status, result.reason) == ("failed", f"{type(error).__name__}: {error}")
    assert result.fastgpt_time is None


@pytest.mark.parametrize("window", [-1, 50])
def test_attention_flop_and_oracle(window, monkeypatch):
    workload = workloads.Attention(2, 4, 130, 8, nheads_k=2, window=window)
    monkeypatch.setattr(workloads, "ORACLE_ROWS", 32)  # several blocks, the last one incomplete
    q, k, v = (torch.randn(2, 130, heads, 8, dtype=torch.float64) for heads in (4, 2, 2))
    whole = fastgpt.attention(q, k, v, window_size=(window, -1), backend="reference")
    torch.testing.assert_close(workload._oracle(q, k, v)[0], whole)

    i, j = torch.arange(130)[:, None], torch.arange(130)
    visible = (j <= i) & ((j >= i - window) if window >= 0 else True)
    flop = 4 * 8 * visible.sum().item() * 2 * 4
    assert workload.work(torch.float32, "forward").amount == flop
    assert workload.work(torch.float32, "backward").amount == 2.5 * flop


@pytest.mark.parametrize("direction", workloads.Attention.directions)
def test_gqa_is_compared_with_both_of_torchs_ways(direction):
    grouped, plain = workloads.Attention(1, 4, 70, 16, nheads_k=2), workloads.Attention(1, 4, 70, 16)
    case = grouped.case("cpu", torch.float32, direction)
    assert list(case.baselines) == [workloads.SDPA, f"{workloads.SDPA}, k and v repeated"]
    for one, other in zip(*(baseline() for baseline in case.baselines.values()), strict=True):
        torch.testing.assert_close(one, other)
    assert list(plain.case("cpu", torch.float32, direction).baselines) == [workloads.SDPA]


SMALL = [
    workloads.Attention(1, 4, 70, 16, nheads_k=2),
    workloads.Attention(2, 2, 70, 16, window=20),
    workloads.Decode(2, 4, 2, 50, 16),
]


@pytest.mark.parametrize("workload", SMALL, ids=lambda workload: workload.name)
@pytest.mark.parametrize("dtype", harness.DTYPES)
def test_workloads_verify_by_the_reference(workload, dtype):
    for direction in workload.directions:
        case = workload.case("cpu", harness.DTYPES[dtype], direction)
        checked = verify(case, "reference")
        assert [parity.tensor for parity in checked] == (
            ["out"] if direction == "forward" else ["dq", "dk", "dv"]
        )


def test_workload_verification_sees_a_wrong_kernel(monkeypatch):
    """One visible key too few, in one direction after the other."""
    right = fastgpt.attention

    def wrong(q, k, v, *, window_size, backend):
        keys = window_size if backend == "reference" else (q.shape[1] - 2, -1)
        return right(q, k, v, window_size=keys, backend="reference")

    workload = workloads.Attention(1, 2, 40, 16)
    monkeypatch.setattr(fastgpt, "attention", wrong)
    for direction in workload.directions:
        with pytest.raises(harness.ParityError):
            verify(workload.case("cpu", torch.float32, direction), "cpu")


def test_decode_verification_sees_a_read_behind_the_keys(monkeypatch):
    right = fastgpt.attention_with_kvcache

    def wrong(*tensors, cache_seqlens, backend):
        return right(*tensors, cache_seqlens=cache_seqlens + 1, backend="reference")

    monkeypatch.setattr(fastgpt, "attention_with_kvcache", wrong)
    with pytest.raises(harness.ParityError, match="nan"):
        verify(workloads.Decode(1, 2, 1, 50, 16).case("cpu", torch.float32, "forward"), "cpu")


@pytest.mark.parametrize("transposed", [False, True])
def test_products_are_verified(monkeypatch, transposed):
    few, many = (workloads.Linear("m", ((2, 24, 40), (1, 40, 7)), rows, transposed) for rows in (3, 9))
    assert few.work(torch.bfloat16, "forward").amount == 2 * (2 * 24 * 40 + 40 * 7)
    verify(few.case("cpu", torch.bfloat16, "forward"), "cpu")
    with monkeypatch.context() as changed:
        changed.setitem(LIMITS, torch.bfloat16, Limits(6, 24 * 40))
        verify(few.case("cpu", torch.bfloat16, "forward"), "cpu")  # with a weight that is torch's
    with pytest.raises(fastgpt.BackendUnsupported, match="9 rows"):
        verify(many.case("cpu", torch.float32, "forward"), "cpu")
    right = few_rows.linear
    monkeypatch.setattr(few_rows, "linear", lambda x, *rest: right(x * 1.01, *rest))
    with pytest.raises(harness.ParityError):
        verify(few.case("cpu", torch.float32, "forward"), "cpu")


SHAPE = {"vocab_size": 101, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
TINY = [
    workloads.Patched("llama", "llama", SHAPE | {"num_key_value_heads": 2, "intermediate_size": 48}, 40),
    workloads.Patched(
        "GPT-2", "gpt2", SHAPE | {"attn_pdrop": 0.0, "embd_pdrop": 0.0, "resid_pdrop": 0.0}, 40
    ),
]


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("direction", workloads.Patched.directions)
@pytest.mark.parametrize("workload", TINY, ids=lambda workload: workload.name)
def test_a_patched_model_is_verified_and_timed_beside_its_stock(workload, direction, dtype, saved, capsys):
    (result,) = harness.run(
        Row("model", workload, dtype, direction),
        device="cpu",
        backends=["cpu" if "cpu" in AVAILABLE else "reference"],
        budget=0.01,
        ceilings={},
        free_memory=workload.memory(torch.float32),
    )
    assert result.status == "ok", result.reason
    assert "fastgpt: patched" not in capsys.readouterr().out
    expected = ["logits", "gradients"] if direction == "train" else ["logits"]
    assert [parity.tensor for parity in result.parity] == expected
    line = report.table(dataclasses.replace(saved, results=(result,))).splitlines()[-2]
    assert result.baseline == "transformers" and (result.memory is None) == (direction == "generate")
    assert ("MiB, baseline" in line) == (direction != "generate")


@pytest.mark.parametrize("direction", workloads.Patched.directions)
def test_patched_model_verification_sees_a_wrong_kernel(direction, monkeypatch):
    from fastgpt.integrations.transformers import attention

    right = attention.attention

    def wrong(*tensors, **options):
        return 1.01 * right(*tensors, **options)

    monkeypatch.setattr(attention, "attention", wrong)
    with pytest.raises(harness.ParityError):
        verify(TINY[0].case("cpu", torch.float32, direction), "reference")


def test_a_generation_is_repeated_from_the_same_cache():
    run = TINY[0].case("cpu", torch.float32, "generate").baselines["transformers"]
    assert torch.equal(run()[0], run()[0])


def test_peak_memory():
    size = 64 * 2**20

    def run():
        torch.ones(size // 4)
        torch.ones(size // 8)

    assert 0.9 * size < peak_memory(run, "cpu") < 1.4 * size


def test_an_error_of_what_is_measured_is_its_own():
    def run():
        raise OSError("mine")

    with pytest.raises(OSError, match="mine"):
        peak_memory(run, "cpu")


def test_names_are_unique():
    for table in workloads.TABLES.values():
        assert len({workload.name for workload in table}) == len(table)


@pytest.fixture
def saved():
    results = (run(FakeWorkload()), run(FakeWorkload(error=1.0)), run(FakeWorkload(unsupported=True)))
    machine = {"cpu": "a processor", "threads": 2, "torch": "2", "fastgpt": "0"}
    ceilings = {"sgemm": 1e9, "read": 2e9, "copy": 3e9}
    return report.Report("2025-01-01", "cpu", "cpu", 0.01, 1, machine, ceilings, results)


def test_json_round_trip(saved, tmp_path):
    path = tmp_path / "report.json"
    report.save(saved, path)
    assert report.load(path) == saved
    assert [entry.name for entry in tmp_path.iterdir()] == ["report.json"]
    document = json.loads(path.read_text())
    assert document["schema"] == report.SCHEMA
    named = {field.name for field in dataclasses.fields(harness.Result)}
    assert named == set(document["results"][0])
    for name in named | set(document):
        assert f"    {name} " in report.__doc__, f"{name} is not in the schema's description"


def test_a_file_that_is_no_report_is_refused(tmp_path):
    path = tmp_path / "other.json"
    path.write_text('{"schema": 99}')
    with pytest.raises(ValueError, match="schema 1"):
        report.load(path)


def test_a_report_without_rows_is_an_empty_table(saved, tmp_path):
    path = tmp_path / "report.json"
    report.save(dataclasses.replace(saved, results=()), path)
    assert len(report.table(report.load(path)).splitlines()) == 2


def test_table(saved):
    lines = report.table(saved).splitlines()
    ok, failed, skipped = (line for line in lines if line.startswith("fake"))
    assert f"{saved.results[0].ratio:.2f}×" in ok and "of sgemm" in ok
    assert "failed: out: off by 1" in failed
    assert skipped.endswith("skipped: not today")
    assert "ceilings measured here: sgemm 1 GFLOP/s, read 2 GB/s, copy 3 GB/s" in lines


def test_table_of_several_backends(saved, clock):
    wrong = FakeWorkload(error=1.0)
    wrong.name = "fake, too"
    results = run_by(["cpu", "other"], FakeWorkload()) + run_by(["cpu", "other"], wrong)
    lines = report.table(dataclasses.replace(saved, results=tuple(results))).splitlines()
    header = next(line for line in lines if line.startswith("workload"))
    cells = [line[header.index("backend") :].split() for line in lines if line.startswith("fake")]
    assert [own[0] for own in cells] == ["cpu", "other", "cpu", "other"]
    beside = [line.partition("  2.00× the time of cpu")[1] for line in lines if line.startswith("fake")]
    assert list(map(bool, beside)) == [False, True, False, False]  # nothing beside what was not timed


@pytest.mark.parametrize("backends", [["cpu"], ["cpu", "other"]])
def test_plot(saved, tmp_path, backends, monkeypatch):
    pytest.importorskip("matplotlib")
    from matplotlib.axes import Axes

    named = []
    monkeypatch.setattr(Axes, "set_yticks", lambda self, places, names, **_: named.extend(names))
    results = tuple(run_by(backends, FakeWorkload()))
    report.plot(dataclasses.replace(saved, results=results), tmp_path / "ratios.png")
    assert (tmp_path / "ratios.png").read_bytes().startswith(b"\x89PNG")
    several = len(backends) > 1
    assert named == [f"fake  forward{f'  {name}' * several}" for name in backends]


def test_gpu_rows_start_with_the_heads_of_all_tables():
    rows = workloads.plan(("attention", "norm", "launch"), None, quick=False, device="cuda")
    assert [(row.bench, row.direction) for row in rows[:6]] == [
        ("attention", "forward"),
        ("attention", "backward"),
        ("norm", "forward"),
        ("norm", "backward"),
        ("launch", "host"),
        ("attention", "forward"),
    ]
    assert len({row.key for row in rows}) == len(rows)
    for table in workloads.GPU_TABLES.values():
        assert len({workload.name for workload in table}) == len(table)


def test_ways_that_cannot_run_on_a_gpu_are_left_out(monkeypatch):
    monkeypatch.setattr("torch.cuda.synchronize", lambda: None)
    case = FakeWorkload().case("cpu", torch.float32, "forward")
    case = dataclasses.replace(case, baselines=case.baselines | {"broken": lambda: 1 / 0})
    left = workloads._with_ways(case, "cuda")
    assert list(left.baselines) == ["exact"]
    assert left.refused == {"broken": "ZeroDivisionError: division by zero"}
    assert workloads._with_ways(case, "cpu") is case


@pytest.mark.parametrize(
    ("work", "how"),
    [
        (Work(1.0, "FLOP", "sgemm"), "events, graphs but for exact"),
        (Work(1.0, "B", "copy"), "events, cold L2, graphs but for exact"),
        (Work(1.0, "call", None), "wall clock of the host"),
    ],
    ids=str,
)
def test_what_is_timed_on_a_gpu(work, how, monkeypatch):
    case = FakeWorkload().case("cpu", torch.float32, "forward")
    candidate = case.candidate("cpu")
    graphs = {candidate: "graph of fastgpt"}
    given = {}
    monkeypatch.setattr(harness, "graphed", graphs.get)
    monkeypatch.setattr(harness, "cold_timer", lambda: "cold")
    monkeypatch.setattr(harness, "measure", lambda candidates, **_: given.update(candidates) or {})
    everything = {"fastgpt by cpu": candidate, **case.baselines}
    assert harness._measured(everything, work, "cuda", 0.1) == (how, {})
    assert list(given) == ["fastgpt by cpu", "exact"]
    assert given["exact"] is case.baselines["exact"]
    assert given["fastgpt by cpu"] is (candidate if work.unit == "call" else "graph of fastgpt")


def test_16_bit_products_are_held_to_their_own_rate():
    rates = {"sgemm": 1e9, "bf16 gemm": 2e9, "read": 3e9, "copy": 3e9}
    assert harness._ceiling(Work(1.0, "FLOP", "sgemm"), "bf16", "cuda", rates) == "bf16 gemm"
    assert harness._ceiling(Work(1.0, "FLOP", "sgemm"), "fp32", "cuda", rates) == "sgemm"
    assert harness._ceiling(Work(1.0, "call", None), "bf16", "cuda", rates) is None


def test_reading_a_gpus_memory_is_held_to_copying():
    rates = {"read": 3e9, "copy": 3e9}
    assert harness._ceiling(Work(1.0, "B", "read"), "bf16", "cuda", rates) == "copy"
    assert harness._ceiling(Work(1.0, "B", "read"), "bf16", "cpu", rates) == "read"


@pytest.mark.parametrize("window", [-1, 20])
def test_torchs_other_ways_compute_the_same(window, monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    q, k, v = (torch.randn(2, 70, heads, 16) for heads in (4, 2, 2))
    expected = fastgpt.attention(q, k, v, window_size=(window, -1), backend="reference")
    with torch.no_grad():
        torch.testing.assert_close(baselines.flex_attention(70, window, "cpu")(q, k, v), expected)
        if window < 0:
            torch.testing.assert_close(baselines.compiled_attention(q, k, v), expected)
            by_math = baselines.forced(lambda *tensors: baselines.attention(*tensors, None), "MATH")
            torch.testing.assert_close(by_math(q, k, v), expected)
            last = q[:, -1:], k.transpose(1, 2).contiguous(), v.transpose(1, 2).contiguous()
            torch.testing.assert_close(baselines.flex_decode()(*last), expected[:, -1:])


def test_a_launch_is_verified_and_timed_beside_an_empty_one(monkeypatch):
    monkeypatch.setattr(baselines, "empty_launch", lambda: "an empty launch")
    for workload in workloads.GPU_TABLES["launch"]:
        case = workload.case("cpu", torch.float32, "host")
        assert verify(case, "reference") and case.timed == {"an empty Triton launch": "an empty launch"}
