"""Blocks, attentions and MLPs of patched transformers models as one call each, where rows are few."""

from __future__ import annotations

import concurrent.futures
import copy
import pickle

import pytest
import torch
import transformers
from backends import assert_parity
from test_transformers import LAYERS, any_model, eager, random_model, served
from torch import nn
from torch.nn.utils import prune
from transformers.models.llama import modeling_llama

import fastgpt
from fastgpt.integrations.transformers import probe
from fastgpt.ops.few_rows import api as few_rows

__all__ = ["any_model", "served"]  # fixtures

BY_PARTS = ("gpt_neox", "gpt_oss")  # whose blocks are not one call
PROMPT, STEPS = 11, (1, 1, 2, 1, 3)  # tokens: two sequences, at most as many rows as bf16 has kernels for


@pytest.fixture
def ids():
    return torch.randint(1, 101, (2, PROMPT + sum(STEPS)))


def as_one(served):
    """How many calls for few rows were served, beside single products."""
    return {name: count for name, count in served.items() if count and name != "linear"}


def cached(model, ids, mask, **options):
    """The logits of what follows on the prompt, and the cache."""
    cache = transformers.DynamicCache(config=model.config)
    positions, end, logits = (mask.cumsum(1) - 1).clamp(min=0), 0, []
    for count in (PROMPT, *STEPS):
        part, end = slice(end, end + count), end + count
        given = {"attention_mask": mask[:, :end], "position_ids": positions[:, part], "cache": cache}
        logits.append(model(ids[:, part], **given, **options).logits)
    return torch.cat(logits[1:], 1), cache


def alone(model, ids, mask):
    """The same, sequence by sequence, without padding or a cache."""
    rows = [
        model(row[kept.bool()][None]).logits[:, -sum(STEPS) :] for row, kept in zip(ids, mask, strict=True)
    ]
    return torch.cat(rows)


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("padding", [0, 5])
def test_steps_of_every_architecture(any_model, ids, served, padding, dtype):
    mask = torch.ones_like(ids)
    mask[0, :padding] = 0
    any_model.to(dtype)
    expected, other = alone(copy.deepcopy(any_model).double(), ids, mask), alone(any_model, ids, mask)
    logits, cache = cached(fastgpt.patch(any_model), ids, mask)
    assert_parity("logits", logits, other, expected)
    by_parts = any_model.config.model_type in BY_PARTS
    assert as_one(served) == ({} if by_parts else {"block": LAYERS * len(STEPS)})
    assert cache.get_seq_length() == ids.shape[1]
    window = getattr(any_model.config, "sliding_window", None)
    held = [layer.keys.shape[2] for layer in cache.layers]
    assert all(n == ids.shape[1] or n == window - 1 for n in held)


