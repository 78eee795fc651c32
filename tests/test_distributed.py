"""Two processes with gloo on the CPU: DTensors, tensor parallelism, DDP and FSDP give what one process gives.

A check is a function that both processes run, with a mesh of the two, on the same random numbers. They are
started once and run each check when its test asks for it.
"""

from __future__ import annotations

import contextlib
import copy
import datetime
import functools
import io
import os
import tempfile
import threading
import traceback
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing
from backends import AVAILABLE
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.debug import CommDebugMode
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    SequenceParallel,
    parallelize_module,
)
from torch.nn.parallel import DistributedDataParallel

import fastgpt
from fastgpt import nn as fused
from fastgpt.integrations.tensor_parallel import FusedParallel
from fastgpt.ops import sharding

WORLD = 2
TIMEOUT = 60  # seconds, of a check
CHECKS: dict[str, Callable[[DeviceMesh], None]] = {}
BACKEND = "cpu" if "cpu" in AVAILABLE else "reference"


def check(function: Callable[[DeviceMesh], None]) -> Callable[[DeviceMesh], None]:
    CHECKS[function.__name__] = function
    return function


# The processes.


def work(rank: int, store: str, pipe: Any) -> None:
    """A process: runs the checks that come through the pipe; sends None, or the traceback of a failure."""
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(WORLD))  # what torchrun would say
    dist.init_process_group(
        "gloo",
        init_method=f"file://{store}",
        rank=rank,
        world_size=WORLD,
        timeout=datetime.timedelta(seconds=TIMEOUT / 2),
    )
    mesh = init_device_mesh("cpu", (WORLD,), mesh_dim_names=("tp",))
    while True:
        name, seed = pipe.recv()
        torch.manual_seed(seed)
        try:
            with contextlib.redirect_stdout(io.StringIO()):
                CHECKS[name](mesh)
        except BaseException:
            pipe.send(traceback.format_exc())
        else:
            pipe.send(None)


class Processes:
    def __init__(self, folder: Any) -> None:
        self.folder, self.started = folder, 0
        self.processes: list[Any] = []

    def start(self) -> None:
        context = torch.multiprocessing.get_context("spawn")
        self.started += 1
        store = str(self.folder / f"store{self.started}")
        self.pipes = []
        for rank in range(WORLD):
            here, there = context.Pipe()
            process = context.Process(target=work, args=(rank, store, there), daemon=True)
            process.start()
            there.close()  # so that recv() ends with the process
            self.pipes.append(here)
            self.processes.append(process)

    def stop(self) -> None:
        for process in self.processes:
            process.kill()
            process.join()
        self.processes.clear()

    def run(self, name: str, seed: int) -> None:
        if not self.processes:
            self.start()
        failures = []
        for pipe in self.pipes:
            pipe.send((name, seed))
        for rank, pipe in enumerate(self.pipes):
            try:
                failure = pipe.recv() if pipe.poll(TIMEOUT) else f"no answer in {TIMEOUT} s"
            except EOFError:
                failure = "the process ended"
            if failure is not None:
                failures.append(f"rank {rank}: {failure}")
        if failures:
            self.stop()  # one may wait for the other still: the next check has new ones
            pytest.fail("\n".join(failures), pytrace=False)


@pytest.fixture(scope="module")
def processes(tmp_path_factory):
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("OMP_NUM_THREADS", "1")
        environment.setenv("GLOO_SOCKET_IFNAME", "lo")
        pair = Processes(tmp_path_factory.mktemp("gloo"))
        yield pair
        pair.stop()


@check
def fails_in_one(mesh):
    if mesh.get_local_rank() == 1:
        raise RuntimeError("only here")


# DTensors.


def same(name: str, got: Any, expected: Any, exact: bool = True) -> None:
    got = got.full_tensor() if isinstance(got, DTensor) else got
    if exact:
        assert torch.equal(got, expected), f"{name}: {(got - expected).abs().max()}"
    else:
        torch.testing.assert_close(got, expected, msg=lambda text: f"{name}: {text}")


def spread(mesh: DeviceMesh, t: torch.Tensor | None, placement: Any) -> torch.Tensor | None:
    """As a leaf."""
    if t is None:
        return None
    return distribute_tensor(t, mesh, [placement]).requires_grad_(t.requires_grad)


def leaf(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, requires_grad=True)


