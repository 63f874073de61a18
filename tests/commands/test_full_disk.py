"""A training whose disk is full ends with one error, and goes on from its last checkpoint, with smaller microbatches
too."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from nemo_advrm.commands import train_rm
from nemo_advrm.config import load_config
from nemo_advrm.config.schema import SyntheticConfig
from nemo_advrm.data.jsonl import write_jsonl_atomic
from nemo_advrm.engine.runtime import Runtime
from nemo_advrm.errors import CheckpointError, ConfigError
from nemo_advrm.synthetic.annotated_pairs import annotated_pairs

pytestmark = pytest.mark.long

STEPS = 6


def _mount(directory: Path, *options: str) -> bool:
    command = ["mount", "-t", "tmpfs", "-o", ",".join(options), "none", str(directory)]
    try:
        return subprocess.run(command, capture_output=True, timeout=30).returncode == 0
    except OSError:
        return False


def _size(directory: Path) -> int:
    return sum(p.stat().st_blocks * 512 for p in directory.rglob("*"))


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of its own, of 64 MiB."""
    directory = tmp_path / "disk"
    directory.mkdir()
    if not _mount(directory, "size=64m"):
        pytest.skip("mounting a tmpfs needs privileges that this process lacks")
    yield directory
    subprocess.run(["umount", "--lazy", str(directory)], check=True, timeout=30)


def _train(run_dir: Path, data: Path, *overrides: str) -> list[dict[str, float]]:
    """Train a reward model that saves after every second step; its rows of metrics.jsonl."""
    fixed = [
        "experiment=synthetic",
        "reward_model.reference_features=[]",
        "exp_manager.create_tensorboard_logger=false",
        f"data.train_path={data}",
        "data.validation_fraction=0.2",
        f"trainer.max_steps={STEPS}",
        "trainer.checkpoint_every_n_steps=2",
        "trainer.keep_checkpoints=1",
        "model.global_batch_size=8",
        "model.hidden_dropout=0.0",  # which units drop out depends on the microbatches
        "model.attention_dropout=0.0",
        f"run_dir={run_dir}",
    ]
    train_rm.main(load_config([*fixed, *overrides], "train_rm"))
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("save", [[], ["trainer.async_checkpoint=true"]], ids=["waiting", "background"])
def test_a_full_disk_ends_with_one_error_and_the_run_goes_on_with_smaller_microbatches(
    single: Runtime, small_disk: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], save: list[str]
) -> None:
    data = tmp_path / "pairs.jsonl"
    write_jsonl_atomic(data, annotated_pairs(40, 1, SyntheticConfig()))
    unbroken = _train(tmp_path / "unbroken", data)

    # room for one training checkpoint (weights and twice as much of optimizer state), not for a second one beside it
    weights = _size(tmp_path / "unbroken" / "model")
    filler = small_disk / "filler"
    filler.write_bytes(b"0" * ((64 << 20) - int(4.5 * weights)))
    run_dir = small_disk / "run"
    told = r"step_00000004.*: could not be written \(.*(disk full\?|No space left).*\); the checkpoint before it is unt"
    with pytest.raises(CheckpointError, match=told):
        _train(run_dir, data, *save)
    assert [p.name for p in (run_dir / "checkpoints").iterdir()] == ["step_00000002"]

    filler.unlink()
    with pytest.raises(ConfigError, match=r"holds a run with model\.global_batch_size=8, but now .*=4"):
        _train(run_dir, data, "model.global_batch_size=4")
    capsys.readouterr()
    assert "micro_batch_size" not in (run_dir / "versions.yaml").read_text()
    metrics = _train(run_dir, data, *save, "model.micro_batch_size=1")
    printed = capsys.readouterr().out
    (change,) = yaml.safe_load((run_dir / "versions.yaml").read_text())["changes"]
    assert (change["key"], change["to"]) == ("model.micro_batch_size", 1)
    assert f"goes on with model.micro_batch_size=1 (before: {change['from']})" in printed
    assert [row["step"] for row in metrics] == [row["step"] for row in unbroken]
    for mine, expected in zip(metrics, unbroken, strict=True):
        for key in {"train/loss", "val/loss"} & expected.keys():
            assert mine[key] == pytest.approx(expected[key], rel=1e-4), mine["step"]
    assert any("val/loss" in row for row in metrics)
