"""Measures of one response: pure functions of its text, and of its prompt's."""

from __future__ import annotations

import functools
import itertools
import math
import re
import unicodedata
from collections import Counter
from collections.abc import Sequence

_WORD = re.compile(r"[^\W_]+(?:['’][^\W_]+)*")
_MARKDOWN = re.compile(r"^\s*(?:#{1,6}\s|[-*+•]\s|\d+[.)]\s|>\s|\|.*\||```)|\*\*[^*\n]+\*\*|`[^`\n]+`", re.MULTILINE)
_RUN = re.compile(r"(\S)\1{9,}")
# Tokens of chat templates; openers that fool judges (arXiv 2507.08794); orders to a judge; characters nobody sees.
_SPECIAL = re.compile(
    r"<\|[^|<>\n]{1,40}\|>|</?s>|<(?:pad|eos|bos|unk|sep|mask|end_of_turn|start_of_turn)>|\[/?INST\]|</?think>|<extra_id_\d+>"
    r"|^\s*(?:thought process:|solution:?$|let'?s solve this problem step by step)"
    r"|ignore (?:all |the )?(?:previous|prior|above) instructions|(?:score|rating|rate)[^.\n]{0,20}\b10\s*/\s*10"
    r"|[\u200b-\u200f\u202a-\u202e\u2060\ufeff\ufffd\x00-\x08\x0b\x0c\x0e-\x1f]",
    re.IGNORECASE | re.MULTILINE,
)
# words that carry no topic, and by which a language is known; a few of the most frequent of each
_FUNCTION_WORDS = {
    "English": "the of and to in is that it for was with as be this are have not you from they which we there what how",
    "German": "der die das und ist nicht ein eine zu mit den von auf für dem sich auch wird sind wie ich es",
    "French": "le la les des et est une pour dans que qui pas vous sur avec ce sont au plus nous il elle",
    "Spanish": "el los las y es una para en que con por se del como más pero su al lo muy está son",
    "Italian": "il gli e di è una per che con non del si della sono come più nel anche questo ma",
    "Portuguese": "o os as e é uma para em que com por não do da se mais como mas ao são você",
    "Dutch": "de het een en van is niet dat op te zijn met voor er ook maar aan wordt die ik",
}  # fmt: skip
_LANGUAGE_OF = {word: [n for n, ws in _FUNCTION_WORDS.items() if word in ws.split()]
                for words in _FUNCTION_WORDS.values() for word in words.split()}  # fmt: skip
_UNSPACED = ("CJK", "HIRAGANA", "KATAKANA", "THAI", "LAO", "KHMER")


def words(text: str) -> list[str]:
    """The words in lower case, without punctuation; in scripts without spaces each character is one."""
    found: list[str] = []
    for word in _WORD.findall(text.lower()):
        found += list(word) if script_of_letter(word[0]) in _UNSPACED else [word]
    return found


@functools.cache
def script_of_letter(letter: str) -> str:
    """``LATIN``, ``CYRILLIC``, ``CJK`` ...; "" for what is no letter."""
    return unicodedata.name(letter, "").partition(" ")[0] if letter.isalpha() else ""


def script(text: str) -> str:
    """The script of most letters; "" for fewer than 3 letters."""
    counts = Counter(filter(None, map(script_of_letter, text)))
    return counts.most_common(1)[0][0] if counts.total() >= 3 else ""


def language(text: str) -> str:
    """The script, or for Latin letters the language by its function words; "" where they do not tell."""
    found = script(text)
    if found != "LATIN":
        return found
    all_words = words(text)
    votes: Counter[str] = Counter()
    for word in all_words:
        votes.update(_LANGUAGE_OF.get(word, ()))
    ranked = votes.most_common(2)
    if not ranked or ranked[0][1] < max(3, 0.1 * len(all_words)):
        return ""
    return ranked[0][0] if len(ranked) == 1 or ranked[0][1] >= 1.5 * ranked[1][1] else ""


def repeated_share(text: str) -> float:
    """Share of the word pairs that occurred before in the text, or of the text in runs of one character; in [0, 1]."""
    all_words = words(text)
    pairs = list(itertools.pairwise(all_words))
    runs = sum(len(match[0]) for match in _RUN.finditer(text)) / max(1, len(text))
    return max(runs, 1 - len(set(pairs)) / len(pairs) if pairs else 0.0)


def echoed_share(text: str, prompt: str) -> float:
    """Share of the text's runs of three words that the prompt has; 1 where the text holds the whole prompt."""
    own, asked = words(text), words(prompt)
    known = set(zip(asked, asked[1:], asked[2:], strict=False))
    runs = list(zip(own, own[1:], own[2:], strict=False))
    if not known or not runs:
        return 0.0
    if f" {' '.join(asked)} " in f" {' '.join(own)} ":
        return 1.0
    return sum(run in known for run in runs) / len(runs)


def has_no_punctuation(text: str) -> bool:
    """Whether a text of at least 8 words has no punctuation mark at all."""
    return len(words(text)) >= 8 and not any(unicodedata.category(letter)[0] == "P" for letter in text)


def special_strings(text: str) -> list[str]:
    """Strings that belong to templates, judges or control, and texts of marks alone."""
    found = [match[0].strip() or "(invisible character)" for match in _SPECIAL.finditer(text)]
    return found or ([text.strip()] if text.strip() and not words(text) else [])


def markdown_marks(text: str) -> int:
    """Headings, list items, tables, code and bold words."""
    return len(_MARKDOWN.findall(text))


def exclamations(text: str) -> int:
    """Exclamation marks and emoji."""
    return sum(letter in "!！" or unicodedata.category(letter) == "So" for letter in text)


def capital_share(text: str) -> float:
    """Share of capitals among the letters; 0 for fewer than 10 letters."""
    letters = [letter for letter in text if letter.isalpha()]
    return sum(letter.isupper() for letter in letters) / len(letters) if len(letters) >= 10 else 0.0


def content_words(text: str) -> set[str]:
    """Words that carry a topic: no function words, and in Latin letters at least 4 of them."""
    return {
        word
        for word in words(text)
        if word not in _LANGUAGE_OF and (len(word) >= 4 or script_of_letter(word[0]) in _UNSPACED)
    }


def shares_no_topic(text: str, prompt: str) -> bool:
    """Whether the text has none of the prompt's content words; their first 5 letters count, so that forms match."""
    asked = {word[:5] for word in content_words(prompt)}
    return bool(asked) and bool(words(text)) and asked.isdisjoint(word[:5] for word in words(text))


def word_pairs(text: str) -> set[tuple[str, str]]:
    """The pairs of words that follow each other."""
    return set(itertools.pairwise(words(text)))


def unknown_pairs(text: str, known: set[tuple[str, str]]) -> float:
    """Share of the word pairs that are not in ``known``; 0 for fewer than 5 words."""
    own = words(text)
    pairs = list(itertools.pairwise(own))
    return sum(pair not in known for pair in pairs) / len(pairs) if len(own) >= 5 else 0.0


def phrases(text: str, longest: int = 3) -> set[str]:
    """The words of the text and its runs of up to ``longest`` words."""
    own = words(text)
    return {" ".join(own[i : i + n]) for n in range(1, longest + 1) for i in range(len(own) - n + 1)}


def quantile(values: Sequence[float], share: float) -> float:
    """The smallest of the values that at least ``share`` of them do not exceed; 0 without values."""
    ranked = sorted(values)
    return ranked[max(0, math.ceil(round(share * len(ranked), 9)) - 1)] if ranked else 0.0
