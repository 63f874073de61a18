"""Adv-RM (Bukharin et al., arXiv 2504.06141): trains an adversarial policy against the ensemble by RL."""

from __future__ import annotations

from typing import ClassVar

from nemo_advrm.attacks.adversarial_policy import AdversarialPolicy
from nemo_advrm.attacks.base import SAMPLES, Attack, AttackInputs, Budget, Found
from nemo_advrm.training.run_training import fit


class AdvRM(Attack):
    """Trains an :class:`AdversarialPolicy`; its rollouts are the samples. A stopped training is resumed."""

    trains: ClassVar[bool] = True

    def find(self, inputs: AttackInputs, budget: Budget) -> Found:
        """See :meth:`Attack.find`; ``rl.*`` configures the algorithm and the steps, as the budget does."""
        policy = AdversarialPolicy.of(inputs)
        samples = inputs.directory / SAMPLES
        callbacks = policy.callbacks(samples, inputs.gold, budget.enough)
        fit(policy, inputs.cfg, inputs.directory, f"attack on R_{inputs.target}", callbacks, 0)
        return Found(samples, policy)
