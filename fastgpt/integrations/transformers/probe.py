"""Which of a model's modules are attentions, MLPs and blocks that can be computed in one go (``block.py``):
known by what they make of some numbers, of their inputs, and what they hand to the cache and to attention.
"""

from __future__ import annotations

import copy
import functools
import inspect
from collections import OrderedDict
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastgpt.integrations.transformers.attention import PROBE
from fastgpt.integrations.transformers.linear import is_transposed
from fastgpt.integrations.transformers.norms import Norm, norm_of
from fastgpt.ops.native import MAX_HEADDIM

# What the children are called: Llama's, and those of all that follow it; Phi-3's; GPT-2's.
ATTENTIONS = ((("q_proj", "k_proj", "v_proj"), "o_proj"), (("qkv_proj",), "o_proj"), (("c_attn",), "c_proj"))
HEAD_NORMS = ("q_norm", "k_norm")
MLPS = ((("gate_proj", "up_proj"), "down_proj"), (("gate_up_proj",), "down_proj"), (("c_fc",), "c_proj"))
# Of both halves: the norm before, the half itself, the norm after: Llama's, GPT-2's, Gemma 2's, OLMo 2's.
BLOCKS = (
    (("input_layernorm", "self_attn", None), ("post_attention_layernorm", "mlp", None)),
    (("ln_1", "attn", None), ("ln_2", "mlp", None)),
    (
        ("input_layernorm", "self_attn", "post_attention_layernorm"),
        ("pre_feedforward_layernorm", "mlp", "post_feedforward_layernorm"),
    ),
    ((None, "self_attn", "post_attention_layernorm"), (None, "mlp", "post_feedforward_layernorm")),
)
# To attention, which gets what the model was called with.
WITHOUT_MEANING = frozenset(
    {"position_ids", "use_cache", "cache_position", "output_hidden_states", "return_dict"}
)
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "gelu_tanh": functools.partial(F.gelu, approximate="tanh"),
}
BATCH, SEQLEN, HIDDEN = 2, 3, 16  # of what modules are tried with
SCALES = (1.0, 1e4)  # of its numbers: some modules clip large ones
# Of every module, or put there by who wraps it.
NOT_ITS_OWN = frozenset(vars(nn.Module())) | {"forward", "_old_forward", "_hf_hook", "_is_hf_initialized"}
Attributes = tuple[tuple[str, Any], ...]  # a module's own numbers, strings and the like


class Layers(NamedTuple):
    """The linear layers of a module, by their names: those that lead in, and the one that leads out."""

    into: tuple[str, ...]
    out: str
    kind: type[nn.Module]
    transposed: bool


class NormChild(NamedTuple):
    """A norm among a module's children."""

    name: str
    kind: type[nn.Module]
    attributes: Attributes
    norm: Norm


class Attention(NamedTuple):
    """How a module computes an attention that :class:`fastgpt.ops.few_rows.spec.Attention` has."""

    parameters: tuple[str, ...]  # of its forward
    attributes: Attributes
    implementation: str  # the attention that its config asks for
    layers: Layers
    headdim: int
    head_norms: tuple[NormChild | None, NormChild | None]  # of q and of k
    heads_together: bool
    dropouts: tuple[str, ...]
    rotary: bool
    scaling: float
    window: int  # how many keys a query sees, its own among them; 0 for all
    softcap: float


class Mlp(NamedTuple):
    """How a module computes an MLP that :class:`fastgpt.ops.few_rows.spec.Mlp` has."""

    attributes: Attributes
    layers: Layers
    gated: bool
    activation: str
    activation_child: tuple[str, type[nn.Module], Attributes]
    dropouts: tuple[str, ...]


class Half(NamedTuple):
    """Of a block: ``x + after(half(before(x)))``, the norms may be none."""

    before: NormChild | None
    name: str
    kind: type[nn.Module]
    after: NormChild | None

    def norms(self) -> tuple[NormChild, ...]:
        return tuple(norm for norm in (self.before, self.after) if norm is not None)


class Block(NamedTuple):
    """How a module computes its attention's half, and of that its MLP's."""

    parameters: tuple[str, ...]  # of its forward
    attributes: Attributes
    first: Half
    attention: Attention
    second: Half
    mlp: Mlp
    dropouts: tuple[str, ...]

    def names(self) -> tuple[str, ...]:
        """Of all its children but the dropouts."""
        norms = (norm.name for half in (self.first, self.second) for norm in half.norms())
        return (self.first.name, self.second.name, *norms)


class Recorder:
    """A cache, and with :func:`attention.record` an attention, that keep what a module hands to them."""

    def __init__(self, out: Tensor) -> None:
        self.out = out  # of attention
        self.cached: Any = None
        self.attended: Any = None

    def update(self, keys: Tensor, values: Tensor, layer: int, *args: Any, **kwargs: Any) -> Any:
        self.cached = keys, values, layer
        return keys, values


