"""The tokens of a training run: written once, mapped into memory, and drawn from by seed and step."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

import torch
from torch import Tensor

from fastgpt.gpt.settings import SettingError, Settings
from fastgpt.gpt.tokenizer import Tokenizer

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    Tokens = NDArray[np.uint16] | NDArray[np.uint32]

HASHED = 1 << 20  # bytes at once


def dtype_of(vocab_size: int) -> str:
    """numpy's name for the smallest type that holds every token; little-endian on any machine."""
    return "<u2" if vocab_size <= 1 << 16 else "<u4"


def digest(paths: Sequence[Path]) -> str:
    """SHA-256 of the files' contents, of their sizes and of their order."""
    total = hashlib.sha256()
    for path in paths:
        own = hashlib.sha256()
        with open(path, "rb") as file:
            while block := file.read(HASHED):
                own.update(block)
        total.update(own.digest())
    return total.hexdigest()


def check_readable(paths: Sequence[Path]) -> int:
    """The files' bytes in all; a SettingError if one of them cannot be read."""
    total = 0
    for path in paths:
        try:
            with open(path, "rb") as file:
                total += file.seek(0, 2)
        except OSError as error:
            raise SettingError("data", f"{path} cannot be read: {error.strerror}") from error
    return total


def write(
    paths: Sequence[Path], tokenizer: Tokenizer, target: BinaryIO, progress: Callable[[int], object]
) -> int:
    """Writes the tokens of the files, an end of text after each, as :func:`dtype_of` says.

    Args:
        progress: is called with the number of bytes read since it was called last.

    Returns:
        How many tokens were written.

    Raises:
        SettingError: a file is not the UTF-8 text that the tokenizer wants.
    """
    import numpy as np

    dtype, count = dtype_of(tokenizer.vocab_size), 0
    for path in paths:
        with open(path, "rb") as file:
            read = 0
            try:
                for piece in tokenizer.encode(file):
                    tokens = np.frombuffer(piece, np.uint8) if isinstance(piece, bytes) else np.array(piece)
                    target.write(tokens.astype(dtype).tobytes())
                    count += len(tokens)
                    progress(file.tell() - read)
                    read = file.tell()
            except UnicodeDecodeError as error:
                at = file.tell() - len(error.object) + error.start
                raise SettingError(
                    "data",
                    f"{path} is not UTF-8 text: {error.reason} at byte {at}; tokenizer bytes takes any file",
                ) from error
        target.write(np.array(tokenizer.end_of_text, dtype).tobytes())
        count += 1
    return count


def load(path: Path, vocab_size: int) -> Tokens:
    """The tokens that :func:`write` has written, mapped into memory: only what is used is read."""
    import numpy as np

    return np.memmap(path, dtype_of(vocab_size), mode="r")


def training_tokens(count: int, settings: Settings) -> int:
    """Of ``count`` tokens, how many, from the first on, are for training; the rest is for validation.

    Raises:
        SettingError: a part is too short for a sequence of ``seqlen`` tokens and the one that follows it.
    """
    least = settings.seqlen + 1
    held = int(count * settings.val_fraction)
    if count < (2 * least if settings.val_fraction else least):
        parts = "training and validation each" if settings.val_fraction else "training"
        raise SettingError("data", f"got {count} tokens, expected at least seqlen + 1, {least}, for {parts}")
    if settings.val_fraction and not least <= held <= count - least:
        raise SettingError(
            "val_fraction",
            f"got {settings.val_fraction:g}, {held} of {count} tokens, expected 0, or from {least} to "
            f"{count - least} tokens: training and validation need seqlen + 1 each",
        )
    return count - held


def _sequences(tokens: Tokens, starts: Sequence[int], seqlen: int) -> Tensor:
    import numpy as np

    rows = [tokens[start : start + seqlen + 1] for start in starts]
    return torch.from_numpy(np.stack(rows).astype(np.int64))


def sample(tokens: Tokens, seqlen: int, batch: int, seed: int, step: int) -> Tensor:
    """The sequences of a step, (batch, seqlen + 1), int64, from random places; inputs and targets overlap.

    A pure function of its arguments: Philox4x64 (Salmon et al. 2011), whose bits numpy promises to keep,
    with the seed for a key and the step in the counter.
    """
    import numpy as np

    bits = np.random.Philox(key=seed, counter=step << 64).random_raw(batch)
    # The remainder favours small ones by less than 2^-30 for any text of 2^34 tokens.
    return _sequences(tokens, (bits % np.uint64(len(tokens) - seqlen)).tolist(), seqlen)


def spread(tokens: Tokens, seqlen: int, most: int) -> Tensor:
    """At most ``most`` sequences at equal distances that do not overlap, (n, seqlen + 1), int64."""
    whole = (len(tokens) - 1) // seqlen
    count = min(whole, most)
    return _sequences(tokens, [i * whole // count * seqlen for i in range(count)], seqlen)
