"""A reward model of Hugging Face transformers, scored in this process."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nemo_advrm.data.batching import microbatch_cost, pad_rows, split_by_tokens
from nemo_advrm.data.reading import rule_in_config
from nemo_advrm.data.tokenizers import HFTokenizer
from nemo_advrm.errors import CheckpointError, RewardSourceError
from nemo_advrm.megatron import phases, runtime
from nemo_advrm.rewards.base import Rollouts
from nemo_advrm.rewards.encoding import token_sequences
from nemo_advrm.rewards.replica import once_per_replica
from nemo_advrm.schema import Config


class HFReward:
    """A sequence classifier with one label. The first rank of each model replica holds it and scores for the others.

    The score is read at the last token of each row, which is known by the row's length: transformers looks for the last
    token that is not padding instead, and is misled where padding and end token are one.

    Args:
        name: of the source, for messages.
        model: the classifier, None on ranks that do not hold it.
        tokenizer: the model's own.
        max_tokens: padded tokens per batch; one longer row is a batch of its own.
        max_rows: most rows per batch.
    """

    def __init__(
        self, name: str, model: Any | None, tokenizer: HFTokenizer, max_tokens: int = 8192, max_rows: int = 32
    ) -> None:
        self.name = name
        self.model = model
        self.tokenizer = tokenizer
        self.max_tokens = max_tokens
        self.max_rows = max_rows
        self.dtype = torch.float32  # what it computes in; known to ranks that do not hold the model too

    @classmethod
    def load(cls, name: str, path: Path, cfg: Config) -> HFReward:
        """Open a directory of ``save_pretrained``; see :func:`check_directory` for what raises CheckpointError."""
        check_directory(path)
        tokenizer = HFTokenizer(path, rule_in_config(path))
        rt = runtime.current()
        model = _load_model(path, cfg.precision.name, rt.device) if rt.is_replica_source else None
        reward = cls(name, model, tokenizer, cfg.model.micro_batch_tokens, 4 * cfg.model.micro_batch_size)
        reward.dtype = _dtype(cfg.precision.name)
        return reward

    def score(self, rollouts: Rollouts) -> Tensor:
        def rows() -> list[list[int]]:
            return token_sequences(rollouts, self.tokenizer, self._limit)

        return once_per_replica(self.name, lambda: self.score_tokens(rows()))

    @property
    def _limit(self) -> int | None:
        """The model's longest sequence, None when it does not say."""
        return getattr(self.model.config, "max_position_embeddings", None) if self.model is not None else None

    @torch.no_grad()
    def score_tokens(self, sequences: list[list[int]]) -> Tensor:
        """[N] fp32 on the CPU. Raises RewardSourceError for a row beyond the model's longest position."""
        assert self.model is not None
        longest = max(map(len, sequences), default=0)
        if self._limit is not None and longest > self._limit:
            raise RewardSourceError(
                f"reward source {self.name}: a response has {longest} tokens with its prompt, the model takes "
                f"{self._limit}"
            )
        scores_N = torch.zeros(len(sequences))
        device = self.model.device
        lengths = [len(s) for s in sequences]
        for group in split_by_tokens(lengths, self.max_tokens, self.max_rows, cost_of_one=microbatch_cost(device)):
            tokens_BS, lengths_B = pad_rows([sequences[i] for i in group], self.tokenizer.pad_id)
            mask_BS = (torch.arange(tokens_BS.size(1)) < lengths_B[:, None]).long()
            scores_N[group] = self._forward(tokens_BS.to(device), mask_BS.to(device), lengths_B.to(device)).cpu()
        return scores_N

    def _forward(self, tokens_BS: Tensor, mask_BS: Tensor, lengths_B: Tensor) -> Tensor:
        assert self.model is not None
        phases.tick()
        trunk = getattr(self.model, self.model.base_model_prefix, None)
        if trunk is None or not hasattr(self.model, "score"):
            # encoders pool at their own first token and look for no padding
            return self.model(input_ids=tokens_BS, attention_mask=mask_BS).logits[:, 0].float()
        options = {} if self.model.config.is_encoder_decoder else {"use_cache": False}
        hidden_BSH = trunk(input_ids=tokens_BS, attention_mask=mask_BS, **options).last_hidden_state
        last_BH = hidden_BSH[torch.arange(len(lengths_B), device=tokens_BS.device), lengths_B - 1]
        return self.model.score(last_BH)[:, 0].float()


def check_directory(path: Path) -> None:
    """Raise CheckpointError unless ``path`` looks like a saved reward model: a classifier with one label.

    Reads config.json and names of files only; nothing is loaded.
    """
    if not path.is_dir():
        raise CheckpointError(f"hf:{path}: there is no such directory (nothing is downloaded: save the model there)")
    try:
        config = json.loads((path / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"hf:{path}: not a model of transformers (config.json: {error})") from error
    if not isinstance(config, dict):
        raise CheckpointError(f"hf:{path}: not a model of transformers (config.json holds no object)")
    names = [str(name) for name in config.get("architectures") or ()]
    if not any(name.endswith("ForSequenceClassification") for name in names):
        kind = names[0] if names else "a model without a head"
        raise CheckpointError(f"hf:{path}: holds {kind}, which is not a reward model (*ForSequenceClassification)")
    labels = len(config["id2label"]) if config.get("id2label") else config.get("num_labels", 2)
    if labels != 1:
        raise CheckpointError(f"hf:{path}: the classifier has {labels} labels; a reward model has one")
    if not any(path.glob("*.safetensors")):
        raise CheckpointError(f"hf:{path}: no .safetensors files (pickled weights are not opened: convert them first)")


def _dtype(precision: str) -> torch.dtype:
    return torch.float32 if precision == "fp32" else torch.bfloat16


def _load_model(path: Path, precision: str, device: torch.device) -> Any:
    from transformers import AutoModelForSequenceClassification  # seconds to import: only for those who use it

    dtype = _dtype(precision)
    try:
        model, found = AutoModelForSequenceClassification.from_pretrained(
            str(path),
            local_files_only=True,
            trust_remote_code=False,
            dtype=dtype,
            use_safetensors=True,
            output_loading_info=True,
        )
    except Exception as error:  # OSError, ValueError, RuntimeError, safetensors' own
        raise CheckpointError(f"hf:{path}: could not be read: {' '.join(str(error).split())[:300]}") from error
    lost = sorted(found["missing_keys"])
    if lost:  # transformers draws them at random and goes on
        raise CheckpointError(f"hf:{path}: the weights lack {', '.join(lost[:5])} ({len(lost)} tensors)")
    if (head := getattr(model, "score", None)) is not None and head.weight.size(0) != 1:
        raise CheckpointError(f"hf:{path}: the head has {head.weight.size(0)} outputs; a reward model has one")
    return model.to(device).eval().requires_grad_(False)
