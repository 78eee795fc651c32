"""What is measured: one table of workloads per benchmark, at the end of this file.

A workload is data; :meth:`case` makes it concrete on a device. To measure one more size, add a line
to its table.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import functools
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import fastgpt
from fastgpt.bench import baselines
from fastgpt.bench.harness import GRADIENT_FACTOR, OUTPUT_FACTOR, Case, Row, Work
from fastgpt.dispatch import BackendUnsupported
from fastgpt.ops.few_rows import api as few_rows

Tensors = tuple[Any, ...]  # of tensors; the declared result of fastgpt.attention is wider, for return_lse
Function = Callable[..., Tensors]

SDPA = "F.scaled_dot_product_attention"
LONGEST_MATRIX = 4096  # of a baseline's (seqlen, seqlen) scores
ORACLE_ROWS = 256  # queries at a time, so that the float64 scores stay small
FP64 = 8  # bytes


def _compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    torch._dynamo.reset()  # a function is compiled for a few shapes only
    return torch.compile(function, dynamic=False)


def _with_ways(case: Case, device: str) -> Case:
    """On a GPU, of torch's ways those that this device, these shapes and its memory allow."""
    if device == "cpu":
        return case
    refused = {}
    for name, way in case.baselines.items():
        try:
            way()
            torch.cuda.synchronize()
        except Exception as error:  # refused, not compiled, out of memory
            refused[name] = f"{type(error).__name__}: {str(error)[:300]}"
    running = {name: way for name, way in case.baselines.items() if name not in refused}
    return dataclasses.replace(case, baselines=running, refused=refused)


def _randn(device: str, dtype: torch.dtype, *shape: int) -> Tensor:
    return torch.randn(*shape, device=device).to(dtype)


def _backward(function: Function, inputs: Tensors, douts: Tensors) -> Callable[[], Tensors]:
    """The backward of ``function`` alone: its graph is recorded here, once, and kept."""
    leaves = tuple(t.detach().requires_grad_() for t in inputs)
    outs = function(*leaves)
    return lambda: torch.autograd.grad(outs, leaves, douts, retain_graph=True)


def _differentiable_case(
    direction: str,
    inputs: dict[str, Tensor],
    outputs: tuple[str, ...],
    candidate: Callable[[str], Function],
    ways: dict[str, Function],
    oracle: Function,
) -> Case:
    """The forward of functions of the same inputs, or their backward for random gradients; ``candidate`` is
    that of a backend."""
    tensors = tuple(inputs.values())
    if direction == "forward":
        return Case(
            outputs,
            OUTPUT_FACTOR,
            lambda backend: functools.partial(candidate(backend), *tensors),
            {name: functools.partial(baseline, *tensors) for name, baseline in ways.items()},
            lambda: oracle(*(t.double() for t in tensors)),
        )
    with torch.no_grad():
        douts = tuple(torch.randn_like(out) for out in next(iter(ways.values()))(*tensors))

    def backward(way: Function) -> Callable[[], Tensors]:
        """Recorded at the first call, which may fail."""
        recorded = functools.cache(lambda: _backward(way, tensors, douts))
        return lambda: recorded()()

    def exact_gradients() -> Tensors:
        exact = tuple(t.double() for t in tensors)
        return _backward(oracle, exact, tuple(t.double() for t in douts))()

    return Case(
        tuple(f"d{name}" for name in inputs),
        GRADIENT_FACTOR,
        lambda backend: _backward(candidate(backend), tensors, douts),
        {name: backward(baseline) for name, baseline in ways.items()},
        exact_gradients,
    )


