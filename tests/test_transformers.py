"""fastgpt.register, patch and unpatch on transformers' models."""

import collections
import copy
import importlib
import inspect
import pickle
import subprocess
import sys

import pytest
import torch
import transformers
from backends import assert_parity
from test_gpt import GPT2, eager, random_model
from torch.nn.utils import prune
from transformers import AttentionInterface
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from transformers.pytorch_utils import Conv1D

import fastgpt
from fastgpt import demo
from fastgpt.integrations import transformers as integration
from fastgpt.integrations.transformers import attention, linear, norms
from fastgpt.nn import replace_norms
from fastgpt.ops.few_rows import api as few_rows

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
        place = attention if name == "attention" else norms
        monkeypatch.setattr(place, name, recording(name, getattr(place, name)))
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
    for _, options in calls["attention"]:  # a dynamic cache ends with the last query: plainly causal
        assert options["attn_bias"] is None
        assert (options["seqused_k"] is not None) == (kind == "static" or options["leftpad_k"] is not None)


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


def _linears(model):
    return sum(type(module).__name__ in ("Linear", "Conv1D") for module in model.modules())


def test_the_summary_is_printed(hf, capsys):
    fused = f" ({LAYERS} of them with the residual's addition)" if hf.config.model_type == "gpt2" else ""
    said = {
        "attention": f"{LAYERS} attentions",
        "norm": f"{NORMS} norms{fused}",
        "linear": f"{_linears(hf)} linear layers where rows are few",
        "cache": "a cache that appends in place",
    }
    layers = said["linear"]
    as_one = {None: "blocks", "norm": f"attentions and {LAYERS} MLPs", "attention": "MLPs", "cache": "MLPs"}
    for left in (None, *said):
        fastgpt.patch(hf, **({left: False} if left else {}))
        assert (hf.config._attn_implementation == "fastgpt") == (left != "attention")
        said["linear"] = f"{layers}, there {LAYERS} {as_one.get(left)} as one call each"
        expected = ", ".join(text for name, text in said.items() if name != left)
        assert capsys.readouterr().out == f"fastgpt: patched {type(hf).__name__}: {expected}\n"
        fastgpt.unpatch(hf)


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


def test_the_rest_of_a_model_whose_attention_is_fastgpts_already(hf, ids):
    hf.set_attn_implementation(fastgpt.register())
    expected = hf(ids).logits
    fastgpt.patch(hf, attention=False)
    torch.testing.assert_close(hf(ids).logits, expected, rtol=1e-4, atol=1e-4)
    fastgpt.unpatch(hf)
    assert hf.config._attn_implementation == "fastgpt" and torch.equal(hf(ids).logits, expected)


def test_what_is_none_of_transformers_models_is_refused():
    with pytest.raises(TypeError, match=r"^model: got Linear, expected a transformers model"):
        fastgpt.patch(torch.nn.Linear(2, 2))
    t5 = transformers.T5ForConditionalGeneration(
        transformers.T5Config(d_model=32, d_kv=8, d_ff=32, num_layers=1, num_heads=4, vocab_size=50)
    )
    with pytest.raises(TypeError, match=r"^model: got T5ForConditionalGeneration, whose attention"):
        fastgpt.patch(t5)


@pytest.mark.parametrize("name", ["position_bias", "write_index"])
def test_what_others_ask_of_the_attention_is_refused(name):
    fastgpt.register()
    model, q = torch.nn.Module(), torch.randn(1, 2, 3, 8)
    with pytest.raises(ValueError, match=rf"^{name}: got a value for Module"):
        AttentionInterface()["fastgpt"](model, q, q, q, None, **{name: q})


@pytest.mark.parametrize("which", range(3))
def test_queries_keys_and_values_of_any_strides(which):
    qkv = [torch.randn(1, 2, 3, 8) for _ in range(3)]
    module = torch.nn.Module()
    expected, _ = attention.attention_forward(module, *qkv, None)
    qkv[which] = qkv[which].mT.contiguous().mT
    assert torch.equal(attention.attention_forward(module, *qkv, None)[0], expected)


