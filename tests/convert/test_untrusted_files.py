"""Files from strangers: what they claim is compared with what is there, and nothing in them is run or replaced."""

from __future__ import annotations

import io
import json
import shutil
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import pytest
from reward_members import save_hf_reward, save_megatron
from tiny import tiny_config

from nemo_advrm import cli
from nemo_advrm.convert.conversion import _config_facts
from nemo_advrm.data.nemo_tokenizer import NemoTokenizer
from nemo_advrm.data.reading import ReadingRule, rule_from_hf_config
from nemo_advrm.data.tokenizers import build_tokenizer
from nemo_advrm.engine import checkpoint, manifest
from nemo_advrm.engine.runtime import Runtime
from nemo_advrm.errors import CheckpointError, DataError, UserError
from nemo_advrm.rewards.sources import load_members
from nemo_advrm.untrusted_files import parse_yaml, read_json_object

DEEP, LONG = "[" * 100_000, "9" * 5_000


@pytest.fixture(scope="module")
def saved(single: Runtime, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_megatron(tmp_path_factory.mktemp("untrusted") / "rm")


@pytest.fixture
def ours(saved: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(saved, tmp_path / "rm"))


@pytest.fixture(scope="module")
def hf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_hf_reward(tmp_path_factory.mktemp("untrusted_hf") / "rm")


@pytest.mark.parametrize("text", [DEEP, f'{{"a": {LONG}}}', "[1]", '{"a"', "\ud83d"])
def test_a_file_that_is_no_json_object_is_one_error(tmp_path: Path, text: str) -> None:
    path = tmp_path / "meta.json"
    path.write_text(text, encoding="utf-8", errors="surrogatepass")
    with pytest.raises(CheckpointError, match=r"meta\.json: not (JSON|a JSON object)") as caught:
        read_json_object(path)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 500


# ten references to ten references to ...
GROWS = "a: &a [x,x,x,x,x,x,x,x,x,x]\n" + "".join(
    f"{name}: &{name} [{','.join(['*' + before] * 10)}]\n" for before, name in pairwise("abcdefghij")
)


@pytest.mark.parametrize(
    "text",
    [DEEP, f"a: {LONG}", "a: *b", "- 1", "a: &a [x, *a]", "a: !!python/object/apply:os.system [ls]", GROWS],
)
def test_yaml_that_is_no_plain_mapping_or_grows_by_itself_is_one_error(text: str) -> None:
    with pytest.raises(CheckpointError, match="config"):
        parse_yaml(text.encode(), "config")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"head": ["reward"]}, "head is a list, a text was expected"),
        ({"head": "tail"}, "head is 'tail', not one of lm, reward, value"),
        ({"format": "1"}, "format is '1', a whole number was expected"),
        ({"vocab_size": -1}, "vocab_size is -1"),
        ({"vocab_size": True}, "vocab_size is True, a whole number was expected"),
        ({"head_outputs": 10**60}, "head_outputs is"),
        ({"model": []}, "model is a list, an object was expected"),
        ({"tokenizer": {"a": 1}}, "tokenizer is a dict, a text was expected"),
        ({"has_optimizer": "yes"}, "has_optimizer is 'yes', true or false was expected"),
        ({"tokenizer_spec": "${oc.env:HOME}"}, "which is not allowed"),
        ({"conversion": {"deep": [{"license": "${oc.env:HOME}"}]}}, "which is not allowed"),
        ({"model.num_layers": "4"}, "model.num_layers is '4', a whole number was expected"),
        ({"model.num_layers": 0}, "model.num_layers is 0, which no model has"),
        ({"model.rotary_base": "x"}, "model.rotary_base is 'x', a number was expected"),
        ({"model.rotary_base": 10**200}, "model.rotary_base is a number of more than 60 digits"),
        ({"model.layernorm_epsilon": float("nan")}, "model.layernorm_epsilon is nan"),
        ({"model.activation": "exec"}, "model.activation is 'exec', not one of"),
        ({"model.optim": {"betas": [0.9, "x"]}}, "model.optim.betas"),
        ({"model.optim": {"sched": 3}}, "model.optim.sched is 3, an object was expected"),
    ],
)
def test_a_value_of_the_description_that_no_checkpoint_has_is_named(ours: Path, changes: dict, words: str) -> None:
    meta = json.loads((ours / "meta.json").read_text())
    for key, value in changes.items():
        section, _, name = key.partition(".")
        (meta[section] if name else meta)[name or section] = value
    (ours / "meta.json").write_text(json.dumps(meta))
    with pytest.raises(CheckpointError) as caught:
        checkpoint.read_meta(ours)
    assert words in str(caught.value) and "meta.json" in str(caught.value)


