"""fastgpt.patch on models that are quantised, offloaded, compiled, checkpointed, saved or trained by Trainer,
and in wrappers of PEFT, torch.compile and data parallel training."""

import copy
import json
import time

import accelerate
import peft
import pytest
import torch
import torch.distributed as dist
import torchao.quantization
import transformers
from accelerate.hooks import remove_hook_from_submodules
from backends import assert_parity
from test_transformers_generate import CONFIGS, random_model
from torch import nn

import fastgpt


@pytest.fixture(params=["gpt2", "llama"])
def stock(request):
    return random_model(CONFIGS[request.param])


@pytest.fixture
def ids():
    return torch.randint(101, (2, 19), generator=torch.Generator().manual_seed(3))


def eager(model):
    """By transformers' other way to attention: what two correct ways differ by."""
    model = copy.deepcopy(model)
    model.set_attn_implementation("eager")
    return model


def greedy(model, ids):
    return model.generate(input_ids=ids, max_new_tokens=8, do_sample=False).tolist()


def without_dropout(model):
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    return model


@torch.no_grad()
def check(got, stock, ids):
    """The logits of ``got`` are those of ``stock``, and came another way."""
    expected, other, logits = (m(ids, use_cache=False).logits for m in (stock, eager(stock), got))
    assert_parity("logits", logits, other, expected)
    assert not torch.equal(logits, expected)


# Quantised


def quantised(model, dtype):
    with pytest.warns(DeprecationWarning):
        return torch.ao.quantization.quantize_dynamic(copy.deepcopy(model), {nn.Linear}, dtype=dtype)


@torch.no_grad()
@pytest.mark.parametrize("first", ["patched", "quantised"])
def test_dynamic_quantisation(stock, ids, first):
    def ours(dtype):
        if first == "patched":
            return quantised(fastgpt.patch(copy.deepcopy(stock)), dtype)
        return fastgpt.patch(quantised(stock, dtype))

    half = quantised(stock, torch.float16)
    assert not torch.equal(half(ids).logits, stock(ids).logits)
    check(ours(torch.float16), half, ids)
    # In int8 activations are rounded too, and that may turn on the last bit.
    assert greedy(ours(torch.qint8), ids) == greedy(quantised(stock, torch.qint8), ids)


@torch.no_grad()
def test_torchao_weights(ids, tmp_path):
    random_model(CONFIGS["llama"]).save_pretrained(tmp_path)
    config = transformers.TorchAoConfig(torchao.quantization.Int8WeightOnlyConfig())
    stock = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=config).eval()
    ours = fastgpt.patch(
        transformers.AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=config)
    )
    check(ours.eval(), stock, ids)


# PEFT


def lora(model):
    torch.manual_seed(2)
    layers = ["c_attn"] if model.config.model_type == "gpt2" else ["q_proj", "v_proj"]
    return peft.get_peft_model(model, peft.LoraConfig(target_modules=layers, init_lora_weights=False)).eval()


def test_adapters_of_peft(stock, ids, tmp_path):
    expected = lora(copy.deepcopy(stock))
    inside = lora(fastgpt.patch(copy.deepcopy(stock)))
    outside = lora(copy.deepcopy(stock))
    assert fastgpt.patch(outside) is outside

    def gradients(model):
        model.zero_grad()
        model(ids, labels=ids).loss.backward()
        return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}

    dense = copy.deepcopy(expected)
    dense.get_base_model().set_attn_implementation("eager")
    other, exact = gradients(dense), gradients(expected)
    for model in (inside, outside):
        check(model, expected.get_base_model(), ids)
        assert greedy(model, ids) == greedy(expected, ids)
        grads = gradients(model)
        assert grads.keys() == exact.keys()
        for name, grad in grads.items():
            assert_parity(name, grad, other[name], exact[name], factor=3)

    inside.save_pretrained(tmp_path)
    assert "fastgpt" not in (tmp_path / "adapter_config.json").read_text()
    merged = inside.merge_and_unload()
    check(merged, expected.merge_and_unload(), ids)
    fastgpt.unpatch(merged)
    assert fastgpt.unpatch(outside) is outside
    assert outside.config._attn_implementation == "sdpa"


@torch.no_grad()
def test_prefixes_of_peft(stock, ids):
    def prefixed(model):
        torch.manual_seed(2)
        config = peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
        return peft.get_peft_model(model, config).eval()

    expected, other = prefixed(copy.deepcopy(stock)), prefixed(eager(stock))
    ours = fastgpt.patch(prefixed(copy.deepcopy(stock)))
    assert_parity("logits", ours(ids).logits, other(ids).logits, expected(ids).logits)
    assert greedy(ours, ids) == greedy(expected, ids)


