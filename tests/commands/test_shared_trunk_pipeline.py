"""``ensemble.share=trunk`` in commands and the pipeline: one training a round, and members addressed as its heads."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from tiny import TOKENIZER, pairs, tiny_config

from nemo_advrm.config.schema import BranchConfig, Config, RLHFRunConfig
from nemo_advrm.errors import ConfigError
from nemo_advrm.pipeline import branches, rounds
from nemo_advrm.pipeline.dag import Step, order
from nemo_advrm.training.reward_model_training import EncodedPreferences


def _config(heads: int) -> Config:
    cfg = tiny_config()
    cfg.ensemble.share, cfg.ensemble.size = "trunk", heads
    return cfg


def test_a_round_trains_one_model_for_all_members() -> None:
    cfg = _config(5)
    cfg.pipeline.rounds = 1
    cfg.pipeline.rlhf = {"r1": RLHFRunConfig(reward="r1"), "lcb": RLHFRunConfig(reward="ensemble")}
    steps = {step.name: step for step in order(cfg)}
    assert [name for name, step in steps.items() if step.kind == "train_rm"] == ["round_0/rm", "round_1/rm"]
    assert steps["round_0/reference"].after == ("round_0/rm",)
    assert steps["round_1/rm"].after == ("round_0/select",)
    assert "round_0/rm" in steps["rlhf/r1"].after and "round_0/rm" in steps["rlhf/lcb"].after
    assert branches.member_models(cfg, "", 1) == [f"round_1/rm/model?head={k}" for k in range(1, 6)]
    cfg.ensemble.share, cfg.ensemble.size = "none", 2
    assert branches.member_models(cfg, "", 1) == ["round_1/rm_1/model", "round_1/rm_2/model"]


@pytest.mark.parametrize(
    ("options", "message"), [(BranchConfig(own_trunk=True), "own_trunk=true"), (BranchConfig(pairs="rrm"), "pairs=rrm")]
)
def test_a_branch_that_needs_single_models_is_refused(options: BranchConfig, message: str) -> None:
    cfg = _config(2)
    cfg.pipeline.sft, cfg.pipeline.branches = True, {"other": options}
    with pytest.raises(ConfigError, match=rf"pipeline\.branches\.other\.{message}: is not possible for members on one"):
        branches.check(cfg)


def test_hardening_goes_on_from_the_trunk_of_the_round_before_with_rows_of_all_members(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cfg = _config(2)
    cfg.run_dir, cfg.pipeline.rounds, cfg.pipeline.sft = str(tmp_path), 1, False
    cfg.augmentation.warm_steps = 4
    own = {k: EncodedPreferences(pairs(3, seed=k), [], []) for k in (1, 2)}
    inputs: Any = SimpleNamespace(tokenizer=TOKENIZER, preferences=own.__getitem__)
    calls: list[tuple[Any, ...]] = []
    monkeypatch.setattr(rounds, "train_reward_model", lambda *arguments, **options: calls.append(arguments))
    state: Any = None
    rounds.Rounds(cfg, state, inputs).do(Step("round_1/rm", "train_rm", round=1, member=1))
    ((trained, _, directory, data, *_, start),) = calls
    assert (directory, start) == (tmp_path / "round_1" / "rm", str(tmp_path / "round_0" / "rm" / "model"))
    assert [row.head_weights for row in data.train] == [(2.0, 0.0)] * 3 + [(0.0, 2.0)] * 3
    assert trained.augmentation.pairs_path == str(tmp_path / "round_0" / "pairs.jsonl")
