"""Attention for transformers' ``AttentionInterface``, and what stands there for its masks.

Padding and caches that are longer than what they hold become ranges of keys, windows stay windows: only what
is neither becomes a dense mask.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from fastgpt import dispatch
from fastgpt.ops.attention.api import attention
from fastgpt.ops.checks import unit_rows

if TYPE_CHECKING:
    from transformers import PreTrainedModel

NAME = "fastgpt"
PROBE = "fastgpt_probe"  # an attention that keeps what it is given: probe.py
RANGES = torch.uint32  # the dtype of masks that are ranges of keys: nobody else's masks have it
# What some architectures pass to an attention function and this one does not compute: T5's bias, the keys
# that DeepSeek-V3.2 and MiniMax-M3 choose, Inkling's logit for each query. And where continuous batching
# writes in its cache: no mask tells its sequences apart (batching.py does).
REFUSED = ("position_bias", "indices", "block_indices", "sinks", "write_index")
TRANSFORMERS_OWN = frozenset({"sdpa", "flash_attn", "flex_attn"})  # its attentions beside eager


def attentions(model: type[PreTrainedModel]) -> frozenset[str]:
    """Which of TRANSFORMERS_OWN a class of models works with. Where it is none, an attention function and a
    mask are not all of the model's attention: DeepSeek-V4 appends keys to those that the mask is made for.
    """
    return frozenset(name for name in TRANSFORMERS_OWN if getattr(model, f"_supports_{name}"))


@functools.lru_cache
def _attentions_of(config: type) -> frozenset[str]:
    """The same of all classes of models that have a config of such a class."""
    from transformers import PreTrainedModel

    def below(kind: type[PreTrainedModel]) -> Iterator[type[PreTrainedModel]]:
        for child in kind.__subclasses__():
            yield from (child, *below(child))

    found = [attentions(kind) for kind in below(PreTrainedModel) if kind.config_class is config]
    return frozenset().union(*found) if found else TRANSFORMERS_OWN


@torch.compiler.assume_constant_result
def attentions_of(config: Any) -> frozenset[str]:
    return _attentions_of(type(config))  # type: ignore[arg-type]  # mypy: no class is hashable


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
    if kwargs.get("output_attentions"):
        raise ValueError("output_attentions: got True, expected False: fastgpt's attention stores no weights")
    kind = query.device.type
    if torch.is_autocast_enabled(kind) and query.dtype != torch.float64:
        # As scaled_dot_product_attention does: rotary tables in float32 widen queries and keys alone.
        query, key, value = (x.to(torch.get_autocast_dtype(kind)) for x in (query, key, value))
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    ranges = bias = None
    if attention_mask is not None and attention_mask.dtype == RANGES:
        # As the mask was asked for, whatever the module says: PaliGemma's is causal, but not in a prompt.
        causal = attention_mask.shape[1] == 1
        if attention_mask.shape[2] > 1:  # some architectures say their window in the mask alone (Phi-MoE)
            sliding_window = attention_mask.shape[2] - 1
        if attention_mask.shape[3]:
            ranges = attention_mask[:, 0, 0].view(torch.int32).T.contiguous()  # leftpad_k, seqused_k
    elif attention_mask is not None:
        if attention_mask.dtype != torch.bool and not attention_mask.dtype.is_floating_point:
            raise TypeError(f"attention_mask: got {attention_mask.dtype}, expected bool or floating point")
        bias, causal, sliding_window = attention_mask, False, None  # the mask has it all
    width = -1 if sliding_window is None else sliding_window - 1
    out = attention(
        unit_rows(query.transpose(1, 2)),
        unit_rows(key.transpose(1, 2)),
        unit_rows(value.transpose(1, 2)),
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
    config: Any = None,
    **kwargs: Any,
) -> Tensor | None:
    """A mask function of transformers' ``AttentionMaskInterface``.

    Returns:
        None, where the module's ``is_causal`` says all, unlike with ``sdpa`` also for several queries behind
        a cache. Else, for windows, padding before or behind each sequence and caches that are longer than
        what they hold, (batch, 1, 1 + window, 2), uint32: each sequence's first key and one past its last,
        with window 0 for none; the second dimension is 2 where queries see the keys behind their own, too;
        the last is 0 where all keys are meant.
        Else (batch, 1, q_length, kv_length), bool, True where a key is visible.

    Raises:
        TypeError: the config is of a model whose attention transformers does not let others compute.
    """
    works_with = attentions_of(config)
    if not works_with:
        raise TypeError(
            f"attn_implementation: got a name of fastgpt's for a model with {type(config).__name__}, whose "
            "attention transformers does not let others compute; expected 'eager'"
        )
    from transformers.masking_utils import prepare_padding_mask, sdpa_mask

    pattern = _pattern(mask_function)
    window = local_size or 0 if pattern == "window" else 0
    end = kv_length if pattern == "bidirectional" else q_offset + q_length - kv_offset
    # A model that computes with the mask itself (Doge, DeepSeek-V3.2, T5Gemma 2) asks for it, and works with
    # no flash-attention, which has none. Static caches ask too, for single queries.
    if pattern == "bidirectional":
        dense = not allow_is_bidirectional_skip and "flash_attn" not in works_with
    else:
        dense = not allow_is_causal_skip and (q_length > 1 or "flash_attn" not in works_with)
    if pattern is not None and not dense and (pattern != "window" or window > 0):
        padding = prepare_padding_mask(attention_mask, kv_length, kv_offset)
        tokens = None if padding is None else padding[:, kv_offset : kv_offset + kv_length]
        whole = isinstance(end, int) and end == kv_length
        if tokens is not None and not torch.compiler.is_compiling() and bool(tokens[:, : int(end)].all()):
            tokens = None
        if tokens is None and whole and (pattern != "bidirectional" or allow_is_bidirectional_skip):
            if pattern != "window" or kv_length <= window:
                return None
            return torch.empty(batch_size, 1, 1 + window, 0, dtype=RANGES, device=device)
        ranges = _key_ranges(pattern, end, tokens, batch_size, device)
        if ranges is not None:
            return ranges.view(RANGES).expand(-1, 1 + (pattern == "bidirectional"), 1 + window, -1)
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
        config=config,
        **kwargs,
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
    AttentionInterface.register(PROBE, record)
    return name


def record(
    module: Any, query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any
) -> tuple[Tensor, None]:
    """An attention function that keeps what it is given, and returns what it is told to."""
    recorder = module._fastgpt_recorder
    recorder.attended = query, key, value, kwargs
    return recorder.out, None


Implementations = list[tuple[Any, str | None]]


def implementations(config: Any) -> Implementations:
    """Of a config and of the configs in it, what attention they ask for."""
    found = [(config, config._attn_implementation)]
    for name in config.sub_configs:
        if (part := getattr(config, name, None)) is not None:
            found += implementations(part)
    return found


def restore(found: Implementations) -> None:
    for config, implementation in found:  # a config sets those in it, which come after it
        config._attn_implementation = implementation
