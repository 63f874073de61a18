"""A frozen language model on Megatron-Core, over all tensor- and pipeline-parallel ranks."""

from __future__ import annotations

import torch
from torch import Tensor

from nemo_advrm.data.tokenizers import Tokenizer
from nemo_advrm.engine.generation import Generation, generate, likeliest_tokens
from nemo_advrm.engine.microbatches import EncodedResponse
from nemo_advrm.engine.model import MegatronModel
from nemo_advrm.engine.response_log_probs import summed_log_probs
from nemo_advrm.engine.sampling import Sampling
from nemo_advrm.rollouts.language_model import LanguageModel


class MegatronLanguageModel(LanguageModel):
    """See :class:`LanguageModel`. ``model`` has the head ``lm``."""

    def __init__(self, name: str, model: MegatronModel, tokenizer: Tokenizer) -> None:
        self.name = name
        self.model = model
        self.tokenizer = tokenizer
        self.context = model.model_config.encoder_seq_length

    def generate(self, prompts: list[list[int]], sampling: Sampling, uniforms_NT: Tensor) -> Generation:
        return generate(self.model, prompts, sampling, uniforms_NT, self._rows)

    def next_tokens(self, rows: list[list[int]], count: int) -> tuple[Tensor, Tensor]:
        tokenizer = self.tokenizer
        ids_NK, log_probs_NK = likeliest_tokens(self.model, rows, min(count, tokenizer.vocab_size), self._rows)
        # a policy gives them a very small probability instead of none
        banned_NK = torch.isin(ids_NK, torch.tensor(tokenizer.control_ids)) | (ids_NK >= tokenizer.vocab_size)
        return ids_NK, log_probs_NK.masked_fill(banned_NK, -torch.inf)

    def log_probs(self, rows: list[EncodedResponse]) -> Tensor:
        return summed_log_probs(self.model, rows, self.tokenizer.pad_id)

    @property
    def _rows(self) -> int:
        """Rows per batch, as in rollouts."""
        return 4 * self.model.model_config.micro_batch_size
