"""The cache of a patched transformers model, which appends in place, against the one that copies."""

import copy
import io
import pickle

import pytest
import torch
import transformers
from test_gpt import random_model
from test_transformers import ARCHITECTURES
from transformers.cache_utils import DynamicCache, EncoderDecoderCache

import fastgpt
from fastgpt.integrations.transformers.cache import Room, append_in_place

WINDOW = 8
LAYERS = 3


@pytest.fixture(autouse=True)
def without_gradients():
    with torch.no_grad():
        yield


def config(windows):
    return transformers.MistralConfig(
        num_hidden_layers=LAYERS, sliding_window=WINDOW if windows else None, num_attention_heads=4
    )


def pair(windows, **options):
    """A cache that copies and one that does not."""
    caches = [DynamicCache(config=config(windows), **options) for _ in range(2)]
    append_in_place(caches[1])
    return caches


def update(caches, layer, batch, length, **options):
    new = [torch.randn(batch, length, 2, 5, **options).transpose(1, 2) for _ in range(2)]
    returned = [cache.update(*new, layer) for cache in caches]
    for one, other in zip(*returned, strict=True):
        assert one.shape == other.shape and torch.equal(one, other)


def assert_same(one, other):
    assert one.get_seq_length() == other.get_seq_length()
    for a, b in zip(one.layers, other.layers, strict=True):
        assert a.get_mask_sizes(1) == b.get_mask_sizes(1)
        if a.keys is not None:
            assert torch.equal(a.keys, b.keys) and torch.equal(a.values, b.values)


@pytest.mark.parametrize("windows", [False, True])
def test_whatever_is_done_with_a_cache(windows):
    caches = pair(windows)
    batch = 2
    done = set()
    needed = {"crop", "reorder", "repeat", "select", "deepcopy", "branch", "reset", "update"}
    while not done >= needed:
        deed = sorted(needed)[int(torch.randint(len(needed), ()))] if int(torch.randint(2, ())) else "update"
        length = caches[0].get_seq_length()
        index = torch.randint(batch, (batch,))
        if deed == "crop" and length > 1 and (not windows or length < WINDOW):
            cut = -int(torch.randint(1, length, ()))
            for cache in caches:
                cache.crop(cut)
        elif deed == "reorder" and length:
            for cache in caches:
                cache.reorder_cache(index)
        elif deed == "repeat" and length and batch < 4:
            batch *= 2
            for cache in caches:
                cache.batch_repeat_interleave(2)
        elif deed == "select" and length and batch > 1:
            batch -= 1
            for cache in caches:
                cache.batch_select_indices(index[:batch])
        elif deed == "deepcopy":
            caches = copy.deepcopy(caches)
        elif deed == "branch" and length:
            branches = [branch(cache) for cache in caches]
            for layer in range(LAYERS):
                update(branches, layer, batch, 2)
            assert_same(*branches)
        elif deed == "reset" and length > 20:
            for cache in caches:
                cache.reset()
        else:
            deed = "update"
            count = int(torch.randint(1, 4, ())) if int(torch.randint(10, ())) else 90
            for layer in range(LAYERS):
                update(caches, layer, batch, count)
        done.add(deed)
        assert_same(*caches)


def branch(cache):
    """Of the same tensors, with layers of its own."""
    twin = copy.copy(cache)
    twin.layers = [copy.copy(layer) for layer in cache.layers]
    return twin


def test_what_was_taken_from_a_cache_stays():
    caches = pair(False)
    update(caches, 0, 1, 5)
    taken = caches[1].layers[0].keys, caches[1].layers[0].values
    before = [t.clone() for t in taken]
    for cache in caches:
        cache.crop(-2)
    update(caches, 0, 1, 3)
    assert_same(*caches)
    for now, then in zip(taken, before, strict=True):
        assert torch.equal(now, then)


@pytest.mark.parametrize("windows", [False, True])
def test_nothing_is_copied_but_where_the_room_ends(windows):
    _, cache = pair(windows)
    buffers = set()
    for _ in range(1000):
        cache.update(*torch.randn(2, 1, 2, 1, 5), 0)
        buffers.add(cache.layers[0].keys.untyped_storage().data_ptr())
    assert len(buffers) <= (24 if windows else 9)  # each half as long again; with a window, 64 longer than it


def by_torch_save(cache):
    stored = io.BytesIO()
    torch.save(cache, stored)
    stored.seek(0)
    return torch.load(stored, weights_only=False)


def by_pickle(cache):
    return pickle.loads(pickle.dumps(cache))


def in_place(layer):
    layer.keys.mul_(2)


def anew(layer):
    layer.keys.data = layer.keys.data * 2


@pytest.mark.parametrize("change", [in_place, anew])
@pytest.mark.parametrize("copied", [lambda cache: cache, copy.deepcopy, by_torch_save, by_pickle])
def test_keys_changed_by_hand_are_kept(copied, change):
    caches = pair(False)
    update(caches, 0, 1, 5)
    caches = [copied(cache) for cache in caches]
    for cache in caches:
        change(cache.layers[0])
    for _ in range(2):
        update(caches, 0, 1, 1)
    assert_same(*caches)


@pytest.mark.parametrize("copied", [copy.deepcopy, by_torch_save, by_pickle])
def test_a_copy_is_on_its_own(copied):
    caches = pair(False)
    update(caches, 0, 1, 5)
    others = [copied(cache) for cache in caches]
    for _ in range(3):
        update(others, 0, 1, 1)
        update(caches, 0, 1, 1)
    assert_same(*caches)
    assert_same(*others)
    assert not torch.equal(caches[1].layers[0].keys, others[1].layers[0].keys)


