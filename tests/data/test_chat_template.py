"""A template that writes the date is told one date, always; one that draws at random is refused."""

from __future__ import annotations

import logging
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
from hf_tokenizers import save_hf
from transformers.utils import chat_template_utils

from nemo_advrm.convert.tokenizer_files import pin_date
from nemo_advrm.data.hf_tokenizer import load_hf_tokenizer
from nemo_advrm.data.messages import Message
from nemo_advrm.data.reading import ReadingRule
from nemo_advrm.data.tokenizers import HFTokenizer
from nemo_advrm.errors import DataError

TURNS = "{% for m in messages %}<|im_start|>{{ m['content'] }}<|im_end|>{% endfor %}"
DATED = "Today is {{ strftime_now('%d %b %Y %H:%M:%S') }}\n" + TURNS
OTHERWISE = '{% if strftime_now is defined %}{% set day = strftime_now("%Y-%m-%d") %}{% endif %}\n{{ day }}' + TURNS
INSIDE = (
    "{%- macro head(m) %}{{ strftime_now('%d.\\t%m.') }}{% endmacro %}{% for m in messages %}{{ head(m) }}{% endfor %}"
)
APOSTROPHES = "{# it's a date #}I don't know, but it's {{ strftime_now('%d %b') }}\n" + TURNS
QUESTION = [Message(role="user", content="the question")]


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Sets the clock that transformers shows to templates."""

    def set_to(year: int) -> None:
        class Clock(datetime):
            @classmethod
            def now(cls, tz: Any = None) -> datetime:
                return datetime(year, 5, 17, 8, 9, 10)

        monkeypatch.setattr(chat_template_utils, "datetime", Clock)

    return set_to


def save(directory: Path, template: str) -> Path:
    return save_hf(directory, template=template, eos_token="<|endoftext|>")


@pytest.mark.parametrize(
    ("template", "start"),
    [
        (DATED, "Today is 26 Jul 2024 00:00:00\n<|im_start|>"),
        (OTHERWISE, "2024-07-26<|im_start|>"),
        (INSIDE, "26.\t07."),
        (APOSTROPHES, "I don't know, but it's 26 Jul"),
    ],
)
def test_the_date_is_that_of_the_rule_whatever_the_clock(
    tmp_path: Path, clock: Any, template: str, start: str, caplog: pytest.LogCaptureFixture
) -> None:
    directory = save(tmp_path, template)
    seen = set()
    for year in (2031, 2032):
        clock(year)
        with caplog.at_level(logging.WARNING):
            tokenizer = HFTokenizer(directory)
        ids = tokenizer.encode_conversation(QUESTION, "the answer")
        assert tokenizer.decode(ids, skip_special=False).startswith(start)
        seen.add((tuple(ids), tuple(tokenizer.encode_prompt(QUESTION)), tokenizer.fingerprint))
    assert len(seen) == 1
    assert "writes the date: it always gets 2024-07-26" in caplog.text


def test_another_date_is_another_tokenizer(tmp_path: Path) -> None:
    directory = save(tmp_path, DATED)
    one, two = HFTokenizer(directory), HFTokenizer(directory, ReadingRule(date="2025-03-01"))
    assert one.fingerprint != two.fingerprint
    ids = two.encode_conversation(QUESTION, "the answer")
    assert two.decode(ids, skip_special=False).startswith("Today is 01 Mar 2025 00:00:00")


def test_on_the_day_of_the_rule_the_ids_are_those_of_transformers(tmp_path: Path, monkeypatch: Any) -> None:
    directory = save(tmp_path, DATED)

    class Clock(datetime):
        @classmethod
        def now(cls, tz: Any = None) -> datetime:
            return datetime(2024, 7, 26)

    monkeypatch.setattr(chat_template_utils, "datetime", Clock)
    whole = [*QUESTION, Message(role="assistant", content="a < b")]
    theirs = load_hf_tokenizer(directory).apply_chat_template(whole, tokenize=True, return_dict=False)
    assert HFTokenizer(directory).encode_conversation(QUESTION, "a < b") == theirs


def test_an_exported_template_writes_the_date_of_training_in_transformers_too(tmp_path: Path, clock: Any) -> None:
    directory = save(tmp_path, DATED)
    wanted = HFTokenizer(directory).encode_conversation(QUESTION, "the answer")
    pin_date(directory, ReadingRule())
    clock(2031)
    whole = [*QUESTION, Message(role="assistant", content="the answer")]
    assert load_hf_tokenizer(directory).apply_chat_template(whole, tokenize=True, return_dict=False) == wanted
    assert HFTokenizer(directory).encode_conversation(QUESTION, "the answer") == wanted


def test_a_format_that_is_put_together_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="the format of its date is not written out in the template"):
        HFTokenizer(save(tmp_path, "{{ strftime_now('%' ~ 'd') }}" + TURNS))


@pytest.mark.parametrize("template", ["{{ [1, 2] | random }}" + TURNS, "{{ lipsum(1) }}" + TURNS])
def test_a_template_that_draws_at_random_is_refused(tmp_path: Path, template: str) -> None:
    with pytest.raises(DataError, match="uses random numbers"):
        HFTokenizer(save(tmp_path, template))


def test_a_template_without_a_date_is_left_alone(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    directory = save(tmp_path, TURNS)
    before = (directory / "chat_template.jinja").read_text()
    HFTokenizer(directory)
    pin_date(directory, ReadingRule())
    assert (directory / "chat_template.jinja").read_text() == before and not caplog.text


def test_a_template_that_wants_a_system_message_can_be_used(tmp_path: Path) -> None:
    template = "{% if messages[0]['role'] != 'system' %}{{ raise_exception('no system') }}{% endif %}" + TURNS
    tokenizer = HFTokenizer(save(tmp_path, template))
    assert tokenizer.eos_id == 2  # <|im_end|>, as its turns end
    with pytest.raises(DataError, match="refuses this conversation: no system"):
        tokenizer.encode_conversation(QUESTION, "the answer")


@pytest.mark.parametrize(("answer", "times"), [("{{ m.content }}|{{ m.content }}", "more than once"), ("-", "not")])
def test_a_cut_off_answer_whose_end_is_not_one_place_is_refused(tmp_path: Path, answer: str, times: str) -> None:
    template = "{% for m in messages %}<|im_start|>" + answer + "<|im_end|>{% endfor %}"
    tokenizer = HFTokenizer(save(tmp_path, template))
    assert tokenizer.encode_conversation(QUESTION, "the answer")
    with pytest.raises(DataError, match=f"writes the end of the last message {times}"):
        tokenizer.encode_conversation(QUESTION, "the answer", ended=False)
