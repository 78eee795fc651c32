"""fastgpt.GPT against transformers' models, and what is its own: cache, sampling, errors."""

import copy
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
import transformers
from backends import assert_parity
from torch import nn

import fastgpt
from fastgpt import GPT, GPTConfig
from fastgpt.gpt import sampling
from fastgpt.gpt.config import RopeScaling
from fastgpt.gpt.model import Linear
from fastgpt.gpt.weights import weights_from_hf
from fastgpt.ops.few_rows import api as few_rows

GPT2 = {"n_embd": 64, "n_layer": 3, "n_head": 4, "vocab_size": 101, "n_positions": 64}
LLAMA = {
    "hidden_size": 64,
    "intermediate_size": 176,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "vocab_size": 101,
    "max_position_embeddings": 64,
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
MODELS = {
    "gpt2": lambda: transformers.GPT2LMHeadModel(transformers.GPT2Config(**GPT2)),
    "gpt2-untied": lambda: transformers.GPT2LMHeadModel(
        transformers.GPT2Config(**GPT2, n_inner=100, tie_word_embeddings=False)
    ),
    "llama": lambda: transformers.LlamaForCausalLM(transformers.LlamaConfig(**LLAMA)),
    "llama-gqa-tied": lambda: transformers.LlamaForCausalLM(
        transformers.LlamaConfig(**LLAMA, num_key_value_heads=2, tie_word_embeddings=True)
    ),
    "llama3-biases": lambda: transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            **LLAMA,
            num_key_value_heads=1,
            head_dim=24,
            attention_bias=True,
            mlp_bias=True,
            rope_parameters=LLAMA3,
            rms_norm_eps=1e-3,
        )
    ),
}


def random_model(name: str) -> transformers.PreTrainedModel:
    """With weights large enough that every part of the model shows in the logits."""
    torch.manual_seed(7)
    model = MODELS[name]().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.2)
    return model


def eager(model: transformers.PreTrainedModel) -> transformers.PreTrainedModel:
    """By transformers' other way to attention: what two correct ways differ by."""
    model = copy.deepcopy(model)
    model.set_attn_implementation("eager")
    return model


@pytest.fixture(params=MODELS)
def hf(request: pytest.FixtureRequest) -> transformers.PreTrainedModel:
    return random_model(request.param)


@pytest.fixture
def ids() -> torch.Tensor:
    return torch.randint(101, (2, 23), generator=torch.Generator().manual_seed(3))


@torch.no_grad()
def test_logits_are_those_of_transformers(hf, ids):
    model = GPT.from_hf(hf)
    expected = hf(ids).logits
    assert expected.std() > 0.5
    other = eager(hf)(ids).logits
    assert_parity("logits", model(ids), other, expected)
    assert_parity("logits", model(ids, last_only=True), other[:, -1:], expected[:, -1:])


@torch.no_grad()
def test_bfloat16_is_kept_and_as_exact_as_transformers(hf, ids):
    exact = hf(ids).logits
    half = hf.to(torch.bfloat16)
    model = GPT.from_hf(half)
    logits = model(ids)
    assert logits.dtype == torch.bfloat16 and {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert_parity("logits", logits, half(ids).logits, exact.double())


@torch.no_grad()
def test_from_hf_copies(hf, ids):
    model = GPT.from_hf(hf)
    before = model(ids)
    for parameter in hf.parameters():
        parameter.zero_()
    assert torch.equal(model(ids), before)


def test_gradients_are_those_of_transformers(hf, ids):
    inputs, targets = ids[:, :-1], ids[:, 1:].clone()
    targets[0, :5] = -100

    def gradients(model: transformers.PreTrainedModel) -> dict[str, torch.Tensor]:
        logits = model(inputs).logits
        F.cross_entropy(logits.flatten(0, 1), targets.flatten()).backward()
        as_weights = copy.deepcopy(model)
        for parameter, original in zip(as_weights.parameters(), model.parameters(), strict=True):
            parameter.data = original.grad
        return weights_from_hf(as_weights)

    model = GPT.from_hf(hf)
    logits, loss = model(inputs, targets)
    assert logits.shape == (2, 22, 101)
    loss.backward()
    other = gradients(eager(hf))
    expected = gradients(hf)
    assert set(expected) == {name for name, _ in model.named_parameters()}
    for name, parameter in model.named_parameters():
        assert_parity(name, parameter.grad, other[name], expected[name], factor=3)


def test_autocast(hf, ids):
    inputs, targets = ids[:, :-1], ids[:, 1:]

    def results(model: transformers.PreTrainedModel) -> tuple[torch.Tensor, ...]:
        logits = model(inputs).logits
        loss = F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten())
        return logits, torch.autograd.grad(loss, model.get_output_embeddings().weight)[0], loss

    model, exact = GPT.from_hf(hf), results(hf)
    with torch.autocast("cpu", torch.bfloat16):
        plain = results(hf)
        logits, loss = model(inputs, targets)
    loss.backward()
    assert logits.dtype == plain[0].dtype == torch.bfloat16
    assert_parity("logits", logits, plain[0], exact[0])
    assert_parity("dhead", model.head.weight.grad, plain[1], exact[1], factor=3)
    assert loss.item() == pytest.approx(exact[2].item(), rel=1e-2)
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())


