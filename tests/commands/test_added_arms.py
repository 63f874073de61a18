"""Arms and branches that are added to a run: the finished steps stay, and the new ones give what they always give."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from reward_members import one_step_pipeline

from nemo_advrm import cli, files, locks
from nemo_advrm.commands import stages
from nemo_advrm.config import load_config
from nemo_advrm.engine.runtime import Runtime
from nemo_advrm.errors import ConfigError
from nemo_advrm.pipeline import dag, runner, state, workers
from nemo_advrm.report.collect import collect
from nemo_advrm.report.lines import lines_of
from nemo_advrm.report.summary import summarise
from nemo_advrm.run_directory import held_arms, identity, run_dir

FIRST = "pipeline.rlhf.plain={reward: r1, standardise: true}"
# its best-of-n curve is that of the first arm
KL = "pipeline.rlhf.kl={reward: r1, standardise: true, kl: 2.5}"
STEPS = "pipeline.rlhf.steps={reward: hardened, branch: steps}"
BRANCH = "pipeline.branches.steps={pairs: none}"
# files whose bytes tell results, without times
RESULTS = ("samples.jsonl", "reference.jsonl", "standardisation.jsonl", ".distcp", "room.json")


@pytest.fixture(autouse=True)
def nothing_is_held() -> Iterator[None]:
    yield
    locks.release_all()


@pytest.fixture(scope="module")
def settings(single: Runtime, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """A pipeline of two tiny members that is attacked for one step, without retraining."""
    home = tmp_path_factory.mktemp("added_arms")
    return [
        *one_step_pipeline(home),
        "pipeline.rounds=0",
        "pipeline.gold=synthetic",
        "pipeline.best_of_n=true",
        "pipeline.room=plain",
        "pipeline.jobs=1",
        "ensemble.size=2",
        "best_of_n.prompts=1",
        "best_of_n.samples=4",
        "adversarial.target_members=[1]",
        "model.global_batch_size=2",
        "stage.train_rm.trainer.max_steps=1",
        "rl.group_size=2",
    ]


def _pipeline(settings: list[str], run: Path, *arms: str) -> int:
    return cli.main(["pipeline", *settings, f"run_dir={run}", *arms])


def _begun(out: str) -> list[str]:
    return [line.removeprefix("== ") for line in out.splitlines() if line.startswith("== ")]


def _results(run: Path) -> dict[str, bytes]:
    """Bytes by path; the directory of the run, which some name, is left out."""
    found = [path for path in run.rglob("*") if path.name.endswith(RESULTS)] + [*run.glob("best_of_n/*.json")]
    return {path.relative_to(run).as_posix(): path.read_bytes().replace(bytes(run), b"RUN") for path in found}


@pytest.mark.long
def test_added_arms_give_the_same_as_from_the_start_and_leave_the_rest_alone(
    settings: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    at_once, later = tmp_path / "at_once", tmp_path / "later"
    assert _pipeline(settings, at_once, FIRST, STEPS, BRANCH, KL) == 0
    capsys.readouterr()
    assert _pipeline(settings, later, FIRST, "pipeline.until=round_0/rm_*") == 0
    assert sorted(_begun(capsys.readouterr().out)) == ["round_0/rm_1", "round_0/rm_2"]
    assert not (later / "report").exists()
    assert _pipeline(settings, later, FIRST) == 0
    capsys.readouterr()
    before = {path: path.stat().st_mtime_ns for path in _paths(later)}

    more = ["name=more", KL, BRANCH, STEPS]  # before the first one, and in another order
    assert _pipeline(settings, later, *more, FIRST) == 0
    out = capsys.readouterr().out
    assert f"{later} goes on with a new arm kl: {{kl: 2.5, standardise: true}}" in out
    assert f"{later} goes on with a new branch steps: {{pairs: none}}" in out
    assert sorted(_begun(out)) == [
        *("best_of_n/steps", "branches/steps/round_1/rm_1"),
        *("rlhf/kl", "rlhf/steps"),
    ]
    assert {path: path.stat().st_mtime_ns for path in before} == before
    ours, theirs = _results(at_once), _results(later)
    assert any(name.startswith("rlhf/kl/model/") for name in ours)
    assert any(name.startswith("branches/steps/round_1/rm_1/model/") for name in ours)
    assert [name for name in ours | theirs if ours.get(name) != theirs.get(name)] == []
    assert {"best_of_n/plain.json", "best_of_n/steps.json"} <= ours.keys()

    assert _pipeline(settings, later, FIRST) == 0  # who asks for less goes on, too
    assert _begun(capsys.readouterr().out) == []
    assert list(yaml.safe_load((later / "config.yaml").read_text())["pipeline"]["rlhf"]) == ["plain", "kl", "steps"]
    reported = summarise(collect(later))
    assert list(reported["rlhf"]) == ["plain", "kl", "steps"]


def _paths(run: Path) -> list[Path]:
    """What the steps of a run have left."""
    homes = [run / name for name in ("round_0", "rlhf", "best_of_n")]
    return [path for home in homes for path in home.rglob("*") if path.is_file()] + [run / "room.json"]


# what a run directory says, without any work


def _claim(directory: Path, *overrides: str) -> None:
    cfg = load_config([f"run_dir={directory}", "seed=1", *overrides], "pipeline")
    run_dir.claim(cfg, directory, "pipeline", shared=True)
    (directory / "metrics.jsonl").touch()  # the run has produced something


def _held(directory: Path) -> dict[str, Any]:
    return yaml.safe_load((directory / "config.yaml").read_text())


def _changes(directory: Path) -> list[tuple[str, Any, Any]]:
    known = yaml.safe_load((directory / "versions.yaml").read_text())
    assert all(change["time"] for change in known.get("changes", []))
    return [(c["key"], c["from"], c["to"]) for c in known.get("changes", [])]


def test_an_added_arm_is_told_recorded_and_held_and_nothing_else_changes(
    single: Runtime, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    _claim(run, "name=study", "model.micro_batch_size=8", FIRST)
    before = _held(run)
    capsys.readouterr()
    for _ in range(2):
        _claim(run, "name=more", "model.micro_batch_size=2", FIRST, KL)
    out = capsys.readouterr().out
    _claim(run, "name=study", "model.micro_batch_size=2", FIRST)
    _claim(run, "name=other", "model.micro_batch_size=2", STEPS, BRANCH)
    assert out.count("goes on with a new arm kl: {kl: 2.5, standardise: true}\n") == 1
    held = _held(run)
    added = {name: held["pipeline"]["rlhf"].pop(name) for name in ("kl", "steps")}
    branch = held["pipeline"]["branches"].pop("steps")
    assert held == before  # its name and its microbatches are those that it was begun with
    assert added["kl"]["kl"] == 2.5 and added["steps"]["branch"] == "steps" and branch["pairs"] == "none"
    assert _changes(run) == [
        ("model.micro_batch_size", 8, 2),
        ("pipeline.rlhf.kl", None, added["kl"]),
        ("pipeline.branches.steps", None, branch),
        ("pipeline.rlhf.steps", None, added["steps"]),
    ]
    assert not [path.name for path in run.iterdir() if path.name.startswith((".", "config.lease"))]


@pytest.mark.parametrize(
    ("change", "key"),
    [
        ("pipeline.rlhf.plain={reward: r1, standardise: true, kl: 1.0}", "pipeline.rlhf.plain.kl"),
        ("pipeline.rlhf.kl={reward: r1, standardise: true, kl: 1.0}", "pipeline.rlhf.kl.kl"),
        ("pipeline.branches.steps={pairs: random}", "pipeline.branches.steps.pairs"),
        ("pipeline.rlhf_seeds=3", "pipeline.rlhf_seeds"),
    ],
)
def test_a_changed_arm_is_refused_and_nothing_is_added_with_it(
    single: Runtime, tmp_path: Path, change: str, key: str
) -> None:
    run = tmp_path / "run"
    _claim(run, FIRST, BRANCH)
    _claim(run, FIRST, BRANCH, KL)
    before = _held(run)
    with pytest.raises(ConfigError, match=rf"holds a run with {key}=.*choose another run_dir"):
        _claim(run, FIRST, BRANCH, KL, "pipeline.rlhf.more={reward: ensemble}", change)
    assert _held(run) == before and len(_changes(run)) == 1


def test_arms_of_several_runs_get_more_of_them(
    single: Runtime, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    for count in (2, 3, 3):
        _claim(run, FIRST, f"pipeline.rlhf_seeds={count}")
    assert capsys.readouterr().out.count(f"{run} goes on with pipeline.rlhf_seeds=3 (before: 2)\n") == 1
    assert _changes(run) == [("pipeline.rlhf_seeds", 2, 3)]
    two, three = (dag.order(load_config([FIRST, f"pipeline.rlhf_seeds={count}"], "pipeline")) for count in (2, 3))
    assert [step.name for step in three if step not in two] == ["rlhf/plain/seed_3", "report"]


def test_an_arm_is_added_beside_jobs_of_the_run_that_are_alive_and_one_at_a_time(
    single: Runtime, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another job adds an arm right before this one looks what the run holds: both are kept."""
    run = tmp_path / "run"
    _claim(run, FIRST)
    locked = locks.locked

    def late(directory: Path, name: str, *rest: Any) -> Any:
        if name == "config":
            monkeypatch.setattr(locks, "locked", locked)
            _claim(run, FIRST, KL)
        return locked(directory, name, *rest)

    monkeypatch.setattr(locks, "locked", late)
    _claim(run, FIRST, BRANCH, STEPS)
    assert list(_held(run)["pipeline"]["rlhf"]) == ["plain", "kl", "steps"]
    assert [key for key, _, _ in _changes(run)] == [
        *("pipeline.rlhf.kl", "pipeline.branches.steps", "pipeline.rlhf.steps")
    ]


