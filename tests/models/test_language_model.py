"""Supervised fine-tuning: loss on response tokens only, all weights train, the loss falls."""

from __future__ import annotations

import pytest
import torch
from tiny import ARCHITECTURES, TOKENIZER, responses, tiny_config

from nemo_advrm.engine.dimensions import padded_vocab_size
from nemo_advrm.engine.microbatches import EncodedResponse, response_microbatch
from nemo_advrm.engine.runtime import Runtime
from nemo_advrm.models.language_model import SupervisedModel


def _module(architecture: str = "llama") -> SupervisedModel:
    cfg = tiny_config(architecture)
    cfg.model.optim.lr = 1e-2
    return SupervisedModel(cfg, TOKENIZER, responses(16))


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_weight_moves_in_one_step_and_the_loss_falls(single: Runtime, architecture: str) -> None:
    module = _module(architecture)
    before = {n: p.detach().clone() for n, p in module.model.parts[0].named_parameters()}
    metrics = [module.train_on(responses(16), 0)]
    assert [n for n, p in module.model.parts[0].named_parameters() if torch.equal(p, before[n])] == []
    metrics += [module.train_on(responses(16), step) for step in range(1, 25)]
    assert metrics[-1]["train/loss"] < 0.7 * metrics[0]["train/loss"]
    assert {"train/loss", "train/entropy", "grad_norm", "learning_rate", "tokens"} == metrics[0].keys()


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_loss_is_the_mean_over_response_tokens_of_the_dense_cross_entropy(
    single: Runtime, architecture: str
) -> None:
    module, losses = _module(architecture), []
    for row in responses(7):
        ids = torch.tensor([row.tokens])
        with torch.no_grad():
            logits = module.model.parts[0](
                ids, torch.arange(len(row.tokens))[None], predict_BS=torch.ones_like(ids, dtype=torch.bool)
            )
        per_token = torch.nn.functional.cross_entropy(logits[:-1], ids[0, 1:], reduction="none")
        losses += per_token[row.prompt_length - 1 :].tolist()
    metrics = module.train_on(responses(7), 0)
    assert metrics["train/loss"] == pytest.approx(sum(losses) / len(losses), rel=1e-4)


def test_response_tokens_are_predicted_from_the_position_before_them(single: Runtime) -> None:
    rows = [EncodedResponse([5, 6, 7, 8, 1], 2), EncodedResponse([9, 4, 1], 1)]
    microbatch = response_microbatch(_module().model, rows, pad_id=1)
    assert microbatch.forward["predict_BS"].int().tolist() == [[0, 1, 1, 1, 0], [1, 1, 0, 0, 0]]
    assert microbatch.extra["targets_N"].tolist() == [7, 8, 1, 4, 1]
    assert microbatch.extra["rows_N"].tolist() == [0, 0, 0, 1, 1]


@pytest.mark.parametrize(
    ("wanted", "tensor_parallel", "expected"),
    [(64, 1, 64), (65, 1, 72), (65, 2, 72), (65, 8, 72), (65, 3, 72), (65, 16, 128)],
)
def test_the_padded_vocabulary_is_the_same_at_small_tensor_parallel_sizes(
    wanted: int, tensor_parallel: int, expected: int
) -> None:
    model = tiny_config(tensor_model_parallel_size=tensor_parallel).model
    assert padded_vocab_size(model, wanted) == expected
