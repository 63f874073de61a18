"""No file of a checkpoint can run code: a pickle in any of them is refused, by every door that opens checkpoints."""

from __future__ import annotations

import dataclasses
import io
import pickle
import shutil
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import checkpoint_jobs
import pytest
import torch
from megatron.core.safe_globals import register_safe_globals
from reward_members import save_hf_reward, save_megatron
from tiny import TOKENIZER, tiny_config

from nemo_advrm import cli
from nemo_advrm.config.schema import ConvertConfig
from nemo_advrm.convert.conversion import convert
from nemo_advrm.engine.fp8_states import check_fp8_states
from nemo_advrm.engine.runtime import Runtime
from nemo_advrm.engine.safe_readers import load_plain
from nemo_advrm.errors import CheckpointError, UserError
from nemo_advrm.models.reward_model import RewardModel
from nemo_advrm.rewards.sources import load_members
from nemo_advrm.training.strategy import MegatronStrategy
from nemo_advrm.training.training_state import TrainingSave, load_training_state

MODEL = "reward_model"
SIZES = (
    "num_layers",
    "hidden_size",
    "num_attention_heads",
    "num_query_groups",
    "ffn_hidden_size",
    "encoder_seq_length",
    "normalization",
    "activation",
    "position_embedding_type",
    "bias",
    "share_embeddings_and_output_weights",
)


class Planted:
    """Touches a file when it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.mark,)


@pytest.fixture
def mark(tmp_path: Path) -> Iterator[Path]:
    """A file that exists once planted code has run; a test fails when it does."""
    mark = tmp_path / "ran"
    pickle.loads(pickle.dumps(Planted(mark)))
    assert mark.exists(), "the planted pickle does nothing"
    mark.unlink()
    yield mark
    assert not mark.exists(), "planted code has run"


@pytest.fixture(scope="module")
def saved(single: Runtime, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The state of a training after one step, with everything that it writes."""
    path = tmp_path_factory.mktemp("planted") / "step_00000001"
    module = checkpoint_jobs.reward_model()
    checkpoint_jobs.train(module, 0, 1)
    TrainingSave(path, module, {"global_step": 1}, in_background=False).finish()
    return path


@pytest.fixture
def state(saved: Path, tmp_path: Path) -> Path:
    """A copy as a stranger would hand it out: without the lists of hashes, which can be made to agree with anything."""
    path = Path(shutil.copytree(saved, tmp_path / "stranger"))
    for manifest in path.rglob("manifest.json"):
        manifest.unlink()
    return path


def archived(value: Any) -> bytes:
    """As ``torch.save`` writes it."""
    contents = io.BytesIO()
    torch.save(value, contents)
    return contents.getvalue()


def exchange(weights: Path, chosen: Callable[[str], bool], payload: bytes) -> str:
    """Let the first item whose name is ``chosen`` be ``payload``; returns the name of its file."""
    metadata = pickle.loads((weights / ".metadata").read_bytes())
    index = next(index for index in metadata.storage_data if chosen(index.fqn))
    place = metadata.storage_data[index]
    file = weights / place.relative_path
    offset = file.stat().st_size
    file.write_bytes(file.read_bytes() + payload + bytes(max(0, place.length - len(payload))))
    metadata.storage_data[index] = dataclasses.replace(place, offset=offset, length=len(payload))
    (weights / ".metadata").write_bytes(pickle.dumps(metadata))
    return file.name


def resume(state: Path) -> None:
    MegatronStrategy().load_checkpoint(state)
    load_training_state(state, checkpoint_jobs.reward_model())


def restore(state: Path) -> None:
    """Training that starts from the weights: ``pretrained_checkpoint.restore_from_path``."""
    RewardModel(tiny_config("gpt"), TOKENIZER, [], [], seed=0, restore_from=str(state / MODEL))


def score(state: Path) -> None:
    """A member of an ensemble, for evaluate, attack, rlhf and serve."""
    load_members(tiny_config("gpt"), [str(state / MODEL)], TOKENIZER)


def converted(state: Path) -> None:
    out = str(state.parent / "out")
    settings = ConvertConfig(from_="megatron", path=str(state / MODEL), to="megatron", out=out)
    shutil.rmtree(out, ignore_errors=True)
    convert(settings, report=lambda _: None)


DOORS = [resume, restore, score, converted]