def test_an_addition_that_was_killed_is_completed_by_the_same_command_and_does_not_hinder_others(
    single: Runtime, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tmp_path / "run"
    _claim(run, FIRST)
    before = _held(run)
    write = files.write_text

    def until_config(path: Path, text: str) -> None:
        if path.name == "config.yaml":
            raise KeyboardInterrupt
        write(path, text)

    with monkeypatch.context() as patch:
        patch.setattr(files, "write_text", until_config)
        with pytest.raises(KeyboardInterrupt):
            _claim(run, FIRST, KL)
    assert _held(run) == before
    _claim(run, FIRST)
    assert _held(run) == before and len(_changes(run)) == 1
    _claim(run, FIRST, KL)
    assert list(_held(run)["pipeline"]["rlhf"]) == ["plain", "kl"] and len(_changes(run)) == 1


def test_another_stage_has_no_arms_to_add(single: Runtime, tmp_path: Path) -> None:
    run = tmp_path / "run"
    for arms in ((FIRST,), (FIRST, KL)):
        cfg = load_config([f"run_dir={run}", "seed=1", *arms], "sft")
        if arms == (FIRST, KL):
            with pytest.raises(ConfigError, match=r"holds a run with pipeline\.rlhf\.kl=None"):
                run_dir.claim(cfg, run, "sft")
        else:
            run_dir.claim(cfg, run, "sft")
            (run / "metrics.jsonl").touch()


def test_stages_are_those_that_are_asked_for_and_a_curve_has_the_name_of_the_runs_first_arm(
    single: Runtime, tmp_path: Path
) -> None:
    base = ["data.train_path=pairs.jsonl", "pipeline.best_of_n=true", "pipeline.rounds=0"]
    run = tmp_path / "run"
    _claim(run, *base, FIRST, BRANCH, STEPS)
    cfg = load_config([*base, f"run_dir={run}", KL], "pipeline")
    steps = {step.name: step for step in dag.asked(cfg, held_arms.whole(cfg, run))}
    assert {"best_of_n", "best_of_n/plain", "rlhf/kl"} <= steps.keys()
    assert not {"rlhf/plain", "rlhf/steps", "best_of_n/kl", "best_of_n/steps"} & steps.keys()
    assert not any(name.startswith("branches/") for name in steps)
    assert all(set(step.after) <= steps.keys() for step in steps.values())


def test_an_added_arm_may_be_of_a_branch_that_the_run_holds(
    single: Runtime, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """However its stages are looked at: by the command and its workers, by one process, and by ``stages``."""
    base = ["data.train_path=pairs.jsonl", "pretrained_checkpoint.restore_from_path=policy", "ensemble.size=2"]
    base += ["pipeline.rounds=0", "trainer.accelerator=cpu", "trainer.cpu_threads=1", "pipeline.jobs=auto"]
    run = tmp_path / "run"
    _claim(run, *base, FIRST, BRANCH)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(8)))
    cfg = load_config([*base, f"run_dir={run}", "seed=1", STEPS], "pipeline")
    assert len(workers.plan(cfg)) == 2
    monkeypatch.setattr(runner, "check_target_members", lambda *args: None)
    runner.check(cfg)
    assert stages.main(cfg) == 0
    names = [line.split("\t")[0] for line in capsys.readouterr().out.splitlines()]
    assert {"rlhf/steps", "branches/steps/round_1/rm_1"} <= set(names) and "rlhf/plain" not in names

    unknown = load_config([*base, f"run_dir={run}", "pipeline.rlhf.x={reward: r1, branch: nosuch}"], "pipeline")
    for look in (workers.plan, runner.check, stages.main):
        with pytest.raises(ConfigError, match=r"pipeline\.rlhf\.x\.branch=nosuch: is not among .*\(steps\)"):
            look(unknown)


