"""``ensemble.share=lora``: each member is the model that its adapters make of the base, which is in memory once."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from distributed import Worlds
from reward_members import PROMPTS, one_step_of_rl, rollouts, save_megatron
from shared_base_jobs import adapters_config, scores_and_states, train
from tiny import TOKENIZER, VOCABULARY, pairs, tiny_config

from nemo_advrm import cli
from nemo_advrm.config.schema import BranchConfig, Config
from nemo_advrm.config.validation import check_values
from nemo_advrm.data.jsonl import read_jsonl
from nemo_advrm.engine import builders, checkpoint
from nemo_advrm.engine.builders import build_reward_model
from nemo_advrm.engine.checkpoint_meta import read_meta
from nemo_advrm.engine.feature_file import FeatureWeights, policy_fingerprint
from nemo_advrm.engine.runtime import Layout, Runtime
from nemo_advrm.errors import CheckpointError, ConfigError
from nemo_advrm.models.reward_model import RewardModel
from nemo_advrm.pipeline import branches
from nemo_advrm.plan.jobs import Held, job_of
from nemo_advrm.plan.memory import rank_memory
from nemo_advrm.plan.step_time import Clock
from nemo_advrm.rewards.detector_features import FeatureReader
from nemo_advrm.rewards.features import HybridReward
from nemo_advrm.rewards.local import MegatronReward
from nemo_advrm.rewards.shared_base import AdapterReward
from nemo_advrm.rewards.sources import load_members
from nemo_advrm.training.reward_model_training import EncodedPreferences, train_reward_model


@pytest.fixture(scope="module")
def base(single: Runtime, tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(save_megatron(tmp_path_factory.mktemp("base") / "policy", head="lm"))


@pytest.fixture(scope="module")
def members(base: str, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    return train(tmp_path_factory.mktemp("members"), base)


@pytest.fixture
def built(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The heads of the models that are built."""
    found: list[str] = []
    build = builders.build_model

    def counted(model: Any, precision: Any, head: str, *args: Any, **kwargs: Any) -> Any:
        found.append(head)
        return build(model, precision, head, *args, **kwargs)

    monkeypatch.setattr(builders, "build_model", counted)
    return found


def _merged(members: list[str]) -> list[torch.Tensor]:
    """What the members give as models of their own."""
    return scores_and_states(load_members(adapters_config(share="none"), members, TOKENIZER))


def test_members_are_the_adapters_that_are_trained_alone(base: str, members: list[str], tmp_path: Path) -> None:
    alone = train(tmp_path, base, share="none")
    for shared, single in zip(members, alone, strict=True):
        meta = read_meta(Path(shared))
        assert meta["base"] == read_meta(Path(single))["base"] and meta["base"]["path"] == base
        losses = [
            [row["train/loss"] for _, row in read_jsonl(Path(path).parent / "metrics.jsonl") if "train/loss" in row]
            for path in (shared, single)
        ]
        assert losses[0] == losses[1] and len(losses[0]) == 3
    for found, wanted in zip(_merged(members), _merged(alone), strict=True):
        assert torch.equal(found, wanted)


