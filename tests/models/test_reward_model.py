"""Reward-model training and scoring: every loss trains, metrics are those computed by hand, padding never counts."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from tiny import ARCHITECTURES, TOKENIZER, VOCABULARY, pairs, sequences, tiny_config

from nemo_advrm.config.schema import Config
from nemo_advrm.data.encoding import EncodedPair
from nemo_advrm.engine.microbatches import rows_to_microbatch
from nemo_advrm.engine.model import MegatronModel, build_model
from nemo_advrm.engine.runtime import Runtime
from nemo_advrm.engine.scoring import score_sequences
from nemo_advrm.errors import ConfigError
from nemo_advrm.models.reward_model import RewardModel
from nemo_advrm.models.trainable import StepCounter, derive_seed, total_steps

LOSSES = ("bt", "margin_bt", "scaled_bt", "regression")


def _config(loss: str = "bt", architecture: str = "llama") -> Config:
    cfg = tiny_config(architecture)
    cfg.reward_model.loss = loss
    cfg.reward_model.num_attributes = 2 if loss == "regression" else 1
    return cfg


def _module(cfg: Config, rows: list[EncodedPair] | None = None, seed: int = 0) -> RewardModel:
    return RewardModel(cfg, TOKENIZER, rows or pairs(16), pairs(5, seed=1), seed=seed)


def _scores(module: RewardModel, rows: list[EncodedPair]) -> tuple[torch.Tensor, torch.Tensor]:
    """[B] or [B, attributes] of both sides, from one unpadded sequence at a time."""
    return tuple(  # type: ignore[return-value]
        torch.stack([_alone(module.model, getattr(row, side)) for row in rows]).squeeze(-1)
        for side in ("chosen", "rejected")
    )


@torch.no_grad()
def _alone(model: MegatronModel, tokens: list[int]) -> torch.Tensor:
    positions = torch.arange(len(tokens))[None]
    return model.parts[0](torch.tensor([tokens]), positions, read_at_B=torch.tensor([len(tokens) - 1]))[0]


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("loss", LOSSES)
def test_every_weight_moves_in_one_step_of_every_loss(single: Runtime, loss: str, architecture: str) -> None:
    module = _module(_config(loss, architecture))
    before = {n: p.detach().clone() for n, p in module.model.parts[0].named_parameters()}
    module.train_on(pairs(16), 0)
    assert [n for n, p in module.model.parts[0].named_parameters() if torch.equal(p, before[n])] == []
    assert "head.weight" in before and not any(n.startswith("output_layer") for n in before)


@pytest.mark.parametrize("loss", LOSSES)
def test_every_loss_falls_when_trained_on_the_same_pairs(single: Runtime, loss: str) -> None:
    cfg = _config(loss)
    cfg.model.optim.lr = 5e-3
    module = _module(cfg)
    metrics = [module.train_on(pairs(16), step) for step in range(25)]
    assert metrics[-1]["train/loss"] < 0.5 * metrics[0]["train/loss"]
    assert loss == "regression" or metrics[-1]["train/accuracy"] == 1.0


def test_the_logged_metrics_are_those_of_the_scores(single: Runtime) -> None:
    module, rows = _module(_config()), pairs(11)
    chosen, rejected = _scores(module, rows)
    weights = torch.tensor([row.weight for row in rows])
    metrics = module.train_on(rows, 0)
    expected = {
        "train/loss": -(weights * torch.nn.functional.logsigmoid(chosen - rejected)).mean(),
        "train/accuracy": (chosen > rejected).float().mean(),
        "train/margin": (chosen - rejected).mean(),
        "train/chosen_mean": chosen.mean(),
        "train/chosen_std": chosen.std(correction=0),
        "train/rejected_mean": rejected.mean(),
        "train/rejected_std": rejected.std(correction=0),
        "tokens": sum(len(row.chosen) + len(row.rejected) for row in rows),
    }
    for key, value in expected.items():
        assert metrics[key] == pytest.approx(float(value), rel=1e-4, abs=1e-5), key


@pytest.mark.parametrize(
    ("loss", "centering", "l2"), [("margin_bt", 0.0, 0.0), ("scaled_bt", 0.0, 0.0), ("bt", 0.3, 0.0), ("bt", 0.0, 0.2)]
)
def test_variants_of_the_loss_are_those_written_out(single: Runtime, loss: str, centering: float, l2: float) -> None:
    cfg = _config(loss)
    cfg.reward_model.centering_coefficient, cfg.reward_model.score_l2_coefficient = centering, l2
    rows = [replace(row, weight=1.0) for row in pairs(9)]
    module = _module(cfg)
    chosen, rejected = _scores(module, rows)
    margin = torch.tensor([row.margin for row in rows])
    shift = margin if loss == "margin_bt" else torch.zeros_like(margin)
    scale = margin if loss == "scaled_bt" else torch.ones_like(margin)
    losses = -scale * torch.log(torch.sigmoid(chosen - rejected - shift))
    losses = losses + centering * (chosen + rejected) ** 2 + l2 * (chosen**2 + rejected**2) / 2
    assert module.train_on(rows, 0)["train/loss"] == pytest.approx(losses.mean().item(), rel=1e-4)


def test_regression_is_the_mean_squared_error_of_both_sides(single: Runtime) -> None:
    rows = [replace(row, weight=1.0) for row in pairs(6)]
    module = _module(_config("regression"))
    chosen, rejected = _scores(module, rows)
    errors = [
        (scores - torch.tensor([getattr(row, key) for row in rows])).square().mean()
        for scores, key in ((chosen, "chosen_labels"), (rejected, "rejected_labels"))
    ]
    assert module.train_on(rows, 0)["train/loss"] == pytest.approx(float(sum(errors)) / 2, rel=1e-4)


def test_a_model_without_an_opinion_has_accuracy_one_half(single: Runtime) -> None:
    module = _module(_config())
    with torch.no_grad():
        module.model.parts[0].head.weight.zero_()
    metrics = module.train_on([replace(row, weight=1.0) for row in pairs(7)], 0)
    assert metrics["train/accuracy"] == 0.5 and metrics["train/loss"] == pytest.approx(math.log(2))


def test_a_pair_of_weight_zero_changes_nothing_but_the_count(single: Runtime) -> None:
    rows = pairs(8)
    cfg = _config()
    silent = [replace(row, weight=0.0) for row in pairs(8, seed=3)]
    alone, diluted = _module(cfg).train_on(rows, 0), _module(cfg).train_on(rows + silent, 0)
    assert diluted["grad_norm"] == pytest.approx(alone["grad_norm"] / 2, rel=1e-4)


def test_regression_without_labels_is_refused_by_row(single: Runtime) -> None:
    rows = [replace(row, chosen_labels=None) if i == 3 else row for i, row in enumerate(pairs(8))]
    with pytest.raises(ConfigError, match=r"row 3: reward_model\.loss=regression needs 2 labels"):
        _module(_config("regression"), rows)


def test_validation_covers_every_pair_once_and_is_not_training(single: Runtime) -> None:
    cfg = _config()
    cfg.model.global_batch_size = 2
    module = _module(cfg)
    chosen, rejected = _scores(module, module.validation_rows)
    module.log_dict = lambda *args, **kwargs: None  # type: ignore[method-assign]
    for i, batch in enumerate(module.val_dataloader()):
        module.validation_step(batch, i)
    module.on_validation_epoch_end()
    assert module.validation_metrics["val/margin"] == pytest.approx((chosen - rejected).mean().item(), abs=1e-5)
    assert module.validation_metrics["val/accuracy"] == pytest.approx((chosen > rejected).float().mean().item())
    assert torch.equal(_scores(module, module.validation_rows)[0], chosen)


def test_members_of_an_ensemble_differ_by_seed_in_weights_and_order(single: Runtime) -> None:
    first, second, again = (_module(_config(), seed=seed) for seed in (0, 1, 0))
    heads = [m.model.parts[0].head.weight for m in (first, second, again)]
    assert torch.equal(heads[0], heads[2]) and not torch.equal(heads[0], heads[1])
    orders = [[row.source for row in next(m.steps(0))] for m in (first, second, again)]
    assert orders[0] == orders[2] != orders[1]


def test_members_of_an_ensemble_drop_out_different_units(single: Runtime, monkeypatch: pytest.MonkeyPatch) -> None:
    cfg = _config()
    cfg.model.hidden_dropout = 0.5
    monkeypatch.setattr(RewardModel, "optimizers", lambda self: StepCounter())
    monkeypatch.setattr(RewardModel, "log_dict", lambda self, *args, **kwargs: None)
    losses = []
    for seed in (1, 1, 2):
        member, weights = _module(cfg, seed=seed), _module(cfg, seed=0).model.state_dict()
        member.model.parts[0].load_state_dict(weights)
        member.training_step(pairs(16), 0)
        losses.append(member.step_metrics["train/loss"])
    assert losses[0] == losses[1] != losses[2]


def test_steps_from_the_middle_are_those_of_the_whole_run(single: Runtime) -> None:
    module = _module(_config())
    module.max_steps = 6
    assert list(module.steps(0))[4:] == list(module.steps(4))


def test_steps_are_counted_from_epochs_unless_they_are_given() -> None:
    cfg = tiny_config()
    assert total_steps(cfg, 20) == 1000
    cfg.trainer.max_steps, cfg.trainer.max_epochs = -1, 2
    assert total_steps(cfg, 20) == 5  # 40 rows in batches of 8


def test_derived_seeds_are_fixed_and_unrelated() -> None:
    assert derive_seed(0, "weights") == derive_seed(0, "weights")
    assert len({derive_seed(seed, "step", i) for seed in range(10) for i in range(100)}) == 1000


# scores


@pytest.fixture(scope="module", params=ARCHITECTURES)
def scorer(request: pytest.FixtureRequest, single: Runtime) -> MegatronModel:
    cfg = tiny_config(request.param)
    return build_model(cfg.model, cfg.precision, "reward", VOCABULARY, seed=3, trainable=False, head_init_std=0.3)


def test_a_score_does_not_depend_on_batch_mates_order_or_padding(scorer: MegatronModel) -> None:
    rows = sequences(13, longest=30)
    expected = torch.stack([_alone(scorer, row)[0] for row in rows])
    torch.testing.assert_close(score_sequences(scorer, rows, 0), expected, rtol=1e-5, atol=1e-5)
    order = torch.randperm(13)
    shuffled = score_sequences(scorer, [rows[i] for i in order], 0)
    torch.testing.assert_close(shuffled, expected[order], rtol=1e-5, atol=1e-5)
    with_longer = score_sequences(scorer, [rows[0], [5] * 60], 0)
    torch.testing.assert_close(with_longer[0], expected[0], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("pad_id", [0, TOKENIZER.eos_id, 37])
def test_the_score_is_read_at_the_last_real_token_whatever_the_pad_token_is(scorer: MegatronModel, pad_id: int) -> None:
    # rows hold the pad token inside and at their ends, as with pad = eos
    rows = [[5, pad_id, 9, TOKENIZER.eos_id], [7, 8, pad_id, pad_id], [pad_id], sequences(1, longest=30)[0]]
    expected = torch.stack([_alone(scorer, row)[0] for row in rows])
    torch.testing.assert_close(score_sequences(scorer, rows, pad_id), expected, rtol=1e-5, atol=1e-5)
    assert len({round(x, 4) for x in expected.tolist()}) == 4


@pytest.mark.parametrize("multiple", [1, 4, 16])
def test_rounding_the_padded_length_up_changes_no_score(
    scorer: MegatronModel, multiple: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = sequences(5)
    expected = score_sequences(scorer, rows, 0)
    monkeypatch.setattr("nemo_advrm.engine.microbatches.sequence_multiple", lambda model: multiple)
    assert rows_to_microbatch(scorer, rows, 0).tokens_BS.size(1) % multiple == 0
    torch.testing.assert_close(score_sequences(scorer, rows, 0), expected, rtol=1e-5, atol=1e-5)


def test_nothing_to_score_gives_no_scores(scorer: MegatronModel) -> None:
    assert score_sequences(scorer, [], 0).shape == (0,)


def test_a_head_of_several_outputs_gives_one_column_each(single: Runtime) -> None:
    cfg = tiny_config()
    model = build_model(cfg.model, cfg.precision, "reward", VOCABULARY, seed=3, trainable=False, head_outputs=3)
    assert score_sequences(model, sequences(4), 0).shape == (4, 3)
