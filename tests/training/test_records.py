"""Callbacks that write files: metrics once per step over restarts, checkpoints of which the newest stay, rollouts."""

from __future__ import annotations

import json
import math
import pickle
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tiny import tiny_config

from nemo_advrm.data import jsonl
from nemo_advrm.data.sft_scores import SFTScores
from nemo_advrm.engine.runtime import Runtime
from nemo_advrm.errors import CheckpointError, DataError
from nemo_advrm.models.policy import PolicyModel
from nemo_advrm.rewards.detector_features import FeatureReader
from nemo_advrm.rewards.ensemble import RewardOutput
from nemo_advrm.rewards.local import FunctionReward
from nemo_advrm.rewards.sample_rows import score_sft_responses, trajectory_rows
from nemo_advrm.rollouts.types import Rollouts
from nemo_advrm.training.callbacks.metrics_writer import MetricsWriter
from nemo_advrm.training.callbacks.periodic_checkpoints import PeriodicCheckpoint, saved_steps
from nemo_advrm.training.callbacks.progress import StepProgress
from nemo_advrm.training.callbacks.rollout_records import OveroptimizationTracker, TrajectoryRecorder, prompt_text


def _rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def _write(path: Path, start: int, stop: int, first_step: int = 1, value: float = 0.0) -> None:
    """What a training from step ``start`` to ``stop`` writes."""
    writer: Any = MetricsWriter(path, first_step)
    writer.on_train_start(SimpleNamespace(global_step=start), None)
    for done in range(start + 1, stop + 1):
        writer.on_train_batch_end(
            SimpleNamespace(global_step=done), SimpleNamespace(step_metrics={"loss": value + done}), None, None, 0
        )
    writer.teardown(None, None, "fit")


@pytest.mark.parametrize("first_step", [0, 1])
def test_metrics_have_one_row_a_step_although_a_restart_repeats_steps(
    single: Runtime, tmp_path: Path, first_step: int
) -> None:
    path = tmp_path / "metrics.jsonl"
    _write(path, 0, 7, first_step)
    with path.open("a") as file:
        file.write('{"step": 8, "lo')  # the kill tore a line
    _write(path, 4, 9, first_step, value=100.0)  # from the checkpoint of step 4
    rows = _rows(path)
    assert [row["step"] for row in rows] == [i + first_step for i in range(9)]
    assert [row["loss"] for row in rows] == [1, 2, 3, 4, 105, 106, 107, 108, 109]


def test_a_training_from_the_start_begins_its_file_anew(single: Runtime, tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    _write(path, 0, 3)
    _write(path, 0, 2, value=100.0)
    assert [row["loss"] for row in _rows(path)] == [101, 102]


def test_validation_rows_bear_their_step_and_are_written_after_training_too(single: Runtime, tmp_path: Path) -> None:
    writer: Any = MetricsWriter(tmp_path / "metrics.jsonl")
    module = SimpleNamespace(step_metrics={"loss": 1.0}, validation_metrics={"val/loss": 0.5})
    writer.on_train_start(SimpleNamespace(global_step=0), module)
    writer.on_validation_end(SimpleNamespace(global_step=5), module)
    writer.on_train_batch_end(SimpleNamespace(global_step=6), module, None, None, 0)
    writer.teardown(None, None, "fit")
    for _ in range(2):  # the last one is not repeated
        writer.on_validation_end(SimpleNamespace(global_step=6), module)
        writer.teardown(None, None, "validate")
    rows = _rows(tmp_path / "metrics.jsonl")
    assert rows == [{"step": 5, "val/loss": 0.5}, {"step": 6, "loss": 1.0}, {"step": 6, "val/loss": 0.5}]


@pytest.mark.parametrize("first_step", [0, 1])
def test_a_kill_after_a_validation_does_not_double_its_row(single: Runtime, tmp_path: Path, first_step: int) -> None:
    path = tmp_path / "metrics.jsonl"
    module = SimpleNamespace(step_metrics={"loss": 1.0}, validation_metrics={"val/loss": 0.5})

    def train(start: int, stop: int) -> None:
        writer: Any = MetricsWriter(path, first_step)
        writer.on_train_start(SimpleNamespace(global_step=start), module)
        if start:
            writer.on_validation_end(SimpleNamespace(global_step=start), module)  # as Lightning does
        for done in range(start + 1, stop + 1):
            writer.on_train_batch_end(SimpleNamespace(global_step=done), module, None, None, 0)
            if done % 2 == 0:
                writer.on_validation_end(SimpleNamespace(global_step=done), module)
        writer.teardown(None, None, "fit")

    train(0, 4)
    train(2, 2)  # killed at once
    train(2, 4)
    rows = [(row["step"] - first_step + 1, "val/loss" in row) for row in _rows(path)]
    assert rows == [(1, False), (2, False), (2, True), (3, False), (4, False), (4, True)]
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join(lines[:2]))  # killed before the validation of step 2 was written: it is repeated
    train(2, 4)
    assert path.read_text() == "".join(lines)


