"""Every test runs with uninitialised memory poisoned: torch.empty gives NaN, and so does the scratch
memory of the CPU kernels."""

import os

import pytest
import torch
from backends import AVAILABLE, DTYPES, poison_scratch
from hypothesis import Phase, settings

from fastgpt.ops import cuda
from fastgpt.ops.few_rows.api import LIMITS

# Without it, cuBLAS refuses to be deterministic (the fixture `poison`).
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")

# How many random cases each test of tests/test_random.py draws, few where each takes Triton's interpreter
# seconds; --hypothesis-profile=nightly chooses more.
settings.register_profile("test", max_examples=25, deadline=None)
settings.register_profile("nightly", max_examples=600, deadline=None)
# Nor is a failing case made smaller there, which took minutes.
settings.register_profile(
    "interpreter", max_examples=3, deadline=None, phases=[Phase.explicit, Phase.generate]
)
settings.load_profile("interpreter" if os.environ.get("TRITON_INTERPRET") == "1" else "test")


def quicken_interpreter() -> None:
    """Triton's interpreter prepares the language for a device function at each call of it, which takes as
    long as the call. Once a launch is enough."""
    from triton.runtime import interpreter

    prepared: set[int] = set()
    run_grid = interpreter.GridExecutor.__call__

    def call(self, *args, **kwargs):
        language = id(self.fn.__globals__)
        if language not in prepared:
            prepared.add(language)
            interpreter._patch_lang(self.fn)
        return self.rewrite()(*args, **kwargs)

    def launch(self, *args, **kwargs):
        prepared.clear()
        return run_grid(self, *args, **kwargs)

    interpreter.InterpretedFunction.__call__ = call
    interpreter.GridExecutor.__call__ = launch


if "triton" in AVAILABLE and os.environ.get("TRITON_INTERPRET") == "1":
    quicken_interpreter()


def pytest_collection_modifyitems(config, items):
    """Triton's interpreter is slow: there the dtypes of a parity test take turns from one case to the next.
    All of them are in `TRITON_INTERPRET=1 fastgpt verify --backend triton --full`."""
    if os.environ.get("TRITON_INTERPRET") != "1":
        return
    seen: dict[str, dict[str, int]] = {}
    kept, left_out = [], []
    for item in items:
        params = dict(item.callspec.params) if hasattr(item, "callspec") else {}
        dtype = params.pop("dtype", None)
        if params.get("backend") == "triton" and dtype in DTYPES and "parity" in item.name:
            cases = seen.setdefault(item.originalname, {})
            turn = cases.setdefault(str(params), len(cases))
            if DTYPES[turn % len(DTYPES)] != dtype and "norm" not in str(item.path):
                left_out.append(item)
                continue
        kept.append(item)
    config.hook.pytest_deselected(items=left_out)
    items[:] = kept


@pytest.fixture(autouse=True)
def poison():
    torch.use_deterministic_algorithms(True)  # with it, fill_uninitialized_memory (on by default) works
    poison_scratch()
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(autouse=True)
def small_models_are_fastgpts(monkeypatch):
    """Their norms and products, too, which are torch's where they are as small as in the tests."""
    monkeypatch.setattr("fastgpt.integrations.transformers.norms.FEW", 0)
    for dtype, served in LIMITS.items():
        monkeypatch.setitem(LIMITS, dtype, served._replace(least_weight=0))


@pytest.fixture(autouse=True)
def fresh_random_inputs(request):
    """A new seed every run, printed when a test fails; FASTGPT_TEST_SEED repeats a run. It draws the order in
    which the threads of emulated kernels run, too."""
    seed = int(os.environ.get("FASTGPT_TEST_SEED", torch.seed() % 2**32))
    torch.manual_seed(seed)
    if cuda.EMULATED and "cuda" in AVAILABLE:
        cuda.load().set_schedule(seed)
    request.node.user_properties.append(("FASTGPT_TEST_SEED", seed))


@pytest.fixture
def device():
    """Where the CUDA kernels run, here: torch's default device meanwhile."""
    with torch.device("cpu" if cuda.EMULATED else "cuda") as device:
        yield device


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item, call):
    report = (yield).get_result()
    if report.failed:
        for name, value in item.user_properties:
            report.sections.append(("seed", f"{name}={value}"))