def test_one_base_scores_as_the_merged_members(members: list[str], built: list[str]) -> None:
    opened = load_members(adapters_config(), members, TOKENIZER)
    assert built == ["reward"]
    merged = _merged(members)
    assert built == ["reward"] * 3
    for _ in range(2):  # in any order, again and again
        for found, wanted in zip(scores_and_states(opened), merged, strict=True):
            torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)
    assert (merged[0] - merged[1]).abs().max() > 1e-2
    read = FeatureReader(opened, ["mahalanobis"], [1]).read(rollouts())
    torch.testing.assert_close(read.scores_NK, torch.stack([m[:, 0] for m in merged], -1), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(read.hidden_states[1], merged[1][:, 1:], rtol=1e-4, atol=1e-5)


def test_the_base_is_left_as_it_was(base: str, members: list[str]) -> None:
    first, _ = load_members(adapters_config(), members, TOKENIZER)
    assert isinstance(first, AdapterReward)
    (part,) = first.model.parts
    before = {name: tensor.clone() for name, tensor in part.state_dict().items() if torch.is_tensor(tensor)}
    head, hooks = part.head, part.decoder.layers[0].mlp.linear_fc1._forward_hooks
    with pytest.raises(RuntimeError, match="stop"), first.adapters.applied():
        assert len(hooks) == 1 and part.head is not head
        raise RuntimeError("stop")
    first.score(rollouts())
    assert not hooks and part.head is head and not any("adapter" in name for name in before)
    after = part.state_dict()
    assert all(torch.equal(tensor, after[name]) for name, tensor in before.items())
    weights = build_reward_model(tiny_config(peft="lora"), TOKENIZER, base, 0, trainable=True).parts[0].state_dict()
    assert torch.equal(
        weights["decoder.layers.0.mlp.linear_fc1.weight"], after["decoder.layers.0.mlp.linear_fc1.weight"]
    )


def test_adapters_on_adapters_share_the_base_at_the_end_of_the_chain(members: list[str], tmp_path: Path) -> None:
    """As after a warm retraining, with which each member continues from its own of the round before."""
    cfg = adapters_config()
    cfg.model.lora.targets = ["linear_qkv", "linear_fc2"]
    data = EncodedPreferences(pairs(16, seed=3), pairs(5, seed=9), [])
    train_reward_model(cfg, TOKENIZER, tmp_path / "rm_1", data, 1, "rm_1", members[0])
    both = [str(tmp_path / "rm_1" / "model"), members[1]]
    opened = load_members(cfg, both, TOKENIZER)
    assert opened[0].model is opened[1].model  # type: ignore[attr-defined]
    for found, wanted in zip(scores_and_states(opened), _merged(both), strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)
    assert (_merged(both)[0] - _merged(members)[0]).abs().max() > 1e-2


def test_other_members_stand_beside_and_a_single_one_is_merged(members: list[str], tmp_path: Path) -> None:
    other = str(save_megatron(tmp_path / "other", seed=5))
    first, whole, second = load_members(adapters_config(), [members[0], other, members[1]], TOKENIZER)
    assert [type(member) for member in (first, whole, second)] == [AdapterReward, MegatronReward, AdapterReward]
    assert first.model is second.model  # type: ignore[attr-defined]
    wanted = _merged([members[0], other, members[1]])
    for found, expected in zip(scores_and_states([first, whole, second]), wanted, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    assert [type(m) for m in load_members(adapters_config(), members[:1], TOKENIZER)] == [MegatronReward]


def test_a_member_has_reference_features_of_its_own(base: str, members: list[str], tmp_path: Path) -> None:
    path = tmp_path / "hybrid"
    shutil.copytree(members[0], path)
    FeatureWeights(("log_prob",), (0.5, 0.25), base, policy_fingerprint(Path(base)), (), 3).write(path)
    both = [str(path), members[1]]
    hybrid, plain = load_members(adapters_config(), both, TOKENIZER)
    assert isinstance(hybrid, HybridReward) and isinstance(hybrid.member, AdapterReward)
    alone = load_members(adapters_config(share="none"), both, TOKENIZER)
    for found, wanted in zip((hybrid, plain), alone, strict=True):
        torch.testing.assert_close(found.score(rollouts()), wanted.score(rollouts()), rtol=1e-4, atol=1e-5)
    assert (hybrid.score(rollouts()) - hybrid.member.score(rollouts())).abs().max() > 1e-2


@pytest.fixture(scope="module")
def headed(single: Runtime, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, list[torch.Tensor]]:
    """A base with a head, as a new one is drawn otherwise in each pipeline; and what two members on it give."""
    home = tmp_path_factory.mktemp("headed")
    base = str(save_megatron(home / "base"))
    return base, _merged(train(home, base))


@pytest.mark.parametrize("layout", [Layout(tensor=2), Layout(pipeline=2), Layout()], ids=["tp2", "pp2", "dp2"])
def test_the_layout_makes_no_difference(
    worlds: Worlds, headed: tuple[str, list[torch.Tensor]], layout: Layout, tmp_path: Path
) -> None:
    base, wanted = headed
    home = str(tmp_path / "split")
    for found in worlds.run(layout, "shared_base_jobs", "trained_and_scored", world_size=2, home=home, base=base):
        for mine, theirs in zip(found, wanted, strict=True):
            torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-4)


def test_a_changed_base_is_refused(members: list[str], base: str, tmp_path: Path) -> None:
    copy, path = tmp_path / "policy", tmp_path / "adapters"
    shutil.copytree(base, copy)
    module = RewardModel(tiny_config(peft="lora"), TOKENIZER, pairs(8), [], str(copy))
    checkpoint.save(path, module.model, meta={"tokenizer": TOKENIZER.fingerprint, "tokenizer_spec": "synthetic"})
    (copy / "manifest.json").write_text((copy / "manifest.json").read_text() + " ")
    with pytest.raises(CheckpointError, match=f"{path}: holds adapters of {copy}, which has changed since"):
        load_members(adapters_config(), [members[0], str(path)], TOKENIZER)


# commands


@pytest.fixture(scope="module")
def settings(base: str, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Of ``train_rm``."""
    home = tmp_path_factory.mktemp("command")
    rows = [{"prompt": p, "chosen": "birds sing .", "rejected": "these old clouds ."} for p in PROMPTS]
    (home / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    command = [word for word in one_step_of_rl(home, []) if word.startswith(("model.", "trainer.", "exp_manager."))]
    return [
        *command,
        f"pretrained_checkpoint.restore_from_path={base}",
        *(f"data.{key}={home / 'pairs.jsonl'}" for key in ("train_path", "validation_path")),
        *("trainer.max_steps=2", "model.global_batch_size=4", "model.optim.lr=0.01", "model.lora.rank=2"),
        *("ensemble.share=lora", "ensemble.size=2", "ensemble.bootstrap=true"),
    ]


def test_train_rm_trains_the_members_in_turn_and_an_attack_holds_their_base_once(
    base: str, settings: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str], built: list[str]
) -> None:
    run = tmp_path / "rms"
    for _ in range(2):  # the second time all is finished
        assert cli.main(["train_rm", *settings, f"run_dir={run}"]) == 0
        printed = capsys.readouterr().out
        assert [line for line in printed.splitlines() if line.startswith("reward model: ")] == [
            f"reward model: {run / f'rm_{k}' / 'model'}" for k in (1, 2)
        ]
    assert built == ["reward"] * 2
    names = [str(run / f"rm_{k}" / "model") for k in (1, 2)]
    assert {read_meta(Path(name))["base"]["path"] for name in names} == {base}
    built.clear()
    attack = [*one_step_of_rl(tmp_path, names), "ensemble.share=lora", f"run_dir={tmp_path / 'attack'}"]
    assert cli.main(["attack", *attack]) == 0
    assert built.count("reward") == 1
    (row, *_) = [row for _, row in read_jsonl(tmp_path / "attack" / "attack" / "samples.jsonl")]
    assert len(row["scores"]) == 2 and row["scores"][0] != row["scores"][1]


def test_adapters_need_weights_to_adapt(
    settings: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    without = [word for word in settings if not word.startswith("pretrained_checkpoint")]
    assert cli.main(["train_rm", *without, f"run_dir={tmp_path / 'run'}"]) != 0
    assert "ensemble.share=lora: needs weights to adapt" in capsys.readouterr().err


def test_what_adapters_cannot_have_is_refused() -> None:
    cfg = adapters_config()
    check_values(cfg)
    cfg.ensemble.own_trunk = True
    with pytest.raises(ConfigError, match=r"ensemble\.share=lora: ensemble\.own_trunk=true gives each member a trunk"):
        check_values(cfg)
    experts = tiny_config("experts")
    experts.ensemble.share = "lora"
    with pytest.raises(ConfigError, match=r"ensemble.share=lora: experts have no adapters \(model.num_moe_experts=4"):
        check_values(experts)
    cfg = adapters_config()
    cfg.pipeline.sft, cfg.pipeline.branches = True, {"other": BranchConfig(own_trunk=True)}
    with pytest.raises(ConfigError, match=r"pipeline\.branches\.other\.own_trunk=true: is not possible for members"):
        branches.check(cfg)


# the plan


def _job(stage: str, members: list[str], share: str = "lora", **model: Any) -> Any:
    cfg: Config = tiny_config(**model)
    cfg.plan.stage, cfg.ensemble.share, cfg.ensemble.size, cfg.ensemble.members = stage, share, 5, members
    return job_of(cfg, 1, VOCABULARY)


def test_the_plan_counts_one_base() -> None:
    def models(members: list[str]) -> list[Held]:
        return [held for held in _job("attack", members).models if held.head == "reward"]

    base = Held("base of reward models", "reward", False, adapter_sets=5)
    assert models([]) == [base]
    whole = Held("reward model", "reward", False, 1)
    assert models(["a", "b", "megatron:c", "d?attributes=1", "e", "hf:f", "http://a:1"]) == [base, whole]
    assert models(["a", "hf:b"]) == [Held("reward model", "reward", False, 2)]
    trained = _job("train_rm", [])
    assert trained.cfg.model.peft == "lora" and trained.models == (Held("reward model", "reward", True),)


def test_the_plan_adds_each_members_adapters_and_head_to_the_base_and_a_pass_for_each() -> None:
    jobs = {share: _job("attack", [], share, lora=adapters_config().model.lora) for share in ("none", "lora")}
    memory = {share: rank_memory(job, 0) for share, job in jobs.items()}
    one = memory["none"].parked / 6  # about: five reward models and a reference policy
    # rank 3: (32 + 64) + (32 + 32) + (32 + 96) + (48 + 32) a layer, 4 layers, and a head of 32; fp32
    each = 4 * (4 * 3 * (96 + 64 + 128 + 80) + 32)
    assert memory["lora"].frozen - memory["lora"].parked == 5 * each
    assert memory["none"].parked == memory["none"].frozen
    assert memory["lora"].parked == pytest.approx(2 * one, rel=0.01)
    assert Clock(jobs["lora"]).step().score == pytest.approx(Clock(jobs["none"]).step().score)
    waiting = [rank_memory(_job("attack", [], share, offload_reference=True), 0) for share in ("none", "lora")]
    assert waiting[1].phases["train"] - waiting[0].phases["train"] == waiting[1].frozen - waiting[1].parked > 0