class Given(nn.Module):
    """A module that keeps what it is called with, and returns what it is told to."""

    def __init__(self, out: Any) -> None:
        super().__init__()
        self.out = out

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        self.rest = kwargs
        self.x = args[0] if args else kwargs.pop("hidden_states", None)
        self.several = len(args) > 1
        return self.out


def _numbers(*shape: int, phase: float) -> Tensor:
    """Not random ones, which the user would miss."""
    count = torch.Size(shape).numel()
    return (torch.arange(count, dtype=torch.float32, device="cpu") * 0.7 + phase).sin().view(shape)


def _same(got: Any, expected: Tensor) -> bool:
    if not isinstance(got, Tensor) or got.shape != expected.shape or not bool(expected.isfinite().all()):
        return False
    return bool((got - expected).abs().max() <= 1e-4 * expected.abs().max())


def _attributes(module: nn.Module) -> Attributes:
    """What it may compute with: its numbers, strings, tuples of them and functions."""
    plain = (int, float, str, type(None), tuple)
    own = {name: value for name, value in vars(module).items() if name not in NOT_ITS_OWN}
    return tuple((n, v) for n, v in own.items() if isinstance(v, plain) or _is_function(v))


def _is_function(value: object) -> bool:
    return callable(value) and not isinstance(value, (nn.Module, type))


def has_tensors(module: nn.Module) -> bool:
    """Whether it has some beside those of its children: whatever they are now, they may be others later."""
    own = vars(module)
    values = (*module._parameters.values(), *module._buffers.values(), *own.values())
    return any(isinstance(value, Tensor) for value in values)


def is_replaced(module: nn.Module) -> bool:
    """Whether somebody has given the instance another forward (accelerate keeps what it was)."""
    own = vars(module).get("_old_forward", vars(module).get("forward"))
    return own is not None and getattr(own, "__func__", None) is not type(module).forward


def _parameters(module: nn.Module) -> tuple[str, ...]:
    return tuple(inspect.signature(type(module).forward).parameters)[1:]


def _bare(module: nn.Module, **parameters: Tensor | None) -> Any:
    """A copy without hooks and without a forward of its instance, with parameters of its own."""
    bare = copy.copy(module)
    vars(bare).pop("forward", None)
    vars(bare).update(_forward_hooks=OrderedDict(), _forward_pre_hooks=OrderedDict())
    bare._parameters = {n: None if p is None else nn.Parameter(p) for n, p in parameters.items()}
    return bare


def _small_norm(module: nn.Module, size: int, phase: float) -> Any:
    bare = _bare(module, **dict.fromkeys(module._parameters, 1 + _numbers(size, phase=phase) / 2))
    if type(module) is nn.LayerNorm:
        bare.normalized_shape = (size,)
    return bare


def _probe(module: nn.Module, children: dict[str, nn.Module], dropouts: tuple[str, ...]) -> Any:
    """A copy with other children, not in training."""
    probe: Any = copy.copy(module)
    probe._modules = children | {name: nn.Identity() for name in dropouts}
    probe.training = False
    return probe


def _sizes(module: Any, transposed: bool) -> tuple[int, int]:
    """Of outputs and inputs."""
    rows, columns = module.weight.shape
    return (columns, rows) if transposed else (rows, columns)


def _layers(module: nn.Module, known: tuple[tuple[tuple[str, ...], str], ...]) -> Layers | None:
    for into, out in known:
        found = [module._modules.get(name) for name in (*into, out)]
        kinds = {type(layer) for layer in found}
        if len(kinds) != 1 or any(layer is None or "bias" not in layer._parameters for layer in found):
            continue
        weights = [layer._parameters.get("weight") for layer in found]  # type: ignore[union-attr]
        if any(weight is None or weight.dim() != 2 for weight in weights):
            return None  # it is computed, or a placeholder
        transposed = is_transposed(found[0])  # type: ignore[arg-type]
        if transposed or kinds == {nn.Linear}:
            return Layers(into, out, type(found[0]), transposed)  # type: ignore[arg-type]  # none is None
    return None


def _small_layers(module: nn.Module, layers: Layers) -> dict[str, Any]:
    """The same with small numbers, in HIDDEN and out of HIDDEN."""
    small = {}
    for i, name in enumerate((*layers.into, layers.out)):
        layer: Any = module._modules[name]
        outputs, inputs = _sizes(layer, layers.transposed)
        outputs, inputs = (HIDDEN, inputs) if name == layers.out else (outputs, HIDDEN)
        weight = _numbers(outputs, inputs, phase=1.0 + i) / inputs**0.5
        bias = None if layer.bias is None else _numbers(outputs, phase=1.5 + i)
        small[name] = _bare(layer, weight=weight.t().contiguous() if layers.transposed else weight, bias=bias)
        if layers.transposed:
            small[name].nf = outputs
    return small


