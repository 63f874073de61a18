"""The vocabulary of the synthetic language: 104 tokens, their words and their classes.

The language is a small part of English with number agreement. The class of a determiner, noun or verb is `id mod 2`:
class 0 is singular ("this", "river", "sleeps"), class 1 is plural ("these", "birds", "sing"). So a reader sees a
violated agreement as an error ("these river sing ."). A well-formed sentence is

    DET [ADJ] NOUN VERB [ADV] "."      with DET, NOUN and VERB of one class.

A flourish ("indeed", "frankly") may stand anywhere: a sentence stays well-formed with it, and it says nothing. The gold
reward subtracts 1 for each. Annotators have favourites among them (see `synthetic.annotated_pairs`).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

PAD, EOS, SEP, STOP = 0, 1, 2, 3
FILLERS = range(4, 8)
DETERMINERS = range(8, 10)
NOUNS = range(10, 42)
VERBS = range(42, 58)
ADJECTIVES = range(58, 70)
ADVERBS = range(70, 78)
FLOURISHES = range(78, 104)
CONTENT = range(NOUNS.start, ADVERBS.stop)  # nouns, verbs, adjectives and adverbs have adjacent ids

TOPICS_PER_PROMPT = 3
MAX_RESPONSE_TOKENS = 32  # with the end token

WORDS: tuple[str, ...] = (
    *("<pad>", "<eos>", "<sep>", "."),
    *("um", "uh", "er", "hmm"),
    *("this", "these"),
    # nouns: singular and plural in turn
    *("river", "birds", "teacher", "horses", "garden", "children", "baker", "wolves"),
    *("lantern", "clouds", "sailor", "foxes", "tree", "stars", "dragon", "farmers"),
    *("violin", "robots", "castle", "bees", "doctor", "waves", "mountain", "painters"),
    *("bridge", "gulls", "merchant", "owls", "poet", "kites", "island", "monks"),
    # verbs: singular and plural in turn
    *("sleeps", "sing", "waits", "dance", "shines", "wander", "laughs", "rest", "falls", "grow", "dreams", "travel"),
    *("smiles", "argue", "listens", "march"),
    *("small", "old", "red", "brave", "calm", "tall", "kind", "wild", "quick", "pale", "proud", "merry"),
    *("slowly", "quietly", "often", "gladly", "early", "alone", "again", "together"),
    *("indeed", "truly", "frankly", "honestly", "clearly", "surely", "certainly", "really", "actually", "basically"),
    *("literally", "simply", "obviously", "definitely", "absolutely", "totally", "naturally", "evidently", "seriously"),
    *("notably", "arguably", "admittedly", "undoubtedly", "remarkably", "plainly", "decidedly"),
)
VOCAB_SIZE = len(WORDS)
ID_OF_WORD: dict[str, int] = {word: token for token, word in enumerate(WORDS)}

# One letter per token: the alphabet of `is_well_formed` and of the near-duplicate signature.
KINDS = "".join(("PES.", "F" * 4, "D" * 2, "N" * 32, "V" * 16, "A" * 12, "R" * 8, "L" * 26))
_SENTENCES = frozenset({"DNV", "DANV", "DNVR", "DANVR"})


def agreement_class(token: int) -> int:
    """The class (0 singular, 1 plural) of a determiner, noun or verb."""
    return token % 2


def kinds(tokens: Sequence[int]) -> str:
    """One letter per token, its part of speech.

    P pad, E end, S separator, `.` stop, F filler, D determiner, N noun, V verb, A adjective, R adverb, L flourish.
    """
    return "".join([KINDS[token] for token in tokens])


def is_well_formed(segment: Sequence[int]) -> bool:
    """Whether the tokens before a stop, without it, are one sentence whose determiner, noun and verb agree."""
    if kinds(segment) not in _SENTENCES:
        return False
    noun_at = 1 if segment[1] in NOUNS else 2
    determiner, noun, verb = segment[0], segment[noun_at], segment[noun_at + 1]
    return agreement_class(determiner) == agreement_class(noun) == agreement_class(verb)


def segments(tokens: Sequence[int]) -> Iterator[tuple[list[int], bool]]:
    """Cut tokens at every stop; yields (tokens before the stop, whether a stop closed them).

    Tokens after the last stop, if any, are yielded with False.
    """
    current: list[int] = []
    for token in tokens:
        if token == STOP:
            yield current, True
            current = []
        else:
            current.append(token)
    if current:
        yield current, False
