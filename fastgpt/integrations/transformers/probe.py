"""Which of a model's modules are attentions, MLPs and blocks that can be computed in one go (``block.py``):
known by what they make of small numbers, of their inputs, and what they hand to the cache and to attention.
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

# What the children are called: Llama's, and those of all that follow it; Phi-3's; GPT-2's.
ATTENTIONS = ((("q_proj", "k_proj", "v_proj"), "o_proj"), (("qkv_proj",), "o_proj"), (("c_attn",), "c_proj"))
HEAD_NORMS = ("q_norm", "k_norm")
MLPS = ((("gate_proj", "up_proj"), "down_proj"), (("gate_up_proj",), "down_proj"), (("c_fc",), "c_proj"))
BLOCKS = (
    ("input_layernorm", "self_attn", "post_attention_layernorm", "mlp"),
    ("ln_1", "attn", "ln_2", "mlp"),
)
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "gelu_tanh": functools.partial(F.gelu, approximate="tanh"),
}
BATCH, SEQLEN, HIDDEN = 2, 3, 16  # of the small numbers


class Layers(NamedTuple):
    """The linear layers of a module, by their names: those that lead in, and the one that leads out."""

    into: tuple[str, ...]
    out: str
    kind: type[nn.Module]
    transposed: bool


class Attention(NamedTuple):
    """How a module computes an attention that :class:`fastgpt.ops.few_rows.spec.Attention` has."""

    parameters: tuple[str, ...]  # of its forward
    layers: Layers
    head_norms: tuple[tuple[type[nn.Module], Norm], ...]  # of HEAD_NORMS, or none
    dropouts: tuple[str, ...]
    rotary: bool
    scaling: float
    window: int  # how many keys a query sees, its own among them; 0 for all
    softcap: float


class Mlp(NamedTuple):
    """How a module computes an MLP that :class:`fastgpt.ops.few_rows.spec.Mlp` has."""

    layers: Layers
    gated: bool
    activation: str
    activation_child: tuple[str, type[nn.Module]]
    dropouts: tuple[str, ...]


class Block(NamedTuple):
    """How a module computes ``z = x + attention(norm(x))``, and of that ``z + mlp(norm(z))``."""

    parameters: tuple[str, ...]  # of its forward
    names: tuple[str, str, str, str]  # of BLOCKS
    norms: tuple[tuple[type[nn.Module], Norm], ...]
    attention_kind: type[nn.Module]
    attention: Attention
    mlp_kind: type[nn.Module]
    mlp: Mlp
    dropouts: tuple[str, ...]


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
        self.x = args[0] if args else kwargs.get("hidden_states")
        self.kwargs = kwargs
        return self.out


def _numbers(*shape: int, phase: float) -> Tensor:
    """Not random ones, which the user would miss."""
    count = torch.Size(shape).numel()
    return (torch.arange(count, dtype=torch.float32, device="cpu") * 0.7 + phase).sin().view(shape)


def _same(got: Any, expected: Tensor) -> bool:
    fits = isinstance(got, Tensor) and got.shape == expected.shape
    return fits and torch.allclose(got, expected, rtol=1e-4, atol=1e-5)


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


@torch.no_grad()
def attention_of(module: Any) -> Attention | None:
    """What a module computes, if it is a causal attention over a cache, as Attention says."""
    layers, headdim = _layers(module, ATTENTIONS), getattr(module, "head_dim", None)
    causal, config = getattr(module, "is_causal", False), getattr(module, "config", None)
    if layers is None or not isinstance(headdim, int) or not causal or config is None:
        return None
    heads = _sizes(module._modules[layers.out], layers.transposed)[1] // headdim
    columns = sum(_sizes(module._modules[name], layers.transposed)[0] for name in layers.into)
    heads_k = (columns // headdim - heads) // 2
    norms = {name: norm for name in HEAD_NORMS if (norm := module._modules.get(name)) is not None}
    computed = [norm_of(norm) for norm in norms.values()]
    dropouts = _dropouts(module, *layers.into, layers.out, *norms)
    if dropouts is None or len(norms) == 1 or heads < 1 or heads_k < 1 or heads % heads_k:
        return None
    if any(norm is None or not norm.rms or norm.one_more for norm in computed):
        return None
    if any(norm.weight.shape != (headdim,) for norm in norms.values()):  # OLMo 2's: of all heads together
        return None

    x = _numbers(BATCH, SEQLEN, HIDDEN, phase=0.1)
    cos, sin = (_numbers(BATCH, SEQLEN, headdim, phase=phase) for phase in (0.2, 0.3))
    recorder = Recorder(_numbers(BATCH, SEQLEN, heads, headdim, phase=0.4))
    small = _small_layers(module, layers)
    small_norms = {name: _small_norm(norm, headdim, 6.0 + i) for i, (name, norm) in enumerate(norms.items())}
    probe = _probe(module, small | small_norms, dropouts)
    probe.config = copy.copy(config)
    probe.config._attn_implementation_internal = PROBE
    probe._fastgpt_recorder = recorder
    parameters = _parameters(module)
    rotary = "position_embeddings" in parameters
    named: dict[str, Any] = {"position_embeddings": (cos, sin)} if rotary else {}
    named["cache" if "cache" in parameters else "past_key_values"] = recorder
    try:
        out, _ = type(module).forward(probe, x, attention_mask=None, **named)
        q, k, v, asked = recorder.attended
        cached_k, cached_v, layer = recorder.cached
    except Exception:  # it computes with more than that
        return None

    qkv = torch.cat([_project(x, small[name], layers) for name in layers.into], -1)
    qkv = qkv.unflatten(-1, (-1, headdim))
    expected = [t.transpose(1, 2) for t in qkv.split((heads, heads_k, heads_k), 2)]
    for i, norm in enumerate(small_norms.values()):
        expected[i] = norm(expected[i])
    for i in range(2 if rotary else 0):
        x1, x2 = expected[i].chunk(2, -1)
        expected[i] = expected[i] * cos[:, None] + torch.cat((-x2, x1), -1) * sin[:, None]
    if (
        not all(map(_same, (q, k, v, cached_k, cached_v), expected + expected[1:]))
        or layer != module.layer_idx
    ):
        return None
    if not _same(out, _project(recorder.out.flatten(2), small[layers.out], layers)):
        return None
    scaling, window, softcap = (asked.pop(name, None) for name in ("scaling", "sliding_window", "softcap"))
    without = all(
        v is None or (isinstance(v, (int, float)) and v == 0) for v in asked.values()
    )  # no sinks, say
    if not without or not isinstance(scaling, float) or scaling != getattr(module, "scaling", None):
        return None
    head_norms = tuple(
        (type(norm), c) for norm, c in zip(norms.values(), computed, strict=True) if c is not None
    )
    return Attention(parameters, layers, head_norms, dropouts, rotary, scaling, window or 0, softcap or 0.0)


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
    if dropouts is None or next(activation.parameters(), None) is not None:
        return None
    x, small = _numbers(BATCH, SEQLEN, HIDDEN, phase=0.1), _small_layers(module, layers)
    try:
        got = type(module).forward(_probe(module, small | {name: _bare(activation)}, dropouts), x)
    except Exception:  # it computes with more than that
        return None
    up = torch.cat([_project(x, small[name], layers) for name in layers.into], -1)
    gated = up.shape[-1] == 2 * _sizes(module._modules[layers.out], layers.transposed)[1]
    for kind, function in ACTIVATIONS.items():
        gate, factor = up.chunk(2, -1) if gated else (up, torch.ones(()))
        if _same(got, _project(function(gate) * factor, small[layers.out], layers)):
            return Mlp(layers, gated, kind, (name, type(activation)), dropouts)
    return None


@torch.no_grad()
def block_of(
    module: nn.Module, attentions: dict[nn.Module, Attention], mlps: dict[nn.Module, Mlp]
) -> Block | None:
    """What a module computes, if it is a block, as Block says, of an attention and an MLP that are known."""
    for names in BLOCKS:
        first, attention, second, mlp = map(module._modules.get, names)
        if attention in attentions and mlp in mlps:
            break
    else:
        return None
    assert attention is not None and mlp is not None
    dropouts = _dropouts(module, *names)
    if first is None or second is None or dropouts is None:
        return None
    norms = [(type(norm), computed) for norm in (first, second) if (computed := norm_of(norm)) is not None]
    if len(norms) < 2 or any(norm.one_more for _, norm in norms):
        return None
    x, attended, made = (_numbers(BATCH, SEQLEN, HIDDEN, phase=phase) for phase in (0.1, 0.2, 0.3))
    children = (
        *(_small_norm(first, HIDDEN, 0.4), Given((attended, None))),
        *(_small_norm(second, HIDDEN, 0.5), Given(made)),
    )
    parameters = _parameters(module)
    handed = ("attention_mask", "position_embeddings", "cache", "past_key_values")
    passed = {name: object() for name in handed if name in parameters}
    try:
        probe = _probe(module, dict(zip(names, children, strict=True)), dropouts)
        got = type(module).forward(probe, x, **passed)
        norm_1, to_attention, norm_2, to_mlp = children
        same = _same(to_attention.x, norm_1(x)) and _same(to_mlp.x, norm_2(x + attended))
    except Exception:  # it computes with more than that
        return None
    if not same or any(to_attention.kwargs.get(name) is not value for name, value in passed.items()):
        return None
    if not _same(got, x + attended + made):
        return None
    kinds = type(attention), type(mlp)
    return Block(
        parameters, names, tuple(norms), kinds[0], attentions[attention], kinds[1], mlps[mlp], dropouts
    )