@torch.no_grad()
def test_what_is_in_the_cache_is_what_the_steps_put_there(ids, served):
    model, mask = random_model("llama"), torch.ones_like(ids)
    _, expected = cached(model, ids, mask)
    _, cache = cached(fastgpt.patch(model), ids, mask)
    assert served["block"] == LAYERS * len(STEPS)
    for layer, other in zip(cache.layers, expected.layers, strict=True):
        torch.testing.assert_close(layer.keys, other.keys, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(layer.values, other.values, rtol=1e-4, atol=1e-4)


def hook(module, args, out):
    return None if isinstance(out, tuple) else out * 1.5


def another_forward(module):
    own = module.forward
    module.forward = lambda *args, **named: own(*args, **named) * 1.5


class Louder(nn.Linear):
    def forward(self, x):
        return super().forward(x) * 1.5


def of_another_class(parent, name):
    own = getattr(parent, name)
    other = Louder(own.in_features, own.out_features, own.bias is not None)
    other.load_state_dict(own.state_dict())
    setattr(parent, name, other)


def another_norm(layer, name):
    own = getattr(layer, name)
    other = modeling_llama.LlamaRMSNorm(len(own.weight), eps=0.5)
    other.load_state_dict(own.state_dict())
    setattr(layer, name, other)


# What a user may do to a model, and what of it is one call still: for the layer that it is done to, and the
# others.
CHANGES = {
    "a hook on a norm": (lambda m: m.input_layernorm.register_forward_hook(hook), "attention mlp"),
    "a hook on attention": (lambda m: m.self_attn.register_forward_hook(hook), "attention mlp"),
    "a hook before an MLP": (lambda m: m.mlp.register_forward_pre_hook(lambda *a: None), "attention mlp"),
    "a hook on an activation": (lambda m: m.mlp.act_fn.register_forward_hook(hook), "attention"),
    "a hook on a projection": (lambda m: m.self_attn.k_proj.register_forward_hook(hook), "mlp"),
    "another forward of a projection": (lambda m: another_forward(m.self_attn.o_proj), "mlp"),
    "another forward of a norm": (lambda m: another_forward(m.post_attention_layernorm), "attention mlp"),
    "another forward of an MLP": (lambda m: another_forward(m.mlp), "attention mlp"),
    "a projection of another class": (lambda m: of_another_class(m.mlp, "down_proj"), "attention"),
    "a pruned projection": (lambda m: prune.random_unstructured(m.self_attn.q_proj, "weight", 0.5), "mlp"),
    "another scale": (lambda m: setattr(m.self_attn, "scaling", 0.5), "mlp"),
    "an attention in training": (lambda m: m.self_attn.train(), "mlp"),
    "an MLP in training": (lambda m: m.mlp.train(), "attention"),
    "a layer in training": (lambda m: setattr(m, "training", True), "attention mlp"),
    "an attribute": (lambda m: setattr(m.mlp, "hidden_size", 65), "attention"),
    "an attribute that becomes a tensor": (
        lambda m: setattr(m.mlp, "hidden_size", torch.ones(2)),
        "attention",
    ),
    "a buffer": (lambda m: m.mlp.register_buffer("extra", torch.ones(2)), "attention"),
    "a norm with another eps": (lambda m: another_norm(m, "input_layernorm"), "attention mlp"),
    "another activation": (lambda m: setattr(m.mlp, "act_fn", nn.ReLU()), "attention"),
    "a weight of stride 2": (
        lambda m: setattr(m.mlp.up_proj.weight, "data", m.mlp.up_proj.weight.data.t().contiguous().t()),
        "attention",
    ),
}


@torch.no_grad()
@pytest.mark.parametrize("change", CHANGES)
def test_what_is_done_to_a_part_afterwards(ids, served, change):
    """Each on the first layer of a patched model, as on one that is not."""
    model, mask = random_model("llama"), torch.ones_like(ids)
    patched = fastgpt.patch(copy.deepcopy(model))
    for each in (model, patched):
        torch.manual_seed(1)  # of pruning
        CHANGES[change][0](each.model.layers[0])
    expected, _ = cached(model, ids, mask)
    served.clear()
    logits, cache = cached(patched, ids, mask)
    torch.testing.assert_close(logits, expected, rtol=1e-3, atol=1e-3)
    steps = len(STEPS)
    of_first = dict.fromkeys(CHANGES[change][1].split(), steps)
    assert as_one(served) == {"block": (LAYERS - 1) * steps, **of_first}
    assert [layer.keys.shape[2] for layer in cache.layers] == [ids.shape[1]] * LAYERS


@torch.no_grad()
@pytest.mark.parametrize(
    "how", ["hooks of all", "gradients", "profiler", "autocast", "dense mask", "output_hidden_states"]
)
def test_what_calls_are_served(ids, served, how):
    model, mask = random_model("llama"), torch.ones_like(ids)
    expected, _ = cached(model, ids, mask)
    fastgpt.patch(model)
    seen = []
    if how == "hooks of all":
        handle = nn.modules.module.register_module_forward_hook(
            lambda module, *rest: seen.append(type(module))
        )
        logits, _ = cached(model, ids, mask)
        handle.remove()
        assert seen.count(modeling_llama.LlamaMLP) == LAYERS * (1 + len(STEPS))
    elif how == "gradients":
        with torch.enable_grad():
            logits, _ = cached(model, ids, mask)
        assert logits.requires_grad
    elif how == "profiler":
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
            logits, _ = cached(model, ids, mask)
        seen = [event for event in profile.events() if event.name == "fastgpt::attention_fwd"]
        assert len(seen) == LAYERS * (1 + len(STEPS))
    elif how == "autocast":
        with torch.autocast("cpu", torch.bfloat16):
            logits, _ = cached(model, ids, mask)
            other, _ = cached(eager(fastgpt.unpatch(model)), ids, mask)
        assert_parity("logits", logits, other, expected, factor=3)
        assert not as_one(served)
        return
    elif how == "dense mask":
        cache, end, parts = transformers.DynamicCache(config=model.config), 0, []
        for count in (PROMPT, *STEPS):
            end += count
            visible = torch.ones(end, end, dtype=torch.bool).tril()[None, None, end - count :]
            part = ids[:, end - count : end]
            parts.append(model(part, attention_mask=visible.expand(2, -1, -1, -1), cache=cache).logits)
        logits = torch.cat(parts[1:], 1)
        assert as_one(served) == {"mlp": LAYERS * len(STEPS)}
        served.clear()
    else:  # the first such call leaves hooks on all layers and attentions
        for asked in (True, False):
            served.clear()
            cache = transformers.DynamicCache(config=model.config)
            out = [model(part, output_hidden_states=asked, cache=cache) for part in ids.split([11, 8], 1)]
            served.clear()
            logits = cached(model, ids, mask, output_hidden_states=asked)[0]
            torch.testing.assert_close(logits, expected, rtol=1e-3, atol=1e-3)
            parts = ("attention", "mlp") if asked else ("block",)
            assert as_one(served) == dict.fromkeys(parts, LAYERS * len(STEPS))
        cache = transformers.DynamicCache(config=model.config)
        out = [model(part, output_hidden_states=True, cache=cache) for part in ids.split([16, 3], 1)]
        fastgpt.unpatch(model)
        whole = model(ids, output_hidden_states=True).hidden_states
        for got, exact in zip(zip(*(o.hidden_states for o in out), strict=True), whole, strict=True):
            torch.testing.assert_close(torch.cat(got, 1), exact, rtol=1e-3, atol=1e-3)
        return
    torch.testing.assert_close(logits, expected, rtol=1e-3, atol=1e-3)
    assert not as_one(served)


@torch.no_grad()
def test_copies_and_pickles_of_patched_models(ids, served):
    for name in ("llama", "gpt2"):
        model, mask = random_model(name), torch.ones_like(ids)
        expected, _ = cached(model, ids, mask)
        fastgpt.patch(model)
        for other in (model, copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            served.clear()
            torch.testing.assert_close(cached(other, ids, mask)[0], expected, rtol=1e-3, atol=1e-3)
            assert as_one(served) == {"block": LAYERS * len(STEPS)}
            fastgpt.unpatch(other)
            served.clear()
            assert torch.equal(cached(other, ids, mask)[0], expected) and not as_one(served)


@torch.no_grad()
def test_a_refused_call_leaves_the_cache_as_it_was(ids, monkeypatch):
    model, mask = random_model("llama"), torch.ones_like(ids)
    expected, _ = cached(model, ids, mask)
    fastgpt.patch(model)
    for name in ("block", "attention", "mlp"):
        monkeypatch.setattr(few_rows, name, lambda *args: None)
    logits, cache = cached(model, ids, mask)
    torch.testing.assert_close(logits, expected, rtol=1e-3, atol=1e-3)
    assert all(room.used == ids.shape[1] for layer in cache.layers for room in layer.room)


@torch.no_grad()
def test_a_cache_that_branches(ids, served):
    """After a crop, and from a copy of which the other goes on, too: rows that somebody may hold stay."""
    model, mask = fastgpt.patch(random_model("llama")), torch.ones_like(ids)
    logits, cache = cached(model, ids, mask)
    kept = [layer.keys for layer in cache.layers], [layer.keys.clone() for layer in cache.layers]
    branch = copy.copy(cache)
    branch.layers = [copy.copy(layer) for layer in cache.layers]
    first = model(ids[:, :1], cache=cache).logits
    torch.testing.assert_close(model(ids[:, :1], cache=branch).logits, first)
    cache.crop(-2)
    again = model(ids[:, -1:], cache=cache).logits
    torch.testing.assert_close(again, logits[:, -1:], rtol=1e-3, atol=1e-3)
    assert served["block"] == LAYERS * (len(STEPS) + 3)
    assert all(map(torch.equal, *kept))


# What the probe knows


class ScaledAttention(modeling_llama.LlamaAttention):
    def forward(self, hidden_states, **named):
        out, weights = super().forward(hidden_states * 0.9, **named)
        return out, weights


class ScaledMlp(modeling_llama.LlamaMLP):
    def forward(self, x):
        return 0.9 * super().forward(x)


class Clipped(modeling_llama.LlamaMLP):
    def forward(self, x):
        return self.down_proj(self.act_fn(self.gate_proj(x)).clamp(max=0.3) * self.up_proj(x))


class FarClipped(modeling_llama.LlamaMLP):
    def forward(self, x):
        return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x).clamp(-50, 50))


