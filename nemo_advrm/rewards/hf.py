"""Hugging Face reward models (sequence classifiers), scored in this process."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from nemo_advrm.config.schema import Config
from nemo_advrm.convert.hf_directory import HFDirectory, load_classifier, read_classifier
from nemo_advrm.data.attributes import combine
from nemo_advrm.data.batching import microbatch_cost, pad_rows, split_by_tokens
from nemo_advrm.data.reading import rule_from_hf_config
from nemo_advrm.data.tokenizers import HFTokenizer, check_vocabulary
from nemo_advrm.engine import runtime
from nemo_advrm.engine.replica import once_per_replica
from nemo_advrm.errors import RewardSourceError
from nemo_advrm.rewards.token_sequences import token_sequences
from nemo_advrm.rollouts.types import Rollouts


class HFReward:
    """A sequence classifier. The first rank of each model replica holds it and scores for the others.

    The score is read at the last token of each row, found from the row's length. transformers searches for the last
    token that is not padding instead, which is wrong for models whose padding token is their end token.

    Args:
        name: name of the source, for messages.
        model: the classifier, None on ranks that do not hold it.
        tokenizer: the model's tokenizer.
        max_tokens: padded tokens per batch; a longer row is a batch of its own.
        max_rows: maximum rows per batch.
        longest: maximum tokens of a row; 0 for no limit.
        attributes: weights of the head's outputs; () for a head with one output.
    """

    def __init__(
        self,
        name: str,
        model: Any | None,
        tokenizer: HFTokenizer,
        max_tokens: int = 8192,
        max_rows: int = 32,
        longest: int = 0,
        attributes: tuple[float, ...] = (),
    ) -> None:
        self.name = name
        self.model = model
        self.tokenizer = tokenizer
        self.max_tokens = max_tokens
        self.max_rows = max_rows
        self.longest = longest
        self.attributes = attributes
        self.dtype = torch.float32  # number format of the forward pass, also set on ranks that do not hold the model

    @classmethod
    def load(cls, name: str, path: Path, cfg: Config, attributes: tuple[float, ...] = ()) -> HFReward:
        """Loads a directory written by ``save_pretrained``; raises what :func:`check_directory` raises."""
        found, tokenizer = check_directory(path, attributes)
        rt, settings, model = runtime.current(), cfg.model, None
        dtype = torch.float32 if cfg.precision.name == "fp32" else torch.bfloat16
        if rt.is_replica_source:
            model = load_classifier(path, dtype=dtype).to(rt.device).eval().requires_grad_(False)
        longest = min(filter(None, (found.longest, tokenizer.longest)), default=0)
        reward = cls(
            name, model, tokenizer, settings.micro_batch_tokens, 4 * settings.micro_batch_size, longest, attributes
        )
        reward.dtype = dtype
        return reward

    def score(self, rollouts: Rollouts) -> Tensor:
        def rows() -> list[list[int]]:
            return token_sequences(rollouts, self.tokenizer, self.longest or None)

        return once_per_replica(self.name, lambda: self.score_tokens(rows()))

    def score_with_hidden_states(self, rollouts: Rollouts) -> tuple[Tensor, Tensor]:
        """See :class:`nemo_advrm.rewards.base.HiddenStateSource`. Of an encoder they are what its head has pooled."""

        def both() -> Tensor:
            assert self.model is not None
            rows = token_sequences(rollouts, self.tokenizer, self.longest or None)
            return self._read(rows, _output_layer(self.name, self.model))

        table = once_per_replica(self.name, both)
        return table[:, 0], table[:, 1:]

    def score_tokens(self, sequences: list[list[int]]) -> Tensor:
        """Returns scores, [N] fp32 on the CPU. Raises RewardSourceError for a row longer than the model takes."""
        return self._read(sequences)[:, 0]

    @torch.no_grad()
    def _read(self, sequences: list[list[int]], layer: nn.Linear | None = None) -> Tensor:
        """Returns the score of each row and the inputs of ``layer``, [N, 1 + D] fp32 on the CPU."""
        assert self.model is not None
        longest = max(map(len, sequences), default=0)
        if self.longest and longest > self.longest:
            raise RewardSourceError(
                f"reward source {self.name}: a response has {longest} tokens with its prompt, the model takes "
                f"{self.longest}"
            )
        table = torch.zeros(len(sequences), 1 if layer is None else 1 + layer.in_features)
        device = self.model.device
        lengths = [len(s) for s in sequences]
        for group in split_by_tokens(lengths, self.max_tokens, self.max_rows, cost_of_one=microbatch_cost(device)):
            tokens_BS, lengths_B = pad_rows([sequences[i] for i in group], self.tokenizer.pad_id)
            mask_BS = (torch.arange(tokens_BS.size(1)) < lengths_B[:, None]).long()
            with _inputs_of(layer) as inputs:
                outputs_BA = self._forward(tokens_BS.to(device), mask_BS.to(device), lengths_B.to(device))
            table[group, 0] = combine(outputs_BA.float(), self.attributes).cpu()
            if layer is not None:
                table[group, 1:] = inputs[0].float().cpu()
        return table

    def _forward(self, tokens_BS: Tensor, mask_BS: Tensor, lengths_B: Tensor) -> Tensor:
        """Returns the head's outputs for each row, [B, A]."""
        assert self.model is not None
        trunk = getattr(self.model, self.model.base_model_prefix, None)
        if trunk is None or not hasattr(self.model, "score"):
            # encoders pool at the first token, so padding does not matter
            return self.model(input_ids=tokens_BS, attention_mask=mask_BS).logits
        options = {} if self.model.config.is_encoder_decoder else {"use_cache": False}
        hidden_BSH = trunk(input_ids=tokens_BS, attention_mask=mask_BS, **options).last_hidden_state
        last_BH = hidden_BSH[torch.arange(len(lengths_B), device=tokens_BS.device), lengths_B - 1]
        return self.model.score(last_BH)


def _output_layer(name: str, model: Any) -> nn.Linear:
    """Returns the linear layer that computes the model's outputs. Raises RewardSourceError when there is none."""
    outputs = model.config.num_labels
    layers = [layer for layer in model.modules() if isinstance(layer, nn.Linear) and layer.out_features == outputs]
    if not layers:
        raise RewardSourceError(f"reward source {name}: no linear layer computes its {outputs} outputs")
    return layers[-1]  # transformers registers heads last


@contextmanager
def _inputs_of(layer: nn.Module | None) -> Iterator[list[Tensor]]:
    """Yields a list to which every forward pass of ``layer`` inside appends its input."""
    seen: list[Tensor] = []
    if layer is None:
        yield seen
        return
    hook = layer.register_forward_pre_hook(lambda _, arguments: seen.append(arguments[0]))
    try:
        yield seen
    finally:
        hook.remove()


def check_directory(path: Path, attributes: tuple[float, ...] = ()) -> tuple[HFDirectory, HFTokenizer]:
    """Reads the description and the tokenizer of a Hugging Face member without loading its weights.

    Raises CheckpointError from :func:`read_classifier`, DataError for a bad tokenizer (:func:`check_vocabulary`).
    """
    found, tokenizer = read_classifier(path, attributes), HFTokenizer(path, rule_from_hf_config(path))
    check_vocabulary(tokenizer, found.vocabulary, f"hf:{path}")
    return found, tokenizer
