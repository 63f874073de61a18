"""Data of a training as every rank gets it; runs on all ranks of a layout."""

from __future__ import annotations

from typing import Any
from unittest import mock

from nemo_advrm.config import load_config
from nemo_advrm.data import inputs, token_cache
from nemo_advrm.data.tokenizers import build_tokenizer
from nemo_advrm.errors import DataError
from nemo_advrm.models.reward_model import RewardModel
from nemo_advrm.training.prepared_data import preference_data


def prepare(settings: list[str]) -> dict[str, Any]:
    """What ``preference_data`` gives this rank, whether the rank read text, and the batches of two epochs."""
    cfg = load_config(["model=tiny", *settings], "train_rm")
    tokenizer = build_tokenizer(cfg.model.tokenizer)
    read = mock.Mock(side_effect=inputs.training_and_validation_pairs)
    with (
        mock.patch.object(token_cache, "LEAST_BYTES", 1),
        mock.patch("nemo_advrm.data.inputs.training_and_validation_pairs", read),
    ):
        try:
            data = preference_data(cfg, tokenizer)
        except DataError as error:
            return {"error": str(error)}
    parts = {name: list(getattr(data, name)) for name in ("train", "validation", "mismatched", "prompts")}
    texts = [pair.row for name in ("train", "validation", "mismatched") for pair in parts[name]]
    module = RewardModel(cfg, tokenizer, data.train, data.validation)
    batches = [*module.steps(0), *module.val_dataloader()]
    return {"read": read.called, "kind": type(data.train).__name__, "rows": (parts, texts, batches)}