def compare(
    mesh: DeviceMesh,
    function: Callable[..., Any],
    tensors: dict[str, torch.Tensor],
    placements: dict[str, Any],
    outputs: tuple[Any, ...],
    gradients: dict[str, Any] | None = None,
    communicates: bool = False,
    exact: bool = BACKEND == "cpu",
) -> None:
    """That function gives on DTensors what it gives on tensors, forward and backward, placed as expected.

    Args:
        placements: of the tensors; Replicate for the others.
        gradients: placements of those that are not placed like their tensors. Of a Partial, the sum is in
            another order.
        exact: the same bits.
    """
    gradients = {} if gradients is None else gradients
    whole = function(**tensors)
    parts = {name: spread(mesh, t, placements.get(name, Replicate())) for name, t in tensors.items()}
    with CommDebugMode() as comm:
        out = function(**parts)
    assert communicates or comm.get_total_counts() == 0, comm.get_comm_counts()
    for i, (got, expected) in enumerate(zip(out, whole, strict=True)):
        same(f"output {i}", got, expected, exact)
    if not communicates:
        assert tuple(t.placements[0] for t in out) == outputs
    douts = [torch.randn_like(t) for t in whole]
    names = [name for name, t in tensors.items() if t.requires_grad]
    expected = torch.autograd.grad(whole, [tensors[name] for name in names], douts)
    # As the next layer would give it.
    douts = [distribute_tensor(d, mesh, o.placements) for d, o in zip(douts, out, strict=True)]
    with CommDebugMode() as comm:
        got = torch.autograd.grad(out, [parts[name] for name in names], douts)
    assert communicates or comm.get_total_counts() == 0, comm.get_comm_counts()
    for name, a, b in zip(names, got, expected, strict=True):
        placement = gradients.get(name, placements.get(name, Replicate()))
        if not communicates:
            assert a.placements == (placement,), f"gradient of {name}: {a.placements}"
        same(f"gradient of {name}", a, b, exact and not communicates and not isinstance(placement, Partial))


def attend(**arguments: Any) -> Callable[..., Any]:
    return functools.partial(fastgpt.attention, return_lse=True, backend=BACKEND, **arguments)


def attention_inputs(**sizes: int) -> dict[str, torch.Tensor]:
    batch, nheads, nheads_k = (
        sizes.get(name, n) for name, n in (("batch", 4), ("nheads", 4), ("nheads_k", 2))
    )
    return {
        "q": leaf(batch, 9, nheads, 16),
        "k": leaf(batch, 13, nheads_k, 16),
        "v": leaf(batch, 13, nheads_k, 8),
    }


QKV = ("q", "k", "v")
BATCH, HEADS = dict.fromkeys(QKV, Shard(0)), dict.fromkeys(QKV, Shard(2))
BY_BATCH, BY_HEADS = (Shard(0), Shard(0)), (Shard(2), Shard(1))


@check
def attention_by_batch(mesh):
    compare(mesh, attend(window_size=(5, 0), softcap=4.0), attention_inputs(), BATCH, BY_BATCH)
    compare(mesh, attend(), attention_inputs(batch=3), BATCH, BY_BATCH)  # not as many on each rank
    tensors = attention_inputs()
    tensors |= {"sink": leaf(4), "attn_bias": leaf(1, 4, 9, 13), "alibi_slopes": torch.rand(4, 4)}
    partial = {"sink": Partial(), "attn_bias": Partial()}
    compare(mesh, attend(), tensors, BATCH | {"alibi_slopes": Shard(0)}, BY_BATCH, partial)
    tensors = attention_inputs() | {"attn_bias": leaf(4, 1, 1, 13), "alibi_slopes": torch.rand(4)}
    compare(mesh, attend(), tensors, BATCH | {"attn_bias": Shard(0)}, BY_BATCH)
    lengths = torch.tensor([[3, 13, 0, 9], [1, 0, 0, 4]], dtype=torch.int32)
    tensors = attention_inputs() | {"seqused_k": lengths[0], "leftpad_k": lengths[1]}
    places = BATCH | {"seqused_k": Shard(0), "leftpad_k": Shard(0)}
    compare(mesh, attend(), tensors, places, BY_BATCH)


