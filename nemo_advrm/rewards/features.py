"""The hybrid reward: a weighted sum of a reward model's score and two features from a frozen policy.

    r(x, y) = w_0 R(x, y) + w_1 log p(y|x) + w_2 [log p(y|x) - mean over x' of log p(y|x')]

p is the policy that the reward model was initialised from (the SFT policy), x' a few fixed other prompts that are
stored with the model. ``log_prob`` measures how likely a response is, ``prompt_gain`` how much more likely its prompt
makes it. The latter is information that a reward model which ignores the prompt does not have.
"""

from __future__ import annotations

import torch
from torch import Tensor

from nemo_advrm.data.answers import answer_start_tokens, split_at_answer, until_end
from nemo_advrm.data.tokenizers import Tokenizer
from nemo_advrm.engine.feature_file import FeatureWeights
from nemo_advrm.engine.microbatches import EncodedResponse
from nemo_advrm.engine.model import MegatronModel
from nemo_advrm.engine.response_log_probs import summed_log_probs_and_entropies
from nemo_advrm.errors import DataError, RewardSourceError
from nemo_advrm.rewards.local import MegatronReward
from nemo_advrm.rewards.token_sequences import encode_rendered
from nemo_advrm.rollouts.types import Rollouts


class ReferenceFeatures:
    """Features of responses under one frozen policy, deterministic for a prompt and a response.

    The features of the last rollouts are cached, so that members which share this object have them computed once.

    Args:
        name: of the policy, for messages.
        model: a language model on the running layout.
        tokenizer: the policy's.
        prompts: ids of the other prompts of ``prompt_gain``, at least two; none where only ``log_prob`` is asked for.
    """

    def __init__(self, name: str, model: MegatronModel, tokenizer: Tokenizer, prompts: list[list[int]]) -> None:
        self.name = name
        self.model = model
        self.tokenizer = tokenizer
        self.prompts = prompts
        self._opening = answer_start_tokens(tokenizer, prompts) if prompts else []
        self._last: tuple[Rollouts, bool, Tensor] | None = None

    def values(self, rollouts: Rollouts, names: tuple[str, ...]) -> Tensor:
        """Returns the features ``names`` of every response, [N, F] fp32 on the CPU, in nats; all ranks call.

        Besides ``log_prob`` and ``prompt_gain`` there is ``entropy``, which detectors read: the entropy of the policy's
        next token, summed over the response.

        A response is encoded from its text (rows that came as tokens are used unchanged), with the end token when it
        ended. Over-long conversations lose tokens at the start of the prompt.

        Raises DataError for a row without a prompt, RewardSourceError for a response that is too long.
        """
        gain = "prompt_gain" in names
        # compared by identity, not by content, so that all ranks decide alike whether to compute
        if self._last is None or self._last[0] is not rollouts or (gain and not self._last[1]):
            self._last = (rollouts, gain, self._compute(rollouts, gain))
        table_N3 = self._last[2]
        return torch.stack([table_N3[:, ("log_prob", "prompt_gain", "entropy").index(name)] for name in names], -1)

    def lengths(self, rollouts: Rollouts) -> Tensor:
        """Returns the number of tokens that ``log_prob`` and ``entropy`` of every response sum over, [N].

        It is not the number of sampled tokens: a text may be sampled in more tokens than it is encoded in.
        """
        return torch.tensor([len(self._parts(rollouts, i)[1]) for i in range(len(rollouts))])

    def check(self, rollouts: Rollouts) -> None:
        """Raises what :meth:`values` would raise for one of the rows, without running the policy."""
        for i in range(len(rollouts)):
            self._row(*self._parts(rollouts, i))

    def _compute(self, rollouts: Rollouts, gain: bool) -> Tensor:
        """Returns log_prob, with ``gain`` prompt_gain (else 0), and entropy, [N, 3]."""
        parts = [self._parts(rollouts, i) for i in range(len(rollouts))]
        # a prompt that is one of the fixed prompts is compared with the others only
        others = [[other for other in self.prompts if other != prompt] if gain else [] for prompt, _ in parts]
        rows = [self._row(prompt, answer) for prompt, answer in parts]
        rows += [self._row(p, answer) for (_, answer), own in zip(parts, others, strict=True) for p in own]
        log_probs, entropies = summed_log_probs_and_entropies(self.model, rows, self.tokenizer.pad_id).unbind(-1)
        log_prob_N, rest = log_probs[: len(parts)], log_probs[len(parts) :]
        counts = [len(own) for own in others]
        means = [part.mean() if len(part) else part.new_zeros(()) for part in rest.split(counts)]
        other_N = torch.stack(means) if means else log_prob_N
        gain_N = log_prob_N - other_N if gain else torch.zeros_like(log_prob_N)
        return torch.stack([log_prob_N, gain_N, entropies[: len(parts)]], -1)

    def _parts(self, rollouts: Rollouts, i: int) -> tuple[list[int], list[int]]:
        """Returns the token ids of the prompt and of the response."""
        if rollouts.tokens_only and rollouts.prompt_tokens[i]:
            self._check_tokens(rollouts)
            return rollouts.prompt_tokens[i], until_end(rollouts.response_tokens[i], self.tokenizer.eos_id)
        tokenizer, text = self.tokenizer, rollouts.responses[i]
        if rollouts.prompts[i]:
            answer = tokenizer.encode_response(text) if rollouts.ended[i] else tokenizer.encode(text)
            return tokenizer.encode_prompt(rollouts.prompts[i]), answer
        if rollouts.rendered:
            return split_at_answer(encode_rendered(tokenizer, text), self._opening, tokenizer.eos_id)
        if rollouts.tokens_only:
            self._check_tokens(rollouts)
            return split_at_answer(rollouts.response_tokens[i], self._opening, tokenizer.eos_id)
        raise DataError(f"response {i + 1} has no prompt (raw text): the features of {self.name} need one")

    def _check_tokens(self, rollouts: Rollouts) -> None:
        if rollouts.fingerprint != self.tokenizer.fingerprint:
            raise DataError(
                f"the rows came as tokens of another tokenizer than {self.tokenizer.name}, that of {self.name}, "
                "without their text"
            )

    def _row(self, prompt: list[int], answer: list[int]) -> EncodedResponse:
        settings = self.model.model_config
        room = settings.encoder_seq_length - len(answer)
        if room < 1 and settings.position_embedding_type == "learned_absolute":
            raise RewardSourceError(
                f"{self.name}: a response has {len(answer)} tokens, the policy takes {settings.encoder_seq_length} "
                "with its prompt"
            )
        kept = prompt[-max(1, room) :]
        return EncodedResponse(kept + answer, len(kept))


