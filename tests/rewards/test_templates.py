"""Scores are those of transformers used as the model's card says, for every trait of chat templates.

One random classifier for each template of tests/template_traits.py, as an ``hf:`` member, as a converted one, exported
again, and through the samples of the server.
"""

from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest
import torch
from hf_tokenizers import save_hf
from reward_members import save_hf_reward
from template_traits import ANSWERS, TEMPLATES, conversation
from tiny import tiny_config
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from nemo_advrm.config.schema import ConvertConfig
from nemo_advrm.convert.conversion import convert
from nemo_advrm.data.reading import ANSWER, KEY, ReadingRule, warn_old_rule
from nemo_advrm.data.tokenizers import HFTokenizer
from nemo_advrm.engine.runtime import Runtime
from nemo_advrm.errors import CheckpointError
from nemo_advrm.rewards.base import RewardSource
from nemo_advrm.rewards.checkpoint_members import member_tokenizer
from nemo_advrm.rewards.hf import HFReward
from nemo_advrm.rewards.sources import build, parse
from nemo_advrm.rollouts.types import Rollouts

TOLERANCE = {"atol": 2e-5, "rtol": 1e-4}


def saved(directory: Path, trait: str) -> Path:
    save_hf_reward(directory, template=TEMPLATES[trait])
    if trait == "bos":
        special = {"bos_token": "<|im_start|>", "eos_token": "<|endoftext|>", "pad_token": "<|endoftext|>"}
        save_hf(directory, template=TEMPLATES[trait], **special)
    return directory


def of_transformers(directory: Path) -> torch.Tensor:
    """Alone, one finished conversation at a time, without padding: the classifier's own score of its last token."""
    model = AutoModelForSequenceClassification.from_pretrained(directory).eval()
    model.config.pad_token_id = None
    tokenizer = AutoTokenizer.from_pretrained(directory)
    scores = []
    for answer in ANSWERS:
        if tokenizer.chat_template is None:
            question = conversation(answer)[0]["content"]
            ids = tokenizer(f"User:\n{question}\n\nAssistant:\n", add_special_tokens=False).input_ids
            ids += [*tokenizer(answer, add_special_tokens=False).input_ids, tokenizer.eos_token_id]
        else:
            ids = tokenizer.apply_chat_template(conversation(answer), tokenize=True, return_dict=False)
        with torch.no_grad():
            scores.append(model(torch.tensor([ids])).logits.squeeze())
    return torch.stack(scores)


def rollouts() -> Rollouts:
    prompts = [tuple(conversation(answer)[:-1]) for answer in ANSWERS]
    none: list[list[int]] = [[] for _ in ANSWERS]
    return Rollouts(prompts, list(ANSWERS), [True] * len(ANSWERS), none, none, [0] * len(ANSWERS), fingerprint="")


def served(member: RewardSource, samples: list[object]) -> torch.Tensor:
    """What the server makes of samples of any form."""
    pytest.importorskip("fastapi", reason="needs the extra serve")
    from nemo_advrm.rewards.ensemble import UncertaintyReward
    from nemo_advrm.serve.samples import Preparer
    from nemo_advrm.serve.scorer import Scorer

    preparer = Preparer([member])
    prepared = preparer.prepare([sample.sample() for sample in samples])  # type: ignore[attr-defined]
    scored = Scorer(UncertaintyReward([member]), preparer.fingerprint).score(prepared)
    return torch.tensor([one.reward for one in scored])