class NotCausal(modeling_llama.LlamaAttention):
    def forward(self, hidden_states, **named):
        return super().forward(hidden_states, is_causal=False, **named)


class CappingLayer(modeling_llama.LlamaDecoderLayer):
    def forward(self, hidden_states, **named):
        x = self.input_layernorm(hidden_states)
        x = hidden_states + self.self_attn(hidden_states=x, softcap=2.0, **named)[0]
        return x + self.mlp(self.post_attention_layernorm(x))


class FactorLayer(modeling_llama.LlamaDecoderLayer):
    """With a factor that is 1 at first."""

    def forward(self, hidden_states, **named):
        return super().forward(hidden_states, **named) * self.factor


class ParallelLayer(modeling_llama.LlamaDecoderLayer):
    def forward(self, hidden_states, **named):
        x = self.input_layernorm(hidden_states)
        attended, _ = self.self_attn(hidden_states=x, **named)
        return hidden_states + attended + self.mlp(self.post_attention_layernorm(hidden_states))


def parts_of(layer):
    attention, mlp = probe.attention_of(layer.self_attn), probe.mlp_of(layer.mlp)
    known = ({layer.self_attn: attention} if attention else {}), ({layer.mlp: mlp} if mlp else {})
    return attention, mlp, probe.block_of(layer, *known)


