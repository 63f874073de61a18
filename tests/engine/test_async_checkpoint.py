"""Saving in the background: a snapshot of its step, complete or absent, with failures told to all ranks and no hang."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import async_jobs
import checkpoint_jobs
import pytest
import torch
from distributed import Worlds

from nemo_advrm.engine import checkpoint
from nemo_advrm.engine.runtime import Layout, Runtime

LAYOUTS: dict[str, tuple[Layout, dict[str, Any]]] = {
    "tp2": (Layout(tensor=2), {}),
    "pp2": (Layout(pipeline=2), {}),
    "dp2_distributed_optimizer": (Layout(), {"use_distributed_optimizer": True}),
}


@pytest.fixture
def before(single: Runtime, tmp_path: Path) -> Path:
    """A checkpoint that is to be replaced."""
    path = tmp_path / "checkpoint"
    checkpoint_jobs.train_and_save(str(path), 1)
    return path


@pytest.mark.platform
@pytest.mark.parametrize("name", LAYOUTS)
def test_training_goes_on_while_the_weights_and_optimizer_of_the_step_are_written(
    worlds: Worlds, tmp_path: Path, name: str
) -> None:
    layout, model = LAYOUTS[name]
    home = str(tmp_path)
    told = worlds.run(layout, "async_jobs", "save_both_ways", world_size=2, home=home, **model)
    assert told == [(True, True, 0)] * 2
    waiting, background = tmp_path / "waiting", tmp_path / "background"
    names = [
        sorted(p.relative_to(home).as_posix() for p in home.rglob("*") if p.is_file()) for home in (waiting, background)
    ]
    assert names[0] == names[1] and "reward_model/manifest.json" in names[0]
    first, second = (async_jobs.contents(path / "reward_model") for path in (waiting, background))
    assert first.keys() == second.keys()
    tensors = [key for key, value in first.items() if torch.is_tensor(value)]
    assert sum("exp_avg_sq" in key for key in tensors) > 10 and any("decoder" in key for key in tensors)
    assert all(torch.equal(first[key], second[key]) for key in tensors)
    assert all(first[key] == second[key] for key in first.keys() - set(tensors) if key.startswith("common/"))
    for file in ("trainer.json", "reward_model/meta.json"):
        assert (waiting / file).read_text() == (background / file).read_text()


@pytest.mark.platform
@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("while_writing", [True, False], ids=["tensors", "what_completes_it"])
def test_a_failed_background_write_is_the_error_of_all_ranks_and_leaves_the_checkpoint_before(
    worlds: Worlds, before: Path, rank: int, while_writing: bool
) -> None:
    files = {p: p.read_bytes() for p in before.rglob("*") if p.is_file()}
    kwargs = {"path": str(before), "rank": rank, "while_writing": while_writing}
    told = worlds.run(Layout(tensor=2), "async_jobs", "fail_in_background", **kwargs)
    if rank == 1 and not while_writing:  # rank 0 alone completes a checkpoint
        assert told == [("", False, 0)] * 2
        return
    messages = {message for message, _, _ in told}
    (message,) = messages
    assert (
        message.startswith(f"{before}: could not be written (") and "the checkpoint before it is untouched" in message
    )
    assert f"rank {rank}: " in message or not while_writing
    assert [rest for _, *rest in told] == [[False, 0], [True, 0]]  # the first tells it for all
    assert {p: p.read_bytes() for p in before.parent.rglob("*") if p.is_file()} == files


@pytest.mark.parametrize(
    ("file", "reason"), [("common.pt", "No space left on device"), ("meta.json", "Input/output error")]
)
def test_a_file_that_only_the_first_rank_writes_or_reads_fails_on_all(
    worlds: Worlds, before: Path, file: str, reason: str
) -> None:
    files = {p: p.read_bytes() for p in before.rglob("*") if p.is_file()}
    told = worlds.run(Layout(tensor=2), "async_jobs", "fail_on_first_rank", path=str(before), file=file)
    for message, _, threads in told:
        assert message.startswith(f"{before}: could not be written (") and reason in message and threads == 0
    assert told[0][0] == told[1][0] and told[1][1]  # so that it is told once
    assert {p: p.read_bytes() for p in before.parent.rglob("*") if p.is_file()} == files


def test_a_rank_whose_file_system_does_not_answer_is_named_within_the_limit(worlds: Worlds, tmp_path: Path) -> None:
    path = tmp_path / "checkpoint"
    told = worlds.run(Layout(tensor=2), "async_jobs", "one_rank_never_ends", path=str(path), rank=1)
    for message, seconds, threads in told:
        assert message.startswith(f"{path}: could not be written (rank 1 is still writing after 0.02 minutes)")
        assert 1 < seconds < 30 and threads == 0
    assert list(tmp_path.iterdir()) == []


def test_a_save_that_is_given_up_leaves_no_thread_and_no_file(worlds: Worlds, tmp_path: Path) -> None:
    assert worlds.run(Layout(tensor=2), "async_jobs", "drop", path=str(tmp_path)) == [0, 0]
    assert list(tmp_path.iterdir()) == []


def test_a_copy_that_does_not_fit_into_memory_is_told(
    single: Runtime, before: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_memory(tensors: list[Any], copy: bool) -> None:
        torch.empty(1 << 60, dtype=torch.uint8)

    monkeypatch.setattr("nemo_advrm.engine.file_writers._to_host", no_memory)
    kept = shutil.copytree(before, before.with_name("kept"))
    model = checkpoint_jobs.reward_model().model
    saving = checkpoint.Saving(before, model, in_background=True)
    with pytest.raises(checkpoint.CheckpointError, match=r"could not be written \(rank 0: .*(memory|alloc)"):
        saving.finish(limit_minutes=1)
    assert checkpoint.read_meta(before) == checkpoint.read_meta(kept)
    assert sorted(p.name for p in before.parent.iterdir()) == ["checkpoint", "kept"]