@dataclass(frozen=True)
class Attention:
    """Causal attention; ``window`` is window_size's left."""

    batch: int
    nheads: int
    seqlen: int
    headdim: int
    nheads_k: int | None = None
    window: int = -1

    directions = ("forward", "backward")

    @property
    def name(self) -> str:
        heads = f"{self.nheads}:{self.nheads_k}" if self.nheads_k else f"{self.nheads}"
        window = f" w{self.window}" if self.window >= 0 else ""
        return f"b{self.batch} h{heads} s{self.seqlen} d{self.headdim}{window}"

    def memory(self, dtype: torch.dtype) -> int:
        tensors = 12 * self.batch * self.seqlen * self.nheads * self.headdim
        scores = 8 * self.batch * self.nheads * ORACLE_ROWS * self._oracle_keys(self.seqlen)
        mask = self.seqlen**2 * (1 + dtype.itemsize) if self.window >= 0 else 0
        return FP64 * (tensors + scores) + mask

    def work(self, dtype: torch.dtype, direction: str) -> Work:
        """4 · headdim per visible pair (two products), 2.5 times that backward (five)."""
        seen = self.seqlen if self.window < 0 else min(self.window + 1, self.seqlen)
        pairs = seen * (seen + 1) // 2 + (self.seqlen - seen) * seen
        flop = 4.0 * self.headdim * pairs * self.nheads * self.batch
        return Work(flop if direction == "forward" else 2.5 * flop, "FLOP", "sgemm")

    def case(self, device: str, dtype: torch.dtype, direction: str) -> Case:
        lead = (device, dtype, self.batch, self.seqlen)
        inputs = {
            "q": _randn(*lead, self.nheads, self.headdim),
            "k": _randn(*lead, self.nheads_k or self.nheads, self.headdim),
            "v": _randn(*lead, self.nheads_k or self.nheads, self.headdim),
        }
        mask = baselines.window_mask(self.seqlen, self.window, device) if self.window >= 0 else None

        def candidate(backend: str) -> Function:
            return lambda q, k, v: (
                fastgpt.attention(q, k, v, window_size=(self.window, -1), backend=backend),
            )

        def baseline(q: Tensor, k: Tensor, v: Tensor) -> Tensors:
            return (baselines.attention(q, k, v, mask),)

        def repeated(q: Tensor, k: Tensor, v: Tensor) -> Tensors:
            return (baselines.attention_repeated(q, k, v, mask),)

        ways: dict[str, Function] = {SDPA: baseline}
        if self.nheads_k not in (None, self.nheads):
            ways[f"{SDPA}, k and v repeated"] = repeated
        if device == "cuda":
            ways |= self._ways_of_gpus(baseline)
        case = _differentiable_case(direction, inputs, ("out",), candidate, ways, self._oracle)
        return _with_ways(case, device)

    def _ways_of_gpus(self, baseline: Function) -> dict[str, Function]:
        ways = {f"{SDPA}, {name}": baselines.forced(baseline, key) for name, key in baselines.FORCED.items()}
        if self.seqlen > LONGEST_MATRIX:
            del ways[f"{SDPA}, math"]
        elif self.window < 0:
            compiled = _compiled(baselines.compiled_attention)
            ways["torch.compile"] = lambda *tensors: (compiled(*tensors),)
        flex = baselines.flex_attention(self.seqlen, self.window, "cuda")
        return ways | {"FlexAttention": lambda *tensors: (flex(*tensors),)}

    def _oracle_keys(self, end: int) -> int:
        """How many keys, up to ``end``, a block of queries that ends there can see."""
        return end if self.window < 0 else min(end, ORACLE_ROWS + self.window)

    def _oracle(self, q: Tensor, k: Tensor, v: Tensor) -> Tensors:
        """By blocks of queries: the mask is aligned to the last key, so a block only needs its own."""
        blocks: list[Any] = []
        for start in range(0, self.seqlen, ORACLE_ROWS):
            end = min(start + ORACLE_ROWS, self.seqlen)
            keys = slice(end - self._oracle_keys(end), end)
            blocks.append(
                fastgpt.attention(
                    q[:, start:end],
                    k[:, keys],
                    v[:, keys],
                    window_size=(self.window, -1),
                    backend="reference",
                )
            )
        return (torch.cat(blocks, dim=1),)