def test_a_cache_begun_in_inference_mode_goes_on_outside():
    caches = pair(False)
    with torch.inference_mode():
        update(caches, 0, 1, 5)
    for _ in range(3):
        update(caches, 0, 1, 1)
    assert_same(*caches)


def test_what_torch_cat_refuses_is_refused():
    for new in (torch.randn(2, 2, 1, 5), torch.randn(1, 2, 1, 4), torch.randn(1, 3, 1, 5)):
        caches = pair(False)
        update(caches, 0, 1, 5)
        for cache in caches:
            with pytest.raises(RuntimeError, match="Sizes of tensors must match"):
                cache.update(new, new, 0)
    caches = pair(False)
    update(caches, 0, 1, 5)
    update(caches, 0, 1, 1, dtype=torch.float64)  # which it promotes


@torch.enable_grad()
@pytest.mark.parametrize("whose", ["keys", "queries"])
def test_gradients_reach_what_was_appended(whose):
    grads = []
    for cache in pair(False):
        k, v = (torch.linspace(i, 1, 40).view(1, 2, 4, 5) for i in range(2))
        q = torch.linspace(1, 2, 40).view(1, 2, 4, 5)
        leaves = [t.requires_grad_() for t in ((k, v) if whose == "keys" else (q,))]
        loss = 0
        for part in range(2):
            rows = slice(2 * part, 2 * part + 2)
            keys, values = cache.update(k[:, :, rows], v[:, :, rows], 0)
            loss = loss + (q[:, :, : keys.shape[2]] * keys * values).sum()  # both are kept for backward
        loss.backward()
        grads.append([leaf.grad for leaf in leaves])
    for one, other in zip(*grads, strict=True):
        assert torch.equal(one, other) and one.any()


def test_which_caches_are_changed():
    both = EncoderDecoderCache(DynamicCache(), DynamicCache())
    append_in_place(both)
    both.self_attention_cache.update(*torch.randn(2, 1, 2, 3, 5), 0)
    both.cross_attention_cache.update(*torch.randn(2, 1, 2, 3, 5), 0)
    kinds = [type(c.layers[0]).__name__ for c in (both.self_attention_cache, both.cross_attention_cache)]
    assert kinds == ["InPlaceLayer", "DynamicLayer"]
    static = transformers.StaticCache(config=config(True), max_cache_len=8)
    kinds = [type(layer) for layer in static.layers]
    append_in_place(static)
    assert [type(layer) for layer in static.layers] == kinds


@torch.no_grad()
@pytest.mark.parametrize("name", ["gpt2", "llama-gqa-tied"])
def test_a_patched_model_copies_no_keys(name, monkeypatch):
    model = fastgpt.patch(random_model(name))
    cache = DynamicCache(config=model.config)
    ids = torch.randint(101, (2, 30))
    model(ids, past_key_values=cache)
    where = [layer.keys.data_ptr() for layer in cache.layers]
    joined = []
    cat = torch.cat
    monkeypatch.setattr(torch, "cat", lambda parts, *a, **k: joined.append(parts) or cat(parts, *a, **k))
    for token in ids.split(1, 1):
        model(token, past_key_values=cache)
    assert [layer.keys.data_ptr() for layer in cache.layers] == where
    assert all(max(part.numel() for part in parts) < cache.layers[0].keys.numel() / 4 for parts in joined)
    fastgpt.unpatch(model)
    fastgpt.patch(model, cache=False)
    cache = DynamicCache(config=model.config)
    model(ids, past_key_values=cache)
    assert type(cache.layers[0]).__name__ == "DynamicLayer"


@pytest.mark.parametrize("name", ["gpt2", "llama-gqa-tied"])
def test_the_cache_that_generate_makes_appends_in_place(name):
    model = fastgpt.patch(random_model(name))
    options = {"max_new_tokens": 3, "do_sample": False, "return_dict_in_generate": True}
    out = model.generate(torch.randint(101, (1, 5)), **options)
    assert {type(layer).__name__ for layer in out.past_key_values.layers} == {"InPlaceLayer"}


@torch.no_grad()
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_logits_are_those_of_a_cache_that_copies(name):
    torch.manual_seed(5)
    of_architecture = transformers.AutoModelForCausalLM.from_config(ARCHITECTURES[name][0]).eval()
    ids = torch.randint(101, (2, 40))

    def logits(**options):
        # By their steps: where rows are few, a block on a cache in place is one call, with bits of its own.
        model = fastgpt.patch(of_architecture, linear=False, **options)
        cache = DynamicCache(config=model.config)
        parts = [model(part, past_key_values=cache).logits for part in ids.split([17, 1, 1, 3, 1, 17], 1)]
        kinds = {type(layer).__name__ for layer in cache.layers}
        fastgpt.unpatch(model)
        return torch.cat(parts, 1), kinds

    expected, kinds = logits(cache=False)
    got, others = logits()
    assert all(kind.startswith("Dynamic") for kind in kinds)
    assert others == {kind.replace("Dynamic", "InPlace") for kind in kinds}
    assert torch.equal(got, expected)


def test_a_stretch_of_a_buffer_that_has_been_left_gives_nothing_up():
    """Two that have the same rows before them claim what comes next; the first of them takes it back."""
    room = Room()
    with torch.no_grad():
        past = room.append(torch.tensor([]), torch.randn(1, 2, 5, 4))
        first, second = room.claim(past, 1), room.claim(past, 1)
        assert first.buffer is not second.buffer and first.end == second.end == 6
        room.release(first, 1)
        assert room.used == 6
        room.release(second, 1)
        assert room.used == 5