# Other wrappers


def test_a_model_in_distributed_data_parallel(stock, ids):
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        wrapper = nn.parallel.DistributedDataParallel(copy.deepcopy(stock))
        assert fastgpt.patch(wrapper) is wrapper
        check(wrapper, stock, ids)
        wrapper(ids, labels=ids).loss.backward()
        assert all(p.grad is not None for p in wrapper.parameters())
        fastgpt.unpatch(wrapper)
        assert wrapper.module.config._attn_implementation == "sdpa"
    finally:
        dist.destroy_process_group()
        # gloo's thread drops what it has of Python, for which it waits for the GIL. The wrapper's destructor
        # joins that thread and has the GIL: once in some hundred runs, both waited for ever.
        time.sleep(0.2)


def test_a_model_in_data_parallel_is_refused(stock, ids):
    wrapper = nn.DataParallel(stock)
    with pytest.raises(TypeError, match=r"^model: got DataParallel, whose replicas.*norm=False"):
        fastgpt.patch(wrapper)
    expected = copy.deepcopy(stock)
    fastgpt.patch(stock, norm=False)
    check(wrapper, expected, ids)


# torch.compile


@pytest.fixture
def one_layer(stock):
    """Of the same model: compiling takes as long as there are layers."""
    layers = stock.transformer.h if stock.config.model_type == "gpt2" else stock.model.layers
    del layers[1:]
    stock.config.num_hidden_layers = 1
    torch._dynamo.reset()
    yield stock
    torch._dynamo.reset()


@pytest.mark.parametrize("first", ["patched", "compiled"])
def test_a_compiled_model(one_layer, ids, first):
    """Compiled as one graph; patching and undoing it takes effect in what has been compiled before."""
    stock, model = one_layer, copy.deepcopy(one_layer)
    if first == "patched":
        fastgpt.patch(model)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    if first == "compiled":
        with torch.no_grad():
            assert torch.equal(compiled(ids, use_cache=False).logits, stock(ids).logits)
        assert fastgpt.patch(compiled) is compiled
    check(compiled, stock, ids)
    fastgpt.unpatch(compiled)
    with torch.no_grad():
        assert torch.equal(compiled(ids, use_cache=False).logits, stock(ids).logits)


def test_gradients_of_a_compiled_model_with_padding(one_layer, ids):
    mask = torch.ones_like(ids)
    mask[1, :5] = 0
    options = {"attention_mask": mask, "position_ids": (mask.cumsum(1) - 1).clamp(min=0), "use_cache": False}
    dlogits = torch.randn(int(mask.sum()), 101)

    def gradients(model, called):
        called(ids, **options).logits[mask.bool()].backward(dlogits)
        return {name: p.grad for name, p in model.named_parameters()}

    dense, model = eager(one_layer), fastgpt.patch(copy.deepcopy(one_layer))
    other, expected = gradients(dense, dense), gradients(one_layer, one_layer)
    got = gradients(model, torch.compile(model, backend="aot_eager", fullgraph=True))
    for name, grad in got.items():
        assert_parity(name, grad, other[name], expected[name], factor=3)


# Gradient checkpointing


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_gradient_checkpointing(stock, ids, use_reentrant):
    """The same bits as without, each block computed again, with the same attention dropout."""
    if stock.config.model_type == "gpt2":
        for block in stock.transformer.h:
            block.attn.attn_dropout.p = 0.3
    else:
        for layer in stock.model.layers:
            layer.self_attn.attention_dropout = 0.3

    def gradients(**options):
        model = fastgpt.patch(copy.deepcopy(stock)).train()
        if options:
            model.gradient_checkpointing_enable(options)
        attentions, seen = [m for m in model.modules() if "is_causal" in vars(m)], []
        for attention in attentions:
            attention.register_forward_pre_hook(lambda module, _: seen.append(module))
        torch.manual_seed(1)
        model(ids, labels=ids, use_cache=False).loss.backward()
        assert len(seen) == (2 if options else 1) * len(attentions)
        return {name: p.grad for name, p in model.named_parameters()}

    expected = gradients()
    for name, grad in gradients(use_reentrant=use_reentrant).items():
        assert torch.equal(grad, expected[name]), name


# Files and devices