@dataclass(frozen=True)
class Decode:
    """One new query per sequence over a KV cache."""

    batch: int
    nheads: int
    nheads_k: int
    keys: int
    headdim: int

    directions = ("forward",)
    SPARE = 64  # capacity of the cache behind its keys; filled with NaN, which nobody may read

    @property
    def name(self) -> str:
        return f"b{self.batch} h{self.nheads}:{self.nheads_k} k{self.keys} d{self.headdim}"

    def memory(self, dtype: torch.dtype) -> int:
        oracle = FP64 * 6 * self.keys * self.nheads * self.headdim  # one sequence at a time
        return 2 * self._cache_bytes(dtype, self.keys + self.SPARE) + oracle

    def _cache_bytes(self, dtype: torch.dtype, keys: int) -> int:
        return 2 * self.batch * keys * self.nheads_k * self.headdim * dtype.itemsize

    def work(self, dtype: torch.dtype, direction: str) -> Work:
        return Work(self._cache_bytes(dtype, self.keys), "B", "read")

    def case(self, device: str, dtype: torch.dtype, direction: str) -> Case:
        q = _randn(device, dtype, self.batch, 1, self.nheads, self.headdim)
        shape = self.batch, self.keys + self.SPARE, self.nheads_k, self.headdim
        k_cache, v_cache = (_randn(device, dtype, *shape) for _ in range(2))
        for cache in (k_cache, v_cache):
            cache[:, self.keys :] = torch.nan
        k, v = (cache[:, : self.keys].transpose(1, 2).contiguous() for cache in (k_cache, v_cache))
        cache_seqlens = torch.full((self.batch,), self.keys, dtype=torch.int32, device=device)

        def candidate(backend: str) -> Callable[[], Tensors]:
            return lambda: (
                fastgpt.attention_with_kvcache(
                    q, k_cache, v_cache, cache_seqlens=cache_seqlens, backend=backend
                ),
            )

        def oracle() -> Tensors:
            outs: list[Any] = []
            for b in range(self.batch):
                tensors = q[b : b + 1], k_cache[b : b + 1, : self.keys], v_cache[b : b + 1, : self.keys]
                outs.append(fastgpt.attention(*(t.double() for t in tensors), backend="reference"))
            return (torch.cat(outs),)

        def grouped() -> Tensors:
            return (baselines.decode_grouped(q, k, v),)

        ways: dict[str, Callable[[], Tensors]] = {
            SDPA: lambda: (baselines.decode(q, k_cache, v_cache, self.keys),),
            f"{SDPA}, grouped": grouped,
        }
        if device == "cuda":
            for way, key in baselines.FORCED.items():
                ways[f"{SDPA}, grouped, {way}"] = baselines.forced(grouped, key)
            flex = baselines.flex_decode()
            ways["FlexAttention"] = lambda: (flex(q, k, v),)
        return _with_ways(Case(("out",), OUTPUT_FACTOR, candidate, ways, oracle), device)


@dataclass(frozen=True)
class Norm:
    """Layer norm or RMS norm of ``rows`` rows; with ``residual``, of x + residual, which is returned too."""

    kind: str  # layer_norm or rms_norm
    rows: int
    columns: int
    residual: bool = False
    directions: tuple[str, ...] = ("forward", "backward")

    EPS = 1e-5

    @property
    def name(self) -> str:
        return f"{self.kind}{'+add' if self.residual else ''} {self.rows}x{self.columns}"

    def memory(self, dtype: torch.dtype) -> int:
        return FP64 * 16 * self.rows * self.columns

    def work(self, dtype: torch.dtype, direction: str) -> Work:
        """The (rows, columns) matrices that have to be read or written, each once.

        Forward x and out, with a residual also it and the sum. Backward dout, x and dx, with a
        residual also the gradient of the sum; one dx serves both addends.
        """
        matrices = {"forward": 2, "backward": 3}[direction]
        if self.residual:
            matrices = 4
        return Work(float(matrices * self.rows * self.columns * dtype.itemsize), "B", "copy")

    def case(self, device: str, dtype: torch.dtype, direction: str) -> Case:
        inputs = {"x": _randn(device, dtype, self.rows, self.columns)}
        if self.residual:
            inputs["residual"] = _randn(device, dtype, self.rows, self.columns)
        inputs["weight"] = _randn(device, dtype, self.columns)
        if self.kind == "layer_norm":
            inputs["bias"] = _randn(device, dtype, self.columns)

        def fused(backend: str) -> Function:
            def function(*tensors: Tensor) -> Tensors:
                named = dict(zip(inputs, tensors, strict=True))
                norm = getattr(fastgpt, self.kind)
                out = norm(**named, eps=self.EPS, prenorm=self.residual, backend=backend)
                return out if self.residual else (out,)

            return function

        def baseline(*tensors: Tensor) -> Tensors:
            named = dict(zip(inputs, tensors, strict=True))
            x = named["x"] + named["residual"] if self.residual else named["x"]
            if self.kind == "layer_norm":
                out = baselines.layer_norm(x, named["weight"], named["bias"], self.EPS)
            else:
                out = baselines.rms_norm(x, named["weight"], self.EPS)
            return (out, x) if self.residual else (out,)

        outputs = ("out", "residual") if self.residual else ("out",)
        name = f"add, F.{self.kind}" if self.residual else f"F.{self.kind}"
        ways: dict[str, Function] = {name: baseline}
        if device == "cuda":
            ways["torch.compile"] = _compiled(baseline)
        case = _differentiable_case(direction, inputs, outputs, fused, ways, fused("reference"))
        return _with_ways(case, device)