@pytest.mark.parametrize("key", ["num_layers", "hidden_size", "ffn_hidden_size", "kv_channels", "num_attention_heads"])
def test_a_described_model_larger_than_its_weights_is_refused_before_it_is_built(ours: Path, key: str) -> None:
    meta = json.loads((ours / "meta.json").read_text())
    meta["model"][key] = 10**9
    (ours / "meta.json").write_text(json.dumps(meta))
    refusal = r"describes a model of \d+ parameters, its weights have \d+|attention heads"
    with pytest.raises(CheckpointError, match=refusal):
        load_members(tiny_config(), [str(ours)])


@pytest.mark.parametrize(
    ("key", "value"),
    [("num_hidden_layers", 10**9), ("vocab_size", 10**9), ("hidden_size", 2**20), ("intermediate_size", 10**10),
     ("max_position_embeddings", 10**40), ("attn_implementation", "somebody/kernel")],
)  # fmt: skip
def test_a_hugging_face_model_larger_than_its_weights_is_refused_before_it_is_built(
    hf: Path, tmp_path: Path, single: Runtime, key: str, value: object
) -> None:
    copy = Path(shutil.copytree(hf, tmp_path / "rm"))
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(config | {key: value}))
    with pytest.raises(CheckpointError, match=r"config\.json|rm: could not be read"):
        load_members(tiny_config(), [f"hf:{copy}"])


@pytest.fixture
def with_code(hf: Path, tmp_path: Path) -> tuple[Path, Path]:
    """A model directory that brings its own code, and the file that exists once that has run."""
    copy, mark = Path(shutil.copytree(hf, tmp_path / "rm")), tmp_path / "ran"
    code = f"from pathlib import Path\nPath({str(mark)!r}).touch()\nclass C: pass\n"
    (copy / "custom.py").write_text(code + "MyConfig = MyModel = MyTokenizer = C\n")
    config = json.loads((copy / "config.json").read_text())
    names = {"AutoConfig": "custom.MyConfig", "AutoModelForSequenceClassification": "custom.MyModel"}
    (copy / "config.json").write_text(json.dumps(config | {"auto_map": names, "model_type": "custom"}))
    tokenizer = json.loads((copy / "tokenizer_config.json").read_text())
    (copy / "tokenizer_config.json").write_text(
        json.dumps(tokenizer | {"auto_map": {"AutoTokenizer": ["custom.MyTokenizer", None]}, "tokenizer_class": "My"})
    )
    return copy, mark


def test_code_of_a_model_directory_is_not_run_whatever_is_answered(
    with_code: tuple[Path, Path], tmp_path: Path, single: Runtime, monkeypatch: pytest.MonkeyPatch
) -> None:
    copy, mark = with_code
    monkeypatch.setattr("sys.stdin", io.StringIO("y\n" * 1000))
    with pytest.raises(UserError) as caught:
        load_members(tiny_config(), [f"hf:{copy}"])
    assert "\n" not in str(caught.value)
    assert cli.main(["convert", "from=hf", f"path={copy}", "to=megatron", f"out={tmp_path / 'out'}"]) == 2
    with pytest.raises(UserError):
        build_tokenizer(f"hf:{copy}")
    assert not mark.exists()


