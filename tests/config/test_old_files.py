"""Files that version 0.1.0 wrote are read by today's commands (tests/old_files)."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import yaml
from omegaconf import OmegaConf

from nemo_advrm import cli
from nemo_advrm.config.moved import current_config
from nemo_advrm.config.schema import Config
from nemo_advrm.data.pair_store import PairStore
from nemo_advrm.data.sft_scores import SFTScores

FILES = Path(__file__).resolve().parents[1] / "old_files"
RUN = FILES / "run"


def rows(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_the_configuration_of_a_run_is_read_under_the_present_keys() -> None:
    plain = current_config(yaml.safe_load((RUN / "config.yaml").read_text()))
    cfg = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(Config), plain))
    assert isinstance(cfg, Config)
    assert cfg.sft_statistics.num_prompts == 2 and cfg.sft_statistics.samples_per_prompt == 3
    assert cfg.adversarial.target_members == [1] and cfg.adversarial.num_adversaries == 1


def test_sft_responses_and_pairs_are_read() -> None:
    assert SFTScores.read(RUN / "reference.jsonl").scores_PNK.shape == (2, 3, 2)
    assert len(PairStore(RUN / "pairs.jsonl").to_preferences()) == len(rows(RUN / "pairs.jsonl")) == 2


def test_the_samples_of_an_attack_are_selected_from(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Every one of the four is looked at; those of an untrained byte model are no text."""
    shutil.copytree(RUN, tmp_path / "run")
    settings = ["selection.threshold_z=-99", "selection.require_ended=false", "model=tiny"]
    assert cli.main(["select", f"run_dir={tmp_path / 'run'}", *settings]) == 0, capsys.readouterr().err
    assert "2 not qualified, 2 not text" in capsys.readouterr().out


@pytest.mark.platform
def test_a_checkpoint_is_converted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["convert", "from=megatron", f"path={FILES / 'checkpoint'}", "to=hf", f"out={tmp_path / 'hf'}"]
    assert cli.main(words) == 0, capsys.readouterr().err
    assert (tmp_path / "hf" / "model.safetensors").exists()


@pytest.mark.platform
def test_a_nemo_file_is_converted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["convert", "from=nemo", f"path={FILES / 'reward_model.nemo'}", "to=megatron", f"out={tmp_path / 'out'}"]
    assert cli.main(words) == 0, capsys.readouterr().err
    assert (tmp_path / "out" / "meta.json").exists()
