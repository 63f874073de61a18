"""Commands with ``model.peft=lora``: they write adapters, and an attack holds its policy once."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from reward_members import one_step_of_rl, save_megatron
from tiny import TOKENIZER, sequences, tiny_config

from nemo_advrm import cli
from nemo_advrm.data.jsonl import read_jsonl
from nemo_advrm.engine import builders
from nemo_advrm.engine.builders import build_policy, build_reward_model
from nemo_advrm.engine.checkpoint_meta import read_meta
from nemo_advrm.engine.runtime import Runtime
from nemo_advrm.engine.scoring import score_sequences
from nemo_advrm.errors import ConfigError
from nemo_advrm.training.hardening_target import describe_target

LORA = ["model.peft=lora", "model.lora.rank=4", "model.optim.lr=0.01"]


@pytest.fixture(scope="module")
def home(single: Runtime, tmp_path_factory: pytest.TempPathFactory) -> Path:
    home = tmp_path_factory.mktemp("lora")
    save_megatron(home / "other", seed=4)
    return home


@pytest.fixture(scope="module")
def settings(home: Path) -> list[str]:
    return [*one_step_of_rl(home, [home / "rm" / "model", home / "other"]), *LORA]


@pytest.fixture(scope="module")
def trained(home: Path, settings: list[str]) -> Path:
    """A reward model that ``train_rm`` has trained on the policy."""
    pairs = home / "pairs.jsonl"
    rows = [{"prompt": "this river", "chosen": "birds sing .", "rejected": "these old clouds ."}] * 4
    pairs.write_text("".join(json.dumps(row) + "\n" for row in rows))
    command = [word for word in settings if not word.startswith(("data.prompts_path", "ensemble.members"))]
    command += [f"data.{key}={pairs}" for key in ("train_path", "validation_path")]
    limits = ["trainer.max_steps=8", "model.global_batch_size=4", f"run_dir={home / 'rm'}"]
    assert cli.main(["train_rm", *command, *limits]) == 0
    return home / "rm" / "model"


def test_train_rm_writes_adapters_that_score(home: Path, trained: Path) -> None:
    meta = read_meta(trained)
    assert meta["head"] == "reward" and meta["base"]["path"] == str(home / "policy")
    sizes = [sum(f.stat().st_size for f in (path / "weights").iterdir()) for path in (trained, home / "policy")]
    assert sizes[0] < sizes[1]
    losses = [row["train/loss"] for _, row in read_jsonl(home / "rm" / "metrics.jsonl") if "train/loss" in row]
    assert losses[-1] < losses[0]
    model = build_reward_model(tiny_config(), TOKENIZER, str(trained), 0, trainable=False)
    assert torch.isfinite(score_sequences(model, sequences(3), TOKENIZER.pad_id)).all()


def test_an_attack_holds_its_policy_once(
    home: Path, settings: list[str], trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    built: list[str] = []
    build = builders.build_model

    def counted(model: Any, precision: Any, head: str, *args: Any, **kwargs: Any) -> Any:
        built.append(head)
        return build(model, precision, head, *args, **kwargs)

    monkeypatch.setattr(builders, "build_model", counted)
    run = tmp_path / "run"
    more = ["adversarial.detector=sft_log_prob", "adversarial.num_adversaries=2", "rl.max_steps=2"]
    more += ["rl.apply_unended_penalty=false"]
    assert cli.main(["attack", *settings, *more, f"run_dir={run}"]) == 0
    assert built.count("lm") == 1  # the SFT policy, which the detector reads, samples and both adversaries adapt
    rows = [row for _, row in read_jsonl(run / "attack" / "samples.jsonl")]
    assert {row["policy"] for row in rows} == {"direction_1_policy_1", "direction_1_policy_2"}
    for number in (1, 2):
        adversary = run / "attack" / f"direction_1_policy_{number}" / "model"
        assert read_meta(adversary)["base"]["path"] == str(home / "policy")
        build_policy(tiny_config(), TOKENIZER, str(adversary), 0, trainable=False)
    metrics = [row for _, row in read_jsonl(run / "attack" / "direction_1_policy_1" / "metrics.jsonl")]
    assert metrics[0]["kl"] == pytest.approx(0, abs=1e-6) and metrics[1]["kl"] != 0


def test_harden_trains_all_weights(trained: Path) -> None:
    cfg = tiny_config(peft="lora")
    cfg.harden.target = str(trained)
    with pytest.raises(ConfigError, match=r"model\.peft=lora: harden trains all weights of its target"):
        describe_target(cfg)
    cfg.model.peft = "none"
    assert describe_target(cfg).outputs == 1  # merged into the policy below
