"""Rows that are too long, and rows that the tokenizer refuses, are handled alike for pairs, SFT rows and prompts."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest

from nemo_advrm.config import load_config
from nemo_advrm.config.schema import Config
from nemo_advrm.data.encoding import encode_pairs
from nemo_advrm.data.messages import Message, ReadPrompt
from nemo_advrm.data.preference_rows import PreferencePair
from nemo_advrm.data.row_lengths import RowLengths
from nemo_advrm.data.sft_rows import SftRow
from nemo_advrm.data.tokenizers import ByteTokenizer
from nemo_advrm.engine.runtime import Runtime
from nemo_advrm.errors import DataError
from nemo_advrm.rewards.limits import prompts_with_room
from nemo_advrm.rollouts.run_prompts import encode_prompts
from nemo_advrm.training.sft_training import encode_responses

TOKENIZER = ByteTokenizer()
LIMIT = 32
QUESTIONS = ["short", "q" * 60, "fine", "w" * 70]


def asked(place: int) -> tuple[Message, ...]:
    return (Message(role="user", content=QUESTIONS[place]),)


def pairs(cfg: Config) -> list[Any]:
    rows = [PreferencePair(asked(i), "yes", "no", source=f"f:{i + 1}") for i in range(4)]
    return encode_pairs(rows, TOKENIZER, LIMIT, cfg.data.on_overlong, cfg.data.on_bad_row)[0]


def sft(cfg: Config) -> list[Any]:
    return encode_responses(cfg, TOKENIZER, [SftRow(asked(i), "yes", f"f:{i + 1}") for i in range(4)])


def prompts(cfg: Config) -> list[Any]:
    return encode_prompts([ReadPrompt(asked(i), f"f:{i + 1}") for i in range(4)], TOKENIZER, cfg)


def config(on_overlong: str) -> Config:
    return load_config([f"model.encoder_seq_length={LIMIT}", "rl.max_new_tokens=4", f"data.on_overlong={on_overlong}"])


@pytest.mark.parametrize("encode", [pairs, sft, prompts])
def test_the_choices_mean_the_same_for_pairs_rows_and_prompts(
    encode: Callable[[Config], list[Any]], single: Runtime
) -> None:
    with pytest.raises(DataError, match=r"^f:2: .* \(2 of 4 rows are too long\); .*data\.on_overlong=skip"):
        encode(config("error"))
    assert len(encode(config("skip"))) == 2
    assert len(encode(config("truncate_prompt"))) == 4


@pytest.mark.parametrize("encode", [sft, prompts])
def test_a_cut_prompt_keeps_its_end(encode: Callable[[Config], list[Any]], single: Runtime) -> None:
    whole, cut = (encode(replace_limit(limit))[1].tokens for limit in (200, LIMIT))
    assert len(cut) < len(whole) and cut == whole[-len(cut) :]


def replace_limit(limit: int) -> Config:
    cfg = config("truncate_prompt")
    cfg.model.encoder_seq_length = limit
    return cfg


def test_a_row_that_would_lose_its_whole_prompt_is_left_out() -> None:
    lengths = RowLengths("truncate_prompt", "error", "")
    assert [lengths.tokens_to_cut(length, 10, 4, "long") for length in (10, 14, 15)] == [0, 4, None]
    assert lengths.finish(2, "empty") == {"overlong": 1, "truncated": 1, "refused": 0}
    asked_for: list[int] = []
    lengths.tokens_to_cut(10, 10, lambda: asked_for.append(1) or 1, "")
    assert not asked_for  # counting the tokens of a prompt takes time
    with pytest.raises(DataError, match=r"^empty$"):
        RowLengths("skip", "error", "").finish(0, "empty")


def test_prompts_without_room_for_a_member_are_counted(single: Runtime, capsys: pytest.CaptureFixture[str]) -> None:
    cfg = config("skip")
    cfg.model.encoder_seq_length = 200
    encoded = prompts(cfg)
    member: Any = SimpleNamespace(name="judge", longest=40, tokenizer=TOKENIZER)
    capsys.readouterr()
    left = prompts_with_room(encoded, TOKENIZER.fingerprint, [member], cfg)
    assert [(prompt.index, prompt.messages) for prompt in left] == [(0, asked(0)), (1, asked(2))]
    assert capsys.readouterr().out == "prompts for judge: 2 overlong\n"
    cfg.data.on_overlong = "truncate_prompt"  # a prompt is not cut for one member
    with pytest.raises(DataError, match=r"^f:2: the prompt has \d+ tokens, .* judge takes 40 tokens \(2 of 4 rows"):
        prompts_with_room(encoded, TOKENIZER.fingerprint, [member], cfg)
