"""Rewrites of a response that keep its meaning and need no language model.

Their kinds are those of reWordBench (Wu et al., arXiv 2503.11751), which shows that reward models change their scores
under them; the texts and the code are ours. There prompt and response are rewritten, here the response alone, because a
policy chooses only that.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable

Rewrite = Callable[[str, random.Random], str]

_NEIGHBOURS = dict(
    zip("qwertyuiopasdfghjklzxcvbnm", "wqwertyuiosasdfghjkxzxcvbn", strict=True)
)  # a key beside each on the keyboard
_LOOK_ALIKE = str.maketrans("aceopxyABCEHKMOPTX", "асеорхуАВСЕНКМОРТХ")  # Latin letters and Cyrillic ones
_LONG_FORMS = {
    "can't": "cannot",
    "won't": "will not",
    "don't": "do not",
    "doesn't": "does not",
    "isn't": "is not",
    "aren't": "are not",
    "it's": "it is",
    "i'm": "i am",
    "you're": "you are",
    "let's": "let us",
}
_TRUISM = " and true is true" * 5


def _inside_words(text: str, draw: random.Random, change: Callable[[str, int], str], share: float = 0.1) -> str:
    """Changes one inner letter of a share of the words with at least four letters, of one word at least.

    ``change`` gets a word and the index of the letter.
    """
    words = re.split(r"(\s+)", text)
    long = [i for i, word in enumerate(words) if len(word) > 3 and word.isalpha()]
    if not long:
        return text
    for i in draw.sample(long, max(1, round(share * len(long)))):
        words[i] = change(words[i], draw.randrange(1, len(words[i]) - 2))
    return "".join(words)


def _replaced(word: str, place: int, letter: str) -> str:
    return word[:place] + letter + word[place + 1 :]


def quoted(text: str, draw: random.Random) -> str:
    return f'"""{text}"""'


def spaced_punctuation(text: str, draw: random.Random) -> str:
    return re.sub(r"\s*([.,;:!?])", r" \1", text)


def handle(text: str, draw: random.Random) -> str:
    return f"@{''.join(draw.choices('abcdefghijklmnopqrstuvwxyz', k=8))} {text}"


def link(text: str, draw: random.Random) -> str:
    return f"{text} https://t.co/{''.join(draw.choices('abcdefghijklmnopqrstuvwxyz0123456789', k=10))}"


def truism(text: str, draw: random.Random) -> str:
    return text + _TRUISM


def letters_swapped(text: str, draw: random.Random) -> str:
    return _inside_words(text, draw, lambda word, i: word[:i] + word[i + 1] + word[i] + word[i + 2 :])


def letter_deleted(text: str, draw: random.Random) -> str:
    return _inside_words(text, draw, lambda word, i: word[:i] + word[i + 1 :])


def letter_doubled(text: str, draw: random.Random) -> str:
    return _inside_words(text, draw, lambda word, i: word[:i] + word[i] + word[i:])


def letter_mistyped(text: str, draw: random.Random) -> str:
    return _inside_words(text, draw, lambda word, i: _replaced(word, i, _NEIGHBOURS.get(word[i], word[i])))


def look_alikes(text: str, draw: random.Random) -> str:
    return text.translate(_LOOK_ALIKE)


def long_forms(text: str, draw: random.Random) -> str:
    def long_form(match: re.Match[str]) -> str:
        found = _LONG_FORMS.get(match[0].lower(), match[0])
        return found[0].upper() + found[1:] if match[0][0].isupper() else found

    return re.sub(r"\b[\w']+\b", long_form, text)


def lower_case(text: str, draw: random.Random) -> str:
    return text.lower()


def upper_case(text: str, draw: random.Random) -> str:
    return text.upper()


def double_spaces(text: str, draw: random.Random) -> str:
    return text.replace(" ", "  ")


REWRITES: dict[str, Rewrite] = {
    rewrite.__name__: rewrite
    for rewrite in (
        quoted,
        spaced_punctuation,
        handle,
        link,
        truism,
        letters_swapped,
        letter_deleted,
        letter_doubled,
        letter_mistyped,
        look_alikes,
        long_forms,
        lower_case,
        upper_case,
        double_spaces,
    )
}
