"""SmolLM2-135M-Instruct, patched, against itself as it comes."""

import copy

import pytest
import torch
from backends import assert_parity
from test_gpt import eager

import fastgpt
from fastgpt import demo

CHATS = ["Explain in a few sentences why the sky is blue.", "What is 17 + 25?"]


@pytest.fixture(scope="module")
def smollm2():
    """The model and a chat prompt, (1, tokens)."""
    model, tokenizer = demo._load()
    chats = [[{"role": "user", "content": text}] for text in CHATS]
    tokenizer.padding_side = "left"
    prompts = tokenizer.apply_chat_template(
        chats, add_generation_prompt=True, return_tensors="pt", return_dict=True, padding=True
    )
    return model, prompts


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_logits(smollm2, dtype):
    model, prompts = smollm2
    real = prompts["attention_mask"].bool()
    model = copy.deepcopy(model).to(dtype)
    plain = eager(model)(**prompts).logits[real]
    got = fastgpt.patch(model)(**prompts).logits[real]
    exact = fastgpt.unpatch(model).double()
    unpadded = [ids[mask][None] for ids, mask in zip(prompts["input_ids"], real, strict=True)]
    assert got.dtype == dtype
    assert_parity("logits", got, plain, torch.cat([exact(ids).logits[0] for ids in unpadded]))


def test_greedy_tokens(smollm2):
    model, prompts = smollm2
    expected = model.generate(**prompts, max_new_tokens=20, do_sample=False)
    got = fastgpt.patch(copy.deepcopy(model)).generate(**prompts, max_new_tokens=20, do_sample=False)
    assert torch.equal(got, expected)
