"""Members of an ensemble that are adapters on one base: its weights are in memory once (``ensemble.share=lora``)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import Tensor

from nemo_advrm.config.schema import Config
from nemo_advrm.data.tokenizers import Tokenizer
from nemo_advrm.engine import checkpoint
from nemo_advrm.engine.adapter_base import chain
from nemo_advrm.engine.builders import build_shared_base
from nemo_advrm.engine.lora import AdapterSet
from nemo_advrm.engine.model import MegatronModel
from nemo_advrm.rewards.local import MegatronReward
from nemo_advrm.rollouts.types import Rollouts


class AdapterReward(MegatronReward):
    """Adapters and a head on a frozen base that other members share, as a reward source.

    Each member makes a pass of its own: from the first layer on its hidden states are others. Rows that are repeated
    for every member, each with its adapters, would take one pass of as many products, and K times its memory.
    """

    def __init__(
        self,
        name: str,
        base: MegatronModel,
        tokenizer: Tokenizer,
        adapters: AdapterSet,
        attributes: tuple[float, ...] = (),
    ) -> None:
        super().__init__(name, base, tokenizer, attributes)
        self.adapters = adapters

    def score(self, rollouts: Rollouts) -> Tensor:
        """See :meth:`MegatronReward.score`."""
        with self.adapters.applied():
            return super().score(rollouts)

    def score_with_hidden_states(self, rollouts: Rollouts) -> tuple[Tensor, Tensor]:
        """See :class:`nemo_advrm.rewards.base.HiddenStateSource`."""
        with self.adapters.applied():
            return super().score_with_hidden_states(rollouts)


def open_adapters(
    name: str,
    path: Path,
    meta: dict[str, Any],
    cfg: Config,
    tokenizer: Tokenizer,
    attributes: tuple[float, ...],
    opened: dict[Any, Any],
) -> AdapterReward:
    """Opens a checkpoint of adapters; all ranks call. Its base comes from ``opened`` if it is there.

    ``cfg.model`` and ``cfg.reward_model`` are the architecture and the outputs of the member.
    """
    base, _ = chain(path, meta)[-1]
    key = ("base", str(base.resolve()), repr((cfg.precision, cfg.model, cfg.reward_model)))
    if key not in opened:
        opened[key] = build_shared_base(cfg, tokenizer, str(base))
    return AdapterReward(name, opened[key], tokenizer, checkpoint.load_beside(path, opened[key]), attributes)
