"""A Megatron reward model as a source: policies of the same tokenizer are scored by tokens, others by text."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tiny import TOKENIZER, VOCABULARY, tiny_config

from nemo_advrm.engine import checkpoint
from nemo_advrm.engine.model import build_model
from nemo_advrm.engine.runtime import Runtime
from nemo_advrm.engine.scoring import score_sequences
from nemo_advrm.errors import CheckpointError
from nemo_advrm.rewards.local import MegatronReward
from nemo_advrm.rewards.sources import build, parse
from nemo_advrm.rollouts.types import Rollouts


@pytest.fixture(scope="module")
def source(single: Runtime, tmp_path_factory: pytest.TempPathFactory) -> MegatronReward:
    cfg = tiny_config()
    path = tmp_path_factory.mktemp("rm") / "model"
    model = build_model(cfg.model, cfg.precision, "reward", VOCABULARY, seed=3, trainable=False, head_init_std=0.3)
    checkpoint.save(path, model)
    source = build(parse(str(path), "member"), "first", cfg, TOKENIZER)
    assert isinstance(source, MegatronReward)
    return source


def _rollouts() -> Rollouts:
    prompt = ({"role": "user", "content": "this river"},)
    return Rollouts(
        prompts=[prompt, prompt],
        responses=["birds sing .", "birds sing"],
        ended=[True, False],
        prompt_tokens=[TOKENIZER.encode_prompt(prompt)] * 2,
        response_tokens=[TOKENIZER.encode_response("birds sing ."), TOKENIZER.encode("birds sing")],
        prompt_index=[0, 0],
        fingerprint=TOKENIZER.fingerprint,
    )


def test_a_loaded_reward_model_is_frozen_and_scores(source: MegatronReward) -> None:
    assert not any(p.requires_grad for p in source.model.parts[0].parameters())
    scores = source.score(_rollouts())
    assert scores.shape == (2,) and scores.dtype == torch.float32 and scores[0] != scores[1]


def test_text_of_another_tokenizer_scores_like_the_same_tokens(source: MegatronReward) -> None:
    rollouts = _rollouts()
    elsewhere = replace(rollouts, fingerprint="another", prompt_tokens=[[1], [2]], response_tokens=[[3], [4]])
    torch.testing.assert_close(source.score(elsewhere), source.score(rollouts))
    prompt = rollouts.prompt_tokens[0]
    sequences = [prompt + TOKENIZER.encode_response("birds sing ."), prompt + TOKENIZER.encode("birds sing")]
    torch.testing.assert_close(score_sequences(source.model, sequences, 0), source.score(rollouts))


def test_a_language_model_is_not_taken_for_a_reward_model(source: MegatronReward, tmp_path: Path) -> None:
    cfg = tiny_config()
    checkpoint.save(tmp_path / "lm", build_model(cfg.model, cfg.precision, "lm", VOCABULARY, seed=3, trainable=False))
    with pytest.raises(CheckpointError, match="lm"):
        build(parse(str(tmp_path / "lm"), "member"), "first", cfg, TOKENIZER)


def test_scores_are_finite(source: MegatronReward) -> None:
    assert all(math.isfinite(x) for x in source.score(_rollouts()).tolist())
