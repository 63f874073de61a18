"""Whatever is wrong with a checkpoint is one clear error before anything is written, and nothing is left behind."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import full_disk, run
from safetensors.torch import load_file, save_file
from torch.distributed.checkpoint.metadata import Metadata, TensorProperties, TensorStorageMetadata

from nemo_advrm.convert import hf_sink, megatron_checkpoint
from nemo_advrm.convert.dist_weights import StackedReader, StackedWriter
from nemo_advrm.convert.partial import PartialDirectory
from nemo_advrm.convert.tensor_names import TensorSpec
from nemo_advrm.engine import checkpoint
from nemo_advrm.errors import CheckpointError, ConfigError, LayoutError, UserError
from nemo_advrm.rank_info import host_name

Tensors = dict[str, torch.Tensor]
Q = "model.layers.1.self_attn.q_proj.weight"
INDEX = "model.safetensors.index.json"


@pytest.fixture
def source(saved: Callable[..., Path], tmp_path: Path) -> Path:
    """A copy of a good checkpoint, to be spoilt."""
    return shutil.copytree(saved("llama3"), tmp_path / "source")


@pytest.fixture
def sharded(saved: Callable[..., Path], tmp_path: Path) -> Path:
    return shutil.copytree(saved("llama3", max_shard_size="90KB"), tmp_path / "source")


def change_tensors(directory: Path, change: Callable[[Tensors], Any]) -> None:
    path = directory / "model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, metadata={"format": "pt"})


def change_json(path: Path, **values: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def refused(source: Path, *words: str, error: type[UserError] = CheckpointError, **settings: Any) -> str:
    """The message of a conversion to Megatron, which must not leave anything behind."""
    out = source.parent / "out"
    with pytest.raises(error) as caught:
        run("hf", source, "megatron", out, **settings)
    text = str(caught.value)
    assert "\n" not in text and all(word in text for word in words), text
    assert [p.name for p in source.parent.iterdir()] == [source.name]
    return text


def test_missing_and_unknown_tensors_are_listed_together(source: Path) -> None:
    def change(tensors: Tensors) -> None:
        del tensors["model.norm.weight"]
        tensors["model.layers.0.self_attn.sinks"] = tensors.pop(Q)

    change_tensors(source, change)
    refused(source, "missing tensors: ", Q, "model.norm.weight", "Llama does not have: model.layers.0.self_attn.sinks")


def test_a_missing_output_layer_is_not_made_up(source: Path) -> None:
    change_tensors(source, lambda tensors: tensors.pop("lm_head.weight"))
    refused(source, "missing tensors: lm_head.weight")


def test_an_output_layer_beside_tied_embeddings_is_refused_unless_it_is_the_embedding(source: Path) -> None:
    change_json(source / "config.json", tie_word_embeddings=True)
    refused(source, "does not have: lm_head.weight")
    change_tensors(source, lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"].clone()}))
    run("hf", source, "megatron", source.parent / "out")


def test_old_rotary_buffers_are_ignored(source: Path) -> None:
    change_tensors(source, lambda t: t.update({"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(6)}))
    run("hf", source, "megatron", source.parent / "out")


def test_a_wrong_shape_names_both_shapes(source: Path) -> None:
    change_tensors(source, lambda tensors: tensors.update({Q: torch.zeros(48, 40)}))
    refused(source, f"{Q} is [48, 40] but should be [48, 48]")


@pytest.mark.parametrize("dtype", [torch.int8, torch.float64, torch.float8_e4m3fn])
def test_an_unknown_number_format_is_refused(source: Path, dtype: torch.dtype) -> None:
    change_tensors(source, lambda tensors: tensors.update({Q: tensors[Q].to(dtype)}))
    refused(source, Q, "data type")


def test_parts_of_one_tensor_must_agree_in_their_format(source: Path) -> None:
    change_tensors(source, lambda tensors: tensors.update({Q: tensors[Q].half()}))
    refused(source, Q, "differ in their data type")


@pytest.mark.parametrize("keep", [0.0, 0.0001, 0.01, 0.5, 0.999999])
def test_a_truncated_file_is_refused(source: Path, keep: float) -> None:
    path = source / "model.safetensors"
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * keep)])
    refused(source, "model.safetensors", "not a complete safetensors file")


def test_noise_is_no_safetensors_file(source: Path) -> None:
    (source / "model.safetensors").write_bytes(bytes(range(256)) * 40)
    refused(source, "model.safetensors", "not a complete safetensors file")


def test_the_index_must_agree_with_its_files(sharded: Path) -> None:
    index = json.loads((sharded / INDEX).read_text())["weight_map"]
    files = sorted(set(index.values()))
    assert len(files) > 1
    moved = next(name for name, file in index.items() if file == files[0])
    change_json(sharded / INDEX, weight_map=index | {moved: files[1]})
    refused(sharded, INDEX, moved)
    change_json(sharded / INDEX, weight_map=index | {"model.more": files[0]})
    refused(sharded, INDEX, files[0], "only the index has model.more")
    change_json(sharded / INDEX, weight_map=index | {moved: "../elsewhere.safetensors"})
    refused(sharded, "outside its directory")
    change_json(sharded / INDEX, weight_map=index)
    (sharded / files[1]).unlink()
    refused(sharded, INDEX, files[1], "does not exist")


@pytest.mark.parametrize(
    "text", ["", "[]", "{}", '{"weight_map": {}}', '{"weight_map": {"a": 3}}', "{", "[" * 100_000, "9" * 5_000]
)
def test_a_broken_index_is_refused(sharded: Path, text: str) -> None:
    (sharded / INDEX).write_text(text)
    refused(sharded, f"{INDEX}: not ")


def test_an_index_that_names_no_file_of_its_directory_is_refused(sharded: Path) -> None:
    for name in ("x" * 5_000, "\0", "..", ""):
        (sharded / INDEX).write_text(json.dumps({"weight_map": {"a": name}}))
        refused(sharded, INDEX, "names ")


def test_pickled_weights_are_not_loaded(source: Path) -> None:
    (source / "model.safetensors").unlink()
    (source / "pytorch_model.bin").write_bytes(b"x")
    refused(source, "pytorch_model.bin", "save_pretrained")


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"architectures": ["LlamaModel"]}, ["LlamaModel cannot be converted", "LlamaForCausalLM"]),
        ({"architectures": ["Lama3ForCausalLM"]}, ["Lama3ForCausalLM", "nearest that can is LlamaForCausalLM"]),
        ({"architectures": []}, ["architectures"]),
        ({"rope_parameters": {"rope_type": "yarn", "factor": 2.0}}, ["rope_type 'yarn' is not supported"]),
        ({"attention_bias": True}, ["attention_bias=True is not supported"]),
        ({"mlp_bias": True}, ["mlp_bias=True"]),
        ({"partial_rotary_factor": 0.5}, ["partial_rotary_factor=0.5 is not supported for Llama"]),
        ({"quantization_config": {"quant_method": "gptq", "bits": 4}}, ["quantised"]),
        ({"hidden_act": "gelu"}, ["hidden_act='gelu'"]),
        ({"num_hidden_layers": 5}, ["missing tensors: model.layers.4."]),
        ({"num_hidden_layers": 3}, ["does not have: model.layers.3."]),
        ({"hidden_size": "wide"}, ["config.json", "hidden_size"]),
    ],
)
def test_a_configuration_that_does_not_fit_is_refused_by_name(
    source: Path, values: dict[str, Any], words: list[str]
) -> None:
    change_json(source / "config.json", **values)
    refused(source, *words)


@pytest.mark.parametrize("text", [None, "", "{", "[]", "\0"])
def test_a_missing_or_broken_config_is_refused(source: Path, text: str | None) -> None:
    path = source / "config.json"
    path.unlink() if text is None else path.write_text(text)
    refused(source, "config.json")


def test_classifiers_with_several_labels_are_no_reward_models(saved: Callable[..., Path], tmp_path: Path) -> None:
    source = shutil.copytree(saved("llama3", reward=True), tmp_path / "source")
    change_json(source / "config.json", id2label={"0": "bad", "1": "good"}, label2id={"bad": 0, "good": 1})
    refused(source, "one label", "2")


def test_what_exists_is_not_overwritten(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "mine").write_text("keep")
    for to in ("megatron", "hf"):
        with pytest.raises(CheckpointError, match="already exists"):
            run("hf", source, to, out)
    assert [p.name for p in out.iterdir()] == ["mine"]


def test_a_full_disk_is_told_before_writing(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=10_000))
    refused(source, "the disk has only 0.00 GB free")


@pytest.mark.parametrize(
    ("settings", "error", "word"),
    [
        ({"tensor_model_parallel_size": 3}, LayoutError, "num_attention_heads=4"),
        ({"tensor_model_parallel_size": 4}, LayoutError, "num_query_groups=2"),
        ({"pipeline_model_parallel_size": 3}, LayoutError, "num_layers=4"),
        ({"dtype": "bf61"}, ConfigError, "did you mean bf16"),
        *(({"max_shard_size": size}, ConfigError, size) for size in ("big", "0GB", "-5GB", "0.0001KB", "nanGB")),
        ({"tokenizer": "/no/such/place"}, ConfigError, "tokenizer="),
        ({"card": "/no/such.json"}, ConfigError, "card="),
    ],
)
def test_impossible_settings_are_named(
    source: Path, settings: dict[str, Any], error: type[UserError], word: str
) -> None:
    refused(source, word, error=error, **settings)


def test_a_dry_run_shows_every_tensor_and_writes_nothing(source: Path, tmp_path: Path) -> None:
    lines = run("hf", source, "megatron", tmp_path / "out", dry_run=True)
    k, v = Q.replace("q_proj", "k_proj"), Q.replace("q_proj", "v_proj")
    fused = "model.decoder.layers.self_attention.linear_qkv.weight[1]"
    assert f"{Q} + {k} + {v} -> {fused} [96, 48]" in lines
    assert len(lines) == 28 and "nothing is written" in lines[-1]
    assert [p.name for p in tmp_path.iterdir()] == ["source"]


# Megatron checkpoints


@pytest.fixture
def ours(saved: Callable[..., Path], tmp_path: Path) -> Path:
    run("hf", saved("llama3"), "megatron", tmp_path / "ours")
    return tmp_path / "ours"


@pytest.fixture
def older(ours: Path) -> Path:
    """Without a manifest, which would tell of the damage first."""
    (ours / "manifest.json").unlink()
    return ours


def refused_ours(path: Path, *words: str, **settings: Any) -> None:
    with pytest.raises(CheckpointError) as caught:
        run("megatron", path, "hf", path.parent / "out", **settings)
    assert all(word in str(caught.value) for word in words), caught.value
    assert [p.name for p in path.parent.iterdir()] == [path.name]


def test_a_damaged_megatron_checkpoint_is_refused(older: Path) -> None:
    data = older / "weights" / "__0_0.distcp"  # the embedding
    whole = data.read_bytes()
    data.write_bytes(whole[: len(whole) // 2])
    refused_ours(older, "embedding.word_embeddings.weight should be at bytes 0 to", "__0_0.distcp, which has")
    data.write_bytes(whole[:100] + bytes(len(whole) - 100))
    refused_ours(older, "embedding.word_embeddings.weight could not be read")
    data.unlink()
    refused_ours(older, "names the file __0_0.distcp, which is not there")
    (older / "weights" / ".metadata").write_bytes(b"\x80")
    refused_ours(older, "damaged", ".metadata")
    (older / "weights" / ".metadata").unlink()
    refused_ours(older, "weights could not be read")
    (older / "meta.json").unlink()
    refused_ours(older, "not a complete checkpoint")


def test_a_description_that_would_run_code_is_not_run(older: Path, tmp_path: Path) -> None:
    class Hostile:
        def __reduce__(self) -> tuple[Any, ...]:
            return Path.touch, (tmp_path / "ran",)

    (older / "weights" / ".metadata").write_bytes(pickle.dumps(Hostile()))
    refused_ours(older, "cannot be trusted")


def test_weights_that_are_not_those_described_are_refused(ours: Path) -> None:
    meta = json.loads((ours / "meta.json").read_text())
    (ours / "meta.json").write_text(json.dumps(meta | {"model": meta["model"] | {"qkv_bias": True}}))
    refused_ours(ours, "missing tensors:", "linear_qkv.bias")
    (ours / "meta.json").write_text(json.dumps(meta | {"model": meta["model"] | {"ffn_hidden_size": 84}}))
    refused_ours(ours, "linear_fc1.weight is [160, 48] but should be [168, 48]")


def test_a_description_of_absurdly_many_layers_is_refused_at_once(ours: Path) -> None:
    meta = json.loads((ours / "meta.json").read_text())
    (ours / "meta.json").write_text(json.dumps(meta | {"model": meta["model"] | {"num_layers": 10**9}}))
    refused_ours(ours, "too few for 1000000000 layers")


def test_the_tokenizer_must_be_the_one_of_training(ours: Path) -> None:
    meta = json.loads((ours / "meta.json").read_text())
    assert meta["head_outputs"] == 1
    byte = meta | {"model": meta["model"] | {"tokenizer": "byte"}}
    (ours / "meta.json").write_text(json.dumps(byte | {"tokenizer": "another"}))
    refused_ours(ours, "the tokenizer byte has changed since training")
    byte["model"]["vocab_size"] = 0
    (ours / "meta.json").write_text(json.dumps(byte))
    refused_ours(ours, "byte has 263 entries", f"the weights have {meta['vocab_size']} rows")


@pytest.mark.parametrize("shape", [(), (10**12, 48), (0, 48)])
def test_stacks_that_are_none_are_refused_before_their_names_are_made(shape: tuple[int, ...], tmp_path: Path) -> None:
    stored = TensorStorageMetadata(TensorProperties(dtype=torch.float32), torch.Size(shape), [])
    with pytest.raises(CheckpointError, match=r"no dimensions|not a stack of layers"):
        StackedReader(tmp_path, Metadata({"model.decoder.layers.mlp.linear_fc1.weight": stored}, storage_data={}))


def test_a_tensor_of_another_shape_is_not_written(tmp_path: Path) -> None:
    writer = StackedWriter(tmp_path, 2, {"head.weight": TensorSpec((1, 8), torch.float32)})
    with pytest.raises(ValueError, match=r"head\.weight is \[2, 8\] but should be \[1, 8\]"):
        writer.write("head.weight", torch.zeros(2, 8))


@pytest.mark.parametrize("to", ["megatron", "hf"])
def test_a_broken_tokenizer_is_found_before_anything_is_written(source: Path, tmp_path: Path, to: str) -> None:
    (source / "tokenizer.json").write_text("{")
    with pytest.raises(CheckpointError, match="the tokenizer cannot be copied"):
        run("hf", source, to, tmp_path / "out", dry_run=True)


def test_models_that_hugging_face_does_not_have_are_refused(ours: Path) -> None:
    meta = json.loads((ours / "meta.json").read_text())
    changes = {"logit_softcap": 2.0}, {"activation": "geglu"}, {"rotary_percent": 0.5}
    for change in changes:
        (ours / "meta.json").write_text(json.dumps(meta | {"model": meta["model"] | change}))
        refused_ours(ours, f"model.{next(iter(change))}=", "cannot be written as Llama", architecture="Llama")
    (ours / "meta.json").write_text(json.dumps(meta))
    refused_ours(ours, "did you mean Llama", architecture="lama")


# interruption


@pytest.mark.parametrize(("from_", "to"), [("hf", "megatron"), ("megatron", "hf")])
def test_a_disk_that_fills_up_in_the_middle_is_one_error_and_leaves_nothing(
    source: Path, ours: Path, tmp_path: Path, from_: str, to: str
) -> None:
    with full_disk(), pytest.raises(CheckpointError, match="could not be written"):
        run(from_, source if from_ == "hf" else ours, to, tmp_path / "out")
    assert list(tmp_path.glob("out*")) == []


@pytest.mark.parametrize("to", ["megatron", "hf"])
def test_a_failure_in_the_middle_leaves_nothing(
    source: Path, tmp_path: Path, to: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    sink: Any = megatron_checkpoint.MegatronSink if to == "megatron" else hf_sink.HFSink
    write, calls = sink.write, []

    def failing(self: Any, name: str, tensor: torch.Tensor) -> None:
        calls.append(name)
        assert (tmp_path / "out.partial").exists()
        if len(calls) == 9:
            raise OSError("no space left on device")
        write(self, name, tensor)

    monkeypatch.setattr(sink, "write", failing)
    with pytest.raises((OSError, CheckpointError), match="no space left"):
        run("hf", source, to, tmp_path / "out")
    assert [p.name for p in tmp_path.iterdir()] == ["source"]


_KILLED = """
import os, signal, sys
from nemo_advrm.cli import main
from nemo_advrm.convert import hf_sink, megatron_checkpoint

