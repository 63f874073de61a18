"""``save_to`` and ``restore_from``: our own models come back with equal scores at any layout, and nothing else does."""

from __future__ import annotations

import io
import pickle
import shutil
import tarfile
from pathlib import Path
from typing import Any

import nemo_model_jobs as jobs
import pytest
import torch
import yaml
from distributed import Worlds
from test_nemo_archive import REAL, _Evil
from tiny import pairs, tiny_config

from nemo_advrm import cli
from nemo_advrm.convert.nemo_file import NemoSource
from nemo_advrm.engine.runtime import Layout, Runtime
from nemo_advrm.errors import CheckpointError
from nemo_advrm.models.language_model import SupervisedModel
from nemo_advrm.models.policy import PolicyModel
from nemo_advrm.models.reward_model import RewardModel
from nemo_advrm.models.trainable import TrainableModel


@pytest.mark.parametrize("architecture", ["llama", "gpt"])
def test_a_reward_model_comes_back_with_its_scores(
    single: Runtime, worlds: Worlds, architecture: str, tmp_path: Path
) -> None:
    path = tmp_path / "rm.nemo"
    wanted = jobs.save(str(path), architecture)
    assert wanted.std() > 0.05
    assert [file.name for file in tmp_path.iterdir()] == ["rm.nemo"]
    assert torch.equal(jobs.restored_scores(str(path)), wanted)
    for layout in (Layout(tensor=2), Layout(pipeline=2), Layout(context=2)):
        for there in worlds.run(layout, "nemo_model_jobs", "restored_scores", path=str(path)):
            torch.testing.assert_close(there, wanted, rtol=1e-5, atol=1e-5)
    assert [file.name for file in tmp_path.iterdir()] == ["rm.nemo"]


@pytest.mark.parametrize("layout", [Layout(tensor=2), Layout(context=2)], ids=["tp2", "cp2"])
def test_a_model_written_by_two_ranks_is_opened_by_one(
    single: Runtime, worlds: Worlds, tmp_path: Path, layout: Layout
) -> None:
    path = tmp_path / "rm.nemo"
    wanted = worlds.run(layout, "nemo_model_jobs", "save", path=str(path))[0]
    torch.testing.assert_close(jobs.restored_scores(str(path)), wanted, rtol=1e-5, atol=1e-5)


def test_a_policy_comes_back_and_saves_again(single: Runtime, tmp_path: Path) -> None:
    wanted = jobs.save_policy(str(tmp_path / "a.nemo"))
    PolicyModel.restore_from(str(tmp_path / "a.nemo")).save_to(str(tmp_path / "b.nemo"))
    found = jobs.restored_policy(str(tmp_path / "b.nemo"))
    assert found.keys() == wanted.keys() and all(torch.equal(found[k], v) for k, v in wanted.items())


def test_a_restored_model_can_be_trained(single: Runtime, tmp_path: Path) -> None:
    jobs.save(str(tmp_path / "rm.nemo"))
    rows = pairs(8)
    model = RewardModel.restore_from(str(tmp_path / "rm.nemo"), tiny_config(), train_rows=rows, seed=5)
    before = {k: v.clone() for k, v in model.model.state_dict().items() if isinstance(v, torch.Tensor)}
    model.train_on(rows, 0)
    after = model.model.state_dict()
    assert all(not torch.equal(after[name], value) for name, value in before.items() if "weight" in name)


def test_the_class_must_be_one_of_ours_and_the_one_that_is_wanted(single: Runtime, tmp_path: Path) -> None:
    path = str(tmp_path / "rm.nemo")
    jobs.save(path)
    assert isinstance(TrainableModel.restore_from(path), RewardModel)
    for cls in (PolicyModel, SupervisedModel):
        with pytest.raises(CheckpointError, match="contains a RewardModel"):
            cls.restore_from(path)
    with pytest.raises(CheckpointError, match="convert from=nemo"):
        RewardModel.restore_from(str(REAL))


