"""A run directory belongs to one configuration, of which only layout and microbatches may change, on record."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from nemo_advrm.config import load_config
from nemo_advrm.errors import ConfigError
from nemo_advrm.megatron.runtime import Runtime
from nemo_advrm.stages import session


def _claim(directory: Path, *overrides: str) -> None:
    session.claim(load_config([f"run_dir={directory}", *overrides], "pipeline"), directory)
    (directory / "metrics.jsonl").touch()  # the run has produced something


def _changes(directory: Path) -> list[tuple[str, Any, Any]]:
    known = yaml.safe_load((directory / "versions.yaml").read_text())
    assert known["seed"] == 1 and "nemo_advrm" in known
    return [(c["key"], c["from"], c["to"]) for c in known.get("changes", [])]


def test_layout_and_microbatches_may_change_and_each_change_is_recorded_once(
    single: Runtime, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    directory = tmp_path / "run"
    rows, tensor = "model.micro_batch_size", "model.tensor_model_parallel_size"
    start = ("seed=1", f"{rows}=8")
    _claim(directory, *start)
    identity = (directory / "config.yaml").read_text()
    _claim(directory, *start)
    assert _changes(directory) == [] and capsys.readouterr().out == ""
    for _ in range(2):
        _claim(directory, "seed=1", f"{rows}=2", f"{tensor}=2")
    assert _changes(directory) == [(rows, 8, 2), (tensor, 1, 2)]
    assert capsys.readouterr().out.count(f"goes on with {rows}=2 (before: 8)") == 1
    _claim(directory, *start)  # and back
    _claim(directory, *start, f"stage.rlhf.{rows}=4")
    assert _changes(directory)[2:] == [(rows, 2, 8), (tensor, 2, 1), (f"stage.rlhf.{rows}", None, 4)]
    assert (directory / "config.yaml").read_text() == identity
    assert sorted(p.name for p in directory.iterdir()) == ["config.yaml", "metrics.jsonl", "versions.yaml"]


@pytest.mark.parametrize(
    "change", ["model.global_batch_size=2", "seed=2", "model.optim.lr=0.5", "stage.rlhf.model.optim.lr=0.5"]
)
def test_what_changes_results_is_another_run(single: Runtime, tmp_path: Path, change: str) -> None:
    _claim(tmp_path / "run", "seed=1")
    key = change.partition("=")[0]
    with pytest.raises(ConfigError, match=rf"holds a run with {key}=.*choose another run_dir"):
        _claim(tmp_path / "run", "seed=1", "model.micro_batch_size=2", change)
    assert _changes(tmp_path / "run") == []


def test_reward_servers_may_move_but_members_may_not_change(single: Runtime, tmp_path: Path) -> None:
    key = "ensemble.members"
    first, moved = ["http://n1:1", "runs/rm_2/model"], ["http://n3:2", "runs/rm_2/model"]
    _claim(tmp_path / "run", "seed=1", f"{key}=[{','.join(first)}]")
    _claim(tmp_path / "run", "seed=1", f"{key}=[{','.join(moved)}]")
    assert _changes(tmp_path / "run") == [(key, first, moved)]
    for other in (
        "http://n1:1",
        "http://n1:1,runs/rm_3/model",
        "runs/rm_1/model,runs/rm_2/model",
        "triton+http://n1:1/m,runs/rm_2/model",
    ):
        with pytest.raises(ConfigError, match=r"holds a run with ensemble\.members="):
            _claim(tmp_path / "run", "seed=1", f"{key}=[{other}]")