for sink in (hf_sink.HFSink, megatron_checkpoint.MegatronSink):
    def killed(self, name, tensor, write=sink.write):
        write(self, name, tensor)
        if name == "decoder.layers.2.mlp.linear_fc2.weight":
            os.kill(os.getpid(), signal.SIGKILL)
    sink.write = killed
main(sys.argv[1:])
"""


@pytest.mark.long
@pytest.mark.parametrize("to", ["megatron", "hf"])
def test_a_killed_conversion_leaves_nothing_that_looks_complete(source: Path, tmp_path: Path, to: str) -> None:
    out = tmp_path / "out"
    words = ["convert", "from=hf", f"path={source}", f"to={to}", f"out={out}"]
    killed = subprocess.run([sys.executable, "-c", _KILLED, *words], timeout=120, capture_output=True)
    assert killed.returncode == -signal.SIGKILL, killed.stderr.decode()
    partial = tmp_path / "out.partial"
    assert not out.exists() and any(partial.rglob("*.distcp" if to == "megatron" else "*.safetensors"))
    if to == "megatron":
        with pytest.raises(CheckpointError, match="not a complete checkpoint"):
            checkpoint.read_meta(partial)
    else:
        assert not (partial / "config.json").exists()  # without it from_pretrained refuses the directory

    run("hf", source, to, out)
    assert out.exists() and not partial.exists()


@pytest.mark.parametrize("to", ["megatron", "hf"])
def test_a_second_conversion_to_one_place_is_refused_by_name_and_leaves_the_first_alone(
    source: Path, tmp_path: Path, to: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = "out"
    out, there, over = tmp_path / name, os.pipe(), os.pipe()
    child = os.fork()
    if child == 0:  # the first one, in the middle of its work
        PartialDirectory(out, 0).make().joinpath("weights").touch()
        os.write(there[1], b"1")
        os.read(over[0], 1)
        os._exit(0)
    os.read(there[0], 1)
    try:
        named = rf"{out} is being written by process {child} on {host_name()} .* or choose another out"
        with pytest.raises(ConfigError, match=named):
            run("hf", source, to, out)
        assert [path.name for path in (tmp_path / f"{name}.partial").iterdir()] == ["weights"]
    finally:
        os.write(over[1], b"1")
        os.waitpid(child, 0)
    run("hf", source, to, out)
    assert sorted(path.name for path in tmp_path.iterdir()) == [name, "source"]


def test_a_conversion_that_ended_just_before_is_not_overwritten(tmp_path: Path) -> None:
    second = PartialDirectory(tmp_path / "out", 0)
    (tmp_path / "out").mkdir()
    with pytest.raises(CheckpointError, match="out: already exists"):
        second.make()
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
