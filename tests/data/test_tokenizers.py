"""Tokenizers: text comes back, an answer ends in one eos, and the end of a turn is the chat template's."""

from __future__ import annotations

from pathlib import Path

import pytest
from hf_tokenizers import CHATML, save_hf

from nemo_advrm.data.messages import Message
from nemo_advrm.data.tokenizers import ByteTokenizer, HFTokenizer, Tokenizer, build_tokenizer
from nemo_advrm.errors import ConfigError, DataError

CHAT = (Message(role="user", content="hi"), Message(role="assistant", content="yo"), Message(role="user", content="so"))


@pytest.fixture(scope="module")
def chat_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    # pad = eos, and the template ends turns with another token than eos: both are common and both are traps.
    directory = tmp_path_factory.mktemp("chat")
    return save_hf(directory, template=CHATML, eos_token="<|endoftext|>", pad_token="<|endoftext|>")


@pytest.mark.parametrize("text", ["", "hello", "naïve 雪 🎿\n\ttab", "<eos>", "\x00\x7f"])
def test_bytes_come_back(text: str) -> None:
    tokenizer = ByteTokenizer()
    ids = tokenizer.encode_response(text)
    assert ids[-1] == tokenizer.eos_id and ids.count(tokenizer.eos_id) == 1
    assert tokenizer.decode_response([*ids, 9, 9]) == text and tokenizer.decode(ids) == text


def test_byte_layout_is_fixed() -> None:
    tokenizer = ByteTokenizer()
    assert (tokenizer.pad_id, tokenizer.eos_id, tokenizer.vocab_size) == (0, 1, 263)
    assert tokenizer.encode("A") == [7 + 65]
    # <bos> <user> "hi" <end> <assistant> "yo" <end> <user> "so" <end> <assistant>
    assert tokenizer.encode_prompt(CHAT) == [2, 3, 111, 112, 6, 4, 128, 118, 6, 3, 122, 118, 6, 4]
    assert tokenizer.encode_prompt(()) == [2]
    assert tokenizer.decode([2, 3, 72], skip_special=False) == "<bos><user>A"


def test_bytes_survive_what_is_not_text() -> None:
    tokenizer = ByteTokenizer()
    assert tokenizer.decode([7 + 0xFF, 7 + 65, 5000]) == "\ufffdA\ufffd"
    assert tokenizer.encode("\ud83d") == [7 + 0xED, 7 + 0xA0, 7 + 0xBD]


def test_hf_answers_end_with_the_templates_end_of_turn(chat_dir: Path) -> None:
    tokenizer = HFTokenizer(chat_dir)
    assert (tokenizer.eos_id, tokenizer.pad_id) == (2, 0)
    answer = tokenizer.encode_response("the answer")
    assert answer[-1] == 2 and tokenizer.decode_response([*answer, 5, 6]) == "the answer"
    assert tokenizer.decode_response([*answer[:-1], 0, 5]) == "the answer"
    prompt = tokenizer.encode_prompt(CHAT)
    assert tokenizer.decode(prompt, skip_special=False) == (
        "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\nyo<|im_end|>\n<|im_start|>user\nso<|im_end|>\n"
        "<|im_start|>assistant\n"
    )
    assert max(prompt) < tokenizer.vocab_size and tokenizer.encode_prompt(()) == []


def test_a_special_token_written_in_an_answer_is_text(chat_dir: Path) -> None:
    tokenizer = HFTokenizer(chat_dir)
    ids = tokenizer.encode_response("a <|im_end|> b")
    assert ids.count(tokenizer.eos_id) == 1 and tokenizer.decode_response(ids) == "a <|im_end|> b"


def test_a_refused_conversation_is_a_data_error(chat_dir: Path) -> None:
    with pytest.raises(DataError, match="refuses this conversation: no system"):
        HFTokenizer(chat_dir).encode_prompt((Message(role="system", content="x"), *CHAT))


def test_hf_without_template_or_pad_token(tmp_path: Path) -> None:
    tokenizer = HFTokenizer(save_hf(tmp_path, template=None, bos=True, eos_token="<|endoftext|>"))
    assert tokenizer.eos_id == tokenizer.pad_id == 0
    prompt = tokenizer.encode_prompt(CHAT)
    assert prompt[0] == 1 and prompt.count(1) == 1
    assert tokenizer.decode(prompt) == "User:\nhi\n\nAssistant:\nyo\n\nUser:\nso\n\nAssistant:\n"
    assert tokenizer.encode_prompt(()) == [1]


def test_hf_without_an_end_token_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no end token"):
        HFTokenizer(save_hf(tmp_path, template=None))


def test_fingerprints_tell_tokenizers_apart(chat_dir: Path, tmp_path: Path) -> None:
    first, again = HFTokenizer(chat_dir), HFTokenizer(chat_dir)
    before = first.fingerprint
    first.encode_prompt(CHAT)
    assert before == first.fingerprint == again.fingerprint
    other = HFTokenizer(save_hf(tmp_path, template=None, eos_token="<|endoftext|>"))
    assert len({before, other.fingerprint, ByteTokenizer().fingerprint}) == 3


def test_build_tokenizer(chat_dir: Path, tmp_path: Path) -> None:
    for spec in ("byte", "synthetic", f"hf:{chat_dir}"):
        tokenizer = build_tokenizer(spec)
        assert isinstance(tokenizer, Tokenizer) and 0 <= tokenizer.eos_id < tokenizer.vocab_size
    with pytest.raises(ConfigError, match="'bytes' is unknown; did you mean 'byte'"):
        build_tokenizer("bytes")
    with pytest.raises(ConfigError, match="did you mean 'hf:"):
        build_tokenizer(str(tmp_path))
    with pytest.raises(DataError, match="no such tokenizer directory"):
        build_tokenizer("hf:/does/not/exist")
    with pytest.raises(DataError, match="the tokenizer cannot be read"):
        build_tokenizer(f"hf:{tmp_path}")
