from __future__ import annotations

import hypothesis
import hypothesis.strategies as st
import pytest

from jaxquant.models import _optional, shipped
from jaxquant.models.tokenizer import SPECIAL_TOKENS, Tokenizer

pytest.importorskip("tokenizers")


@hypothesis.given(st.text())
def test_any_text_comes_back(text):
    tokenizer = shipped.tokenizer()
    assert tokenizer.decode(tokenizer.encode(text)) == text


@hypothesis.given(st.binary(max_size=64))
def test_any_bytes_come_back(data):
    # Every byte has its code point in latin-1, and so a text that stands for it.
    text = data.decode("latin-1")
    tokenizer = shipped.tokenizer()
    assert tokenizer.decode(tokenizer.encode(text)).encode("latin-1") == data


@pytest.mark.parametrize("text", ["<eos>", "a<bos>b", "<pad>" * 3])
def test_text_cannot_forge_special_tokens(text):
    tokenizer = shipped.tokenizer()
    ids = tokenizer.encode(text)
    assert not {tokenizer.pad_id, tokenizer.bos_id, tokenizer.eos_id} & set(ids)
    assert tokenizer.decode(ids) == text


def test_digits_are_tokens_of_their_own():
    tokenizer = shipped.tokenizer()
    assert [tokenizer.decode([i]) for i in tokenizer.encode("1234")] == ["1", "2", "3", "4"]


def test_the_vocabulary_is_the_models():
    assert shipped.tokenizer().vocab_size == shipped.shipped_config().vocab_size == 3072


def test_documents_become_one_stream():
    tokenizer = shipped.tokenizer()
    stream = tokenizer.encode_documents(["one", "two"])
    one, two = tokenizer.encode("one"), tokenizer.encode("two")
    assert stream == [1, *one, 2, 1, *two, 2]
    assert tokenizer.encode("one", bos=True) == [1, *one]
    assert tokenizer.decode(stream) == "onetwo"


def test_training_saves_and_loads(tmp_path):
    tokenizer = Tokenizer.train(["the cat and the hat"] * 50, 300)
    tokenizer.save(tmp_path / "tokenizer.json")
    again = Tokenizer.load(tmp_path / "tokenizer.json")
    assert again.encode("the hat") == tokenizer.encode("the hat")
    assert len(tokenizer.encode(" the")) == 1
    with pytest.raises(FileNotFoundError, match="no tokenizer at"):
        Tokenizer.load(tmp_path / "none.json")


def test_a_vocabulary_too_small_for_bytes_is_refused():
    with pytest.raises(ValueError, match=f"256 bytes and {len(SPECIAL_TOKENS)} special"):
        Tokenizer.train(["a"], 200)


def test_a_missing_package_names_the_extra():
    with pytest.raises(ImportError, match=r"'no_such_package'.*jaxquant\[demo\]"):
        _optional.require("no_such_package.submodule")
