"""fastgpt's attention, norms, cache and products inside a loaded transformers model, and back again.

    model = fastgpt.patch(AutoModelForCausalLM.from_pretrained("gpt2"))
    ...
    fastgpt.unpatch(model)

The attention goes through the interface that transformers has for it: a name in its registries of
attention and mask functions (``attention.py``; ``batching.py`` for generate_batch), which the model's config
then asks for. Norms, linear layers and blocks get a ``forward`` of their own on the instance (``norms.py``,
``linear.py``, ``block.py``). A DynamicCache that the model is given gets layers that append in place
(``cache.py``). Nothing else changes: no class, no weight, no module, no global but those names.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import nn

from fastgpt import dispatch
from fastgpt.integrations.transformers import block, probe
from fastgpt.integrations.transformers.attention import (
    NAME,
    Implementations,
    attention_forward,
    attention_mask,
    attentions,
    implementations,
    register,
    restore,
)
from fastgpt.integrations.transformers.batching import continuous_batching
from fastgpt.integrations.transformers.linear import is_linear, is_transposed, linear_forward
from fastgpt.integrations.transformers.norms import gpt2_block_forward, is_gpt2_block, norm_forward, norm_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    Model = TypeVar("Model", bound=PreTrainedModel)

__all__ = ["attention_forward", "attention_mask", "patch", "register", "unpatch"]

RECORD = "_fastgpt_patch"
BATCHING = "continuous_batching_context_manager"  # what generate_batch() runs in
CACHES = ("cache", "past_key_values")  # what models call it since 5.24, and what they did before


@dataclasses.dataclass
class Patch:
    """What :func:`patch` has changed in a model, for :func:`unpatch`."""

    implementations: Implementations  # that the model's config and those in it asked for
    backend: str | None
    forwards: list[tuple[nn.Module, Any]]  # each with the `forward` of its instance, None if it had none
    hooks: list[torch.utils.hooks.RemovableHandle]

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        register(self.backend)  # a model that is unpickled may be the first in its process


def _refuse_output_attentions(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    if kwargs.get("output_attentions"):
        raise ValueError(
            "output_attentions: got True, expected False in a patched model: fastgpt's attention never "
            "stores the weights; call fastgpt.unpatch(model) and load it with attn_implementation='eager'"
        )


def _append_in_place(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    if not torch.compiler.is_compiling():
        from fastgpt.integrations.transformers.cache import append_in_place

        for name in CACHES:
            append_in_place(kwargs.get(name))


def _unwrapped(model: nn.Module) -> PreTrainedModel:
    """The model in the wrappers of torch.compile, PEFT and DistributedDataParallel."""
    from transformers import PreTrainedModel

    inner: Any = model
    while not isinstance(inner, PreTrainedModel):
        if "_orig_mod" in getattr(inner, "_modules", ()):
            inner = inner._orig_mod
        elif isinstance(inner, nn.parallel.DistributedDataParallel):
            inner = inner.module
        elif hasattr(inner, "get_base_model"):
            inner = inner.get_base_model()
        elif isinstance(inner, nn.DataParallel):
            raise TypeError(
                "model: got DataParallel, whose replicas would all use the first device's norms; patch the "
                "model inside with norm=False, or use DistributedDataParallel"
            )
        else:
            raise TypeError(
                f"model: got {type(inner).__name__}, expected a transformers model (PreTrainedModel), alone "
                "or in a wrapper of PEFT, torch.compile or DistributedDataParallel"
            )
    return inner


def _slot(module: nn.Module) -> str:
    """The name of a module's own forward: accelerate's hooks stand before it, which load weights."""
    return "_old_forward" if "_old_forward" in vars(module) else "forward"


def _set_forward(record: Patch, module: nn.Module, forward: Any, *args: Any) -> None:
    """The module's own forward becomes ``forward(module, what it was, *args, ...)``."""
    slot = _slot(module)
    record.forwards.append((module, vars(module).get(slot)))
    # A partial and not a closure: it follows the module through copy.deepcopy and pickle.
    setattr(module, slot, functools.partial(forward, module, getattr(module, slot), *args))


