"""Adapters: what they add, that they alone are trained, at every layout, and that their checkpoints hold them alone."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import lora_jobs
import pytest
import torch
from distributed import Worlds
from parity_jobs import save_initial
from tiny import ARCHITECTURES, TOKENIZER, sequences, tiny_config

from nemo_advrm.engine import checkpoint, lora
from nemo_advrm.engine.builders import adapt_policy, build_policy, build_reward_model
from nemo_advrm.engine.manifest import digest
from nemo_advrm.engine.runtime import Layout, Runtime
from nemo_advrm.engine.scoring import score_sequences
from nemo_advrm.engine.weights_metadata import open_metadata
from nemo_advrm.errors import CheckpointError, ConfigError
from nemo_advrm.models.reward_model import RewardModel

LAYOUTS: dict[str, tuple[Layout, int, dict[str, Any]]] = {
    "tp2": (Layout(tensor=2), 2, {}),
    "tp2-sp": (Layout(tensor=2), 2, {"sequence_parallel": True}),
    "tp2-sp-packed": (Layout(tensor=2), 2, {"sequence_parallel": True, "sequence_packing": "always"}),
    "pp2": (Layout(pipeline=2), 2, {}),
    "pp2-interleaved": (Layout(pipeline=2), 2, {"virtual_pipeline_model_parallel_size": 2}),
    "cp2": (Layout(context=2), 2, {}),
    "dp2": (Layout(), 2, {"use_distributed_optimizer": True, "overlap_grad_reduce": True}),
}


@pytest.fixture(scope="module")
def bases(single: Runtime, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Checkpoints {lm, reward, value} of both architectures."""
    found = {}
    for name in ARCHITECTURES:
        found[name] = str(tmp_path_factory.mktemp(name))
        save_initial(name, found[name])
    return found


def _scores(base: str, architecture: str = "llama") -> torch.Tensor:
    model = build_reward_model(tiny_config(architecture), TOKENIZER, base, 0, trainable=False)
    return score_sequences(model, sequences(11), TOKENIZER.pad_id)


def _named(module: RewardModel) -> dict[str, torch.Tensor]:
    return {name: tensor.detach().clone() for name, tensor in module.model.parts[0].named_parameters()}


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_new_adapters_add_nothing_and_those_switched_off_neither(bases: dict[str, str], architecture: str) -> None:
    base = f"{bases[architecture]}/reward"
    module = lora_jobs.reward_model(base, architecture)
    before = _scores(base, architecture)
    assert torch.equal(lora_jobs.scores(module), before)
    with torch.no_grad():
        for name, parameter in module.model.parts[0].named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.2)
    assert (lora_jobs.scores(module) - before).abs().min() > 1e-4
    with lora.switched_off(module.model.parts):
        assert torch.equal(lora_jobs.scores(module), before)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_adapters_and_head_are_trained_and_nothing_else(bases: dict[str, str], architecture: str) -> None:
    module = lora_jobs.reward_model(f"{bases[architecture]}/reward", architecture)
    before = _named(module)
    lora_jobs.train(module, 0, 2)
    moved = {name for name, tensor in _named(module).items() if not torch.equal(tensor, before[name])}
    assert moved == {name for name in before if lora.is_trained(name)} and "head.weight" in moved
    assert len(moved) == 4 * 4 * 2 + 1
    with_gradients = {name for name, parameter in module.model.parts[0].named_parameters() if parameter.requires_grad}
    assert with_gradients == moved


def test_adapters_learn_the_preferences(bases: dict[str, str]) -> None:
    metrics = lora_jobs.train(lora_jobs.reward_model(f"{bases['llama']}/reward"), 0, 12)
    assert metrics[-1]["train/loss"] < 0.5 * metrics[0]["train/loss"]


def test_only_the_targets_have_adapters(bases: dict[str, str]) -> None:
    cfg = tiny_config(peft="lora")
    cfg.model.lora.targets = ["linear_proj", "linear_fc1"]
    model = build_reward_model(cfg, TOKENIZER, f"{bases['llama']}/reward", 0, trainable=True)
    places = {name.split(".")[-2] for name in model.state_dict() if "lora_A" in name}
    assert places == {"linear_proj_adapter", "linear_fc1_adapter"}


@pytest.mark.parametrize("recompute", ["selective", "full", "block"])
def test_recomputed_layers_get_the_same_gradients(bases: dict[str, str], alone: dict[int, Any], recompute: str) -> None:
    base, wanted = f"{bases['llama']}/reward", alone[3]
    found = lora_jobs.train_and_score(base, "llama", {"recompute": recompute, "recompute_num_layers": 2})
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-6)


