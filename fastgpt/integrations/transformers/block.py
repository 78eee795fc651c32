"""A block's attention and its MLP as one call each where rows are few, as a token's are: between the products
is little to compute, but a hundred small operators, which take as long as the products. Where the block adds
both to its input, each behind a norm, it is one call with these, too.

Which modules these are, ``probe.py`` knows. Here is what stands for their ``forward``; at each call it looks
whether they still are what they were, without hooks, with gradients disabled, and the cache one that appends
in place. Else the module computes as it did.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fastgpt.integrations.transformers import probe
from fastgpt.integrations.transformers.attention import RANGES
from fastgpt.integrations.transformers.linear import linear_forward
from fastgpt.integrations.transformers.norms import norm_forward
from fastgpt.nn import all_are_hooked, is_itself, projection_of
from fastgpt.ops.few_rows import api as few_rows
from fastgpt.ops.few_rows.spec import Attention, Cache, HeadNorm, Mlp, Norm, Projection, Rotary

WITHOUT_MEANING = frozenset({"position_ids", "use_cache", "cache_position"})  # to attention


def _may_serve(x: Any) -> bool:
    if torch.compiler.is_compiling() or not isinstance(x, Tensor) or not few_rows.are_few(x):
        return False
    return not torch.is_grad_enabled() and not all_are_hooked()


def _projections(
    children: dict[str, nn.Module | None], layers: probe.Layers
) -> tuple[tuple[Projection, ...], Projection] | None:
    """Of the layers that lead in, and of the one that leads out."""
    into = [projection_of(children.get(name), layers.kind, linear_forward) for name in layers.into]
    out = projection_of(children.get(layers.out), layers.kind, linear_forward)
    return None if out is None or None in into else (tuple(into), out)  # type: ignore[arg-type]


def _drops(children: dict[str, Any], names: tuple[str, ...]) -> bool:
    """Whether one of these, dropouts once, may change anything."""
    return any(type(children.get(name)) is not nn.Dropout or children[name].training for name in names)


def mlp_forward(
    module: nn.Module,
    original: Callable[..., Tensor],
    known: probe.Mlp,
    backend: str | None,
    *args: Tensor,
    **named: Tensor,
) -> Tensor:
    out = None
    if not named and len(args) == 1 and _may_serve(args[0]) and (spec := _mlp(module, known)) is not None:
        out = few_rows.mlp(args[0], spec, backend)
    return original(*args, **named) if out is None else out


def _mlp(module: nn.Module, known: probe.Mlp, norm: Norm | None = None) -> Mlp | None:
    """What the module would compute now."""
    children, (name, kind) = module._modules, known.activation_child
    projections = _projections(children, known.layers)
    if projections is None or not is_itself(children.get(name), kind):
        return None
    if known.dropouts and _drops(children, known.dropouts):
        return None
    return Mlp(*projections, known.gated, known.activation, known.layers.transposed, norm)


def attention_forward(
    module: nn.Module,
    original: Callable[..., Any],
    known: probe.Attention,
    backend: str | None,
    *args: Any,
    **named: Any,
) -> Any:
    """Of an attention, which returns the weights, too: None."""
    given = {**dict(zip(known.parameters, args, strict=False)), **named}
    x, out = given.pop("hidden_states", None), None
    if _may_serve(x) and (call := _attention(module, known, given)) is not None:
        out = call.run(x, None, backend)
    return original(*args, **named) if out is None else (out, None)


class Call(NamedTuple):
    """An attention to be computed."""

    spec: Attention
    rotary: Rotary | None
    layer: Any  # of the cache
    ranges: Tensor | None

    def run(self, x: Tensor, mlp: Mlp | None, backend: str | None) -> Tensor | None:
        """It, and then the MLP, if there is one."""
        count = x.shape[1]
        if (room := self.layer.reserve(count)) is None:
            return None
        k, v, length = room
        cache = Cache(k, v, length, self.ranges)
        if mlp is None:
            out = few_rows.attention(x, self.spec, self.rotary, cache, backend)
        else:
            out = few_rows.block(x, self.spec, self.rotary, cache, mlp, backend)
        if out is not None:
            self.layer.extend(count)
        return out


def _attention(
    module: Any, known: probe.Attention, named: dict[str, Any], norm: Norm | None = None
) -> Call | None:
    """What the module would compute now, called with these, beside hidden_states."""
    mask, embeddings = named.pop("attention_mask", None), named.pop("position_embeddings", None)
    cache, older = named.pop("cache", None), named.pop("past_key_values", None)
    cache = older if cache is None else cache
    window, ranges = known.window, None
    if mask is not None:
        if mask.dtype != RANGES or mask.shape[1] != 1:
            return None  # a dense mask, or keys behind a query's own
        if mask.shape[2] > 1:
            window = mask.shape[2] - 1
        ranges = mask if mask.shape[3] else None
    for name, value in named.items():
        if value is not None and name not in WITHOUT_MEANING:
            return None
    if module.training or module.scaling != known.scaling or not module.is_causal:
        return None
    layers = getattr(cache, "layers", ())
    layer = layers[module.layer_idx] if module.layer_idx < len(layers) else None
    if not hasattr(layer, "reserve") or type(cache).update is not _update() or cache.offloading:
        return None  # not one of cache.py

    children = module._modules
    if (projections := _projections(children, known.layers)) is None:
        return None
    if known.dropouts and _drops(children, known.dropouts):
        return None
    heads: list[HeadNorm | None] = [None, None]
    for i, (name, (kind, computed)) in enumerate(zip(probe.HEAD_NORMS, known.head_norms, strict=False)):
        if (of_head := _norm(children.get(name), kind, computed)) is None or of_head.weight is None:
            return None
        heads[i] = HeadNorm(of_head.weight, of_head.eps)
    rotary = Rotary(*embeddings) if known.rotary else None
    qkv, out = projections
    spec = Attention(
        qkv, out, known.scaling, window - 1, known.softcap, heads[0], heads[1], known.layers.transposed, norm
    )
    return Call(spec, rotary, layer, ranges)


@functools.cache
def _update() -> Any:
    from transformers import DynamicCache

    return DynamicCache.update


def _norm(module: Any, kind: type[nn.Module], computed: probe.Norm) -> Norm | None:
    if not is_itself(module, kind, norm_forward):
        return None
    parameters = module._parameters
    if (weight := parameters.get("weight")) is None:
        return None
    return Norm(computed.rms, computed.eps, weight, parameters.get("bias"))


def block_forward(
    module: Any,
    original: Callable[..., Any],
    known: probe.Block,
    backend: str | None,
    *args: Any,
    **named: Any,
) -> Any:
    given = {**dict(zip(known.parameters, args, strict=False)), **named}
    x, out = given.pop("hidden_states", None), None
    if _may_serve(x):
        out = _block(module, known, backend, x, given)
    return original(*args, **named) if out is None else out


def _block(
    module: Any, known: probe.Block, backend: str | None, x: Tensor, named: dict[str, Any]
) -> Tensor | None:
    first, attention, second, mlp = map(module._modules.get, known.names)
    if not is_itself(attention, known.attention_kind, attention_forward):
        return None
    if not is_itself(mlp, known.mlp_kind, mlp_forward):
        return None
    if known.dropouts and _drops(module._modules, known.dropouts):
        return None
    norm_1, norm_2 = _norm(first, *known.norms[0]), _norm(second, *known.norms[1])
    if norm_1 is None or norm_2 is None:
        return None
    then = _mlp(mlp, known.mlp, norm_2)
    if then is None or (call := _attention(attention, known.attention, named, norm_1)) is None:
        return None
    return call.run(x, then, backend)
