"""Several Python threads at once, forked processes, too little memory: the native kernels, of every op."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import steps
from backends import AVAILABLE

pytestmark = pytest.mark.skipif("cpu" not in AVAILABLE, reason="the native CPU module is not available")


def python(code: str, seconds: float = 60) -> str:
    """What a process of its own prints; it is killed with its children if it hangs."""
    path = os.pathsep.join(filter(None, (str(Path(__file__).parent), os.environ.get("PYTHONPATH"))))
    environ = {k: v for k, v in os.environ.items() if k != "OMP_NUM_THREADS"}
    with subprocess.Popen(
        [sys.executable, "-c", code],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
        env={**environ, "PYTHONPATH": path},
    ) as process:
        try:
            output = process.communicate(timeout=seconds)[0]
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            pytest.fail(f"hangs: {process.communicate()[0]}")
    assert process.returncode == 0, output
    return output


def test_several_python_threads_at_once():
    """The bits are those of one call at a time; there are more threads than the machine has cores."""
    expected = [steps.results(seed) for seed in range(6)]
    wrong = []

    def work(seed):
        for _ in range(10):
            if not steps.equal(steps.results(seed), expected[seed]):
                wrong.append(seed)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_after_a_fork():
    """In the thread that forked, whose OpenMP threads are gone, a new one, a grandchild and the parent."""
    python("""
import os, threading, torch, steps

torch.set_num_threads(2)
expected = steps.results(0)

def check():
    assert torch.get_num_threads() == 2
    assert steps.equal(steps.results(0), expected)

def check_in_a_thread():
    done = []
    thread = threading.Thread(target=lambda: done.append(check()))
    thread.start()
    thread.join()
    assert done

def in_a_fork(body):
    child = os.fork()
    if not child:
        status = 1
        try:
            body()
            status = 0
        finally:
            os._exit(status)
    assert os.waitpid(child, 0)[1] == 0

def body():
    check()
    check_in_a_thread()
    in_a_fork(check)

in_a_fork(body)
check()
""")


def test_in_the_workers_of_a_data_loader():
    """Forked ones, with as many threads as the process has, and with the one that the loader gives them."""
    python("""
import multiprocessing, torch, steps

torch.set_num_threads(2)
expected = steps.results(0)

class Dataset(torch.utils.data.Dataset):
    def __len__(self):
        return 6
    def __getitem__(self, i):
        return steps.equal(steps.results(0), expected)

def two_threads(_):
    torch.set_num_threads(2)

if __name__ == "__main__":
    context = multiprocessing.get_context("fork")
    for init in (None, two_threads):
        loader = torch.utils.data.DataLoader(
            Dataset(), num_workers=2, multiprocessing_context=context, worker_init_fn=init
        )
        assert [bool(same) for same in loader] == [True] * 6
""")


def test_too_little_memory():
    """Scratch and outputs: a call says what it asked for, has written nothing and leaves the next ones whole.

    The large keys are one row, seen many times: what cannot be had is what the call itself asks for.
    """
    python("""
import re, resource, torch, fastgpt, steps

torch.set_num_threads(2)
MiB = 1 << 20
expected = steps.results(0)

def pages(field):
    with open("/proc/self/statm") as file:
        return int(file.read().split()[field]) * resource.getpagesize()

def many(tokens, heads=1):
    return torch.zeros(1, 1, 1, 256).expand(1, tokens, heads, 256)

q = torch.zeros(1, 20, 1, 256, requires_grad=True)
k = torch.zeros(1, 50_000, 1, 256, requires_grad=True)
out = fastgpt.attention(q, k, k, backend="cpu")
row = torch.zeros(1, 26_000_000, dtype=torch.bfloat16)
caches = [torch.zeros(1, 200_000, 1, 256, dtype=torch.int8) for _ in range(2)]
new, scale = torch.ones(1, 20, 1, 256), torch.ones(1)
state = torch.zeros(1, 1, 1, 64).expand(1, 2**22, 1, 64), torch.zeros(1, 1, 1).expand(1, 1, 2**22)

@torch.no_grad()
def prefill(cache, **options):
    fastgpt.attention_with_kvcache(new, *cache, cache_seqlens=190_000, backend="cpu", **options)

CALLS = {
    "forward": lambda: fastgpt.attention(q.detach(), many(200_000), many(200_000), backend="cpu"),
    "forward's output": lambda: fastgpt.attention(many(2_000_000), new, new, backend="cpu"),
    "backward": lambda: torch.autograd.grad(out, (q, k), new, retain_graph=True),
    "prefill": lambda: prefill([many(200_000)] * 2),
    "append": lambda: prefill(caches, k=new, v=new, k_descale=scale, v_descale=scale),
    "norm": lambda: fastgpt.layer_norm(row, backend="cpu"),
    "merge": lambda: fastgpt.merge_attention_states(*state, *state, backend="cpu"),
}
limit = pages(0) + 300 * MiB
resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
for turn in range(12):
    for name, call in CALLS.items():
        try:
            call()
        except MemoryError as error:
            asked = re.search(r"asked for (\\d+) MiB of scratch memory", str(error))
            assert asked and int(asked[1]) > 200, error
        except RuntimeError as error:
            assert "output" in name or name == "merge", (name, error)
            assert re.search(r"tried to allocate \\d{9,} bytes", str(error)), error
        else:
            raise AssertionError(name + " had the memory")
    assert not any(cache.any() for cache in caches)
    assert steps.equal(steps.results(0), expected)
    if turn == 2:
        before = [pages(field) for field in (0, 1)]
grown = [pages(field) - old for field, old in zip((0, 1), before)]
assert max(grown) < 4 * MiB, grown
""")


def test_nothing_leaks():
    """Calls that succeed, calls that raise, threads that come and go, each with scratch memory of its own."""
    python("""
import resource, threading, torch, fastgpt, steps

torch.set_num_threads(2)

def resident():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * resource.getpagesize()

def turn():
    steps.results(0)
    thread = threading.Thread(target=steps.results, args=(0,))
    thread.start()
    thread.join()
    q = torch.randn(1, 40, 2, 16)
    for call in (
        lambda: fastgpt.attention(q, q, q[:, :, :, :8], window_size=(-2, 0), backend="cpu"),
        lambda: fastgpt.attention(q.double(), q.double(), q.double(), backend="cpu"),
        lambda: fastgpt.attention_with_kvcache(q, q, q, q, q, cache_seqlens=1, backend="cpu"),
        lambda: fastgpt.layer_norm(q, torch.ones(17), backend="cpu"),
    ):
        try:
            call()
        except (ValueError, fastgpt.BackendUnsupported):
            continue
        raise AssertionError("accepted")

for _ in range(20):
    turn()
before = resident()
for _ in range(100):
    turn()
after = []
for _ in range(50):  # the allocator's own rise and fall is of the size of a small leak
    turn()
    after.append(resident())
grown = min(after) - before
assert grown < 2 << 20, f"{grown} bytes in 100 turns"
""")
