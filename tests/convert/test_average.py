"""``average=[...]``: the weights of fine-tunings of one model, averaged; anything else is refused in one sentence."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hf_models import tiny_hf
from hf_tokenizers import save_hf
from safetensors.torch import load_file

from nemo_advrm.config.schema import ConvertConfig
from nemo_advrm.convert.conversion import convert
from nemo_advrm.errors import CheckpointError, ConfigError

Make = Callable[..., Path]


@pytest.fixture
def make(tmp_path: Path) -> Make:
    """A reward model on disk, by default Llama 3's architecture without a tokenizer."""

    def directory(name: str, seed: int, dtype: torch.dtype = torch.float32, **options: Any) -> Path:
        tiny_hf("llama3", seed=seed, **{"reward": True, **options}).to(dtype).save_pretrained(tmp_path / name)
        return tmp_path / name

    return directory


def _weights(directory: Path) -> dict[str, torch.Tensor]:
    return load_file(directory / "model.safetensors")


def _average(from_: str, paths: list[Path], to: str, out: Path, **settings: Any) -> None:
    cfg = ConvertConfig(from_=from_, average=list(map(str, paths)), to=to, out=str(out), **settings)
    convert(cfg, report=lambda _: None)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_tensor_is_the_mean(make: Make, tmp_path: Path, dtype: torch.dtype) -> None:
    members = [make(f"rm_{i}", i, dtype=dtype) for i in range(3)]
    _average("hf", members, "hf", tmp_path / "out")
    parts, averaged = [_weights(member) for member in members], _weights(tmp_path / "out")
    assert averaged.keys() == parts[0].keys()
    for name, tensor in averaged.items():
        expected = torch.stack([part[name].float() for part in parts]).mean(0)
        assert tensor.dtype == dtype, name
        torch.testing.assert_close(tensor, expected.to(dtype), rtol=0, atol=1e-6 if dtype == torch.float32 else 1e-2)
    card = (tmp_path / "out" / "README.md").read_text()
    assert f"Converted from: average: {members[0]}, {members[1]}, {members[2]}" in card


def test_checkpoints_of_this_package_are_averaged_alike(make: Make, tmp_path: Path) -> None:
    members = [make(f"rm_{i}", i) for i in range(2)]
    for member in members:
        settings = ConvertConfig(from_="hf", path=str(member), to="megatron", out=f"{member}_megatron")
        convert(settings, report=lambda _: None)
    _average("hf", members, "hf", tmp_path / "direct")
    _average("megatron", [Path(f"{member}_megatron") for member in members], "hf", tmp_path / "converted")
    direct, converted = _weights(tmp_path / "direct"), _weights(tmp_path / "converted")
    assert direct.keys() == converted.keys()
    assert all(torch.equal(tensor, direct[name]) for name, tensor in converted.items())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"reward": False}, "the head is 'lm' and 'reward'"),
        ({"intermediate_size": 96}, "model.ffn_hidden_size is 96 and 80"),
        ({"vocab_size": 68}, r"embedding.word_embeddings.weight is \[68, 48\] in float32 and \[67, 48\] in float32"),
        ({"dtype": torch.bfloat16}, r"embedding.word_embeddings.weight is \[67, 48\] in bfloat16 and"),
    ],
)
def test_another_model_is_refused(make: Make, tmp_path: Path, options: dict[str, Any], message: str) -> None:
    members = [make("first", 0), make("second", 1, **options)]
    with pytest.raises(CheckpointError, match=f"second and .*first cannot be averaged, .*: {message}"):
        _average("hf", members, "megatron", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_another_tokenizer_is_refused(make: Make, tmp_path: Path) -> None:
    members = [make(name, seed, vocab_size=300) for seed, name in enumerate(("first", "second"))]
    save_hf(members[0], template=None, eos_token="<|endoftext|>")
    with pytest.raises(CheckpointError, match="their tokenizers, or how conversations are read, differ"):
        _average("hf", members, "megatron", tmp_path / "out")


def test_a_hybrid_reward_model_is_refused(make: Make, tmp_path: Path) -> None:
    members = []
    for i in range(2):
        settings = ConvertConfig(from_="hf", path=str(make(f"rm_{i}", i)), to="megatron", out=str(tmp_path / f"m{i}"))
        convert(settings, report=lambda _: None)
        members.append(tmp_path / f"m{i}")
    (members[1] / "reference_features.json").write_text("{}")
    with pytest.raises(ConfigError, match="m1 is a hybrid reward model"):
        _average("megatron", members, "hf", tmp_path / "out")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"path": "c"}, "path and average are both set"),
        ({"average": ["a"]}, "an average needs at least 2 checkpoints"),
        ({"to": "bridge"}, "average is not possible with bridge"),
        ({"from_": "peft"}, "average is not possible with peft"),
        ({"average": []}, "path is not set"),
    ],
)
def test_what_does_not_fit_together_is_named(settings: dict[str, Any], message: str) -> None:
    cfg = ConvertConfig(from_="hf", average=["a", "b"], to="megatron", out="out")
    with pytest.raises(ConfigError, match=message):
        convert(replace(cfg, **settings))
