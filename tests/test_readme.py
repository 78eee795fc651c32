"""The README's Python, run as it stands."""

from __future__ import annotations

import re
import socket
from pathlib import Path

import pytest
import torch
import transformers

README = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")


def _code(heading: str) -> str:
    """The first Python block below a heading."""
    below = README[README.index(f"\n{heading}\n") :]
    found = re.search(r"```python\n(.*?)```", below, re.S)
    assert found is not None
    return found[1]


@pytest.fixture
def folder(tmp_path):
    config = transformers.GPT2Config(
        n_embd=64, n_head=4, n_layer=2, n_positions=64, vocab_size=99, bos_token_id=1, eos_token_id=2
    )
    transformers.GPT2LMHeadModel(config).save_pretrained(tmp_path)
    return str(tmp_path)


@pytest.fixture
def alone(monkeypatch):
    """As one process that torchrun has started."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    for name, value in {"RANK": 0, "WORLD_SIZE": 1, "MASTER_ADDR": "localhost", "MASTER_PORT": port}.items():
        monkeypatch.setenv(name, str(value))
    yield
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


@pytest.mark.usefixtures("alone")
def test_use_and_models_that_you_have(folder):
    tokens = torch.randint(3, 99, (2, 8))
    names = {"input_ids": tokens, "targets": tokens}
    for heading in (
        "## Use",
        "### In a model that you have",
        "### In any PyTorch model",
        "### Sharded, checkpointed, vectorised",
        "### In code that is written for flash-attn",
        "### The GPT",
    ):
        exec(_code(heading).replace("path/to/gpt2-or-llama", folder), names)