@check
def attention_by_heads(mesh):
    compare(mesh, attend(window_size=(5, 0), softcap=4.0), attention_inputs(), HEADS, BY_HEADS)
    tensors = attention_inputs()
    tensors |= {"sink": leaf(4), "attn_bias": leaf(1, 4, 9, 13), "alibi_slopes": torch.rand(4, 4)}
    places = HEADS | {"sink": Shard(0), "attn_bias": Shard(1), "alibi_slopes": Shard(1)}
    compare(mesh, attend(), tensors, places, BY_HEADS)
    tensors = attention_inputs() | {"attn_bias": leaf(4, 1, 9, 13), "alibi_slopes": torch.rand(4)}
    places = HEADS | {"alibi_slopes": Shard(0)}
    compare(mesh, attend(), tensors, places, BY_HEADS, {"attn_bias": Partial()})
    tensors = attention_inputs() | {"seqused_k": torch.tensor([3, 13, 0, 9], dtype=torch.int32)}
    compare(mesh, attend(), tensors, HEADS, BY_HEADS)


@check
def attention_of_one_key_head_by_heads(mesh):
    tensors, partial = attention_inputs(nheads=3, nheads_k=1), {"k": Partial(), "v": Partial()}
    # Not the same bits: the kernels take a key head's query heads together.
    compare(mesh, attend(), tensors, {"q": Shard(2)}, BY_HEADS, partial, exact=False)


@check
def attention_redistributes(mesh):
    """What is not sharded alike, by tokens or by heads that the ranks do not divide is not taken for it."""
    run = functools.partial(compare, outputs=(), communicates=True)
    run(mesh, attend(), attention_inputs(), {"q": Shard(0), "k": Shard(2), "v": Shard(3)})
    run(mesh, attend(), attention_inputs(), dict.fromkeys(QKV, Shard(1)))
    run(mesh, attend(), attention_inputs(nheads=6, nheads_k=3), HEADS)
    run(mesh, attend(), attention_inputs(nheads=6, nheads_k=3), {"q": Shard(2)})
    half = DTensor.from_local(torch.ones(2, 3, 2, 8), mesh, [Partial()])
    same(
        "out of a sum",
        fastgpt.attention(half, half, half, backend=BACKEND),
        torch.full((2, 3, 2, 8), 2.0),
        exact=False,
    )


@check
def packed_attention_by_heads(mesh):
    edges = torch.tensor([0, 4, 4, 11], dtype=torch.int32)
    tensors = {"q": leaf(11, 4, 16), "k": leaf(11, 2, 16), "v": leaf(11, 2, 16), "sink": leaf(4)}
    tensors |= {"cu_seqlens_q": edges, "cu_seqlens_k": edges}
    function = functools.partial(fastgpt.attention_varlen, return_lse=True, backend=BACKEND)
    places = dict.fromkeys(QKV, Shard(1)) | {"sink": Shard(0)}
    compare(mesh, function, tensors, places, (Shard(1), Shard(0)))


@check
def dropout_of_dtensors(mesh):
    """Its bits count batch, heads and rows of the whole: a rank that has a part of these has others."""
    tensors = attention_inputs() | {"rng_state": torch.tensor([5, 6])}
    compare(mesh, attend(dropout_p=0.3), tensors, HEADS, (), communicates=True)
    compare(mesh, attend(dropout_p=0.3), tensors, BATCH, (), communicates=True)
    tensors = {"x": leaf(4, 5, 8), "rng_state": torch.tensor([5, 6])}
    drop = functools.partial(fastgpt.layer_norm, dropout_p=0.3, prenorm=True, backend=BACKEND)
    compare(mesh, drop, tensors, {"x": Shard(0)}, (), communicates=True)
    q = distribute_tensor(torch.randn(2, 3, 2, 8), mesh, [Shard(2)])
    for call in (fastgpt.attention, lambda x, *_, **p: fastgpt.rms_norm(x, **p)):
        with pytest.raises(ValueError, match="rng_state: got None with DTensors, expected a replicated"):
            call(q, q, q, dropout_p=0.1)


def norm_inputs() -> dict[str, torch.Tensor]:
    return {"x": leaf(4, 6, 8), "residual": leaf(4, 6, 8), "weight": leaf(8), "bias": leaf(8)}


