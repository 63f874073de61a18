"""Supervised fine-tuning: a language model trained with the next-token loss on responses."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from torch import Tensor

from nemo_advrm.config.schema import Config
from nemo_advrm.data.batching import BatchSchedule
from nemo_advrm.data.stored_rows import rows_at
from nemo_advrm.data.tokenizers import Tokenizer
from nemo_advrm.engine import runtime
from nemo_advrm.engine.builders import build_policy
from nemo_advrm.engine.log_probs import Logits, log_probs_and_entropy
from nemo_advrm.engine.microbatches import EncodedResponse, Microbatch, microbatch_rows, response_microbatch
from nemo_advrm.engine.model import MegatronModel
from nemo_advrm.engine.optim import MegatronOptimizer
from nemo_advrm.engine.schedule import Sums, forward_backward
from nemo_advrm.models.trainable import TrainableModel, derive_seed, shard_rows, total_steps


class SupervisedModel(TrainableModel):
    """A Megatron language model trained on rows of a prompt and a response.

    Args:
        cfg: configuration of the stage.
        tokenizer: the tokenizer that encoded the rows.
        rows: encoded rows.
        restore_from: checkpoint to start from; empty starts from random weights.
        seed: seed of weights and data order.
    """

    stage = "sft"

    def __init__(
        self, cfg: Config, tokenizer: Tokenizer, rows: Sequence[EncodedResponse], restore_from: str = "", seed: int = 0
    ) -> None:
        super().__init__(cfg, tokenizer, total_steps(cfg, len(rows)), seed)
        self.rows = rows
        self.model = build_policy(cfg, tokenizer, restore_from, derive_seed(seed, "weights"), trainable=True)
        self.optimizer = MegatronOptimizer(self.model, cfg.model.optim, cfg.trainer.gradient_clip_val)

    def trained(self) -> dict[str, tuple[MegatronModel, MegatronOptimizer]]:
        return {"policy": (self.model, self.optimizer)}

    def steps(self, start: int) -> Iterator[list[EncodedResponse]]:
        rt = runtime.current()
        order = BatchSchedule(len(self.rows), self.config.model.global_batch_size, derive_seed(self.seed, "order"))
        for step in range(start, self.max_steps):
            rows = rows_at(self.rows, order.rows_for_step(step))
            yield shard_rows(rows, [len(r.tokens) for r in rows], rt.dp_rank, rt.dp_size)

    def train_on(self, batch: list[EncodedResponse], step: int) -> dict[str, float]:
        groups = microbatch_rows(self.model, [(len(r.tokens),) for r in batch])
        microbatches = [
            response_microbatch(self.model, [batch[i] for i in group], self.tokenizer.pad_id) for group in groups
        ]
        self.optimizer.zero_grad()
        metrics = forward_backward(self.model, microbatches, _next_token_loss)
        lr = self.learning_rate(step)
        norm = self.optimizer.step(lr, step)
        return {
            "train/loss": metrics["loss"],
            "train/entropy": metrics["entropy"],
            "grad_norm": norm,
            "learning_rate": lr,
            "tokens": float(sum(len(row.tokens) for row in batch)),
        }


def _next_token_loss(logits_NV: Logits, microbatch: Microbatch) -> tuple[Tensor, int, Sums]:
    log_probs_N, entropy_N = log_probs_and_entropy(logits_NV, microbatch.extra["targets_N"])
    count = log_probs_N.numel()
    return -log_probs_N.sum(), count, {"entropy": (entropy_N.detach().sum(), count)}
