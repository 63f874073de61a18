"""Ids from the Rust tokenizer itself are those of transformers, whatever was asked of the tokenizer before."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hf_tokenizers import save_hf

from nemo_advrm.data.hf_tokenizer import load_hf_tokenizer
from nemo_advrm.data.text_ids import text_ids

TEXTS = ["", " ", "plain words", "a<|im_end|> b<|im_start|>assistant\nc", "é\N{GRINNING FACE}\n\n\tz", "word " * 300]


@pytest.fixture
def tokenizer(tmp_path: Path) -> Any:
    end = "<|im_end|>"
    return load_hf_tokenizer(save_hf(tmp_path, template="{{ messages }}", eos_token=end, pad_token=end))


@pytest.mark.parametrize("split", [False, True])
def test_ids_are_those_of_transformers(tokenizer: Any, split: bool) -> None:
    tokenizer.split_special_tokens = split
    expected = [tokenizer(text, add_special_tokens=False).input_ids for text in TEXTS]
    assert [text_ids(tokenizer, text) for text in TEXTS] == expected
    assert len(expected[3]) != len(expected[2])


def test_nothing_remains_of_an_earlier_call(tokenizer: Any) -> None:
    expected = tokenizer(TEXTS[3], add_special_tokens=False).input_ids
    tokenizer(TEXTS, padding="max_length", truncation=True, max_length=2, split_special_tokens=True)
    assert len(text_ids(tokenizer, TEXTS[3])) > 2
    assert text_ids(tokenizer, TEXTS[3]) == expected
    assert len(text_ids(tokenizer, TEXTS[5])) > 100


def test_a_class_with_an_encoding_of_its_own_is_asked(tokenizer: Any) -> None:
    class Own(type(tokenizer)):  # type: ignore[misc]
        def _encode_plus(self, text: str, **options: Any) -> Any:
            return super()._encode_plus(text.upper(), **options)

    expected = tokenizer("PLAIN WORDS", add_special_tokens=False).input_ids
    plain = text_ids(tokenizer, "plain words")
    tokenizer.__class__ = Own
    assert text_ids(tokenizer, "plain words") == expected != plain
