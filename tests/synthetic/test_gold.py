"""Every term of the gold formula by hand, the extremes, and the agreement of text with ids and of one with many."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from nemo_advrm.errors import DataError
from nemo_advrm.synthetic.corpus import sft_corpus
from nemo_advrm.synthetic.gold import gold_score, gold_scores, token_class_signature
from nemo_advrm.synthetic.tokenizer import SyntheticTokenizer

PROMPT = ({"role": "user", "content": "river birds teacher"},)
TOKENIZER = SyntheticTokenizer()
FAULTLESS = "this river sleeps . these birds sing . this teacher waits ."  # 12 tokens


@pytest.mark.parametrize(
    ("response", "expected"),
    [
        # cov 3, any 3, wf/L = 1
        pytest.param(FAULTLESS, 4.5 + 1.5 + 2, id="faultless"),
        # 8 tokens, two short of 10
        pytest.param("this river sleeps . these birds sing .", 3 + 1 + 2 - 0.2 * 2, id="short"),
        # the second and third sentence disagree: two bad segments, but their topics occur; sing a second time
        pytest.param(
            "this river sleeps . this birds sing . this teacher sing .", 3 + 2 * 4 / 12 - 0.3 * 2 - 0.5, id="bad"
        ),
        # two empty segments: L = 14
        pytest.param(FAULTLESS + " . .", 6 + 2 * 12 / 14 - 0.3 * 2, id="empty segments"),
        # no last stop: an unclosed segment is bad; L = 11
        pytest.param(FAULTLESS.removesuffix(" ."), 3 + 1.5 + 2 * 8 / 11 - 0.3, id="unclosed"),
        # river and sleeps a second time; L = 16
        pytest.param(FAULTLESS + " this river sleeps .", 6 + 2 - 0.5 * 2, id="repeated"),
        # a well-formed sentence on a noun that is no topic; L = 16
        pytest.param(FAULTLESS + " this garden shines .", 6 + 2 - 1.2, id="off topic"),
        # an off-topic noun twice: off counts both, rep the second; shines is repeated too; L = 20
        pytest.param(FAULTLESS + " this garden shines ." * 2, 6 + 2 - 1.2 * 2 - 0.5 * 2, id="off topic twice"),
        # a filler spoils its sentence; L = 13
        pytest.param(FAULTLESS.replace("river", "um river"), 3 + 1.5 + 2 * 8 / 13 - 0.3 - 0.4, id="filler"),
        # a flourish costs, and spoils no sentence; L = 13, of which 12 are in sentences
        pytest.param(FAULTLESS.replace("river", "indeed river"), 6 + 2 * 12 / 13 - 1.0, id="flourish"),
        # between sentences alike, and before the first
        pytest.param("truly " + FAULTLESS.replace("these", "frankly these"), 6 + 2 * 12 / 14 - 2.0, id="flourishes"),
        # adjectives and adverbs are content: 3 sentences of 6 tokens, old and slowly twice too often each; L = 18
        pytest.param(
            "this old river sleeps slowly . these old birds sing slowly . this old teacher waits slowly .",
            6 + 2 - 0.5 * 4,
            id="repeated adjective and adverb",
        ),
        # 24 tokens: four too long; rep of tree (its verb dreams is new, then repeated) and off twice more
        pytest.param(FAULTLESS + " this tree dreams ." * 3, 6 + 2 - 0.15 * 4 - 1.2 * 3 - 0.5 * 4, id="long"),
    ],
)
def test_terms_by_hand(response: str, expected: float) -> None:
    assert gold_score(PROMPT, response, True) == pytest.approx(expected, abs=1e-12)


def test_a_response_that_did_not_end_pays() -> None:
    assert gold_score(PROMPT, FAULTLESS, False) == pytest.approx(8 - 1.5)


def test_empty_response() -> None:
    assert gold_score(PROMPT, "", True) == pytest.approx(-2.0)  # ten tokens short
    assert gold_score(PROMPT, "", False) == pytest.approx(-3.5)
    assert gold_score(PROMPT, [], True) == pytest.approx(-2.0)


def test_strings_of_stops_fall_to_the_floor() -> None:
    assert gold_score(PROMPT, ". . . . . . . . . .", True) == pytest.approx(-3.0)
    for count in range(20, 33):
        assert gold_score(PROMPT, " ".join(["."] * count), True) == -6.0


def test_only_fillers() -> None:
    assert gold_score(PROMPT, "um " * 5, True) == pytest.approx(-0.3 - 0.4 * 5 - 0.2 * 5)
    assert gold_score(PROMPT, "um " * 31, True) == -6.0


def test_full_length_without_end() -> None:
    # 3 good sentences and the determiner 20 times: L = 32
    expected = 6 + 2 * 12 / 32 - 0.3 - 0.15 * 12 - 1.5
    assert gold_score(PROMPT, FAULTLESS + " this" * 20, False) == pytest.approx(expected)


def test_a_fault_free_response() -> None:
    assert gold_score(PROMPT, FAULTLESS, True) == 8.0


def test_ids_and_text_agree() -> None:
    prompt_ids, ids = TOKENIZER.encode_prompt(PROMPT), TOKENIZER.encode_response(FAULTLESS)
    padded = [*ids, 0, 0, 0]
    for prompt in (PROMPT, prompt_ids, torch.tensor(prompt_ids)):
        for response in (FAULTLESS, ids, padded, np.array(padded), torch.tensor(padded)):
            assert gold_score(prompt, response, True) == 8.0
    # what follows the end token does not count, and `ended` alone decides its term
    assert gold_score(PROMPT, [*ids, 4, 4], True) == 8.0
    assert gold_score(PROMPT, ids, False) == 6.5


def test_specials_inside_a_response_spoil_their_segment() -> None:
    ids = TOKENIZER.encode(FAULTLESS)
    for special in (0, 2):
        expected = 3 + 1.5 + 2 * 8 / 13 - 0.3
        assert gold_score(PROMPT, [ids[0], special, *ids[1:]], True) == pytest.approx(expected)


def test_bad_input_is_named() -> None:
    with pytest.raises(DataError, match="zebra"):
        gold_score(PROMPT, "zebra", True)
    with pytest.raises(DataError, match="104"):
        gold_score(PROMPT, [104], True)
    with pytest.raises(DataError, match="topic"):
        gold_score([2], "this", True)
    with pytest.raises(DataError, match="topic"):
        gold_score((), "this", True)
    with pytest.raises(DataError, match="user"):
        gold_score([{"role": "system", "content": "river"}], "this", True)


def test_many_equal_one() -> None:
    corpus = sft_corpus(3000, seed=3)
    prompts, responses = [prompt for prompt, _ in corpus], [response for _, response in corpus]
    ended = [index % 3 > 0 for index in range(len(corpus))]
    scores = gold_scores(prompts, responses, ended)
    assert scores == [gold_score(*row) for row in zip(prompts, responses, ended, strict=True)]
    assert all(-6.0 <= score <= 9.0 for score in scores)


def test_a_signature_has_one_letter_per_token_for_its_part_of_speech() -> None:
    assert token_class_signature("this red river sleeps slowly . um . these") == "DANVR.F.D"
    assert token_class_signature("") == ""
    assert token_class_signature("this river sleeps .") == token_class_signature("these garden sing .")
    assert token_class_signature(". . .") != token_class_signature(". .")
    text = "this river sleeps ."
    assert token_class_signature([*TOKENIZER.encode_response(text), 0, 0]) == token_class_signature(text)
