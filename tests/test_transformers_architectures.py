"""Architectures that ask of attention what decoders like Llama do not: encoders, cross-attention, windows and
masks of their own; and what fastgpt's attention refuses."""

import copy

import pytest
import torch
import transformers
from backends import assert_parity

import fastgpt

SHAPE = {
    "vocab_size": 101,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
GROUPED = SHAPE | {"num_key_value_heads": 2}


@pytest.fixture
def ids():
    return torch.randint(3, 101, (2, 19), generator=torch.Generator().manual_seed(3))


def randomized(model):
    """With weights large enough that every part of the model shows in what it computes."""
    torch.manual_seed(7)
    with torch.no_grad():
        for p in model.parameters():
            p.nan_to_num_().add_(
                torch.randn_like(p), alpha=0.2
            )  # NaN: what transformers leaves uninitialized
    return model.eval()


def with_attention(model, implementation):
    model = copy.deepcopy(model)
    model.set_attn_implementation(implementation)
    return model


@torch.no_grad()
@pytest.mark.parametrize("padding", [0, 5])
def test_a_window_that_the_mask_alone_says(ids, padding):
    experts = {"num_local_experts": 2, "num_experts_per_tok": 2}  # a choice would turn on rounding
    config = transformers.PhimoeConfig(**GROUPED, **experts, sliding_window=4)
    config._experts_implementation = "eager"  # the others have no float64
    model = randomized(transformers.AutoModelForCausalLM.from_config(config))
    mask = torch.ones_like(ids)
    mask[0, :padding] = 0
    options = {"attention_mask": mask, "position_ids": (mask.cumsum(1) - 1).clamp(min=0)}
    real = mask.bool()

    expected = copy.deepcopy(model).double()(ids, **options).logits[real]
    other = with_attention(model, "eager")(ids, **options).logits[real]
    got = with_attention(model, fastgpt.register())(ids, **options).logits[real]
    assert_parity("logits", got, other, expected)


VISION = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3, "num_attention_heads": 4}
VISION |= {"image_size": 16, "patch_size": 4}
# These compute with the mask themselves.
WITH_THE_MASK = {
    "doge": lambda: transformers.DogeForCausalLM(transformers.DogeConfig(**GROUPED)),
    "t5gemma2": lambda: transformers.T5Gemma2ForConditionalGeneration(
        transformers.T5Gemma2Config(
            encoder={"text_config": GROUPED | {"head_dim": 16}, "vision_config": VISION},
            decoder=GROUPED
            | {
                "head_dim": 16,
                "sliding_window": 4,
                "layer_types": ["sliding_attention", "full_attention"] * 2,
            }
            | {"num_hidden_layers": 4},
        )
    ),
}


@torch.no_grad()
@pytest.mark.parametrize("name", WITH_THE_MASK)
@pytest.mark.parametrize("padding", [0, 5])
def test_a_mask_that_the_model_computes_with(ids, padding, name):
    stock = randomized(WITH_THE_MASK[name]())
    model = with_attention(stock, fastgpt.register())
    mask = torch.ones_like(ids)
    mask[0, :padding] = 0
    options = {"attention_mask": mask} | ({"decoder_input_ids": ids[:, 5:9]} if name == "t5gemma2" else {})
    expected, other, got = (
        m(ids, **options).logits
        for m in (copy.deepcopy(stock).double(), with_attention(stock, "eager"), model)
    )
    real = mask.bool() if name == "doge" else ...
    assert_parity("logits", got[real], other[real], expected[real])

    def generate(model, **options):
        return model.generate(ids, attention_mask=mask, max_new_tokens=8, do_sample=False, **options).tolist()

    tokens = generate(stock)
    assert generate(model) == tokens
    assert generate(model, cache_implementation="static", disable_compile=True) == tokens


