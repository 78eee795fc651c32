"""transformers' dynamic KV cache with room behind its keys and values.

A ``DynamicCache`` makes a new tensor of all keys and one of all values at every token and layer
(``torch.cat``). Here new ones are written behind the old, and the old are copied only when the room, half as
much again as there was, is used up. What the layers hold and return is a view (batch, nheads_k, seqlen,
headdim); all that can be done with them, cropping or choosing beams, is as it was.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import (
    DynamicCache,
    DynamicLayer,
    DynamicSlidingWindowLayer,
    EncoderDecoderCache,
)

LEAST_ROOM = 64  # tokens


class Room:
    """A tensor (batch, capacity, nheads_k, headdim) that a layer's keys, or its values, are a view of."""

    def __init__(self) -> None:
        self.buffer = self.rows = torch.empty(0, 0, 0, 0)  # rows: (batch, nheads_k, capacity, headdim)
        self.used = 0  # rows, which somebody may hold, even if they have been cropped since

    def append(self, past: Tensor, new: Tensor) -> Tensor:
        """``torch.cat((past, new), -2)`` for (batch, nheads_k, seqlen, headdim); past, if it is a view of the
        buffer, is not copied."""
        batch, nheads_k, count, headdim = new.shape
        length = past.shape[2] if past.dim() == 4 else 0  # a layer begins with torch.tensor([])
        if length and (past.dtype != new.dtype or past.device != new.device):
            return torch.cat((past, new), -2)  # which promotes or refuses them
        if length and past.shape != (batch, nheads_k, length, headdim):
            return torch.cat((past, new), -2)
        if length:
            self.reserve(past, count)
        else:
            self._fresh(new, batch, count)
            self.used = 0
        self.buffer[:, self.used : self.used + count] = new.transpose(1, 2)
        return self.extend(length, count)

    def reserve(self, past: Tensor, count: int) -> bool:
        """Makes room for ``count`` rows behind those of past; whether that has copied them."""
        length, start = past.shape[2], self._start(past)
        if start is not None and start + length == self.used and self.used + count <= self.buffer.shape[1]:
            return False
        self._fresh(past, past.shape[0], length + count)[:, :, :length] = past
        self.used = length
        return True

    def extend(self, length: int, count: int) -> Tensor:
        """(batch, nheads_k, length + count, headdim): the last rows, and those written behind them."""
        self.used += count
        return self.rows.narrow(2, self.used - length - count, length + count)

    def last(self, length: int) -> Tensor:
        """(batch, length and the room behind it, nheads_k, headdim): the last rows."""
        return self.buffer if self.used == length else self.buffer[:, self.used - length :]

    def select(self, past: Tensor, index: Tensor) -> Tensor:
        """``past.index_select(0, index)``, with room behind it."""
        rows = self._fresh(past, len(index), past.shape[2])
        return torch.index_select(past, 0, index.to(past.device), out=rows)

    def _fresh(self, like: Tensor, batch: int, length: int) -> Tensor:
        """(batch, nheads_k, length, headdim), of a new buffer."""
        capacity = length + max(length // 2, LEAST_ROOM)
        self.buffer, self.used = like.new_empty(batch, capacity, like.shape[1], like.shape[3]), length
        self.rows = self.buffer.transpose(1, 2)
        return self.rows[:, :, :length]

    def _start(self, past: Tensor) -> int | None:
        """The row of the buffer that past begins at; None if past is not its rows, or they are read-only."""
        buffer = self.buffer
        if past.dtype != buffer.dtype or (buffer.is_inference() and not torch.is_inference_mode_enabled()):
            return None
        batch, capacity, nheads_k, headdim = buffer.shape
        by_batch, by_row, by_head, by_element = buffer.stride()
        # What lies at an address in the buffer is the buffer's; copies, and what was set anew, lie elsewhere.
        start, rest = divmod(past.data_ptr() - buffer.data_ptr(), by_row * buffer.element_size())
        length = past.shape[2]
        is_rows = rest == 0 and 0 <= start <= capacity - length
        is_rows = is_rows and past.shape == (batch, nheads_k, length, headdim)
        return start if is_rows and past.stride() == (by_batch, by_head, by_row, by_element) else None


def _traced() -> bool:
    """Whether backward may need what an append would write next to, or a graph is traced."""
    return torch.is_grad_enabled() or torch.compiler.is_compiling()


class InPlace:
    """What both kinds of layers add to their parents, whose methods serve while gradients are enabled or a
    graph is traced."""

    keys: Tensor
    values: Tensor

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.room = Room(), Room()

    def update(
        self: Any, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        # With record_past, a layer with a window holds more than that, for assisted decoding.
        if _traced() or getattr(self, "record_past", False):
            return super().update(key_states, value_states, *args, **kwargs)  # type: ignore[misc]
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        keys = self.room[0].append(self.keys, key_states)
        values = self.room[1].append(self.values, value_states)
        self.hold(keys, values, key_states.shape[2])
        return keys, values

    def reserve(self: Any, count: int) -> tuple[Tensor, Tensor, int] | None:
        """For who writes ``count`` new keys and values by himself, and then calls :meth:`extend`: the rows
        (batch, capacity, nheads_k, headdim) of both, and how many of them are held. None where :meth:`update`
        has to do it.
        """
        if not self.is_initialized or _traced() or getattr(self, "record_past", False):
            return None
        (for_keys, for_values), keys, values = self.room, self.keys, self.values
        if keys.dim() != 4 or keys.shape[:3] != values.shape[:3] or not keys.shape[2]:
            return None
        length = keys.shape[2]
        if for_keys.reserve(keys, count):
            self.keys = for_keys.extend(length, 0)
        if for_values.reserve(values, count):
            self.values = for_values.extend(length, 0)
        return for_keys.last(length), for_values.last(length), length

    def extend(self: Any, count: int) -> None:
        length = self.keys.shape[2]
        self.hold(self.room[0].extend(length, count), self.room[1].extend(length, count), count)

    def hold(self, keys: Tensor, values: Tensor, count: int) -> None:
        """Keeps what the next call needs of all keys, ``count`` of which are new."""
        self.keys, self.values = keys, values

    def reorder_cache(self, beam_idx: Tensor) -> None:
        if self.keys is None or not self.keys.numel() or _traced():
            super().reorder_cache(beam_idx)  # type: ignore[misc]
        else:
            self.keys = self.room[0].select(self.keys, beam_idx)
            self.values = self.room[1].select(self.values, beam_idx)


class InPlaceLayer(InPlace, DynamicLayer):
    pass


class InPlaceSlidingWindowLayer(InPlace, DynamicSlidingWindowLayer):
    def hold(self, keys: Tensor, values: Tensor, count: int) -> None:
        self.cumulative_length += count
        self.keys, self.values = (t[:, :, -self.sliding_window + 1 :] for t in (keys, values))


IN_PLACE: dict[Any, Any] = {
    DynamicLayer: InPlaceLayer,
    DynamicSlidingWindowLayer: InPlaceSlidingWindowLayer,
}


def append_in_place(cache: Any) -> None:
    """Makes the layers of a DynamicCache append in place, with what they hold. Other caches, among them those
    that offload or quantise, stay as they are."""
    if isinstance(cache, EncoderDecoderCache):
        cache = cache.self_attention_cache
    if type(cache) is not DynamicCache or cache.offloading:
        return
    replicated = cache.layer_class_to_replicate
    cache.layer_class_to_replicate = IN_PLACE.get(replicated, replicated)
    for i, layer in enumerate(cache.layers):
        if (kind := IN_PLACE.get(type(layer))) is not None:
            cache.layers[i] = kind.__new__(kind)
            vars(cache.layers[i]).update(vars(layer), room=(Room(), Room()))