def test_what_the_probe_takes_for_what_it_is():
    model = fastgpt.patch(random_model("llama"))
    layer = model.model.layers[1]
    assert all(parts_of(layer))
    for part, kind, lost in (
        (layer.self_attn, ScaledAttention, {0, 2}),
        (layer.mlp, ScaledMlp, {1, 2}),
        (layer.mlp, Clipped, {1, 2}),
        (layer.mlp, FarClipped, {1, 2}),
        (layer.self_attn, NotCausal, {0, 2}),
        (layer, CappingLayer, {2}),
        (layer, ParallelLayer, {2}),
    ):
        own, part.__class__ = type(part), kind
        assert {i for i, found in enumerate(parts_of(layer)) if found is None} == lost
        part.__class__ = own
    layer.extra = nn.Linear(3, 3)
    assert parts_of(layer)[2] is None


@pytest.mark.parametrize("kind", ["buffer", "parameter", "attribute"])
def test_tensors_of_its_own_may_change(kind):
    layer = fastgpt.patch(random_model("llama")).model.layers[1]
    layer.__class__ = FactorLayer
    if kind == "buffer":
        layer.register_buffer("factor", torch.ones(()))
    else:
        layer.factor = nn.Parameter(torch.ones(())) if kind == "parameter" else torch.ones(())
    assert [found is None for found in parts_of(layer)] == [False, False, True]


def test_factors_that_a_config_has():
    """Granite's, which are 1 unless it says otherwise: its attention's scale is any."""
    shape = {"hidden_size": 64, "num_attention_heads": 4, "num_hidden_layers": 2, "intermediate_size": 80}
    for options, whole in (
        ({}, True),
        ({"attention_multiplier": 0.3}, True),
        ({"residual_multiplier": 0.2}, False),
    ):
        model = transformers.GraniteForCausalLM(
            transformers.GraniteConfig(vocab_size=101, **shape, **options)
        )
        fastgpt.patch(model.eval())
        attention, mlp, block = parts_of(model.model.layers[0])
        assert attention is not None and mlp is not None and (block is not None) == whole
        assert attention.scaling == options.get("attention_multiplier", 1.0)


SMALL = {
    "vocab_size": 101,
    "hidden_size": 64,
    "num_attention_heads": 4,
    "num_hidden_layers": LAYERS,
    "intermediate_size": 80,
}


def of_config(config):
    torch.manual_seed(3)
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    return model


HALF = {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}
ROTATES_A_PART = {
    "phi3": lambda: transformers.Phi3Config(**SMALL, pad_token_id=0, rope_parameters=HALF),
    "nemotron": lambda: transformers.NemotronConfig(**SMALL, num_key_value_heads=4, rope_parameters=HALF),
}