@torch.no_grad()
def test_cached_steps_under_autocast(hf, ids):
    model, exact = GPT.from_hf(hf), hf(ids).logits
    cache = model.new_cache(2, 23)
    with torch.autocast("cpu", torch.bfloat16):
        plain = hf(ids).logits
        steps = [model(part, cache=cache) for part in ids.split([9, 1, 4, *[1] * 9], dim=1)]
        assert model.generate(ids, 3).shape == (2, 26)
    assert {step.dtype for step in steps} == {torch.bfloat16}
    assert_parity("logits", torch.cat(steps, 1), plain, exact)


@torch.no_grad()
def test_cached_steps_give_the_logits_of_one_pass(hf, ids):
    model = GPT.from_hf(hf)
    expected = model(ids)
    cache = model.new_cache(2, 23)
    steps = [model(part, cache=cache) for part in ids.split([9, 1, 4, *[1] * 9], dim=1)]
    assert cache.seqlens.tolist() == [23, 23]
    torch.testing.assert_close(torch.cat(steps, 1), expected, rtol=1e-4, atol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("name", ["gpt2", "llama3-biases"])
def test_a_block_is_one_call_where_rows_are_few(name, ids, monkeypatch):
    counts, own = [], few_rows.block
    monkeypatch.setattr(few_rows, "block", lambda *args: counts.append(out := own(*args)) or out)
    model = GPT.from_hf(random_model(name))

    def steps(**options):
        counts.clear()
        cache = model.new_cache(2, 23)
        return torch.cat([model(p, cache=cache, **options) for p in ids.split([9, 1, 4, *[1] * 9], 1)], 1)

    def served():
        return sum(out is not None for out in counts)

    logits, blocks = steps(), len(model.blocks)
    assert served() == blocks * 11
    torch.testing.assert_close(steps(backend="torch"), logits, rtol=1e-3, atol=1e-3)
    assert not served()
    seen = []
    parts = (model.blocks[0].mlp, model.blocks[1].attention.out, model.blocks[2].mlp_norm)
    for part in (*parts, model.blocks[0].attention_norm, model.blocks[1].dropout):
        handle = part.register_forward_hook(lambda *args: seen.append(args))
        torch.testing.assert_close(steps(), logits, rtol=1e-3, atol=1e-3)
        assert served() == (blocks - 1) * 11
        assert len(seen) == 12 * (2 if part is model.blocks[1].dropout else 1)
        seen.clear()
        handle.remove()

    class Watched(fastgpt.KVCache):
        def attend(self, *args, **named):
            seen.append(args)
            return super().attend(*args, **named)

    cache = model.new_cache(2, 23)
    cache.__class__ = Watched
    model(ids[:, :1], cache=cache)
    assert len(seen) == blocks
    model.train()
    torch.testing.assert_close(steps(), logits, rtol=1e-3, atol=1e-3)
    for block in model.blocks:
        block.dropout = nn.Dropout(0.5)  # in training
    assert not torch.equal(steps(), steps())


@torch.no_grad()
def test_sequences_of_different_lengths_share_a_cache(hf, ids):
    model = GPT.from_hf(hf)
    cache = model.new_cache(2, 23)
    model(ids[:, :12], cache=cache)
    cache.seqlens[1] = 5
    logits = model(torch.stack((ids[0, 12:13], ids[1, 5:6])), cache=cache)
    alone = torch.stack((model(ids[:1, :13])[0, -1:], model(ids[1:, :6])[0, -1:]))
    torch.testing.assert_close(logits, alone, rtol=1e-4, atol=1e-4)


def test_greedy_tokens_are_those_of_transformers(hf, ids):
    hf.generation_config.eos_token_id = None
    mask = torch.ones_like(ids)
    expected = hf.generate(ids, attention_mask=mask, max_new_tokens=30, do_sample=False, pad_token_id=0)
    got = GPT.from_hf(hf).generate(ids, 30)
    assert got.tolist() == expected.tolist() and got.shape == (2, 53)


def test_stream_gives_the_tokens_of_generate(ids):
    model = GPT.from_hf(random_model("llama-gqa-tied"))
    expected = model.generate(ids, 8)[:, 23:]
    stream = model.stream(ids, 8)
    assert next(stream).tolist() == expected[:, 0].tolist()
    assert torch.is_grad_enabled() and not torch.is_inference_mode_enabled()  # between the steps
    assert torch.stack(list(stream), 1).tolist() == expected[:, 1:].tolist()


def test_generation_ends_at_eos(ids):
    model = GPT.from_hf(random_model("gpt2"))

    def continuation(prompts: torch.Tensor, **arguments: object) -> torch.Tensor:
        generator = torch.Generator().manual_seed(1)  # greedy tokens repeat themselves
        return model.generate(prompts, 20, temperature=20.0, generator=generator, **arguments)[:, 23:]

    free = continuation(ids)
    ends = [free[0, 3].item(), free[1, 7].item()]
    lengths = [next(i for i, token in enumerate(row) if token in ends) + 1 for row in free.tolist()]
    assert lengths[0] < lengths[1] < 20
    ended = continuation(ids, eos_token_id=ends)
    assert ended.shape == (2, lengths[1])
    assert ended[0].tolist() == free[0, : lengths[0]].tolist() + ends[:1] * (lengths[1] - lengths[0])
    assert ended[1].tolist() == free[1, : lengths[1]].tolist()

    greedy = model.generate(ids[:1], 20)[0, 23:].tolist()
    stopped = model.generate(ids[:1], 20, eos_token_id=greedy[6])[0, 23:].tolist()
    assert stopped == greedy[: greedy.index(greedy[6]) + 1]


def test_sampling_is_reproducible(ids):
    model = GPT.from_hf(random_model("gpt2"))

    def draw(seed: int) -> list[list[int]]:
        generator = torch.Generator().manual_seed(seed)
        return model.generate(ids, 20, temperature=3.0, top_k=50, generator=generator).tolist()

    assert draw(1) == draw(1) != draw(2)
    assert model.generate(ids, 20, temperature=3.0, top_k=1).tolist() == model.generate(ids, 20).tolist()


@pytest.mark.parametrize("top_k", [None, 3])
def test_samples_follow_the_softmax_of_the_largest_logits(top_k):
    logits, draws, temperature = torch.tensor([1.0, 0.2, -0.5, 1.4, -2.0]), 20000, 0.7
    kept = logits if top_k is None else logits.masked_fill(logits < logits.topk(top_k).values[-1], -torch.inf)
    p = (kept / temperature).softmax(-1)
    generator = torch.Generator().manual_seed(5)
    tokens = sampling.sample(logits.expand(draws, -1), temperature, top_k, generator)
    frequencies = tokens.bincount(minlength=5) / draws
    assert ((frequencies - p).abs() <= 5 * (p * (1 - p) / draws).sqrt()).all()


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("out_features", [40, 41, 7])
@pytest.mark.parametrize("shape", [(1, 1), (3, 1), (2, 2), (3, 3), (4,), (5,), (), (0, 2)])
def test_linear(shape, out_features, bias):
    in_features = 24
    linear = Linear(in_features, out_features, bias)
    # Rows at a distance, as attention's output may have them.
    x = torch.randn(*shape, 2 * in_features)[..., :in_features].requires_grad_()
    out = linear(x)
    expected = x.double() @ linear.weight.double().t() + (linear.bias.double() if bias else 0)
    torch.testing.assert_close(out.double(), expected, rtol=1e-5, atol=1e-5)
    dout = torch.randn_like(out)
    got = torch.autograd.grad(out, [x, *linear.parameters()], dout)
    exact = torch.autograd.grad(expected, [x, *linear.parameters()], dout.double())
    for a, b in zip(got, exact, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def test_linear_under_autocast_has_one_dtype():
    linear = Linear(16, 16, bias=True)
    with torch.autocast("cpu", torch.bfloat16):
        assert linear(torch.randn(1, 16)).dtype == linear(torch.randn(8, 16)).dtype == torch.bfloat16


def test_a_new_model_starts_at_the_entropy_of_a_uniform_guess_and_learns(ids):
    torch.manual_seed(0)
    config = GPTConfig.llama(
        vocab_size=101, max_seqlen=32, hidden_size=32, num_layers=2, nheads=4, nheads_k=2
    )
    model = GPT(config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    losses = []
    for _ in range(15):
        loss = model(ids[:, :-1], ids[:, 1:])[1]
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert losses[0] == pytest.approx(torch.tensor(101.0).log().item(), abs=0.1)
    assert losses[-1] < 0.6 * losses[0]


def test_a_state_dict_makes_the_same_model_again(ids):
    config = GPTConfig.llama(vocab_size=101, max_seqlen=32, hidden_size=32, num_layers=2, nheads=4)
    model, other = GPT(config), GPT(config)
    assert not torch.equal(model(ids), other(ids))
    other.load_state_dict(model.state_dict())
    assert torch.equal(model(ids), other(ids))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"vocab_size": 0}, "vocab_size: got 0, expected an integer of at least 1"),
        ({"num_layers": 2.0}, "num_layers: got 2.0"),
        ({"nheads": 7}, "nheads: got 7, expected a divisor of hidden_size 768"),
        ({"nheads_k": 5}, "nheads_k: got 5, expected a divisor of nheads 12"),
        ({"intermediate_size": -1}, "intermediate_size: got -1"),
        ({"headdim": 33, "positions": "rope"}, "headdim: got 33, expected an even number"),
        ({"norm": "batch_norm"}, "norm: got 'batch_norm', expected 'layer_norm' or 'rms_norm'"),
        ({"norm_eps": float("nan")}, "norm_eps: got nan"),
        ({"rope_scaling": RopeScaling(8.0, 1.0, 4.0, 32)}, "rope_scaling: .* without positions='rope'"),
    ],
)
def test_config_errors_name_the_field(fields, message):
    with pytest.raises(ValueError, match=f"^{message}"):
        GPTConfig(**fields)


