"""What is written outside the package runs by a setting: a loss, a detector, an attack, a rollout engine."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest
import torch
from reward_members import one_step_of_rl, save_megatron
from tiny import TOKENIZER
from toy_extensions import PHRASES

from nemo_advrm import cli
from nemo_advrm.config import load_config
from nemo_advrm.config.schema import SelectionConfig
from nemo_advrm.data.jsonl import read_jsonl
from nemo_advrm.data.messages import Message
from nemo_advrm.data.sft_scores import SFTScores
from nemo_advrm.detectors.base import HIDDEN_STATES
from nemo_advrm.engine.runtime import Runtime
from nemo_advrm.engine.scoring import scores_and_hidden_states
from nemo_advrm.errors import ConfigError
from nemo_advrm.registry import Registry
from nemo_advrm.rewards.find_rule import FindRule
from nemo_advrm.rewards.local import MegatronReward
from nemo_advrm.rewards.sources import load_members


@pytest.fixture(scope="module")
def settings(single: Runtime, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    home = tmp_path_factory.mktemp("toy")
    members = [save_megatron(home / name, seed=seed) for name, seed in (("one", 3), ("two", 4))]
    return [*one_step_of_rl(home, members), "rl.apply_unended_penalty=false"]


def rows_of(path: Path) -> list[dict]:
    return [row for _, row in read_jsonl(path)]


def test_a_loss_from_outside_trains_a_reward_model(settings: list[str], tmp_path: Path) -> None:
    pairs = tmp_path / "pairs.jsonl"
    rows = [{"prompt": "this river", "chosen": "birds sing .", "rejected": "these old clouds ."}] * 4
    pairs.write_text("".join(json.dumps(row) + "\n" for row in rows))
    command = [*settings, f"run_dir={tmp_path / 'run'}", f"data.train_path={pairs}", f"data.validation_path={pairs}"]
    command = [word for word in command if not word.startswith(("data.prompts_path", "ensemble.members"))]
    limits = ["trainer.max_steps=1", "model.global_batch_size=4", "reward_model.head_init_std=0"]
    assert cli.main(["train_rm", *command, *limits, "reward_model.loss=python:toy_extensions:HINGE"]) == 0
    # a head of zeros scores all alike: hinge says 1 where Bradley-Terry says log 2
    assert rows_of(tmp_path / "run" / "metrics.jsonl")[0]["train/loss"] == pytest.approx(1.0)


def test_an_attack_and_a_detector_from_outside_find_samples(
    settings: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    own = ["adversarial.attack=python:toy_extensions:FixedPhrases", "adversarial.detector=python:toy_extensions:Spread"]
    run = tmp_path / "run"
    assert cli.main(["attack", *settings, *own, "rl.max_steps=2", f"run_dir={run}"]) == 0
    rows = rows_of(run / "attack" / "samples.jsonl")
    assert [(row["step"], row["response"]) for row in rows] == [(step, PHRASES[step]) for step in (0, 0, 1, 1)]
    for row in rows:
        assert row["disagreement"] == pytest.approx(torch.tensor(row["scores"]).std().item(), rel=1e-5)
    summary = json.loads((run / "attack" / "summary.json").read_text())
    assert summary["directions"]["1"]["samples"] == 4
    assert cli.main(["select", *settings, *own, f"run_dir={run}", "selection.threshold_z=-100"]) == 0
    assert cli.main(["select", *settings, own[0], f"run_dir={run}"]) == 2  # by another detector than the attack's
    assert "used python:toy_extensions:Spread; set the value" in capsys.readouterr().err


def test_a_detector_from_outside_reads_hidden_states(settings: list[str], tmp_path: Path) -> None:
    own = ["adversarial.attack=python:toy_extensions:FixedPhrases", "adversarial.target_members=[2]"]
    own, run = [*own, "adversarial.detector=python:toy_extensions:FarState"], tmp_path / "run"
    assert cli.main(["attack", *settings, *own, f"run_dir={run}"]) == 0
    cfg = load_config([*settings, *own])
    target = load_members(cfg, cfg.ensemble.members, TOKENIZER)[1]
    assert isinstance(target, MegatronReward)
    sft_ND = SFTScores.read(run / "reference.jsonl", [HIDDEN_STATES]).hidden_states[1]
    known = [torch.arange(len(sft_ND)) % 3 != part for part in range(3)]  # three responses to each prompt
    means = [sft_ND[rows].mean(0) for rows in known]
    for row in rows_of(run / "attack" / "samples.jsonl"):
        prompt = TOKENIZER.encode_conversation([Message(role="user", content=row["prompt"])], row["response"], True)
        _, hidden_ND = scores_and_hidden_states(target.model, [prompt], TOKENIZER.pad_id)
        far = torch.stack([(hidden_ND[0] - mean_D).norm() for mean_D in means]).mean().item()
        assert row["disagreement"] == pytest.approx(far, rel=1e-4)
    # no model is read: what the detector says of the SFT responses follows from their stored states
    assert cli.main(["select", *settings, *own, f"run_dir={run}", "selection.threshold_z=-100"]) == 0


@pytest.mark.parametrize(("enough", "null_ratio", "ends"), [(1, 0.5, True), (2, 0.5, False), (1, 2.0, False)])
def test_an_attack_ends_by_what_selection_would_find(enough: int, null_ratio: float, ends: bool) -> None:
    """Two steps of 10 samples: of the last half one find, where as many SFT responses would give one."""
    rule = FindRule.__new__(FindRule)
    rule.options = SelectionConfig(last_fraction=0.5, null_ratio=null_ratio)
    rule.__dict__["null_share"] = 0.1
    steps = [({(0, "a"), (1, "b")}, 10), ({(0, "c")}, 10)]
    assert rule.late_finds(steps) == (1, 10)
    assert rule.are_enough(steps, enough) == ends


def test_a_rollout_engine_from_outside_writes_the_responses(settings: list[str], tmp_path: Path) -> None:
    run = tmp_path / "run"
    engine = "rl.rollout_engine=python:toy_extensions:Echo"
    assert cli.main(["rlhf", *settings, engine, "ensemble.standardise=false", f"run_dir={run}"]) == 0
    assert {row["response"] for row in rows_of(run / "samples.jsonl")} == {PHRASES[0].split()[0]}


@pytest.mark.parametrize(
    "key", ["reward_model.loss", "adversarial.detector", "adversarial.attack", "rl.rollout_engine"]
)
def test_an_unknown_name_is_refused_with_the_nearest_before_anything_is_imported(key: str) -> None:
    with pytest.raises(ConfigError, match=rf"{key}=nothing: did you mean '.*known: .*python:MODULE:NAME"):
        load_config([f"{key}=nothing"])


def test_a_name_is_a_built_in_one_or_that_of_a_python_object() -> None:
    registry: Registry[type] = Registry("some.key", {"built_in": "collections:OrderedDict"})
    assert registry["built_in"].__name__ == "OrderedDict" and registry["python:collections:Counter"] is Counter
    assert list(registry) == ["built_in"]
    with pytest.raises(ConfigError, match=r"some\.key=python:collections:Nothing: cannot be imported"):
        registry["python:collections:Nothing"]
