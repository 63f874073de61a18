"""The interface of a frozen language model, for attacks that train nothing: it samples text and rates it."""

from __future__ import annotations

from abc import ABC, abstractmethod

from torch import Tensor

from nemo_advrm.data.tokenizers import Tokenizer
from nemo_advrm.engine.generation import Generation
from nemo_advrm.engine.microbatches import EncodedResponse
from nemo_advrm.engine.sampling import Sampling


class LanguageModel(ABC):
    """A language model that is not trained.

    All ranks of a model replica call each method with the same rows and get the same result. All replicas call equally
    often, also those without rows.

    Attributes:
        name: for messages.
        tokenizer: of the model.
        context: most tokens of a row, prompt and response together.
    """

    name: str
    tokenizer: Tokenizer
    context: int

    @abstractmethod
    def generate(self, prompts: list[list[int]], sampling: Sampling, uniforms_NT: Tensor) -> Generation:
        """Continues every prompt by at most ``sampling.max_new_tokens`` tokens.

        Args:
            prompts: token ids, none empty; lengths may differ.
            uniforms_NT: [len(prompts), max_new_tokens] numbers in [0, 1) that determine the samples.
        """

    @abstractmethod
    def next_tokens(self, rows: list[list[int]], count: int) -> tuple[Tensor, Tensor]:
        """Returns the ``count`` likeliest next tokens after each row, by falling probability.

        Returns:
            [N, count] int64 token ids, and their log-probabilities in nats, [N, count] fp32; -inf for a token that the
            model must not write.
        """

    @abstractmethod
    def log_probs(self, rows: list[EncodedResponse]) -> Tensor:
        """Returns the log-probability of each response, summed over its tokens, [N] fp32 in nats."""
