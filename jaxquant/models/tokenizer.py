"""A byte-level BPE tokenizer on top of the `tokenizers` package.

Byte-level: every string has an encoding and decoding gives it back, whatever it holds. Digits are
tokens of their own, so that arithmetic is about digits and not about memorized numbers.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from typing import Any

from jaxquant.models._optional import require

SPECIAL_TOKENS = ("<pad>", "<bos>", "<eos>")

# Letters with one leading space or mark, single digits, runs of punctuation, newlines with the
# blanks before them, and indentation up to the last blank (which goes with the next word).
_PRETOKENS = r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+|\s*[\r\n]+|\s+(?!\S)|\s+"


class Tokenizer:
    """Text to token ids and back.

    Attributes:
      pad_id: padding, 0.
      bos_id: start of a document, 1.
      eos_id: end of a document, 2.
    """

    pad_id, bos_id, eos_id = 0, 1, 2

    def __init__(self, backend: Any) -> None:
        """Wraps a `tokenizers.Tokenizer`; most callers want `train` or `load`."""
        for index, token in enumerate(SPECIAL_TOKENS):
            if backend.token_to_id(token) != index:
                raise ValueError(
                    f"token {token!r} must have id {index}; got {backend.token_to_id(token)}"
                )
        # A document that contains "<eos>" must not be able to end itself.
        backend.encode_special_tokens = True
        self._backend = backend

    @classmethod
    def train(cls, texts: Iterable[str], vocab_size: int) -> Tokenizer:
        """Learns merges from `texts`.

        Raises:
          ValueError: `vocab_size` cannot hold the 256 bytes and the special tokens.
        """
        if vocab_size < 256 + len(SPECIAL_TOKENS):
            raise ValueError(
                f"vocab_size={vocab_size} is too small: 256 bytes and {len(SPECIAL_TOKENS)} "
                "special tokens come first"
            )
        tokenizers = require("tokenizers")
        backend = tokenizers.Tokenizer(tokenizers.models.BPE())
        backend.pre_tokenizer = tokenizers.pre_tokenizers.Sequence(
            [
                tokenizers.pre_tokenizers.Split(tokenizers.Regex(_PRETOKENS), "isolated"),
                tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
            ]
        )
        backend.decoder = tokenizers.decoders.ByteLevel()
        trainer = tokenizers.trainers.BpeTrainer(
            vocab_size=vocab_size,
            special_tokens=list(SPECIAL_TOKENS),
            initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        )
        backend.train_from_iterator(texts, trainer)
        return cls(backend)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Tokenizer:
        """Reads a tokenizer written by `save`.

        Raises:
          FileNotFoundError: there is no such file.
        """
        if not os.path.exists(path):
            raise FileNotFoundError(f"no tokenizer at {os.fspath(path)}")
        return cls(require("tokenizers").Tokenizer.from_file(os.fspath(path)))

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes one JSON file."""
        self._backend.save(os.fspath(path), pretty=False)

    @property
    def vocab_size(self) -> int:
        """Number of token ids."""
        return self._backend.get_vocab_size()

    def encode(self, text: str, *, bos: bool = False) -> list[int]:
        """Token ids of `text`, after a start-of-document token if `bos`."""
        ids = self._backend.encode(text, add_special_tokens=False).ids
        return [self.bos_id, *ids] if bos else ids

    def encode_documents(self, documents: Sequence[str]) -> list[int]:
        """One stream: every document between a `bos` and an `eos` token."""
        stream: list[int] = []
        for encoded in self._backend.encode_batch(list(documents), add_special_tokens=False):
            stream.extend((self.bos_id, *encoded.ids, self.eos_id))
        return stream

    def decode(self, ids: Iterable[int]) -> str:
        """Text of `ids` without special tokens; bytes that are no UTF-8 become U+FFFD."""
        return self._backend.decode([int(i) for i in ids], skip_special_tokens=True)
