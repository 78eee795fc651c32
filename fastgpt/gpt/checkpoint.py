"""Checkpoints: one file with all that a run needs to go on as if it had never stopped.

A zip archive by ``torch.save`` that holds only tensors, numbers, texts and containers of them.
"""

from __future__ import annotations

import dataclasses
import zipfile
from pathlib import Path
from typing import Any

import torch

from fastgpt.gpt.config import GPTConfig, RopeScaling
from fastgpt.gpt.files import replacing
from fastgpt.gpt.model import GPT

FORMAT = "fastgpt checkpoint 1"


def save(path: Path, model: GPT, tokenizer: str, **rest: Any) -> None:
    """Writes a checkpoint in the place of the one that ``path`` may hold, which until then stays whole.

    Args:
        tokenizer: the name that :func:`fastgpt.gpt.tokenizer.load` knows.
        rest: more that :func:`load` shall return.
    """
    content = {
        "format": FORMAT,
        "config": dataclasses.asdict(model.config),
        "weights": model.state_dict(),
        "tokenizer": tokenizer,
        **rest,
    }
    with replacing(path) as file:
        torch.save(content, file)


def load(path: str | Path) -> dict[str, Any]:
    """The checkpoint in a file, its tensors on the CPU.

    Returns:
        ``config`` (a dict), ``weights``, ``tokenizer`` and the rest of what :func:`save` was given.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is damaged, or no checkpoint of fastgpt.
    """
    try:
        # torch.load does not look at the checksums that torch.save has written.
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()
    except zipfile.BadZipFile as error:
        raise ValueError(f"{path} is no checkpoint of fastgpt, or only a part of one: {error}") from error
    if damaged is not None:
        raise ValueError(f"{path} is damaged: the checksum of {damaged} in it does not fit")
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # pickle's and torch's own are of many types
        raise ValueError(f"{path} is no checkpoint of fastgpt: {error}") from error
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        found = content.get("format") if isinstance(content, dict) else type(content).__name__
        raise ValueError(f"{path} is no checkpoint of this version of fastgpt: {found!r}, not {FORMAT!r}")
    return content


def config_of(content: dict[str, Any]) -> GPTConfig:
    fields = dict(content["config"])
    if fields["rope_scaling"] is not None:
        fields["rope_scaling"] = RopeScaling(**fields["rope_scaling"])
    return GPTConfig(**fields)


def model_of(content: dict[str, Any]) -> GPT:
    """The model of a checkpoint, on the CPU."""
    model = GPT(config_of(content))
    model.load_state_dict(content["weights"])
    return model
