"""Members as heads on one trunk: their losses, weights and seeds, and that they are what single models would be."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from distributed import Worlds
from shared_trunk_jobs import heads_config, trained
from tiny import TOKENIZER, VOCABULARY, pairs, tiny_config

from nemo_advrm.config.schema import Config
from nemo_advrm.config.validation import check_values
from nemo_advrm.data.encoding import EncodedPair
from nemo_advrm.data.row_tables import PAIRS
from nemo_advrm.data.stored_rows import StoredRows, rows_at, write_rows
from nemo_advrm.engine import checkpoint
from nemo_advrm.engine.model import build_model
from nemo_advrm.engine.runtime import Layout, Runtime
from nemo_advrm.engine.schedule import forward_backward
from nemo_advrm.errors import CheckpointError, ConfigError
from nemo_advrm.models.reward_model import RewardModel
from nemo_advrm.models.shared_trunk import SharedTrunkModel
from nemo_advrm.training.reward_model_training import EncodedPreferences, bootstrap
from nemo_advrm.training.shared_trunk_rows import rows_of_heads


def _module(cfg: Config, rows: list[EncodedPair] | None = None, kind: type[RewardModel] = SharedTrunkModel) -> Any:
    return kind(cfg, TOKENIZER, rows or pairs(16), pairs(5, seed=1), seed=0)


def _weights(module: RewardModel) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in module.model.parts[0].named_parameters()}


def _gradients(module: RewardModel, rows: list[EncodedPair]) -> dict[str, torch.Tensor]:
    """Of the mean loss of the rows, all in one step."""
    module.optimizer.zero_grad()
    forward_backward(module.model, module._microbatches(rows), module._loss)
    return {name: p.main_grad.clone() for name, p in module.model.parts[0].named_parameters()}


def test_one_head_is_a_reward_model_exactly(single: Runtime) -> None:
    alone, shared = _module(tiny_config(), kind=RewardModel), _module(heads_config(1))
    rows = [replace(row, tied=i == 2) for i, row in enumerate(pairs(16))]
    for step in range(3):
        metrics, theirs = shared.train_on(rows, step), alone.train_on(rows, step)
        assert metrics.pop("train/accuracy_head_1") == metrics["train/accuracy"]
        assert metrics == theirs
    there = _weights(alone)
    assert all(torch.equal(tensor, there[name]) for name, tensor in _weights(shared).items())


def test_five_heads_move_with_the_trunk_and_learn(single: Runtime) -> None:
    cfg = heads_config(5)
    cfg.model.optim.lr = 5e-3
    module = _module(cfg)
    before = _weights(module)
    metrics = [module.train_on(pairs(16), step) for step in range(20)]
    assert [name for name, tensor in _weights(module).items() if torch.equal(tensor, before[name])] == []
    assert before["head.weight"].shape == (5, 32)
    assert metrics[-1]["train/loss"] < 0.7 * metrics[0]["train/loss"]
    heads = [metrics[0][f"train/accuracy_head_{k}"] for k in range(1, 6)]
    assert metrics[0]["train/accuracy"] == pytest.approx(sum(heads) / 5) and len(set(heads)) > 1


def test_a_head_begins_with_its_own_seed_however_many_there_are(single: Runtime) -> None:
    two, five = (_weights(_module(heads_config(count)))["head.weight"] for count in (2, 5))
    assert torch.equal(two, five[:2]) and not torch.equal(five[0], five[1])
    assert five.std().item() == pytest.approx(0.2, rel=0.2)


def test_bootstrap_weights_are_the_gradient_of_the_drawn_rows(single: Runtime) -> None:
    """The gradient of 3 heads is the mean of those of 3 single models, each on its rows as often as they were drawn."""
    rows, heads = pairs(9), 3
    data = rows_of_heads([EncodedPreferences(rows, [], [])] * heads, seed=4, resample=True)
    counts_NK = torch.tensor([row.head_weights for row in data.train])
    assert counts_NK.sum(0).tolist() == [9.0] * heads and (counts_NK == 0).any() and (counts_NK > 1).any()
    module = _module(heads_config(heads), data.train)
    found = _gradients(module, data.train)
    expected: dict[str, torch.Tensor] = {name: torch.zeros_like(tensor) for name, tensor in found.items()}
    weights = _weights(module)
    for k in range(heads):
        drawn = [row for row, count in zip(rows, counts_NK[:, k].int().tolist(), strict=True) for _ in range(count)]
        single_model = _module(tiny_config(), drawn, RewardModel)
        for name, parameter in single_model.model.parts[0].named_parameters():
            parameter.data.copy_(weights[name][k : k + 1] if name == "head.weight" else weights[name])
        for name, gradient in _gradients(single_model, drawn).items():
            place = expected[name][k : k + 1] if name == "head.weight" else expected[name]
            place += gradient / heads
    for name, gradient in found.items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-4, atol=1e-6)


def test_a_member_draws_what_it_would_draw_as_a_model_of_its_own() -> None:
    from nemo_advrm.seeds import derive_seed

    data = EncodedPreferences(pairs(12), [], [])
    shared = rows_of_heads([data] * 2, seed=7, resample=True)
    for k in range(2):
        alone = bootstrap(data, derive_seed(derive_seed(7, "rm", k + 1), "bootstrap"))
        times = [sum(row is own for own in alone.train) for row in data.train]
        assert [row.head_weights[k] for row in shared.train] == times
    assert (
        rows_of_heads([data], seed=7, resample=True).train
        == bootstrap(data, derive_seed(derive_seed(7, "rm", 1), "bootstrap")).train
    )
    assert rows_of_heads([data] * 2, seed=7, resample=False) is data


def test_rows_of_one_member_count_for_it_alone_and_its_weights_average_to_one(single: Runtime) -> None:
    parts = [EncodedPreferences(pairs(count, seed=count), [], []) for count in (4, 8)]
    data = rows_of_heads(parts, seed=0, resample=False)
    assert [row.head_weights for row in data.train] == [(3.0, 0.0)] * 4 + [(0.0, 1.5)] * 8
    module = _module(heads_config(2), data.train)
    head = _gradients(module, data.train[:4])["head.weight"]
    assert head[0].any() and not head[1].any()
    metrics = module.train_on(data.train[:4], 0)
    assert metrics["train/accuracy"] == metrics["train/accuracy_head_1"] and metrics["train/accuracy_head_2"] == 0.0


def test_a_continued_training_ends_with_the_same_weights(single: Runtime, tmp_path: Path) -> None:
    cfg = heads_config(3)
    data = rows_of_heads([EncodedPreferences(pairs(16), [], [])] * 3, seed=1, resample=True)
    whole = _module(cfg, data.train)
    for step, batch in zip(range(4), whole.steps(0), strict=False):
        if step == 2:
            checkpoint.save(tmp_path / "two", whole.model, whole.optimizer)
        whole.train_on(batch, step)
    again = _module(cfg, data.train)
    checkpoint.load(tmp_path / "two", again.model, again.optimizer)
    for step, batch in zip((2, 3), again.steps(2), strict=False):
        again.train_on(batch, step)
    there = _weights(whole)
    assert all(torch.equal(tensor, there[name]) for name, tensor in _weights(again).items())


@pytest.mark.parametrize("layout", [Layout(tensor=2), Layout(pipeline=2), Layout()], ids=["tp2", "pp2", "dp2"])
def test_five_heads_are_the_same_at_every_layout(
    worlds: Worlds, single: Runtime, layout: Layout, tmp_path: Path
) -> None:
    start = tmp_path / "start"
    cfg = heads_config(5)
    model = build_model(cfg.model, cfg.precision, "reward", VOCABULARY, seed=3, head_outputs=5, heads=5)
    checkpoint.save(start, model, meta={"tokenizer": TOKENIZER.fingerprint, "tokenizer_spec": "synthetic"})
    metrics, scores = trained(str(start), str(tmp_path / "alone"), Layout())
    assert len(scores) == 5 and len({tuple(column) for column in scores}) == 5
    arguments = {"start": str(start), "out": str(tmp_path / "split"), "layout": layout}
    for found, columns in worlds.run(layout, "shared_trunk_jobs", "trained", world_size=2, **_renamed(arguments)):
        for name, value in metrics.items():
            assert found[name] == pytest.approx(value, rel=1e-4, abs=1e-5), name
        torch.testing.assert_close(torch.tensor(columns), torch.tensor(scores), rtol=1e-4, atol=1e-4)


def _renamed(arguments: dict[str, Any]) -> dict[str, Any]:
    """``layout`` is the harness's own argument."""
    return {("at" if name == "layout" else name): value for name, value in arguments.items()}