EXPERTS_FREE = {"num_experts_per_tok": 2, "moe_intermediate_size": 16, "mlp_layer_types": ["dense"] * 3}
LATENT = {"kv_lora_rank": 8, "q_lora_rank": 8, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8}
INDEXER = {"index_topk": 4, "index_head_dim": 16, "index_n_heads": 4}
OWN_ATTENTION = {
    "indices": transformers.DeepseekV32Config(
        **SHAPE, **EXPERTS_FREE, **LATENT, **INDEXER, layer_types=["indexed_attention"] * 3
    ),
    "position_bias": transformers.T5Config(
        d_model=32, d_kv=8, d_ff=32, num_layers=1, num_heads=4, vocab_size=101
    ),
}


@torch.no_grad()
@pytest.mark.parametrize("argument", OWN_ATTENTION)
@pytest.mark.parametrize("tokens", [19, 1])
def test_attention_that_fastgpt_has_not_is_refused(ids, argument, tokens):
    ids = ids[:, :tokens]
    config = OWN_ATTENTION[argument]
    kind = (
        transformers.AutoModelForSeq2SeqLM if config.is_encoder_decoder else transformers.AutoModelForCausalLM
    )
    model = kind.from_config(config, attn_implementation=fastgpt.register()).eval()
    inputs = {"decoder_input_ids": ids} if config.is_encoder_decoder else {}
    with pytest.raises(
        ValueError, match=rf"^{argument}: got a value for \w+Attention, fastgpt's attention has only"
    ):
        model(ids, **inputs)


@torch.no_grad()
def test_attention_that_appends_keys_of_its_own_is_refused(ids):
    config = transformers.DeepseekV4Config(
        **SHAPE, moe_intermediate_size=32, n_routed_experts=4, num_experts_per_tok=2, head_dim=16
    )
    kind = transformers.AutoModelForCausalLM
    with pytest.raises(TypeError, match=r"^model: got DeepseekV4ForCausalLM, whose attention"):
        fastgpt.patch(kind.from_config(config))
    model = kind.from_config(config, attn_implementation=fastgpt.register()).eval()
    for call in (model, model.generate):
        with pytest.raises(
            TypeError, match=r"^attn_implementation: got .* DeepseekV4Config, whose attention"
        ):
            call(ids)


@torch.no_grad()
@pytest.mark.parametrize("way", ["patch", "attn_implementation"])
def test_a_model_around_one_whose_attention_others_may_compute(ids, way):
    """GOT-OCR2 says of itself that it works with none of transformers'; its language model does with all."""
    tower = {"output_channels": 16, "mlp_dim": 96, "global_attn_indexes": [1], "window_size": 2}
    config = transformers.GotOcr2Config(
        vision_config=VISION | tower | {"image_size": 64, "patch_size": 16},
        text_config=GROUPED | {"model_type": "qwen2"},
        image_token_id=100,
    )
    kind = transformers.GotOcr2ForConditionalGeneration
    model = randomized(kind._from_config(config, attn_implementation="eager"))
    ids[ids == 100] = 99
    ids[:, 7] = 100
    mask = torch.ones_like(ids)
    mask[0, -5:] = 0
    inputs = {"input_ids": ids, "attention_mask": mask, "pixel_values": torch.randn(2, 3, 64, 64)}
    expected, other = result(copy.deepcopy(model).double(), inputs), result(model, inputs)
    if way == "patch":
        fastgpt.patch(model)
        assert model.config.vision_config._attn_implementation == "eager"
    else:
        model.set_attn_implementation(fastgpt.register())
    assert model.config.text_config._attn_implementation == "fastgpt"
    assert_parity("logits", result(model, inputs), other, expected)


@pytest.mark.parametrize("training", [False, True])
def test_weights_of_attention_are_refused(ids, training):
    config = transformers.LlamaConfig(**SHAPE)
    model = transformers.LlamaForCausalLM(config).train(training)
    model.set_attn_implementation(fastgpt.register())
    with pytest.raises(ValueError, match=r"^output_attentions: got True, expected False"):
        model(ids, output_attentions=True)
    with pytest.raises(ValueError, match="output_attentions"):  # by transformers
        model.config.output_attentions = True
    model.set_attn_implementation("sdpa")
    fastgpt.patch(model)
    for part in (model, model.model):
        with pytest.raises(ValueError, match=r"^output_attentions: got True, expected False"):
            part(ids, output_attentions=True)
    with pytest.raises(ValueError, match=r"^output_attentions: got True, expected False"):
        model.generate(ids, max_new_tokens=1, output_attentions=True, return_dict_in_generate=True)


