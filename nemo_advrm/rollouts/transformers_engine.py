"""The rollout engine for Hugging Face policies without a conversion table: transformers writes the responses."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import Tensor

from nemo_advrm.engine.generation import Generation
from nemo_advrm.errors import ConfigError
from nemo_advrm.rollouts.base import RolloutEngine
from nemo_advrm.rollouts.language_model import LanguageModel
from nemo_advrm.rollouts.transformers_language_model import TransformersLanguageModel


class TransformersEngine(RolloutEngine):
    """Samples a policy ``hf:DIR`` that stays as it is: SFT responses, and the attacks that train nothing."""

    def open_policy(self, path: str) -> TransformersLanguageModel:
        """See :meth:`RolloutEngine.open_policy`. Raises ConfigError unless ``path`` is ``hf:DIR``."""
        return TransformersLanguageModel.load(hf_directory(path), self.cfg, self.tokenizer)

    def language_model(self, policy: Any) -> LanguageModel:
        assert isinstance(policy, TransformersLanguageModel)
        return policy

    def generate(self, policy: Any, prompts: list[list[int]], uniforms_NT: Tensor) -> Generation:
        """See :meth:`RolloutEngine.generate`. Raises ConfigError for a policy that is trained."""
        if not isinstance(policy, TransformersLanguageModel):
            raise ConfigError(
                "rl.rollout_engine=transformers samples policies that are not trained: an attack by RL, rlhf and sft "
                "need rl.rollout_engine=megatron and a converted policy (nemo-advrm convert from=hf)"
            )
        return policy.generate(prompts, self.sampling, uniforms_NT)


def hf_directory(policy: str) -> Path:
    """Returns DIR of ``hf:DIR``. Raises ConfigError for another policy, which this engine cannot open."""
    if not policy.startswith("hf:"):
        raise ConfigError(
            f"pretrained_checkpoint.restore_from_path={policy}: rl.rollout_engine=transformers samples hf:DIR, not a "
            "checkpoint of this package"
        )
    return Path(policy.removeprefix("hf:"))
