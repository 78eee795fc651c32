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
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

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
# What some architectures pass to an attention function and this one does not compute.
REFUSED = ("position_bias", "cache")


@dataclasses.dataclass
class Patch:
    """What :func:`patch` has changed in a model, for :func:`unpatch`."""

    attn_implementation: str | None
    backend: str | None
    norms: list[tuple[nn.Module, Any]]  # each with the `forward` of its instance, None if it had none
    hook: torch.utils.hooks.RemovableHandle | None

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        register(self.backend)  # a model that is unpickled may be the first in its process


def attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
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
        sliding_window: how many keys a query sees where the mask is not one by itself, its own among them.
        softcap: the scores become ``softcap · tanh(scores / softcap)`` (Gemma 2).
        s_aux: (nheads): a logit that joins the softmax's denominator (GPT-OSS's sinks).

    Returns:
        out (batch, seqlen_q, nheads, headdim), and None for the weights, which are never stored.
    """
    for name in REFUSED:
        if kwargs.get(name) is not None:
            raise ValueError(
                f"{name}: got a value for {type(module).__name__}, fastgpt's attention has only None"
            )
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    ranges = bias = None
    if attention_mask is not None and attention_mask.dtype == torch.int32:
        ranges = attention_mask[:, 0, 0].T.contiguous()  # leftpad_k, seqused_k
    elif attention_mask is not None:
        bias, causal, sliding_window = attention_mask, False, None  # the mask has it all
    width = -1 if sliding_window is None else sliding_window - 1
    out = attention(
        query.transpose(1, 2),
        key.transpose(1, 2),
        value.transpose(1, 2),
        causal=causal,
        softmax_scale=scaling,
        window_size=(width, 0 if causal else width),
        softcap=softcap or 0.0,
        sink=None if s_aux is None else s_aux.float(),
        attn_bias=bias,
        dropout_p=dropout,
        leftpad_k=None if ranges is None else ranges[0],
        seqused_k=None if ranges is None else ranges[1],
        backend=backend,
    )
    return out, None  # type: ignore[return-value]  # one tensor without return_lse


def _pattern(mask_function: Callable[..., Any]) -> str | None:
    """causal, window or bidirectional: what transformers builds its masks from, if it is nothing else."""
    from transformers import masking_utils

    if mask_function is masking_utils.causal_mask_function:
        return "causal"
    if mask_function is masking_utils.bidirectional_mask_function:
        return "bidirectional"
    of_window: Any = masking_utils.sliding_window_causal_mask_function(1)
    if torch.compiler.is_compiling() or getattr(mask_function, "__code__", None) is not of_window.__code__:
        return None
    # Both are and_masks(...): of which functions?
    both: Any = (mask_function, of_window)
    parts, windows = (f.__closure__[0].cell_contents for f in both)
    same = [getattr(part, "__code__", None) for part in parts] == [part.__code__ for part in windows]
    return "window" if same else None


def _key_ranges(
    pattern: str,
    end: int | Tensor,
    tokens: Tensor | None,
    batch_size: int,
    device: torch.device | str,
) -> Tensor | None:
    """(batch, 1, 1, 2), int32: which keys are a sequence's, the first one and one past the last; None if they
    are no such range, or unknown while a graph is traced.

    Args:
        end: one past the last query's own key.
        tokens: (batch, kv_length), bool: which keys are no padding; None for all.
    """
    if tokens is None:
        first = torch.zeros(batch_size, dtype=torch.int32, device=device)
        last = torch.full_like(first, end) if isinstance(end, int) else end.to(first).expand(batch_size)
        return torch.stack((first, last), -1)[:, None, None]
    if torch.compiler.is_compiling():
        return None
    last = torch.full_like(tokens[:, 0], int(end), dtype=torch.int32)
    tokens = tokens[:, : int(end)]
    count = tokens.sum(-1, dtype=torch.int32)
    place = torch.arange(tokens.shape[1], device=tokens.device)
    first = torch.where(tokens, place, tokens.shape[1]).amin(-1).int()
    past = torch.where(tokens, place + 1, 0).amax(-1).int()
    if bool((past - first.clamp(max=past) != count).any()):
        return None  # padding between tokens
    if pattern == "bidirectional":
        return torch.stack((first.clamp(max=past), past), -1)[:, None, None]
    if bool(((past == last) | (count == 0)).all()):
        return torch.stack((first, last), -1)[:, None, None]
    # Padding behind a sequence: its own queries, which come before, see none of it.
    return torch.stack((first * 0, last), -1)[:, None, None] if not bool(first.any()) else None


def attention_mask(
    *,
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int | Tensor = 0,
    kv_offset: int | Tensor = 0,
    mask_function: Callable[..., Any],
    attention_mask: Tensor | None = None,
    local_size: int | None = None,
    allow_is_causal_skip: bool = True,
    allow_is_bidirectional_skip: bool = False,
    device: torch.device | str = "cpu",
    **kwargs: Any,
) -> Tensor | None:
    """A mask function of transformers' ``AttentionMaskInterface``.

    Returns:
        None, where the module's ``is_causal`` and window say all, unlike with ``sdpa`` also for several
        queries behind a cache. Else, for padding before or behind each sequence and for caches that are
        longer than what they hold, (batch, 1, 1, 2), int32: each sequence's first key and one past its last.
        Else (batch, 1, q_length, kv_length), bool, True where a key is visible.
    """
    from transformers.masking_utils import prepare_padding_mask, sdpa_mask

    pattern = _pattern(mask_function)
    if pattern is not None:
        end = kv_length if pattern == "bidirectional" else q_offset + q_length - kv_offset
        padding = prepare_padding_mask(attention_mask, kv_length, kv_offset)
        tokens = None if padding is None else padding[:, kv_offset : kv_offset + kv_length]
        whole = isinstance(end, int) and end == kv_length
        if tokens is not None and not torch.compiler.is_compiling() and bool(tokens[:, : int(end)].all()):
            tokens = None
        if tokens is None and whole and (pattern != "bidirectional" or allow_is_bidirectional_skip):
            return None
        ranges = _key_ranges(pattern, end, tokens, batch_size, device)
        if ranges is not None:
            return ranges
    return sdpa_mask(
        batch_size=batch_size,
        q_length=q_length,
        kv_length=kv_length,
        q_offset=q_offset,
        kv_offset=kv_offset,
        mask_function=mask_function,
        attention_mask=attention_mask,
        local_size=local_size,
        allow_is_causal_skip=False,
        device=device,
        **kwargs,
    )


class Norm(NamedTuple):
    """What a module computes, in fastgpt's terms."""

    fused: Callable[..., Any]
    eps: float
    one_more: bool  # the weight is 1 more than the parameter (Gemma)