LAYERS = {"encoder_layers": 2, "decoder_layers": 2, "encoder_ffn_dim": 96, "decoder_ffn_dim": 96}
TRANSLATOR = LAYERS | {"d_model": 64, "encoder_attention_heads": 4, "decoder_attention_heads": 4}
# Of each: its class, its configuration, and what it takes beside tokens and their mask.
OTHERS = {
    "bert": (transformers.BertModel, transformers.BertConfig(**SHAPE), ()),
    "bert-decoder": (transformers.BertLMHeadModel, transformers.BertConfig(**SHAPE, is_decoder=True), ()),
    "bert-cross": (
        transformers.BertLMHeadModel,
        transformers.BertConfig(**SHAPE, is_decoder=True, add_cross_attention=True),
        ("encoder_hidden_states", "encoder_attention_mask"),
    ),
    "modernbert": (
        transformers.ModernBertModel,
        transformers.ModernBertConfig(**SHAPE, local_attention=4),
        (),
    ),
    "gpt2-cross": (
        transformers.GPT2LMHeadModel,
        transformers.GPT2Config(n_embd=64, n_layer=2, n_head=4, vocab_size=101, add_cross_attention=True),
        ("encoder_hidden_states", "encoder_attention_mask"),
    ),
    "vit": (transformers.ViTModel, transformers.ViTConfig(**VISION), ("pixel_values",)),
    "clip": (
        transformers.CLIPModel,
        transformers.CLIPConfig(text_config=SHAPE, vision_config=VISION, projection_dim=32),
        ("pixel_values",),
    ),
    "bart": (
        transformers.BartForConditionalGeneration,
        transformers.BartConfig(**TRANSLATOR, vocab_size=101, pad_token_id=0, decoder_start_token_id=2),
        ("decoder_input_ids",),
    ),
    "whisper": (
        transformers.WhisperForConditionalGeneration,
        transformers.WhisperConfig(
            **TRANSLATOR, vocab_size=101, pad_token_id=0, num_mel_bins=8, max_source_positions=20
        ),
        ("input_features", "decoder_input_ids"),
    ),
}


@pytest.fixture(params=OTHERS)
def other(request, ids):
    """A model, the arguments of a call, and which rows of its result are no padding."""
    kind, config, names = OTHERS[request.param]
    mask = torch.ones_like(ids)
    mask[1, -4:] = 0
    ids[:, 8] = 2  # the text's end, whose row CLIP takes
    given = {
        "encoder_hidden_states": torch.randn(2, 19, 64),
        "encoder_attention_mask": mask,
        "pixel_values": torch.randn(2, 3, 16, 16),
        "input_features": torch.randn(2, 8, 40),
        "decoder_input_ids": ids[:, :7],
    }
    inputs = {name: given[name] for name in names}
    if not {"input_features", "encoder_hidden_states"} & inputs.keys() and request.param != "vit":
        inputs |= {"input_ids": ids, "attention_mask": mask}
    elif "encoder_hidden_states" in inputs:
        inputs["input_ids"] = ids[:, :7]
    return randomized(kind(config)), inputs


def result(model, inputs):
    """(rows, width): of the tokens that are no padding."""
    found = model(**{k: v.to(model.dtype) if v.is_floating_point() else v for k, v in inputs.items()})
    rows = next(found[name] for name in ("logits_per_image", "logits", "last_hidden_state") if name in found)
    mask = inputs.get("attention_mask")
    return rows[mask.bool()] if mask is not None and rows.shape[:2] == mask.shape else rows.flatten(0, -2)


