"""Adapters on their way out and in: merged into Hugging Face models, and in the format of ``peft``."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import convert_jobs
import pytest
import torch
from conftest import run
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from nemo_advrm.config.schema import LoraConfig, PrecisionConfig
from nemo_advrm.engine import checkpoint
from nemo_advrm.engine.model import build_model, with_adapters
from nemo_advrm.engine.runtime import Runtime
from nemo_advrm.errors import CheckpointError, ConfigError

TOLERANCE = {"rtol": 1e-4, "atol": 1e-4}
TOKENS_BS = torch.randint(3, 67, (3, 17), generator=torch.Generator().manual_seed(0))
SEQUENCES = [[*TOKENS_BS[i % 3, : 3 + 2 * i].tolist(), 2] for i in range(7)]
NAMES = ("llama3", "qwen2", "nemotron")


def adapted(base: Path, out: Path, head: Any = "lm", targets: list[str] | None = None) -> None:
    """Adapters with random B, and a new reward head, on the checkpoint ``base``, which is a language model."""
    frozen = convert_jobs.build(str(base))
    settings = LoraConfig(rank=3, alpha=5.0, targets=targets or LoraConfig().targets)
    model = frozen.model_config
    model.peft, model.lora = "lora", settings
    if head == "reward":
        built = build_model(model, PrecisionConfig(), "reward", frozen.vocab_size, seed=1, trainable=False)
        checkpoint.load(base, built, new_head=True)
        frozen = built
    trained = with_adapters(frozen, model, 2, checkpoint.base_of(base))
    torch.manual_seed(4)
    with torch.no_grad():
        for name, parameter in trained.parts[0].named_parameters():
            if "lora_B" in name or "head" in name:
                parameter.normal_(std=0.3)
    checkpoint.save(out, trained)


def applied(base: Path, adapter: Path, scale: float) -> Any:
    """The Hugging Face model of ``base`` with peft's adapters added to its weights by hand, and its score head."""
    tensors = load_file(adapter / "adapter_model.safetensors")
    reward = "base_model.model.score.weight" in tensors
    kind = AutoModelForSequenceClassification if reward else AutoModelForCausalLM
    options = {"num_labels": 1, "pad_token_id": 0} if reward else {}
    model = kind.from_pretrained(base, dtype=torch.float32, attn_implementation="eager", **options).eval()
    weights = dict(model.named_parameters())
    with torch.no_grad():
        for name in [name for name in tensors if name.endswith("lora_A.weight")]:
            module = name.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
            lora_A, lora_B = tensors.pop(name), tensors.pop(name.replace("lora_A", "lora_B"))
            weights[f"{module}.weight"] += scale * lora_B @ lora_A
        if reward:
            weights["score.weight"].copy_(tensors.pop("base_model.model.score.weight"))
    assert not tensors
    return model


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    return model(TOKENS_BS).logits