SHAPE = {
    "vocab_size": 101,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 128,
}
GROUPED = SHAPE | {"num_key_value_heads": 2}
GEMMA = GROUPED | {"head_dim": 16, "sliding_window": 8, "query_pre_attn_scalar": 16}
EXPERTS = {"num_local_experts": 2, "num_experts_per_tok": 2}  # a choice would turn on rounding
# Of each: how many norms are fastgpt's, and which are left.
ARCHITECTURES = {
    "gpt2": (transformers.GPT2Config(n_embd=64, n_head=4, n_layer=3, n_positions=128, vocab_size=101), 7, ""),
    "gpt_neox": (transformers.GPTNeoXConfig(**SHAPE), 7, ""),
    "llama": (transformers.LlamaConfig(**GROUPED), 7, ""),
    "mistral": (transformers.MistralConfig(**GROUPED, sliding_window=8), 7, ""),
    "qwen3": (transformers.Qwen3Config(**GROUPED, head_dim=16), 13, ""),
    "gemma2": (transformers.Gemma2Config(**GEMMA), 13, ""),
    "gemma3": (transformers.Gemma3TextConfig(**GEMMA), 19, ""),
    "phi3": (transformers.Phi3Config(**GROUPED, sliding_window=8, pad_token_id=0), 7, ""),
    "olmo2": (transformers.Olmo2Config(**GROUPED), 13, ""),
    "gpt_oss": (transformers.GptOssConfig(**GROUPED, **EXPERTS, head_dim=16, sliding_window=8), 7, ""),
}


@pytest.fixture(params=ARCHITECTURES)
def any_model(request):
    config = copy.deepcopy(ARCHITECTURES[request.param][0])
    config._experts_implementation = "eager"  # the others have no float64
    model = transformers.AutoModelForCausalLM.from_config(
        config, attn_implementation="eager", dtype=torch.float32
    ).eval()
    with torch.no_grad():
        for p in model.parameters():  # norms' weights and sinks that are all the same would hide much
            p.nan_to_num_().add_(0.05 * torch.randn_like(p))  # NaN: what transformers leaves uninitialized
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0
    return model


def _padded(side):
    mask = torch.ones(2, 19, dtype=torch.int64)
    if side == "left":
        mask[0, :6] = 0
    if side == "right":
        mask[1, -5:] = 0
    if side == "both":
        mask[0, :3] = mask[1, -5:] = 0
    return mask


def _logits(model, ids, mask):
    """Of the tokens that are no padding, (tokens, vocabulary)."""
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    return model(ids, attention_mask=mask, position_ids=positions).logits[mask.bool()]


def _logits_alone(model, ids, mask):
    """The same, sequence by sequence, without padding."""
    return torch.cat([model(row[kept.bool()][None]).logits[0] for row, kept in zip(ids, mask, strict=True)])


@torch.no_grad()
@pytest.mark.parametrize("side", ["none", "left", "right", "both"])
def test_logits_of_every_architecture(any_model, ids, side):
    mask = _padded(side)
    expected = _logits_alone(copy.deepcopy(any_model).double(), ids, mask)
    other = _logits_alone(any_model, ids, mask)
    any_model.set_attn_implementation(fastgpt.register())
    assert_parity("logits", _logits(any_model, ids, mask), other, expected)
    any_model.set_attn_implementation("eager")
    fastgpt.patch(any_model)
    assert_parity("logits", _logits(any_model, ids, mask), other, expected)


@torch.no_grad()
def test_bfloat16_of_every_architecture(any_model, ids):
    mask = _padded("left")
    any_model.bfloat16()
    expected = _logits_alone(copy.deepcopy(any_model).double(), ids, mask)
    other = _logits_alone(any_model, ids, mask)
    fastgpt.patch(any_model)
    assert_parity("logits", _logits(any_model, ids, mask), other, expected)