@torch.no_grad()
def test_encoders_and_cross_attention(other):
    model, inputs = other
    expected = result(copy.deepcopy(model).double(), inputs)
    plain = result(with_attention(model, "eager"), inputs)
    got = result(with_attention(model, fastgpt.register()), inputs)
    assert_parity("output", got, plain, expected)
    if model._supports_attention_backend:
        assert_parity("output", result(fastgpt.patch(copy.deepcopy(model)), inputs), plain, expected)
    else:  # BART, Whisper
        with pytest.raises(TypeError, match=r"^model: got \w+, whose attention transformers does not let"):
            fastgpt.patch(model)


def test_gradients_of_encoders_and_cross_attention(other):
    model, inputs = other
    dout = torch.randn_like(result(model, inputs))

    def gradients(model):
        """Of each layer's parameters together: a bias is the weight of an input of 1. That of keys by itself
        would be all rounding: softmax does not see what keys have in common."""
        result(model, inputs).backward(dout.to(model.dtype))
        layers = {}
        for name, p in model.named_parameters():
            if p.grad is not None:
                layers.setdefault(name.rpartition(".")[0], []).append(p.grad.flatten())
        return {name: torch.cat(grads) for name, grads in layers.items()}

    expected = gradients(copy.deepcopy(model).double())
    plain = gradients(with_attention(model, "eager"))
    got = gradients(with_attention(model, fastgpt.register()))
    assert got.keys() == expected.keys()
    for name, grad in got.items():
        assert_parity(name, grad, plain[name], expected[name], factor=3)


@pytest.mark.parametrize("beams", [1, 3])
def test_tokens_of_an_encoder_and_decoder(ids, beams):
    kind, config, _ = OTHERS["bart"]
    model = randomized(kind(config))
    mask = torch.ones_like(ids)
    mask[1, -4:] = 0

    def generate(model):
        options = {"num_beams": beams, "max_new_tokens": 8, "do_sample": False, "eos_token_id": None}
        return model.generate(ids, attention_mask=mask, **options)

    assert torch.equal(generate(with_attention(model, fastgpt.register())), generate(model))


@torch.no_grad()
def test_a_prompt_that_is_not_causal_of_modules_that_are(ids):
    vision = VISION | {"model_type": "siglip_vision_model", "projection_dim": 64}
    text = GROUPED | {"model_type": "gemma", "head_dim": 16}
    config = transformers.PaliGemmaConfig(
        text_config=text, vision_config=vision, projection_dim=64, image_token_index=101
    )
    model = randomized(transformers.PaliGemmaForConditionalGeneration(config))
    mask = torch.ones_like(ids)
    mask[0, :5] = 0
    inputs = {"input_ids": ids, "attention_mask": mask}
    expected = result(copy.deepcopy(model).double(), inputs)
    plain = result(with_attention(model, "eager"), inputs)
    got = result(with_attention(model, fastgpt.register()), inputs)
    assert_parity("logits", got, plain, expected)


def test_causal_masks_of_modules_that_are_not_causal(ids):
    """generate() makes them for an encoder, too, with a static cache."""
    model = randomized(transformers.BertLMHeadModel(transformers.BertConfig(**SHAPE)))
    mask = torch.ones_like(ids)
    mask[0, :5] = 0

    def logits(model):
        options = {"cache_implementation": "static", "disable_compile": True, "do_sample": False}
        options |= {"return_dict_in_generate": True, "output_logits": True, "eos_token_id": None}
        return torch.stack(model.generate(ids, attention_mask=mask, max_new_tokens=4, **options).logits)

    expected = logits(copy.deepcopy(model).double())
    plain, got = (logits(with_attention(model, name)) for name in ("eager", fastgpt.register()))
    assert_parity("logits", got, plain, expected)


@torch.no_grad()
def test_norms_of_what_a_convolution_made():
    model = randomized(transformers.SiglipVisionModel(transformers.SiglipVisionConfig(**VISION)))
    inputs = {"pixel_values": torch.randn(2, 3, 16, 16)}
    expected = result(copy.deepcopy(model).double(), inputs)
    plain = result(with_attention(model, "eager"), inputs)
    assert_parity("output", result(fastgpt.patch(model), inputs), plain, expected)