def test_another_number_of_members_is_refused(single: Runtime, tmp_path: Path) -> None:
    two = _module(heads_config(2))
    checkpoint.save(tmp_path / "two", two.model)
    for other in (_module(heads_config(3)), _module(tiny_config(), kind=RewardModel)):
        with pytest.raises(CheckpointError, match=r"two: holds 2 members on its trunk, but [31] are wanted"):
            checkpoint.load(tmp_path / "two", other.model)


@pytest.mark.parametrize(
    ("section", "key", "value", "message"),
    [
        ("ensemble", "own_trunk", True, "ensemble.own_trunk=true gives each member a trunk of its own"),
        ("reward_model", "loss", "regression", "each member has one output"),
        ("reward_model", "reference_features", ["log_prob"], "reference_features are not fitted"),
    ],
)
def test_what_heads_cannot_have_is_refused(section: str, key: str, value: Any, message: str) -> None:
    cfg = heads_config(2)
    setattr(getattr(cfg, section), key, value)
    with pytest.raises(ConfigError, match=f"ensemble.share=trunk: .*{message}"):
        check_values(cfg)


@pytest.mark.parametrize("together", [True, False])
def test_pairs_stay_in_their_files_and_are_the_same(tmp_path: Path, together: bool) -> None:
    read: list[int] = []

    class Watched(StoredRows[EncodedPair]):
        def take(self, places: Sequence[int]) -> list[EncodedPair]:
            read.extend(places)
            return super().take(places)

    stored = [write_rows(tmp_path / f"{k}.arrow", PAIRS, pairs(count, seed=count)) for k, count in enumerate((4, 8))]
    in_files = [EncodedPreferences(Watched(rows._dataset, PAIRS), [], []) for rows in stored]
    in_memory = [EncodedPreferences(list(rows), [], []) for rows in stored]
    parts, expected = ([some[0]] * 2 if together else some for some in (in_files, in_memory))
    data = rows_of_heads(parts, seed=3, resample=True)
    assert not read
    every = list(rows_of_heads(expected, seed=3, resample=True).train)
    assert rows_at(data.train, [3, 0, 2]) == [every[3], every[0], every[2]] and read == [3, 0, 2]
    assert list(data.train) == every and len(data.train) == len(every)
