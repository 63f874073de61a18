"""What models compute of padded and of packed rows. Every function runs on all ranks of a layout."""

from __future__ import annotations

from typing import Any

import parity_jobs
import torch
from tiny import TOKENIZER, pairs, responses, rollout_batch, sequences, tiny_config

from nemo_advrm.engine import runtime
from nemo_advrm.engine.log_probs import Logits, log_probs_and_entropy
from nemo_advrm.engine.microbatches import Microbatch, response_microbatch
from nemo_advrm.engine.model import MegatronModel
from nemo_advrm.engine.response_log_probs import summed_log_probs_and_entropies
from nemo_advrm.engine.schedule import Sums, forward_backward
from nemo_advrm.engine.scoring import score_sequences, scores_and_hidden_states
from nemo_advrm.models.language_model import SupervisedModel
from nemo_advrm.models.reward_model import RewardModel, pair_microbatch
from nemo_advrm.models.rollout_batch import response_log_probs

Metrics = dict[str, float]


def rewards(architecture: str, path: str, model: dict[str, Any]) -> tuple[Any, list[Metrics], torch.Tensor]:
    """Scores with hidden states, the metrics of two steps of training, and the scores after these."""
    cfg = tiny_config(architecture, runtime.current().layout, **model)
    module = RewardModel(cfg, TOKENIZER, pairs(16), [], f"{path}/reward")
    before = scores_and_hidden_states(module.model, sequences(11), TOKENIZER.pad_id)
    steps = module.steps(0)
    metrics = [module.train_on(next(steps), step) for step in range(2)]
    return before, metrics, score_sequences(module.model, sequences(11), TOKENIZER.pad_id)


def language(architecture: str, path: str, model: dict[str, Any]) -> tuple[Any, list[Metrics], torch.Tensor]:
    """Log-probabilities with entropies, the metrics of two steps of training, and their sums after these."""
    cfg = tiny_config(architecture, runtime.current().layout, **model)
    module = SupervisedModel(cfg, TOKENIZER, responses(16), f"{path}/lm")
    rows = responses(9, seed=3)
    before = response_log_probs(module.model, rollout_batch(rows), TOKENIZER.pad_id, temperature=0.8)
    steps = module.steps(0)
    metrics = [module.train_on(next(steps), step) for step in range(2)]
    return before, metrics, summed_log_probs_and_entropies(module.model, rows, TOKENIZER.pad_id)


def critic(architecture: str, path: str, model: dict[str, Any]) -> tuple[torch.Tensor, Metrics, torch.Tensor]:
    return parity_jobs.train_critic(architecture, path, model)


def aligned(
    path: str, recipe: str, shares: list[int], model: dict[str, Any]
) -> tuple[list[Metrics], torch.Tensor, list[int]]:
    """Metrics of two steps of training and scores after these, with rows of the length that FP8 by ``recipe`` needs.

    Data-parallel rank r trains on shares[r] of 8 pairs. Without Transformer Engine layers compute in fp32, and the
    length is all that is left of FP8. Also the lengths of all rows that this rank's part of the model read.
    """
    rt = runtime.current()
    cfg = tiny_config("llama", rt.layout, micro_batch_tokens=64, sequence_packing="always", **model)
    module = RewardModel(cfg, TOKENIZER, pairs(8), [], f"{path}/reward")
    if recipe:
        module.model.config.fp8, module.model.config.fp8_recipe = "hybrid", recipe  # type: ignore[assignment]
    lengths: list[int] = []
    module.model.parts[0].register_forward_pre_hook(lambda _, args: lengths.append(args[0].size(1)))
    start = sum(shares[: rt.dp_rank])
    own = pairs(8)[start : start + shares[rt.dp_rank]]
    metrics = [module.train_on(own, step) for step in range(2)]
    return metrics, score_sequences(module.model, sequences(11), TOKENIZER.pad_id), lengths


def gradients(architecture: str, model: dict[str, Any]) -> tuple[dict[str, torch.Tensor], list[Any]]:
    """Gradients of one microbatch of pairs and of one of responses; and the shapes of their tokens."""
    cfg = tiny_config(architecture, runtime.current().layout, **model)
    scored = RewardModel(cfg, TOKENIZER, pairs(8), [])
    made = pair_microbatch(scored.model, pairs(5), TOKENIZER.pad_id, "bt")
    language = SupervisedModel(cfg, TOKENIZER, responses(8))
    predicted = response_microbatch(language.model, responses(5), TOKENIZER.pad_id)

    def loss(logits_NV: Logits, microbatch: Microbatch) -> tuple[torch.Tensor, int, Sums]:
        log_probs_N, entropy_N = log_probs_and_entropy(logits_NV, microbatch.extra["targets_N"])
        return (log_probs_N + 0.3 * entropy_N).sum(), log_probs_N.numel(), {}

    found: dict[str, torch.Tensor] = {}
    for head, trained, microbatch, function in (
        ("reward", scored.model, made, scored._loss),
        ("lm", language.model, predicted, loss),
    ):
        found |= _gradients(head, trained, microbatch, function)
    return found, [tuple(m.tokens_BS.shape) for m in (made, predicted)]


def _gradients(head: str, model: MegatronModel, microbatch: Microbatch, loss: Any) -> dict[str, torch.Tensor]:
    model.chunks[0].zero_grad_buffer()
    forward_backward(model, [microbatch], loss)
    return {f"{head} {name}": p.main_grad.clone() for name, p in model.parts[0].named_parameters()}
