"""fastgpt's attention and norms inside a loaded transformers model, and back again.

    model = fastgpt.patch(AutoModelForCausalLM.from_pretrained("gpt2"))
    ...
    fastgpt.unpatch(model)

The attention goes through the interface that transformers has for it: a name in its registries of
attention and mask functions, which the model's config then asks for. The norms get a ``forward`` of their
own on the instance. Nothing else changes: no class, no weight, no module, no global but those names.
"""

from __future__ import annotations

import dataclasses
import functools
import logging
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor, nn

from fastgpt import dispatch
from fastgpt.ops.attention.api import attention
from fastgpt.ops.norm.api import layer_norm, rms_norm

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    Model = TypeVar("Model", bound=PreTrainedModel)

NAME = "fastgpt"
RECORD = "_fastgpt_patch"
# What other architectures pass to an attention function and this one does not compute.
REFUSED = ("softcap", "s_aux", "position_bias", "cache")

logger = logging.getLogger("fastgpt")


@dataclasses.dataclass
class Patch:
    """What :func:`patch` has changed in a model, for :func:`unpatch`."""

    attn_implementation: str | None
    backend: str | None
    norms: list[tuple[nn.Module, Any]]  # each with the `forward` of its instance, None if it had none
    hook: torch.utils.hooks.RemovableHandle

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        _register(self.backend)  # a model that is unpickled may be the first in its process


def attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    *,
    backend: str | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """An attention function of transformers' ``AttentionInterface``.

    Args:
        query: (batch, nheads, seqlen_q, headdim).
        key, value: (batch, nheads_k, seqlen_k, headdim), with what a cache holds in front.
        attention_mask: from :func:`attention_mask`, or the user's own, of four dimensions: bool, True
            where a key is visible, or floating point, added to the scores; None for all keys, up to the
            query's own where the module is causal.
        dropout: probability of dropping a softmax probability.

    Returns:
        out (batch, seqlen_q, nheads, headdim), and None for the weights, which are never stored.
    """
    for name in REFUSED:
        if kwargs.get(name) is not None:
            raise ValueError(
                f"{name}: got a value for {type(module).__name__}, fastgpt's attention has only None"
            )
    if attention_mask is not None:
        causal = False  # the mask has it
    else:
        causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    out = attention(
        query.transpose(1, 2),
        key.transpose(1, 2),
        value.transpose(1, 2),
        causal=causal,
        softmax_scale=scaling,
        attn_bias=attention_mask,
        dropout_p=dropout,
        backend=backend,
    )
    return out, None  # type: ignore[return-value]  # one tensor without return_lse


def attention_mask(
    *,
    q_length: int,
    kv_length: int,
    q_offset: int | Tensor = 0,
    kv_offset: int = 0,
    attention_mask: Tensor | None = None,
    local_size: int | None = None,
    allow_is_causal_skip: bool = True,
    **kwargs: Any,
) -> Tensor | None:
    """A mask function of transformers' ``AttentionMaskInterface``: None where the mask is plainly causal.

    That is where the last query sees the last key and no key is padding; unlike with ``sdpa``, also for
    several queries behind a cache. Else (batch, 1, q_length, kv_length), bool, True where a key is visible.
    """
    from transformers.masking_utils import sdpa_mask

    if (
        allow_is_causal_skip
        and local_size is None
        and isinstance(q_offset, int)
        and q_offset + q_length == kv_offset + kv_length
        and (attention_mask is None or (not torch.compiler.is_compiling() and bool(attention_mask.all())))
    ):
        return None
    return sdpa_mask(
        q_length=q_length,
        kv_length=kv_length,
        q_offset=q_offset,
        kv_offset=kv_offset,
        attention_mask=attention_mask,
        local_size=local_size,
        allow_is_causal_skip=False,
        **kwargs,
    )


def _norm_forward(
    norm: nn.Module,
    original: Callable[[Tensor], Tensor],
    fused: Callable[..., Any],
    eps: Any,
    backend: str | None,
    x: Tensor,
) -> Tensor:
    # Mixed precision has rules of its own about the output's dtype.
    if x.dtype != norm.weight.dtype or torch.is_autocast_enabled(x.device.type):
        return original(x)
    return fused(x, norm.weight, getattr(norm, "bias", None), eps, backend=backend)