class _Saving:
    """A trainer, and its strategy, of which only saving is used; in the background a save takes ``steps`` steps."""

    def __init__(self, steps: int = 0) -> None:
        self.global_step = 0
        self.steps = steps
        self.strategy = self
        self.saving: Any = None
        self.looked: list[int] = []
        self.waited: list[int] = []

    def save_checkpoint(self, path: Path, storage_options: str = "") -> None:
        if storage_options:
            self.saving = SimpleNamespace(path=path, due=self.global_step + self.steps)
        else:
            path.mkdir(parents=True)

    def end_saving(self, wait: bool) -> bool:
        if self.saving is None:
            return False
        (self.waited if wait else self.looked).append(self.global_step)
        if not wait and self.global_step < self.saving.due:
            return False
        self.saving.path.mkdir(parents=True)
        self.saving = None
        return True


def test_the_newest_checkpoints_stay(single: Runtime, tmp_path: Path) -> None:
    trainer: Any = _Saving()
    saver: Any = PeriodicCheckpoint(tmp_path, every=5, keep=2)
    (tmp_path / "step_00000099.partial").mkdir()  # a save that was killed
    (tmp_path / "notes").mkdir()
    for trainer.global_step in range(1, 31):
        saver.on_train_batch_end(trainer, SimpleNamespace(max_steps=30), None, None, 0)
    # not at step 30, the end: the result is saved by the stage
    assert [p.name for p in saved_steps(tmp_path)] == ["step_00000020", "step_00000025"]
    assert (tmp_path / "notes").is_dir()
    assert saved_steps(tmp_path / "nowhere") == []


@pytest.mark.parametrize(
    ("steps", "looked", "waited"), [(2, [4, 5, 7, 8, 10], []), (9, [4, 5, 6, 7, 8, 9, 10], [6, 9])]
)
def test_in_the_background_one_save_is_under_way_and_an_older_one_goes_when_it_is_complete(
    single: Runtime, tmp_path: Path, steps: int, looked: list[int], waited: list[int]
) -> None:
    trainer: Any = _Saving(steps)
    saver: Any = PeriodicCheckpoint(tmp_path, every=3, keep=1, in_background=True)
    kept = []
    for trainer.global_step in range(1, 11):
        saver.on_train_batch_end(trainer, SimpleNamespace(max_steps=10), None, None, 0)
        kept.append([p.name[-1] for p in saved_steps(tmp_path)])
        assert len(kept[-1]) <= 1
    saver.on_train_end(trainer, None)
    assert (trainer.looked, trainer.waited) == (looked, [*waited, 10])
    assert kept[3:9] == ([[], ["3"], ["3"], ["3"], ["6"], ["6"]] if steps == 2 else [[], [], *[["3"]] * 3, ["6"]])
    assert [p.name for p in saved_steps(tmp_path)] == ["step_00000009"]


def test_steps_are_ordered_as_numbers(tmp_path: Path) -> None:
    for name in ("step_00000009", "step_100000000", "step_00000100"):
        (tmp_path / name).mkdir()
    assert [p.name for p in saved_steps(tmp_path)] == ["step_00000009", "step_00000100", "step_100000000"]


@pytest.mark.parametrize("every", [0, 100])
def test_nothing_is_saved_when_it_is_turned_off_or_not_due(single: Runtime, tmp_path: Path, every: int) -> None:
    trainer: Any = _Saving()
    for trainer.global_step in range(1, 20):
        PeriodicCheckpoint(tmp_path, every, 2).on_train_batch_end(trainer, SimpleNamespace(max_steps=30), None, None, 0)  # type: ignore[arg-type]
    assert list(tmp_path.iterdir()) == []


def test_piped_progress_is_plain_lines_at_the_interval_and_at_the_end(
    single: Runtime, capsys: pytest.CaptureFixture[str]
) -> None:
    progress: Any = StepProgress("rm_1", every=4)
    progress.on_train_start(SimpleNamespace(global_step=0), None)
    for step in range(1, 7):
        module = SimpleNamespace(max_steps=6, step_metrics={"train/loss": 0.5, "gold": None, "secret": 1.0})
        progress.on_train_batch_end(SimpleNamespace(global_step=step), module, None, None, 0)
    lines = capsys.readouterr().out.splitlines()
    assert [line.rsplit("  ", 1)[0] for line in lines] == ["rm_1  step 4/6  loss 0.500", "rm_1  step 6/6  loss 0.500"]


