"""fastgpt.patch and fastgpt.unpatch on transformers' GPT-2 and Llama models."""

import copy
import logging
import pickle
import subprocess
import sys

import pytest
import torch
import transformers
from backends import assert_parity
from test_gpt import GPT2, LLAMA, eager, random_model
from transformers import AttentionInterface

import fastgpt
from fastgpt import demo
from fastgpt.integrations import transformers as integration

NAMES = ["gpt2", "llama", "llama-gqa-tied", "llama3-biases"]
LAYERS = 3
NORMS = 2 * LAYERS + 1


@pytest.fixture(params=NAMES)
def hf(request):
    model = random_model(request.param)
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0
    return model


@pytest.fixture
def ids():
    return torch.randint(101, (2, 19), generator=torch.Generator().manual_seed(3))


@pytest.fixture
def calls(monkeypatch):
    """What is passed to fastgpt's operators by a model patched after this."""
    recorded = {"attention": [], "layer_norm": [], "rms_norm": []}

    def recording(name, original):
        def record(*args, **options):
            recorded[name].append((args, options))
            return original(*args, **options)

        return record

    for name in recorded:
        monkeypatch.setattr(integration, name, recording(name, getattr(integration, name)))
    return recorded


def state(model):
    """Everything that patching touches or could touch."""
    modules = []
    for name, module in model.named_modules():
        attributes = {key: value for key, value in vars(module).items() if not isinstance(value, dict)}
        modules.append((name, type(module), attributes, module.forward))
    hooks = [(dict(m._forward_pre_hooks), dict(m._forward_hooks)) for m in model.modules()]
    return (
        dict(vars(model.config)),
        modules,
        hooks,
        {name: (p, p._version) for name, p in model.named_parameters()},
    )


@torch.no_grad()
def test_unpatch_undoes_everything(hf, ids):
    expected, before = hf(ids).logits, state(hf)
    assert fastgpt.patch(hf) is hf
    assert hf.config._attn_implementation == "fastgpt"
    assert not torch.equal(hf(ids).logits, expected)  # other sums: it was fastgpt that ran
    assert fastgpt.unpatch(hf) is hf
    assert state(hf) == before
    assert torch.equal(hf(ids).logits, expected)


@torch.no_grad()
def test_a_patched_model_runs_on_fastgpt(hf, ids, calls):
    norm = "layer_norm" if hf.config.model_type == "gpt2" else "rms_norm"
    expected, other = hf(ids).logits, eager(hf)(ids).logits
    fastgpt.patch(hf)
    assert_parity("logits", hf(ids).logits, other, expected)
    assert {name: len(seen) for name, seen in calls.items() if seen} == {"attention": LAYERS, norm: NORMS}
    for _, options in calls["attention"]:
        assert options["attn_bias"] is None and options["causal"]


@torch.no_grad()
def test_decoding_copies_no_keys_and_needs_no_mask(hf, ids, calls):
    fastgpt.patch(hf)
    cache = transformers.DynamicCache(config=hf.config)
    hf(ids, past_key_values=cache)
    calls["attention"].clear()
    hf(ids[:, :1], past_key_values=cache, attention_mask=torch.ones(2, 20, dtype=torch.int64))
    for layer, ((q, k, v), options) in enumerate(calls["attention"]):
        assert q.shape[1] == 1 and k.shape[1] == v.shape[1] == 20 and options["attn_bias"] is None
        assert k.data_ptr() == cache.layers[layer].keys.data_ptr()
        assert v.data_ptr() == cache.layers[layer].values.data_ptr()


def test_greedy_tokens_do_not_change(hf, ids):
    def generate(**options):
        mask = torch.ones_like(ids)
        return hf.generate(ids, attention_mask=mask, max_new_tokens=25, do_sample=False, **options).tolist()

    expected = generate()
    fastgpt.patch(hf)
    assert generate() == expected
    assert generate(use_cache=False) == expected


@torch.no_grad()
@pytest.mark.parametrize("kind", ["dynamic", "static"])
def test_several_queries_behind_a_cache(hf, ids, calls, kind):
    def logits(model):
        cache = (
            transformers.DynamicCache(config=model.config)
            if kind == "dynamic"
            else transformers.StaticCache(config=model.config, max_cache_len=32)
        )
        return torch.cat(
            [model(part, past_key_values=cache).logits for part in ids.split([9, 6, 1, 3], 1)], 1
        )

    expected, other = logits(hf), logits(eager(hf))
    fastgpt.patch(hf)
    assert_parity("logits", logits(hf), other, expected)
    masks = {options["attn_bias"] is not None for _, options in calls["attention"]}
    assert masks == {kind == "static"}  # a dynamic cache ends with the last query: plainly causal