def test_dropout_is_for_training_alone(bases: dict[str, str]) -> None:
    base = f"{bases['llama']}/reward"
    module = lora_jobs.reward_model(base)
    dropping = lora_jobs.reward_model(base)
    for adapter in (m for m in dropping.model.parts[0].modules() if isinstance(m, lora.Adapter)):
        adapter.dropout = 0.5
    same, other = (lora_jobs.train(m, 0, 2) for m in (module, dropping))
    assert same[0]["train/loss"] == other[0]["train/loss"]  # B is still zero
    assert same[1]["train/loss"] != other[1]["train/loss"]
    assert torch.equal(lora_jobs.scores(dropping), lora_jobs.scores(dropping))


@pytest.fixture(scope="module")
def alone(bases: dict[str, str]) -> dict[int, Any]:
    """What one process gets after 3 and after 5 steps."""
    return {steps: lora_jobs.train_and_score(f"{bases['llama']}/reward", "llama", {}, steps=steps) for steps in (3, 5)}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_training_does_not_see_the_layout(
    worlds: Worlds, bases: dict[str, str], alone: dict[int, Any], layout: str, tmp_path: Path
) -> None:
    base, wanted = f"{bases['llama']}/reward", alone[3]
    where, size, model = LAYOUTS[layout]
    out = str(tmp_path / "state")
    arguments = {"base": base, "architecture": "llama", "model": model, "out": out}
    for metrics, scores in worlds.run(where, "lora_jobs", "train_and_score", size, **arguments):
        for mine, theirs in zip(metrics, wanted[0], strict=True):
            for key in ("train/loss", "grad_norm", "train/margin"):
                assert mine[key] == pytest.approx(theirs[key], abs=1e-4)
        torch.testing.assert_close(scores, wanted[1], rtol=1e-4, atol=1e-4)
    # the checkpoint opens at any layout, merged into the base
    torch.testing.assert_close(_scores(out), wanted[1], rtol=1e-4, atol=1e-4)
    kept = {key: value for key, value in model.items() if key == "use_distributed_optimizer"}
    again = lora_jobs.continue_and_score(base, out, 3, 5, **kept)
    torch.testing.assert_close(again[1], alone[5][1], rtol=1e-4, atol=1e-4)