def test_rope_scaling_errors_name_the_field():
    with pytest.raises(ValueError, match=r"^rope_scaling.factor: got 0"):
        RopeScaling(0, 1.0, 4.0, 32)
    with pytest.raises(ValueError, match=r"^rope_scaling.high_freq_factor: got 1.0, expected more than"):
        RopeScaling(8.0, 1.0, 1.0, 32)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens: got 0"),
        ({"max_new_tokens": 42}, "max_new_tokens: got 42 after a prompt of 23 tokens, .* max_seqlen 64"),
        ({"temperature": -1.0}, "temperature: got -1.0"),
        ({"top_k": 0}, "top_k: got 0, expected an integer from 1 to vocab_size 101"),
        ({"top_k": 102}, "top_k: got 102"),
        ({"input_ids": torch.zeros(5, dtype=torch.int64)}, r"input_ids: got shape \(5,\)"),
        ({"input_ids": torch.zeros(1, 0, dtype=torch.int64)}, r"input_ids: got shape \(1, 0\)"),
        ({"input_ids": torch.zeros(0, 5, dtype=torch.int64)}, r"input_ids: got shape \(0, 5\), expected"),
        ({"input_ids": [[1, 2]]}, r"input_ids: got list, expected a torch.Tensor \(batch, seqlen\)"),
        ({"input_ids": torch.zeros(1, 5)}, "input_ids: got dtype torch.float32, expected torch.int64"),
        ({"max_new_tokens": 2.5}, "max_new_tokens: got 2.5, expected an integer"),
        ({"max_new_tokens": "2"}, "max_new_tokens: got '2', expected an integer"),
        ({"max_new_tokens": True}, "max_new_tokens: got True, expected an integer"),
        ({"temperature": "1"}, "temperature: got '1', expected a finite number"),
        ({"temperature": float("nan")}, "temperature: got nan, expected a finite number"),
        ({"temperature": float("inf")}, "temperature: got inf, expected a finite number"),
        ({"top_k": 2.5, "temperature": 1.0}, "top_k: got 2.5, expected an integer from 1 to vocab_size 101"),
        ({"eos_token_id": 1.5}, "eos_token_id: got 1.5, expected an integer, a sequence of them"),
        ({"eos_token_id": [1, 1.5]}, r"eos_token_id: got \[1, 1.5\], expected an integer, a sequence"),
        ({"eos_token_id": "2"}, "eos_token_id: got '2', expected an integer"),
    ],
)
def test_generate_errors_name_the_argument(ids, arguments, message):
    model = GPT.from_hf(random_model("gpt2"))
    arguments = {"input_ids": ids, "max_new_tokens": 5} | arguments
    with pytest.raises((TypeError, ValueError), match=f"^{message}"):
        model.stream(**arguments)  # at once, not with the first token


