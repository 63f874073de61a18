"""Rewards of rollouts are those of their text, not of token sequences that no text encodes to."""

from __future__ import annotations

from dataclasses import replace

import pytest
from tiny import TOKENIZER as WORDS

from nemo_advrm.data.messages import Message
from nemo_advrm.data.tokenizers import ByteTokenizer
from nemo_advrm.errors import DataError
from nemo_advrm.rewards.token_sequences import token_sequences
from nemo_advrm.rollouts.types import Rollouts

TOKENIZER = ByteTokenizer()
PROMPT = (Message(role="user", content="hi"),)
START = [2, 3, 111, 112, 6, 4]


def written(*responses: list[int], prompt: list[int] = START) -> Rollouts:
    """What a policy with bytes as tokens wrote."""
    texts = [TOKENIZER.decode_response(ids) for ids in responses]
    ended = [ids[-1] == TOKENIZER.eos_id for ids in responses]
    count = len(responses)
    return Rollouts(
        [PROMPT] * count, texts, ended, [prompt] * count, list(responses), [0] * count, TOKENIZER.fingerprint
    )


def test_broken_bytes_are_scored_as_the_text_they_become() -> None:
    rows = token_sequences(written([7 + 0xFF, 7 + 65, 1], [7 + 66]), TOKENIZER)
    # U+FFFD, "A" and the end; "B" without one
    assert rows == [[*START, 7 + 0xEF, 7 + 0xBF, 7 + 0xBD, 7 + 65, 1], [*START, 7 + 66]]
    # a control token that a policy wrote is no text
    assert token_sequences(written([7 + 65, 3, 7 + 66, 1]), TOKENIZER) == [[*START, 7 + 65, 7 + 66, 1]]


def test_plain_text_has_the_policys_own_tokens() -> None:
    response = TOKENIZER.encode_response("naïve 雪")
    assert token_sequences(written(response), TOKENIZER) == [START + response]


def test_rows_that_came_as_tokens_are_scored_as_they_are() -> None:
    data = replace(written([7 + 0xFF, 1]), tokens_only=True)
    assert token_sequences(data, TOKENIZER) == [[*START, 7 + 0xFF, 1]]
    with pytest.raises(DataError, match="tokens of another tokenizer than synthetic, without their text"):
        token_sequences(data, WORDS)


def test_text_that_grew_beyond_the_model_loses_its_start() -> None:
    data = written([7 + 0xFF, 1], TOKENIZER.encode_response("ab"))
    assert token_sequences(data, TOKENIZER, limit=9) == [
        [*START[1:], 7 + 0xEF, 7 + 0xBF, 7 + 0xBD, 1],
        [*START, *TOKENIZER.encode("ab"), 1],
    ]
    # the policy saw the end of its prompt only
    assert token_sequences(written([7 + 65, 1], prompt=[4]), TOKENIZER, limit=5) == [[112, 6, 4, 7 + 65, 1]]
    # what the policy itself wrote is too long: the model refuses it
    assert [len(row) for row in token_sequences(data, TOKENIZER, limit=5)] == [10, 9]
    # and nothing is cut for another tokenizer's policy, of which it is not known what fits
    assert len(token_sequences(replace(data, fingerprint="another"), TOKENIZER, limit=9)[0]) == 10