def _refuse_output_attentions(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    if kwargs.get("output_attentions"):
        raise ValueError(
            "output_attentions: got True, expected False in a patched model: fastgpt's attention never "
            "stores the weights; call fastgpt.unpatch(model) and load it with attn_implementation='eager'"
        )


def _parts(model: PreTrainedModel) -> tuple[type[nn.Module], type[nn.Module]]:
    """The classes of the model's attentions and norms."""
    from transformers.models.gpt2 import modeling_gpt2 as gpt2
    from transformers.models.llama import modeling_llama as llama

    if isinstance(model, gpt2.GPT2PreTrainedModel):
        return gpt2.GPT2Attention, nn.LayerNorm
    if isinstance(model, llama.LlamaPreTrainedModel):
        return llama.LlamaAttention, llama.LlamaRMSNorm
    raise TypeError(
        f"model: got {type(model).__name__}, expected a transformers GPT-2 or Llama model "
        "(GPT2PreTrainedModel or LlamaPreTrainedModel)"
    )


def _register(backend: str | None) -> str:
    """Makes the name, which it returns, one that a model's config can ask transformers for."""
    from transformers import AttentionInterface, AttentionMaskInterface

    name = NAME if backend is None else f"{NAME}_{backend}"
    AttentionInterface.register(name, functools.partial(attention_forward, backend=backend))
    AttentionMaskInterface.register(name, attention_mask)
    return name


def patch(model: Model, *, backend: str | None = None) -> Model:
    """Swaps attention and norms of a loaded transformers GPT-2 or Llama model for fastgpt's, in place.

    Calls that fastgpt's kernels do not have yet (padding masks and attention dropout on the CPU) run on
    torch's or the reference backend, as :func:`fastgpt.attention` chooses. In bfloat16 and float16 a
    Llama norm is rounded once where transformers rounds it twice.

    Args:
        model: on any device, of any dtype, with any head. The numbers of attentions and norms that were
            swapped are logged at INFO by the logger "fastgpt".
        backend: of all of them; default ``FASTGPT_BACKEND``, else ``auto``.

    Returns:
        model itself.

    Raises:
        TypeError: the model is of another architecture.
        ValueError: the model is patched already, shares its config with a patched one, or its config asks
            for ``output_attentions``.
    """
    attention_class, norm_class = _parts(model)
    dispatch.requested(backend)  # refuses a name that is not a backend
    previous = model.config._attn_implementation
    if hasattr(model, RECORD):
        raise ValueError(f"model: got a {type(model).__name__} that is patched, expected one that is not")
    if previous is not None and previous.startswith(NAME):
        raise ValueError("model: its config asks for fastgpt already; does it share it with a patched model?")
    if model.config.output_attentions:
        raise ValueError(
            "model: got output_attentions=True in its config, fastgpt's attention stores no weights"
        )

    name = _register(backend)
    norms = []
    for module in model.modules():
        if type(module) is norm_class:
            norms.append((module, vars(module).get("forward")))
            layer = isinstance(module, nn.LayerNorm)
            fused, eps = (layer_norm, module.eps) if layer else (rms_norm, module.variance_epsilon)
            # A partial and not a closure: it follows the module through copy.deepcopy and pickle.
            module.forward = functools.partial(_norm_forward, module, module.forward, fused, eps, backend)
    hook = model.register_forward_pre_hook(_refuse_output_attentions, with_kwargs=True)
    attentions = sum(type(module) is attention_class for module in model.modules())
    setattr(model, RECORD, Patch(previous, backend, norms, hook))
    model.config._attn_implementation = name
    logger.info("patched %s: %d attentions, %d norms", type(model).__name__, attentions, len(norms))
    return model


def unpatch(model: Model) -> Model:
    """Undoes :func:`patch` exactly, and returns the model.

    Raises:
        ValueError: the model is not patched.
    """
    record: Patch | None = vars(model).get(RECORD)
    if record is None:
        raise ValueError(f"model: got a {type(model).__name__} that is not patched, expected one that is")
    model.config._attn_implementation = record.attn_implementation
    for norm, forward in record.norms:
        if forward is None:
            del norm.forward
        else:
            norm.forward = forward
    record.hook.remove()
    delattr(model, RECORD)
    return model