def _dropouts(module: nn.Module, *others: str) -> tuple[str, ...] | None:
    """The children beside others, if these are dropout and nothing else."""
    rest = {n: child for n, child in module._modules.items() if n not in others and child is not None}
    return tuple(rest) if all(type(child) is nn.Dropout for child in rest.values()) else None


def _norm_child(module: nn.Module, name: str | None) -> NormChild | None:
    if name is None or (child := module._modules.get(name)) is None or (norm := norm_of(child)) is None:
        return None
    return NormChild(name, type(child), _attributes(child), norm)


@torch.no_grad()
def attention_of(module: Any) -> Attention | None:
    """What a module computes, if it is a causal attention over a cache, as Attention says."""
    layers, headdim = _layers(module, ATTENTIONS), getattr(module, "head_dim", None)
    causal, config = getattr(module, "is_causal", False), getattr(module, "config", None)
    if layers is None or not isinstance(headdim, int) or causal is not True or config is None:
        return None
    if has_tensors(module) or not 0 < headdim <= MAX_HEADDIM:
        return None
    heads = _sizes(module._modules[layers.out], layers.transposed)[1] // headdim
    columns = sum(_sizes(module._modules[name], layers.transposed)[0] for name in layers.into)
    heads_k = (columns // headdim - heads) // 2
    present = [name for name in HEAD_NORMS if module._modules.get(name) is not None]
    norms = [_norm_child(module, name) for name in present]
    dropouts = _dropouts(module, *layers.into, layers.out, *present)
    if dropouts is None or len(norms) == 1 or heads < 1 or heads_k < 1 or heads % heads_k:
        return None
    if any(norm is None or not norm.norm.rms for norm in norms):
        return None
    sizes = [len(module._modules[name].weight) for name in present]
    together = sizes == [heads * headdim, heads_k * headdim] and heads > 1  # OLMo 2's
    if present and not together and sizes != [headdim, headdim]:
        return None

    parameters = _parameters(module)
    small = _small_layers(module, layers)
    weights = {
        n: _small_norm(module._modules[n], k, 6.0 + i)
        for i, (n, k) in enumerate(zip(present, sizes, strict=True))
    }
    probe = _probe(module, small | weights, dropouts)
    probe.config = copy.copy(config)
    probe.config._attn_implementation_internal = PROBE
    rotary = "position_embeddings" in parameters
    if rotary and headdim % 2:
        return None
    cos, sin = (_numbers(BATCH, SEQLEN, headdim, phase=phase) for phase in (0.2, 0.3))
    named: dict[str, Any] = {"position_embeddings": (cos, sin)} if rotary else {}
    cache = "cache" if "cache" in parameters else "past_key_values"
    for scale in SCALES:
        x = scale * _numbers(BATCH, SEQLEN, HIDDEN, phase=0.1)
        recorder = Recorder(scale * _numbers(BATCH, SEQLEN, heads, headdim, phase=0.4))
        probe._fastgpt_recorder = recorder
        try:
            out, _ = type(module).forward(probe, x, attention_mask=None, **{cache: recorder}, **named)
            q, k, v, asked = recorder.attended
            cached_k, cached_v, layer = recorder.cached
        except Exception:  # it computes with more than that
            return None
        qkv = torch.cat([_project(x, small[name], layers) for name in layers.into], -1)
        parts = qkv.split([n * headdim for n in (heads, heads_k, heads_k)], -1)
        expected = []
        for i, part in enumerate(parts):
            norm = weights[present[i]] if i < len(present) else nn.Identity()
            part = norm(part) if together else part
            part = part.unflatten(-1, (-1, headdim)).transpose(1, 2)
            part = part if together else norm(part)
            if rotary and i < 2:
                x1, x2 = part.chunk(2, -1)
                part = part * cos[:, None] + torch.cat((-x2, x1), -1) * sin[:, None]
            expected.append(part)
        if not all(map(_same, (q, k, v, cached_k, cached_v), expected + expected[1:])):
            return None
        if layer != module.layer_idx or not isinstance(layer, int):
            return None
        if not _same(out, _project(recorder.out.flatten(2), small[layers.out], layers)):
            return None
    scaling, window, softcap = (asked.pop(name, None) for name in ("scaling", "sliding_window", "softcap"))
    if asked.pop("is_causal", None) not in (None, True) or asked.pop("dropout", 0.0) != 0.0:
        return None
    if any(value is not None for value in asked.values()) or not isinstance(scaling, float):
        return None  # sinks, say
    return Attention(
        parameters,
        _attributes(module),
        config._attn_implementation,
        layers,
        headdim,
        (norms[0], norms[1]) if norms else (None, None),
        together,
        dropouts,
        rotary,
        scaling,
        window or 0,
        softcap or 0.0,
    )


def _project(x: Tensor, layer: Any, layers: Layers) -> Tensor:
    return F.linear(x, layer.weight.t() if layers.transposed else layer.weight, layer.bias)


@torch.no_grad()
def mlp_of(module: nn.Module) -> Mlp | None:
    """What a module computes, if it is an MLP, as Mlp says."""
    layers = _layers(module, MLPS)
    if layers is None:
        return None
    own = (*layers.into, layers.out)
    rest = {
        n: c
        for n, c in module._modules.items()
        if n not in own and c is not None and type(c) is not nn.Dropout
    }
    if len(rest) != 1:
        return None
    ((name, activation),) = rest.items()
    dropouts = _dropouts(module, *own, name)
    if dropouts is None or has_tensors(module) or has_tensors(activation) or activation._modules:
        return None
    small = _small_layers(module, layers)
    probe = _probe(module, small | {name: _bare(activation)}, dropouts)
    inner = _sizes(module._modules[layers.out], layers.transposed)[1]
    gated = sum(_sizes(module._modules[name], layers.transposed)[0] for name in layers.into) == 2 * inner
    possible = dict(ACTIVATIONS)
    for scale in SCALES:
        x = scale * _numbers(BATCH, SEQLEN, HIDDEN, phase=0.1)
        try:
            got = type(module).forward(probe, x)
        except Exception:  # it computes with more than that
            return None
        up = torch.cat([_project(x, small[name], layers) for name in layers.into], -1)
        gate, factor = up.chunk(2, -1) if gated else (up, torch.ones(()))
        for kind, function in list(possible.items()):
            if not _same(got, _project(function(gate) * factor, small[layers.out], layers)):
                del possible[kind]
    if len(possible) != 1:
        return None
    (kind,) = possible
    return Mlp(
        _attributes(module), layers, gated, kind, (name, type(activation), _attributes(activation)), dropouts
    )


@torch.no_grad()
def block_of(
    module: nn.Module, attentions: dict[nn.Module, Attention], mlps: dict[nn.Module, Mlp]
) -> Block | None:
    """What a module computes, if it is a block, as Block says, of an attention and an MLP that are known."""
    present = {name for name, child in module._modules.items() if child is not None}
    for layout in BLOCKS:
        names = [name for half in layout for name in half if name is not None]
        dropouts = _dropouts(module, *names)
        if dropouts is not None and present == {*names, *dropouts}:
            break
    else:
        return None
    attention, mlp = (module._modules[half[1]] for half in layout)
    if attention not in attentions or mlp not in mlps or has_tensors(module):
        return None
    halves = []
    for before, name, after in layout:
        kind: Any = type(module._modules[name])
        half = Half(_norm_child(module, before), name, kind, _norm_child(module, after))
        if len(half.norms()) != sum(n is not None for n in (before, after)):
            return None
        halves.append(half)
    first, second = halves
    parameters = _parameters(module)
    handed = ("attention_mask", "position_embeddings", "cache", "past_key_values")
    passed = {name: object() for name in handed if name in parameters}
    for scale in SCALES:
        x, attended, made = (
            scale * _numbers(BATCH, SEQLEN, HIDDEN, phase=phase) for phase in (0.1, 0.2, 0.3)
        )
        to_attention, to_mlp = Given((attended, None)), Given(made)
        children: dict[str, Any] = {first.name: to_attention, second.name: to_mlp}
        for i, norm in enumerate((*first.norms(), *second.norms())):
            children[norm.name] = _small_norm(module._modules[norm.name], HIDDEN, 0.4 + i)  # type: ignore[arg-type]

        def normed(norm: NormChild | None, rows: Tensor, children: dict[str, Any] = children) -> Tensor:
            return rows if norm is None else children[norm.name](rows)

        try:
            got = type(module).forward(_probe(module, children, dropouts), x, **passed)
            between = x + normed(first.after, attended)
            same = _same(to_attention.x, normed(first.before, x)) and _same(
                to_mlp.x, normed(second.before, between)
            )
        except Exception:  # it computes with more than that
            return None
        if not same or not _same(got, between + normed(second.after, made)):
            return None
        rest = to_attention.rest | to_mlp.rest
        if (
            to_attention.several
            or to_mlp.several
            or any(rest.pop(n, None) is not v for n, v in passed.items())
        ):
            return None
        if any(value is not None and name not in WITHOUT_MEANING for name, value in rest.items()):
            return None
    return Block(parameters, _attributes(module), first, attentions[attention], second, mlps[mlp], dropouts)