@dataclass(frozen=True)
class Linear:
    """The products of a model's weights with ``rows`` rows, one after another: more than a cache holds."""

    model: str
    weights: tuple[tuple[int, int, int], ...]  # how many of (in_features, out_features)
    rows: int
    transposed: bool = False  # stored so, as GPT-2's are

    directions = ("forward",)

    @property
    def name(self) -> str:
        return f"{self.model}'s weights x{self.rows}"

    def _elements(self) -> int:
        return sum(count * rows * columns for count, rows, columns in self.weights)

    def memory(self, dtype: torch.dtype) -> int:
        return (dtype.itemsize + FP64) * self._elements()

    def work(self, dtype: torch.dtype, direction: str) -> Work:
        return Work(float(self._elements() * dtype.itemsize), "B", "read")

    def case(self, device: str, dtype: torch.dtype, direction: str) -> Case:
        sizes = [sizes for count, *sizes in self.weights for _ in range(count)]
        stored = sizes if self.transposed else [size[::-1] for size in sizes]
        operands = [
            (_randn(device, dtype, self.rows, in_features), _randn(device, dtype, *shape))
            for (in_features, _), shape in zip(sizes, stored, strict=True)
        ]

        def plain(x: Tensor, weight: Tensor) -> Tensor:
            return x @ weight if self.transposed else F.linear(x, weight)

        def of_all(product: Callable[..., Tensor]) -> Callable[[], Tensors]:
            @torch.no_grad()
            def run() -> Tensors:
                return (torch.cat([product(*pair).flatten() for pair in operands]),)

            return run

        def candidate(backend: str) -> Callable[[], Tensors]:
            def fused(x: Tensor, weight: Tensor) -> Tensor | None:
                return few_rows.linear(x, weight, None, self.transposed, backend)

            def fused_or_plain(x: Tensor, weight: Tensor) -> Tensor:
                out = fused(x, weight)
                return plain(x, weight) if out is None else out

            if all(fused(*pair) is None for pair in operands):
                raise BackendUnsupported(f"products of {self.rows} rows in {dtype} are left to torch")
            return of_all(fused_or_plain)

        return Case(
            ("out",),
            OUTPUT_FACTOR,
            candidate,
            {"x @ weight" if self.transposed else "F.linear": of_all(plain)},
            of_all(lambda x, weight: plain(x.double(), weight.double())),
        )


@dataclass(frozen=True)
class Model:
    """A randomly initialised :class:`fastgpt.GPT`, the same one on both sides.

    Prefill is one pass over a prompt, up to its last token's logits; decode is one step behind it.
    Attention and norms run on fastgpt's kernels or on torch's; all the rest is the same code.
    """

    name: str
    shape: dict[str, Any]  # the fields of fastgpt.GPTConfig
    batch: int
    prompt: int

    directions = ("prefill", "decode")

    def _model(self) -> Any:
        return fastgpt.GPT(fastgpt.GPTConfig(**self.shape)).requires_grad_(False).eval()

    def memory(self, dtype: torch.dtype) -> int:
        with torch.device("meta"):
            parameters = sum(p.numel() for p in self._model().parameters())
        return 2 * FP64 * parameters

    def work(self, dtype: torch.dtype, direction: str) -> Work:
        tokens = self.batch * (self.prompt if direction == "prefill" else 1)
        return Work(float(tokens), "token", None)

    def case(self, device: str, dtype: torch.dtype, direction: str) -> Case:
        model = self._model().to(device, dtype)
        prompt = torch.randint(model.config.vocab_size, (self.batch, self.prompt), device=device)
        token = prompt[:, :1]

        def prefill(model: Any, backend: str) -> Callable[[], Tensors]:
            return lambda: (model(prompt, last_only=True, backend=backend),)

        def decode(model: Any, backend: str) -> Callable[[], Tensors]:
            cache = model.new_cache(self.batch, self.prompt + 1)
            model(prompt, cache=cache, last_only=True, backend=backend)

            def step() -> Tensors:
                cache.truncate(self.prompt)
                return (model(token, cache=cache, backend=backend),)

            return step

        of = {"prefill": prefill, "decode": decode}[direction]
        return Case(
            ("logits",),
            OUTPUT_FACTOR,
            functools.partial(of, model),
            {"the same GPT by torch": of(model, "torch")},
            lambda: of(copy.deepcopy(model).double(), "reference")(),
        )