@torch.no_grad()
def test_left_padded_batch(hf, ids):
    mask = torch.ones_like(ids)
    mask[1, :8] = 0
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    real = mask.bool()

    def logits(model):
        return model(ids, attention_mask=mask, position_ids=positions).logits[real]

    expected, other, alone = logits(hf), logits(eager(hf)), hf(ids[1:, 8:]).logits[0]
    tokens = hf.generate(ids, attention_mask=mask, max_new_tokens=12, do_sample=False).tolist()
    fastgpt.patch(hf)
    got = logits(hf)
    assert_parity("logits", got, other, expected)
    assert_parity("logits", got[19:], other[19:], alone)
    assert hf.generate(ids, attention_mask=mask, max_new_tokens=12, do_sample=False).tolist() == tokens


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.bool, torch.float32])
def test_a_mask_of_the_users_own(hf, ids, dtype):
    visible = torch.rand(2, 1, 19, 19, generator=torch.Generator().manual_seed(1)) < 0.5
    visible = visible.tril() | torch.eye(19, dtype=torch.bool)
    mask = visible if dtype == torch.bool else torch.zeros(()).masked_fill(~visible, torch.finfo(dtype).min)
    additive = torch.zeros(()).masked_fill(~visible, torch.finfo(torch.float32).min)
    expected, other = hf(ids, attention_mask=mask).logits, eager(hf)(ids, attention_mask=additive).logits
    assert (expected - hf(ids).logits).abs().max() > 0.1
    fastgpt.patch(hf)
    assert_parity("logits", hf(ids, attention_mask=mask).logits, other, expected)


@torch.no_grad()
def test_packed_sequences(hf, ids):
    positions = torch.cat((torch.arange(8), torch.arange(11))).expand(2, -1)

    def logits(model):
        return model(ids, position_ids=positions, use_cache=False).logits

    expected, other, alone = logits(hf), logits(eager(hf)), hf(ids[:, 8:]).logits
    fastgpt.patch(hf)
    got = logits(hf)
    assert_parity("logits", got, other, expected)
    assert_parity("logits", got[:, 8:], other[:, 8:], alone)


def test_gradients_in_training(hf, ids):
    for module in hf.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0

    def gradients(model):
        model.train().zero_grad()
        model(ids, labels=ids).loss.backward()
        return {name: parameter.grad.clone() for name, parameter in model.named_parameters()}

    expected, other = gradients(hf), gradients(eager(hf))
    fastgpt.patch(hf)
    for name, grad in gradients(hf).items():
        assert_parity(name, grad, other[name], expected[name], factor=3)


@torch.no_grad()
@pytest.mark.parametrize(
    "fields", [{"scale_attn_weights": False}, {"scale_attn_by_inverse_layer_idx": True}], ids=str
)
def test_the_scaling_is_the_models_own(ids, fields):
    torch.manual_seed(7)
    model = transformers.GPT2LMHeadModel(transformers.GPT2Config(**GPT2, **fields)).eval()
    for parameter in model.parameters():
        parameter.add_(torch.randn_like(parameter), alpha=0.2)
    expected, other = model(ids).logits, eager(model)(ids).logits
    assert_parity("logits", fastgpt.patch(model)(ids).logits, other, expected)


def test_attention_dropout_in_training(ids, calls):
    model = random_model("gpt2").train()
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    for block in model.transformer.h:
        block.attn.attn_dropout.p = 0.3
    fastgpt.patch(model)
    logits = [model(ids).logits for _ in range(2)]
    logits[0].sum().backward()
    assert not torch.allclose(*logits)
    assert {options["dropout_p"] for _, options in calls["attention"]} == {0.3}
    with torch.no_grad():
        assert torch.equal(model.eval()(ids).logits, model(ids).logits)


@torch.no_grad()
def test_bfloat16(hf, ids):
    exact = hf(ids).logits.double()
    hf = hf.to(torch.bfloat16)
    plain = hf(ids).logits
    logits = fastgpt.patch(hf)(ids).logits
    assert logits.dtype == torch.bfloat16
    assert_parity("logits", logits, plain, exact)


@torch.no_grad()
def test_autocast(hf, ids):
    exact = hf(ids).logits.double()
    with torch.autocast("cpu", torch.bfloat16):
        plain = hf(ids).logits
        logits = fastgpt.patch(hf)(ids).logits
    assert logits.dtype == plain.dtype
    assert_parity("logits", logits, plain, exact)


@torch.no_grad()
@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_a_copy_of_a_patched_model_is_patched_and_on_its_own(hf, ids, copied):
    expected = fastgpt.patch(hf)(ids).logits
    other = copied(hf)
    assert torch.equal(other(ids).logits, expected)
    for parameter in other.parameters():
        parameter.zero_()
    assert torch.equal(hf(ids).logits, expected)
    assert not other(ids).logits.any()
    fastgpt.unpatch(other)
    assert other.config._attn_implementation == "sdpa" and hf.config._attn_implementation == "fastgpt"


