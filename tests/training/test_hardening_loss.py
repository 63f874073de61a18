"""The loss of hardening as the engine computes it: by hand, and the same at every layout."""

from __future__ import annotations

from pathlib import Path

import hardening_jobs
import pytest
import torch
from distributed import Worlds
from reward_members import save_megatron
from tiny import TOKENIZER

from nemo_advrm.data.encoding import EncodedPair
from nemo_advrm.engine.runtime import Layout, Runtime
from nemo_advrm.engine.scoring import score_sequences
from nemo_advrm.errors import ConfigError
from nemo_advrm.models.hardened_reward_model import ReplayRow, round_weights


@pytest.fixture(scope="module")
def model(single: Runtime, tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(save_megatron(tmp_path_factory.mktemp("hardening") / "rm"))


def test_a_step_is_the_mean_over_finds_plus_the_weighted_mean_over_replay(single: Runtime, model: str) -> None:
    module = hardening_jobs.module(model)
    batch = next(module.steps(0))
    finds = [row for row in batch if isinstance(row, EncodedPair)]
    replay = [row for row in batch if isinstance(row, ReplayRow)]
    assert (len(finds), len(replay)) == (8, 6)

    def scores(rows: list[list[int]]) -> torch.Tensor:
        return score_sequences(module.model, rows, TOKENIZER.pad_id)

    spread = (143 / 12) ** 0.5  # of 0, 1, ..., 11
    margins = (scores([row.chosen for row in finds]) - scores([row.rejected for row in finds])) / spread
    weights = torch.tensor([row.weight for row in finds])
    moved = scores([row.tokens for row in replay]) - torch.tensor([row.original[0] for row in replay])
    wanted = (-torch.nn.functional.logsigmoid(margins) * weights).mean() + 0.5 * (moved / spread).square().mean()
    found = module.train_on(batch, 0)
    assert module.spread == pytest.approx(spread)
    assert found["train/loss"] == pytest.approx(wanted.item(), rel=1e-5)
    assert found["train/anchor"] == pytest.approx((moved / spread).square().mean().item(), rel=1e-5)
    assert found["train/margin"] == pytest.approx(margins.mean().item(), rel=1e-4, abs=1e-6)
    assert found["grad_norm"] > 0


@pytest.mark.parametrize("layout", [Layout(), Layout(tensor=2), Layout(pipeline=2)], ids=["dp2", "tp2", "pp2"])
def test_two_processes_give_the_loss_and_the_gradient_of_one(
    layout: Layout, worlds: Worlds, single: Runtime, model: str
) -> None:
    alone = hardening_jobs.metrics(model)
    for rank in worlds.run(layout, "hardening_jobs", "metrics", 2, path=model):
        for there, here in zip(rank, alone, strict=True):
            assert there.keys() == here.keys()
            assert all(there[name] == pytest.approx(here[name], rel=1e-4, abs=1e-4) for name in here)


def test_finds_and_replay_may_be_packed(single: Runtime, model: str) -> None:
    for there, here in zip(hardening_jobs.metrics(model, packing="always"), hardening_jobs.metrics(model), strict=True):
        assert there == pytest.approx(here, rel=1e-4, abs=1e-4)


def test_without_weight_nothing_is_replayed(single: Runtime, model: str) -> None:
    assert all(isinstance(row, EncodedPair) for row in next(hardening_jobs.module(model, weight=0.0).steps(0)))


def test_clean_responses_of_one_score_are_refused(single: Runtime, model: str, tmp_path: Path) -> None:
    module = hardening_jobs.module(model)
    with pytest.raises(ConfigError, match=r"gives all 3 clean responses the same score"):
        module.anchor_to([ReplayRow([3, 4], (2.0,))] * 3)


def test_the_head_is_rounded_to_its_own_format(single: Runtime, model: str) -> None:
    module = hardening_jobs.module(model)
    (part,) = module.model.parts
    before = {name: parameter.detach().clone() for name, parameter in part.named_parameters()}
    round_weights(module, torch.bfloat16, torch.float32)
    for name, parameter in part.named_parameters():
        is_head = name.startswith("head.")
        wanted = before[name] if is_head else before[name].bfloat16().float()
        assert torch.equal(parameter, wanted), name
    assert any(name.startswith("head.") for name in before)