@check
def norms_by_rows(mesh):
    for dim in (0, 1):
        places = {"x": Shard(dim), "residual": Shard(dim)}
        partial = {"weight": Partial(), "bias": Partial()}
        for norm in (fastgpt.rms_norm, fastgpt.layer_norm):
            function = functools.partial(norm, prenorm=True, backend=BACKEND)
            compare(mesh, function, norm_inputs(), places, (Shard(dim),) * 2, partial)
            plain = lambda **tensors: (norm(**tensors, backend=BACKEND),)  # noqa: B023, E731
            compare(mesh, plain, norm_inputs(), places, (Shard(dim),), partial)
            compare(mesh, plain, {"x": leaf(3, 3, 8)}, places, (Shard(dim),))
    places = {"x": Shard(0), "residual": Shard(1), "weight": Shard(0)}
    function = functools.partial(fastgpt.layer_norm, prenorm=True, backend=BACKEND)
    compare(mesh, function, norm_inputs(), places, (), communicates=True)
    compare(mesh, function, norm_inputs(), {"x": Shard(2)}, (), communicates=True)


@check
def booleans_that_say_which_outputs_there_are(mesh):
    """DTensor remembers the outputs of a call by its arguments: a call that differs in these has others."""
    for wanted in (False, True, False):
        tensors = attention_inputs() | {"attn_bias": leaf(1, 4, 9, 13).detach().requires_grad_(wanted)}
        compare(mesh, attend(), tensors, HEADS | {"attn_bias": Shard(1)}, BY_HEADS)
    x, residual, weight = (spread(mesh, torch.randn(*shape), Replicate()) for shape in ((4, 8), (4, 8), (8,)))
    for prenorm in (False, True):
        out = fastgpt.layer_norm(x, weight, residual=residual, prenorm=prenorm, backend=BACKEND)
    assert out[1].shape == x.shape and torch.equal(whole(out[1]), whole(x + residual))


@check
def rotary_by_batch_and_heads(mesh):
    cos, sin = torch.randn(2, 12, 4)

    def rotate(**tensors):
        return (fastgpt.rotary_embedding(**tensors, backend="reference"),)

    tensors = {"x": leaf(4, 6, 2, 10), "cos": cos, "sin": sin}
    compare(mesh, rotate, tensors, {"x": Shard(2)}, (Shard(2),))
    offsets = torch.tensor([0, 3, 6, 1], dtype=torch.int32)
    tensors |= {"seqlen_offsets": offsets}
    compare(mesh, rotate, tensors, {"x": Shard(0), "seqlen_offsets": Shard(0)}, (Shard(0),))
    compare(mesh, rotate, tensors, {"x": Shard(2)}, (Shard(2),))
    compare(mesh, rotate, tensors, {"x": Shard(1)}, (), communicates=True)
    edges = torch.tensor([0, 2, 9], dtype=torch.int32)
    tensors = {"x": leaf(9, 2, 8), "cos": cos, "sin": sin, "cu_seqlens": edges}
    compare(mesh, rotate, tensors, {"x": Shard(1)}, (Shard(1),))


@check
def merges_by_batch_heads_and_queries(mesh):
    function = functools.partial(fastgpt.merge_attention_states, backend=BACKEND)
    for batched, axes in ((True, ((0, 0), (1, 2), (2, 1))), (False, ((0, 1), (1, 0)))):
        out, lse = ((4, 6, 2, 8), (4, 2, 6)) if batched else ((6, 2, 8), (2, 6))
        for a, b in axes:
            tensors = {"out_a": leaf(*out), "lse_a": leaf(*lse), "out_b": leaf(*out), "lse_b": leaf(*lse)}
            places = {"out_a": Shard(a), "lse_a": Shard(b), "out_b": Shard(a), "lse_b": Shard(b)}
            compare(mesh, function, tensors, places, (Shard(a), Shard(b)))


@check
def caches_are_refused_as_dtensors(mesh):
    q, cache = torch.randn(2, 1, 2, 8), torch.randn(2, 9, 2, 8)
    parts = [distribute_tensor(t, mesh, [Shard(2)]) for t in (q, cache, cache)]
    with torch.no_grad(), pytest.raises(TypeError, match=r"k_cache: got DTensors, expected torch.Tensors"):
        fastgpt.attention_with_kvcache(*parts, cache_seqlens=3)


@check
def modules_in_sequence_parallel(mesh):
    """Norms whose tokens are spread over the ranks, by torch's own style."""
    for module in (fused.FusedLayerNorm(8), fused.FusedRMSNorm(8)):
        nn.init.normal_(module.weight)
        x, dout = leaf(2, 6, 8), torch.randn(2, 6, 8)
        expected = module(x)
        exact = torch.autograd.grad(expected, (x, *module.parameters()), dout)
        parallelize_module(module, mesh, SequenceParallel())
        part = spread(mesh, x, Shard(1))
        out = module(part)
        assert out.placements == (Shard(1),)
        same("out", out, expected)
        got = torch.autograd.grad(
            out, (part, *module.parameters()), distribute_tensor(dout, mesh, [Shard(1)])
        )
        for a, b in zip(got, exact, strict=True):
            same("gradient", a, b, exact=False)


