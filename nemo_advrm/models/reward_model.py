"""The reward model as it is trained: scores both responses of a pair and applies a preference loss."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from nemo_advrm.config.schema import Config
from nemo_advrm.data.batching import BatchSchedule
from nemo_advrm.data.encoding import EncodedPair
from nemo_advrm.data.stored_rows import rows_at
from nemo_advrm.data.tokenizers import Tokenizer
from nemo_advrm.engine import runtime
from nemo_advrm.engine.builders import build_reward_model
from nemo_advrm.engine.microbatches import Microbatch, microbatch_rows, scored_microbatch
from nemo_advrm.engine.model import MegatronModel
from nemo_advrm.engine.optim import MegatronOptimizer
from nemo_advrm.engine.schedule import Sums, evaluate, forward_backward, reduce_metrics
from nemo_advrm.errors import ConfigError
from nemo_advrm.models.trainable import Batches, TrainableModel, derive_seed, shard_rows, total_steps
from nemo_advrm.objectives.accuracy import right_of_pairs
from nemo_advrm.objectives.losses import PreferenceLoss, preference_loss, reads_labels
from nemo_advrm.objectives.spread import variance_of
from nemo_advrm.registry import PREFERENCE_LOSSES

MixRows = Callable[[int, list[EncodedPair]], list[EncodedPair]]
"""(step, the global batch) -> the global batch with adversarial pairs mixed in."""
MoreRows = Callable[[int], list[Any]]
"""step -> rows that join its global batch: adversarial pairs, or what a subclass can train on."""


class RewardModel(TrainableModel):
    """A Megatron GPT with a scalar head, trained on preference pairs.

    Args:
        cfg: configuration of the stage.
        tokenizer: the tokenizer that encoded the rows.
        train_rows, validation_rows: encoded pairs.
        restore_from: checkpoint of a language model (its trunk is loaded, the head is new) or of a reward model (all is
            loaded); empty starts from random weights.
        seed: seed of weights, head and data order; members of an ensemble differ in it.

    Raises ConfigError when the loss needs margins or labels that the rows do not have.
    """

    stage = "train_rm"

    def __init__(
        self,
        cfg: Config,
        tokenizer: Tokenizer,
        train_rows: Sequence[EncodedPair],
        validation_rows: Sequence[EncodedPair],
        restore_from: str = "",
        seed: int = 0,
    ) -> None:
        super().__init__(cfg, tokenizer, total_steps(cfg, len(train_rows)), seed)
        self.train_rows = train_rows
        self.validation_rows = validation_rows
        self.mix: MixRows | None = None
        self.on_top: MoreRows | None = None
        self._check_rows()
        own_seed = derive_seed(seed, "weights")
        self.model = build_reward_model(cfg, tokenizer, restore_from, own_seed, trainable=True, heads=self._heads(cfg))
        self.optimizer = MegatronOptimizer(self.model, cfg.model.optim, cfg.trainer.gradient_clip_val)
        self._validation: list[Sums] = []

    def trained(self) -> dict[str, tuple[MegatronModel, MegatronOptimizer]]:
        return {"reward_model": (self.model, self.optimizer)}

    def steps(self, start: int) -> Iterator[list[EncodedPair]]:
        rt = runtime.current()
        order = BatchSchedule(
            len(self.train_rows), self.config.model.global_batch_size, derive_seed(self.seed, "order")
        )
        for step in range(start, self.max_steps):
            rows = rows_at(self.train_rows, order.rows_for_step(step))
            if self.mix is not None:
                rows = self.mix(step, rows)
            # sharded separately, so that the other rows reach the same ranks with and without them
            more = self.on_top(step) if self.on_top is not None else []
            yield [
                row
                for part in (rows, more)
                for row in shard_rows(part, [row.length for row in part], rt.dp_rank, rt.dp_size)
            ]

    def train_on(self, batch: list[EncodedPair], step: int) -> dict[str, float]:
        self.optimizer.zero_grad()
        metrics = _describe(forward_backward(self.model, self._microbatches(batch), self._loss))
        lr = self.learning_rate(step)
        norm = self.optimizer.step(lr, step)
        tokens = sum(row.token_count for row in batch)
        return {
            **{f"train/{k}": v for k, v in metrics.items()},
            "grad_norm": norm,
            "learning_rate": lr,
            "tokens": float(tokens),
        }

    def _heads(self, cfg: Config) -> int:
        """Members of an ensemble that the model holds."""
        return 1

    def _check_rows(self) -> None:
        """Raise ConfigError when the loss needs margins or labels that the rows do not have."""
        options = self.config.reward_model
        loss: PreferenceLoss = PREFERENCE_LOSSES[options.loss]
        if loss.needs_margin and all(row.margin is None for row in self.train_rows):
            raise ConfigError(f"reward_model.loss={options.loss} needs rows with the key margin: none has it")
        if loss.of_labels is not None:
            for row in itertools.chain(self.train_rows, self.validation_rows):
                labels = (row.chosen_labels, row.rejected_labels)
                if any(x is None or len(x) != options.num_attributes for x in labels):
                    raise ConfigError(
                        f"{row.source}: reward_model.loss=regression needs {options.num_attributes} labels "
                        "per response (keys chosen_labels and rejected_labels)"
                    )

    # validation

    def val_dataloader(self) -> Batches:
        rt = runtime.current()
        size = self.config.model.global_batch_size
        limit = self.config.trainer.limit_val_batches or len(self.validation_rows)
        starts = range(0, len(self.validation_rows), size)[:limit]

        def batch(number: int) -> list[EncodedPair]:
            rows = self.validation_rows[starts[number] : starts[number] + size]
            return shard_rows(list(rows), [row.length for row in rows], rt.dp_rank, rt.dp_size)

        return Batches(len(starts), batch)

    def validation_step(self, batch: list[EncodedPair], batch_idx: int) -> None:
        # ranks without rows take part as well: other ranks may wait for them in a collective
        self._validation += evaluate(self.model, self._microbatches(batch), self._loss)

    def on_validation_epoch_end(self) -> None:
        metrics = _describe(reduce_metrics(self._validation))
        self._validation = []
        self.validation_metrics = {f"val/{k}": v for k, v in metrics.items()}
        self.log_dict(self.validation_metrics, rank_zero_only=True)

    def _microbatches(self, rows: list[EncodedPair]) -> list[Microbatch]:
        groups = microbatch_rows(self.model, [r.lengths for r in rows])
        loss, pad_id = self.config.reward_model.loss, self.tokenizer.pad_id
        return [pair_microbatch(self.model, [rows[i] for i in group], pad_id, loss) for group in groups]

    def _loss(self, output: Tensor, microbatch: Microbatch) -> tuple[Tensor, int, Sums]:
        chosen_BA, rejected_BA = output.chunk(2)
        of_labels = PREFERENCE_LOSSES[self.config.reward_model.loss].of_labels
        if of_labels is not None:
            losses_B = of_labels(chosen_BA, microbatch.extra["chosen_labels"])
            losses_B = (losses_B + of_labels(rejected_BA, microbatch.extra["rejected_labels"])) / 2
        else:
            losses_B = self._pair_losses(chosen_BA[:, 0], rejected_BA[:, 0], microbatch)
        sums = pair_sums(chosen_BA.detach().mean(-1), rejected_BA.detach().mean(-1), microbatch.extra.get("tied"))
        return (losses_B * microbatch.extra["weight"]).sum(), chosen_BA.size(0), sums

    def _pair_losses(self, chosen_B: Tensor, rejected_B: Tensor, microbatch: Microbatch) -> Tensor:
        options = self.config.reward_model
        return preference_loss(
            options.loss,
            chosen_B,
            rejected_B,
            microbatch.extra["margin"],
            options.centering_coefficient,
            options.score_l2_coefficient,
            microbatch.extra.get("tied"),
        )


def pair_sums(
    chosen_B: Tensor, rejected_B: Tensor, tied_B: Tensor | None = None, counted_B: Tensor | None = None
) -> Sums:
    """Accuracy, margin, and mean and mean square of the scores of both sides, over the pairs in ``counted_B`` (None:
    all). A tie has no preferred side to be right about."""

    def mean_over(values_B: Tensor, kept_B: Tensor | None) -> tuple[Tensor, Tensor | int]:
        if kept_B is None:
            return values_B.sum(), len(values_B)
        return torch.where(kept_B, values_B, 0.0).sum(), kept_B.sum()

    preferred_B = counted_B if tied_B is None else ~tied_B if counted_B is None else counted_B & ~tied_B
    sums: Sums = {
        "accuracy": mean_over(right_of_pairs(chosen_B, rejected_B), preferred_B),
        "margin": mean_over(chosen_B - rejected_B, preferred_B),
    }
    for name, scores_B in (("chosen", chosen_B), ("rejected", rejected_B)):
        sums[f"{name}_mean"] = mean_over(scores_B, counted_B)
        sums[f"{name}_square"] = mean_over(scores_B.square(), counted_B)
    return sums


def pair_microbatch(model: MegatronModel, rows: list[EncodedPair], pad_id: int, loss: str) -> Microbatch:
    """Builds a microbatch of all chosen rows, then all rejected rows, read at their last tokens.

    ``extra`` holds the tensors that ``loss`` reads. A row without a margin, such as an adversarial pair, gets the
    loss's neutral margin.
    """
    microbatch = scored_microbatch(model, [r.chosen for r in rows] + [r.rejected for r in rows], pad_id)
    device = microbatch.tokens_BS.device
    neutral = PREFERENCE_LOSSES[loss].neutral_margin
    extra: dict[str, Any] = {
        "margin": torch.tensor([neutral if r.margin is None else r.margin for r in rows], device=device),
        "weight": torch.tensor([r.weight for r in rows], device=device),
    }
    if any(r.tied for r in rows):
        extra["tied"] = torch.tensor([r.tied for r in rows], device=device)
    if any(r.head_weights for r in rows):
        every = (1.0,) * model.heads
        extra["head_weights"] = torch.tensor([r.head_weights or every for r in rows], device=device)
    if reads_labels(loss):
        extra["chosen_labels"] = torch.tensor([r.chosen_labels for r in rows], device=device)
        extra["rejected_labels"] = torch.tensor([r.rejected_labels for r in rows], device=device)
    microbatch.extra = extra
    return microbatch


def _describe(metrics: dict[str, float]) -> dict[str, float]:
    """Replaces mean squares by standard deviations."""
    described = {k: v for k, v in metrics.items() if not k.endswith("_square")}
    for name in ("chosen", "rejected"):
        if f"{name}_square" in metrics:
            described[f"{name}_std"] = variance_of(metrics[f"{name}_mean"], metrics[f"{name}_square"]) ** 0.5
    return described
