"""The vocabulary has the sizes of the recipe, readable words, and a grammar with agreement."""

from __future__ import annotations

import pytest

from nemo_advrm.synthetic import language
from nemo_advrm.synthetic.language import ID_OF_WORD, KINDS, VOCAB_SIZE, WORDS, is_well_formed, kinds, segments


def ids(text: str) -> list[int]:
    return [ID_OF_WORD[word] for word in text.split()]


def test_vocabulary_is_104_distinct_single_words() -> None:
    assert VOCAB_SIZE == len(set(WORDS)) == len(KINDS) == 104
    assert not any(set(" \t\n") & set(word) for word in WORDS)
    sizes = {letter: KINDS.count(letter) for letter in "DNVARL"}
    assert sizes == {"D": 2, "N": 32, "V": 16, "A": 12, "R": 8, "L": 26}
    assert (language.PAD, language.EOS, language.SEP, language.STOP) == (0, 1, 2, 3)
    assert list(language.DETERMINERS) == [8, 9]
    assert list(language.NOUNS) == list(range(10, 42))
    assert list(language.VERBS) == list(range(42, 58))


@pytest.mark.parametrize(
    ("kind", "letter"),
    [
        ("FILLERS", "F"),
        ("DETERMINERS", "D"),
        ("NOUNS", "N"),
        ("VERBS", "V"),
        ("ADJECTIVES", "A"),
        ("ADVERBS", "R"),
        ("FLOURISHES", "L"),
    ],
)
def test_letters_agree_with_the_ranges(kind: str, letter: str) -> None:
    assert set(kinds(getattr(language, kind))) == {letter}


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("this river sleeps", True),
        ("these wild birds sing gladly", True),
        ("this red river sleeps", True),
        ("these birds sing alone", True),
        ("these river sleeps", False),  # determiner disagrees
        ("this river sing", False),  # verb disagrees
        ("this birds sing", False),
        ("river sleeps", False),  # no determiner
        ("this river", False),
        ("this red old river sleeps", False),  # two adjectives
        ("this river um sleeps", False),
        ("this river sleeps slowly often", False),
        ("", False),
    ],
)
def test_well_formed(text: str, expected: bool) -> None:
    assert is_well_formed(ids(text)) is expected


def test_segments_are_cut_at_stops() -> None:
    assert list(segments(ids("this . . river"))) == [([8], True), ([], True), ([10], False)]
    assert list(segments([])) == []
    assert list(segments(ids("."))) == [([], True)]