@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize("side", ["none", "left"])
def test_greedy_tokens_of_every_architecture(any_model, ids, calls, side, cache):
    def generate():
        kind = {"cache_implementation": "static"} if cache == "static" else {}
        options = {"attention_mask": _padded(side), "max_new_tokens": 14, "do_sample": False}
        return any_model.generate(ids, **options, **kind).tolist()

    expected = generate()
    fastgpt.patch(any_model)
    assert generate() == expected
    assert all(options["attn_bias"] is None for _, options in calls["attention"])  # no dense mask was made


@pytest.mark.parametrize("side", ["left", "right"])
def test_gradients_of_every_architecture(any_model, ids, side):
    mask = _padded(side)
    dlogits = torch.randn(int(mask.sum()), 101)

    def grads(model, logits):
        logits.backward(dlogits.to(logits.dtype))
        return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}

    double, eager = copy.deepcopy(any_model).double(), copy.deepcopy(any_model)
    expected = grads(double, _logits_alone(double, ids, mask))
    other = grads(eager, _logits_alone(eager, ids, mask))
    fastgpt.patch(any_model)
    got = grads(any_model, _logits(any_model, ids, mask))
    assert got.keys() == expected.keys()
    for name, grad in got.items():
        assert_parity(name, grad, other[name], expected[name], factor=3)


def test_which_norms_are_swapped(any_model, capsys):
    name = any_model.config.model_type
    norms, left = next(v[1:] for v in ARCHITECTURES.values() if v[0].model_type == name)
    fastgpt.patch(any_model)
    fused = " (3 of them with the residual's addition)" if name == "gpt2" else ""
    said = f"3 attentions, {norms} norms{fused}" + (f", left as they are: {left}" if left else "")
    said += f", {_linears(any_model)} linear layers where rows are few"
    if name not in ("gpt_neox", "gpt_oss"):
        said += ", there 3 blocks as one call each"
    said += ", a cache that appends in place"
    assert capsys.readouterr().out == f"fastgpt: patched {type(any_model).__name__}: {said}\n"


@torch.no_grad()
def test_a_block_of_gpt2_called_or_written_otherwise_is_its_own(ids, calls, capsys, monkeypatch):
    model = random_model("gpt2")
    block, x = model.transformer.h[0], model.transformer.wte(ids)
    cache = [transformers.DynamicCache(config=model.config) for _ in range(2)]
    expected = block(hidden_states=x, past_key_values=cache[0])
    fastgpt.patch(model, attention=False)
    torch.testing.assert_close(block(hidden_states=x, past_key_values=cache[1]), expected)
    assert cache[1].get_seq_length() == ids.shape[1]
    assert [options["residual"] for _, options in calls["layer_norm"]] == [None, None]
    fastgpt.unpatch(model)
    capsys.readouterr()
    monkeypatch.setattr(type(block), "forward", lambda self, hidden_states, cache, more: None)
    fastgpt.patch(model)
    assert f"{NORMS} norms, " in capsys.readouterr().out