def _norm_forward(
    module: nn.Module, original: Callable[[Tensor], Tensor], norm: Norm, backend: str | None, x: Tensor
) -> Tensor:
    weight: Any = module.weight
    bias: Any = getattr(module, "bias", None)
    # Mixed precision has rules of its own about the output's dtype.
    if x.dtype != weight.dtype or torch.is_autocast_enabled(x.device.type):
        return original(x)
    if norm.one_more:
        weight = 1.0 + weight.float()
    return norm.fused(x, weight, bias, norm.eps, backend=backend)


@torch.no_grad()
def _norm_of(module: nn.Module) -> Norm | None:
    """What a norm computes, if fastgpt has it: by its class, or, of transformers' many RMS norms, by what it
    makes of a few rows."""
    weight: Any = getattr(module, "weight", None)
    if type(module) is nn.LayerNorm:
        known = len(module.normalized_shape) == 1 and weight is not None
        return Norm(layer_norm, module.eps, False) if known else None
    eps: Any = getattr(module, "variance_epsilon", getattr(module, "eps", None))
    is_rms = "RMSNorm" in type(module).__name__ and isinstance(eps, float) and not list(module.children())
    if not is_rms or [name for name, _ in module.named_parameters()] != ["weight"] or weight.dim() != 1:
        return None
    if weight.is_meta or not weight.dtype.is_floating_point:
        return None
    # Not random numbers, which the user would miss.
    x = torch.arange(4.0 * len(weight), device=weight.device).sin().view(4, -1).to(weight.dtype)
    expected, tolerance = module(x), 4 * torch.finfo(weight.dtype).eps
    for one_more in (False, True):
        got = nn.functional.rms_norm(x.float(), weight.shape, weight.float() + float(one_more), eps)
        if torch.allclose(expected.float(), got, rtol=tolerance, atol=tolerance):
            return Norm(rms_norm, eps, one_more)
    return None


