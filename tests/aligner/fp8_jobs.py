"""What our reward model for FP8 does where there is no FP8, beside NeMo-Aligner's own; a job of driver.py."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any
from unittest import mock

from driver import RM, _infer, _load

sys.path.append(str(Path(__file__).parents[2]))
PLAIN = {**RM, "fp8": False}
FP8 = {**RM, "fp8": True, "fp8_hybrid": True, "fp8_amax_history_len": 16, "fp8_amax_compute_algo": "max"}


def compare(path: str, out: str, texts: list[str]) -> dict[str, Any]:
    """Scores and tensor names by both classes; what each says to FP8; the settings for Transformer Engine."""
    import torch
    from nemo_aligner.models.nlp.gpt.megatron_gpt_reward_model import MegatronGPTRewardModel
    from nemo_aligner.utils.train_script_utils import init_distributed

    from nemo_advrm.errors import ConfigError
    from nemo_advrm.integrations.nemo_aligner import MegatronGPTFP8RewardModel, fp8

    def opened(cls: Any, settings: dict[str, Any], path: str = path) -> Any:
        rm, trainer = _load(path, cls, "rm", settings)
        init_distributed(trainer, rm, False)
        rm.freeze()
        return rm

    def told(cls: Any, **settings: Any) -> str:
        try:
            opened(cls, {**FP8, **settings})
        except (AssertionError, ConfigError) as error:
            return f"{type(error).__name__}: {error}"
        return ""

    found: dict[str, Any] = {
        "refused_by_stock": told(MegatronGPTRewardModel),
        "refused_without_engine": told(MegatronGPTFP8RewardModel),
        "refused_without_its_package": told(MegatronGPTFP8RewardModel, transformer_engine=True),
    }
    with torch.no_grad():
        stock, ours = opened(MegatronGPTRewardModel, PLAIN), opened(MegatronGPTFP8RewardModel, PLAIN)
        found["stock"], found["ours"] = (_infer(rm, texts) for rm in (stock, ours))
        found["stock_names"], found["ours_names"] = (sorted(rm.sharded_state_dict()) for rm in (stock, ours))
        rows = [stock.tokenizer.text_to_ids(text) for text in texts]
        found["rewards"] = [_of_tokens(ours, row) for row in rows]
        ours.cfg.fp8 = True  # pads, and computes in fp32 as it was built
        found["padded"] = [_of_tokens(ours, row) for row in rows]
        with mock.patch.object(fp8.transformer_engine, "import_error", return_value=""):
            wrong = {"fp8_hybrid": False}, {"force_head_dtype": "bf16"}, {"encoder_seq_length": 40}
            engine = {"transformer_engine": True}
            found["refused"] = [told(MegatronGPTFP8RewardModel, **engine, **settings) for settings in wrong]
            built = opened(MegatronGPTFP8RewardModel, {**FP8, **engine})
        config = built.transformer_config
        found["config"] = [config.fp8, config.fp8_amax_history_len, config.fp8_amax_compute_algo]
        found["fp8_names"], found["head"] = sorted(built.sharded_state_dict()), str(built.model.rm_head.weight.dtype)
        built.save_to(out)
        again = opened(MegatronGPTRewardModel, PLAIN, out)
        found["saved"], found["target"] = _infer(again, texts), again.cfg.target
    return found


def _of_tokens(rm: Any, row: list[int]) -> tuple[int, float]:
    """How many tokens the network is given, and the reward."""
    import torch

    seen: list[int] = []
    network = type(rm.model).forward

    def forward(self: Any, tokens: Any, *rest: Any, **named: Any) -> Any:
        seen.append(tokens.shape[1])
        return network(self, tokens, *rest, **named)

    rm.prepare_for_inference()
    with mock.patch.object(type(rm.model), "forward", forward):
        reward = rm.infer((torch.tensor([row]), torch.tensor([len(row)])))
    return seen[0], reward.item()