def refused(door: Callable[[Path], None], state: Path, *named: str) -> None:
    with pytest.raises(UserError) as caught:
        door(state)
    assert "\n" not in str(caught.value)
    assert any(name in str(caught.value) for name in named), caught.value


@pytest.mark.platform
@pytest.mark.parametrize("door", DOORS)
def test_a_pickle_in_place_of_any_file_of_a_checkpoint_does_not_run(
    door: Callable[[Path], None], state: Path, mark: Path
) -> None:
    files = sorted(p for p in state.rglob("*") if p.is_file())
    assert {p.name for p in files} >= {".metadata", "common.pt", "metadata.json", "meta.json", "trainer.json"}
    assert any(p.suffix == ".distcp" for p in files)
    for file in files:
        whole = file.read_bytes()
        for payload in (pickle.dumps(Planted(mark)), archived(Planted(mark))):
            file.write_bytes(payload + bytes(max(0, len(whole) - len(payload))))  # sizes are looked at first
            try:
                door(state)
            except UserError as error:
                # one line that names the file, or the tensor of it that could not be read
                assert "\n" not in str(error)
                assert file.name in str(error) or (file.suffix == ".distcp" and "could not be read" in str(error))
            else:  # a file which this door does not look into
                assert file.name in ("trainer.json", "common.pt", "metadata.json", "__0_0.distcp", "__0_1.distcp"), file
            assert not mark.exists(), (door.__name__, file.name)
        file.write_bytes(whole)


@pytest.mark.platform
@pytest.mark.parametrize("door", [resume, restore, score])
@pytest.mark.parametrize("item", ["a tensor", "a state of a layer"])
@pytest.mark.parametrize("form", [archived, pickle.dumps])
def test_a_pickle_in_place_of_one_item_of_the_weights_does_not_run(
    door: Callable[[Path], None], state: Path, mark: Path, item: str, form: Callable[[Any], bytes]
) -> None:
    byte_item = item != "a tensor"
    # an item is longer than its tensor, which the table of contents is compared with
    payload = form([Planted(mark)]) if byte_item else form([Planted(mark), torch.zeros(200_000)])
    name = exchange(
        state / MODEL / "weights",
        lambda key: key.startswith("model.") and ("_extra_state" in key) == byte_item,
        payload,
    )
    refused(door, state, f"{name}: ")


@pytest.mark.platform
def test_a_pickle_in_the_optimizers_state_does_not_run(state: Path, mark: Path) -> None:
    name = exchange(
        state / MODEL / "weights",
        lambda key: key.startswith("optimizer."),
        archived([Planted(mark), torch.zeros(200_000)]),
    )
    refused(resume, state, f"{name}: ")


@pytest.mark.platform
def test_classes_that_libraries_allow_for_the_whole_process_are_not_known(tmp_path: Path) -> None:
    from argparse import Namespace

    register_safe_globals()  # of Megatron-Core
    file = tmp_path / "common.pt"
    torch.save({"args": Namespace(a=1)}, file)
    with open(file, "rb") as stream, pytest.raises(CheckpointError, match=r"common\.pt: holds a pickle of more than"):
        load_plain(stream, str(file))
    assert Namespace in torch.serialization.get_safe_globals()


def test_an_archive_that_unpacks_to_more_than_its_bytes_is_refused(tmp_path: Path) -> None:
    small, file = tmp_path / "small", tmp_path / "common.pt"
    torch.save({"weights": torch.zeros(1_000_000)}, small)
    with zipfile.ZipFile(small) as plain, zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as packed:
        for name in plain.namelist():
            packed.writestr(name, plain.read(name))
    with open(file, "rb") as stream, pytest.raises(CheckpointError, match="a compressed archive"):
        load_plain(stream, str(file))
    torch.save({"weights": torch.zeros(4)}, file, _use_new_zipfile_serialization=False)
    with open(file, "rb") as stream, pytest.raises(CheckpointError, match="no archive of PyTorch"):
        load_plain(stream, str(file))