def _refuse_output_attentions(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    if kwargs.get("output_attentions"):
        raise ValueError(
            "output_attentions: got True, expected False in a patched model: fastgpt's attention never "
            "stores the weights; call fastgpt.unpatch(model) and load it with attn_implementation='eager'"
        )


def register(backend: str | None = None) -> str:
    """Makes "fastgpt" an ``attn_implementation`` of transformers, for this process.

        fastgpt.register()
        model = AutoModelForCausalLM.from_pretrained(path, attn_implementation="fastgpt")

    Args:
        backend: which of fastgpt's; the name is then ``fastgpt_`` and it. Default ``FASTGPT_BACKEND``, else
            ``auto``.

    Returns:
        the name.
    """
    dispatch.requested(backend)  # refuses a name that is not a backend
    from transformers import AttentionInterface, AttentionMaskInterface

    name = NAME if backend is None else f"{NAME}_{backend}"
    AttentionInterface.register(name, functools.partial(attention_forward, backend=backend))
    AttentionMaskInterface.register(name, attention_mask)
    return name


def patch(model: Model, *, attention: bool = True, norm: bool = True, backend: str | None = None) -> Model:
    """Swaps attention and norms of a loaded transformers model for fastgpt's, in place, and prints which.

    Attention is that of every architecture that lets transformers choose it: masks, windows, softcap and
    sinks included. Norms are nn.LayerNorm and RMS norms, known by what they compute. Calls that fastgpt's
    kernels do not have run on torch's or the reference backend, as :func:`fastgpt.attention` chooses. In
    bfloat16 and float16 a Llama norm is rounded once where transformers rounds it twice.

    Args:
        model: on any device, of any dtype, with any head.
        attention, norm: what is swapped.
        backend: of all of them; default ``FASTGPT_BACKEND``, else ``auto``.

    Returns:
        model itself.

    Raises:
        TypeError: the model is none of transformers', or its attention is its own (``attention=False`` takes
            it).
        ValueError: the model is patched already, shares its config with a patched one, or its config asks
            for ``output_attentions``.
    """
    from transformers import PreTrainedModel

    kind = type(model).__name__
    if not isinstance(model, PreTrainedModel):
        raise TypeError(f"model: got {kind}, expected a transformers model (PreTrainedModel)")
    if attention and not model._supports_attention_backend:
        raise TypeError(
            f"model: got {kind}, whose attention transformers does not let others compute; "
            "attention=False patches its norms"
        )
    dispatch.requested(backend)  # refuses a name that is not a backend
    previous = model.config._attn_implementation
    if hasattr(model, RECORD):
        raise ValueError(f"model: got a {kind} that is patched, expected one that is not")
    if previous is not None and previous.startswith(NAME):
        raise ValueError("model: its config asks for fastgpt already; does it share it with a patched model?")
    if attention and model.config.output_attentions:
        raise ValueError(
            "model: got output_attentions=True in its config, fastgpt's attention stores no weights"
        )

    norms: list[tuple[nn.Module, Any]] = []
    left: set[str] = set()
    for module in model.modules() if norm else ():
        what = _norm_of(module)
        if what is not None:
            norms.append((module, vars(module).get("forward")))
            # A partial and not a closure: it follows the module through copy.deepcopy and pickle.
            module.forward = functools.partial(_norm_forward, module, module.forward, what, backend)
        elif "Norm" in type(module).__name__:
            left.add(type(module).__name__)
    said = [f"{len(norms)} norms"] if norm else []
    if left:
        said.append(f"left as they are: {', '.join(sorted(left))}")
    if attention:
        hook = model.register_forward_pre_hook(_refuse_output_attentions, with_kwargs=True)
        setattr(model, RECORD, Patch(previous, backend, norms, hook))
        model.config._attn_implementation = register(backend)
        said.insert(0, f"{sum('is_causal' in vars(module) for module in model.modules())} attentions")
    else:
        setattr(model, RECORD, Patch(previous, backend, norms, None))
    print(f"fastgpt: patched {kind}: {', '.join(said)}")
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
    if record.hook is not None:
        record.hook.remove()
    delattr(model, RECORD)
    return model
