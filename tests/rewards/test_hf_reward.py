"""A Hugging Face reward model as a member: the classifier's own score of each row, whatever is beside it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from reward_members import rollouts, save_hf_reward
from safetensors.torch import load_file, save_file
from tiny import tiny_config
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from nemo_advrm.engine.runtime import Runtime
from nemo_advrm.errors import CheckpointError, RewardSourceError
from nemo_advrm.rewards.hf import HFReward


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_hf_reward(tmp_path_factory.mktemp("hf"))


@pytest.fixture(scope="module")
def member(single: Runtime, directory: Path) -> HFReward:
    return HFReward.load("judge", directory, tiny_config())


def _own_scores(directory: Path) -> torch.Tensor:
    """transformers alone: one finished conversation at a time, rendered by its template, without any padding."""
    model = AutoModelForSequenceClassification.from_pretrained(directory).eval()
    model.config.pad_token_id = None
    tokenizer = AutoTokenizer.from_pretrained(directory)
    scores, data = [], rollouts()
    for prompt, response, ended in zip(data.prompts, data.responses, data.ended, strict=True):
        conversation = [*prompt, {"role": "assistant", "content": response}]
        ids = tokenizer.apply_chat_template(conversation, continue_final_message=not ended, return_dict=False)
        with torch.no_grad():
            scores.append(model(torch.tensor([ids])).logits.squeeze())
    return torch.stack(scores)


def test_scores_are_the_classifiers_own_though_padding_is_the_end_token(member: HFReward, directory: Path) -> None:
    torch.testing.assert_close(member.score(rollouts()), _own_scores(directory), atol=1e-5, rtol=0)


def test_a_row_scores_the_same_alone_and_in_any_batch(member: HFReward) -> None:
    rows = [[5 + i, *range(3, 3 + 4 * i)] for i in range(6)]
    together = member.score_tokens(rows)
    torch.testing.assert_close(torch.cat([member.score_tokens([row]) for row in rows]), together, atol=1e-5, rtol=0)
    torch.testing.assert_close(member.score_tokens(rows[::-1]).flip(0), together, atol=1e-5, rtol=0)


def test_a_row_that_ends_in_padding_tokens_is_read_at_its_own_end(member: HFReward) -> None:
    pad = member.tokenizer.pad_id
    alone, beside = member.score_tokens([[7, 8, pad, pad]]), member.score_tokens([[7, 8, pad, pad], [7] * 30])
    torch.testing.assert_close(beside[:1], alone, atol=1e-5, rtol=0)
    assert abs(alone - member.score_tokens([[7, 8]])) > 1e-4


def test_a_tokenizer_without_a_template_gets_the_plain_rendering(single: Runtime, tmp_path: Path) -> None:
    plain = HFReward.load("plain", save_hf_reward(tmp_path / "rm", template=None), tiny_config())
    text = "User:\nthis river\n\nAssistant:\nbirds sing ."
    ids = [*plain.tokenizer.encode(text), plain.tokenizer.eos_id]
    data = rollouts()
    data.prompts, data.responses = data.prompts[:1], data.responses[:1]
    data.ended, data.prompt_tokens, data.response_tokens = data.ended[:1], [[1]], [[2]]
    torch.testing.assert_close(plain.score(data), plain.score_tokens([ids]))


def test_a_response_beyond_the_models_positions_is_an_error_by_name(member: HFReward) -> None:
    with pytest.raises(RewardSourceError, match="judge: a response has 129 tokens"):
        member.score_tokens([[5] * 129])


def test_a_head_that_is_missing_is_not_drawn_at_random(single: Runtime, directory: Path, tmp_path: Path) -> None:
    path = save_hf_reward(tmp_path / "rm")
    weights = load_file(path / "model.safetensors")
    weights.pop("score.weight")
    save_file(weights, path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"have no score\.weight"):
        HFReward.load("x", path, tiny_config())


def test_damaged_weights_are_one_clear_error(single: Runtime, tmp_path: Path) -> None:
    path = save_hf_reward(tmp_path / "rm")
    whole = (path / "model.safetensors").read_bytes()
    (path / "model.safetensors").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(CheckpointError, match="not a complete safetensors file"):
        HFReward.load("x", path, tiny_config())
