"""A trained reward model as it is hardened: finds lower its score, replay holds it at its own scores elsewhere."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from nemo_advrm.config.schema import Config
from nemo_advrm.data.attributes import combine
from nemo_advrm.data.batching import BatchSchedule
from nemo_advrm.data.encoding import EncodedPair
from nemo_advrm.data.tokenizers import Tokenizer
from nemo_advrm.engine import runtime
from nemo_advrm.engine.microbatches import Microbatch, microbatch_rows, scored_microbatch
from nemo_advrm.engine.schedule import Sums
from nemo_advrm.errors import ConfigError
from nemo_advrm.models.reward_model import RewardModel, pair_microbatch
from nemo_advrm.objectives.accuracy import right_of_pairs
from nemo_advrm.objectives.hardening import anchor_loss, find_loss, spread_of
from nemo_advrm.seeds import derive_seed


@dataclass(frozen=True)
class ReplayRow:
    """A clean response, encoded with its prompt, and the outputs of the model's head before hardening, [A]."""

    tokens: list[int]
    original: tuple[float, ...]
    source: str = ""

    @property
    def length(self) -> int:
        return len(self.tokens)

    @property
    def token_count(self) -> int:
        return len(self.tokens)


class HardenedRewardModel(RewardModel):
    """A reward model that goes on from its own weights, its head included.

    The loss of a step is the mean of :func:`find_loss` over ``model.global_batch_size`` finds plus
    ``harden.replay_weight`` times the mean of :func:`anchor_loss` over ``harden.replay_per_step`` replay rows. The
    losses of the registry do not fit: each of them sees one pair, an anchor sees one response.

    Args:
        finds: encoded finds to train on.
        restore_from: checkpoint of the reward model.
        attributes: weights of the head's outputs; () for a head with one output.

    :meth:`anchor_to` must be called before training.
    """

    def __init__(
        self,
        cfg: Config,
        tokenizer: Tokenizer,
        finds: list[EncodedPair],
        restore_from: str,
        seed: int,
        attributes: tuple[float, ...] = (),
    ) -> None:
        super().__init__(cfg, tokenizer, finds, [], restore_from, seed)
        self.attributes = attributes
        self.replay: list[ReplayRow] = []
        self.spread = 0.0
        self._spread_A = torch.empty(0)

    def anchor_to(self, replay: Sequence[ReplayRow]) -> None:
        """Set the rows that are replayed, whose original scores give the spread.

        Raises ConfigError when the model gives all of them the same score: nothing could be measured by such a spread.
        """
        original_NA = torch.tensor([row.original for row in replay], dtype=torch.float32)
        spread_A = spread_of(original_NA)
        self.spread = float(spread_of(combine(original_NA, self.attributes)[:, None]))
        if not self.spread or not bool((spread_A > 0).all()):
            raise ConfigError(
                f"harden.prompts: the model gives all {len(replay)} clean responses the same score: nothing can be "
                "measured in units of their spread; give more and other responses"
            )
        self.replay = list(replay)
        self._spread_A = spread_A.float().to(runtime.current().device)
        size = self.config.harden.replay_per_step
        order = BatchSchedule(len(self.replay), size, derive_seed(self.seed, "replay"))
        if self.config.harden.replay_weight:
            self.on_top = lambda step: [self.replay[i] for i in order.rows_for_step(step)]

    def _check_rows(self) -> None:
        """Finds need neither margins nor labels."""

    def _microbatches(self, rows: Sequence[EncodedPair | ReplayRow]) -> list[Microbatch]:
        finds = [row for row in rows if isinstance(row, EncodedPair)]
        replay = [row for row in rows if isinstance(row, ReplayRow)]
        pad_id = self.tokenizer.pad_id
        groups = microbatch_rows(self.model, [row.lengths for row in finds])
        microbatches = [pair_microbatch(self.model, [finds[i] for i in group], pad_id, "bt") for group in groups]
        # a pair is two sequences, so that twice as many single ones fit
        for group in microbatch_rows(self.model, [(row.length,) for row in replay], rows=2):
            microbatch = scored_microbatch(self.model, [replay[i].tokens for i in group], pad_id)
            original_BA = torch.tensor([replay[i].original for i in group], device=microbatch.lengths_B.device)
            microbatch.extra["original_BA"] = original_BA
            microbatches.append(microbatch)
        return microbatches

    def _loss(self, output: Tensor, microbatch: Microbatch) -> tuple[Tensor, int, Sums]:
        options = self.config.harden
        if "original_BA" in microbatch.extra:
            losses_B = anchor_loss(output.float(), microbatch.extra["original_BA"], self._spread_A)
            # The engine divides the sum of all losses by the number of finds of the step. This row is none of them.
            share = options.replay_weight * self.config.model.global_batch_size / options.replay_per_step
            return share * losses_B.sum(), 0, {"anchor": (losses_B.detach().sum(), losses_B.numel())}
        chosen_B, rejected_B = combine(output.float(), self.attributes).chunk(2)
        losses_B = find_loss(chosen_B, rejected_B, self.spread) * microbatch.extra["weight"]
        chosen_B, rejected_B = chosen_B.detach(), rejected_B.detach()
        count = chosen_B.numel()
        sums: Sums = {
            "find_loss": (losses_B.detach().sum(), count),
            "accuracy": (right_of_pairs(chosen_B, rejected_B).sum(), count),
            "margin": (((chosen_B - rejected_B) / self.spread).sum(), count),
        }
        return losses_B.sum(), count, sums


@torch.no_grad()
def round_weights(module: RewardModel, dtype: torch.dtype, head_dtype: torch.dtype) -> None:
    """Round the trained weights to the number formats in which they will be stored, so that what is measured is kept.

    Small updates of a bf16 model can vanish in this rounding. Many such models have a head in fp32, which keeps them.
    """
    for part in module.model.parts:
        for name, parameter in part.named_parameters():
            stored = head_dtype if name.startswith("head.") else dtype
            parameter.copy_(parameter.to(stored).to(parameter.dtype))
