"""A GPT in one file: GPT-2 and the Llama family on fastgpt's attention and norms.

Queries, keys and values are one projection, and so are gate and up: decoding one token reads every
weight once and does little else, and a large matrix is read faster than three small ones.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, overload

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastgpt.gpt import generate
from fastgpt.gpt.config import GPTConfig
from fastgpt.kv_cache import KVCache
from fastgpt.nn import all_are_hooked, is_itself, projection_of
from fastgpt.ops.attention.api import attention
from fastgpt.ops.few_rows import api as few_rows
from fastgpt.ops.few_rows import spec
from fastgpt.ops.norm.api import layer_norm, rms_norm

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class Linear(nn.Linear):
    """``nn.Linear`` that reads the weight at memory speed where there are only a few rows to multiply."""

    def forward(self, x: Tensor) -> Tensor:
        """x (..., in_features) to (..., out_features)."""
        out = few_rows.linear(x, self.weight, self.bias)
        return F.linear(x, self.weight, self.bias) if out is None else out


class Norm(nn.Module):
    """Layer or RMS norm of ``x + residual``; returns it and the sum, the next residual."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.norm = layer_norm if config.norm == "layer_norm" else rms_norm
        self.eps = config.norm_eps
        self.weight = nn.Parameter(torch.ones(config.hidden_size))
        self.bias = nn.Parameter(torch.zeros(config.hidden_size)) if config.norm == "layer_norm" else None

    def forward(self, x: Tensor, residual: Tensor | None, backend: str | None) -> tuple[Tensor, Tensor]:
        if residual is not None:
            x = x.to(residual.dtype)  # under autocast a projection's output is narrower than the embedding
        return self.norm(  # type: ignore[return-value]  # a pair with prenorm
            x, self.weight, self.bias, self.eps, residual=residual, prenorm=True, backend=backend
        )

    def of_few_rows(self) -> spec.Norm:
        return spec.Norm(self.norm is rms_norm, self.eps, self.weight, self.bias)


def residual_dropout(config: GPTConfig) -> nn.Module:
    return nn.Dropout(config.dropout) if config.dropout else nn.Identity()  # the cheaper call, when decoding


