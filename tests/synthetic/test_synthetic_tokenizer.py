"""The tokenizer maps words to ids and back, ends prompts and responses properly and names what it cannot encode."""

from __future__ import annotations

import pytest

from nemo_advrm.errors import DataError
from nemo_advrm.synthetic.language import EOS, PAD, SEP, WORDS
from nemo_advrm.synthetic.tokenizer import SyntheticTokenizer

TOKENIZER = SyntheticTokenizer()


def test_text_round_trip() -> None:
    text = "this river sleeps . um plainly"
    assert TOKENIZER.encode(text) == [8, 10, 42, 3, 4, 102]
    assert TOKENIZER.decode(TOKENIZER.encode(text)) == text
    assert TOKENIZER.encode("") == []
    assert TOKENIZER.decode([]) == ""


def test_every_ordinary_word_round_trips() -> None:
    assert TOKENIZER.encode(" ".join(WORDS[3:])) == list(range(3, 104))


def test_unknown_word_is_named() -> None:
    with pytest.raises(DataError, match=r"word 3 of .*'zebra'"):
        TOKENIZER.encode("this river zebra")


@pytest.mark.parametrize("word", ["<pad>", "<eos>", "<sep>"])
def test_special_tokens_are_not_text(word: str) -> None:
    with pytest.raises(DataError, match=word):
        TOKENIZER.encode(f"this {word}")


def test_prompt_is_the_last_user_message_and_the_separator() -> None:
    messages = (
        {"role": "user", "content": "tree tree tree"},
        {"role": "assistant", "content": "this tree rest ."},
        {"role": "user", "content": "river birds teacher"},
    )
    assert TOKENIZER.encode_prompt(messages) == [10, 11, 12, SEP]
    with pytest.raises(DataError, match="user"):
        TOKENIZER.encode_prompt([{"role": "system", "content": "river birds teacher"}])
    with pytest.raises(DataError, match="user"):
        TOKENIZER.encode_prompt(())


def test_response_has_one_end_token() -> None:
    assert TOKENIZER.encode_response("this river") == [8, 10, EOS]
    assert TOKENIZER.encode_response("") == [EOS]


def test_decode_response_stops_at_the_end_token_and_drops_specials() -> None:
    assert TOKENIZER.decode_response([8, SEP, 10, PAD, EOS, 11, EOS]) == "this river"
    assert TOKENIZER.decode_response([8, 10]) == "this river"
    assert TOKENIZER.decode_response([EOS]) == ""


def test_decode_can_show_specials_and_refuses_foreign_ids() -> None:
    assert TOKENIZER.decode([10, SEP, 8, EOS, PAD], skip_special=False) == "river <sep> this <eos> <pad>"
    with pytest.raises(DataError, match="104"):
        TOKENIZER.decode([104])


def test_protocol_attributes() -> None:
    assert (TOKENIZER.vocab_size, TOKENIZER.pad_id, TOKENIZER.eos_id, TOKENIZER.name) == (104, 0, 1, "synthetic")
    assert TOKENIZER.fingerprint == SyntheticTokenizer().fingerprint
    assert len(TOKENIZER.fingerprint) == 16