def test_the_arm_of_the_room_need_not_be_named_again(single: Runtime, tmp_path: Path) -> None:
    """Who asks for other arms leaves the room of that one alone."""
    base = ["data.train_path=pairs.jsonl", "pipeline.room=plain", "pipeline.rounds=0"]
    run = tmp_path / "run"
    _claim(run, *base, FIRST)
    asked = {arm: dag.of_run(load_config([*base, f"run_dir={run}", arm], "pipeline"))[1] for arm in (FIRST, KL)}
    names = {arm: {step.name for step in steps} for arm, steps in asked.items()}
    assert {"room", "rlhf/plain"} <= names[FIRST]
    assert "rlhf/kl" in names[KL] and not {"room", "rlhf/plain"} & names[KL]
    with pytest.raises(ConfigError, match=r"pipeline\.room=plain: is not among pipeline\.rlhf"):
        dag.of_run(load_config([*base, f"run_dir={tmp_path / 'new'}", KL], "pipeline"))


@pytest.mark.parametrize(
    ("key", "value"),
    [
        *(("rlhf_seeds", value) for value in (None, "x", [1], True, 0)),
        *(("rlhf.plain", value) for value in (None, "x", 3, True, [1], {"kl": "high"})),
        *(("branches.steps", value) for value in (None, "x")),
        *(("rlhf", value) for value in (None, "x", 3)),
    ],
)
def test_damaged_settings_of_arms_are_named_with_their_file(
    single: Runtime, tmp_path: Path, key: str, value: Any
) -> None:
    run = tmp_path / "run"
    _claim(run, FIRST, BRANCH, "pipeline.rlhf_seeds=2")
    held = _held(run)
    *path, name = ["pipeline", *key.split(".")]
    node = held
    for part in path:
        node = node[part]
    node[name] = value
    text = yaml.safe_dump(held)
    (run / "config.yaml").write_text(text)
    wanted = re.escape(f"{run / 'config.yaml'}: pipeline.{key}={value!r} is no")
    for arms in ((FIRST, BRANCH, "pipeline.rlhf_seeds=3"), (KL, "pipeline.rlhf_seeds=2")):
        with pytest.raises(ConfigError, match=f"^{wanted}[^\\n]*: restore it$"):
            _claim(run, *arms)
        with pytest.raises(ConfigError, match=wanted):
            dag.of_run(load_config([f"run_dir={run}", *arms], "pipeline"))
    assert (run / "config.yaml").read_text() == text


