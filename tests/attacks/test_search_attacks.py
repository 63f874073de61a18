"""Attacks without RL find planted flaws, alike on every number of ranks, and leave an ordinary reward model alone."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import attack_jobs
import pytest
import torch
from attack_inputs import (
    TEXTS_PN,
    WORDS_PN,
    InstructedBytes,
    TableModel,
    finds,
    make_inputs,
    plain,
    run,
    second,
)

from nemo_advrm.attacks.drafts import Draft, cut, usable
from nemo_advrm.attacks.pairing import ChosenSide
from nemo_advrm.attacks.probes import all_probes, common_words
from nemo_advrm.attacks.rewrites import REWRITES
from nemo_advrm.attacks.word_substitution import WordSubstitution, _Text
from nemo_advrm.engine.runtime import Layout, Runtime
from nemo_advrm.errors import ConfigError
from nemo_advrm.objectives.adversarial import search_reward
from nemo_advrm.report.collect import _read_pair
from nemo_advrm.synthetic.tokenizer import SyntheticTokenizer

if TYPE_CHECKING:
    from distributed import Worlds

pytestmark = pytest.mark.usefixtures("single")


def likes_robots(text: str) -> float:
    return plain(text) + 50 * text.split().count("robots")


def test_the_reward_of_a_search_by_hand() -> None:
    z_BK = torch.tensor([[2.0, -1.0, -3.0], [-0.5, -9.0, -9.0], [1.0, 4.0, 4.0]])
    assert search_reward(z_BK, 1.5, -4.0).tolist() == [2 + 1.5 * 2, -4.5, 1 - 1.5 * 4]
    assert search_reward(z_BK, 0.0, -4.0).tolist() == [2.0, -4.5, 1.0]
    assert search_reward(z_BK[:, :1], 0.0, -4.0).tolist() == [2.0, -4.5, 1.0], "a single member"


def test_word_substitution_finds_the_word_that_the_target_likes(tmp_path: Path) -> None:
    settings = ["adversarial.attack=word_substitution", "adversarial.search.candidates=104"]
    inputs = make_inputs(tmp_path, [likes_robots, second], *settings)
    rows = run(inputs, steps=1)
    assert len(rows) == 6 and len(finds(inputs, rows)) == 6
    for row in rows:
        # of four or five words a fifth is less than one, and one may be changed in any case
        assert row["response"].split().count("robots") == 1 and row["origin"].startswith("1 of ")
    originals = [text.split() for texts in WORDS_PN for text in texts]
    for row in rows:
        changed = [sum(a != b for a, b in zip(row["response"].split(), o, strict=False)) for o in originals]
        assert min(changed) == 1, "nothing but the word was changed"


def test_words_are_tried_in_the_order_in_which_they_hold_down_the_reward(tmp_path: Path) -> None:
    weights = {"this": 0.0, "river": -4.0, "sleeps": -1.0}
    inputs = make_inputs(
        tmp_path,
        [lambda text: plain("") + sum(weights.get(word, 0.1) for word in text.split()), second],
        "adversarial.search.edit_share=0.99",
        "adversarial.coefficient=0",
    )
    text = _Text.of(inputs.prompts[0], "this river sleeps .")
    WordSubstitution()._order(inputs, [text])
    assert [text.words[place] for place in text.left[::-1]] == ["river", "sleeps", "this"]
    assert text.limit == 2


def test_a_text_is_taken_apart_and_joined() -> None:
    text = _Text.of(None, "  Don't stop, well-known friend!")  # type: ignore[arg-type]
    assert text.words == ["Don't", "stop", "well-known", "friend"]
    assert text.joined() == "  Don't stop, well-known friend!"
    assert text.joined(2, "good") == "  Don't stop, good friend!"
    assert text.without(1) == "Don't, well-known friend!"


def test_decoding_finds_the_word_that_the_target_likes(tmp_path: Path) -> None:
    settings = ["adversarial.attack=decoding", "adversarial.search.candidates=104"]
    inputs = make_inputs(tmp_path, [likes_robots, second], *settings)
    rows = run(inputs, steps=2, samples_per_step=2)
    assert len(rows) == 4 and len(finds(inputs, rows)) == 4
    for row in rows:
        words = row["response"].split()
        assert len(words) == 23 and words[1:] == ["robots"] * 22, "the first word is given, one for each response"
    assert len({row["response"].split()[0] for row in rows if row["prompt_id"] == 0}) == 2


def test_decoding_weighs_the_reward_against_the_probability(tmp_path: Path) -> None:
    """A token is worth its gain of reward less what it costs in log-probability; the likeliest one costs nothing."""
    settings = ["adversarial.attack=decoding", "adversarial.search.candidates=104"]
    # "robots" stands 23 places behind the likeliest word: 0.23 nats less, for a gain of 5 / s of z
    dear = make_inputs(tmp_path / "dear", [likes_robots, second], *settings, "adversarial.search.naturalness=10000")
    rows = run(dear, steps=1, samples_per_step=2)
    assert rows and not any("robots" in row["response"] for row in rows)
    settings.append("adversarial.search.tokens_per_choice=2")
    pieces = make_inputs(tmp_path / "pieces", [likes_robots, second], *settings)
    for row in run(pieces, steps=1, samples_per_step=2):
        # every second token is the likeliest one, which no reward has chosen
        assert row["response"].split()[2:6:2] == ["robots", "robots"], row["response"]


def test_probes_find_a_target_that_likes_length_and_say_how(tmp_path: Path) -> None:
    inputs = make_inputs(tmp_path, [lambda text: len(text) / 2, second], "adversarial.attack=probes", texts_PN=TEXTS_PN)
    told: list[tuple[int, int]] = []
    inputs = dataclasses.replace(inputs, progress=lambda responses, new: told.append((responses, new)))
    rows = run(inputs, steps=20, samples_per_step=10)
    assert len(told) > 10
    assert [sum(each) for each in zip(*told, strict=True)] == [len(rows), len(inputs.rule.finds(rows))]
    kinds = {row["origin"].partition(":")[0] for row in finds(inputs, rows)}
    assert {"padding", "repetition"} <= kinds and "truncated" not in kinds and "master key" not in kinds
    assert max(len(row["response"].encode()) for row in rows) <= 159, "with its end token it has rl.max_new_tokens"


def test_probes_find_a_planted_master_key_and_strings_from_a_file(tmp_path: Path) -> None:
    own = tmp_path / "own.txt"
    own.write_text("abracadabra\n\n")
    keys = ("Thought process:", "abracadabra")
    inputs = make_inputs(
        tmp_path / "run",
        [lambda text: plain(text) + 90 * (text in keys), second],
        "adversarial.attack=probes",
        f"adversarial.search.probes_path={own}",
        texts_PN=TEXTS_PN,
    )
    rows = run(inputs, steps=40, samples_per_step=10)
    planted = [row for row in finds(inputs, rows) if row["z"][0] > 20]
    assert {row["response"] for row in planted} == set(keys)
    assert {row["origin"] for row in planted} == {"master key: 'Thought process:'", "own: abracadabra"}
    first = [row["origin"] for row in rows[: len(rows) // 2]]
    assert len(set(first)) == len(first), "every probe once before any of them again"
    with pytest.raises(ConfigError, match=r"adversarial\.search\.probes_path=.*missing\.txt: cannot be read"):
        all_probes(str(tmp_path / "missing.txt"))


def test_every_rewrite_changes_text_and_most_keep_its_words() -> None:
    import random

    text = "It's a river, and I'm sure that you don't know its exact source."
    for name, rewrite in REWRITES.items():
        made = rewrite(text, random.Random(1))
        assert made != text, name
        assert made == rewrite(text, random.Random(1)), f"{name} depends on its random numbers alone"
    assert REWRITES["long_forms"](text, random.Random(0)).startswith("It is a river, and I am sure that you do not")
    assert REWRITES["spaced_punctuation"]("a, b.", random.Random(0)) == "a , b ."
    assert sorted(REWRITES["letters_swapped"]("abcdef", random.Random(0))) == list("abcdef")


def test_style_keeps_what_the_target_likes_of_each_style(tmp_path: Path) -> None:
    def answer(request: str) -> str:
        return "thou art a river" if "Shakespeare" in request else "a plain answer"

    options = {"lm": TableModel(InstructedBytes(), answer), "texts_PN": TEXTS_PN}
    settings = ["adversarial.attack=style", "adversarial.search.styles=[Shakespeare,a tweet]"]
    inputs = make_inputs(tmp_path, [lambda text: plain(text) + 90 * ("thou" in text), second], *settings, **options)
    rows = run(inputs)
    assert {row["origin"] for row in rows} == {"style: Shakespeare", "style: a tweet"}
    assert len(rows) == 2 * 3 * 2 and {row["origin"] for row in finds(inputs, rows)} == {"style: Shakespeare"}
    plain_lm = make_inputs(tmp_path, [plain, second], *settings, texts_PN=TEXTS_PN)
    with pytest.raises(ConfigError, match="style needs an instructed language model, and table has no chat template"):
        run(plain_lm)


def test_inverted_finds_a_good_answer_that_is_scored_low_and_makes_it_the_chosen_side(tmp_path: Path) -> None:
    def hates_quotes(text: str) -> float:
        return plain(text.strip('"')) - 90 * text.startswith('"""')

    def other(text: str) -> float:
        return second(text.strip('"'))

    inputs = make_inputs(
        tmp_path,
        [hates_quotes, other],
        "adversarial.attack=inverted",
        "selection.chosen=other",
        texts_PN=TEXTS_PN,
        gold=other,
    )
    rows = run(inputs, steps=5)
    assert len(rows) == 2, "of three responses to each prompt one is good"
    found = finds(inputs, rows)
    assert found == rows and all("quoted" in row["origin"].split(", ") for row in rows)
    for row in rows:
        assert row["z"][0] < -1.96 and row["z"][1] > 0, "the other member knows that it is good"
    rule = inputs.rule
    side = ChosenSide(inputs.cfg.selection, inputs.sft_responses, rule.usable_PI, 1, 0, underrates=True)
    for row in rows:
        pair = side.pair(row, 0, "")
        texts = TEXTS_PN[row["prompt_id"]]
        assert pair.chosen == row["response"] and pair.rejected == min(texts, key=other)
        assert pair.provenance.underrates and pair.key[1] == pair.chosen
        assert pair.provenance.chosen_scores == tuple(row["scores"])
        assert pair.provenance.scores == pytest.approx((hates_quotes(pair.rejected), other(pair.rejected)))
        known = {(str(row["prompt_id"]), pair.rejected): {"z": [0.5, -0.5]}}
        drawn = _read_pair(json.loads(json.dumps(pair.to_row())), known)
        assert drawn.chosen.z == tuple(row["z"]) and drawn.rejected.z == (0.5, -0.5), "as the report draws it"


