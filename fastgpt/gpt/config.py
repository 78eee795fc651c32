"""The shape of a GPT."""

from __future__ import annotations

import dataclasses
import math
from typing import Any, Literal, TypeGuard, get_args

Norm = Literal["layer_norm", "rms_norm"]
Mlp = Literal["gelu", "swiglu"]
Positions = Literal["learned", "rope"]


@dataclasses.dataclass(frozen=True)
class RopeScaling:
    """The stretching of RoPE's long wavelengths for long contexts (Llama 3.1, arXiv:2407.21783).

    Wavelengths above ``original_max_seqlen / low_freq_factor`` are multiplied by ``factor``, those below
    ``original_max_seqlen / high_freq_factor`` are kept, and in between the two are interpolated.
    """

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_seqlen: int

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            _check_number(f"rope_scaling.{field.name}", getattr(self, field.name))
        if self.high_freq_factor <= self.low_freq_factor:
            raise ValueError(
                f"rope_scaling.high_freq_factor: got {self.high_freq_factor}, expected more than "
                f"low_freq_factor {self.low_freq_factor}"
            )


@dataclasses.dataclass(frozen=True)
class GPTConfig:
    """The shape of a decoder-only transformer; the defaults are GPT-2's (124M).

    :meth:`llama` starts from the Llama family's choices instead.

    Attributes:
        vocab_size: number of tokens.
        max_seqlen: the longest sequence, prompt and continuation together.
        hidden_size: width of the residual stream.
        num_layers: number of blocks.
        nheads: query heads.
        nheads_k: key and value heads, a divisor of nheads (GQA, MQA); default nheads.
        headdim: default ``hidden_size / nheads``.
        intermediate_size: width of the MLP; default ``4 · hidden_size``.
        norm: ``layer_norm`` (with bias) or ``rms_norm`` (without), before attention, MLP and head.
        norm_eps: the norm's eps.
        mlp: ``gelu``: ``down(gelu(up(x)))``, the tanh approximation; ``swiglu``:
            ``down(silu(gate(x)) · up(x))`` (Shazeer 2020, arXiv:2002.05202).
        positions: ``learned``: an embedding is added to the input; ``rope``: queries and keys are rotated
            (Su et al. 2021, arXiv:2104.09864), the headdim being cut into halves, not into neighbours.
        rope_theta: RoPE's base.
        rope_scaling: RoPE's stretching, None for none.
        attention_bias, mlp_bias: whether the projections have biases.
        tied: whether the head's weight is the token embedding, one shared parameter.
        dropout: the probability of dropping, in training mode only, where GPT-2 does: of the embedding, of
            attention's probabilities, and of what attention and MLP add to the residual stream.

    Raises:
        ValueError: a field is not as above; the message names it.
    """

    vocab_size: int = 50257
    max_seqlen: int = 1024
    hidden_size: int = 768
    num_layers: int = 12
    nheads: int = 12
    nheads_k: int = 0
    headdim: int = 0
    intermediate_size: int = 0
    norm: Norm = "layer_norm"
    norm_eps: float = 1e-5
    mlp: Mlp = "gelu"
    positions: Positions = "learned"
    rope_theta: float = 10000.0
    rope_scaling: RopeScaling | None = None
    attention_bias: bool = True
    mlp_bias: bool = True
    tied: bool = True
    dropout: float = 0.0

    @classmethod
    def llama(cls, **fields: Any) -> GPTConfig:
        """The Llama family: RoPE, RMS norm, SwiGLU, no biases; ``fields`` say the rest or overrule these."""
        family: dict[str, Any] = {
            "norm": "rms_norm",
            "mlp": "swiglu",
            "positions": "rope",
            "attention_bias": False,
            "mlp_bias": False,
        }
        return cls(**(family | fields))

    def __post_init__(self) -> None:
        sizes = ("vocab_size", "max_seqlen", "hidden_size", "num_layers", "nheads")
        for name in sizes:
            check_size(name, getattr(self, name))
        if not self.headdim and self.hidden_size % self.nheads:
            raise ValueError(
                f"nheads: got {self.nheads}, expected a divisor of hidden_size {self.hidden_size}"
            )
        derived = {
            "nheads_k": self.nheads,
            "headdim": self.hidden_size // self.nheads,
            "intermediate_size": 4 * self.hidden_size,
        }
        for name, default in derived.items():
            if getattr(self, name) == 0:
                object.__setattr__(self, name, default)
            check_size(name, getattr(self, name))
        if self.nheads % self.nheads_k:
            raise ValueError(f"nheads_k: got {self.nheads_k}, expected a divisor of nheads {self.nheads}")
        for name, kind in (("norm", Norm), ("mlp", Mlp), ("positions", Positions)):
            if getattr(self, name) not in get_args(kind):
                expected = " or ".join(map(repr, get_args(kind)))
                raise ValueError(f"{name}: got {getattr(self, name)!r}, expected {expected}")
        if self.positions == "rope" and self.headdim % 2:
            raise ValueError(f"headdim: got {self.headdim}, expected an even number for positions='rope'")
        if self.rope_scaling is not None and self.positions != "rope":
            raise ValueError(f"rope_scaling: got {self.rope_scaling}, expected None without positions='rope'")
        _check_number("norm_eps", self.norm_eps)
        _check_number("rope_theta", self.rope_theta)
        if not is_number(self.dropout) or not 0 <= self.dropout < 1:
            raise ValueError(f"dropout: got {self.dropout!r}, expected a number from 0 to below 1")


def is_integer(value: object) -> TypeGuard[int]:
    return isinstance(value, int) and not isinstance(value, bool)


def is_number(value: object) -> TypeGuard[float]:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def check_size(name: str, value: object) -> None:
    if not is_integer(value) or value < 1:
        raise ValueError(f"{name}: got {value!r}, expected an integer of at least 1")


def _check_number(name: str, value: object) -> None:
    if not is_number(value) or not 0 < value < math.inf:
        raise ValueError(f"{name}: got {value!r}, expected a positive number")