@pytest.fixture(scope="module")
def bases(single: Runtime, saved: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Checkpoints of this package, converted from Hugging Face."""
    home = tmp_path_factory.mktemp("bases")
    for name in NAMES:
        run("hf", saved(name), "megatron", home / name)
    return {name: home / name for name in NAMES}


@pytest.mark.parametrize("name", NAMES)
def test_a_policys_adapters_compute_the_same_in_every_format(
    saved: Callable[..., Path], bases: dict[str, Path], name: str, tmp_path: Path
) -> None:
    adapted(bases[name], tmp_path / "adapters")
    wanted = convert_jobs.logits(str(tmp_path / "adapters"), TOKENS_BS)
    assert (wanted - convert_jobs.logits(str(bases[name]), TOKENS_BS)).abs().max() > 0.1

    run("megatron", tmp_path / "adapters", "hf", tmp_path / "hf")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "hf", dtype=torch.float32, attn_implementation="eager")
    torch.testing.assert_close(logits(merged.eval()), wanted, **TOLERANCE)

    run("megatron", tmp_path / "adapters", "peft", tmp_path / "peft")
    torch.testing.assert_close(logits(applied(saved(name), tmp_path / "peft", 5 / 3)), wanted, **TOLERANCE)
    settings = json.loads((tmp_path / "peft" / "adapter_config.json").read_text())
    assert settings["base_model_name_or_path"] == str(saved(name))
    assert (settings["r"], settings["lora_alpha"], settings["task_type"]) == (3, 5.0, "CAUSAL_LM")
    first = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
    assert load_file(tmp_path / "peft" / "adapter_model.safetensors")[first].shape == (3, 48)

    run("peft", tmp_path / "peft", "megatron", tmp_path / "back", base=str(bases[name]))
    there, back = (checkpoint.read_meta(tmp_path / place) for place in ("adapters", "back"))
    assert there["base"] == back["base"] and there["model"]["lora"] == back["model"]["lora"]
    assert torch.equal(convert_jobs.logits(str(tmp_path / "back"), TOKENS_BS), wanted)


def test_a_reward_models_adapters_bring_its_head(
    saved: Callable[..., Path], bases: dict[str, Path], tmp_path: Path
) -> None:
    adapted(bases["llama3"], tmp_path / "adapters", "reward", ["linear_qkv", "linear_fc2"])
    wanted = convert_jobs.scores(str(tmp_path / "adapters"), SEQUENCES)
    run("megatron", tmp_path / "adapters", "hf", tmp_path / "hf")
    run("hf", tmp_path / "hf", "megatron", tmp_path / "merged")
    torch.testing.assert_close(convert_jobs.scores(str(tmp_path / "merged"), SEQUENCES), wanted, **TOLERANCE)

    run("megatron", tmp_path / "adapters", "peft", tmp_path / "peft", base="some/model")
    settings = json.loads((tmp_path / "peft" / "adapter_config.json").read_text())
    assert settings["target_modules"] == ["q_proj", "k_proj", "v_proj", "down_proj"]
    assert (settings["modules_to_save"], settings["task_type"]) == (["score"], "SEQ_CLS")
    assert settings["base_model_name_or_path"] == "some/model"
    model = applied(saved("llama3"), tmp_path / "peft", 5 / 3)
    with torch.no_grad():
        found = torch.cat([model(torch.tensor([row])).logits[0] for row in SEQUENCES])
    torch.testing.assert_close(found, wanted, **TOLERANCE)

    run("peft", tmp_path / "peft", "megatron", tmp_path / "back", base=str(bases["llama3"]))
    assert torch.equal(convert_jobs.scores(str(tmp_path / "back"), SEQUENCES), wanted)


def write_peft(directory: Path, modules: dict[str, tuple[int, int, int]], **settings: Any) -> None:
    """Adapters as peft writes them: {module: (rank, inputs, outputs)}, every A and B random."""
    directory.mkdir()
    torch.manual_seed(5)
    tensors = {}
    for module, (rank, inputs, outputs) in modules.items():
        tensors[f"base_model.model.model.{module}.lora_A.weight"] = 0.3 * torch.randn(rank, inputs)
        tensors[f"base_model.model.model.{module}.lora_B.weight"] = 0.3 * torch.randn(outputs, rank)
    save_file(tensors, directory / "adapter_model.safetensors")
    known = {"peft_type": "LORA", "r": 2, "lora_alpha": 3, "bias": "none", "task_type": "CAUSAL_LM", **settings}
    (directory / "adapter_config.json").write_text(json.dumps(known))


@pytest.mark.parametrize(("rslora", "scale"), [(False, 3 / 2), (True, 3 / 2**0.5)])
def test_adapters_of_queries_and_values_alone_come_in(
    saved: Callable[..., Path], bases: dict[str, Path], rslora: bool, scale: float, tmp_path: Path
) -> None:
    sizes = {"q": (2, 48, 48), "v": (2, 48, 24)}
    modules = {f"layers.{layer}.self_attn.{x}_proj": size for layer in (0, 2) for x, size in sizes.items()}
    write_peft(tmp_path / "peft", {**modules, "layers.3.mlp.up_proj": (2, 48, 80)}, use_rslora=rslora)
    run("peft", tmp_path / "peft", "megatron", tmp_path / "in", base=str(bases["llama3"]))
    meta = checkpoint.read_meta(tmp_path / "in")
    assert meta["model"]["lora"]["rank"] == 4 and meta["model"]["lora"]["targets"] == ["linear_qkv", "linear_fc1"]
    wanted = logits(applied(saved("llama3"), tmp_path / "peft", scale))
    torch.testing.assert_close(convert_jobs.logits(str(tmp_path / "in"), TOKENS_BS), wanted, **TOLERANCE)
    run("megatron", tmp_path / "in", "hf", tmp_path / "hf")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "hf", dtype=torch.float32, attn_implementation="eager")
    torch.testing.assert_close(logits(merged.eval()), wanted, **TOLERANCE)


@pytest.mark.parametrize(
    ("modules", "settings", "message"),
    [
        ({"layers.0.self_attn.q_proj": (2, 48, 48)}, {"use_dora": True}, "use_dora=True is not supported"),
        (
            {"layers.0.self_attn.q_proj": (2, 48, 48)},
            {"init_lora_weights": "pissa_niter_4"},
            "init_lora_weights='pissa",
        ),
        ({"layers.0.self_attn.q_proj": (2, 48, 48)}, {"alora_invocation_tokens": [5]}, "alora_invocation_tokens="),
        ({"layers.0.self_attn.q_proj": (2, 48, 48)}, {"peft_type": "IA3"}, "peft_type='IA3' is not supported"),
        ({"layers.0.self_attn.q_proj": (2, 48, 48)}, {"r": 0}, "r=0, lora_alpha=3: two positive numbers"),
        ({"layers.0.self_attn.q_proj": (2, 48, 40)}, {}, r"no adapter of a weight \[48, 48\]"),
        ({"embed_tokens": (2, 67, 48)}, {}, "tensors that are no adapters of Llama's linear layers"),
        ({}, {}, "there are no adapters of linear layers"),
    ],
)
def test_what_is_no_plain_lora_is_refused(
    bases: dict[str, Path],
    modules: dict[str, tuple[int, int, int]],
    settings: dict[str, Any],
    message: str,
    tmp_path: Path,
) -> None:
    write_peft(tmp_path / "peft", modules, **settings)
    with pytest.raises(CheckpointError, match=message):
        run("peft", tmp_path / "peft", "megatron", tmp_path / "in", base=str(bases["llama3"]))
    assert not (tmp_path / "in").exists()


def test_a_whole_model_and_other_formats_have_no_adapters(bases: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="holds no adapters, but a whole model: convert it with to=hf"):
        run("megatron", bases["llama3"], "peft", tmp_path / "out")
    with pytest.raises(ConfigError, match="from=hf to=peft: peft's format is converted from and to megatron"):
        run("hf", bases["llama3"], "peft", tmp_path / "out")
    write_peft(tmp_path / "peft", {"layers.0.self_attn.q_proj": (2, 48, 48)})
    with pytest.raises(ConfigError, match="base is not set"):
        run("peft", tmp_path / "peft", "megatron", tmp_path / "out")


def test_adapters_on_adapters_are_merged_alone(bases: dict[str, Path], tmp_path: Path) -> None:
    adapted(bases["llama3"], tmp_path / "first")
    adapted(tmp_path / "first", tmp_path / "second", targets=["linear_proj"])
    wanted = convert_jobs.logits(str(tmp_path / "second"), TOKENS_BS)
    run("megatron", tmp_path / "second", "hf", tmp_path / "hf")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "hf", dtype=torch.float32, attn_implementation="eager")
    torch.testing.assert_close(logits(merged.eval()), wanted, **TOLERANCE)
    with pytest.raises(CheckpointError, match="its adapters were trained on adapters"):
        run("megatron", tmp_path / "second", "peft", tmp_path / "peft")
