"""What finished work has left is looked at again: a file that is cut, changed or missing is named with the cure."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from wrong_values import different_places, value_at, with_value

from nemo_advrm.attacks import attack_summary, summary_file
from nemo_advrm.attacks.attack_summary import check_samples
from nemo_advrm.commands import stages
from nemo_advrm.config import load_config
from nemo_advrm.config.schema import RLConfig
from nemo_advrm.data.jsonl import JsonlWriter, write_jsonl_atomic
from nemo_advrm.data.run_records import ATTACK_SAMPLE, read_rows
from nemo_advrm.data.sft_scores import SFTScores
from nemo_advrm.engine import manifest
from nemo_advrm.errors import DataError
from nemo_advrm.pipeline import artefacts
from nemo_advrm.pipeline.dag import Step
from nemo_advrm.pipeline.state import RunState
from nemo_advrm.run_directory import results
from nemo_advrm.training.callbacks.metrics_writer import MetricsWriter
from nemo_advrm.training.callbacks.rollout_records import TrajectoryRecorder
from nemo_advrm.training.callbacks.rows import lost_steps
from nemo_advrm.training.run_training import read_result

pytestmark = pytest.mark.usefixtures("single")
RESULT = {"train/loss": 0.5}
FOUND = {"samples": 2, "steps": 1, "seconds": 0.5, "success_standard": 0.25, "success_strict": 0.0, "ended": 1.0}


def finish(directory: Path) -> Path:
    """A finished training."""
    (directory / "model").mkdir(parents=True)
    (directory / "model" / "meta.json").write_text("{}")
    (directory / "model" / "weights").write_bytes(b"12345")
    manifest.write(directory / "model", manifest.describe(directory / "model", ["meta.json", "weights"]))
    (directory / "metrics.jsonl").write_text('{"step": 1}\n{"step": 2}\n')
    results.mark(directory, "result.json", RESULT, ["model/manifest.json", "metrics.jsonl"])
    return directory


def test_a_finished_training_is_read_and_an_unfinished_one_is_none(tmp_path: Path) -> None:
    assert results.finished(tmp_path, "result.json", ("train/loss",)) is None
    assert results.finished(finish(tmp_path / "run"), "result.json", ("train/loss",)) == RESULT


@pytest.mark.parametrize("content", ["", "{", "[]", "3", "null", '{"other": 1}', "\x00\x00"])
def test_a_mark_that_cannot_be_read_names_the_file_and_the_cure(tmp_path: Path, content: str) -> None:
    run = finish(tmp_path / "run")
    (run / "result.json").write_text(content)
    with pytest.raises(DataError, match=rf"^{run}/result.json cannot be read \(.+\): restore it, or remove {run}") as e:
        results.finished(run, "result.json", ("train/loss",))
    assert "\n" not in str(e.value)


@pytest.mark.parametrize("key", ["train/loss", "tokens"])
@pytest.mark.parametrize("value", ["x", None, True, [1], {"a": 1}, float("nan"), float("inf")])
def test_metrics_that_are_no_numbers_are_no_result(tmp_path: Path, key: str, value: Any) -> None:
    run = finish(tmp_path / "run")
    (run / "result.json").write_text(json.dumps({"train/loss": 0.5, "tokens": 3.0, key: value}))
    if key == "tokens" and isinstance(value, float):  # nothing is judged by it
        assert read_result(run, "train/loss") is not None
        return
    with pytest.raises(DataError, match=rf"result\.json cannot be read \('{key}' is .+\): restore it, or remove {run}"):
        read_result(run, "train/loss")


@pytest.mark.parametrize("value", [3, [1], None, {}, {"a": 3}, {"a": {}}])
def test_a_manifest_that_lists_nothing_is_none(tmp_path: Path, value: Any) -> None:
    run = finish(tmp_path / "run")
    (run / "manifest.json").write_text(json.dumps({"files": value}))
    with pytest.raises(DataError, match=r"manifest\.json is no manifest: restore it, or remove"):
        results.finished(run, "result.json")


@pytest.mark.parametrize("key", ["size", "sha256"])
@pytest.mark.parametrize("value", ["x", None, True, [1], {"a": 1}, -1, 1.5])
def test_entries_of_a_manifest_have_types(tmp_path: Path, key: str, value: Any) -> None:
    run = finish(tmp_path / "run")
    files = json.loads((run / "manifest.json").read_text())["files"]
    files["metrics.jsonl"][key] = value
    (run / "manifest.json").write_text(json.dumps({"files": files}))
    with pytest.raises(DataError, match=r"manifest\.json is no manifest: restore it, or"):
        results.finished(run, "result.json")


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("metrics.jsonl", "metrics.jsonl is missing"),
        ("model/weights", "model/weights is missing"),
        ("model", "model/manifest.json is missing"),
    ],
)
def test_a_missing_artefact_is_no_success(tmp_path: Path, name: str, told: str) -> None:
    run = finish(tmp_path / "run")
    shutil.rmtree(run / name) if (run / name).is_dir() else (run / name).unlink()
    with pytest.raises(DataError, match=f"{run} is finished, but {told}: restore it, or remove {run}"):
        results.finished(run, "result.json")


def test_a_cut_artefact_is_no_success(tmp_path: Path) -> None:
    run = finish(tmp_path / "run")
    (run / "metrics.jsonl").write_text('{"step": 1}\n')
    with pytest.raises(DataError, match=r"metrics\.jsonl has 12 bytes instead of 24"):
        results.finished(run, "result.json")


def test_stages_of_a_pipeline_are_looked_at_and_one_of_which_nothing_is_left_is_told_apart(tmp_path: Path) -> None:
    member = Step("round_0/rm_1", "train_rm")
    assert not artefacts.are_there(tmp_path, member, None)
    finish(tmp_path / member.name)
    assert artefacts.are_there(tmp_path, member, None)
    (tmp_path / member.name / "result.json").unlink()
    with pytest.raises(DataError, match=r"round_0/rm_1 is complete, but .*result\.json is missing: restore it, or rem"):
        artefacts.are_there(tmp_path, member, None)

    labels = Step("preferences", "preferences")
    (tmp_path / "preferences").mkdir()
    for name in ("train.jsonl", "validation.jsonl"):
        (tmp_path / "preferences" / name).write_text("{}\n{}\n")
    written = json.loads(json.dumps(artefacts.describe(tmp_path, labels)))
    assert artefacts.are_there(tmp_path, labels, written)
    (tmp_path / "preferences" / "train.jsonl").write_text("{}\n")  # cut at a line's end: rows are lost
    with pytest.raises(DataError, match=r"train\.jsonl is not what was written: restore it, or remove .*/train\.jsonl"):
        artefacts.are_there(tmp_path, labels, written)
    (tmp_path / "preferences" / "train.jsonl").unlink()
    with pytest.raises(DataError, match=r"train\.jsonl is missing"):
        artefacts.are_there(tmp_path, labels, written)
    (tmp_path / "preferences" / "validation.jsonl").unlink()
    assert not artefacts.are_there(tmp_path, labels, written)


@pytest.mark.parametrize("rows", [None, 0, 1, 3])
def test_joined_samples_of_a_pipeline_are_counted(tmp_path: Path, rows: int | None) -> None:
    join = Step("round_0/attack", "join")
    home = tmp_path / join.name
    home.mkdir(parents=True)
    samples = home / "samples.jsonl"
    samples.write_text("{}\n{}\n")
    (home / "metrics.jsonl").write_text("{}\n")
    results.mark(home, "summary.json", {"directions": {"1": FOUND}}, ["metrics.jsonl"])
    assert artefacts.are_there(tmp_path, join, None)
    samples.unlink()
    if rows is not None:
        samples.write_text("{}\n" * rows)
    told = {None: " is missing", 0: ": the file is empty"}.get(rows, f" has {rows} rows, but the attack wrote 2")
    with pytest.raises(DataError, match=rf"samples\.jsonl{told}.*: restore it, or remove {home} to run the step"):
        artefacts.are_there(tmp_path, join, None)


@pytest.mark.parametrize(
    "content",
    ["", "{", "[]", "{}", '{"stages": []}', '{"stages": {"sft": 1}}']
    + [json.dumps({"stages": {"sft": {"seconds": value}}}) for value in ("x", None, True, -1, [1], float("nan"))]
    + [json.dumps({"stages": {"round_0/select": {"stop": 3}}}), json.dumps({"stages": {"sft": {"status": None}}})]
    + [
        json.dumps({"stages": {"round_0/select": {"status": "complete", "files": value}}})
        for value in (
            3,
            [1],
            None,
            "x",
            {"a": 3},
            {"a": {}},
            {"a": {"size": "1", "sha256": "0" * 64}},
            {"a": {"size": 1, "sha256": 2}},
            {"a": {"size": 1, "sha256": "none"}},
            {"a": {"size": -1, "sha256": "0" * 64}},
        )
    ],
)
def test_a_state_that_cannot_be_read_names_the_cure(tmp_path: Path, content: str) -> None:
    (tmp_path / "state.json").write_text(content)
    told = r"state\.json cannot be read \(.+\): restore it, or remove it: trainings whose result is there are not done"
    with pytest.raises(DataError, match=told):
        RunState(tmp_path / "state.json", 1)
    with pytest.raises(DataError, match=told):
        stages.main(load_config([f"run_dir={tmp_path}"]))


def test_a_lost_state_is_begun_anew_with_a_word(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    RunState(tmp_path / "new" / "state.json", 1)
    assert capsys.readouterr().out == ""
    finish(tmp_path / "sft")
    RunState(tmp_path / "state.json", 1)
    assert "state.json is missing: every stage is looked at again" in capsys.readouterr().out


@pytest.mark.parametrize("rows", [1, 3])
def test_samples_that_are_not_as_many_as_their_attack_wrote_are_refused(tmp_path: Path, rows: int) -> None:
    (tmp_path / "samples.jsonl").write_text('{"step": 0}\n' * 2)
    (tmp_path / "summary.json").write_text(json.dumps({"directions": {"1": FOUND}}))
    check_samples(tmp_path)
    (tmp_path / "samples.jsonl").write_text('{"step": 0}\n' * rows)
    with pytest.raises(DataError, match=f"samples.jsonl has {rows} rows, but the attack wrote 2: restore it, or"):
        check_samples(tmp_path)
    (tmp_path / "summary.json").write_text('{"directions": 3}')
    with pytest.raises(DataError, match=r"summary\.json cannot be read \(directions=3: .+\): remove "):
        check_samples(tmp_path)


def test_rows_that_a_restart_misses_are_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step": 4}\n{"step": 5}\n')
    there = Counter([1, 4, 5])
    assert lost_steps(path, there, range(1, 2)) == ""
    assert lost_steps(path, there, range(1, 4)).endswith("the rows of 2 steps from 2 to 3 are lost")
    assert lost_steps(path, Counter(), range(1)).endswith("the rows of step 0 are lost")
    trainer: Any = SimpleNamespace(global_step=4)
    writer = MetricsWriter(path)
    writer.on_train_start(trainer, None)  # type: ignore[arg-type]
    writer.teardown(trainer, None, "fit")  # type: ignore[arg-type]
    (told,) = [record.getMessage() for record in caplog.records if "lost" in record.getMessage()]
    assert "2 steps from 2 to 3 are lost; training resumes after step 4" in told
    assert path.read_text() == '{"step": 1}\n{"step": 4}\n'


@pytest.mark.parametrize("row", ["3", "[]", "null", "{}", '{"prompt_id": 0}', '{"prompt_id": []}'])
def test_rows_of_another_type_in_a_reference_or_among_samples_are_named(tmp_path: Path, row: str) -> None:
    (tmp_path / "attack").mkdir()
    for name in ("reference.jsonl", "attack/samples.jsonl"):
        (tmp_path / name).write_text(f"{row}\n")
    with pytest.raises(DataError, match=r"reference\.jsonl:1: not a row of SFT scores \("):
        SFTScores.read(tmp_path / "reference.jsonl")
    with pytest.raises(DataError, match=r"samples\.jsonl:1: not a row of an attack \(.+\): restore"):
        list(read_rows(tmp_path / "attack" / "samples.jsonl", ATTACK_SAMPLE, "an attack", "restore the file"))


@pytest.mark.parametrize("row", ["3", "[]", '{"step": "x"}', '{"step": null}'])
def test_a_row_of_another_type_is_named(tmp_path: Path, row: str) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text(f'{{"step": 1}}\n{row}\n')
    with pytest.raises(DataError, match=rf"^{path}:2: `step` is"):
        JsonlWriter(path, resume_step=1)


def test_a_directory_in_place_of_rows_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="cannot be read: Is a directory"):
        JsonlWriter(tmp_path, resume_step=1)


@pytest.mark.parametrize(
    "directions",
    [3, [1], None, {"1": 3}, {"1": {}}, {"1": {k: v for k, v in FOUND.items() if k != "success_standard"}}]
    + [{"1": {**FOUND, key: value}} for key in FOUND for value in ("x", [1], {}, True, -1, float("nan"), 10**400)],
)
def test_a_summary_of_another_type_is_named_before_a_round_is_judged_by_it(tmp_path: Path, directions: Any) -> None:
    path = tmp_path / "summary.json"
    no_gold = {**FOUND, "success_standard": None, "success_strict": None}
    path.write_text(json.dumps({"directions": {"1": FOUND, "2": no_gold}}))
    assert attack_summary.success_rates(path, "restore it") == [0.25]
    path.write_text(json.dumps({"directions": directions}))
    with pytest.raises(DataError, match=r"summary\.json cannot be read \(.+\): restore it") as caught:
        attack_summary.success_rates(path, "restore it")
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 400


def test_each_value_of_a_summary_of_an_adversary_is_checked(tmp_path: Path) -> None:
    rates = {"success_standard": 0.5, "success_strict": 0.0, "finds": 0.25, "gold": 1.5}
    selected = {"selected": 1, "found": 2, "null": 0.5, "wrong_labels": 0.0}
    whole = {**FOUND, "held_out": {"prompts": 2, "responses": 4, **rates, "null": rates}, **selected}
    assert summary_file.wrong_adversary(whole) == ""
    for key, value in (("gold", None), ("finds", 0.0)):
        assert summary_file.wrong_adversary(with_value(whole, ("held_out", "null", key), value)) == ""
    for place in different_places(whole):
        for value in ("x", [1], {"a": 1}, True, float("nan"), 10**299):
            if not (place and isinstance(value_at(whole, place), dict) and isinstance(value, dict)):
                told = summary_file.wrong_adversary(with_value(whole, place, value))
                assert told.startswith(".".join(place)) and "\n" not in told, (place, value)


@pytest.mark.parametrize(
    "row",
    [[1], "text", None, {"success": "high"}, {"success": [1.0]}, {"success": None}, {"ended": 2}, {"loss": True}],
)
def test_metrics_of_an_attack_of_another_type_are_named(tmp_path: Path, row: Any) -> None:
    write_jsonl_atomic(tmp_path / "metrics.jsonl", [{"step": 0, "success": 0.5}, row])
    with pytest.raises(DataError, match=r"metrics\.jsonl:2: not a row of metrics"):
        attack_summary.of_adversary(tmp_path, 1.0)


def test_a_step_with_a_part_of_its_rows_or_with_doubled_ones_is_told(tmp_path: Path) -> None:
    path = tmp_path / "samples.jsonl"
    there = Counter({0: 7, 1: 8})
    assert lost_steps(path, there, range(2), 8).endswith("samples.jsonl: step 0 has 7 of 8 rows")
    assert lost_steps(path, there, range(3), 8).endswith("step 0 has 7 of 8 rows (2 steps from 0 to 2 are wrong)")
    assert lost_steps(path, Counter({0: 16}), range(1), 8) == ""
    recorder: Any = SimpleNamespace(path=path, earlier=Counter({0: 16}))
    with pytest.raises(DataError, match=r"step 0 has 16 of 8 rows: restore the file, or remove "):  # of an attack
        TrajectoryRecorder._check_rows(recorder, 1, RLConfig(prompts_per_step=2, group_size=4))


def test_a_missing_mark_or_manifest_is_a_warning_in_words_of_the_work(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    run = finish(tmp_path / "run")
    mark = (run / "result.json").read_text()
    (run / "result.json").unlink()
    assert results.finished(run, "result.json", again="it is joined again") is None
    (run / "result.json").write_text(mark)
    (run / manifest.NAME).unlink()
    assert results.finished(run, "result.json") == RESULT
    first, second = [record.getMessage() for record in caplog.records if record.name == results.__name__]
    assert first.endswith("result.json is missing, although its files are there: it is joined again")
    assert second.endswith("the files that result.json stands for cannot be checked")
    assert capsys.readouterr().out == ""
