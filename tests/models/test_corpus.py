from __future__ import annotations

import json
import re

import numpy as np
import pytest

from jaxquant.models import batches, corpus, synthetic


def test_an_unknown_slice_lists_the_known_ones():
    with pytest.raises(ValueError, match="'latin'; known slices: english, python, arithmetic"):
        corpus.load_slice("latin")


def test_a_missing_bible_says_how_to_get_it(monkeypatch):
    monkeypatch.setattr(corpus.shutil, "which", lambda name: None)
    with pytest.raises(FileNotFoundError, match="apt-get install bible-kjv bible-kjv-text"):
        corpus.load_slice("english")


def test_chapters_are_split_by_book(monkeypatch):
    books = corpus.HELD_OUT_BOOKS
    printed = "".join(f"{book}1:{verse} verse {verse}\n" for book in books for verse in (1, 2))
    printed += "1Sm2:1 not held out\n"
    monkeypatch.setattr(corpus.shutil, "which", lambda name: "/bin/bible")
    monkeypatch.setattr(
        corpus.subprocess, "run", lambda *a, **k: type("Done", (), {"stdout": printed})
    )
    part = corpus.load_slice("english")
    assert part.train == ("1Sm 2\nnot held out\n",)
    assert part.held_out[0] == "Ruth 1\nverse 1\nverse 2\n"
    assert len(part.held_out) == len(books)


def test_the_standard_library_is_split_by_module():
    part = corpus.load_slice("python")
    assert len(part.held_out) == len(corpus.HELD_OUT_MODULES)
    assert not set(part.held_out) & set(part.train)
    assert any("def nlargest" in text for text in part.held_out)
    summary = part.summary()
    assert summary["train_documents"] == len(part.train) > 300
    assert re.fullmatch("[0-9a-f]{64}", summary["held_out_sha256"])


@pytest.mark.parametrize("make", [synthetic.arithmetic_documents, synthetic.json_documents])
def test_synthetic_text_is_fixed_by_its_seed(make):
    assert make(0, 5000) == make(0, 5000)
    assert make(0, 9000)[:5] == make(0, 5000)[:5]
    assert not set(make(0, 5000)) & set(make(1, 5000))
    assert 5000 <= sum(map(len, make(0, 5000))) < 8000


def test_arithmetic_is_right():
    text = "".join(synthetic.arithmetic_documents(3, 20_000))
    sums = re.findall(r"^(\d+) ([+*/-]) (\d+) = (-?\d+)$", text, re.MULTILINE)
    assert len(sums) > 200
    for a, sign, b, result in sums:
        operation = {"+": int.__add__, "-": int.__sub__, "*": int.__mul__, "/": int.__floordiv__}
        assert operation[sign](int(a), int(b)) == int(result)
    for a, sign, b in re.findall(r"^(\d+) ([<>=]) (\d+)$", text, re.MULTILINE):
        assert {"<": int(a) < int(b), ">": int(a) > int(b), "=": a == b}[sign]


def test_json_parses_and_adds_up():
    orders = 0
    for document in synthetic.json_documents(3, 20_000):
        value = json.loads(document)
        for record in value if isinstance(value, list) else [value]:
            if "order" in record:
                orders += 1
                assert record["total"] == sum(item["total"] for item in record["items"])
    assert orders > 10


def test_documents_join_and_split():
    documents = ["a\n", "b\n\f", "é"]
    assert corpus.split_documents(corpus.join_documents(documents)) == documents


def test_batches_are_a_function_of_the_step_and_cover_an_epoch():
    streams = {"a": np.arange(1000), "b": 5000 + np.arange(3000)}
    make = batches.MixedBatches(streams, {"a": 1, "b": 3}, length=10, seed=0)
    np.testing.assert_array_equal(make(7), make(7))
    assert make(0).shape == (4, 11)
    assert make(0).dtype == np.int32
    np.testing.assert_array_equal(np.diff(make(5), axis=1), 1)  # runs of the stream
    first_tokens = [int(make(step)[0, 0]) for step in range(98)]
    assert len(set(first_tokens)) == 98  # one epoch of slice a: no window twice
    assert all((make(step)[1:] >= 5000).all() for step in range(5))


def test_a_short_stream_is_refused():
    with pytest.raises(ValueError, match="'a' has 20 tokens"):
        batches.MixedBatches({"a": np.arange(20)}, {"a": 1}, length=10, seed=0)


def test_rows_follow_the_weights():
    weights = {"x": 5.0, "y": 7.0, "z": 2.0, "w": 2.0}
    assert batches.rows_per_slice(weights, 16) == {"x": 5, "y": 7, "z": 2, "w": 2}
    assert sum(batches.rows_per_slice(weights, 9).values()) == 9
    assert batches.rows_per_slice(weights, 4) == {"x": 1, "y": 1, "z": 1, "w": 1}
    assert batches.rows_per_slice({"x": 100, "y": 1, "z": 1}, 3) == {"x": 1, "y": 1, "z": 1}
    with pytest.raises(ValueError, match="3 rows cannot hold 4 slices"):
        batches.rows_per_slice(weights, 3)


def test_windows_are_consecutive():
    first, second = batches.windows(np.arange(25), batch_size=2, length=6)
    np.testing.assert_array_equal(first, [range(6), range(6, 12)])
    np.testing.assert_array_equal(second[1], range(18, 24))
    with pytest.raises(ValueError, match="25 tokens do not fill one batch of 5 x 6"):
        batches.windows(np.arange(25), 5, 6)
