"""Bad input ends with one clear error, before training and with nothing written."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from nemo_advrm import cli

GOOD = {"prompt": "hello", "chosen": "a good answer", "rejected": "a bad answer"}
TINY = ["model=tiny", "model.num_layers=1", "model.hidden_size=32", "model.ffn_hidden_size=64"]
SMALL = [*TINY, "model.global_batch_size=4", "trainer.max_steps=2", "exp_manager.create_tensorboard_logger=false"]


def rows(count: int) -> list[dict]:
    return [{"prompt": f"question {i}", "chosen": f"good {i}", "rejected": f"bad {i}"} for i in range(count)]


def write(path: Path, lines: list) -> Path:
    path.write_text("".join((x if isinstance(x, str) else json.dumps(x)) + "\n" for x in lines))
    return path


def fails(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    assert cli.main(list(arguments)) == 2
    message = capsys.readouterr().err.strip()
    assert message.startswith("error: ") and "\n" not in message
    return message


@pytest.mark.parametrize(
    ("bad", "words"),
    [
        ({"prompt": "x", "chosen": "y"}, ["`rejected`"]),
        ({"prompt": "x", "chosen": "", "rejected": "y"}, ["`chosen`", "empty"]),
        ({"prompt": "x", "chosen": "y", "rejected": "y"}, ["identical"]),
        ('{"prompt": "x", "chosen"', ["broken JSON"]),
    ],
)
def test_a_bad_row_is_named_by_file_and_line(tmp_path: Path, capsys, bad, words: list[str]) -> None:
    data = write(tmp_path / "pairs.jsonl", [*rows(4), bad, *rows(3)])
    message = fails(capsys, "train_rm", *SMALL, f"data.train_path={data}", f"run_dir={tmp_path / 'run'}")
    assert f"{data}:5" in message
    assert all(word in message for word in words)
    assert not (tmp_path / "run").exists()


def test_bad_rows_are_counted_and_left_out_when_asked(tmp_path: Path, capsys) -> None:
    data = write(tmp_path / "pairs.jsonl", [*rows(30), {"prompt": "x", "chosen": "y"}, "{"])
    arguments = ["train_rm", *SMALL, f"data.train_path={data}", "data.validation_fraction=0.2"]
    assert cli.main([*arguments, "data.on_bad_row=skip", f"run_dir={tmp_path / 'run'}"]) == 0
    out = capsys.readouterr().out
    assert "30 rows, skipped 2" in out
    assert "accuracy" in out


def test_a_sequence_longer_than_the_context_is_named(tmp_path: Path, capsys) -> None:
    data = write(tmp_path / "pairs.jsonl", [*rows(20), {**GOOD, "chosen": "long " * 40}])
    short = [*SMALL, "model.encoder_seq_length=64"]
    message = fails(capsys, "train_rm", *short, f"data.train_path={data}", f"run_dir={tmp_path / 'run'}")
    assert f"{data}:21" in message and "64" in message and "model.encoder_seq_length" in message
    assert not (tmp_path / "run").exists()


def test_a_misspelt_key_names_the_nearest(tmp_path: Path, capsys) -> None:
    message = fails(capsys, "train_rm", "model.optim.learning_rate=1", f"run_dir={tmp_path / 'run'}")
    assert "model.optim.learning_rate" in message and "model.optim" in message


def test_a_missing_file_is_named(tmp_path: Path, capsys) -> None:
    message = fails(capsys, "train_rm", *SMALL, f"data.train_path={tmp_path / 'none.jsonl'}")
    assert "none.jsonl" in message


def test_a_layout_that_does_not_divide_the_model_is_named(tmp_path: Path, capsys) -> None:
    message = fails(capsys, "train_rm", *SMALL, "model.num_attention_heads=4", "model.tensor_model_parallel_size=3")
    assert "tensor_model_parallel_size" in message


def test_a_missing_checkpoint_is_named_and_nothing_is_written(tmp_path: Path, capsys) -> None:
    data = write(tmp_path / "pairs.jsonl", rows(20))
    message = fails(
        capsys,
        "train_rm",
        *SMALL,
        f"data.train_path={data}",
        f"pretrained_checkpoint.restore_from_path={tmp_path / 'nowhere'}",
        f"run_dir={tmp_path / 'run'}",
    )
    assert "nowhere" in message
    assert not (tmp_path / "run").exists()


def test_a_directory_that_holds_another_run_is_not_overwritten(tmp_path: Path, capsys) -> None:
    data = write(tmp_path / "pairs.jsonl", rows(20))
    arguments = ["train_rm", *SMALL, f"data.train_path={data}", "data.validation_fraction=0.2"]
    arguments.append(f"run_dir={tmp_path / 'run'}")
    assert cli.main(arguments) == 0
    before = {p: p.stat().st_mtime_ns for p in (tmp_path / "run").rglob("*") if p.is_file()}
    capsys.readouterr()
    message = fails(capsys, *arguments, "reward_model.centering_coefficient=0.5")
    assert "reward_model.centering_coefficient" in message
    assert cli.main(arguments) == 0, "the same run again is finished and reports its result"
    assert "accuracy" in capsys.readouterr().out
    assert {p: p.stat().st_mtime_ns for p in (tmp_path / "run").rglob("*") if p.is_file()} == before


def test_a_loss_that_is_not_finite_stops_with_its_step(tmp_path: Path, capsys) -> None:
    data = write(tmp_path / "pairs.jsonl", rows(20))
    message = fails(
        capsys,
        "train_rm",
        *SMALL,
        "model.optim.lr=1e30",
        "trainer.max_steps=6",
        "trainer.gradient_clip_val=0",
        "trainer.checkpoint_every_n_steps=1",
        f"data.train_path={data}",
        "data.validation_fraction=0.2",
        f"run_dir={tmp_path / 'run'}",
    )
    assert "step" in message and ("nan" in message or "inf" in message)
    assert not (tmp_path / "run" / "model").exists()


def test_an_attack_needs_two_members_and_a_policy(tmp_path: Path, capsys) -> None:
    assert "ensemble.members" in fails(capsys, "attack", *TINY, f"run_dir={tmp_path / 'run'}")
    message = fails(capsys, "attack", *TINY, "ensemble.members=[a,b]", f"run_dir={tmp_path / 'run'}")
    assert "pretrained_checkpoint.restore_from_path" in message


def test_a_pipeline_of_regression_models_is_refused_before_it_starts(tmp_path: Path, capsys) -> None:
    data = write(tmp_path / "pairs.jsonl", rows(8))
    settings = [f"data.train_path={data}", "pipeline.sft=true"]
    regression = ["reward_model.loss=regression", "reward_model.num_attributes=2"]
    message = fails(capsys, "pipeline", *SMALL, *settings, *regression, f"run_dir={tmp_path / 'run'}")
    assert "reward_model.loss=regression" in message and "no labels" in message
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("command", "members", "gold", "named"),
    [
        ("rlhf", "human:a.csv", "", "ensemble.members[0]=human:a.csv"),
        ("attack", "python:toy_judge:by_length,python:toy_judge:by_length", "human", "pipeline.gold=human"),
        ("serve", "human:a.csv", "", "ensemble.members[0]=human:a.csv"),
    ],
)
def test_people_are_refused_where_every_step_needs_scores(
    capsys, command: str, members: str, gold: str, named: str
) -> None:
    settings = [f"ensemble.members=[{members}]", f"pipeline.gold={gold}"]
    message = fails(capsys, command, *settings, "pretrained_checkpoint.restore_from_path=x")
    assert f"{named}: {command} scores new responses at any time" in message
