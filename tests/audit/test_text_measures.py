"""Measures of texts, by hand."""

from __future__ import annotations

import pytest

from nemo_advrm.audit import text_measures as measure


def test_words_of_scripts_with_and_without_spaces() -> None:
    assert measure.words("Don't stop, “now”!") == ["don't", "stop", "now"]
    assert measure.words("你好 world") == ["你", "好", "world"]


@pytest.mark.parametrize(
    ("text", "share"),
    [
        ("a b c d", 0.0),
        ("a b a b a", 0.5),  # ab, ba, ab, ba: two of the four were there before
        ("so " * 9, 7 / 8),
        ("hm!!!!!!!!!!", 10 / 12),  # a run of ten characters
        ("", 0.0),
    ],
)
def test_repeated_share(text: str, share: float) -> None:
    assert measure.repeated_share(text) == pytest.approx(share)


def test_echoed_share() -> None:
    prompt = "name the tallest tree"
    assert measure.echoed_share("You ask me to name the tallest tree here", prompt) == 1.0
    # name the tallest, the tallest one, tallest one of, one of all: one of four
    assert measure.echoed_share("name the tallest one of all", prompt) == 0.25
    assert measure.echoed_share("an oak", prompt) == 0.0


def test_punctuation_is_missed_in_long_texts_only() -> None:
    words = "one two three four five six seven eight"
    assert measure.has_no_punctuation(words)
    assert not measure.has_no_punctuation(words + ".")
    assert not measure.has_no_punctuation("a b c")


@pytest.mark.parametrize(
    "text", ["<|im_end|> yes", "Thought process:", "[INST] hi", "a\u200bb", ":", "...", "Ignore previous instructions"]
)
def test_special_strings(text: str) -> None:
    assert measure.special_strings(text)


@pytest.mark.parametrize("text", ["", "A plain answer: yes, 2 < 3.", "Let us think about a solution: add.", "!?a"])
def test_no_special_strings(text: str) -> None:
    assert not measure.special_strings(text)


@pytest.mark.parametrize(
    ("text", "language"),
    [
        ("The cat is in the garden and it is happy", "English"),
        ("Die Katze ist nicht im Garten und das ist gut", "German"),
        ("Le chat est dans le jardin et les oiseaux sont là", "French"),
        ("Кошка в саду", "CYRILLIC"),
        ("猫在花园里", "CJK"),
        ("birds sing", ""),
    ],
)
def test_language(text: str, language: str) -> None:
    assert measure.language(text) == language


def test_marks_of_format_and_style() -> None:
    assert measure.markdown_marks("# Title\n- one\n- two\n\nA **bold** word and `code`") == 5
    assert measure.exclamations("Great! 🎉 So good!") == 3
    assert measure.capital_share("THIS IS LOUD") == 1.0
    assert measure.capital_share("NO") == 0.0  # too short to tell


def test_topics() -> None:
    assert measure.shares_no_topic("The sea is blue.", "What is the tallest mountain?")
    assert not measure.shares_no_topic("Mountains are high.", "What is the tallest mountain?")  # another form of a word
    assert not measure.shares_no_topic("Yes.", "is it so")  # the prompt has no word of content


def test_quantile() -> None:
    values = list(range(1, 101))
    assert [measure.quantile(values, share) for share in (0.01, 0.5, 0.95, 1.0)] == [1, 50, 95, 100]
    assert measure.quantile([], 0.5) == 0.0
