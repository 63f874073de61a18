"""Log-probabilities that endpoints tell: what forms are read, and when its tokens count as ours."""

from __future__ import annotations

import math
from typing import Any

import pytest
from tiny import TOKENIZER

from nemo_advrm.data.tokenizers import ByteTokenizer
from nemo_advrm.rollouts.told_log_probs import of_our_tokens, told_by

OURS = TOKENIZER.encode_response("this river sleeps .")
WORDS = ["this", "river", "sleeps", "."]
VALUES = [-0.5, -1.5, -2.5, -3.5]
NAN = math.nan


def _plain(tokens: list, values: list, **more: Any) -> dict[str, Any]:
    return {"text": "", "logprobs": {"tokens": tokens, "token_logprobs": values, "text_offset": []}, **more}


def _chat(tokens: list[dict]) -> dict[str, Any]:
    return {"text": "", "logprobs": {"content": tokens}}


@pytest.mark.parametrize(
    ("choice", "found"),
    [
        (_plain(WORDS, VALUES), [*VALUES, NAN]),  # the end is not told
        (_plain([*WORDS, ""], [*VALUES, -0.25]), [*VALUES, -0.25]),
        (_plain([*WORDS, "<eos>"], [*VALUES, -0.25]), [*VALUES, -0.25]),
        (_plain([*WORDS, "<|im_end|>"], [*VALUES, -0.25]), [*VALUES, NAN]),  # it ends with another token
        (_plain([f"token_id:{token}" for token in OURS], [*VALUES, -0.25]), [*VALUES, -0.25]),
        (_plain(["?"] * 5, [*VALUES, -0.25], token_ids=OURS), [*VALUES, -0.25]),
        (_plain(["?"] * 5, [*VALUES, -0.25], token_ids=[*OURS[:4], 99]), [*VALUES, NAN]),
        (_plain(WORDS, VALUES, token_ids=[*OURS[:3], 99]), [NAN] * 5),
        (_chat([{"token": w, "logprob": v} for w, v in zip(WORDS, VALUES, strict=True)]), [*VALUES, NAN]),
        (_chat([{"id": t, "token": "?", "logprob": -1.0} for t in OURS]), [-1.0] * 5),
        (_plain(["this ri", "ver", "sleeps", "."], VALUES), [NAN] * 5),  # the same text in other tokens
        (_plain(["this river", "sleeps", "."], VALUES[:3]), [NAN] * 5),
        (_plain([*WORDS, "", ""], [*VALUES, -1.0, -1.0]), [NAN] * 5),
        (_plain(WORDS, [-0.5, -9999.0, float("nan"), 2e-4]), [-0.5, NAN, NAN, 0.0, NAN]),  # what cannot be
        (_plain(WORDS, [None, "x", 0.1, True]), [NAN] * 5),
        (_plain(WORDS, VALUES[:3]), [NAN] * 5),
        (_plain([None, *WORDS[1:]], VALUES), [NAN] * 5),
        ({"text": "", "logprobs": None}, [NAN] * 5),
        ({"text": "", "logprobs": {"content": [3]}}, [NAN] * 5),
        ({"text": ""}, [NAN] * 5),
    ],
)
def test_told_log_probabilities_are_those_of_our_tokens_or_unknown(choice: dict[str, Any], found: list[float]) -> None:
    assert of_our_tokens(told_by(choice), OURS, TOKENIZER) == pytest.approx(found, nan_ok=True)


def test_a_response_that_was_cut_off_has_no_end_to_tell() -> None:
    told = told_by(_plain(WORDS, VALUES))
    assert of_our_tokens(told, OURS[:4], TOKENIZER) == VALUES
    assert of_our_tokens(told, [], TOKENIZER) == []
    assert of_our_tokens(told, OURS[:3], TOKENIZER) == pytest.approx([NAN] * 3, nan_ok=True)


def test_the_bytes_of_a_character_have_no_text_to_agree_by() -> None:
    tokenizer = ByteTokenizer()
    ours = tokenizer.encode("é")
    told = told_by(_plain(["\ufffd", "\ufffd"], [-1.0, -1.0]))
    assert len(ours) == 2 and of_our_tokens(told, ours, tokenizer) == pytest.approx([NAN] * 2, nan_ok=True)