@dataclass(frozen=True)
class Patched:
    """A model of transformers with random weights, as it is and after :func:`fastgpt.patch`.

    Prefill is a prompt of ``context`` tokens, up to its last one's logits. Generate is generate() of
    NEW_TOKENS with a cache of such a prompt, the tokens being given, so that all have the same; the cache is
    cropped to it before, for which a patched model copies it once. Train is the loss and the gradients of one
    sequence of TRAINED tokens, without dropout and without the optimizer's step.
    """

    name: str
    architecture: str  # transformers' model_type
    shape: dict[str, Any]  # fields of its config
    context: int = 1024

    directions = ("prefill", "generate", "train")
    NEW_TOKENS = 64
    TRAINED = 512

    def _model(self) -> Any:
        try:
            import transformers
        except ImportError as error:
            raise BackendUnsupported(
                f'needs transformers: pip install "fastgpt-kernels[transformers]" ({error})'
            ) from error
        config = transformers.AutoConfig.for_model(self.architecture, **self.shape)
        return transformers.AutoModelForCausalLM.from_config(config).eval()

    def memory(self, dtype: torch.dtype) -> int:
        with torch.device("meta"):
            parameters = sum(p.numel() for p in self._model().parameters())
        return 4 * FP64 * parameters  # with gradients, and what is between them

    def work(self, dtype: torch.dtype, direction: str) -> Work:
        tokens = {"prefill": self.context, "generate": self.NEW_TOKENS, "train": self.TRAINED}[direction]
        return Work(float(tokens), "token", None)

    def case(self, device: str, dtype: torch.dtype, direction: str) -> Case:
        stock = self._model().to(device, dtype)
        vocab_size = stock.config.vocab_size
        of = {"prefill": self._prefill, "generate": self._generate, "train": self._train}[direction]
        ids = torch.randint(
            vocab_size, (1, self.TRAINED if direction == "train" else self.context), device=device
        )

        def patched(backend: str) -> Any:
            model = copy.deepcopy(stock, {id(p): p for p in stock.parameters()})  # on the same weights
            with contextlib.redirect_stdout(None):
                return fastgpt.patch(model, backend=backend)

        return Case(
            ("logits", "gradients") if direction == "train" else ("logits",),
            GRADIENT_FACTOR if direction == "train" else OUTPUT_FACTOR,
            lambda backend: of(patched(backend), ids),
            {"transformers": of(stock, ids)},
            lambda: of(copy.deepcopy(stock).double(), ids)(),
            memory=direction != "generate",  # most of which is the cache, there before the call
        )

    def _prefill(self, model: Any, ids: Tensor) -> Callable[[], Tensors]:
        @torch.no_grad()
        def run() -> Tensors:
            return (model(ids, logits_to_keep=1).logits,)

        return run

    def _generate(self, model: Any, ids: Tensor) -> Callable[[], Tensors]:
        from transformers import DynamicCache

        cache = DynamicCache(config=model.config)
        with torch.no_grad():
            model(ids[:, :-1], past_key_values=cache, logits_to_keep=1)
        model.generation_config.eos_token_id = None  # as many tokens by all
        mask, begun = torch.ones_like(ids), ids.shape[1] - 1

        def given(so_far: Tensor, scores: Tensor) -> Tensor:
            token = ids[0, so_far.shape[1] % ids.shape[1]]
            return torch.full_like(scores, -torch.inf).index_fill_(1, token[None], 0.0)

        def run() -> Tensors:
            if cache.get_seq_length() > begun:
                cache.crop(begun - cache.get_seq_length())
            out = model.generate(
                ids,
                attention_mask=mask,
                past_key_values=cache,
                max_new_tokens=self.NEW_TOKENS,
                do_sample=False,
                logits_processor=[given],
                return_dict_in_generate=True,
                output_logits=True,
            )
            return (torch.stack(out.logits),)

        return run

    def _train(self, model: Any, ids: Tensor) -> Callable[[], Tensors]:
        parameters = dict(model.named_parameters())

        def run() -> Tensors:
            out = model(ids, labels=ids, use_cache=False)
            gradients = torch.autograd.grad(out.loss, list(parameters.values()))
            named = zip(parameters, gradients, strict=True)
            through_all_blocks = [gradient.flatten() for name, gradient in named if ".0." in name]
            return out.logits[:, -1].detach(), torch.cat(through_all_blocks)

        return run