@torch.no_grad()
@pytest.mark.parametrize("way", ["patch", "attn_implementation"])
def test_a_saved_model_is_a_stock_model(stock, ids, tmp_path, way):
    expected = stock(ids).logits
    if way == "patch":
        fastgpt.patch(stock)
    else:
        stock.set_attn_implementation(fastgpt.register())
    stock.save_pretrained(tmp_path)
    assert "fastgpt" not in json.dumps(json.loads((tmp_path / "config.json").read_text()))
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert loaded.config._attn_implementation == "sdpa"
    assert torch.equal(loaded(ids).logits, expected)


OFFLOADED = {
    "gpt2": {"": "cpu", "transformer.h.1": "disk", "transformer.h.2": "disk", "transformer.ln_f": "disk"},
    "llama": {"": "cpu", "model.layers.1": "disk", "model.norm": "disk"},
}


def device_map(model):
    """Every leaf on the CPU or, of some, on disk."""
    places = OFFLOADED[model.config.model_type]
    names = [name for name, module in model.named_modules() if not list(module.children())]
    return {n: next((p for part, p in places.items() if part and n.startswith(part)), "cpu") for n in names}


@torch.no_grad()
@pytest.mark.parametrize("where", ["cpu", "disk"])
def test_device_maps(stock, ids, tmp_path, capsys, where):
    stock.save_pretrained(tmp_path)
    model = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path,
        device_map="cpu" if where == "cpu" else device_map(stock),
        offload_folder=tmp_path / "offload",
    )
    expected = model(ids).logits
    assert any(p.is_meta for p in model.parameters()) == (where == "disk")
    fastgpt.patch(model)
    assert "left as they are" not in capsys.readouterr().out
    check(model, stock, ids)
    assert greedy(model, ids) == greedy(stock, ids)
    fastgpt.unpatch(model)
    assert torch.equal(model(ids).logits, expected)


@torch.no_grad()
@pytest.mark.parametrize("first", ["patched", "hooked"])
def test_offloading_before_or_after_patching(stock, ids, first):
    model = copy.deepcopy(stock)
    if first == "patched":
        fastgpt.patch(model)
    accelerate.cpu_offload(model, execution_device=torch.device("cpu"))
    if first == "hooked":
        fastgpt.patch(model)
    check(model, stock, ids)
    fastgpt.unpatch(model)
    assert torch.equal(model(ids).logits, stock(ids).logits)
    fastgpt.patch(model)
    remove_hook_from_submodules(model)
    check(model, stock, ids)
    fastgpt.unpatch(model)
    assert torch.equal(model(ids).logits, stock(ids).logits)


# Trainer


def trained(model, ids, folder, **options):
    arguments = transformers.TrainingArguments(
        folder,
        max_steps=1,
        per_device_train_batch_size=2,
        optim="sgd",  # unlike Adam's, its step is the gradient's size
        learning_rate=0.1,
        report_to=[],
        use_cpu=True,
        save_strategy="no",
        disable_tqdm=True,
        **options,
    )
    data = [{"input_ids": row, "labels": row} for row in ids]
    loss = transformers.Trainer(model, arguments, train_dataset=data).train().training_loss
    return loss, {name: p.detach() for name, p in model.named_parameters()}


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_a_step_of_trainer(stock, ids, tmp_path, precision):
    without_dropout(stock)
    options = {"bf16": precision == "bfloat16"}
    exact, expected = trained(copy.deepcopy(stock), ids, tmp_path)
    plain, other = trained(
        copy.deepcopy(stock) if options["bf16"] else eager(stock), ids, tmp_path, **options
    )
    loss, parameters = trained(fastgpt.patch(copy.deepcopy(stock)), ids, tmp_path, **options)
    assert_parity("loss", torch.tensor(loss), torch.tensor(plain), torch.tensor(exact))
    for name, parameter in parameters.items():
        assert_parity(name, parameter, other[name], expected[name], factor=3)
    before = dict(stock.named_parameters())
    assert all(not torch.equal(parameter, before[name]) for name, parameter in parameters.items())


def test_training_and_evaluation_take_turns(stock, ids):
    if stock.config.model_type == "llama":
        stock.config.attention_dropout = 0.3
        for layer in stock.model.layers:
            layer.self_attn.attention_dropout = 0.3
    expected = copy.deepcopy(stock)
    fastgpt.patch(stock)
    for _ in range(2):
        stock.train()
        with torch.no_grad():
            assert not torch.allclose(stock(ids).logits, stock(ids).logits)
        check(stock.eval(), expected, ids)