def test_no_thread_is_ahead_of_the_registration(monkeypatch):
    """A second one found no rules where the first was about to register them."""
    begun, go_on, done = threading.Event(), threading.Event(), []

    def register():
        begun.set()
        go_on.wait(TIMEOUT)
        done.append("registered")

    def second():
        sharding.prepare()
        done.append("prepared")

    monkeypatch.setattr(sharding, "_registered", False)
    monkeypatch.setattr(sharding, "register", register)
    threads = [threading.Thread(target=sharding.prepare), threading.Thread(target=second)]
    threads[0].start()
    assert begun.wait(TIMEOUT)
    threads[1].start()
    threads[1].join(0.1)
    go_on.set()
    for thread in threads:
        thread.join()
    assert done == ["registered", "prepared"]


@pytest.fixture
def many_ranks():
    """Eight, none of which computes: what is placed where on a mesh of two dimensions."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=8)
    yield functools.partial(init_device_mesh, "cpu")
    dist.destroy_process_group()


def test_two_dimensions_of_a_mesh(many_ranks):
    """Batch along the one, heads or rows along the other; heads as long as the ranks divide them."""

    def placed(sizes: tuple[int, int], q: Any, nheads_k: int) -> tuple[Any, Any, int]:
        mesh = many_ranks(sizes)
        shapes = ((8, 3, 24, 8), (8, 3, nheads_k, 8), (8, 3, nheads_k, 8))
        parts = [distribute_tensor(torch.randn(*shape), mesh, q).requires_grad_() for shape in shapes]
        with CommDebugMode() as comm:
            out, lse = fastgpt.attention(*parts, return_lse=True, backend=BACKEND)
            torch.autograd.grad(out, parts, torch.ones_like(out))
        return out.placements, lse.placements, comm.get_total_counts()

    batch_heads, heads_batch = (Shard(0), Shard(2)), (Shard(2), Shard(0))
    assert placed((4, 2), batch_heads, 2) == (batch_heads, (Shard(0), Shard(1)), 0)
    assert placed((2, 4), batch_heads, 4) == (batch_heads, (Shard(0), Shard(1)), 0)
    assert placed((4, 2), heads_batch, 4) == (heads_batch, (Shard(1), Shard(0)), 0)
    assert placed((4, 2), (Shard(2), Shard(2)), 8) == ((Shard(2), Shard(2)), (Shard(1), Shard(1)), 0)
    out, _, moved = placed((4, 2), (Replicate(), Shard(2)), 6)  # which four ranks do not divide
    assert Shard(2) not in out and moved > 0
    mesh = many_ranks((4, 2))
    x = distribute_tensor(torch.randn(4, 6, 8), mesh, [Shard(0), Shard(1)]).requires_grad_()
    weight = distribute_tensor(torch.randn(8), mesh, [Replicate(), Replicate()]).requires_grad_()
    with CommDebugMode() as comm:
        out = fastgpt.layer_norm(x, weight, backend=BACKEND)
        dx, dweight = torch.autograd.grad(out, (x, weight), torch.ones_like(out))
    assert out.placements == dx.placements == (Shard(0), Shard(1)) and comm.get_total_counts() == 0
    assert dweight.placements == (Partial(), Partial())


def test_tensor_parallelism_is_of_one_dimension(many_ranks):
    module = fused.FusedCausalSelfAttention(32, 8)
    with pytest.raises(ValueError, match="device_mesh: got 2 dimensions, expected 1"):
        parallelize_module(module, many_ranks((2, 4)), FusedParallel())
    assert module(torch.randn(1, 5, 32)).shape == (1, 5, 32)  # as it was


def test_compiled_dtensors(many_ranks):
    def function(q, weight):
        return fastgpt.rms_norm(fastgpt.attention(q, q, q, backend=BACKEND), weight, backend=BACKEND)

    mesh = many_ranks((8,))
    q = DTensor.from_local(torch.randn(2, 6, 4, 8), mesh, [Shard(2)]).requires_grad_()
    weight = distribute_tensor(torch.randn(8), mesh, [Replicate()]).requires_grad_()
    dout = DTensor.from_local(torch.randn(2, 6, 4, 8), mesh, [Shard(2)])
    results = []
    for run in (function, torch.compile(function, backend="aot_eager", fullgraph=True)):
        out = run(q, weight)
        results.append((out, *torch.autograd.grad(out, (q, weight), dout)))
    for expected, got in zip(*results, strict=True):
        assert got.placements == expected.placements
        assert torch.equal(got.to_local(), expected.to_local())


# Models: what one process computes on the whole batch is what two compute, on halves of it or of the model.


def llama() -> nn.Module:
    from test_gpt import random_model  # and with it transformers, which takes seconds

    model = random_model("llama-gqa-tied").train()
    model.config.use_cache = False  # which checkpointing would fill twice
    return model


def gpt(mlp: str = "gelu", **changes: Any) -> fastgpt.GPT:
    config = fastgpt.GPTConfig(
        101, 32, hidden_size=32, num_layers=2, nheads=4, nheads_k=2, mlp=mlp, **changes
    )
    return shaken(fastgpt.GPT(config))


def gated_gpt() -> fastgpt.GPT:
    return gpt("swiglu", norm="rms_norm", positions="rope")


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.attention = fused.FusedLayerNorm(32), fused.FusedCausalSelfAttention(32, 4, 2)

    def forward(self, x: torch.Tensor, residual: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
        x, residual = self.norm(x, residual, prenorm=True)
        return self.attention(x), residual


class Small(nn.Module):
    """Of fastgpt.nn alone."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.norm = nn.Embedding(101, 32), fused.FusedRMSNorm(32)
        self.blocks = nn.ModuleList(Layer() for _ in range(2))

    def forward(self, batch: torch.Tensor) -> torch.Tensor:
        x, residual = self.embedding(batch), None
        for block in self.blocks:
            x, residual = block(x, residual)
        return self.norm(x, residual)