class _Policy(PolicyModel):
    """Only what the recorders read."""

    def __init__(self) -> None:
        torch.nn.Module.__init__(self)
        prompt = ({"role": "user", "content": "p"},)
        self.last_rollouts = Rollouts(
            [prompt] * 3, ["x", "y", "z"], [True, True, False], [[5]] * 3, [[1], [6, 1], [7, 8]], [0, 1, 0], ""
        )
        zs = torch.tensor([[1.0, -1.0], [2.0, 0.0], [-1.0, 0.5]])
        details = {
            "z": zs,
            "disagreement": zs[:, 0] - zs[:, 1],
            "disagreement_z": zs[:, 0],
            "prompt_mean": torch.tensor([[0.0, 0.0], [2.5, 0.0], [0.0, 0.0]]),
        }
        self.last_reward_output = RewardOutput(torch.tensor([0.5, 0.6, -4.0]), zs, details)
        self.step_metrics = {"proxy": 0.0}
        self.max_steps = 10
        self.config = tiny_config()


def _gold() -> FunctionReward:
    values = {"x": -6.0, "y": 5.0, "z": 9.0}
    return FunctionReward("gold", lambda prompts, responses, ended: [values[r] for r in responses])


def test_the_trajectory_holds_every_response_and_the_share_of_successes(single: Runtime, tmp_path: Path) -> None:
    # gold of the SFT responses: means 0 and 6, deviations of +-1, so a fresh response's std is sqrt(4 / 2 * 3 / 2)
    std = math.sqrt(3)
    gold_PN = torch.tensor([[1.0, -1.0], [7.0, 5.0]])
    reference = SFTScores([(), ()], [["", ""]] * 2, torch.zeros(2, 2, 2), gold_PN)
    recorder: Any = TrajectoryRecorder(tmp_path / "samples.jsonl", 1, reference, _gold())
    module: Any = _Policy()
    recorder.on_train_start(SimpleNamespace(global_step=0), module)
    recorder.on_train_batch_end(SimpleNamespace(global_step=4), module, None, None, 0)
    recorder.teardown(None, None, "fit")
    rows = _rows(tmp_path / "samples.jsonl")
    assert [(r["step"], r["prompt_id"], r["response"], r["length"], r["ended"]) for r in rows] == [
        (3, 0, "x", 1, True),
        (3, 1, "y", 2, True),
        (3, 0, "z", 2, False),
    ]
    assert [(r["gold"], r["gold_z"], r["reward"]) for r in rows] == [
        (-6.0, pytest.approx(-6 / std), 0.5),
        (5.0, pytest.approx(-1 / std), pytest.approx(0.6)),
        (9.0, pytest.approx(9 / std), -4.0),
    ]
    assert rows[1]["z"] == [2.0, 0.0] and rows[1]["prompt"] == "p" and rows[1]["selected"] is False
    # x: R_1 = 1 > 0 and gold below; y: R_1 = 2 is not above 2.5; z: neither
    assert module.step_metrics["success"] == pytest.approx(1 / 3)
    assert module.step_metrics["success_strict"] == pytest.approx(1 / 3)
    assert module.step_metrics["gold"] == pytest.approx(8 / 3)


def test_the_tracker_adds_gold_at_its_interval_and_at_the_last_step(single: Runtime, tmp_path: Path) -> None:
    tracker: Any = OveroptimizationTracker(tmp_path / "samples.jsonl", _gold(), every=4, samples=2)
    seen = []
    module: Any = _Policy()
    tracker.on_train_start(SimpleNamespace(global_step=0), module)
    for done in range(1, 11):
        module.step_metrics = {}
        tracker.on_train_batch_end(SimpleNamespace(global_step=done), module, None, None, 0)
        seen += [done - 1] if "gold" in module.step_metrics else []
    tracker.teardown(None, None, "fit")
    assert seen == [0, 4, 8, 9]
    rows = _rows(tmp_path / "samples.jsonl")
    assert [row["step"] for row in rows] == [0, 0, 4, 4, 8, 8, 9, 9]
    first = {"step": 0, "prompt": "p", "response": "x", "ended": True, "proxy": 0.5, "reward": 0.5, "gold": -6.0}
    assert rows[0] == first


def _trained_tracker(path: Path, module: Any, steps: int) -> Any:
    """A tracker, still open, that has written two rows of each of some steps."""
    tracker: Any = OveroptimizationTracker(path, _gold(), every=1, samples=2)
    tracker.on_train_start(SimpleNamespace(global_step=0), module)
    for done in range(1, steps + 1):
        tracker.on_train_batch_end(SimpleNamespace(global_step=done), module, None, None, 0)
    return tracker


