"""Every file of every run, damaged, and the commands that read it: recovery with a word, or one line that names it.

The files are those that small real runs have left (see damaged_runs.py): a run that leaves a file which the table there
does not have fails. JSON and YAML files also get a value of another type in each of their places (see wrong_values.py).
"""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from damaged_runs import (
    CHECKED,
    READ_BY,
    Runs,
    Said,
    files_of,
    kind_of,
    ways,
)
from restart_driver import digest
from wrong_values import SUFFIXES, read, value_at, with_value, write, wrong_values

from nemo_advrm import config, locks

PARTS = 5

pytestmark = [pytest.mark.usefixtures("single"), pytest.mark.timeout(2400)]

RUNS = ["sft", "train_rm", "train_rm_stopped", "attack", "attack_stopped", "rlhf", "rlhf_stopped", "best_of_n"]
RUNS += ["pipeline"]
READERS = ["train_rm:evaluate", "attack:select", "attack:evaluate several", "attack:train on its pairs"]
READERS += ["pipeline:report", "pipeline:stages"]
# what another command has left there
OTHERS = {"attack": ["pairs.jsonl"]}
# checkpoints that older versions converted have none
SILENT = {("train_rm:evaluate", "model/manifest.json"): ("missing", "a link to nothing")}


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Runs]:
    """Each configuration is composed once, and nothing is drawn."""
    made: dict[tuple[Any, ...], Any] = {}
    load = config.load_config

    def load_once(overrides: Any = (), stage: str = "") -> Any:
        key = (*overrides, stage)
        if key not in made:
            made[key] = load(overrides, stage)
        return copy.deepcopy(made[key])

    home = tmp_path_factory.mktemp("damaged")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(home)
        patch.setattr(config, "load_config", load_once)
        patch.setattr("nemo_advrm.report.figures.draw_figures", lambda *args: {})
        yield Runs(home)


@pytest.mark.long
@pytest.mark.parametrize("command", ["train_rm", pytest.param("train_rm_stopped", marks=pytest.mark.slow)])
def test_a_damaged_file_is_told(runs: Runs, command: str) -> None:
    """Each file in one of the ways of the next test."""
    every = list(ways(Path("any")))
    names = read_by(runs, command)
    assert len(names) > 10
    check(runs, command, [(name, every[number % len(every)]) for number, name in enumerate(names)])


@pytest.mark.slow
@pytest.mark.parametrize("way", list(ways(Path("any"))))
@pytest.mark.parametrize("command", [*RUNS, *READERS])
def test_a_file_damaged_in_any_way_is_told(runs: Runs, command: str, way: str) -> None:
    silent = {name for (other, name), own in SILENT.items() if other == command and way in own}
    check(runs, command, [(name, way) for name in read_by(runs, command) if name not in silent])


@pytest.mark.long
def test_a_value_of_another_type_is_told(runs: Runs) -> None:
    """In the mark of a finished training, its metrics and its record; the next test has all files of all runs."""
    check_values(runs, "train_rm", ["result.json", "manifest.json", "metrics.jsonl", "versions.yaml"])


# the files are shared out to several tests, so that none takes longer than its limit on a slow machine
@pytest.mark.slow
@pytest.mark.parametrize("part", range(PARTS))
@pytest.mark.parametrize("command", [*RUNS, *READERS])
def test_a_value_of_another_type_in_any_file_is_told(runs: Runs, command: str, part: int) -> None:
    names = [name for name in read_by(runs, command) if holds_values_that_are_read(command, name)]
    check_values(runs, command, names[part::PARTS])


@pytest.mark.slow
@pytest.mark.parametrize("run", RUNS)
def test_every_file_of_a_run_is_known(runs: Runs, run: str) -> None:
    found = files_of(runs.make(run))
    assert found and not [name for name in found if not kind_of(name)]


