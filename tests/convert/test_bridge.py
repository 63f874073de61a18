"""Checkpoints of Megatron-Bridge: read without it; other architectures are handed to a module with its signatures."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import yaml
from conftest import run
from test_round_trip import assert_same_bits, weights

from nemo_advrm.convert import bridge_calls, dist_weights
from nemo_advrm.convert import bridge_checkpoint as bridge_checkpoint_module
from nemo_advrm.errors import CheckpointError, ConfigError

FAMILIES = ("llama31", "mistral", "qwen2", "qwen3", "nemotron")


def run_config(hf: Path, nested: bool = False, **changed: Any) -> dict[str, Any]:
    """The section ``model`` of run_config.yaml, as Bridge derives it from config.json."""
    config = json.loads((hf / "config.json").read_text())
    inner = {
        "num_layers": config["num_hidden_layers"],
        "hidden_size": config["hidden_size"],
        "ffn_hidden_size": config["intermediate_size"],
        "num_attention_heads": config["num_attention_heads"],
        "num_query_groups": config["num_key_value_heads"],
        "num_moe_experts": None,
        "multi_latent_attention": False,
        "activation_func": {"_target_": "torch.nn.functional.silu", "_call_": False},
        "window_size": [config["sliding_window"] - 1, 0] if config["model_type"] == "mistral" else None,
    } | changed
    outer = {"position_embedding_type": "rope", "vocab_size": inner.pop("vocab_size", config["vocab_size"])}
    if nested:
        return {
            "_target_": "Config",
            "transformer": inner,
            "extra_checkpoint_metadata": {"hf_model_id": str(hf)},
            **outer,
        }
    return {"_target_": "Provider", "hf_model_id": str(hf), **inner, **outer}


@pytest.fixture
def bridge_checkpoint(
    saved: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., Path]:
    """Files as Bridge writes them: tensors with the names of Megatron without a prefix, and run_config.yaml."""

    def make(name: str, nested: bool = False, **changed: Any) -> Path:
        hf, directory = saved(name), tmp_path / "bridge" / "iter_0000005"
        with monkeypatch.context() as patched:
            patched.setattr(dist_weights, "PREFIX", "")
            run("hf", hf, "megatron", tmp_path / "ours")
        directory.parent.mkdir()
        shutil.copytree(tmp_path / "ours" / "weights", directory)
        settings = {"model": run_config(hf, nested, **changed), "checkpoint": {"ckpt_format": "torch_dist"}}
        (directory / "run_config.yaml").write_text(yaml.safe_dump(settings))
        return directory.parent

    return make


@pytest.mark.parametrize("name", FAMILIES)
def test_a_bridge_checkpoint_becomes_the_hugging_face_model_that_it_came_from(
    bridge_checkpoint: Callable[..., Path], saved: Callable[..., Path], tmp_path: Path, name: str
) -> None:
    path = bridge_checkpoint(name, nested=name == "qwen2")
    run("bridge", path, "hf", tmp_path / "hf")
    assert_same_bits(weights(tmp_path / "hf"), weights(saved(name)))


def test_an_iteration_becomes_a_checkpoint_of_ours(bridge_checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    path = bridge_checkpoint("llama3")
    (path / "iter_0000004").mkdir()  # the last one counts
    for made, from_ in (("one", path / "iter_0000005"), ("two", path)):
        run("bridge", from_, "megatron", tmp_path / made)
        meta = json.loads((tmp_path / made / "meta.json").read_text())
        assert meta["head"] == "lm" and meta["conversion"]["converted_from"] == f"bridge:{path / 'iter_0000005'}"
        run("megatron", tmp_path / made, "hf", tmp_path / f"{made}_hf")
    assert_same_bits(weights(tmp_path / "one_hf"), weights(tmp_path / "two_hf"))


@pytest.mark.parametrize(
    ("changed", "told"),
    [
        ({"rotary_base": 1234.0}, "rotary_base is 1234.0, not 500000.0"),
        ({"num_layers": 3}, "num_layers is 3, not 4"),
        ({"window_size": [15, 0]}, r"window_size is \[15, 0\], not None"),
        ({"vocab_size": 99_999}, "vocab_size is 99999, more than"),
        ({"normalization": "LayerNorm"}, "normalization is 'LayerNorm', not 'RMSNorm'"),
        ({"num_moe_experts": 8}, "num_moe_experts is 8, not 0"),
        ({"qk_layernorm": True}, "qk_layernorm is True, not False"),
    ],
)
def test_a_run_config_that_contradicts_config_json_is_refused(
    bridge_checkpoint: Callable[..., Path], tmp_path: Path, changed: dict[str, Any], told: str
) -> None:
    path = bridge_checkpoint("llama3", **changed)
    with pytest.raises(CheckpointError, match=told):
        run("bridge", path, "hf", tmp_path / "hf")


@pytest.mark.parametrize(
    ("key", "told"),
    [
        ("vision_model.class_token", r"tensors that no language model here has: vision_model\.class_token"),
        ("decoder.layers.0.mlp.linear_fc1.weight", "layers are stored one by one"),
    ],
)
def test_parts_that_no_model_here_has_are_refused_and_state_of_training_is_not(key: str, told: str) -> None:
    fine = dict.fromkeys(
        (
            "decoder.layers.mlp.linear_fc1.weight",
            "optimizer.state.exp_avg.decoder.layers.0.mlp.linear_fc1.weight",
            "rng_state/shard_0.0_1.1",
        )
    )
    bridge_checkpoint_module._check_names(Path("there"), fine)
    with pytest.raises(CheckpointError, match=told):
        bridge_checkpoint_module._check_names(Path("there"), {**fine, key: None})


def test_the_origin_must_be_here(bridge_checkpoint: Callable[..., Path], saved: Any, tmp_path: Path) -> None:
    path = bridge_checkpoint("llama3")
    config = path / "iter_0000005" / "run_config.yaml"
    config.write_text(config.read_text().replace(str(saved("llama3")), "meta-llama/Llama-3.1-8B"))
    with pytest.raises(ConfigError, match=r"tokenizer is not set: .*'meta-llama/Llama-3\.1-8B'"):
        run("bridge", path, "hf", tmp_path / "hf")
    run("bridge", path, "hf", tmp_path / "hf", tokenizer=str(saved("llama3")))
    with pytest.raises(CheckpointError, match="no checkpoint of Megatron-Bridge"):
        run("bridge", tmp_path, "hf", tmp_path / "other")


@pytest.fixture
def deepseek(tmp_path: Path) -> Path:
    """A model without a table; its weights are not read here."""
    directory = tmp_path / "deepseek"
    directory.mkdir()
    (directory / "config.json").write_text(
        json.dumps({"architectures": ["DeepseekV3ForCausalLM"], "model_type": "deepseek_v3"})
    )
    return directory


def test_without_bridge_the_error_names_it(deepseek: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bridge_calls, "MODULE", "megatron.no_bridge")
    with pytest.raises(CheckpointError, match=r"DeepseekV3ForCausalLM cannot be converted.*convert from=hf to=bridge"):
        run("hf", deepseek, "megatron", tmp_path / "out")
    with pytest.raises(ConfigError, match=r"from=hf to=bridge needs Megatron-Bridge .*not installed"):
        run("hf", deepseek, "bridge", tmp_path / "out")


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The calls of a module with the signatures of Megatron-Bridge 0.7."""
    made: list[Any] = []

    class AutoBridge:
        @classmethod
        def can_handle(cls, path: str | Path, trust_remote_code: bool = False) -> bool:
            assert not trust_remote_code
            return "Deepseek" in (Path(path) / "config.json").read_text()

        @classmethod
        def import_ckpt(
            cls, hf_model_id: str | Path, megatron_path: str | Path, *, low_memory_save: bool = False, **kwargs: Any
        ) -> None:
            made.append(("import_ckpt", hf_model_id, megatron_path, kwargs))
            Path(megatron_path).mkdir()
            if (Path(hf_model_id) / "damaged").exists():
                raise ValueError("Failed to load model with AutoBridge: damaged")

        @classmethod
        def from_hf_pretrained(cls, path: str | Path, **kwargs: Any) -> AutoBridge:
            made.append(("from_hf_pretrained", path, kwargs))
            return cls()

        def export_ckpt(
            self,
            megatron_path: str | Path,
            hf_path: str | Path,
            show_progress: bool = True,
            strict: bool = False,
            source_path: str | Path | None = None,
        ) -> None:
            made.append(("export_ckpt", megatron_path, hf_path, strict))
            Path(hf_path).mkdir()

    module = ModuleType("megatron.bridge")
    module.AutoBridge = AutoBridge  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "megatron.bridge", module)
    monkeypatch.setattr(bridge_calls, "installed", lambda: True)
    return made