@torch.no_grad()
def test_forward_errors_name_the_argument(ids):
    model = GPT.from_hf(random_model("llama"))
    with pytest.raises(ValueError, match=r"^input_ids: got 66 tokens, expected at most max_seqlen 64"):
        model(ids.repeat(1, 3)[:, :66])
    with pytest.raises(ValueError, match=r"^targets: got shape \(2, 22\), expected \(2, 23\)"):
        model(ids, ids[:, 1:])
    with pytest.raises(ValueError, match=r"^targets: .* without last_only"):
        model(ids, ids, last_only=True)
    with pytest.raises(ValueError, match=r"^cache: got batch 3, expected 2 like input_ids"):
        model(ids, cache=model.new_cache(3, 23))
    with pytest.raises(ValueError, match=r"^cache: got capacity 65, expected at most max_seqlen 64"):
        model(ids, cache=model.new_cache(2, 65))
    cache = model.new_cache(2, 25)
    model(ids, cache=cache)
    with pytest.raises(ValueError, match=r"^input_ids: got 3 tokens after the 23 in the cache"):
        model(ids[:, :3], cache=cache)


@pytest.mark.parametrize(
    ("name", "field", "value", "message"),
    [
        ("llama", "rope_parameters", {"rope_type": "yarn", "rope_theta": 1e4}, "rope_type: got 'yarn'"),
        (
            "llama",
            "rope_parameters",
            {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5},
            "partial_rotary_factor: got 0.5",
        ),
        ("llama", "hidden_act", "gelu", "hidden_act: got 'gelu' in the model's config, GPT has only 'silu'"),
        ("llama", "sliding_window", 16, "sliding_window: got 16"),
        ("gpt2", "activation_function", "relu", "activation_function: got 'relu'"),
        ("gpt2", "scale_attn_by_inverse_layer_idx", True, "scale_attn_by_inverse_layer_idx: got True"),
    ],
)
def test_from_hf_refuses_what_gpt_does_not_have(name, field, value, message):
    model = random_model(name)
    setattr(model.config, field, value)
    with pytest.raises(ValueError, match=f"^{message}"):
        GPT.from_hf(model)


@pytest.mark.parametrize(
    ("model", "name"),
    [
        (lambda: transformers.MistralForCausalLM(transformers.MistralConfig(**LLAMA)), "MistralForCausalLM"),
        (lambda: random_model("llama").model, "LlamaModel"),
        (lambda: torch.nn.Linear(2, 2), "Linear"),
        (lambda: None, "NoneType"),
    ],
)
def test_from_hf_refuses_other_architectures(model, name):
    with pytest.raises(TypeError, match=rf"^model: got {name}, expected GPT2LMHeadModel or LlamaForCausalLM"):
        GPT.from_hf(model())


def test_a_gpt_needs_torch_alone():
    code = (
        "import sys; sys.modules['transformers'] = None\n"
        "import fastgpt, torch\n"
        "assert 'fastgpt.gpt' not in sys.modules\n"
        "model = fastgpt.GPT(fastgpt.GPTConfig(vocab_size=9, hidden_size=8, num_layers=1, nheads=2))\n"
        "assert model.generate(torch.zeros(1, 1, dtype=torch.int64), 3).shape == (1, 4)\n"
        "fastgpt.patch, fastgpt.unpatch\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
