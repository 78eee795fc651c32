"""From transformers' GPT-2 and Llama models to :class:`fastgpt.GPT`: the config and the weights."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fastgpt.gpt.config import GPTConfig, RopeScaling

if TYPE_CHECKING:
    from transformers import GPT2Config, LlamaConfig, PreTrainedModel

# Config fields that change the model and the values of them that GPT has.
GPT2_FIELDS = {
    "activation_function": ("gelu_new", "gelu_pytorch_tanh"),
    "scale_attn_weights": (True,),
    "scale_attn_by_inverse_layer_idx": (False,),
    "reorder_and_upcast_attn": (False,),
    "add_cross_attention": (False,),
}
LLAMA_FIELDS = {"hidden_act": ("silu", "swish"), "sliding_window": (None,), "is_causal": (True,)}


def config_from_hf(model: PreTrainedModel) -> GPTConfig:
    """The shape of a transformers model; the errors are those of :meth:`fastgpt.GPT.from_hf`."""
    import transformers

    # A subclass may compute something else.
    if type(model) is transformers.GPT2LMHeadModel:
        read = _gpt2
    elif type(model) is transformers.LlamaForCausalLM:
        read = _llama
    else:
        raise TypeError(f"model: got {type(model).__name__}, expected GPT2LMHeadModel or LlamaForCausalLM")
    embedding = model.get_input_embeddings().weight
    shape: dict[str, Any] = {
        "vocab_size": embedding.shape[0],
        "hidden_size": embedding.shape[1],
        "max_seqlen": model.config.max_position_embeddings,
        "num_layers": model.config.num_hidden_layers,
        "nheads": model.config.num_attention_heads,
        "tied": model.get_output_embeddings().weight is embedding,
    }
    return read(model.config, shape)


def _check_fields(config: object, fields: Mapping[str, tuple[object, ...]]) -> None:
    for name, accepted in fields.items():
        value = getattr(config, name, accepted[0])
        if value not in accepted:
            expected = " or ".join(map(repr, accepted))
            raise ValueError(f"{name}: got {value!r} in the model's config, GPT has only {expected}")


def _gpt2(config: GPT2Config, shape: dict[str, Any]) -> GPTConfig:
    _check_fields(config, GPT2_FIELDS)
    return GPTConfig(**shape, intermediate_size=config.n_inner or 0, norm_eps=config.layer_norm_epsilon)


def _llama(config: LlamaConfig, shape: dict[str, Any]) -> GPTConfig:
    _check_fields(config, LLAMA_FIELDS)
    rope = config.rope_parameters
    kind = rope.get("rope_type", "default")
    if kind not in ("default", "llama3"):
        raise ValueError(f"rope_type: got {kind!r} in the model's config, GPT has only 'default' or 'llama3'")
    rotated = rope.get("partial_rotary_factor", 1.0)
    if rotated != 1.0:
        raise ValueError(f"partial_rotary_factor: got {rotated} in the model's config, GPT has only 1.0")
    scaling = None
    if kind == "llama3":
        scaling = RopeScaling(
            rope["factor"],
            rope["low_freq_factor"],
            rope["high_freq_factor"],
            rope["original_max_position_embeddings"],
        )
    return GPTConfig.llama(
        **shape,
        nheads_k=config.num_key_value_heads,
        headdim=config.head_dim,
        intermediate_size=config.intermediate_size,
        norm_eps=config.rms_norm_eps,
        rope_theta=rope["rope_theta"],
        rope_scaling=scaling,
        attention_bias=config.attention_bias,
        mlp_bias=config.mlp_bias,
    )


# For the modules of a block, those of transformers that they are made of, one below the other.
GPT2_BLOCK = {
    "attention_norm": ("ln_1",),
    "attention.qkv": ("attn.c_attn",),
    "attention.out": ("attn.c_proj",),
    "mlp_norm": ("ln_2",),
    "mlp.up": ("mlp.c_fc",),
    "mlp.down": ("mlp.c_proj",),
}
LLAMA_BLOCK = {
    "attention_norm": ("input_layernorm",),
    "attention.qkv": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "attention.out": ("self_attn.o_proj",),
    "mlp_norm": ("post_attention_layernorm",),
    "mlp.up": ("mlp.gate_proj", "mlp.up_proj"),
    "mlp.down": ("mlp.down_proj",),
}


def weights_from_hf(model: PreTrainedModel) -> dict[str, Tensor]:
    """A state dict for the GPT of :func:`config_from_hf`, every tensor a copy."""
    llama = model.config.model_type == "llama"
    base = model.base_model
    weights = {}

    def convert(name: str, sources: list[torch.nn.Module]) -> None:
        for kind in ("weight", "bias"):
            parts = [
                getattr(source, kind).detach()
                for source in sources
                if getattr(source, kind, None) is not None
            ]
            if parts:
                fused = torch.cat(parts)  # GPT-2's are single: a Conv1D, (in, out)
                if not llama and fused.dim() == 2:
                    fused = fused.t()
                weights[f"{name}.{kind}"] = fused.clone(memory_format=torch.contiguous_format)

    for i, block in enumerate(base.layers if llama else base.h):
        for name, sources in (LLAMA_BLOCK if llama else GPT2_BLOCK).items():
            convert(f"blocks.{i}.{name}", [block.get_submodule(source) for source in sources])
    convert("norm", [base.norm if llama else base.ln_f])

    head, embedding = model.get_output_embeddings().weight, model.get_input_embeddings().weight
    weights["head.weight"] = head.detach().clone()
    if head is not embedding:
        weights["token_embedding.weight"] = embedding.detach().clone()
    if not llama:
        weights["position_embedding.weight"] = base.wpe.weight.detach().clone()
    return weights