class HybridReward:
    """A reward source: the weighted sum of a member's score and features, with the weights stored with the member.

    Its length limit, tokenizer and number format are those of the member.
    """

    def __init__(self, member: MegatronReward, features: ReferenceFeatures, weights: FeatureWeights) -> None:
        self.name = member.name
        self.member = member
        self.features = features
        self.weights = weights
        self.tokenizer = member.tokenizer
        self.model = member.model

    @property
    def longest(self) -> int:
        return self.member.longest

    @property
    def context(self) -> int:
        return self.member.context

    @property
    def dtype(self) -> torch.dtype:
        return self.member.dtype

    def score(self, rollouts: Rollouts) -> Tensor:
        """Returns the hybrid scores, [N] fp32 on the CPU; raises what the member and the features raise."""
        return self.combine(self.member.score(rollouts), rollouts)

    def score_with_hidden_states(self, rollouts: Rollouts) -> tuple[Tensor, Tensor]:
        """Returns the hybrid scores, [N], and the hidden states of the member, [N, D]; fp32 on the CPU."""
        scores_N, hidden_ND = self.member.score_with_hidden_states(rollouts)
        return self.combine(scores_N, rollouts), hidden_ND

    def combine(self, scores_N: Tensor, rollouts: Rollouts) -> Tensor:
        """Returns the hybrid scores, [N], from the member's own scores."""
        return hybrid_scores(scores_N, self.features.values(rollouts, self.weights.names), self.weights.weights)


def hybrid_scores(scores_N: Tensor, features_NF: Tensor, weights: tuple[float, ...]) -> Tensor:
    """Returns the weighted sum of scores and features, [N] fp32; summed in fp64."""
    columns = torch.cat([scores_N[:, None], features_NF], -1).double()
    return (columns @ torch.tensor(weights, dtype=torch.float64)).float()
