"""The adversarial policy: trained by RL to write responses that the target scores high and the other members low."""

from __future__ import annotations

from pathlib import Path

from lightning.pytorch import Callback

from nemo_advrm.attacks.base import AttackInputs
from nemo_advrm.config.schema import AdversarialConfig, Config
from nemo_advrm.data.sft_scores import SFTScores
from nemo_advrm.data.tokenizers import Tokenizer
from nemo_advrm.models.policy import PolicyModel
from nemo_advrm.rewards.base import RewardSource
from nemo_advrm.rewards.ensemble import AdversarialReward
from nemo_advrm.rewards.features import ReferenceFeatures
from nemo_advrm.rewards.find_rule import FindRule
from nemo_advrm.rollouts.types import Prompt
from nemo_advrm.training.callbacks.enough_finds import EnoughFinds
from nemo_advrm.training.callbacks.rollout_records import TrajectoryRecorder
from nemo_advrm.training.callbacks.served_policy import served_policy_watch


class AdversarialPolicy(PolicyModel):
    """A :class:`PolicyModel` with the adversarial reward, a recorder of its samples and a stop rule.

    Args:
        cfg: configuration of the stage.
        tokenizer: the policy's tokenizer.
        prompts: the prompts of ``sft_responses``, in its order.
        members: the ensemble, R_1 first.
        sft_responses: SFT responses to the prompts with their scores.
        target: the attacked member, from 1.
        restore_from: checkpoint of the SFT policy.
        seed: seed of prompt order and sampling.
        sft_policy: the loaded SFT policy, for a detector that reads log-probabilities; it is the reference policy too.
        reward_options: options of the reward; None: ``cfg.adversarial``, by which finds are counted in any case.
    """

    stage = "attack"

    def __init__(
        self,
        cfg: Config,
        tokenizer: Tokenizer,
        prompts: list[Prompt],
        members: list[RewardSource],
        sft_responses: SFTScores,
        target: int,
        restore_from: str,
        seed: int = 0,
        sft_policy: ReferenceFeatures | None = None,
        reward_options: AdversarialConfig | None = None,
    ) -> None:
        options, rate = reward_options or cfg.adversarial, cfg.detector.false_alarm_rate
        reward = AdversarialReward(members, options, sft_responses, target - 1, sft_policy, false_alarm_rate=rate)
        reference = None if sft_policy is None else sft_policy.model
        super().__init__(cfg, tokenizer, prompts, reward, restore_from, seed, reference)
        self.sft_responses = sft_responses
        self.target = target

    @classmethod
    def of(cls, inputs: AttackInputs) -> AdversarialPolicy:
        """Builds the policy of an attack from its inputs."""
        return cls(
            inputs.cfg,
            inputs.tokenizer,
            inputs.prompts,
            inputs.members,
            inputs.sft_responses,
            inputs.target,
            inputs.policy,
            inputs.seed,
            inputs.sft_policy,
            inputs.reward_options,
        )

    def callbacks(self, samples: Path, gold: RewardSource | None, enough: int = 0) -> list[Callback]:
        """Returns Lightning callbacks that record all samples and end the training when there are enough finds.

        Args:
            samples: the JSON-lines file to write; the name of its directory is the ``policy`` of its rows.
            gold: scores the samples for evaluation; None without a gold reward.
            enough: different finds at which the training ends; 0: never early.
        """
        recorder = TrajectoryRecorder(samples, self.target, self.sft_responses, gold)
        watch = served_policy_watch(self)
        if not enough:
            return [*watch, recorder]
        rule = FindRule(self.config, self.sft_responses, self.target, self.tokenizer)
        return [*watch, recorder, EnoughFinds(recorder, rule, enough)]
