"""Training data on disk: slices to tokenizer, token streams and held-out text."""

from __future__ import annotations

import json
import logging
import pathlib
from typing import Any

import numpy as np

from jaxquant.models import corpus
from jaxquant.models.tokenizer import Tokenizer

log = logging.getLogger(__name__)

_TOKENIZER_CHARACTERS = 1_500_000  # of a synthetic slice; the others are taken whole


def prepare(
    work: pathlib.Path, vocab_size: int
) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray], dict[str, Any]]:
    """Reads or makes everything that training consumes.

    Args:
      work: keeps tokens, tokenizer and held-out text for a resumed run.
      vocab_size: of the tokenizer, which sees training documents only.

    Returns:
      Training streams and held-out streams, uint16 [N] by slice, and a record of the sources.

    Raises:
      FileNotFoundError: a source text is not installed; the message says how to get it.
    """
    tokens_path, tokenizer_path, sources_path = (
        work / name for name in ("tokens.npz", "tokenizer.json", "sources.json")
    )
    if not sources_path.exists():
        slices = [corpus.load_slice(name) for name in corpus.SLICES]
        limited = [
            text
            for part in slices
            for text in _first_characters(part.train, part.name in ("arithmetic", "json"))
        ]
        tokenizer = Tokenizer.train(limited, vocab_size)
        tokenizer.save(tokenizer_path)
        arrays: dict[str, Any] = {}
        sources: dict[str, Any] = {}
        (work / "heldout").mkdir(exist_ok=True)
        for part in slices:
            arrays[f"train.{part.name}"] = np.asarray(
                tokenizer.encode_documents(part.train), np.uint16
            )
            arrays[f"held_out.{part.name}"] = np.asarray(
                tokenizer.encode_documents(part.held_out), np.uint16
            )
            sources[part.name] = part.summary()
            text = corpus.join_documents(part.held_out)
            (work / "heldout" / f"{part.name}.txt").write_bytes(text.encode())
        np.savez(tokens_path, **arrays)
        sources_path.write_text(json.dumps(sources, indent=2))
    with np.load(tokens_path) as stored:
        streams = {name: stored[f"train.{name}"] for name in corpus.SLICES}
        held_out = {name: stored[f"held_out.{name}"] for name in corpus.SLICES}
    for name in corpus.SLICES:
        log.info(
            "%s: %d training, %d held-out tokens", name, len(streams[name]), len(held_out[name])
        )
    return streams, held_out, json.loads(sources_path.read_text())


def _first_characters(documents: tuple[str, ...], limit: bool) -> list[str]:
    """All documents, or the first of them up to the limit of a synthetic slice."""
    taken, total = [], 0
    for document in documents:
        if limit and total >= _TOKENIZER_CHARACTERS:
            break
        taken.append(document)
        total += len(document)
    return taken
