"""Continuous batching of transformers (``generate_batch``) on :func:`fastgpt.attention_varlen`.

Its manager takes an attention function by name alone: ``sdpa`` and ``paged|eager``, for which it fills dense
masks, and whatever has "flash" in its name, which gets the edges of the packed sequences instead. So a
patched model's config asks for such a name while the manager runs. No mask function is registered under it:
transformers then makes no mask.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
from collections.abc import Callable, Iterator
from typing import Any

from torch import Tensor, nn

from fastgpt.integrations.transformers.attention import implementations, restore
from fastgpt.ops.attention.api import attention_varlen


def paged_attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    *,
    cache: Any = None,
    cu_seq_lens_q: Tensor | None = None,
    backend: str | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """An attention function for transformers' ``PagedAttentionCache``.

    Args:
        query: (1, nheads, total_q, headdim), sequence behind sequence.
        key, value: (1, nheads_k, total_k, headdim), each sequence's own, as the cache gives them.
        cache: the ``PagedAttentionCache``, if it has not been given the new keys and values yet: before 5.24
            that was left to the attention function, and total_k is total_q.
        cu_seq_lens_q: (sequences + 1), int32.

    Returns:
        out (1, total_q, nheads, headdim), and None for the weights, which are never stored.
    """
    updated = isinstance(kwargs.get("cu_seq_lens_k"), Tensor)  # of all kinds of layers until then
    if cu_seq_lens_q is None or (cache is None and not updated):
        raise ValueError("cache: got None, expected the cache of transformers' continuous batching")
    if attention_mask is not None:
        raise ValueError(
            "attention_mask: got a value, expected None: sequences are told apart by cu_seq_lens_q"
        )
    if cache is not None:
        key, value = cache.update(
            key_states=key, value_states=value, layer_idx=module.layer_idx, kwargs=kwargs
        )
    width = -1 if sliding_window is None else sliding_window - 1
    out = attention_varlen(
        query[0].transpose(0, 1),
        key[0].transpose(0, 1),
        value[0].transpose(0, 1),
        cu_seqlens_q=cu_seq_lens_q,
        cu_seqlens_k=kwargs["cu_seq_lens_k"],  # the cache has put this layer's there
        softmax_scale=scaling,
        window_size=(width, 0),
        softcap=softcap or 0.0,
        sink=None if s_aux is None else s_aux.float(),
        backend=backend,
    )
    assert isinstance(out, Tensor)  # without return_lse
    return out[None], None


@contextlib.contextmanager
def continuous_batching(
    model: Any,
    original: Callable[..., contextlib.AbstractContextManager[Any]],
    backend: str | None,
    *args: Any,
    **kwargs: Any,
) -> Iterator[Any]:
    """``model.continuous_batching_context_manager``, in which the model's attention is the one above."""
    import transformers
    from transformers.generation.continuous_batching import PagedAttentionCache

    if "kwargs" not in inspect.signature(PagedAttentionCache.update).parameters:
        raise RuntimeError(
            f"generate_batch: got transformers {transformers.__version__}, whose paged cache takes indices "
            "from the attention function, expected a later one; without fastgpt, call fastgpt.unpatch(model)"
        )
    previous = implementations(model.config)
    name = f"{model.config._attn_implementation}_paged_flash"
    transformers.AttentionInterface.register(
        name, functools.partial(paged_attention_forward, backend=backend)
    )
    model.config._attn_implementation = name
    try:
        with original(*args, **kwargs) as manager:
            yield manager
    finally:
        restore(previous)
