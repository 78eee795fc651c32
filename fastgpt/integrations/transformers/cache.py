"""transformers' dynamic KV cache with room behind its keys and values.

A ``DynamicCache`` makes a new tensor of all keys and one of all values at every token and layer
(``torch.cat``). Here new ones are written behind the old, and the old are copied only when the room, half as
much again as there was, is used up. What the layers hold and return is a view (batch, nheads_k, seqlen,
headdim); all that can be done with them, cropping or choosing beams, is as it was.
"""

from __future__ import annotations

import threading
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers.cache_utils import (
    DynamicCache,
    DynamicLayer,
    DynamicSlidingWindowLayer,
    EncoderDecoderCache,
)

LEAST_ROOM = 64  # tokens


_claims = threading.Lock()


class Stretch(NamedTuple):
    """Rows of a buffer, (batch, rows, nheads_k, headdim), and where those that are claimed end in it."""

    rows: Tensor
    buffer: Tensor
    end: int

    def first(self, length: int) -> Tensor:
        """(batch, nheads_k, length, headdim)."""
        return self.rows.narrow(1, 0, length).transpose(1, 2)


class Room:
    """A tensor (batch, capacity, nheads_k, headdim) that a layer's keys, or its values, are a view of."""

    def __init__(self) -> None:
        self.buffer = torch.empty(0, 0, 0, 0)
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
        stretch = self.claim(past if length else new[:, :, :0], count)
        stretch.rows[:, length : length + count] = new.transpose(1, 2)
        return stretch.first(length + count)

    def claim(self, past: Tensor, count: int) -> Stretch:
        """The rows of past, copied if there is no room behind them, and room for ``count`` more, which are
        nobody else's from then on."""
        length = past.shape[2]
        with _claims:  # of a shallow copy, another thread may have the same room
            start = self._start(past) if length else None
            if start is None or start + length != self.used or self.used + count > self.buffer.shape[1]:
                self._fresh(past, past.shape[0], length + count)[:, :, :length] = past
                start = 0
            self.used = start + length + count
            return Stretch(self.buffer[:, start:] if start else self.buffer, self.buffer, self.used)

    def release(self, stretch: Stretch, count: int) -> None:
        """Gives up the last ``count`` rows of a stretch, if none has been claimed behind them."""
        with _claims:
            if self.buffer is stretch.buffer and self.used == stretch.end:
                self.used -= count

    def select(self, past: Tensor, index: Tensor) -> Tensor:
        """``past.index_select(0, index)``, with room behind it."""
        with _claims:
            rows = self._fresh(past, len(index), past.shape[2])
        return torch.index_select(past, 0, index.to(past.device), out=rows)

    def _fresh(self, like: Tensor, batch: int, length: int) -> Tensor:
        """(batch, nheads_k, length, headdim), of a new buffer."""
        capacity = length + max(length // 2, LEAST_ROOM)
        self.buffer, self.used = like.new_empty(batch, capacity, like.shape[1], like.shape[3]), length
        return self.buffer[:, :length].transpose(1, 2)

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

    def claim(self: Any, count: int) -> tuple[Stretch, Stretch, int] | None:
        """For who writes ``count`` new keys and values by himself: their rows, behind as many as are told.
        None where :meth:`update` has to do it."""
        if not self.is_initialized or _traced() or getattr(self, "record_past", False):
            return None
        keys, values = self.keys, self.values
        if keys.dim() != 4 or keys.shape[:3] != values.shape[:3] or not keys.shape[2]:
            return None
        return self.room[0].claim(keys, count), self.room[1].claim(values, count), keys.shape[2]

    def settle(self: Any, claimed: tuple[Stretch, Stretch, int], count: int, written: bool) -> None:
        """After :meth:`claim`: whether they have been written."""
        keys, values, length = claimed
        if written:
            self.hold(keys.first(length + count), values.first(length + count), count)
            return
        self.keys, self.values = keys.first(length), values.first(length)  # which may be copies, with room
        for room, stretch in zip(self.room, (keys, values), strict=True):
            room.release(stretch, count)

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


UPDATE: Any = DynamicCache.update  # before anybody puts another in its place, and None if somebody has
UPDATE = UPDATE if UPDATE.__module__ == DynamicCache.__module__ else None
IN_PLACE: dict[Any, Any] = {
    DynamicLayer: InPlaceLayer,
    DynamicSlidingWindowLayer: InPlaceSlidingWindowLayer,
}


def layer_in_place(cache: Any, index: int | None) -> Any:
    """The layer of a cache, if it appends in place, and nothing else happens in its update; None else."""
    if type(cache).update is not UPDATE or "update" in vars(cache) or cache.offloading:
        return None
    if index is None or index >= len(cache.layers):
        return None
    layer = cache.layers[index]
    return (
        layer
        if type(layer) in (InPlaceLayer, InPlaceSlidingWindowLayer) and "update" not in vars(layer)
        else None
    )


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
