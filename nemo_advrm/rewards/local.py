"""Reward sources in this process: Megatron reward models and Python functions."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from nemo_advrm.data.attributes import combine
from nemo_advrm.data.messages import Message
from nemo_advrm.data.scores import as_scores
from nemo_advrm.data.tokenizers import Tokenizer
from nemo_advrm.errors import RewardSourceError
from nemo_advrm.rewards.token_sequences import token_sequences
from nemo_advrm.rollouts.types import Rollouts

if TYPE_CHECKING:
    from nemo_advrm.engine.model import MegatronModel


class MegatronReward:
    """A Megatron reward model on the running layout, with the tokenizer it was trained with.

    ``attributes``: weights of the head's outputs; () for a head with one output.
    """

    def __init__(
        self, name: str, model: MegatronModel, tokenizer: Tokenizer, attributes: tuple[float, ...] = ()
    ) -> None:
        self.name = name
        self.model = model
        self.tokenizer = tokenizer
        self.attributes = attributes

    @property
    def longest(self) -> int:
        """Maximum tokens of a row with learned positions; 0 (no limit) with rotary ones."""
        settings = self.model.model_config
        return settings.encoder_seq_length if settings.position_embedding_type == "learned_absolute" else 0

    @property
    def context(self) -> int:
        """Tokens of the context that the model was built for; rows beyond it are possible with rotary positions."""
        return self.model.model_config.encoder_seq_length

    @property
    def dtype(self) -> torch.dtype:
        return self.model.config.params_dtype

    def prefetch(self) -> None:
        """Begins to copy weights that wait in CPU memory: this model scores next."""
        self.model.prefetch()

    def score(self, rollouts: Rollouts) -> Tensor:
        """Returns scores, [N] fp32 on the CPU. Raises RewardSourceError for a row longer than the learned positions."""
        from nemo_advrm.engine.scoring import score_sequences

        return combine(score_sequences(self.model, self._rows(rollouts), self.tokenizer.pad_id), self.attributes)

    def score_with_hidden_states(self, rollouts: Rollouts) -> tuple[Tensor, Tensor]:
        """See :class:`nemo_advrm.rewards.base.HiddenStateSource`."""
        from nemo_advrm.engine.scoring import scores_and_hidden_states

        scores, hidden_ND = scores_and_hidden_states(self.model, self._rows(rollouts), self.tokenizer.pad_id)
        return combine(scores, self.attributes), hidden_ND

    def _rows(self, rollouts: Rollouts) -> list[list[int]]:
        rows = token_sequences(rollouts, self.tokenizer, self.longest or None)
        longest = max(map(len, rows), default=0)
        if self.longest and longest > self.longest:
            raise RewardSourceError(
                f"reward source {self.name}: a response has {longest} tokens with its prompt, the model takes "
                f"{self.longest}"
            )
        return rows


ScoreFunction = Callable[[list[tuple[Message, ...]], list[str], list[bool]], list[float]]


class FunctionReward:
    """A reward computed by a Python function of (prompts, responses, ended)."""

    def __init__(self, name: str, function: ScoreFunction) -> None:
        self.name = name
        self.function = function

    def score(self, rollouts: Rollouts) -> Tensor:
        """Returns scores, [N]. Raises RewardSourceError unless the function returns one finite number per response."""
        values = self.function(rollouts.prompts, rollouts.responses, rollouts.ended)
        return as_scores(self.name, values, len(rollouts))