def small() -> nn.Module:
    return shaken(Small())


@torch.no_grad()
def shaken(module: nn.Module) -> Any:
    """Every parameter shows in the output."""
    for parameter in module.parameters():
        parameter.add_(torch.randn_like(parameter), alpha=0.1)
    return module


def logits_of(model: nn.Module, batch: torch.Tensor) -> torch.Tensor:
    out = model(batch)
    return out if isinstance(out, torch.Tensor) else out.logits


def tokens(batch: int = 4) -> torch.Tensor:
    return torch.randint(101, (batch, 11))


def train(model: nn.Module, batch: torch.Tensor) -> torch.Tensor:
    """One backward; the loss is the mean over the batch, as data parallelism has it."""
    loss = logits_of(model, batch).float().square().mean((1, 2)).mean()
    loss.backward()
    return loss.detach()


def whole(t: torch.Tensor) -> torch.Tensor:
    return t.full_tensor() if isinstance(t, DTensor) else t


def assert_same_gradients(model: nn.Module, expected: nn.Module) -> None:
    got = {name.replace("_checkpoint_wrapped_module.", ""): p for name, p in model.named_parameters()}
    for name, parameter in expected.named_parameters():
        grad = whole(got[name.removeprefix("module.")].grad)
        torch.testing.assert_close(grad, parameter.grad, rtol=1e-4, atol=1e-5, msg=lambda m: f"{name}: {m}")  # noqa: B023


def patched(model: nn.Module) -> nn.Module:
    return model if hasattr(model, "blocks") else fastgpt.patch(model)


@check
def tensor_parallel_by_transformers(mesh):
    """Its own way, from the plan in its config."""
    from transformers import AutoModelForCausalLM
    from transformers.distributed.configuration_utils import DistributedConfig

    expected, batch = llama(), tokens()
    with tempfile.TemporaryDirectory() as folder:
        paths = [folder]
        expected.save_pretrained(folder)
        dist.broadcast_object_list(paths)
        config = DistributedConfig(tp_size=WORLD)
        model = AutoModelForCausalLM.from_pretrained(paths[0], distributed_config=config).train()
        dist.barrier()  # before the folder is gone
    model.config.use_cache = False
    weight = model.model.layers[0].self_attn.k_proj.weight
    assert isinstance(weight, DTensor) and weight.to_local().shape[0] == weight.shape[0] // WORLD
    torch.testing.assert_close(train(fastgpt.patch(model), batch), train(fastgpt.patch(expected), batch))
    torch.testing.assert_close(logits_of(model, batch), logits_of(expected, batch), rtol=1e-4, atol=1e-4)
    assert_same_gradients(model, expected)