def rope_table(config: GPTConfig) -> Tensor:
    """(max_seqlen, 2, headdim), float32: for each position the cosines and the signed sines.

    With ``x = (x1, x2)`` cut into halves, RoPE is ``(x1 cos − x2 sin, x2 cos + x1 sin)``, that is
    ``x · (cos, cos) + (x2, x1) · (−sin, sin)``.
    """
    exponents = torch.arange(0, config.headdim, 2, dtype=torch.float32) / config.headdim
    frequencies = 1.0 / config.rope_theta**exponents  # rounded as in transformers: positions magnify it
    if (scaling := config.rope_scaling) is not None:
        periods = scaling.original_max_seqlen * frequencies / (2 * math.pi)  # in the original context
        kept = (periods - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
        kept = kept.clamp(0, 1)
        frequencies = frequencies * kept + frequencies / scaling.factor * (1 - kept)
    angles = torch.arange(config.max_seqlen, dtype=torch.float32)[:, None] * frequencies
    cos, sin = angles.cos(), angles.sin()
    return torch.stack((torch.cat((cos, cos), -1), torch.cat((-sin, sin), -1)), 1)


class Rope(NamedTuple):
    """Some rows of a :func:`rope_table`, as heads are multiplied by them: (batch, seqlen, 1, headdim)."""

    cos: Tensor
    signed_sin: Tensor
    rotary: spec.Rotary  # the second halves, where the sine has its own sign

    @classmethod
    def of(cls, rows: Tensor) -> Rope:
        cos, sin = rows.unbind(2)
        second = slice(rows.shape[-1] // 2, None)
        return cls(
            cos.unsqueeze(2), sin.unsqueeze(2), spec.Rotary(cos[..., second], sin[..., second], alike=True)
        )


class Attention(nn.Module):
    def __init__(self, config: GPTConfig, layer: int) -> None:
        super().__init__()
        self.layer = layer
        self.dropout = config.dropout
        self.nheads, self.nheads_k, self.headdim = config.nheads, config.nheads_k, config.headdim
        heads = self.nheads + 2 * self.nheads_k
        self.qkv = Linear(config.hidden_size, heads * self.headdim, config.attention_bias)
        self.out = Linear(self.nheads * self.headdim, config.hidden_size, config.attention_bias)

    def of_few_rows(self, before: spec.Norm) -> spec.Attention | None:
        qkv, out = projection_of(self.qkv, Linear), projection_of(self.out, Linear)
        if qkv is None or out is None or (self.training and self.dropout):
            return None
        return spec.Attention((qkv,), out, self.headdim**-0.5, around=spec.Around(before))

    def forward(self, x: Tensor, rope: Rope | None, cache: KVCache | None, backend: str | None) -> Tensor:
        qkv = self.qkv(x).unflatten(-1, (-1, self.headdim))
        qk, v = qkv.split((self.nheads + self.nheads_k, self.nheads_k), dim=2)
        if rope is not None:
            cos, sin = rope.cos, rope.signed_sin
            qk = torch.addcmul(qk * cos, qk.roll(self.headdim // 2, -1), sin)
            qk = qk.to(v.dtype)  # under autocast the table is wider than the projection's output
        q, k = qk.split((self.nheads, self.nheads_k), dim=2)
        if cache is None:
            out = attention(q, k, v, dropout_p=self.dropout if self.training else 0.0, backend=backend)
        else:
            # Under autocast the cache, of the weights' dtype, is wider than the projection's output.
            q, k, v = (t.to(cache.k.dtype) for t in (q, k, v))
            out = cache.attend(self.layer, q, k, v, backend=backend)
        return self.out(out.flatten(2))  # type: ignore[union-attr]  # one tensor without return_lse


class MLP(nn.Module):
    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.gated = config.mlp == "swiglu"
        self.width = config.intermediate_size
        self.up = Linear(config.hidden_size, (1 + self.gated) * self.width, config.mlp_bias)
        self.down = Linear(self.width, config.hidden_size, config.mlp_bias)

    def of_few_rows(self, before: spec.Norm) -> spec.Mlp | None:
        up, down = projection_of(self.up, Linear), projection_of(self.down, Linear)
        if up is None or down is None:
            return None
        return spec.Mlp(
            (up,), down, self.gated, "silu" if self.gated else "gelu_tanh", around=spec.Around(before)
        )

    def forward(self, x: Tensor) -> Tensor:
        x = self.up(x)
        if self.gated:
            gate, up = x.split(self.width, dim=-1)
            return self.down(F.silu(gate) * up)
        return self.down(F.gelu(x, approximate="tanh"))


class Block(nn.Module):
    """Attention, then MLP, each behind a norm that also adds what came before to the residual."""

    def __init__(self, config: GPTConfig, layer: int) -> None:
        super().__init__()
        self.attention_norm = Norm(config)
        self.attention = Attention(config, layer)
        self.mlp_norm = Norm(config)
        self.mlp = MLP(config)
        self.dropout = residual_dropout(config)

    def forward(
        self,
        x: Tensor,
        residual: Tensor | None,
        rope: Rope | None,
        cache: KVCache | None,
        backend: str | None,
    ) -> tuple[Tensor, Tensor | None]:
        if cache is not None and few_rows.are_few(x) and not torch.compiler.is_compiling():
            z = x if residual is None else x + residual
            if (out := self._of_few_rows(z, rope, cache, backend)) is not None:
                return out, None
        x, residual = self.attention_norm(x, residual, backend)
        x = self.dropout(self.attention(x, rope, cache, backend))
        x, residual = self.mlp_norm(x, residual, backend)
        return self.dropout(self.mlp(x)), residual

    def _of_few_rows(
        self, x: Tensor, rope: Rope | None, cache: KVCache, backend: str | None
    ) -> Tensor | None:
        """The whole block in one go, and its input added; None where that cannot be."""
        attention, mlp, dropout = self.attention, self.mlp, self.dropout
        kinds = ((self.attention_norm, Norm), (attention, Attention), (self.mlp_norm, Norm), (mlp, MLP))
        if not all(is_itself(module, kind) for module, kind in kinds) or type(cache) is not KVCache:
            return None
        drops = not is_itself(dropout, nn.Identity) and (
            not is_itself(dropout, nn.Dropout) or dropout.training
        )
        if drops or all_are_hooked():
            return None
        first = attention.of_few_rows(self.attention_norm.of_few_rows())
        second = mlp.of_few_rows(self.mlp_norm.of_few_rows())
        if first is None or second is None:
            return None
        past = spec.Cache(cache.k[attention.layer], cache.v[attention.layer], cache.seqlens)
        return few_rows.block(x, first, None if rope is None else rope.rotary, past, second, backend)


class GPT(nn.Module):
    """A decoder-only transformer (Radford et al. 2019; Touvron et al. 2023, arXiv:2302.13971).

    Pre-norm blocks on a residual stream; see :class:`GPTConfig` for the choices.

    With ``config.tied``, ``head.weight`` (vocab_size, hidden_size) is also the token embedding.

    Args:
        config: the shape. Weights start as GPT-2's: normal with standard deviation 0.02, divided by
            ``sqrt(2 · num_layers)`` where a projection writes to the residual stream; biases 0.
    """

    rope: Tensor | None

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.config = config
        self.token_embedding = None if config.tied else nn.Embedding(config.vocab_size, config.hidden_size)
        self.position_embedding = (
            nn.Embedding(config.max_seqlen, config.hidden_size) if config.positions == "learned" else None
        )
        self.dropout = residual_dropout(config)
        self.blocks = nn.ModuleList(Block(config, layer) for layer in range(config.num_layers))
        self.norm = Norm(config)
        self.head = Linear(config.hidden_size, config.vocab_size, bias=False)
        rope = rope_table(config) if config.positions == "rope" else None
        self.register_buffer("rope", rope, persistent=False)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        for name, parameter in self.named_parameters():
            if parameter.dim() == 2:
                residual = name.endswith(("attention.out.weight", "mlp.down.weight"))
                nn.init.normal_(
                    parameter, std=0.02 / math.sqrt(2 * self.config.num_layers) if residual else 0.02
                )
            elif name.endswith("bias"):
                nn.init.zeros_(parameter)

    @classmethod
    def from_hf(cls, model: PreTrainedModel) -> GPT:
        """A GPT with a copy of the weights of a loaded transformers model, in its dtype, on its device.

        Its logits are the original's up to rounding (without the original's dropout).

        Args:
            model: a ``GPT2LMHeadModel`` or ``LlamaForCausalLM``.

        Raises:
            TypeError: the model is of another class.
            ValueError: its config asks for what GPT does not have; the message names the field.
        """
        from fastgpt.gpt.weights import config_from_hf, weights_from_hf

        with torch.device("meta"):
            gpt = cls(config_from_hf(model))
        gpt.load_state_dict(weights_from_hf(model), assign=True)
        if gpt.rope is not None:
            gpt.rope = rope_table(gpt.config).to(gpt.head.weight)
        return gpt

    def embed(self, input_ids: Tensor, positions: Tensor) -> Tensor:
        table = (self.token_embedding or self.head).weight
        x = F.embedding(input_ids, table)
        return x if self.position_embedding is None else x + self.position_embedding(positions)

    @overload
    def forward(
        self,
        input_ids: Tensor,
        targets: None = None,
        *,
        cache: KVCache | None = None,
        last_only: bool = False,
        backend: str | None = None,
    ) -> Tensor: ...

    @overload
    def forward(
        self,
        input_ids: Tensor,
        targets: Tensor,
        *,
        cache: KVCache | None = None,
        last_only: bool = False,
        backend: str | None = None,
    ) -> tuple[Tensor, Tensor]: ...

    def forward(
        self,
        input_ids: Tensor,
        targets: Tensor | None = None,
        *,
        cache: KVCache | None = None,
        last_only: bool = False,
        backend: str | None = None,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Logits of the next token at every position.

        Args:
            input_ids: (batch, seqlen), int64.
            targets: (batch, seqlen), int64: the token that follows each position, −100 where none counts.
            cache: the keys and values of the tokens before input_ids, which come after them and are
                appended; from :meth:`new_cache`. For inference: no backward.
            last_only: logits of the last position only, (batch, 1, vocab_size).
            backend: of attention and norms; default ``FASTGPT_BACKEND``, else ``auto``.

        Returns:
            logits (batch, seqlen, vocab_size) in the weights' dtype, or autocast's; with targets also the
            mean cross-entropy, a float32 scalar.

        Raises:
            ValueError: an argument is not as above, or the sequence is longer than ``config.max_seqlen``
                or than the cache.
        """
        if input_ids.dim() != 2 or input_ids.shape[1] < 1:
            raise ValueError(f"input_ids: got shape {tuple(input_ids.shape)}, expected (batch, seqlen)")
        if targets is not None and (last_only or targets.shape != input_ids.shape):
            raise ValueError(
                f"targets: got shape {tuple(targets.shape)}, "
                f"expected {tuple(input_ids.shape)} like input_ids, without last_only"
            )
        seqlen, capacity = input_ids.shape[1], self.config.max_seqlen
        if seqlen > capacity:
            raise ValueError(f"input_ids: got {seqlen} tokens, expected at most max_seqlen {capacity}")
        if cache is not None:
            self._check_cache(cache, input_ids)

        positions = torch.arange(seqlen, device=input_ids.device)[None]
        if cache is not None:
            positions = positions + cache.seqlens[:, None]
        x, residual = self.dropout(self.embed(input_ids, positions)), None
        rope = None
        if self.rope is not None:
            rope = Rope.of(self.rope[positions])
        for block in self.blocks:
            x, residual = block(x, residual, rope, cache, backend)
        if cache is not None:
            cache.advance(seqlen)
        if last_only and residual is not None:
            x, residual = x[:, -1:], residual[:, -1:]
        logits = self.head(self.norm(x, residual, backend)[0])
        if targets is None:
            return logits
        return logits, F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten())

    def new_cache(self, batch: int, capacity: int) -> KVCache:
        """An empty cache for ``capacity`` tokens of each of ``batch`` sequences."""
        c, weight = self.config, self.head.weight
        first: Any = self.blocks[0]
        nheads_k = first.attention.nheads_k  # fewer than in config with tensor parallelism
        return KVCache(
            c.num_layers, batch, capacity, nheads_k, c.headdim, dtype=weight.dtype, device=weight.device
        )

    def _check_cache(self, cache: KVCache, input_ids: Tensor) -> None:
        if cache.capacity > self.config.max_seqlen:
            raise ValueError(
                f"cache: got capacity {cache.capacity}, expected at most max_seqlen {self.config.max_seqlen}"
            )
        if cache.seqlens.shape[0] != input_ids.shape[0]:
            raise ValueError(
                f"cache: got batch {cache.seqlens.shape[0]}, expected {input_ids.shape[0]} like input_ids"
            )
        # Attention refuses it as well, but only behind the look-up of the positions. Elsewhere than on the
        # CPU, reading the lengths would stall the device.
        if input_ids.device.type == "cpu" and not torch.compiler.is_compiling():
            seqlen, held = input_ids.shape[1], int(cache.seqlens.max())
            if held + seqlen > cache.capacity:
                raise ValueError(
                    f"input_ids: got {seqlen} tokens after the {held} in the cache, "
                    f"expected at most its capacity {cache.capacity} together"
                )

    def generate(
        self,
        input_ids: Tensor,
        max_new_tokens: int,
        *,
        temperature: float = 0.0,
        top_k: int | None = None,
        eos_token_id: int | Sequence[int] | None = None,
        generator: torch.Generator | None = None,
        backend: str | None = None,
    ) -> Tensor:
        """Continues prompts of equal length, under ``torch.inference_mode``.

        Args:
            input_ids: (batch, seqlen), int64.
            max_new_tokens: how many tokens to add at most; with the prompt at most ``config.max_seqlen``.
            temperature: the logits are divided by it before sampling; 0 takes the largest logit.
            top_k: sample among the k largest logits only; None for all. Ignored with temperature 0.
            eos_token_id: the token, or tokens, that end a sequence. One that ended before the others is
                filled up with the first of them.
            generator: for sampling; torch's default one if None.
            backend: as in :meth:`forward`.

        Returns:
            (batch, seqlen + new), int64: the prompts and their continuations; it ends where all have ended.

        Raises:
            TypeError: input_ids is no tensor, or of another dtype.
            ValueError: an argument is not as above; the message names it.
        """
        new = self.stream(
            input_ids,
            max_new_tokens,
            temperature=temperature,
            top_k=top_k,
            eos_token_id=eos_token_id,
            generator=generator,
            backend=backend,
        )
        return torch.cat((input_ids, torch.stack(list(new), 1)), 1)

    def stream(
        self,
        input_ids: Tensor,
        max_new_tokens: int,
        *,
        temperature: float = 0.0,
        top_k: int | None = None,
        eos_token_id: int | Sequence[int] | None = None,
        generator: torch.Generator | None = None,
        backend: str | None = None,
    ) -> Iterator[Tensor]:
        """:meth:`generate`, giving the new tokens, (batch), one step after the other."""
        return generate.stream(
            self,
            input_ids,
            max_new_tokens,
            temperature=temperature,
            top_k=top_k,
            eos_token_id=eos_token_id,
            generator=generator,
            backend=backend,
        )