def patch(
    model: Model,
    *,
    attention: bool = True,
    norm: bool = True,
    cache: bool = True,
    linear: bool = True,
    backend: str | None = None,
) -> Model:
    """Swaps parts of a loaded transformers model for fastgpt's, in place, and prints which.

    Attention is that of every architecture that lets transformers choose it: masks, windows, softcap and
    sinks included. Norms are nn.LayerNorm and RMS norms, known by what they compute; GPT-2's blocks add the
    residual in them. Calls that fastgpt's kernels do not have run on torch's or the reference backend, as
    :func:`fastgpt.attention` chooses. In bfloat16 and float16 a Llama norm is rounded once where
    transformers rounds it twice.

    Args:
        model: on any device, of any dtype, with any head; quantised, offloaded, or in a wrapper of PEFT,
            torch.compile or DistributedDataParallel.
        attention, norm: what is swapped.
        cache: a DynamicCache, generate()'s default, that the model is called with appends in place from then
            on, where transformers copies all of it at every token, unless gradients are enabled. (By the name
            ``cache`` or ``past_key_values`` to the model itself; with up to half of its size as room.)
        linear: layers that multiply up to 8 rows on a CPU (6 in bfloat16), without gradients, do so at the
            speed of memory; generate() of a few sequences spends most of its time there. There, too, MLPs
            are one call, and so are attentions, if attention and cache are swapped, and blocks, if norms
            are. In bfloat16 and float16, what such a call computes between products is rounded less often.
            Modules that somebody replaces, hooks or gives other attributes afterwards are seen; what such a
            module reads in its config at every call, and a norm's eps, are taken to stay.
        backend: of what is swapped; default ``FASTGPT_BACKEND``, else ``auto``. (That of linear layers is
            what the variable says now; of all else, at each call.)

    Returns:
        model itself.

    Raises:
        TypeError: the model is none of transformers', or its attention is its own (``attention=False`` takes
            it).
        ValueError: the model is patched already, shares its config with a patched one, or its config asks
            for ``output_attentions``.
    """
    wrapper, model = model, _unwrapped(model)
    kind = type(model).__name__
    if attention and not (model._supports_attention_backend and any(map(_on_its_interface, _parts(model)))):
        raise TypeError(
            f"model: got {kind}, whose attention transformers does not let others compute; "
            "attention=False patches its norms"
        )
    dispatch.requested(backend)  # refuses a name that is not a backend
    previous = model.config._attn_implementation
    if hasattr(model, RECORD):
        raise ValueError(f"model: got a {kind} that is patched, expected one that is not")
    if attention and previous is not None and previous.startswith(NAME):
        raise ValueError("model: its config asks for fastgpt already; does it share it with a patched model?")
    if attention and model.config.output_attentions:
        raise ValueError(
            "model: got output_attentions=True in its config, fastgpt's attention stores no weights"
        )

    record = Patch(implementations(model.config), backend, [], [])
    setattr(model, RECORD, record)
    try:
        said = []
        if attention:
            said += _patch_attention(model, record)
        if norm:
            said += _patch_norms(model, record)
        asked = dispatch.requested(backend)
        linears = [m for m in model.modules() if linear and is_linear(m, asked) and not probe.is_replaced(m)]
        if linears:
            for module in linears:
                _set_forward(record, module, linear_forward, is_transposed(module), asked)
            said.append(f"{len(linears)} linear layers where rows are few")
            said += _patch_blocks(model, record, attention and cache)
        if cache:
            importlib.import_module(f"{__name__}.cache")  # which notes what transformers' own update is
            record.hooks.append(model.register_forward_pre_hook(_append_in_place, with_kwargs=True))
            said.append("a cache that appends in place")
    except BaseException:
        unpatch(model)
        raise
    print(f"fastgpt: patched {kind}: {', '.join(said)}")
    return wrapper


def _parts(model: nn.Module) -> list[Any]:
    """The models in a model, itself first: towers and language models are ones of their own."""
    from transformers import PreTrainedModel

    return [module for module in model.modules() if isinstance(module, PreTrainedModel)]


def _on_its_interface(part: Any) -> bool:
    """Whether a model's attention is what transformers lets others compute, and no more than that."""
    return bool(part._supports_attention_backend and attentions(type(part)))


# Each returns what to say about it.