LLAMA_PLAN = {"colwise": ColwiseParallel, "rowwise": RowwiseParallel}


@check
def tensor_parallel_llama(mesh):
    """Query heads 4, key heads 2: a rank has 2 and 1. Patched before and after the model is sharded."""
    expected, batch = patched(llama()), tokens()
    plan = {name: LLAMA_PLAN[how]() for name, how in expected.config.base_model_tp_plan.items()}
    for patches_first in (True, False):
        model = copy.deepcopy(expected)
        if not patches_first:
            fastgpt.unpatch(model)
        parallelize_module(model.model, mesh, dict(plan))
        patched_model = model if patches_first else fastgpt.patch(model)
        expected.zero_grad()
        exact, got = train(expected, batch), train(patched_model, batch)
        torch.testing.assert_close(got, exact)
        torch.testing.assert_close(logits_of(model, batch), logits_of(expected, batch), rtol=1e-4, atol=1e-4)
        assert_same_gradients(model, expected)


@check
def tensor_parallel_gpt(mesh):
    style = FusedParallel()
    for make in (gpt, gated_gpt):
        expected, batch = make(), tokens()
        model = copy.deepcopy(expected)
        parallelize_module(model, mesh, {"blocks.*.attention": style, "blocks.*.mlp": style})
        torch.testing.assert_close(train(model, batch), train(expected, batch))
        torch.testing.assert_close(model(batch), expected(batch), rtol=1e-4, atol=1e-4)
        for ours, theirs in zip(model.blocks, expected.blocks, strict=True):
            for parts, projection in (
                (ours.attention.qkv, theirs.attention.qkv),
                (ours.mlp.up, theirs.mlp.up),
            ):
                for name, parameter in projection.named_parameters():
                    got = [getattr(part, name) for part in parts.parts]
                    assert all(t.placements == (Shard(0),) for t in got)
                    assert torch.equal(torch.cat([whole(t) for t in got]), parameter)
                    grads = torch.cat([whole(t.grad) for t in got])
                    torch.testing.assert_close(grads, parameter.grad, rtol=1e-4, atol=1e-5)
            for name in ("attention.out", "mlp.down", "attention_norm", "mlp_norm"):
                assert_same_gradients(ours.get_submodule(name), theirs.get_submodule(name))
    assert model.generate(batch, 3).tolist() == expected.generate(batch, 3).tolist()  # with a cache


@check
def tensor_parallel_attention(mesh):
    expected, x = shaken(fused.FusedCausalSelfAttention(32, 4, 2)), leaf(2, 7, 32)
    model = copy.deepcopy(expected)
    exact, dout = expected(x), torch.randn(2, 7, 32)
    (dx,) = torch.autograd.grad(exact, x, dout)
    out = parallelize_module(model, mesh, FusedParallel())(x)
    torch.testing.assert_close(out, exact)
    with CommDebugMode() as comm:
        (got,) = torch.autograd.grad(out, x, dout)
    torch.testing.assert_close(got, dx)
    assert comm.get_total_counts() == 1  # of dx, once for q, k and v
    colwise = copy.deepcopy(expected)
    parallelize_module(colwise, mesh, {"qkv_proj": ColwiseParallel(), "out_proj": RowwiseParallel()})
    with pytest.raises(ValueError, match=r"qkv_proj: gave 4 heads, expected 8.*FusedParallel"):
        colwise(x)
    with pytest.raises(ValueError, match="num_kv_heads: got 1, expected a multiple of the 2 ranks"):
        parallelize_module(fused.FusedCausalSelfAttention(32, 4, 1), mesh, FusedParallel())
    with pytest.raises(TypeError, match="module: got Linear, expected FusedCausalSelfAttention"):
        parallelize_module(nn.Linear(4, 4), mesh, FusedParallel())
    with pytest.raises(ValueError, match="module: got a FusedCausalSelfAttention that is sharded already"):
        parallelize_module(model, mesh, FusedParallel())
    torch.testing.assert_close(model(x), exact)  # as it was


MODELS = (gpt, gated_gpt, small, llama)


def layers_of(model: nn.Module) -> Any:
    return model.blocks if hasattr(model, "blocks") else model.model.layers


def sharded(model: nn.Module, mesh: DeviceMesh, checkpointed: bool = False, **options: Any) -> nn.Module:
    layers = layers_of(model)
    for i in range(len(layers)):
        if checkpointed:
            layers[i] = checkpoint_wrapper(layers[i])
        fully_shard(layers[i], mesh=mesh, **options)
    return fully_shard(model, mesh=mesh, **options)


