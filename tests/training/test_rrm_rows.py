"""augmentation.method=rrm in a training: every mode and loss, the filter, and the branch of a pipeline."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tiny import TOKENIZER, tiny_config

from nemo_advrm.config import load_config
from nemo_advrm.config.schema import BranchConfig, Config
from nemo_advrm.data.encoding import EncodedPair, encode_pairs
from nemo_advrm.data.messages import Message
from nemo_advrm.data.preference_rows import PreferencePair
from nemo_advrm.engine.runtime import Runtime
from nemo_advrm.errors import ConfigError, DataError
from nemo_advrm.models.reward_model import RewardModel
from nemo_advrm.pipeline import dag, rounds
from nemo_advrm.pipeline.dag import Step
from nemo_advrm.run_directory import run_files
from nemo_advrm.synthetic.language import NOUNS, WORDS
from nemo_advrm.training import reward_model_training
from nemo_advrm.training.callbacks.augmentation import AdversarialAugmentation
from nemo_advrm.training.reward_model_training import EncodedPreferences, train_reward_model
from nemo_advrm.training.rrm_rows import rrm_rows

NAMES = [WORDS[noun] for noun in NOUNS[:6]]
ROWS = [
    PreferencePair(
        (Message(role="user", content=f"this {name}"),), f"this {name} sleeps .", f"{name} um", 1.0, source=f"f:{i}"
    )
    for i, name in enumerate(NAMES)
]
TRAIN = encode_pairs(ROWS, TOKENIZER, 64)[0]


def likes_the_prompt(prompts: list[Any], responses: list[str], ended: list[bool]) -> list[float]:
    """90 for an answer that names what the prompt names, else its length: a tie only between equal lengths."""
    names = [prompt[-1]["content"].split()[-1] for prompt in prompts]
    return [90.0 if name in text else float(len(text)) for name, text in zip(names, responses, strict=True)]


def config(**options: Any) -> Config:
    cfg = tiny_config()
    cfg.augmentation = replace(cfg.augmentation, method="rrm", rrm_share=1.0, **options)
    cfg.exp_manager.create_tensorboard_logger = False
    return cfg


def test_without_a_filter_all_pairs_are_added_with_their_ties(single: Runtime) -> None:
    made = rrm_rows(config(weight=0.25), TOKENIZER, TRAIN, 0, "rm")
    assert len(made) == 14 * 6 and sum(pair.tied for pair in made) == 6 * 6
    assert {pair.weight for pair in made} == {0.25}


def test_the_filter_keeps_what_its_reward_model_does_not_judge_like_the_label(
    single: Runtime, capsys: pytest.CaptureFixture[str]
) -> None:
    cfg = config(rrm_filter="python:test_rrm_rows:likes_the_prompt")
    made = rrm_rows(cfg, TOKENIZER, TRAIN, 0, "rm")
    assert (
        f"rm: {len(made)} of 84 RRM pairs pass the filter of python:test_rrm_rows:likes_the_prompt"
        in capsys.readouterr().out
    )
    for pair in made:
        assert pair.row is not None
        (chosen, rejected) = likes_the_prompt([pair.row.prompt] * 2, [pair.row.chosen, pair.row.rejected], [True] * 2)
        probability = torch.tensor(chosen - rejected).sigmoid().item()
        assert abs(probability - (0.5 if pair.tied else 1.0)) >= 0.2
    assert 10 < len(made) < 36 and all(pair.tied for pair in made), "it is right on all non-contextual pairs"


def test_a_filter_that_leaves_nothing_is_an_error(single: Runtime) -> None:
    cfg = config(rrm_filter="python:test_rrm_rows:likes_the_prompt", rrm_threshold=1.0)
    with pytest.raises(DataError, match=r"augmentation\.rrm_filter=.* judges all 84 RRM pairs like their labels"):
        rrm_rows(cfg, TOKENIZER, TRAIN, 0, "rm")


def test_a_loss_of_labels_is_refused_before_anything_starts() -> None:
    with pytest.raises(ConfigError, match=r"reward_model\.loss=regression: .*augmentation\.method=rrm"):
        load_config(["augmentation.method=rrm", "reward_model.loss=regression"])


@pytest.mark.parametrize(("mode", "loss"), [("append", "bt"), ("mix", "margin_bt"), ("on_top", "scaled_bt")])
def test_a_training_sees_the_pairs_in_every_mode(
    mode: str, loss: str, single: Runtime, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cfg = config(mode=mode, ratio=0.5, pairs_per_step=4)
    cfg.reward_model.loss, cfg.trainer.max_steps = loss, 3
    seen: list[list[EncodedPair]] = []
    train_on = RewardModel.train_on

    def recording(self: RewardModel, batch: list[EncodedPair], step: int) -> dict[str, float]:
        seen.append(batch)
        return train_on(self, batch, step)

    monkeypatch.setattr(RewardModel, "train_on", recording)
    data = EncodedPreferences(TRAIN, TRAIN, [])
    train_reward_model(cfg, TOKENIZER, tmp_path, data, 0, "rm", "")
    assert len(seen) == 3
    counts = [sum("RRM" in pair.source for pair in batch) for batch in seen]
    expected = {"append": None, "mix": [4] * 3, "on_top": [4] * 3}[mode]
    assert counts == expected if expected else sum(counts) > 12  # 84 of 90 rows are RRM's
    assert [len(batch) for batch in seen] == [8 + 4 * (mode == "on_top")] * 3


def test_ties_count_in_the_loss_and_not_in_the_accuracy(single: Runtime) -> None:
    cfg = tiny_config()
    module = RewardModel(cfg, TOKENIZER, TRAIN, [])
    tied = [replace(pair, tied=True) for pair in TRAIN]
    metrics = {}
    for name, rows in (("plain", TRAIN), ("both", [*TRAIN, *tied]), ("ties", tied)):
        module.validation_step(rows, 0)
        module.log_dict = lambda *args, **kwargs: None  # type: ignore[assignment]
        module.on_validation_epoch_end()
        metrics[name] = module.validation_metrics
    assert metrics["both"]["val/accuracy"] == metrics["plain"]["val/accuracy"]
    assert metrics["both"]["val/margin"] == pytest.approx(metrics["plain"]["val/margin"])
    mean = (metrics["plain"]["val/loss"] + metrics["ties"]["val/loss"]) / 2
    assert metrics["both"]["val/loss"] == pytest.approx(mean) != metrics["plain"]["val/loss"]


def test_a_restart_with_other_rrm_pairs_is_refused() -> None:
    made = encode_pairs([replace(ROWS[0], tied=True)], TOKENIZER, 64)[0]
    first = AdversarialAugmentation([], TOKENIZER, 0.5, 64, made=made)
    at: Any = SimpleNamespace(global_step=0)
    first.on_train_start(at, None)  # type: ignore[arg-type]
    assert all(pair is made[0] for pair in first.mix(0, TRAIN[:2]) if pair.tied)
    for other, refused in ((made, False), (encode_pairs([ROWS[1]], TOKENIZER, 64)[0], True)):
        again = AdversarialAugmentation([], TOKENIZER, 0.5, 64, made=other)
        again.load_state_dict(first.state_dict())
        if refused:
            with pytest.raises(ConfigError, match=r"augmentation\.method=rrm: the pairs .* were changed"):
                again.on_train_start(at, None)  # type: ignore[arg-type]
        else:
            again.on_train_start(at, None)  # type: ignore[arg-type]


@pytest.mark.parametrize("member", ["{}", "hf:{}", "{}?reference_features=off"])
def test_the_files_of_the_filter_belong_to_what_a_run_reads(member: str, tmp_path: Path) -> None:
    (tmp_path / "weights").write_text("1")
    cfg = config(rrm_filter=member.format(tmp_path))
    before = run_files.inputs(cfg)
    (tmp_path / "weights").write_text("2")
    assert list(before) == [str(tmp_path)] and run_files.inputs(cfg) != before


def test_the_branch_rrm_needs_no_attack_and_filters_by_its_member_of_the_round_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cfg = load_config(["experiment=study_rrm", f"run_dir={tmp_path}"])
    steps = {step.name: step for step in dag.order(cfg)}
    name = "branches/rrm/round_1/rm_1"
    assert steps[name].after == ("round_0/rm_1",)
    assert [step for step in steps if step.startswith("branches/rrm/")] == [name]
    assert steps["rlhf/rrm/seed_1"].after[0] == name
    calls: list[Config] = []
    monkeypatch.setattr(rounds, "train_reward_model", lambda cfg, *rest, **options: calls.append(cfg))
    monkeypatch.setattr(reward_model_training, "keep_back", lambda cfg, data: data)
    inputs: Any = SimpleNamespace(tokenizer=TOKENIZER, preferences=lambda member: EncodedPreferences([], [], []))
    rounds.Rounds(cfg, None, inputs).do(steps[name])  # type: ignore[arg-type]
    rounds.Rounds(cfg, None, inputs).do(Step("round_0/rm_1", "train_rm", round=0, member=1))  # type: ignore[arg-type]
    hardened, plain = (call.augmentation for call in calls)
    assert (hardened.method, hardened.pairs_path, hardened.rrm_share) == ("rrm", "", 0.05)
    assert hardened.rrm_filter == f"{tmp_path}/round_0/rm_1/model?reference_features=off"
    assert (plain.method, plain.rrm_filter) == ("pairs", "")


def test_a_branch_of_rrm_with_a_loss_of_labels_is_refused() -> None:
    cfg = Config()
    cfg.reward_model.loss, cfg.pipeline.branches = "regression", {"rrm": BranchConfig(pairs="rrm")}
    with pytest.raises(ConfigError, match=r"pipeline\.branches\.rrm\.pairs=rrm: .*regression"):
        dag.check(cfg)
