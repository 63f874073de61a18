"""Reward model training in FP8, which NeMo-Aligner's own class refuses when it comes to writing a checkpoint.

Only Transformer Engine's layers compute in FP8. The reward head is a layer of Megatron-Core's own, has no FP8 state to
lose, and stays in fp32.
"""

from __future__ import annotations

from typing import Any

from nemo_aligner.models.nlp.gpt.gpt_reward_model import GPTRewardModel
from nemo_aligner.models.nlp.gpt.megatron_gpt_reward_model import MegatronGPTRewardModel
from omegaconf import DictConfig

from nemo_advrm.errors import ConfigError


class _FP8RewardModel(GPTRewardModel):
    """The network; its layers' FP8 scales are saved, the head has none."""

    def sharded_state_dict(self, prefix: str = "") -> dict[str, Any]:
        # the parent's own method, whose one further act is to assert that FP8 is off, is passed by
        state = super(GPTRewardModel, self).sharded_state_dict(prefix=prefix)
        left_out = "rm_head._extra_state" if self.return_rm_head_in_state_dict else "rm_head"
        return {key: value for key, value in state.items() if left_out not in key}


class MegatronGPTFP8RewardModel(MegatronGPTRewardModel):
    """A binary ranking reward model for ``model.fp8=True``; needs Transformer Engine and a GPU that computes FP8.

    Raises ConfigError unless ``model.force_head_dtype`` is float32 and the sequence length a multiple of 16, which
    Transformer Engine's FP8 layers need.
    """

    def __init__(self, cfg: DictConfig, trainer: Any) -> None:
        if str(cfg.get("force_head_dtype")) not in ("float32", "32", "torch.float32"):
            raise ConfigError(f"model.force_head_dtype={cfg.get('force_head_dtype')}: in FP8 the head stays in float32")
        if cfg.encoder_seq_length % 16:
            raise ConfigError(f"model.encoder_seq_length={cfg.encoder_seq_length}: FP8 needs a multiple of 16")
        super().__init__(cfg, trainer=trainer)

    def model_provider_func(self, pre_process: bool, post_process: bool) -> Any:
        model = super().model_provider_func(pre_process, post_process)
        model.__class__ = _FP8RewardModel  # adds no attribute; the parent names its class in this method alone
        return model
