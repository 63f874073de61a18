"""A policy with adapters: its reference is itself without them, and one copy of the weights is in memory."""

from __future__ import annotations

from pathlib import Path

import pytest
import rl
import torch
from distributed import Worlds
from tiny import TOKENIZER, responses, rollout_batch

from nemo_advrm.config.schema import Config
from nemo_advrm.engine import checkpoint
from nemo_advrm.engine.builders import build_policy
from nemo_advrm.engine.lora import is_trained
from nemo_advrm.engine.model import MegatronModel
from nemo_advrm.engine.runtime import Layout, Runtime
from nemo_advrm.errors import CheckpointError
from nemo_advrm.models.rollout_batch import response_log_probs


@pytest.fixture(scope="module")
def initial(single: Runtime, tmp_path_factory: pytest.TempPathFactory) -> str:
    return rl.save_policy(tmp_path_factory.mktemp("policy") / "initial")


def _config(algorithm: str = "rloo", **options: object) -> Config:
    cfg = rl.policy_config(algorithm, **options)
    cfg.model.peft = "lora"
    cfg.model.lora.rank = 4
    cfg.model.optim.lr = 2e-2
    return cfg


def _log_probs(model: MegatronModel) -> torch.Tensor:
    return response_log_probs(model, rollout_batch(responses(9, seed=3)), TOKENIZER.pad_id)[0]


@pytest.mark.parametrize("algorithm", ["rloo", "ppo"])
def test_adapters_move_and_the_reference_stays(initial: str, algorithm: str) -> None:
    module = rl.policy(_config(algorithm, updates_per_rollout=2), initial)
    assert module.model.parts[0] is module.reference.parts[0]
    start = _log_probs(build_policy(rl.policy_config(algorithm), TOKENIZER, initial, 0, trainable=False))
    assert torch.equal(_log_probs(module.model), start)
    before = rl.weights(module.model.parts[0])
    metrics = rl.train(module, 3)
    assert metrics[0]["kl"] == 0 and abs(metrics[-1]["kl"]) > 1e-3
    after = rl.weights(module.model.parts[0])
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert moved == {name for name in before if is_trained(name)}
    assert torch.equal(_log_probs(module.reference), start)
    assert (_log_probs(module.model) - start).abs().max() > 0.1
    if module.critic:
        assert module.critic.model.base is not None and metrics[0]["critic_grad_norm"] > 0


def test_the_kl_is_that_of_a_second_copy(initial: str, tmp_path: Path) -> None:
    module = rl.policy(_config(), initial)
    rl.train(module, 3)
    checkpoint.save(tmp_path / "model", module.model)
    merged = build_policy(rl.policy_config("rloo"), TOKENIZER, str(tmp_path / "model"), 0, trainable=False)
    torch.testing.assert_close(_log_probs(merged), _log_probs(module.model), rtol=1e-4, atol=1e-5)
    whole = rl.policy(rl.policy_config("rloo"), initial)
    torch.testing.assert_close(_log_probs(module.reference), _log_probs(whole.reference))


def test_a_loaded_policy_is_adapted_and_is_the_frozen_one_again_afterwards(initial: str) -> None:
    cfg = _config()
    cfg.model.offload_reference = True
    frozen = build_policy(cfg, TOKENIZER, initial, 0, trainable=False)
    start = _log_probs(frozen)
    for seed in (1, 2):
        module = rl.policy(cfg, initial, seed=seed, reference=frozen)
        assert module.reference is frozen and module.model.parts[0] is frozen.parts[0]
        assert torch.equal(_log_probs(module.model), start)  # the adapters are new ones
        rl.train(module, 1)
        assert torch.equal(_log_probs(frozen), start)
        assert not torch.equal(_log_probs(module.model), start)
        module.release()
    frozen_names = {name for name, p in frozen.parts[0].named_parameters() if not p.requires_grad}
    assert not any(map(is_trained, frozen_names)) and len(frozen_names) > 20


@pytest.mark.parametrize(
    "layout",
    [(Layout(tensor=2), {"sequence_parallel": True}), (Layout(pipeline=2), {})],
    ids=["tp2-sp", "pp2"],
)
def test_a_step_does_not_see_the_layout(worlds: Worlds, initial: str, layout: tuple[Layout, dict[str, bool]]) -> None:
    wanted = rl.lora_metrics(initial, {})
    for found in worlds.run(layout[0], "rl", "lora_metrics", 2, path=initial, model=layout[1]):
        for mine, theirs in zip(found, wanted, strict=True):
            for key in ("loss", "kl", "grad_norm", "entropy", "proxy"):
                assert mine[key] == pytest.approx(theirs[key], abs=1e-4, rel=1e-4), key


def test_whole_models_alone_are_saved_as_a_nemo_file(initial: str, tmp_path: Path) -> None:
    module = rl.policy(_config(), initial)
    with pytest.raises(CheckpointError, match=r"save_to writes whole models, not those of model\.peft=lora"):
        module.save_to(str(tmp_path / "policy.nemo"))