def changed(path: Path, settings: dict[str, Any] | None = None, members: dict[str, bytes] | None = None) -> str:
    target = path.with_name("changed.nemo")
    with tarfile.open(path) as there, tarfile.open(target, "w") as here:
        for info in there.getmembers():
            stream = there.extractfile(info)
            data = stream.read() if stream else b""
            if settings and info.name.endswith("model_config.yaml"):
                data = yaml.safe_dump(yaml.safe_load(data) | settings).encode()
            data = (members or {}).get(Path(info.name).name, data)
            info.size = len(data)
            here.addfile(info, io.BytesIO(data))
    return str(target)


def test_a_file_cannot_name_a_class_or_run_a_pickle(single: Runtime, tmp_path: Path) -> None:
    path, mark = tmp_path / "rm.nemo", tmp_path / "ran"
    wanted = jobs.save(str(path))
    for target in ("subprocess.Popen", "nemo_advrm.models.trainable.TrainableModel", "os.system"):
        with pytest.raises(CheckpointError, match="this package does not have"):
            TrainableModel.restore_from(changed(path, {"target": target}))
    evil = pickle.dumps(_Evil(mark))
    with pytest.raises(CheckpointError, match="cannot be trusted"):
        RewardModel.restore_from(changed(path, members={".metadata": evil}))
    # never opened, so that the model is restored without it
    found = RewardModel.restore_from(changed(path, members={"common.pt": evil}))
    assert torch.equal(jobs.score_sequences(found.model, jobs.ROWS, 0), wanted)
    assert not mark.exists()


def test_damage_is_one_clear_error(single: Runtime, tmp_path: Path) -> None:
    path = tmp_path / "rm.nemo"
    jobs.save(str(path))
    for settings in ({"architecture": {"layers": 2}}, {"architecture": None}, {"format": 99}, {"head": "lm"}):
        with pytest.raises(CheckpointError, match=r"changed\.nemo"):
            RewardModel.restore_from(changed(path, settings))
    with pytest.raises(CheckpointError, match=r"model\.hidden_size is 32"):
        RewardModel.restore_from(str(path), tiny_config(hidden_size=64, ffn_hidden_size=48))
    path.write_bytes(path.read_bytes()[:5000])
    with pytest.raises(CheckpointError, match=r"rm\.nemo"):
        RewardModel.restore_from(str(path))
    assert not list(tmp_path.glob("*restoring*"))


def test_a_file_that_cannot_be_written_is_one_error_on_every_rank(
    single: Runtime, worlds: Worlds, tmp_path: Path
) -> None:
    (tmp_path / "rm.nemo").mkdir()  # a directory stands where the file shall be
    for message in worlds.run(Layout(tensor=2), "nemo_model_jobs", "refused_save", path=str(tmp_path / "rm.nemo")):
        assert "rm.nemo: could not be written" in message
    assert [file.name for file in tmp_path.iterdir()] == ["rm.nemo"]


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"tokenizer": "${oc.env:HOME}"}, "which is not allowed"),
        ({"tokenizer": "hf:/etc"}, "outside the archive"),
        ({"tokenizer": ["hf"]}, "tokenizer is not a string"),
        ({"reward_model": {"loss": "${oc.env:HOME}"}}, "which is not allowed"),
        ({"reward_model": {"loss": "python:os:system"}}, r"loss='python:os:system' is not a loss of this package"),
        ({"reward_model": {"loss": ["bt"]}}, r"reward_model\.loss is a list, a text was expected"),
        ({"reward_model": {"head_init_std": "1"}}, r"reward_model\.head_init_std is '1', a number was expected"),
        ({"reward_model": {"_target_": "os.system", "_args_": ["touch ran"]}}, "is damaged"),
        ({"architecture": {"_target_": "os.system"}}, "unknown to this version"),
        ({"vocab_size": "${oc.env:HOME}"}, "which is not allowed"),
        ({"vocab_size": "67"}, "vocab_size is '67', a whole number was expected"),
        ({"notes": [{"${oc.env:HOME}": 1}]}, "which is not allowed"),
    ],
)
def test_interpolations_and_classes_in_the_settings_are_refused(
    single: Runtime, tmp_path: Path, settings: dict[str, Any], words: str, own_nemo: Path
) -> None:
    path = Path(shutil.copy(own_nemo, tmp_path / "rm.nemo"))
    with pytest.raises(CheckpointError, match=words) as caught:
        RewardModel.restore_from(changed(path, settings))
    assert "changed.nemo: " in str(caught.value) and "\n" not in str(caught.value)
    assert not list(tmp_path.glob("*restoring*"))
    # convert opens files of NeMo alone, and says so or names what it lacks
    assert (
        cli.main(["convert", "from=nemo", f"path={tmp_path / 'changed.nemo'}", "to=megatron", f"out={tmp_path / 'o'}"])
        == 2
    )


