"""Reads and encodes the data of a pipeline: preference pairs, prompts and SFT rows."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from pathlib import Path

from nemo_advrm.config import for_stage
from nemo_advrm.config.schema import Config
from nemo_advrm.data.preferences import load_preferences
from nemo_advrm.data.tokenizers import build_tokenizer
from nemo_advrm.engine.microbatches import EncodedResponse
from nemo_advrm.pipeline.branches import labels_by_gold
from nemo_advrm.rollouts.run_prompts import attack_prompts, encode_prompts, rlhf_prompts
from nemo_advrm.rollouts.types import Prompt
from nemo_advrm.training.prepared_data import preference_data, sft_data
from nemo_advrm.training.reward_model_training import EncodedPreferences, encode_rows


class Inputs:
    """The rows and prompts of a run, read and encoded at first use, once per process."""

    def __init__(self, cfg: Config) -> None:
        self.cfg = cfg
        self.tokenizer = build_tokenizer(cfg.model.tokenizer)
        self._annotated: dict[int, EncodedPreferences] = {}  # of the member that was asked for last

    def check(self) -> None:
        """Reads and encodes all of them, so that bad input is reported before anything starts."""
        if not labels_by_gold(self.cfg):
            self._shared_preferences  # noqa: B018
        self.prompts  # noqa: B018
        self.rlhf_prompts  # noqa: B018
        if self.cfg.pipeline.sft:
            self.sft_rows  # noqa: B018

    @cached_property
    def prompts(self) -> list[Prompt]:
        """The prompts of the attack and of its SFT responses."""
        cfg = for_stage(self.cfg, "attack")
        return encode_prompts(attack_prompts(cfg), self.tokenizer, cfg)

    @cached_property
    def rlhf_prompts(self) -> list[Prompt]:
        cfg = for_stage(self.cfg, "rlhf")
        return encode_prompts(rlhf_prompts(cfg), self.tokenizer, cfg)

    @cached_property
    def sft_rows(self) -> Sequence[EncodedResponse]:
        return sft_data(for_stage(self.cfg, "sft"), self.tokenizer)

    def preferences(self, member: int) -> EncodedPreferences:
        """Returns the pairs of a member (from 1): those of the data files, or in the embedded language its own."""
        if not labels_by_gold(self.cfg):
            return self._shared_preferences
        if member not in self._annotated:
            self._annotated.clear()  # a worker trains one member at a time, and the pairs of all may not fit
            home = Path(self.cfg.run_dir) / "preferences"
            names = f"train_{member}", "validation"
            train, validation = (load_preferences(home / f"{name}.jsonl").rows for name in names)
            cfg = for_stage(self.cfg, "train_rm")
            self._annotated[member] = encode_rows(cfg, self.tokenizer, train, validation)
        return self._annotated[member]

    @cached_property
    def _shared_preferences(self) -> EncodedPreferences:
        return preference_data(for_stage(self.cfg, "train_rm"), self.tokenizer)
