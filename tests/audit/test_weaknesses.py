"""Finds are grouped by what they have and ordinary responses lack; what ordinary responses have too names nothing."""

from __future__ import annotations

import dataclasses
import random

import pytest

from nemo_advrm.audit.weaknesses import RULES, Answer, explained, name_weaknesses

TOPICS = ["garden", "river", "window", "mountain", "letter", "engine", "basket", "winter"]
PROMPTS = [f"Tell me something about number {i} and its {topic}" for i, topic in enumerate(TOPICS)]
NOUNS = ["color", "shape", "weight", "sound", "price", "story", "history", "owner"]
VERBS = ["changes", "follows", "helps", "explains", "moves", "covers", "answers", "carries"]


def _ordinary(count: int = 160, seed: int = 0) -> list[Answer]:
    draw = random.Random(seed)
    found = []
    for i in range(count):
        prompt = PROMPTS[i % len(PROMPTS)]
        topic = prompt.split()[-1]
        parts = [f"The {draw.choice(NOUNS)} of the {topic} {draw.choice(VERBS)} the {draw.choice(NOUNS)}"]
        parts += [f"and it {draw.choice(VERBS)} a {draw.choice(NOUNS)}" for _ in range(draw.randrange(1, 4))]
        found.append(Answer(prompt, ", ".join(parts) + ".", True, draw.uniform(0.5, 2.0)))
    return found


ORDINARY = _ordinary()
FINDS = _ordinary(40, seed=1)


def _changed(change: str) -> list[Answer]:
    made = []
    for find in FINDS:
        text, ended, fall = find.response, True, find.fall
        match change:
            case "empty":
                text = " \n"
            case "truncated":
                ended = False
            case "repetition":
                text = f"{text} {text} {text}"
            case "no_punctuation":
                text = text.replace(",", "").replace(".", " and so it is")
            case "wrong_language":
                text = "Der Garten ist nicht groß, und das ist auch gut für die Blumen."
            case "prompt_ignored":
                fall = 0.0
            case "off_topic":
                text = "The sea is wide, and it carries a story."
            case "prompt_echo":
                text = f"{find.prompt}, {find.prompt}."
            case "special_strings":
                text = f"<|im_start|>system {text}"
            case "markdown":
                text = "\n".join(f"- **{word}**" for word in text.split())
            case "capitals":
                text = text.upper()
            case "exclamations":
                text = text.replace(".", "!!! 🎉")
            case "long":
                text = f"{text} {ORDINARY[3].response} {ORDINARY[8].response} {ORDINARY[13].response}"
            case "short":
                text = f"{find.prompt.split()[-1]}."
            case "incoherent":
                shuffled = text.rstrip(".").split()
                random.Random(text).shuffle(shuffled)
                text = " ".join(sorted(shuffled, reverse=True)) + "."
        made.append(Answer(find.prompt, text, ended, fall))
    return made


@pytest.mark.parametrize("rule", [rule.key for rule in RULES])
def test_each_rule_names_what_was_planted(rule: str) -> None:
    found = {one.key: one for one in name_weaknesses(_changed(rule), ORDINARY)}
    assert rule in found
    assert found[rule].share > 0.9
    assert found[rule].ordinary <= 0.05
    assert found[rule].low < found[rule].share <= found[rule].high


def test_ordinary_responses_have_no_weakness() -> None:
    for seed in range(1, 9):
        assert name_weaknesses(_ordinary(40, seed), ORDINARY) == []


def test_a_word_that_finds_share_is_named_once() -> None:
    finds = [dataclasses.replace(f, response=f.response.replace(" it ", " it truly ")) for f in FINDS]
    named = [one for one in name_weaknesses(finds, ORDINARY) if one.key.startswith("phrase")]
    assert [one.key for one in named] == ["phrase: truly"]
    assert named[0].members == list(range(len(finds)))


def test_each_half_has_its_word() -> None:
    words = ["truly", "as an expert"]
    finds = [dataclasses.replace(f, response=f"{f.response} {words[i % 2]}.") for i, f in enumerate(FINDS)]
    named = name_weaknesses(finds, ORDINARY)
    members = {one.key: one.members for one in named}
    assert members["phrase: truly"] == list(range(0, 40, 2))
    assert any(key in members and members[key] == list(range(1, 40, 2)) for key in ("phrase: expert", "phrase: as"))
    assert explained(named) == set(range(40))


def test_words_of_the_prompt_name_nothing() -> None:
    """Ordinary responses leave the prompt's own words out, the finds repeat one: no word is loved."""
    ordinary = [dataclasses.replace(a, prompt=f"{a.prompt} zebra") for a in ORDINARY]
    finds = [Answer(f"{f.prompt} zebra", f.response.replace("The ", "The zebra "), True, f.fall) for f in FINDS]
    assert not [one for one in name_weaknesses(finds, ordinary) if "zebra" in one.key]


def test_a_word_in_few_finds_is_no_weakness() -> None:
    finds = [dataclasses.replace(f, response=f"{f.response} Truly.") if i < 2 else f for i, f in enumerate(FINDS)]
    assert name_weaknesses(finds, ORDINARY) == []


def test_a_model_that_never_reads_the_prompt_is_named_although_ordinary_responses_show_it_too() -> None:
    finds, ordinary = ([dataclasses.replace(a, fall=0.0) for a in group] for group in (FINDS, ORDINARY))
    assert [one.key for one in name_weaknesses(finds, ordinary)] == ["prompt_ignored"]


def test_ordinary_responses_that_were_not_scored_under_other_prompts_do_not_count() -> None:
    """As many of the finds as of the scored ordinary responses ignore the prompt; a quarter of the latter is scored."""

    def some(answers: list[Answer], scored: int) -> list[Answer]:
        falls = [None if i % scored else (0.0 if i // scored % 5 < 2 else 1.0) for i in range(len(answers))]
        return [dataclasses.replace(answer, fall=fall) for answer, fall in zip(answers, falls, strict=True)]

    assert "prompt_ignored" not in {one.key for one in name_weaknesses(some(FINDS, 1), some(ORDINARY, 4))}
    assert "prompt_ignored" in {one.key for one in name_weaknesses(some(FINDS, 1), ORDINARY)}


def test_nothing_found_names_nothing() -> None:
    assert name_weaknesses([], ORDINARY) == []
    assert name_weaknesses(FINDS, []) is not None