@pytest.mark.parametrize("trait", TEMPLATES)
def test_every_way_to_a_score_gives_that_of_transformers(single: Runtime, tmp_path: Path, trait: str) -> None:
    from nemo_advrm.serve.schemas import ChatMessage, ChatSample, TextSample

    directory, expected = saved(tmp_path / "hf", trait), of_transformers(tmp_path / "hf")
    assert expected.std() > 0.02
    member = HFReward.load("hf", directory, tiny_config())
    torch.testing.assert_close(member.score(rollouts()), expected, **TOLERANCE)

    chats = [
        ChatSample(messages=[ChatMessage(**m) for m in conversation(answer)[:-1]], response=answer)
        for answer in ANSWERS
    ]
    torch.testing.assert_close(served(member, chats), expected, **TOLERANCE)
    if (template := TEMPLATES[trait]) is not None:
        tokenizer = AutoTokenizer.from_pretrained(directory)
        texts = [tokenizer.apply_chat_template(conversation(answer), tokenize=False) for answer in ANSWERS]
        torch.testing.assert_close(served(member, [TextSample(text=text) for text in texts]), expected, **TOLERANCE)

    convert(ConvertConfig(from_="hf", path=str(directory), to="megatron", out=str(tmp_path / "ours")), lambda _: None)
    converted = build(parse(str(tmp_path / "ours"), "members[0]"), "converted", tiny_config())
    torch.testing.assert_close(converted.score(rollouts()), expected, **TOLERANCE)

    if trait not in ("chatml", "llama3", "none"):
        return  # what is exported does not hang on the other traits
    convert(
        ConvertConfig(from_="megatron", path=str(tmp_path / "ours"), to="hf", out=str(tmp_path / "again")),
        lambda _: None,
    )
    torch.testing.assert_close(of_transformers(tmp_path / "again"), expected, **TOLERANCE)
    again = HFReward.load("again", tmp_path / "again", tiny_config())
    torch.testing.assert_close(again.score(rollouts()), expected, **TOLERANCE)
    card = (tmp_path / "again" / "README.md").read_text()
    assert ("finished conversations" in card) == (template is not None)


def test_a_checkpoint_without_a_rule_keeps_the_old_one_and_says_so_once(
    single: Runtime, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    directory = saved(tmp_path / "hf", "opens_think")
    convert(ConvertConfig(from_="hf", path=str(directory), to="megatron", out=str(tmp_path / "ours")), lambda _: None)
    place = tmp_path / "ours" / "meta.json"
    meta = json.loads(place.read_text())
    assert meta.pop(KEY) == {"at": "conversation", "date": "2024-07-26"}
    old = HFTokenizer(tmp_path / "ours" / "tokenizer", ReadingRule(at=ANSWER))
    place.write_text(json.dumps({**meta, "tokenizer": old.fingerprint}))  # as it was written before rules were stored
    warn_old_rule.cache_clear()
    with caplog.at_level(logging.WARNING):
        members = [build(parse(str(tmp_path / "ours"), "members[0]"), "old", tiny_config()) for _ in range(2)]
    assert caplog.text.count("stores no reading rule") == 1
    tokenizer = AutoTokenizer.from_pretrained(directory)
    rows = []
    for answer in ANSWERS:
        text = tokenizer.apply_chat_template(conversation(answer)[:-1], add_generation_prompt=True, tokenize=False)
        ids = tokenizer(text, add_special_tokens=False).input_ids
        rows.append([*ids, *tokenizer(answer, add_special_tokens=False).input_ids, 2])
    expected = HFReward.load("hf", directory, tiny_config()).score_tokens(rows)
    torch.testing.assert_close(members[0].score(rollouts()), expected, **TOLERANCE)

    # the tokenizer of the run will do where the checkpoint names none, read by the checkpoint's rule
    named = parse(str(tmp_path / "nowhere"), "members[0]")
    silent = member_tokenizer(named, {"tokenizer": old.fingerprint}, HFTokenizer(directory))
    assert silent.encode_conversation(conversation("x")[:-1], "x")[-1] == 2

    # exported, the old rule travels with it
    convert(
        ConvertConfig(from_="megatron", path=str(tmp_path / "ours"), to="hf", out=str(tmp_path / "again")),
        lambda _: None,
    )
    exported = HFReward.load("again", tmp_path / "again", tiny_config())
    torch.testing.assert_close(exported.score(rollouts()), expected, **TOLERANCE)
    assert "end right after the answer's end token" in (tmp_path / "again" / "README.md").read_text()


@pytest.mark.parametrize("rule", [{"at": "somewhere"}, {"date": "yesterday"}, {"place": 1}, "conversation"])
def test_a_rule_of_another_version_is_refused(single: Runtime, tmp_path: Path, rule: object) -> None:
    directory = saved(tmp_path / "hf", "chatml")
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps({**config, "nemo_advrm": rule}))
    with pytest.raises(CheckpointError, match=r"config\.json: .* is not a known reading rule"):
        HFReward.load("x", directory, tiny_config())
