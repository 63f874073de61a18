"""A scored conversation is the finished one as its own template writes it, with the ids of transformers."""

from __future__ import annotations

from pathlib import Path

import pytest
from hf_tokenizers import CHATML, save_hf
from template_traits import ANSWERS, TEMPLATES, conversation

from nemo_advrm.data.messages import Message
from nemo_advrm.data.reading import ANSWER, ReadingRule
from nemo_advrm.data.tokenizers import ByteTokenizer, HFTokenizer
from nemo_advrm.errors import DataError
from nemo_advrm.rewards.token_sequences import encode_rendered
from nemo_advrm.synthetic.tokenizer import SyntheticTokenizer

WITH_TEMPLATE = [name for name, template in TEMPLATES.items() if template is not None]


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    home = tmp_path_factory.mktemp("traits")
    for name, template in TEMPLATES.items():
        special = {"bos_token": "<|im_start|>"} if name == "bos" else {}
        save_hf(home / name, template=template, eos_token="<|endoftext|>", pad_token="<|endoftext|>", **special)
    return home


def theirs(directory: Path, messages: list[Message], **options: bool) -> list[int]:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(directory)
    return tokenizer.apply_chat_template(messages, tokenize=True, return_dict=False, **options)


@pytest.mark.parametrize("trait", WITH_TEMPLATE)
def test_a_finished_conversation_has_the_ids_of_transformers(home: Path, trait: str) -> None:
    tokenizer = HFTokenizer(home / trait)
    for answer in ANSWERS:
        for turns in (1,) if trait == "two_turns" else (1, 2):
            whole = conversation(answer, turns)
            assert tokenizer.encode_conversation(whole[:-1], answer) == theirs(home / trait, whole)


@pytest.mark.parametrize("trait", WITH_TEMPLATE)
def test_the_text_of_a_finished_conversation_has_the_same_ids(home: Path, trait: str) -> None:
    """`/get_reward` is sent what a template wrote; a policy that wrote the answer wrote less behind its end token."""
    tokenizer = HFTokenizer(home / trait)
    reference = tokenizer._tokenizer
    for answer in ANSWERS:
        whole = conversation(answer)
        text = reference.apply_chat_template(whole, tokenize=False)
        ids = tokenizer.encode_conversation(whole[:-1], answer)
        assert encode_rendered(tokenizer, text) == ids
        assert encode_rendered(tokenizer, text + "<|endoftext|><|endoftext|>") == ids
        if trait == "chatml":
            assert encode_rendered(tokenizer, text.removesuffix("\n")) == ids
            assert encode_rendered(tokenizer, text.removesuffix("<|im_end|>\n")) == ids
    if trait == "bos":
        assert encode_rendered(tokenizer, text.removeprefix("<|im_start|>")) == ids


@pytest.mark.parametrize("trait", [name for name in WITH_TEMPLATE if name != "merges_line_breaks"])
def test_a_cut_off_answer_ends_where_transformers_would_go_on(home: Path, trait: str) -> None:
    tokenizer = HFTokenizer(home / trait)
    for answer in ("the answer", "the answer \n", "a < b\n\nand"):
        whole = conversation(answer)
        expected = theirs(home / trait, whole, continue_final_message=True)
        assert tokenizer.encode_conversation(whole[:-1], answer, ended=False) == expected
        assert tokenizer.encode_conversation(whole[:-1], answer)[: len(expected) - 1] == expected[:-1]


def test_a_cut_off_answer_may_be_changed_by_the_template(home: Path) -> None:
    """transformers refuses to go on with such an answer: there is no need to, it is only read."""
    tokenizer = HFTokenizer(home / "merges_line_breaks")
    question = [Message(role="user", content="the question")]
    ids = tokenizer.encode_conversation(question, "a\n\nb", ended=False)
    assert tokenizer.decode(ids, skip_special=False) == (
        "<|im_start|>user\nthe question<|im_end|>\n<|im_start|>assistant\na\nb"
    )


@pytest.mark.parametrize("tokenizer", [ByteTokenizer(), SyntheticTokenizer()], ids=lambda t: t.name)
def test_without_a_template_prompt_and_answer_are_joined(tokenizer: ByteTokenizer | SyntheticTokenizer) -> None:
    prompt = (Message(role="user", content="this river"),)
    start, text = tokenizer.encode_prompt(prompt), "birds sing ."
    assert tokenizer.encode_conversation(prompt, text) == [*start, *tokenizer.encode(text), tokenizer.eos_id]
    assert tokenizer.encode_conversation(prompt, text, ended=False) == [*start, *tokenizer.encode(text)]


def test_a_tokenizer_without_a_template_joins_its_plain_one(home: Path) -> None:
    tokenizer = HFTokenizer(home / "none")
    prompt = (Message(role="user", content="the question"),)
    ids = tokenizer.encode_conversation(prompt, "the answer")
    assert ids == [*tokenizer.encode("User:\nthe question\n\nAssistant:\n"), *tokenizer.encode("the answer"), 0]


def test_the_old_rule_is_the_generation_prompt_the_answer_and_its_end(home: Path) -> None:
    new, old = HFTokenizer(home / "opens_think"), HFTokenizer(home / "opens_think", ReadingRule(at=ANSWER))
    prompt = [Message(role="user", content="the question")]
    ids = old.encode_conversation(prompt, " the answer")
    assert ids == old.encode_prompt(prompt) + old.encode_response(" the answer") and ids[-1] == old.eos_id == 2
    assert "<think>" in old.decode(ids) and "<think>" not in new.decode(new.encode_conversation(prompt, " the answer"))
    assert new.fingerprint != old.fingerprint
    assert encode_rendered(old, "<|im_start|>user\nx<|im_end|>\n")[-1] == 2


def test_what_the_template_refuses_is_a_data_error(home: Path) -> None:
    with pytest.raises(DataError, match="refuses this conversation: no system"):
        HFTokenizer(home / "no_system").encode_conversation([Message(role="system", content="x")], "y")
    with pytest.raises(DataError, match="refuses this conversation: two turns"):
        HFTokenizer(home / "two_turns").encode_conversation(conversation("x", 2)[:-1], "y")


def test_raw_text_has_no_template(tmp_path: Path) -> None:
    tokenizer = HFTokenizer(save_hf(tmp_path, template=CHATML, bos=True, eos_token="<|endoftext|>"))
    assert tokenizer.encode_conversation((), "the text") == [1, *tokenizer.encode("the text"), tokenizer.eos_id]
