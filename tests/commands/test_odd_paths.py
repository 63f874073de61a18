"""Directories and files with letters beyond ASCII, spaces, quotes and signs of Hydra's grammar, written as they are."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hf_models import tiny_hf

from nemo_advrm import cli
from nemo_advrm.cli import _named_runs
from nemo_advrm.config import load_config, load_flat, schema
from nemo_advrm.config.overrides import quoted
from nemo_advrm.config.schema import SyntheticConfig
from nemo_advrm.data.jsonl import write_jsonl_atomic
from nemo_advrm.errors import ConfigError
from nemo_advrm.synthetic.annotated_pairs import annotated_pairs

pytestmark = pytest.mark.long

ODD = 'modèle 模型 it\'s "x"=(1),{2}:[3] #%~@;&|'
NAMES = [ODD, *ODD.split(" "), "a b", "a=b", "a,b", "$x", "u\u0301", "😀", "1e3", "-x", "+x", "~x", "x?"]
NAMES += [f"a\\{sign}b" for sign in "b\\,=:()[]{} '\""]
NAMES += ["\\\\host\\x", "a\\", "1.50", "1_0", "True", "[a]", "{a}", "(a", "a)"]
SMALL = [
    *("experiment=synthetic", "exp_manager.create_tensorboard_logger=false", "reward_model.reference_features=[]"),
    *("model.num_layers=1", "trainer.max_steps=1", "model.global_batch_size=4", "trainer.val_check_interval=0"),
    "data.validation_fraction=0.2",
]


@pytest.mark.parametrize("name", NAMES)
def test_a_path_means_itself_but_that_a_comma_in_a_list_needs_quotes(name: str) -> None:
    path = f"/data/{name}/f"
    bare = path if name[0] == '"' else name  # a quoted text
    start = f"pretrained_checkpoint.restore_from_path={bare}"
    texts = [f"run_dir={path}", f"data.train_path={bare}", f"model.tokenizer=hf:{path}", start]
    lists = [f"ensemble.members=[ {path},/b , {bare}]", f"data.ignore_columns=[{quoted(path)} , {bare}]"]
    cfg = load_config([*texts, *lists, *_named_runs([path, "./b=c", "seed=3"])], "evaluate")
    assert (cfg.run_dir, cfg.data.train_path, cfg.model.tokenizer) == (path, bare, f"hf:{path}")
    assert cfg.pretrained_checkpoint.restore_from_path == bare
    assert cfg.ensemble.members == [*path.split(","), "/b", *bare.split(",")]
    assert cfg.data.ignore_columns == [path, *bare.split(",")]
    assert (cfg.report.runs, cfg.seed) == ([path, "./b=c"], 3)
    assert load_flat(schema.ConvertConfig, [f"path={path}", "to=hf", f"out={bare}"]).path == path


def _members(text: str) -> list[str]:
    return load_config([f"ensemble.members={text}"], "attack").ensemble.members


def test_a_run_that_report_is_given_means_itself() -> None:
    runs = ["'q", "'q'", '"q', '"q"', "'a,b", 'it\'s "q"', "a\\", "a\\,b", "a,b", "[a]", " a ", "null", "1.50"]
    assert load_config(_named_runs(runs), "report").report.runs == runs


def test_quotes_references_and_null_keep_their_meaning() -> None:
    def read(*settings: str) -> str:
        return load_config([*settings, "name=n"], "sft").run_dir

    assert [read(f"run_dir={text}") for text in ("'a,b'", '"it\'s"', r"'it\'s'", "' a '", "''", " a ")] == [
        *("a,b", "it's", "it's", " a ", "", "a")
    ]
    assert [read(f"run_dir={text}") for text in ("${name}", r"a\b\,/${name}", "it's ${name}")] == [
        *("n", r"a\b\,/n", "it's n")
    ]
    assert read("run_dir=${oc.env:NOT_SET_ANYWHERE,'x,y'}/z") == "x,y/z"
    assert _members("[${oc.env:NOT_SET_ANYWHERE,'x'},\"a,b\" , 'c\\'']") == ["x", "a,b", "c'"]
    assert _members("[]") == _members("[ ]") == []
    for wrong in ("run_dir=null", "run_dir='q", "run_dir='q'r", "ensemble.members=[a,]", "ensemble.members=['q,/b]"):
        with pytest.raises(ConfigError, match=wrong[: wrong.index("=")]):
            load_config([wrong], "attack")


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
