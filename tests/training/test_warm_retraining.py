"""Warm retraining: on from the model of the round before, by its own steps and rate, with pairs or without."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from augmentation_jobs import store_of
from reward_members import save_megatron
from tiny import TOKENIZER, pairs, tiny_config

from nemo_advrm.config.schema import Config
from nemo_advrm.engine.runtime import Runtime
from nemo_advrm.errors import ConfigError
from nemo_advrm.models.reward_model import RewardModel
from nemo_advrm.pipeline import rounds
from nemo_advrm.pipeline.dag import Step
from nemo_advrm.training import reward_model_training
from nemo_advrm.training.reward_model_training import EncodedPreferences, train_reward_model, warm


def test_steps_and_rate_are_those_of_warm_retraining() -> None:
    cfg = tiny_config()
    cfg.augmentation.warm_steps = 4
    found = warm(cfg)
    assert (found.trainer.max_steps, found.model.optim.lr) == (4, cfg.model.optim.lr)
    cfg.augmentation.warm_lr = 0.25
    assert warm(cfg).model.optim.lr == 0.25
    assert (cfg.trainer.max_steps, cfg.model.optim.lr) == (1000, 1e-3), "the configuration itself is left alone"
    cfg.augmentation.warm_steps = 0
    with pytest.raises(ConfigError, match=r"augmentation\.warm_steps=0: a warm retraining needs at least 1 step"):
        warm(cfg)


@pytest.mark.parametrize("warm_steps", [0, 4])
def test_a_member_is_trained_with_the_configured_pairs_and_those_of_all_rounds_before(
    warm_steps: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cfg = tiny_config()
    cfg.run_dir, cfg.pipeline.rounds, cfg.pipeline.sft = str(tmp_path), 3, False
    cfg.augmentation.pairs_path, cfg.augmentation.warm_steps = "others.jsonl", warm_steps
    data = EncodedPreferences([], [], [])
    inputs: Any = SimpleNamespace(tokenizer=TOKENIZER, preferences=lambda member: data)
    state: Any = None
    calls: list[tuple[Config, str]] = []

    def trained(cfg: Config, *rest: Any, hybrid: bool) -> None:
        calls.append((cfg, rest[-1]))

    monkeypatch.setattr(rounds, "train_reward_model", trained)
    monkeypatch.setattr(reward_model_training, "keep_back", lambda cfg, data: data)
    steps = rounds.Rounds(cfg, state, inputs)
    for number in (0, 2):
        steps.do(Step(f"round_{number}/rm_1", "train_rm", round=number, member=1))
    (first, _), (last, start) = calls
    assert first.augmentation.pairs_path == "others.jsonl"
    stores = [f"{tmp_path}/round_{number}/pairs.jsonl" for number in (0, 1)]
    assert last.augmentation.pairs_path == ",".join(["others.jsonl", *stores])
    assert last.trainer.max_steps == (warm_steps or cfg.trainer.max_steps)
    assert start == (f"{tmp_path}/round_1/rm_1/model" if warm_steps else "")
    assert cfg.augmentation.pairs_path == "others.jsonl"


@pytest.mark.parametrize(("warm_steps", "expected"), [(0, [9, 5, 9, 5]), (4, [9, 5, 4, 4])])
def test_other_members_may_have_fewer_steps_where_they_are_trained_from_the_policy(
    warm_steps: int, expected: list[int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cfg = tiny_config()
    cfg.run_dir, cfg.pipeline.sft, cfg.trainer.max_steps = str(tmp_path), False, 9
    cfg.pipeline.other_member_steps, cfg.augmentation.warm_steps = 5, warm_steps
    inputs: Any = SimpleNamespace(tokenizer=TOKENIZER, preferences=lambda member: EncodedPreferences([], [], []))
    state: Any = None
    steps: list[int] = []
    monkeypatch.setattr(rounds, "train_reward_model", lambda cfg, *_, **__: steps.append(cfg.trainer.max_steps))
    monkeypatch.setattr(reward_model_training, "keep_back", lambda cfg, data: data)
    made = rounds.Rounds(cfg, state, inputs)
    for number, member in ((0, 1), (0, 2), (1, 1), (1, 2)):
        made.do(Step(f"round_{number}/rm_{member}", "train_rm", round=number, member=member))
    assert steps == expected and cfg.trainer.max_steps == 9


def test_with_and_without_pairs_a_member_goes_on_from_the_same_weights_on_the_same_batches(
    single: Runtime, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    previous = save_megatron(tmp_path / "previous", seed=3)
    store = store_of(tmp_path / "pairs.jsonl", 6)
    cfg = tiny_config()
    cfg.exp_manager.create_tensorboard_logger = False
    cfg.augmentation.warm_steps, cfg.augmentation.warm_lr = 3, 0.01
    cfg.augmentation.mode, cfg.augmentation.pairs_per_step = "on_top", 4
    data = EncodedPreferences(pairs(20), pairs(8, seed=1), [])
    seen: list[list[str]] = []
    train_on = RewardModel.train_on

    def recording(self: RewardModel, batch: list[Any], step: int) -> dict[str, float]:
        seen.append([row.source for row in batch])
        return train_on(self, batch, step)

    monkeypatch.setattr(RewardModel, "train_on", recording)
    results = {}
    for name, stores in (("pairs", str(store)), ("control", "")):
        cfg.augmentation.pairs_path = stores
        train_reward_model(warm(cfg), TOKENIZER, tmp_path / name, data, 5, name, str(previous))
        results[name] = [json.loads(line) for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
    with_pairs, control = seen[:3], seen[3:]
    assert [len(batch) for batch in with_pairs] == [12] * 3 and [len(batch) for batch in control] == [8] * 3
    assert [[s for s in batch if not s.startswith(str(store))] for batch in with_pairs] == control
    for rows in results.values():
        assert [row["learning_rate"] for row in rows if "learning_rate" in row] == [0.01] * 3
    # the previous model is where the control starts: its loss on the first batch is that of the saved weights
    fresh = RewardModel(warm(cfg), TOKENIZER, data.train, data.validation, str(previous), seed=5)
    first = train_on(fresh, next(fresh.steps(0)), 0)["train/loss"]
    assert results["control"][0]["train/loss"] == pytest.approx(first, rel=1e-6)