@pytest.mark.slow
@pytest.mark.parametrize("way", list(ways(Path("any"))))
def test_a_damaged_lock_changes_nothing_or_is_named(runs: Runs, way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(locks, "LEASE_SECONDS", 0.3)
    _, artefacts = undamaged(runs, "train_rm")
    for name in ("writer.lease", "config.lease"):
        with runs.kept("train_rm") as home:
            (home / name).write_text("filelock/2\npid=77\nhost=n7\nmode=lease\ntoken=x\nduration=0.3\n")
            ways(home / name)[way]()
            said = runs.say("train_rm")
            assert (said.status == 0 and state_of(home) == artefacts) or is_one_line(said, name), said


def check(runs: Runs, command: str, cases: list[tuple[str, str]]) -> None:
    """Damage a file in a way, for each of the cases, and look at what the command says and leaves."""
    base, artefacts = undamaged(runs, command)
    problems = []
    for name, way in cases:
        with runs.kept(run_of(command)) as home:
            ways(home / name)[way]()
            said = runs.say(command)
            after = state_of(home) if said.status == 0 else {}
        problems += wrong(said, after, name, f"{name} {way}", base, artefacts)
    assert not problems, "\n".join(problems)


def check_values(runs: Runs, command: str, names: list[str]) -> None:
    """Put a wrong value into each place of each of the files, and look at what the command says and leaves.

    Of files of rows the first row is damaged. Silence is right for what is not read, and for another number.
    """
    base, artefacts = undamaged(runs, command)
    problems = []
    for name in names:
        content, rest = read(runs.make(run_of(command)) / name)
        for place, value in wrong_values(content):
            with runs.kept(run_of(command)) as home:
                write(home / name, with_value(content, place, value), rest, home)
                damaged = state_of(home)
                said = runs.say(command)
                after = state_of(home) if said.status == 0 else {}
            numbers = [type(each) in (int, float) and each == each for each in (value, value_at(content, place))]
            untouched = after in (artefacts, damaged)
            if (said.status == 0 and said == base and untouched) or (all(numbers) and said.status in (0, 2)):
                continue
            what = f"{name} {'.'.join(map(str, place))}={str(value)[:9]}"
            problems += wrong(said, after, name, what, base, artefacts)
    assert not problems, "\n".join(problems)


def wrong(said: Said, after: dict[str, Any], name: str, what: str, base: Said, artefacts: dict[str, Any]) -> list[str]:
    """What is wrong with how a command took the damaged file ``name``, in a list of at most one line."""
    if said.status == -1:
        return [f"{what}: {said.told[-400:]}"]
    if said.status:
        return [] if is_one_line(said, name) else [f"{what}: {said.status} {said.told[:400]}"]
    words = [Path(name).name, *(["goes on with"] if name == "config.yaml" else [])]  # a layout that has changed
    told = any((said.printed + said.told).count(word) > (base.printed + base.told).count(word) for word in words)
    # of an attack that is joined again the rows have lost the marks of selection, which has to be repeated
    joined = re.sub(r"direction_\d+_policy_\d+/", "", name)
    done_again = {name, joined, name.replace("summary.json", "samples.jsonl")} if told else set()
    changed = [key for key in artefacts if after.get(key) != artefacts[key] and key not in done_again]
    if changed:
        return [f"{what}: {', '.join(changed)} changed"]
    model = name.rpartition("model/")[0] + "model" if "model/" in name else name
    return [] if told or model in artefacts else [f"{what}: not a word"]


def is_one_line(said: Said, name: str) -> bool:
    """Whether a user's error names the file; of a configuration that has lost keys its directory and a key."""
    words = (Path(name).name, "holds a run with" if name == "config.yaml" else Path(name).name)
    return said.status == 2 and said.told.count("\n") == 1 and any(word in said.told for word in words)


def run_of(command: str) -> str:
    return command.partition(":")[0]


def undamaged(runs: Runs, command: str) -> tuple[Said, dict[str, Any]]:
    """What the command says, and what is there afterwards, when nothing is damaged."""
    with runs.kept(run_of(command)) as home:
        said = runs.say(command)
        assert said.status == 0, said.told
        return said, state_of(home)


def read_by(runs: Runs, command: str) -> list[str]:
    """The files of a run that a command reads, one of each kind: of those that differ in a number the last."""
    run, _, reader = command.partition(":")
    found: dict[str, str] = {}
    patterns = READ_BY[reader] if reader else CHECKED
    for name in files_of(runs.make(run)):
        if name not in OTHERS.get(command, []) and any(re.fullmatch(pattern, name) for pattern in patterns):
            found[re.sub(r"\d+", "#", name)] = name
    return list(found.values())


def holds_values_that_are_read(command: str, name: str) -> bool:
    """Not the models of a finished run, nor what ``state.json`` has a hash of."""
    if command == "pipeline" and (name.endswith(".jsonl") or name.startswith(("best_of_n/", "room"))):
        return False
    return name.endswith(SUFFIXES) and (":" in command or "model/" not in name)


def state_of(home: Path) -> dict[str, Any]:
    """What a run is for: its weights, pairs and samples, and which steps its metrics have."""
    rows = r"(.+/)?(samples|pairs|reference|held_out\w*)\.jsonl|preferences/.+|best_of_n/\w+\.json|room\.json"
    found: dict[str, Any] = {name: (home / name).read_bytes() for name in files_of(home) if re.fullmatch(rows, name)}
    for path in home.rglob("metrics.jsonl"):
        if path.is_file():
            found[str(path.relative_to(home))] = re.findall(r'"step": \d+', path.read_text())
    report = home / "report" / "summary.json"  # written anew at every call, with the times that steps took
    if report.is_file() and report.read_text().endswith("}\n"):
        found["report/summary.json"] = list(json.loads(report.read_text()))
    for path in home.rglob("model/weights/.metadata"):
        model = path.parent.parent
        if path.is_file() and path.stat().st_size:
            found[str(model.relative_to(home))] = digest(model)
    return found