def test_biases_and_plain_mlps_at_tensor_parallel_2(worlds: Worlds, bases: dict[str, str]) -> None:
    base = f"{bases['gpt']}/reward"
    wanted = lora_jobs.train_and_score(base, "gpt", {})
    arguments = {"base": base, "architecture": "gpt", "model": {"sequence_parallel": True}}
    for _, scores in worlds.run(Layout(tensor=2), "lora_jobs", "train_and_score", 2, **arguments):
        torch.testing.assert_close(scores, wanted[1], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("layout", ["tp2", "pp2", "pp2-interleaved"])
def test_the_plan_counts_what_is_trained(worlds: Worlds, bases: dict[str, str], layout: str) -> None:
    where, size, model = LAYOUTS[layout]
    found = worlds.run(where, "lora_jobs", "trained_and_counted", size, base=f"{bases['llama']}/reward", model=model)
    assert all(trained == counted > 0 for trained, counted in found)


@pytest.fixture(scope="module")
def trained(bases: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, torch.Tensor]:
    """The training state after two steps, and the scores then."""
    path = tmp_path_factory.mktemp("trained") / "state"
    _, scores = lora_jobs.train_and_score(f"{bases['llama']}/lm", "llama", {}, str(path), steps=2)
    return path, scores


def test_a_checkpoint_holds_adapters_and_head_alone(bases: dict[str, str], trained: tuple[Path, torch.Tensor]) -> None:
    path, _ = trained
    stored = {name for name in open_metadata(path / "weights").state_dict_metadata if name.startswith("model.")}
    assert stored == {
        f"model.decoder.layers.{place}_adapter.lora_{matrix}"
        for place in ("self_attention.linear_qkv", "self_attention.linear_proj", "mlp.linear_fc1", "mlp.linear_fc2")
        for matrix in "AB"
    } | {"model.head.weight"}
    meta = json.loads((path / "meta.json").read_text())
    assert meta["base"]["path"] == f"{bases['llama']}/lm" and meta["model"]["lora"]["rank"] == lora_jobs.RANK


def test_a_continued_training_is_the_uninterrupted_one(
    bases: dict[str, str], trained: tuple[Path, torch.Tensor]
) -> None:
    base = f"{bases['llama']}/lm"
    metrics, scores = lora_jobs.train_and_score(base, "llama", {}, steps=4)
    again = lora_jobs.continue_and_score(base, str(trained[0]), 2, 4)
    assert torch.equal(again[1], scores) and again[0] == metrics[2:]


def test_adapters_are_trained_on_merged_adapters(
    bases: dict[str, str], trained: tuple[Path, torch.Tensor], tmp_path: Path
) -> None:
    path, scores = trained
    torch.testing.assert_close(_scores(str(path)), scores, rtol=1e-5, atol=1e-5)
    module = lora_jobs.reward_model(str(path))
    torch.testing.assert_close(lora_jobs.scores(module), scores, rtol=1e-5, atol=1e-5)
    lora_jobs.train(module, 0, 2)
    checkpoint.save(tmp_path / "second", module.model)
    torch.testing.assert_close(_scores(str(tmp_path / "second")), lora_jobs.scores(module), rtol=1e-5, atol=1e-5)
    # all weights are trained on from them too
    plain = build_reward_model(tiny_config(), TOKENIZER, str(tmp_path / "second"), 0, trainable=True)
    found = score_sequences(plain, sequences(11), TOKENIZER.pad_id)
    torch.testing.assert_close(found, lora_jobs.scores(module), rtol=1e-5, atol=1e-5)


def test_a_base_that_is_gone_or_another_one_is_named(bases: dict[str, str], tmp_path: Path) -> None:
    base = tmp_path / "base"
    shutil.copytree(f"{bases['llama']}/reward", base)
    path = tmp_path / "adapters"
    module = lora_jobs.reward_model(str(base))
    checkpoint.save(path, module.model)
    _scores(str(path))
    (base / "manifest.json").write_text((base / "manifest.json").read_text() + " ")
    with pytest.raises(CheckpointError, match=f"{path}: holds adapters of {base}, which has changed since"):
        _scores(str(path))
    shutil.rmtree(base)
    with pytest.raises(CheckpointError, match=f"{path}: holds adapters, whose base cannot be read: {base}"):
        _scores(str(path))


def test_adapters_on_themselves_end(trained: tuple[Path, torch.Tensor], tmp_path: Path) -> None:
    path = tmp_path / "circle"
    shutil.copytree(trained[0], path)
    meta = json.loads((path / "meta.json").read_text())
    meta["base"] = {"path": str(path), "digest": digest(path)}
    (path / "meta.json").write_text(json.dumps(meta))
    with pytest.raises(CheckpointError, match="more than 64"):
        _scores(str(path))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rank": 2}, "model.lora.rank is 3 in the checkpoint and 2 in the configuration"),
        ({"alpha": 1.0}, "model.lora.alpha is 6.0"),
        ({"targets": ["linear_qkv"]}, "model.lora.targets"),
    ],
)
def test_training_does_not_continue_with_other_adapters(
    bases: dict[str, str], trained: tuple[Path, torch.Tensor], change: dict[str, Any], message: str
) -> None:
    module = lora_jobs.reward_model(f"{bases['llama']}/lm")
    for key, value in change.items():
        setattr(module.model.model_config.lora, key, value)
    with pytest.raises(CheckpointError, match=message):
        checkpoint.load(trained[0], module.model, module.optimizer)


def test_training_does_not_continue_on_another_base_or_without_adapters(
    bases: dict[str, str], trained: tuple[Path, torch.Tensor]
) -> None:
    module = lora_jobs.reward_model(f"{bases['llama']}/reward")
    with pytest.raises(CheckpointError, match="the base that is loaded is"):
        checkpoint.load(trained[0], module.model, module.optimizer)
    whole = RewardModel(tiny_config(), TOKENIZER, module.train_rows, [])
    with pytest.raises(CheckpointError, match=r"written with model.peft=lora, so model.peft=none cannot continue"):
        checkpoint.load(trained[0], whole.model, whole.optimizer)


def test_adapters_need_weights_to_adapt(single: Runtime) -> None:
    with pytest.raises(ConfigError, match=r"needs weights to adapt: set pretrained_checkpoint.restore_from_path"):
        lora_jobs.reward_model("")


def test_the_frozen_model_below_stays_what_it_was(bases: dict[str, str]) -> None:
    base, cfg = f"{bases['llama']}/lm", tiny_config(peft="lora")
    frozen = build_policy(cfg, TOKENIZER, base, 0, trainable=False)
    first, second = (adapt_policy(cfg, frozen, base, seed) for seed in (1, 2))
    weights = dict(frozen.parts[0].named_parameters())
    assert first.parts[0] is second.parts[0] is frozen.parts[0]  # one copy
    assert sum("lora_A" in name for name in weights) == 4 * 4  # the first adapters are gone
    assert not frozen.trainable and second.trainable
    hooks = frozen.parts[0].decoder.layers[0].mlp.linear_fc1._forward_hooks
    assert len(hooks) == 1
