"""A run directory belongs to one configuration, of which only layout and microbatches may change, on record."""

from __future__ import annotations

import os
import re
import signal
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from distributed import World

from nemo_advrm import locks
from nemo_advrm.config import load_config
from nemo_advrm.config.schema import Config
from nemo_advrm.engine.runtime import Runtime
from nemo_advrm.errors import ConfigError
from nemo_advrm.rank_info import host_name
from nemo_advrm.run_directory import run_dir


def _claim(directory: Path, *overrides: str) -> None:
    run_dir.claim(load_config([f"run_dir={directory}", *overrides], "pipeline"), directory, "pipeline", shared=True)
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
        "locks",
        "metrics.jsonl",
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


def test_a_run_of_an_older_version_goes_on_while_keys_it_did_not_know_keep_their_defaults(
    single: Runtime, tmp_path: Path
) -> None:
    directory = tmp_path / "run"
    _claim(directory, "seed=1")
    written = yaml.safe_load((directory / "config.yaml").read_text())
    del written["rl"]["kl"]["estimator"], written["serve"]
    (directory / "config.yaml").write_text(yaml.safe_dump(written))
    _claim(directory, "seed=1")
    with pytest.raises(ConfigError, match=r"rl.kl.estimator='abs', but now rl.kl.estimator='k3'"):
        _claim(directory, "seed=1", "rl.kl.estimator=k3")


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


def _config(directory: Path, seed: int) -> Config:
    return load_config([f"run_dir={directory}", f"seed={seed}"], "pipeline")


def _claim_at_once(world: World, seeds: list[int], directories: list[Path], shared: bool = True) -> list[list[str]]:
    """What jobs with these seeds are told that claim one directory after the other, each at the same moment."""
    cfg = _config(directories[0].parent, seed=0)
    configs = [replace(cfg, seed=seed) for seed in seeds]
    start = time.monotonic() + 0.3
    job = {"configs": configs, "directories": directories, "start": start, "shared": shared}
    told = world.run("claim_jobs", "claim_at_once", None, **job)
    return [list(outcomes) for outcomes in zip(*told, strict=True)]


def _seed(directory: Path) -> int:
    return yaml.safe_load((directory / "config.yaml").read_text())["seed"]


@pytest.mark.long
def test_of_jobs_that_start_at_once_one_has_the_directory_or_those_of_one_run_share_it(
    single: Runtime, tmp_path: Path
) -> None:
    directories = [tmp_path / f"run_{i}" for i in range(20)]
    shared = tmp_path / "shared"
    world = World(3, limit_seconds=60)
    try:
        told = _claim_at_once(world, [1, 2, 3], directories)
        assert _claim_at_once(world, [1, 1, 1], [shared]) == [["claimed"] * 3]
        alone = [tmp_path / f"alone_{i}" for i in range(5)]
        told_of_one_run = _claim_at_once(world, [1, 1, 1], alone, shared=False)
    finally:
        world.close()
    for directory, outcomes in zip(directories, told, strict=True):
        assert outcomes.count("claimed") == 1
        first = outcomes.index("claimed") + 1
        assert _seed(directory) == first
        refused = [(seed, outcome) for seed, outcome in enumerate(outcomes, 1) if seed != first]
        assert all(f"holds a run with seed={first}, but now seed={seed}" in outcome for seed, outcome in refused)
        assert not list(directory.glob(".*"))
    writer = rf"is being written by process \d+ on {re.escape(host_name())} .*: wait until it has ended, stop it, or"
    for outcomes in told_of_one_run:
        assert outcomes.count("claimed") == 1
        assert all(re.search(writer, outcome) for outcome in outcomes if outcome != "claimed")


def test_a_run_that_failed_before_it_produced_anything_is_replaced_unless_a_job_of_it_is_alive(
    single: Runtime, tmp_path: Path
) -> None:
    for seed in (1, 2):
        run_dir.claim(_config(tmp_path, seed), tmp_path, "pipeline", shared=True)
        assert _seed(tmp_path) == seed
    locks.release_all()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["config.yaml", "locks", "versions.yaml"]
    child = os.fork()
    if child == 0:
        run_dir._claim(_config(tmp_path, 2), tmp_path, "pipeline", True)
        os.kill(os.getpid(), signal.SIGSTOP)
    os.waitpid(child, os.WUNTRACED)
    try:
        with pytest.raises(ConfigError, match="holds a run with seed=2, but now seed=3"):
            run_dir.claim(_config(tmp_path, 3), tmp_path, "pipeline", shared=True)
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    run_dir.claim(_config(tmp_path, 3), tmp_path, "pipeline", shared=True)
    assert _seed(tmp_path) == 3