@pytest.mark.long
def test_a_command_behind_yes_runs_no_code_and_asks_nothing(with_code: tuple[Path, Path], tmp_path: Path) -> None:
    copy, mark = with_code
    rows = tmp_path / "pairs.jsonl"
    rows.write_text('{"prompt": "this river", "chosen": "birds sing .", "rejected": "birds sing"}\n' * 4)
    command = ["evaluate", f"data.train_path={rows}", f"ensemble.members=[hf:{copy}]", f"run_dir={tmp_path / 'run'}"]
    code = "from nemo_advrm.cli import main; raise SystemExit(main())"
    done = subprocess.run(
        [sys.executable, "-c", code, *command, "trainer.accelerator=cpu"],
        input="y\n" * 1000,  # through a pipe, as of ``yes |``
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 2, done.stderr
    assert done.stderr.splitlines()[-1].startswith("error: ") and str(copy) in done.stderr
    assert "[y/N]" not in done.stdout + done.stderr and "Traceback" not in done.stderr
    assert not mark.exists()


def test_what_stands_in_the_configuration_beside_a_checkpoint_is_not_resolved(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SECRET", "hunter2")
    path = tmp_path / "config.yaml"
    path.write_text("data:\n  train_path: ${oc.env:SECRET}\npretrained_checkpoint:\n  _target_: os.system\n")
    assert _config_facts(path) == {"data": "${oc.env:SECRET}"}


@pytest.mark.parametrize(
    "text",
    [
        DEEP,
        "[]",
        "{}",
        '{"library": ["sentencepiece"]}',
        '{"library": "sentencepiece", "special_tokens": 5}',
        '{"library": "sentencepiece", "special_tokens": {"eos_token": 5}}',
        # found at every place of every text, without end
        '{"library": "sentencepiece", "legacy": true, "special_tokens": [""]}',
    ],
)
def test_settings_of_a_tokenizer_that_no_nemo_has_are_one_error(tmp_path: Path, text: str) -> None:
    (tmp_path / "tokenizer_nemo.json").write_text(text)
    with pytest.raises(DataError, match=r"not a tokenizer of a \.nemo.*tokenizer_nemo\.json"):
        NemoTokenizer(tmp_path)


def test_a_config_that_cannot_be_read_says_nothing_of_a_rule(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(DEEP)
    assert rule_from_hf_config(tmp_path) == ReadingRule()


_HASH = "0" * 64


def listing(name: str, size: str = "1") -> str:
    return f'{{"files": {{{json.dumps(name)}: {{"size": {size}, "sha256": "{_HASH}"}}}}}}'


@pytest.mark.parametrize(
    "text",
    [
        DEEP,
        listing("a", "Infinity"),
        listing("a", LONG),
        listing("\0"),
        listing("\ud800"),
        listing("/etc/manifest.json"),
        listing("../manifest.json"),
        listing("x" * 5_000),
    ],
)
def test_a_list_of_files_that_no_checkpoint_has_is_damage(tmp_path: Path, text: str) -> None:
    (tmp_path / "manifest.json").write_text(text)
    assert "cannot be read: " in str(manifest.wrong_size(tmp_path))


def test_a_list_of_files_that_lists_itself_is_damage(tmp_path: Path) -> None:
    (tmp_path / "manifest.json").write_text(listing("itself/manifest.json"))
    (tmp_path / "itself").symlink_to(".")
    assert manifest.wrong_size(tmp_path)


def test_weights_of_another_name_than_those_that_are_checked_are_refused(hf: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(hf, tmp_path / "rm"))
    shutil.copy(copy / "model.safetensors", copy / "consolidated.safetensors")
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(config | {"transformers_weights": "consolidated.safetensors"}))
    with pytest.raises(CheckpointError, match=r"config\.json: names a file of weights \(transformers_weights\)"):
        load_members(tiny_config(), [f"hf:{copy}"])