@dataclass(frozen=True)
class Launch:
    """The host's time for a call so small that the GPU has next to nothing to do."""

    op: str  # attention, decode or rms_norm

    directions = ("host",)

    @property
    def name(self) -> str:
        return self.op

    def _small(self) -> Attention | Decode | Norm:
        if self.op == "attention":
            return Attention(1, 8, 128, 64)
        return Decode(1, 8, 2, 128, 64) if self.op == "decode" else Norm("rms_norm", 64, 1024)

    def memory(self, dtype: torch.dtype) -> int:
        return self._small().memory(dtype)

    def work(self, dtype: torch.dtype, direction: str) -> Work:
        return Work(1.0, "call", None)

    def case(self, device: str, dtype: torch.dtype, direction: str) -> Case:
        case = self._small().case(device, dtype, "forward")
        return dataclasses.replace(case, timed={"an empty Triton launch": baselines.empty_launch()})


SMOLLM2 = ((60, 576, 576), (60, 576, 192), (60, 576, 1536), (30, 1536, 576), (1, 576, 49152))
GPT2 = ((12, 768, 2304), (12, 768, 768), (12, 768, 3072), (12, 3072, 768))

TABLES: dict[str, tuple[Attention | Decode | Linear | Norm | Model | Patched, ...]] = {
    "attention": (
        Attention(1, 12, 256, 64),
        Attention(1, 12, 16, 64),
        Attention(1, 12, 64, 64),
        Attention(1, 12, 1024, 64),  # GPT-2's
        Attention(1, 9, 1024, 64, nheads_k=3),  # SmolLM2-135M's
        Attention(1, 12, 4096, 64),
        Attention(1, 8, 2048, 128),
        Attention(1, 12, 1024, 80),
        Attention(1, 8, 1024, 96),
        Attention(1, 4, 1024, 256),
        Attention(1, 32, 1024, 128, nheads_k=8),
        Attention(1, 4, 8192, 64, window=256),
    ),
    "decode": (
        Decode(1, 32, 32, 1024, 128),
        Decode(1, 32, 32, 8192, 128),
        Decode(1, 32, 8, 1024, 128),
        Decode(1, 32, 8, 8192, 128),
        Decode(8, 32, 32, 8192, 128),
        Decode(8, 32, 8, 8192, 128),
    ),
    "linear": (
        Linear("SmolLM2-135M", SMOLLM2, 1),
        Linear("SmolLM2-135M", SMOLLM2, 2),
        Linear("SmolLM2-135M", SMOLLM2, 4),
        Linear("SmolLM2-135M", SMOLLM2, 6),
        Linear("SmolLM2-135M", SMOLLM2, 8),
        Linear("GPT-2 124M", GPT2, 1, transposed=True),
        Linear("GPT-2 124M", GPT2, 4, transposed=True),
        Linear("GPT-2 124M", GPT2, 6, transposed=True),
    ),
    "norm": (
        Norm("layer_norm", 8192, 768),
        Norm("layer_norm", 8192, 768, residual=True),
        Norm("layer_norm", 2048, 4096),
        Norm("rms_norm", 8192, 768),
        Norm("rms_norm", 2048, 4096),
        Norm("rms_norm", 2048, 4096, residual=True),
        Norm("rms_norm", 1, 576, directions=("forward",)),  # a step of decoding
        Norm("rms_norm", 1, 576, residual=True, directions=("forward",)),
    ),
    "model": (
        Model(
            "GPT 4x256 b1 s256",
            {"vocab_size": 4096, "hidden_size": 256, "num_layers": 4, "nheads": 4},
            batch=1,
            prompt=256,
        ),
        Patched(
            "SmolLM2-135M",
            "llama",
            {
                "vocab_size": 49152,
                "hidden_size": 576,
                "intermediate_size": 1536,
                "num_hidden_layers": 30,
                "num_attention_heads": 9,
                "num_key_value_heads": 3,
                "max_position_embeddings": 8192,
                "tie_word_embeddings": True,
            },
        ),
        Patched(
            "GPT-2 124M",
            "gpt2",
            {"n_positions": 2048, "attn_pdrop": 0.0, "embd_pdrop": 0.0, "resid_pdrop": 0.0},
        ),
    ),
}