@pytest.mark.parametrize("key", [3, ["x"], None])
def test_changes_of_no_keys_are_put_aside_with_a_word(
    single: Runtime, tmp_path: Path, caplog: pytest.LogCaptureFixture, key: Any
) -> None:
    run = tmp_path / "run"
    _claim(run, FIRST)
    known = yaml.safe_load((run / "versions.yaml").read_text())
    (run / "versions.yaml").write_text(yaml.safe_dump({**known, "changes": [{"key": key, "to": 1}]}))
    _claim(run, FIRST, KL)
    assert f"{run / 'versions.yaml'} cannot be read (its changes are no changes of keys)" in caplog.text
    assert [key for key, _, _ in _changes(run)] == ["pipeline.rlhf.kl"]


def test_an_arm_of_an_older_version_lacks_what_that_did_not_know(single: Runtime, tmp_path: Path) -> None:
    run = tmp_path / "run"
    low = "pipeline.rlhf.low={reward: r1, kl: 1.0}"
    _claim(run, low, BRANCH)
    held = _held(run)
    del held["pipeline"]["rlhf"]["low"]["standardise"], held["pipeline"]["branches"]["steps"]["own_trunk"]
    (run / "config.yaml").write_text(yaml.safe_dump(held))
    _claim(run, low, BRANCH)
    assert _held(run) == held and _changes(run) == []
    with pytest.raises(ConfigError, match=r"holds a run with pipeline\.rlhf\.low\.standardise=False, but now .*=True"):
        _claim(run, "pipeline.rlhf.low={reward: r1, kl: 1.0, standardise: true}", BRANCH)


