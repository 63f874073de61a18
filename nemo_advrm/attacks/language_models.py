"""The language models of attacks that train nothing, opened when an attack first asks for one."""

from __future__ import annotations

from functools import cached_property
from pathlib import Path

from nemo_advrm.config.schema import Config
from nemo_advrm.data.tokenizers import Tokenizer
from nemo_advrm.errors import ConfigError
from nemo_advrm.rewards.features import ReferenceFeatures
from nemo_advrm.rewards.hybrid import open_policy
from nemo_advrm.rollouts.base import rollout_engine
from nemo_advrm.rollouts.language_model import LanguageModel
from nemo_advrm.rollouts.megatron_language_model import MegatronLanguageModel


class LanguageModels:
    """Opens language models once for all attacks of a command; all ranks ask for the same ones in the same order.

    Args:
        cfg: configuration of the stage.
        tokenizer: the SFT policy's.
        policy: the SFT policy, as in ``pretrained_checkpoint.restore_from_path``.
        sft_policy: the SFT policy where it is loaded already.
    """

    def __init__(
        self, cfg: Config, tokenizer: Tokenizer, policy: str, sft_policy: ReferenceFeatures | None = None
    ) -> None:
        self.cfg = cfg
        self.tokenizer = tokenizer
        self._path = policy
        self._sft_policy = sft_policy

    @cached_property
    def policy(self) -> LanguageModel:
        """The SFT policy."""
        if self._sft_policy is not None:
            return MegatronLanguageModel("the SFT policy", self._sft_policy.model, self.tokenizer, self.cfg.rl)
        engine = rollout_engine(self.cfg, self.tokenizer)
        return engine.language_model(engine.open_policy(self._path))

    @cached_property
    def helper(self) -> LanguageModel:
        """The model ``adversarial.lm``, which proposes substitutes and paraphrases; the SFT policy where it is empty.

        Raises CheckpointError for a directory without a language model, ConfigError for one that is not there.
        """
        named = self.cfg.adversarial.lm
        if not named or named == self._path:
            return self.policy
        if named.startswith("hf:"):
            from nemo_advrm.rollouts.transformers_language_model import TransformersLanguageModel

            return TransformersLanguageModel.load(Path(named.removeprefix("hf:")), self.cfg)
        if not Path(named).is_dir():
            raise ConfigError(f"adversarial.lm={named}: there is no such directory (DIR of a checkpoint, or hf:DIR)")
        features = open_policy(named, (), self.tokenizer, "adversarial.lm", self.cfg, {})
        return MegatronLanguageModel(named, features.model, features.tokenizer, self.cfg.rl)