@torch.no_grad()
@pytest.mark.parametrize("backend", [None, "reference"])
def test_a_patched_model_unpickles_in_a_fresh_process(ids, tmp_path, backend):
    model = fastgpt.patch(random_model("llama"), backend=backend)
    (tmp_path / "model.pickle").write_bytes(pickle.dumps((model, ids, model(ids).logits)))
    code = (
        "import pickle, sys, torch\n"
        "model, ids, expected = pickle.load(open(sys.argv[1], 'rb'))\n"
        "with torch.no_grad():\n"
        "    torch.testing.assert_close(model(ids).logits, expected)\n"
        "import fastgpt\n"
        "fastgpt.unpatch(model)\n"
        "assert model.config._attn_implementation == 'sdpa'\n"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path / "model.pickle")], check=True)


@torch.no_grad()
def test_a_backend_by_name(hf, ids, calls):
    fastgpt.patch(hf, backend="reference")
    hf(ids)
    options = [options for seen in calls.values() for _, options in seen]
    assert len(options) == LAYERS + NORMS and {o["backend"] for o in options} == {"reference"}
    with pytest.raises(ValueError, match=r"^backend: got 'numpy'"):
        fastgpt.patch(fastgpt.unpatch(hf), backend="numpy")
    assert hf.config._attn_implementation == "sdpa"


def test_the_demo_times_as_many_tokens_by_all_three(ids, monkeypatch):
    pytest.importorskip("tqdm")
    monkeypatch.setattr(demo, "PREFILL_TOKENS", 32)
    monkeypatch.setattr(demo, "OPERATOR_BUDGET", 0.01)
    model, prompt = random_model("llama"), ids[:1]
    model.generation_config.pad_token_id = 0
    first = model.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=1, do_sample=False)
    model.generation_config.eos_token_id = first[0, -1].item()  # its answer is over at once
    patched = fastgpt.patch(copy.deepcopy(model))
    lines = demo._measure(model, patched, fastgpt.GPT.from_hf(model), prompt)
    assert all(line.seconds > 0 and line.torch_seconds > 0 for line in lines)


def test_the_summary_is_logged(hf, caplog):
    with caplog.at_level(logging.INFO, logger="fastgpt"):
        fastgpt.patch(hf)
    assert caplog.messages == [f"patched {type(hf).__name__}: {LAYERS} attentions, {NORMS} norms"]


def test_the_model_without_its_head(ids):
    model = random_model("llama").model
    expected = model(ids).last_hidden_state
    hidden = fastgpt.patch(model)(ids).last_hidden_state
    assert_parity("hidden", hidden, eager(fastgpt.unpatch(model))(ids).last_hidden_state, expected)


def test_output_attentions_is_refused(hf, ids):
    fastgpt.patch(hf)
    with pytest.raises(ValueError, match=r"^output_attentions: got True, expected False in a patched model"):
        hf(ids, output_attentions=True)
    assert fastgpt.unpatch(hf)(ids, output_attentions=True) is not None
    hf = eager(hf)
    hf.config.output_attentions = True
    with pytest.raises(ValueError, match=r"output_attentions=True in its config"):
        fastgpt.patch(hf)


def test_patching_twice_or_undoing_nothing_is_an_error(hf):
    with pytest.raises(ValueError, match=r"^model: got a \w+ that is not patched, expected one that is"):
        fastgpt.unpatch(hf)
    fastgpt.patch(hf)
    with pytest.raises(ValueError, match=r"^model: got a \w+ that is patched, expected one that is not"):
        fastgpt.patch(hf)
    with pytest.raises(ValueError, match=r"^model: its config asks for fastgpt already"):
        fastgpt.patch(hf.base_model)
    fastgpt.patch(fastgpt.unpatch(hf))


def test_other_architectures_are_refused():
    model = transformers.MistralForCausalLM(transformers.MistralConfig(**LLAMA))
    with pytest.raises(
        TypeError, match=r"^model: got MistralForCausalLM, expected a transformers GPT-2 or Llama"
    ):
        fastgpt.patch(model)
    assert not vars(model).get("_fastgpt_patch") and model.config._attn_implementation == "sdpa"


def test_what_other_architectures_ask_of_the_attention_is_refused(ids):
    fastgpt.unpatch(fastgpt.patch(random_model("gpt2")))
    model, q = torch.nn.Module(), torch.randn(1, 2, 3, 8)
    with pytest.raises(ValueError, match=r"^softcap: got a value for Module"):
        AttentionInterface()["fastgpt"](model, q, q, q, None, softcap=30.0)