@torch.no_grad()
def test_a_norm_that_computes_something_else_is_left(ids, capsys):
    class OtherRMSNorm(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.weight, self.eps = torch.nn.Parameter(torch.ones(64)), 1e-6

        def forward(self, x):
            return x.tanh() * self.weight

    model = random_model("llama")
    model.model.norm = OtherRMSNorm()
    expected = model(ids).logits
    fastgpt.patch(model)
    assert f"{NORMS - 1} norms, left as they are: OtherRMSNorm" in capsys.readouterr().out
    torch.testing.assert_close(model(ids).logits, expected, rtol=1e-4, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("rows", [(1,), (2, 2), (9,), ()])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("kind", ["Linear", "Conv1D"])
def test_linear_layers_of_few_rows(kind, bias, rows):
    module = torch.nn.Linear(24, 40, bias) if kind == "Linear" else Conv1D(40, 24)
    assert linear.is_linear(module, "auto") and not linear.is_linear(module, "torch")
    transposed = linear.is_transposed(module)
    assert transposed == (kind == "Conv1D")
    torchs = []

    def forward(x):
        return linear.linear_forward(module, lambda x: torchs.append(x) or module(x), transposed, "auto", x)

    x = torch.randn(*rows, 24)
    weight = module.weight if transposed else module.weight.T
    exact = x.double() @ weight.double() + (0 if module.bias is None else module.bias.double())
    assert_parity("out", forward(x), module(x), exact)
    many = rows == (9,)
    assert len(torchs) == many
    with torch.enable_grad():
        forward(x)
    assert len(torchs) == 1 + many
    for name in ("bias", "weight"):  # something else in a parameter's place
        if getattr(module, name) is not None:
            prune.random_unstructured(module, name, amount=0.3)
            torch.testing.assert_close(forward(x), module(x))
    assert len(torchs) == 2 + many + (module.bias is not None)


@pytest.fixture
def served(monkeypatch):
    """Which of the calls for few rows were served, how many times each, of models patched before or after."""
    counts = collections.Counter()

    def watched(name, own):
        def call(*args):
            out = own(*args)
            counts[name] += out is not None
            return out

        return call

    for name in ("linear", "mlp", "attention", "block"):
        monkeypatch.setattr(few_rows, name, watched(name, getattr(few_rows, name)))
    return counts


@torch.no_grad()
def test_what_of_a_patched_model_is_fastgpts_where_rows_are_few(ids, served):
    for name in ("gpt2", "llama"):
        model = fastgpt.patch(random_model(name))
        model(ids)
        assert not +served
        for dtype in (torch.float32, torch.bfloat16):
            model.to(dtype)
            cache = transformers.DynamicCache(config=model.config)
            projections = _linears(model) - 1 - (2 if name == "gpt2" else 3) * LAYERS  # an MLP has the rest
            model(ids[:, :1], cache=cache)  # into an empty cache: every attention by its steps
            assert served == {"linear": 1 + projections, "mlp": LAYERS}
            served.clear()
            model(ids[:, 1:3], cache=cache)
            assert served == {"linear": 1, "block": LAYERS}
            served.clear()
        fastgpt.unpatch(model)(ids[:, :1])
        fastgpt.patch(model, backend="torch")(ids[:, :1])
        assert not served


@torch.no_grad()
def test_layer_norms_of_few_elements_are_torchs_but_where_a_backend_is_asked_for(ids, monkeypatch):
    monkeypatch.undo()
    fused = []
    own = norms.layer_norm
    monkeypatch.setattr(norms, "layer_norm", lambda *a, **k: fused.append(a[0].numel()) or own(*a, **k))
    model = random_model("gpt2")
    expected, other = eager(model).double()(ids).logits, eager(model)(ids).logits
    for backend, width in (
        (None, 1),
        ("cpu", 1),
        (None, 1 + norms.FEW // ids.numel() // model.config.n_embd),
    ):
        fastgpt.patch(model, backend=backend)
        inputs = ids.repeat(width, 1)
        assert_parity("logits", model(inputs).logits[: len(ids)], other, expected)
        assert bool(fused) == (backend == "cpu" or width > 1)
        fused.clear()
        fastgpt.unpatch(model)


HYBRIDS = ("mamba2", "bamba", "falcon_h1", "granitemoehybrid", "qwen3_next", "zamba2", "nemotron_h")


@pytest.mark.parametrize("name", HYBRIDS)
def test_norms_that_take_more_than_x_are_left(name):
    module = importlib.import_module(f"transformers.models.{name}.modeling_{name}")
    kinds = {n: kind for n, kind in vars(module).items() if "RMSNorm" in n and isinstance(kind, type)}
    gated = [n for n, kind in kinds.items() if len(inspect.signature(kind.forward).parameters) > 2]
    assert gated
    for n in gated:
        sizes = {"group_size": 16} if "group_size" in inspect.signature(kinds[n]).parameters else {}
        assert norms.norm_of(kinds[n](32, **sizes)) is None


@pytest.mark.parametrize("change", ["outside", "raises"])
def test_a_norm_whose_eps_is_elsewhere_or_that_fails_is_left(change):
    class RMSNormToo(LlamaRMSNorm):
        def forward(self, x):
            if change == "raises":
                raise RuntimeError("not today")
            rms = x.float().square().mean(-1, keepdim=True).sqrt()
            return self.weight * (x / (rms + self.variance_epsilon)).to(x.dtype)

    assert norms.norm_of(LlamaRMSNorm(64, eps=1e-6)) is not None
    assert norms.norm_of(RMSNormToo(64, eps=1e-6)) is None


def test_patching_that_fails_leaves_nothing(hf, ids, monkeypatch):
    expected, before = hf(ids).logits, state(hf)
    monkeypatch.setattr(integration, "is_linear", lambda *args: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        fastgpt.patch(hf)
    assert state(hf) == before
    monkeypatch.undo()
    fastgpt.unpatch(fastgpt.patch(hf))
    assert torch.equal(hf(ids).logits, expected)


@torch.no_grad()
@pytest.mark.parametrize("when", ["before", "after"])
def test_norms_that_are_replaced_by_others(ids, when):
    model = random_model("gpt2")
    expected, other = model(ids).logits, eager(model)(ids).logits
    if when == "before":
        replace_norms(model)
    fastgpt.patch(model)
    if when == "after":
        for block in model.transformer.h:
            own = torch.nn.LayerNorm(block.ln_2.weight.shape, eps=block.ln_2.eps)
            own.load_state_dict(block.ln_2.state_dict())
            block.ln_2 = own
    assert_parity("logits", model(ids).logits, other, expected)


@torch.no_grad()
def test_integers_are_no_mask(hf, ids):
    fastgpt.patch(hf)
    mask = torch.ones(2, 1, 19, 19, dtype=torch.int32).tril()
    with pytest.raises(TypeError, match=r"^attention_mask: got torch.int32, expected bool or floating point"):
        hf(ids, attention_mask=mask)


@torch.no_grad()
def test_a_layer_of_few_rows_refuses_other_sizes_as_torch_does(ids):
    model = random_model("gpt2")
    layer, x = model.transformer.h[0].attn.c_attn, torch.randn(1, model.config.n_embd + 4)
    with pytest.raises(RuntimeError) as theirs:
        layer(x)
    fastgpt.patch(model)
    with pytest.raises(RuntimeError) as ours:
        layer(x)
    assert str(ours.value) == str(theirs.value)


CLIP = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}


def clip():
    config = transformers.CLIPConfig(
        text_config=CLIP | {"vocab_size": 101, "eos_token_id": 2},
        vision_config=CLIP | {"image_size": 16, "patch_size": 8},
        projection_dim=16,
    )
    return transformers.CLIPModel(config).eval()


def asked(model):
    return [
        c._attn_implementation for c in (model.config, model.config.text_config, model.config.vision_config)
    ]


def test_unpatch_restores_the_configs_inside():
    model = clip()
    model.set_attn_implementation({"text_config": "eager", "vision_config": "sdpa"})
    before = asked(model)
    assert before[1:] == ["eager", "sdpa"]
    fastgpt.patch(model)
    assert asked(model) == ["fastgpt"] * 3
    fastgpt.unpatch(model)
    assert asked(model) == before


def test_a_tower_that_computes_its_own_attention_is_left(capsys, monkeypatch):
    model = clip()
    monkeypatch.setattr(type(model.vision_model), "_supports_attention_backend", False)
    fastgpt.patch(model)
    assert asked(model) == ["fastgpt", "fastgpt", "sdpa"]
    assert f"attention left as it is in {type(model.vision_model).__name__}" in capsys.readouterr().out


def test_patching_draws_no_random_numbers(any_model):
    before = torch.get_rng_state()
    fastgpt.patch(any_model)
    assert torch.equal(torch.get_rng_state(), before)


def test_ranges_of_keys_are_where_the_model_is():
    from transformers.masking_utils import bidirectional_mask_function

    ranges = attention.attention_mask(
        batch_size=2, q_length=5, kv_length=5, mask_function=bidirectional_mask_function, device="meta"
    )
    assert ranges.device.type == "meta" and ranges.shape == (2, 2, 1, 2)