def _patch_attention(model: Any, record: Patch) -> list[str]:
    record.hooks.append(model.register_forward_pre_hook(_refuse_output_attentions, with_kwargs=True))
    name = register(record.backend)
    parts = _parts(model)
    own = [part for part in parts if not _on_its_interface(part)]
    kept, asked = ({id(part.config) for part in those} for those in (own, parts))
    for config, implementation in record.implementations:  # a config sets those in it, which come after it
        if id(config) in asked:
            config._attn_implementation = implementation if id(config) in kept else name
    left = {type(part).__name__ for part in own}
    if hasattr(model, BATCHING):
        batching = functools.partial(continuous_batching, model, getattr(model, BATCHING), record.backend)
        setattr(model, BATCHING, batching)
    said = [f"{sum('is_causal' in vars(module) for module in model.modules())} attentions"]
    return [*said, f"attention left as it is in {', '.join(sorted(left))}"] if left else said


def _patch_norms(model: PreTrainedModel, record: Patch) -> list[str]:
    left: set[str] = set()
    norms = 0
    for module in model.modules():
        if not probe.is_replaced(module) and (what := norm_of(module)) is not None:
            _set_forward(record, module, norm_forward, what, record.backend)
            norms += 1
        elif "Norm" in type(module).__name__:
            left.add(type(module).__name__)
    patched = {id(module) for module, _ in record.forwards}
    blocks = [
        m for m in model.modules() if is_gpt2_block(m) and id(m.ln_2) in patched and not probe.is_replaced(m)
    ]
    for gpt2_block in blocks:
        _set_forward(record, gpt2_block, gpt2_block_forward)
    said = f"{norms} norms" + (f" ({len(blocks)} of them with the residual's addition)" if blocks else "")
    return [said, f"left as they are: {', '.join(sorted(left))}"] if left else [said]


def _patch_blocks(model: PreTrainedModel, record: Patch, attention: bool) -> list[str]:
    """What is one call where rows are few: attentions and MLPs, and blocks whose norms are patched."""
    ours = {id(module) for module, _ in record.forwards}
    replaced = {id(m) for m in model.modules() if id(m) not in ours and probe.is_replaced(m)}
    attentions: dict[nn.Module, probe.Attention] = {}
    mlps: dict[nn.Module, probe.Mlp] = {}
    for module in model.modules():
        if id(module) in replaced:
            continue
        if (mlp := probe.mlp_of(module)) is not None:
            mlps[module] = mlp
        elif attention and (found := probe.attention_of(module)) is not None:
            attentions[module] = found
    for module, mlp in mlps.items():
        _set_forward(record, module, block.mlp_forward, mlp, record.backend)
    for module, found in attentions.items():
        _set_forward(record, module, block.attention_forward, found, record.backend)
    patched = {id(module) for module, _ in record.forwards}
    blocks = 0
    for module in model.modules():
        whole = None if id(module) in replaced else probe.block_of(module, attentions, mlps)
        if whole is not None and all(id(module._modules[name]) in patched for name in whole.names()):
            _set_forward(record, module, block.block_forward, whole, record.backend)
            blocks += 1
    counts = [(blocks, "blocks"), (len(attentions) - blocks, "attentions"), (len(mlps) - blocks, "MLPs")]
    said = " and ".join(f"{count} {name}" for count, name in counts if count)
    return [f"there {said} as one call each"] if said else []


def unpatch(model: Model) -> Model:
    """Undoes :func:`patch` exactly, and returns the model. Caches that it has been given go on appending in
    place.

    Raises:
        TypeError: the model is none of transformers'.
        ValueError: the model is not patched.
    """
    wrapper, model = model, _unwrapped(model)
    record: Patch | None = vars(model).get(RECORD)
    if record is None:
        raise ValueError(f"model: got a {type(model).__name__} that is not patched, expected one that is")
    restore(record.implementations)
    for module, forward in reversed(record.forwards):  # a module may be in it twice
        slot = _slot(module)
        if forward is None and slot == "forward":
            del module.forward
        else:  # there may be hooks now where there were none
            setattr(module, slot, forward or vars(module)[slot].args[1])
    for hook in record.hooks:
        hook.remove()
    vars(model).pop(BATCHING, None)
    delattr(model, RECORD)
    return wrapper