def test_bridge_is_called_for_an_architecture_without_a_table(
    deepseek: Path, tmp_path: Path, calls: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    assert run("hf", deepseek, "bridge", out, dry_run=True)[0].startswith("Megatron-Bridge converts")
    assert not calls
    run("hf", deepseek, "bridge", out, dtype="bf16")
    assert calls.pop() == ("import_ckpt", str(deepseek), str(out), {"torch_dtype": torch.bfloat16})
    (out / "iter_0000000").mkdir()
    (out / "iter_0000000" / "run_config.yaml").write_text(yaml.safe_dump({"model": {"hf_model_id": str(deepseek)}}))
    with pytest.raises(ConfigError, match="does not train; only to=hf"):
        run("bridge", out, "megatron", tmp_path / "ours")
    # the checkpoint names the model, but does not decide that Bridge unpickles it
    with pytest.raises(ConfigError, match=r"tokenizer is not set: .* if you trust"):
        run("bridge", out, "hf", tmp_path / "hf")
    assert not calls
    run("bridge", out, "hf", tmp_path / "hf", tokenizer=str(deepseek))
    assert calls == [
        ("from_hf_pretrained", str(deepseek), {}),
        ("export_ckpt", str(out / "iter_0000000"), str(tmp_path / "hf"), True),
    ]


def test_what_bridge_cannot_do_is_told(deepseek: Path, tmp_path: Path, calls: list[Any]) -> None:
    with pytest.raises(ConfigError, match="from=nemo to=bridge: convert to=hf first"):
        run("nemo", deepseek, "bridge", tmp_path / "out")
    with pytest.raises(ConfigError, match="card is not possible"):
        run("hf", deepseek, "bridge", tmp_path / "out", card="card.json")
    with pytest.raises(ConfigError, match="tensor_model_parallel_size is not possible"):
        run("hf", deepseek, "bridge", tmp_path / "out", tensor_model_parallel_size=2)
    (deepseek / "damaged").touch()
    with pytest.raises(CheckpointError, match="Megatron-Bridge failed: Failed to load"):
        run("hf", deepseek, "bridge", tmp_path / "out")
    assert not (tmp_path / "out").exists(), "what it left is removed"
    (deepseek / "config.json").write_text('{"architectures": ["BertModel"]}')
    with pytest.raises(CheckpointError, match="neither this package nor Megatron-Bridge"):
        run("hf", deepseek, "bridge", tmp_path / "out")