@torch.no_grad()
@pytest.mark.parametrize("name", ROTATES_A_PART)
def test_rotary_of_a_part_of_each_head(ids, served, name):
    """Tables of half a head's columns are not those of which both halves of a head have the same."""
    model, mask = of_config(ROTATES_A_PART[name]()), torch.ones_like(ids)
    expected, _ = cached(model, ids, mask)
    logits, _ = cached(fastgpt.patch(model), ids, mask)
    torch.testing.assert_close(logits, expected, rtol=1e-3, atol=1e-3)
    assert not served["block"] and not served["attention"]


@pytest.mark.parametrize("clip", [None, 0.3, 8.0, 100.0])
def test_projections_that_a_config_clips(clip):
    model = fastgpt.patch(of_config(transformers.OlmoConfig(**SMALL, clip_qkv=clip)))
    assert (probe.attention_of(model.model.layers[0].self_attn) is None) == (clip is not None)


BEFORE = {
    "mlp": lambda m: m.mlp,
    "attention": lambda m: m.self_attn,
    "block": lambda m: m,
    "norm": lambda m: m.input_layernorm,
    "linear": lambda m: m.self_attn.v_proj,
    "activation": lambda m: m.mlp.act_fn,
}


@torch.no_grad()
@pytest.mark.parametrize("part", BEFORE)
def test_a_forward_of_an_instance_that_was_there_before(ids, served, part):
    model, mask = random_model("llama"), torch.ones_like(ids)
    module = BEFORE[part](model.model.layers[0])
    own = module.forward

    def louder(*args, **named):
        out = own(*args, **named)
        return (1.5 * out[0], *out[1:]) if isinstance(out, tuple) else 1.5 * out

    module.forward = louder
    expected, _ = cached(model, ids, mask)
    logits, _ = cached(fastgpt.patch(model), ids, mask)
    torch.testing.assert_close(logits, expected, rtol=1e-3, atol=1e-3)
    assert served["block"] == (LAYERS - 1) * len(STEPS)
    assert fastgpt.unpatch(model) is model and module.forward is louder


@torch.no_grad()
def test_a_forward_of_a_block_of_gpt2_that_was_there_before(ids):
    model, mask = random_model("gpt2"), torch.ones_like(ids)
    block = model.transformer.h[1]
    own = block.forward
    block.forward = lambda *args, **named: 1.5 * own(*args, **named)
    expected, _ = cached(model, ids, mask)
    torch.testing.assert_close(cached(fastgpt.patch(model), ids, mask)[0], expected, rtol=1e-3, atol=1e-3)


@torch.no_grad()
def test_dropout_that_is_no_module():
    """Starcoder 2's, in an MLP that is in training by itself."""
    model = fastgpt.patch(of_config(transformers.Starcoder2Config(**SMALL, residual_dropout=0.5)))
    mlp, x = model.model.layers[0].mlp, torch.randn(1, 2, 64)
    assert torch.equal(mlp(x), mlp(x))
    mlp.train()
    assert not torch.equal(mlp(x), mlp(x))


@torch.no_grad()
@pytest.mark.parametrize("part", ["attn.resid_dropout", "mlp.dropout"])
def test_hooks_on_dropout(ids, part):
    model, mask = random_model("gpt2"), torch.ones_like(ids)
    model.transformer.h[0].get_submodule(part).register_forward_hook(hook)
    expected, _ = cached(model, ids, mask)
    torch.testing.assert_close(cached(fastgpt.patch(model), ids, mask)[0], expected, rtol=1e-3, atol=1e-3)


@torch.no_grad()
def test_attributes_that_change_afterwards(ids):
    mask = torch.ones_like(ids)

    def change_factor(model):
        model.model.layers[0].residual_multiplier = 0.2

    def change_softcap(model):
        model.model.layers[0].self_attn.attn_logit_softcapping = 0.1

    for config, change in (
        (transformers.GraniteConfig(**SMALL), change_factor),
        (transformers.Gemma2Config(**SMALL, head_dim=16), change_softcap),
    ):
        model = of_config(config)
        patched = fastgpt.patch(copy.deepcopy(model))
        before, _ = cached(patched, ids, mask)
        change(model), change(patched)
        expected, _ = cached(model, ids, mask)
        torch.testing.assert_close(cached(patched, ids, mask)[0], expected, rtol=1e-3, atol=1e-3)
        assert not torch.allclose(before, expected, rtol=1e-2, atol=1e-2)


