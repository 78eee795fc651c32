"""KV caches for decoding with :func:`fastgpt.attention_with_kvcache`."""

from __future__ import annotations

import torch
from torch import Tensor

from fastgpt.ops.checks import FLOATING
from fastgpt.ops.decode.api import attention_with_kvcache


class KVCache:
    """The keys and values of all layers of a model, preallocated and appended to in place.

    Attributes:
        k: (num_layers, batch, capacity, nheads_k, headdim).
        v: (num_layers, batch, capacity, nheads_k, headdim_v).
        seqlens: (batch), int32: tokens of each sequence that every layer holds.

    A step runs :meth:`attend` once per layer with the same tokens, then :meth:`advance` once.
    """

    def __init__(
        self,
        num_layers: int,
        batch: int,
        capacity: int,
        nheads_k: int,
        headdim: int,
        *,
        headdim_v: int | None = None,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> None:
        headdim_v = headdim if headdim_v is None else headdim_v
        sizes = {"num_layers": num_layers, "batch": batch, "capacity": capacity, "nheads_k": nheads_k}
        for name, size in {**sizes, "headdim": headdim, "headdim_v": headdim_v}.items():
            if isinstance(size, bool) or not isinstance(size, int) or size < 1:
                raise ValueError(f"{name}: got {size!r}, expected an integer of at least 1")
        if dtype not in FLOATING:
            raise TypeError(f"dtype: got {dtype}, expected float32, bfloat16, float16 or float64")
        shape = (num_layers, batch, capacity, nheads_k)
        self.k = torch.empty(*shape, headdim, dtype=dtype, device=device)
        self.v = torch.empty(*shape, headdim_v, dtype=dtype, device=device)
        self.seqlens = torch.zeros(batch, dtype=torch.int32, device=device)

    @property
    def capacity(self) -> int:
        return self.k.shape[2]

    def attend(
        self,
        layer: int,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        window_size: tuple[int, int] = (-1, -1),
        softmax_scale: float | None = None,
        backend: str | None = None,
    ) -> Tensor:
        """Appends k, v (batch, seqlen, nheads_k, headdim) to a layer; causal attention of q over it.

        Until :meth:`advance`, a second call for the same layer overwrites the first one's tokens.

        Raises:
            ValueError: the new tokens do not fit; the layer is unchanged. There is no such layer.
        """
        if not 0 <= layer < self.k.shape[0]:
            raise ValueError(f"layer: got {layer}, expected 0 to {self.k.shape[0] - 1}")
        return attention_with_kvcache(  # type: ignore[return-value]
            q,
            self.k[layer],
            self.v[layer],
            k,
            v,
            cache_seqlens=self.seqlens,
            window_size=window_size,
            softmax_scale=softmax_scale,
            backend=backend,
        )

    def advance(self, tokens: int) -> None:
        """Counts ``tokens`` more tokens, once every layer has appended them.

        Raises:
            ValueError: ``tokens`` is negative, or (on the CPU) more than the cache holds.
        """
        room = self.capacity
        if self.seqlens.device.type == "cpu" and not torch.compiler.is_compiling():
            room -= int(self.seqlens.max())
        if not 0 <= tokens <= room:
            raise ValueError(f"tokens: got {tokens}, expected 0 to {room}")
        self.seqlens += tokens

    def truncate(self, tokens: int) -> None:
        """Forgets all but the first ``tokens`` tokens of every sequence.

        Raises:
            ValueError: ``tokens`` is negative or beyond the capacity.
        """
        if not 0 <= tokens <= self.capacity:
            raise ValueError(f"tokens: got {tokens}, expected 0 to {self.capacity}")
        self.seqlens.clamp_(max=tokens)