@pytest.mark.parametrize("left", [0, 1, 3])
def test_the_tracker_tells_at_a_restart_how_many_of_its_rows_are_lost(
    single: Runtime, tmp_path: Path, caplog: pytest.LogCaptureFixture, left: int
) -> None:
    """Also when every step still has a row."""
    path = tmp_path / "samples.jsonl"
    module: Any = _Policy()
    tracker = _trained_tracker(path, module, steps=2)
    state = tracker.state_dict()
    tracker.on_train_batch_end(SimpleNamespace(global_step=3), module, None, None, 0)
    tracker.teardown(None, None, "fit")
    whole = path.read_text()
    assert len(whole.splitlines()) == 6

    again: Any = OveroptimizationTracker(path, _gold(), every=1, samples=2)
    again.load_state_dict(state)
    again.on_train_start(SimpleNamespace(global_step=2), module)
    again.teardown(None, None, "fit")
    assert not caplog.messages and path.read_text().splitlines() == whole.splitlines()[:4]

    path.write_text("".join(whole.splitlines(keepends=True)[:left]))
    again.on_train_start(SimpleNamespace(global_step=2), module)
    again.teardown(None, None, "fit")
    (told,) = caplog.messages
    assert told == f"{path}: {4 - left} of 4 rows are lost; training resumes after step 2"


def test_a_restart_names_a_row_that_is_none_of_rlhf(single: Runtime, tmp_path: Path) -> None:
    path = tmp_path / "samples.jsonl"
    module: Any = _Policy()
    tracker = _trained_tracker(path, module, steps=1)
    tracker.teardown(None, None, "fit")
    path.write_text(path.read_text().replace('"response": "y"', '"response": ["y"]'))
    with pytest.raises(DataError, match=r"samples\.jsonl:2: not a row of RLHF's samples \(response="):
        tracker.on_train_start(SimpleNamespace(global_step=1), module)


def test_a_restart_reads_the_rows_of_an_earlier_training_once(
    single: Runtime, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "samples.jsonl"
    module: Any = _Policy()
    tracker = _trained_tracker(path, module, steps=2)
    tracker.teardown(None, None, "fit")
    decoded: list[Any] = []
    decode = jsonl.decode_json
    monkeypatch.setattr(jsonl, "decode_json", lambda line: decoded.append(line) or decode(line))
    tracker.on_train_start(SimpleNamespace(global_step=1), module)
    assert len(decoded) == 4 and tracker.earlier == {0: 2} and len(_rows(path)) == 2


@pytest.mark.parametrize("rows", [None, "4", -1, 4.0, True])
def test_a_wrong_count_of_rows_in_a_checkpoint_is_refused(tmp_path: Path, rows: object) -> None:
    tracker: Any = OveroptimizationTracker(tmp_path / "samples.jsonl", None, every=1, samples=2)
    with pytest.raises(CheckpointError, match=r"trainer\.json .* rows in samples\.jsonl: remove that checkpoint"):
        tracker.load_state_dict({"rows": rows})


def test_a_prompt_is_written_as_its_text_and_a_conversation_with_its_roles() -> None:
    assert prompt_text(({"role": "user", "content": "hello"},)) == "hello"
    turns = tuple({"role": role, "content": role[0]} for role in ("user", "assistant", "user"))
    assert prompt_text(turns) == "user: u\n\nassistant: a\n\nuser: u"


def test_rows_for_other_ranks_hold_plain_numbers_and_pickle_to_what_they_say() -> None:
    count, words = 512, ["word"] * 40
    rollouts = Rollouts(
        prompts=[({"role": "user", "content": "p"},)] * count,
        responses=[" ".join(words)] * count,
        ended=[True] * count,
        prompt_tokens=[[1]] * count,
        response_tokens=[[1] * 40] * count,
        prompt_index=[0] * count,
        fingerprint="",
    )
    names = ("disagreement", "disagreement_z")
    details = {"z": torch.randn(count, 2), **{name: torch.randn(count) for name in names}}
    reward_output = RewardOutput(torch.randn(count), torch.randn(count, 2), details)
    rows = trajectory_rows(rollouts, reward_output, 1, "policy", 0, torch.randn(count), torch.randn(count))
    assert not any(torch.is_tensor(value) for row in rows for value in row.values())
    assert len(pickle.dumps(rows)) < 400 * count  # 20 kB a row where it holds views
    torch.testing.assert_close(torch.tensor([row["z"] for row in rows]), details["z"])
    source = FunctionReward("score", lambda prompts, responses, ended: [float(i) for i in range(count)])
    _, rows = score_sft_responses(rollouts, count, FeatureReader([source]), source)
    assert not any(torch.is_tensor(value) for row in rows for value in row.values())
    assert [(row["scores"], row["gold"]) for row in rows[:2]] == [([0.0], 0.0), ([1.0], 1.0)]
