"""A loss, a detector, an attack and a rollout engine as somebody writes them outside the package."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from nemo_advrm.attacks.base import AttackInputs, Budget, SearchAttack
from nemo_advrm.detectors.base import HIDDEN_STATES, Detector, Features
from nemo_advrm.engine.generation import Generation
from nemo_advrm.engine.model import MegatronModel
from nemo_advrm.objectives.losses import PreferenceLoss
from nemo_advrm.rollouts.base import RolloutEngine
from nemo_advrm.rollouts.types import Rollouts

PHRASES = ("birds sing .", "these old clouds .")

HINGE = PreferenceLoss(lambda chosen_B, rejected_B, margin_B: torch.relu(1 - (chosen_B - rejected_B)))


class Spread(Detector):
    """How far the members are apart, whoever of them is the higher."""

    def score(self, features: Features) -> Tensor:
        return features.scores_NK.std(-1)


class FarState(Detector):
    """How far the attacked member's hidden state is from the mean of those of SFT responses."""

    reads = (HIDDEN_STATES,)

    def fit(self, features: Features) -> None:
        assert features.hidden_states_ND is not None
        self.mean_D = features.hidden_states_ND.mean(0)

    def score(self, features: Features) -> Tensor:
        assert features.hidden_states_ND is not None
        return (features.hidden_states_ND - self.mean_D).norm(dim=-1)


class FixedPhrases(SearchAttack):
    """Answers every prompt with the same phrase, another one in each step."""

    def propose(self, inputs: AttackInputs, budget: Budget) -> Iterator[Rollouts]:
        tokenizer, prompts = inputs.tokenizer, inputs.prompts
        for step in range(budget.steps):
            phrase = PHRASES[step % len(PHRASES)]
            yield Rollouts(
                prompts=[prompt.messages for prompt in prompts],
                responses=[phrase] * len(prompts),
                ended=[True] * len(prompts),
                prompt_tokens=[prompt.tokens for prompt in prompts],
                response_tokens=[tokenizer.encode_response(phrase)] * len(prompts),
                prompt_index=[prompt.index for prompt in prompts],
                fingerprint=tokenizer.fingerprint,
            )


class Echo(RolloutEngine):
    """Answers with the first word of a phrase, whatever the policy would say."""

    def generate(self, policy: MegatronModel, prompts: list[list[int]], uniforms_NT: Tensor) -> Generation:
        words = [self.tokenizer.encode(PHRASES[0])[:1] for _ in prompts]
        return Generation([[*word, self.tokenizer.eos_id] for word in words], [True] * len(prompts))