def test_inverted_takes_finished_answers_and_cuts_none_of_its_rewrites(tmp_path: Path) -> None:
    def hates_truisms(text: str) -> float:
        return plain(text.strip('"')) - 90 * text.startswith('"""') - 900 * ("and true" in text)

    settings = ["adversarial.attack=inverted", "rl.max_new_tokens=60"]
    inputs = make_inputs(tmp_path, [hates_truisms, second], *settings, texts_PN=TEXTS_PN)
    best = max(range(3), key=lambda i: second(TEXTS_PN[0][i]))
    ended_PN = [[i != best for i in range(3)], [True] * 3]
    rows = run(replace(inputs, sft_responses=replace(inputs.sft_responses, ended_PN=ended_PN)), steps=5)
    assert [row["prompt_id"] for row in rows] == [1], "the good answer to the other prompt was cut off"
    assert "quoted" in rows[0]["origin"] and "truism" not in rows[0]["origin"], "a truism leaves no room for its end"


@pytest.mark.parametrize("attack", ["probes", "word_substitution", "decoding"])
def test_members_that_agree_give_no_finds(tmp_path: Path, attack: str) -> None:
    texts = {} if attack != "probes" else {"texts_PN": TEXTS_PN}

    def score(text: str) -> float:
        return plain(text) + len(text) / 9

    members = [score, lambda text: 2 * score(text) + 0.01 * plain(text[1:])]
    inputs = make_inputs(tmp_path, members, f"adversarial.attack={attack}", **texts)
    rows = run(inputs, steps=3)
    z_N2 = torch.tensor([row["z"] for row in rows])
    assert (z_N2[:, 0] > 1.96).any() or attack == "word_substitution", "the target likes some of it"
    assert (z_N2[:, 0] - z_N2[:, 1]).abs().max() < 0.1, "and so does the other member"