# The most telling first: a run may be cut short, and goes on there.
GPU_TABLES: dict[str, tuple[Attention | Decode | Norm | Model | Launch, ...]] = {
    "attention": (
        Attention(1, 16, 16384, 128),
        Attention(1, 32, 16384, 64),
        Attention(1, 8, 16384, 256),
        Attention(4, 16, 4096, 128),
        Attention(2, 32, 8192, 128, nheads_k=8),
        Attention(8, 16, 2048, 128),
        Attention(1, 16, 16384, 128, window=1024),
        Attention(2, 16, 8192, 128),
        Attention(16, 12, 1024, 64),
        Attention(2, 16, 8192, 80),
    ),
    "decode": (
        Decode(1, 32, 8, 65536, 128),
        Decode(64, 32, 8, 4096, 128),
        Decode(8, 32, 8, 16384, 128),
        Decode(1, 32, 8, 4096, 128),
        Decode(64, 32, 8, 65536, 128),
        Decode(16, 32, 8, 65536, 128),
        Decode(8, 32, 32, 8192, 128),
        Decode(16, 12, 12, 4096, 64),
    ),
    "norm": (
        Norm("layer_norm", 65536, 4096),
        Norm("rms_norm", 65536, 4096),
        Norm("rms_norm", 65536, 4096, residual=True),
        Norm("layer_norm", 8192, 768),
        Norm("layer_norm", 65536, 768),
        Norm("rms_norm", 8192, 4096),
        Norm("layer_norm", 8192, 8192),
        Norm("rms_norm", 8192, 8192, residual=True),
        Norm("layer_norm", 65536, 2048, residual=True),
        Norm("rms_norm", 8192, 2048),
    ),
    "model": (Model("GPT-2 124M b8 s512", {}, batch=8, prompt=512),),
    "launch": (Launch("rms_norm"), Launch("attention"), Launch("decode")),
}

GPU_DTYPES = dict.fromkeys(GPU_TABLES, ("bf16",))

DEFAULT_DTYPES = {
    "attention": ("fp32", "bf16", "fp16"),
    "decode": ("fp32", "bf16"),
    "linear": ("fp32", "bf16"),
    "norm": ("fp32", "bf16"),
    "model": ("fp32", "bf16"),
}

QUICK = {  # how many workloads of a table, from its head, a quick run takes
    "attention": 1,
    "decode": 1,
    "linear": 1,
    "norm": 2,
    "model": 1,
    "launch": 1,
}


def plan(benches: Iterable[str], dtypes: Sequence[str] | None, quick: bool, device: str = "cpu") -> list[Row]:
    """The rows of a run; ``dtypes`` None takes each benchmark's own. On a GPU, tables' heads come first."""
    tables, own = (GPU_TABLES, GPU_DTYPES) if device == "cuda" else (TABLES, DEFAULT_DTYPES)
    ranked = [
        (rank, Row(bench, workload, dtype, direction))
        for bench in benches
        for rank, workload in enumerate(tables[bench][: QUICK[bench] if quick else None])
        for direction in workload.directions
        for dtype in dtypes or own[bench]
    ]
    if device == "cuda":
        ranked.sort(key=lambda ranked_row: ranked_row[0])
    return [row for _, row in ranked]
