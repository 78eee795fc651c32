"""A block's attention and its MLP as one call each where rows are few, as a token's are: between the products
is little to compute, but a hundred small operators, which take as long as the products. Where the block adds
both to its input, each behind a norm, it is one call with these, too.

Which modules these are, ``probe.py`` knows. Here is what stands for their ``forward``; at each call it looks
whether they still are what they were, without hooks and with the same attributes, whether gradients are
disabled, and the cache is one that appends in place. Else the module computes as it did. (What a module reads
in its config at each call, and somebody changes there afterwards, is not seen.)
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fastgpt.integrations.transformers import probe
from fastgpt.integrations.transformers.attention import RANGES
from fastgpt.integrations.transformers.linear import linear_forward
from fastgpt.integrations.transformers.norms import norm_forward
from fastgpt.nn import all_are_hooked, is_itself, projection_of
from fastgpt.ops.few_rows import api as few_rows
from fastgpt.ops.few_rows.spec import Around, Attention, Cache, Mlp, Norm, Projection, Rotary


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
    return any(not is_itself(children.get(name), nn.Dropout) or children[name].training for name in names)


def _changed(module: nn.Module, attributes: probe.Attributes) -> bool:
    """Whether one of the numbers, names or functions that it had is another: a scale, a window."""
    own = module.__dict__
    for name, value in attributes:
        now = own.get(name)
        if now is not value and (type(now) is not type(value) or now != value):
            return True
    return False


def _gained(module: nn.Module) -> bool:
    """Whether it is in training, or has got tensors of its own, which it may compute with."""
    return module.training or bool(module._buffers) or bool(module._parameters)


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


def _mlp(module: nn.Module, known: probe.Mlp, around: Around | None = None) -> Mlp | None:
    """What the module would compute now."""
    children, (name, kind, attributes) = module._modules, known.activation_child
    projections, activation = _projections(children, known.layers), children.get(name)
    if projections is None or not is_itself(activation, kind) or _changed(activation, attributes):  # type: ignore[arg-type]
        return None
    if _gained(module) or _changed(module, known.attributes):
        return None
    if known.dropouts and _drops(children, known.dropouts):
        return None
    return Mlp(*projections, known.gated, known.activation, known.layers.transposed, around)


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
        if x.dim() != 3 or getattr(self.layer.keys, "dtype", None) != x.dtype:
            return None
        count, out = x.shape[1], None
        if (claimed := self.layer.claim(count)) is None:
            return None
        keys, values, length = claimed
        cache = Cache(keys.rows, values.rows, length, self.ranges)
        try:
            if mlp is None:
                out = few_rows.attention(x, self.spec, self.rotary, cache, backend)
            else:
                out = few_rows.block(x, self.spec, self.rotary, cache, mlp, backend)
        finally:
            self.layer.settle(claimed, count, out is not None)
        return out


def _attention(
    module: Any, known: probe.Attention, named: dict[str, Any], around: Around | None = None
) -> Call | None:
    """What the module would compute now, called with these, beside hidden_states."""
    mask, embeddings = named.pop("attention_mask", None), named.pop("position_embeddings", None)
    cache, older = named.pop("cache", None), named.pop("past_key_values", None)
    cache = older if cache is None else cache
    if cache is None or _gained(module) or _changed(module, known.attributes):
        return None
    if module.config._attn_implementation != known.implementation:
        return None
    window, ranges = known.window, None
    if mask is not None:
        if not isinstance(mask, Tensor) or mask.dtype != RANGES or mask.shape[1] != 1:
            return None  # a dense mask, or keys behind a query's own
        if mask.shape[2] > 1:
            window = mask.shape[2] - 1
        ranges = mask if mask.shape[3] else None
    for name, value in named.items():
        if value is not None and name not in probe.WITHOUT_MEANING:
            return None
    rotary = None
    if known.rotary:
        if not isinstance(embeddings, tuple) or any(t.shape[-1] != known.headdim for t in embeddings):
            return None  # a part of each head is rotated
        rotary = Rotary(*embeddings)
    if (layer := _layers()(cache, module.layer_idx)) is None:
        return None

    children = module._modules
    if (projections := _projections(children, known.layers)) is None:
        return None
    if known.dropouts and _drops(children, known.dropouts):
        return None
    q_norm, k_norm = (_norm(children, norm) for norm in known.head_norms)
    if (q_norm is None) != (known.head_norms[0] is None) or (k_norm is None) != (known.head_norms[1] is None):
        return None
    spec = Attention(
        *projections,
        softmax_scale=known.scaling,
        window_left=window - 1,
        softcap=known.softcap,
        q_norm=q_norm,
        k_norm=k_norm,
        heads_together=known.heads_together,
        transposed=known.layers.transposed,
        around=around,
    )
    return Call(spec, rotary, layer, ranges)


@functools.cache
def _layers() -> Any:
    from fastgpt.integrations.transformers.cache import layer_in_place  # which has transformers' classes

    return layer_in_place


def _norm(children: dict[str, Any], known: probe.NormChild | None) -> Norm | None:
    if known is None or not is_itself(children.get(known.name), known.kind, norm_forward):
        return None
    norm, computed = children[known.name], known.norm
    parameters = norm._parameters
    if (weight := parameters.get("weight")) is None or _changed(norm, known.attributes):
        return None
    return Norm(computed.rms, computed.eps, weight, parameters.get("bias"), float(computed.one_more))


def _around(children: dict[str, Any], half: probe.Half) -> Around | None:
    before, after = _norm(children, half.before), _norm(children, half.after)
    if (before is None) != (half.before is None) or (after is None) != (half.after is None):
        return None
    return Around(before, after)


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
    children, first, second = module._modules, known.first, known.second
    attention, mlp = children.get(first.name), children.get(second.name)
    if not is_itself(attention, first.kind, attention_forward, _capture_nothing):
        return None
    if not is_itself(mlp, second.kind, mlp_forward, _capture_nothing):
        return None
    if _gained(module) or _changed(module, known.attributes):
        return None
    if known.dropouts and _drops(children, known.dropouts):
        return None
    if (around_first := _around(children, first)) is None or (
        around_second := _around(children, second)
    ) is None:
        return None
    then = _mlp(mlp, known.mlp, around_second)
    if then is None or (call := _attention(attention, known.attention, named, around_first)) is None:
        return None
    return call.run(x, then, backend)


def _capture_nothing(hooks: Iterable[Any]) -> bool:
    """Whether hooks are those that a call with output_hidden_states=True leaves, which do nothing in
    others."""
    from transformers.utils import output_capturing

    own = all(getattr(hook, "__module__", None) == output_capturing.__name__ for hook in hooks)
    return own and not output_capturing._active_collector.get()