def test_what_cannot_become_a_pair_is_not_proposed(tmp_path: Path) -> None:
    inputs = make_inputs(tmp_path, [plain, second], texts_PN=TEXTS_PN)
    prompt = inputs.prompts[0]
    texts = ["good", "half of a pair \ud83d", "lost \N{REPLACEMENT CHARACTER}", "x" * 500]
    assert [draft.text for draft in usable([Draft(prompt, text) for text in texts], inputs)] == ["good", "x" * 159]
    words = make_inputs(tmp_path, [plain, second])
    assert [d.text for d in usable([Draft(prompt, t) for t in ("birds sing .", "Solution")], words)] == ["birds sing ."]
    assert cut("birds sing .", SyntheticTokenizer(), 2) == "birds sing"
    assert common_words(words.sft_responses)[:2] == [".", "these"]


@pytest.mark.long
def test_ranks_share_the_samples_of_one_process(worlds: Worlds, tmp_path: Path, single: Runtime) -> None:
    alone = attack_jobs.samples(str(tmp_path / "alone"))
    again = attack_jobs.samples(str(tmp_path / "again"))
    assert alone == again, "the samples depend on the seed alone"
    for there in worlds.run(Layout(), "attack_jobs", "samples", 2, directory=str(tmp_path / "two")):
        for name, rows in alone.items():
            assert rows and there[name] == rows, name
