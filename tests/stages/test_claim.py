"""A run directory belongs to one configuration, of which only layout and microbatches may change, on record."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from nemo_advrm.config import load_config
from nemo_advrm.errors import ConfigError
from nemo_advrm.megatron.runtime import Runtime
from nemo_advrm.schema import Config
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
    assert sorted(p.name for p in directory.iterdir()) == [
        "config.yaml",
        "metrics.jsonl",
        "run.lock",
        "versions.yaml",
    ]


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


class _Job:
    """A process that claims a directory when ``start`` is over, and lives until it is told to end."""

    def __init__(self, directory: Path, seed: int, start: float) -> None:
        self._answer, answer = os.pipe()
        end, self._end = os.pipe()
        self._pid = os.fork()
        if self._pid == 0:
            os.close(self._end)
            try:
                time.sleep(max(0.0, start - time.monotonic()))
                os.write(answer, _outcome(lambda: session.claim(_config(directory, seed), directory)).encode())
                os.read(end, 1)
            finally:
                os._exit(0)
        os.close(answer)
        os.close(end)

    def outcome(self) -> str:
        return os.read(self._answer, 10_000).decode()

    def end(self) -> None:
        os.write(self._end, b".")
        os.close(self._end)
        os.close(self._answer)
        os.waitpid(self._pid, 0)


def _config(directory: Path, seed: int) -> Config:
    return load_config([f"run_dir={directory}", f"seed={seed}"], "pipeline")


def _outcome(work: Callable[[], None]) -> str:
    try:
        work()
    except ConfigError as error:
        return str(error)
    return "claimed"


def _jobs_at_once(directory: Path, seeds: tuple[int, ...]) -> tuple[list[_Job], list[str]]:
    start = time.monotonic() + 0.2
    jobs = [_Job(directory, seed, start) for seed in seeds]
    return jobs, [job.outcome() for job in jobs]


@pytest.mark.parametrize("attempt", range(5))
def test_of_two_jobs_that_start_at_once_one_has_the_directory(single: Runtime, tmp_path: Path, attempt: int) -> None:
    directory = tmp_path / "run"
    jobs, outcomes = _jobs_at_once(directory, (1, 2))
    first = outcomes.index("claimed")
    assert f"holds a run with seed={first + 1}, but now seed={2 - first}" in outcomes[1 - first]
    assert yaml.safe_load((directory / "config.yaml").read_text())["seed"] == first + 1
    (later,), refused = _jobs_at_once(directory, (3,))  # it has produced nothing yet, but it is alive
    assert "holds a run with seed" in refused[0]
    for job in (*jobs, later):
        job.end()
    session.claim(_config(directory, 4), directory)  # nobody lives there any more, and nothing was produced
    assert yaml.safe_load((directory / "config.yaml").read_text())["seed"] == 4


def test_jobs_of_one_run_share_its_directory(single: Runtime, tmp_path: Path) -> None:
    jobs, outcomes = _jobs_at_once(tmp_path / "run", (1, 1, 1))
    for job in jobs:
        job.end()
    assert outcomes == ["claimed"] * 3