@pytest.fixture(scope="module")
def own_nemo(single: Runtime, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("own") / "rm.nemo"
    jobs.save(str(path))
    return path


def nested(key: str, value: Any) -> dict[str, Any]:
    """The setting ``a.b`` of the real file with another value, beside the rest of its section."""
    with tarfile.open(REAL) as tar:
        stream = tar.extractfile(next(m for m in tar.getmembers() if m.name.endswith("model_config.yaml")))
        assert stream is not None
        config = yaml.safe_load(stream.read())
    section, _, name = key.partition(".")
    return {section: (config.get(section) or {}) | {name: value} if name else value}


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("tokenizer.library", "${oc.env:SECRET}"),
        ("tokenizer.type", "/${oc.env:SECRET}"),
        ("tokenizer.model", "nemo:${oc.env:SECRET}"),
        ("tokenizer.special_tokens", {"pad": "${oc.env:SECRET}"}),
        ("tokenizer.special_tokens", ["${oc.env:SECRET}"]),
        ("data.append_eod", "${oc.env:SECRET}"),
        ("bias", "${oc.env:SECRET}"),
        ("num_layers", "${oc.env:SECRET}"),
        ("regression.merge_attributes", "${oc.env:SECRET}"),
        ("target", "${oc.env:SECRET}"),
        ("nemo_version", "${oc.env:SECRET}"),
    ],
)
def test_an_interpolation_that_a_conversion_would_read_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], key: str, value: Any
) -> None:
    monkeypatch.setenv("SECRET", "hunter2")
    path = Path(shutil.copy(REAL, tmp_path / "rm.nemo"))
    file = changed(path, nested(key, value))
    assert cli.main(["convert", "from=nemo", f"path={file}", "to=megatron", f"out={tmp_path / 'o'}"]) == 2
    message = capsys.readouterr().err.strip()
    assert f"{key}" in message and "which is not allowed" in message and "hunter2" not in message
    assert not (tmp_path / "o").exists()


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("tokenizer", "sentencepiece", "tokenizer is not an object"),
        ("tokenizer.special_tokens", {"pad": {"_target_": "os.system"}}, "special_tokens are not strings"),
        ("tokenizer.special_tokens", [1], "special_tokens are not strings"),
        ("tokenizer.special_tokens", "<pad>", "special_tokens are not strings"),
    ],
)
def test_a_tokenizer_section_of_other_types_is_one_error(tmp_path: Path, key: str, value: Any, words: str) -> None:
    path = Path(shutil.copy(REAL, tmp_path / "rm.nemo"))
    file = changed(path, nested(key, value))
    with pytest.raises(CheckpointError, match=words):
        NemoSource(Path(file))


def test_what_a_conversion_does_not_read_stays_unresolved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SECRET", "hunter2")
    path = Path(shutil.copy(REAL, tmp_path / "rm.nemo"))
    extra = nested("data.train_path", "${oc.env:SECRET}") | nested("optim._target_", "os.system")
    file = changed(path, extra | {"_target_": "os.system", "max_position_embeddings": "${.encoder_seq_length}"})
    out = tmp_path / "o"
    assert cli.main(["convert", "from=nemo", f"path={file}", "to=megatron", f"out={out}"]) == 0
    contents = b"".join(p.read_bytes() for p in out.rglob("*") if p.is_file())
    assert b"hunter2" not in contents and b"${" not in contents and b"os.system" not in contents