def test_what_transformer_engine_will_unpickle_is_checked_first(mark: Path) -> None:
    def encoded(value: Any) -> dict[str, torch.Tensor]:
        return {"mlp.linear_fc1._extra_state": torch.frombuffer(bytearray(pickle.dumps(value)), dtype=torch.uint8)}

    real = {"scale_fwd": torch.ones(3), "amax_history_fwd": torch.zeros(4, 3), "extra_fp8_variables": {"fp8": (1, 2.0)}}
    check_fp8_states(encoded(real), "weights")
    check_fp8_states({"a._extra_state": torch.empty(0, dtype=torch.uint8), "b._extra_state": None}, "weights")

    class Nested:
        def __reduce__(self) -> tuple[Any, ...]:
            return torch.storage._load_from_bytes, (pickle.dumps(Planted(mark)),)

    for bad in (Planted(mark), real | {"recipe": Planted(mark)}, Nested()):
        with pytest.raises(CheckpointError, match=r"weights: mlp\.linear_fc1\._extra_state: holds a pickle of more"):
            check_fp8_states(encoded(bad), "weights")


def test_commands_refuse_a_checkpoint_with_a_pickle_and_name_the_file(
    state: Path, mark: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    whole, planted = save_megatron(tmp_path / "whole"), state / MODEL
    policy, planted_policy = (save_megatron(tmp_path / name, head="lm") for name in ("policy", "planted_policy"))
    for model in (planted, planted_policy):
        for manifest in model.rglob("manifest.json"):
            manifest.unlink()
        (model / "weights" / ".metadata").write_bytes(pickle.dumps(Planted(mark)))
    rows, held_out, prompts = (tmp_path / f"{name}.jsonl" for name in ("pairs", "held_out", "prompts"))
    row = '{"prompt": "this river", "chosen": "birds sing .", "rejected": "birds sing"}\n'
    rows.write_text(row * 20)
    held_out.write_text(row.replace("this river", "these clouds") * 4)
    prompts.write_text('{"prompt": "this river"}\n' * 4)
    sizes = [f"model.{key}={getattr(tiny_config().model, key)}" for key in SIZES]
    gpt = [f"model.{key}={getattr(tiny_config('gpt').model, key)}" for key in SIZES]
    data, asked, start = (
        f"data.train_path={rows}",
        f"data.prompts_path={prompts}",
        "pretrained_checkpoint.restore_from_path",
    )
    held, short = f"data.validation_path={held_out}", "rl.max_new_tokens=6"
    members = f"ensemble.members=[{whole},{planted}]"
    for settings in (
        ["evaluate", data, f"{start}={planted}"],
        ["evaluate", data, members],
        ["serve", "serve.port=0", members],
        ["attack", asked, f"{start}={policy}", members, *sizes, short],
        ["attack", asked, f"{start}={planted_policy}", f"ensemble.members=[{whole},{whole}]", *sizes, short],
        ["rlhf", asked, f"{start}={policy}", members, *sizes, short],
        ["rlhf", asked, f"{start}={planted_policy}", f"ensemble.members=[{whole}]", *sizes, short],
        ["sft", data, f"{start}={planted_policy}", *sizes],
        ["train_rm", data, held, f"{start}={planted}", *gpt],
        ["train_rm", data, held, f"{start}={planted_policy}", *sizes],
    ):
        run = ["model.tokenizer=synthetic", "trainer.accelerator=cpu", f"run_dir={tmp_path / 'run'}"]
        assert cli.main([*settings, *run]) == 2, settings
        message = capsys.readouterr().err.strip().splitlines()[-1]
        assert message.startswith("error: ") and ".metadata" in message, (settings, message)
        assert str(planted) in message or str(planted_policy) in message, (settings, message)
        shutil.rmtree(tmp_path / "run", ignore_errors=True)
        assert not mark.exists(), settings
    assert cli.main(["convert", "from=megatron", f"path={planted}", "to=hf", f"out={tmp_path / 'o'}"]) == 2
    message = capsys.readouterr().err.strip()
    assert message.startswith("error: ") and "\n" not in message and ".metadata" in message


def test_pickles_beside_a_hugging_face_model_are_not_opened(mark: Path, tmp_path: Path, single: Runtime) -> None:
    directory = save_hf_reward(tmp_path / "rm")
    for name in ("training_args.bin", "optimizer.pt", "scheduler.pt", "rng_state.pth", "pytorch_model.bin"):
        (directory / name).write_bytes(pickle.dumps(Planted(mark)))
    load_members(tiny_config(), [f"hf:{directory}"])
    (directory / "model.safetensors").write_bytes(pickle.dumps(Planted(mark)))
    with pytest.raises(CheckpointError):
        load_members(tiny_config(), [f"hf:{directory}"])
    (directory / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match="pickled weights are not opened"):
        load_members(tiny_config(), [f"hf:{directory}"])