@torch.no_grad()
def test_an_activation_of_the_same_class(ids, served):
    model, mask = random_model("llama"), torch.ones_like(ids)
    for layer in model.model.layers:
        layer.mlp.act_fn = nn.GELU(approximate="tanh")
    fastgpt.patch(model)
    cached(model, ids, mask)
    assert served["block"] == LAYERS * len(STEPS)
    served.clear()
    model.model.layers[0].mlp.act_fn = nn.GELU()
    cached(model, ids, mask)
    assert as_one(served) == {"block": (LAYERS - 1) * len(STEPS), "attention": len(STEPS)}


@torch.no_grad()
def test_another_attention_that_is_asked_for_afterwards(ids, served):
    model, mask, calls = fastgpt.patch(random_model("llama")), torch.ones_like(ids), []
    own = transformers.AttentionInterface._global_mapping["sdpa"]

    def mine(*args, **named):
        calls.append(args)
        return own(*args, **named)

    transformers.AttentionInterface.register("mine", mine)
    transformers.AttentionMaskInterface.register("mine", transformers.masking_utils.sdpa_mask)
    try:
        model.set_attn_implementation("mine")
        cached(model, ids, mask)
    finally:
        del transformers.AttentionInterface._global_mapping["mine"]
        del transformers.AttentionMaskInterface._global_mapping["mine"]
    assert len(calls) == LAYERS * (1 + len(STEPS)) and not served["block"] and not served["attention"]


@torch.no_grad()
@pytest.mark.parametrize("of_layers", [False, True])
def test_an_update_that_somebody_has_wrapped(ids, of_layers):
    model, mask = fastgpt.patch(random_model("llama")), torch.ones_like(ids)
    cache = transformers.DynamicCache(config=model.config)
    model(ids[:, :PROMPT], attention_mask=mask[:, :PROMPT], cache=cache)
    seen = []

    def wrap(each):
        own = each.update
        each.update = lambda *args, **named: seen.append(args) or own(*args, **named)

    for each in cache.layers if of_layers else [cache]:
        wrap(each)
    model(ids[:, PROMPT : PROMPT + 1], attention_mask=mask[:, : PROMPT + 1], cache=cache)
    assert len(seen) == LAYERS


@torch.no_grad()
def test_modules_that_lack_something(ids):
    """A layer's number, and a weight that is a placeholder, as some who shard models leave it."""
    model = random_model("llama")
    for layer in model.model.layers:
        layer.self_attn.layer_idx = None
    expected = model(ids, use_cache=False).logits
    fastgpt.patch(model)
    torch.testing.assert_close(model(ids, use_cache=False).logits, expected, rtol=1e-3, atol=1e-3)
    few = fastgpt.unpatch(model)(ids[:, :2], use_cache=False).logits
    fastgpt.patch(model)
    torch.testing.assert_close(model(ids[:, :2], use_cache=False).logits, few, rtol=1e-3, atol=1e-3)
    fastgpt.unpatch(model).model.layers[0].mlp.up_proj.weight = nn.Parameter(torch.empty(0), False)
    fastgpt.patch(model)


@torch.no_grad()
def test_copies_of_a_cache_in_two_threads(ids):
    """Shallow ones, of the same rows, behind which each thread writes its own."""
    model = fastgpt.patch(random_model("llama"))
    cache = transformers.DynamicCache(config=model.config)
    model(ids, cache=cache)

    def branch():
        other = copy.copy(cache)
        other.layers = [copy.copy(layer) for layer in cache.layers]
        return other

    def follow(row, other):
        tokens = [ids[row, i].expand(2, 1) for i in range(6)]
        return torch.cat([model(token, cache=other).logits for token in tokens], 1)

    def follow_in_thread(row):
        with torch.no_grad():
            return follow(row, branch())

    expected = [follow(row, copy.deepcopy(cache)) for row in (0, 1)]
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        for _ in range(15):
            for got, exact in zip(pool.map(follow_in_thread, (0, 1)), expected, strict=True):
                torch.testing.assert_close(got, exact, rtol=1e-3, atol=1e-3)


def test_the_probe_leaves_no_trace(ids):
    model = random_model("llama")
    fastgpt.patch(model)
    layer = model.model.layers[0]
    before = {name: dict(vars(module)) for name, module in layer.named_modules()}, torch.get_rng_state()
    config = dict(vars(model.config))
    parts_of(layer)
    assert torch.equal(before[1], torch.get_rng_state()) and dict(vars(model.config)) == config
    assert before[0] == {name: dict(vars(module)) for name, module in layer.named_modules()}
