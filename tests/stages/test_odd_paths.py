"""Directories and files with letters beyond ASCII, spaces, quotes and signs of Hydra's grammar, written as they are."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hf_models import tiny_hf

from nemo_advrm import cli, schema
from nemo_advrm.cli import _named_runs
from nemo_advrm.config import load_config
from nemo_advrm.data.jsonl import write_jsonl_atomic
from nemo_advrm.schema import SyntheticConfig
from nemo_advrm.settings import parse_settings
from nemo_advrm.synthetic.preferences import annotated_pairs

ODD = "modèle 模型 it's \"x\"=(1),{2}:[3] #%~@;&|"
NAMES = [ODD, *ODD.split(" "), "a b", "a=b", "a,b", "a\\b", "$x", "u\u0301", "😀", "1e3", "-x", "+x", "~x", "x?"]
SMALL = [
    *("experiment=synthetic", "exp_manager.create_tensorboard_logger=false", "reward_model.reference_features=[]"),
    *("model.num_layers=1", "trainer.max_steps=1", "model.global_batch_size=4", "trainer.val_check_interval=0"),
    "data.validation_fraction=0.2",
]


@pytest.mark.parametrize("name", NAMES)
def test_a_path_means_itself(name: str) -> None:
    path = f"/data/{name}/f"
    cfg = load_config([f"run_dir={path}", f"data.train_path={path}", f"model.tokenizer=hf:{path}"], "train_rm")
    assert (cfg.run_dir, cfg.data.train_path, cfg.model.tokenizer) == (path, path, f"hf:{path}")
    start = load_config([f"pretrained_checkpoint.restore_from_path={path}"], "evaluate")
    assert start.pretrained_checkpoint.restore_from_path == path
    assert parse_settings(schema.ConvertConfig, [f"path={path}", "to=hf", f"out={path}.d"]).path == path
    assert load_config(_named_runs([path, "./b=c", "seed=3"]), "report").report.runs == [path, "./b=c"]


@pytest.mark.parametrize("name", NAMES)
def test_a_path_in_a_list_means_itself_but_that_a_comma_needs_quotes(name: str) -> None:
    path = f"/data/{name}/f"
    if "," in name:
        quoted = path.replace("'", "\\'")
        assert load_config([f"ensemble.members=['{quoted}',/b]"], "attack").ensemble.members == [path, "/b"]
        return
    assert load_config([f"ensemble.members=[{path},/b]"], "attack").ensemble.members == [path, "/b"]


def test_commands_write_into_such_directories_and_read_from_them(
    single: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("nemo_advrm.report.figures.draw_figures", lambda *args: {})
    home = Path(ODD)
    write_jsonl_atomic(home / "pairs é.jsonl", annotated_pairs(20, 1, SyntheticConfig()))
    data, run = f"data.train_path={home / 'pairs é.jsonl'}", home / "rm, 1"
    assert cli.main(["train_rm", *SMALL, data, f"run_dir={run}"]) == 0
    first = capsys.readouterr().out
    assert cli.main(["train_rm", *SMALL, data, f"run_dir={run}"]) == 0  # it is the same run
    assert first.splitlines()[-1] == capsys.readouterr().out.splitlines()[-1] == f"reward model: {run / 'model'}"
    start = f"pretrained_checkpoint.restore_from_path={run / 'model'}"
    assert cli.main(["evaluate", *SMALL, start, f"data.validation_path={home / 'pairs é.jsonl'}"]) == 0
    tiny_hf("llama2", num_hidden_layers=1).save_pretrained(home / "hf, é")
    ours, back = home / "unser, é", home / "zurück"
    assert cli.main(["convert", "from=hf", f"path={home / 'hf, é'}", "to=megatron", f"out={ours}"]) == 0
    assert cli.main(["convert", "from=megatron", f"path={ours}", "to=hf", f"out={back}"]) == 0
    assert json.loads((back / "config.json").read_text())["num_hidden_layers"] == 1
    assert cli.main(["stages", "experiment=synthetic", f"run_dir={run}"]) == 0
    (run / "state.json").write_text('{"stages": {}}')
    assert cli.main(["report", f"./{run}"]) == 0
    assert (run / "report" / "index.html").is_file()
    assert "Traceback" not in capsys.readouterr().err


def test_what_is_missing_below_such_a_path_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / ODD / "pairs.jsonl"
    assert cli.main(["train_rm", *SMALL, f"data.train_path={path}", f"run_dir={tmp_path / ODD}"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"error: {path}: no such file")
