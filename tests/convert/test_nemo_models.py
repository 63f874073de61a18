"""``save_to`` and ``restore_from``: our own models come back with equal scores at any layout, and nothing else does."""

from __future__ import annotations

import io
import pickle
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

from nemo_advrm.errors import CheckpointError
from nemo_advrm.megatron.runtime import Layout, Runtime
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
        with pytest.raises(CheckpointError, match="holds a RewardModel"):
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
        with pytest.raises(CheckpointError, match="none of ours"):
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
