"""A frozen language model on Megatron-Core, over all tensor- and pipeline-parallel ranks."""

from __future__ import annotations

import torch
from torch import Tensor

from nemo_advrm.config.schema import RLConfig
from nemo_advrm.data.tokenizers import Tokenizer
from nemo_advrm.engine.generation import Generation, generate, likeliest_tokens
from nemo_advrm.engine.generation_rows import rows_at_once
from nemo_advrm.engine.microbatches import EncodedResponse
from nemo_advrm.engine.model import MegatronModel
from nemo_advrm.engine.response_log_probs import summed_log_probs
from nemo_advrm.engine.sampling import Sampling
from nemo_advrm.rollouts.language_model import LanguageModel


class MegatronLanguageModel(LanguageModel):
    """See :class:`LanguageModel`. ``model`` has the head ``lm``; of ``options`` count the keys about generation."""

    def __init__(self, name: str, model: MegatronModel, tokenizer: Tokenizer, options: RLConfig) -> None:
        self.name = name
        self.model = model
        self.tokenizer = tokenizer
        self.options = options
        self.context = model.model_config.encoder_seq_length

    def generate(self, prompts: list[list[int]], sampling: Sampling, uniforms_NT: Tensor) -> Generation:
        rows = self._rows(prompts, sampling.max_new_tokens)
        return generate(self.model, prompts, sampling, uniforms_NT, rows, self.options.decoding_graphs)

    def next_tokens(self, rows: list[list[int]], count: int) -> tuple[Tensor, Tensor]:
        tokenizer = self.tokenizer
        count = min(count, tokenizer.vocab_size)
        ids_NK, log_probs_NK = likeliest_tokens(self.model, rows, count, self._rows(rows))
        # a policy gives them a very small probability instead of none
        banned_NK = torch.isin(ids_NK, torch.tensor(tokenizer.control_ids)) | (ids_NK >= tokenizer.vocab_size)
        return ids_NK, log_probs_NK.masked_fill(banned_NK, -torch.inf)

    def log_probs(self, rows: list[EncodedResponse]) -> Tensor:
        return summed_log_probs(self.model, rows, self.tokenizer.pad_id)

    def _rows(self, prompts: list[list[int]], new_tokens: int = 0) -> int:
        """Rows per batch, as in rollouts."""
        longest = max(map(len, prompts), default=0) + new_tokens
        return rows_at_once(self.model, longest, self.options.generation_batch_size)