def test_the_commit_of_each_stage_and_of_each_addition_is_kept(
    single: Runtime, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run goes on with another commit: the lines of its new arms are of that one."""
    run = tmp_path / "run"
    for commit, arms, arm in (("a" * 40, (FIRST,), "plain"), ("b" * 40, (FIRST, KL), "kl")):
        known = {"nemo_advrm": "1", "git": commit}
        for module in (state, identity, run_dir):
            monkeypatch.setattr(module, "versions", lambda known=known: dict(known))
        _claim(run, *arms)
        with state.RunState(run / "state.json", 1).running(f"rlhf/{arm}"):
            (run / "rlhf" / arm).mkdir(parents=True)
            rows = [{"step": step, "proxy": 1.0, "gold": 1.0, "kl": 0.1 * step} for step in range(10)]
            (run / "rlhf" / arm / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    written = json.loads((run / "state.json").read_text())
    assert written["versions"]["git"] == "a" * 40
    assert {line.arm: line.commit for line in lines_of(run)} == {"plain": "a" * 40, "kl": "b" * 40}
    [change] = yaml.safe_load((run / "versions.yaml").read_text())["changes"]
    assert change["git"] == "b" * 40

    del written["stages"]["rlhf/kl"]["git"]  # as earlier versions wrote it
    (run / "state.json").write_text(json.dumps(written))
    assert {line.commit for line in lines_of(run)} == {"a" * 40}


def test_the_room_is_measured_again_when_its_arm_has_got_more_runs(
    single: Runtime, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    base = ["data.train_path=pairs.jsonl", "pipeline.room=plain", "pipeline.rounds=0", f"run_dir={run}"]

    def steps(count: int) -> list[dag.Step]:
        return dag.of_run(load_config([*base, FIRST, f"pipeline.rlhf_seeds={count}"], "pipeline"))[1]

    done = state.RunState(run / "state.json", 1)
    for step in steps(2):
        done.set_detail(step.name, status="complete", **({"runs": list(step.after[:2])} if step.kind == "room" else {}))
    work = object.__new__(runner.Pipeline)
    work.cfg = load_config([*base, FIRST], "pipeline")
    work.state = done
    work._reopen(steps(2))
    assert done.is_complete("room") and capsys.readouterr().out == ""

    stages.main(load_config([*base, FIRST, "pipeline.rlhf_seeds=3"], "pipeline"))
    listed = {line.split("\t")[0]: line.split("\t")[2] for line in capsys.readouterr().out.splitlines()}
    assert (listed["room"], listed["rlhf/plain/seed_2"], listed["rlhf/plain/seed_3"]) == ("todo", "complete", "todo")
    work._reopen(steps(3))
    assert capsys.readouterr().out == "room was complete before rlhf/plain/seed_3 were added: it is run again\n"
    assert not done.is_complete("room") and done.is_complete("rlhf/plain/seed_2")
