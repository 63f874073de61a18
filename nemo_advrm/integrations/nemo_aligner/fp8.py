"""Reward models for training in FP8. NeMo-Aligner's own classes fail when they save a checkpoint in FP8.

Only layers of Transformer Engine compute in FP8. The reward head is a Megatron-Core layer, has no FP8 state and stays
in fp32. With ``model.fp8=False`` the classes behave as NeMo-Aligner's, except that they refuse context parallelism.
"""

from __future__ import annotations

from typing import Any

import torch
from nemo_aligner.models.nlp.gpt.gpt_reward_model import GPTRewardModel
from nemo_aligner.models.nlp.gpt.megatron_gpt_regression_reward_model import MegatronGPTRegressionRewardModel
from nemo_aligner.models.nlp.gpt.megatron_gpt_reward_model import MegatronGPTRewardModel
from omegaconf import DictConfig, open_dict
from torch import Tensor

from nemo_advrm.engine import transformer_engine
from nemo_advrm.errors import ConfigError
from nemo_advrm.integrations.nemo_aligner.parallel_layout import refuse_context_parallelism

# Transformer Engine needs FP8 matrix sizes that are multiples of 16 (of 8 for tokens).
MULTIPLE = 16


class _FP8RewardModel(GPTRewardModel):
    """The network, with a checkpoint state that includes the FP8 scales of its layers."""

    def sharded_state_dict(self, prefix: str = "") -> dict[str, Any]:
        # skip GPTRewardModel's method, which only adds an assertion that FP8 is off
        state = super(GPTRewardModel, self).sharded_state_dict(prefix=prefix)
        left_out = "rm_head._extra_state" if self.return_rm_head_in_state_dict else "rm_head"
        return {key: value for key, value in state.items() if left_out not in key}


class _InFP8(MegatronGPTRewardModel):
    """Base of both FP8 reward models; the files that they write name NeMo-Aligner's class."""

    _file_class: type | None = None

    def __init__(self, cfg: DictConfig, trainer: Any) -> None:
        refuse_context_parallelism(cfg.get("context_parallel_size", 1))
        if cfg.get("fp8", False):
            check(cfg)
        assert self._file_class is not None
        with open_dict(cfg):
            cfg.target = f"{self._file_class.__module__}.{self._file_class.__name__}"
        super().__init__(cfg, trainer=trainer)

    def model_provider_func(self, pre_process: bool, post_process: bool) -> Any:
        model = super().model_provider_func(pre_process, post_process)
        model.__class__ = (
            _FP8RewardModel  # it adds no attributes, and the parent offers no other way to choose the class
        )
        return model

    def infer(self, inputs: Any, add_BOS: bool = False, add_EOS: bool = False) -> Tensor:
        """Return rewards [B, 1] of texts or of (tokens [B, S], lengths [B]); FP8 pads S to a multiple of 16."""
        if self.cfg.get("fp8", False) and isinstance(inputs, tuple):  # texts are padded to encoder_seq_length
            tokens, lengths = inputs
            # padding does not change the rewards: attention is causal and the reward is read at `lengths`
            inputs = torch.nn.functional.pad(tokens, (0, -tokens.size(1) % MULTIPLE)), lengths
        return super().infer(inputs, add_BOS=add_BOS, add_EOS=add_EOS)


class MegatronGPTFP8RewardModel(_InFP8):
    """A binary ranking reward model for ``model.fp8=True``; see :func:`check`."""

    _file_class = MegatronGPTRewardModel


class MegatronGPTFP8RegressionRewardModel(_InFP8, MegatronGPTRegressionRewardModel):
    """A regression reward model for ``model.fp8=True``; see :func:`check`."""

    _file_class = MegatronGPTRegressionRewardModel


def check(cfg: DictConfig) -> None:
    """Raise ConfigError unless the settings and the machine allow training in FP8.

    It needs Transformer Engine, a format (``fp8_hybrid`` or ``fp8_e4m3``), a head in fp32, and multiples of 16 as the
    sequence length and the layer sizes on one tensor-parallel rank.
    """
    is_off = "" if cfg.get("transformer_engine", False) else "is off (model.transformer_engine)"
    if reason := is_off or transformer_engine.import_error():
        raise ConfigError(f"model.fp8=True needs Transformer Engine, which {reason}")
    if not (cfg.get("fp8_hybrid", False) or cfg.get("fp8_e4m3", False)):
        raise ConfigError("model.fp8=True needs a format: set model.fp8_hybrid=True or model.fp8_e4m3=True")
    if str(cfg.get("force_head_dtype")) not in ("float32", "32", "torch.float32"):
        raise ConfigError(f"model.force_head_dtype={cfg.get('force_head_dtype')}: with FP8 the head must be float32")
    tensor = cfg.get("tensor_model_parallel_size", 1)
    heads = cfg.num_attention_heads
    width = cfg.get("kv_channels") or cfg.hidden_size // heads
    sizes = {
        "encoder_seq_length": cfg.encoder_seq_length,
        "hidden_size": cfg.hidden_size,
        "ffn_hidden_size": (cfg.get("ffn_hidden_size") or 4 * cfg.hidden_size) / tensor,
        "num_attention_heads": heads * width / tensor,
        "num_query_groups": (cfg.get("num_query_groups") or heads) * width / tensor,
    }
    for key, size in sizes.items():
        if size % MULTIPLE:
            raise ConfigError(
                f"model.{key}={cfg.get(key)} leaves {size:g} on a rank: FP8 needs multiples of {MULTIPLE}"
            )