def gradients_of_halves(model: nn.Module, batch: torch.Tensor) -> list[torch.Tensor]:
    """Their mean, in float32: what the ranks compute in the same precision, in one process."""
    sums = [torch.zeros_like(p, dtype=torch.float32) for p in model.parameters()]
    for half in batch.chunk(WORLD):
        model.zero_grad()
        train(model, half)
        for total, parameter in zip(sums, model.parameters(), strict=True):
            total += parameter.grad.float() / WORLD
    return sums


@check
def data_parallel(mesh):
    for make in MODELS:
        for patches_first in (True, False) if make is llama else (True,):
            model, batch = make(), tokens()
            expected = patched(copy.deepcopy(model))
            exact = train(expected, batch)
            model = patched(model) if patches_first else model
            wrapped = DistributedDataParallel(model)
            if not patches_first:
                patched(model)
            loss = train(wrapped, batch.chunk(WORLD)[mesh.get_local_rank()])
            dist.all_reduce(loss)
            torch.testing.assert_close(loss / WORLD, exact)
            assert_same_gradients(model, expected)


@check
def data_parallel_with_autocast_and_checkpointing(mesh):
    for make in MODELS:
        model, batch = patched(make()), tokens()
        with torch.autocast("cpu", torch.bfloat16):
            expected = gradients_of_halves(copy.deepcopy(model), batch)
            layers = layers_of(model)
            for i in range(len(layers)):
                layers[i] = checkpoint_wrapper(layers[i])
            train(DistributedDataParallel(model), batch.chunk(WORLD)[mesh.get_local_rank()])
        for parameter, exact in zip(model.parameters(), expected, strict=True):
            assert parameter.grad.dtype == torch.float32
            torch.testing.assert_close(parameter.grad, exact, rtol=1e-4, atol=1e-5)


@check
def fully_sharded(mesh):
    for make in MODELS:
        for patches_first in (True, False):
            model, batch = make(), tokens()
            expected = patched(copy.deepcopy(model))
            exact = train(expected, batch)
            model = patched(model) if patches_first else model
            sharded(model, mesh, checkpointed=patches_first)
            if make is llama and not patches_first:
                fastgpt.patch(model)
            loss = train(model, batch.chunk(WORLD)[mesh.get_local_rank()])
            assert all(isinstance(p, DTensor) for p in model.parameters())
            dist.all_reduce(loss)
            torch.testing.assert_close(loss / WORLD, exact)
            assert_same_gradients(model, expected)


@check
def fully_sharded_in_bfloat16(mesh):
    """Mixed precision: parameters in bfloat16 while a layer computes, their gradients summed in float32."""
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    for make in MODELS:
        model, batch = make(), tokens()
        expected = patched(copy.deepcopy(model))
        for parameter in expected.parameters():
            parameter.data = parameter.data.bfloat16()
        if getattr(expected, "rope", None) is not None:
            expected.rope = expected.rope.bfloat16()  # as what is passed to a layer
        sums = gradients_of_halves(expected, batch)
        sharded(patched(model), mesh, mp_policy=policy)
        train(model, batch.chunk(WORLD)[mesh.get_local_rank()])
        for parameter, exact in zip(model.parameters(), sums, strict=True):
            torch.testing.assert_close(whole(parameter.grad), exact, rtol=1e-4, atol=1e-5)


@check
def checkpointed_dropout_fully_sharded(mesh):
    """The bits that the forward has drawn, again."""
    torch.manual_seed(mesh.get_local_rank())
    model, batch = gpt(dropout=0.2), torch.randint(101, (2, 11))
    for parameter in model.parameters():
        dist.broadcast(parameter.data, 0)
    gradients = []
    for checkpointed in (False, True):
        copied = sharded(copy.deepcopy(model), mesh, checkpointed=checkpointed)
        torch.manual_seed(7 + mesh.get_local_rank())
        train(copied, batch)
        gradients.append([whole(p.grad) for p in copied.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


@pytest.mark.parametrize("name", [name for name in CHECKS if name != "fails_in_one"])
def test_two_processes(processes, name, request):
    processes.run(name, dict(request.node.user_properties)["FASTGPT_TEST_SEED"])


def test_a_failure_in_one_process_is_a_failure(processes):
    with pytest.raises(pytest.fail.Exception, match=r"(?s)^rank 1: .*only here"):
        processes.run("fails_in_one", 0)
