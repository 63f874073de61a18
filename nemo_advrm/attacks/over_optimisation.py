"""Over-optimisation: RL against the target alone, the first baseline of Adv-RM (arXiv 2504.06141, table 1).

What a policy writes when only the target's score counts is what RLHF would end in. The reward does not read the other
members, whatever ``adversarial.coefficient`` and ``adversarial.others_weight`` are. Which samples are finds is still
decided by the configured rule, so that the attacks of one table are measured alike.
"""

from __future__ import annotations

from nemo_advrm.attacks.adv_rm import AdvRM
from nemo_advrm.config.schema import AdversarialConfig
from nemo_advrm.rewards.ensemble import target_alone


class OverOptimisation(AdvRM):
    """:class:`AdvRM` with lambda = 0."""

    def reward_options(self, configured: AdversarialConfig) -> AdversarialConfig:
        return target_alone(configured)
