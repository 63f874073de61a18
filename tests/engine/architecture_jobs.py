"""Models with the weights of Hugging Face models: what they compute and how they train, on all ranks of a layout."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from transformers import PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion

from nemo_advrm.config.schema import ModelConfig, OptimConfig, PrecisionConfig
from nemo_advrm.convert.hf_config import find_architecture, model_config
from nemo_advrm.convert.tensor_names import ATTENTION_NORM, MLP_NORM, VOCABULARY_ROWS, canonical_shapes
from nemo_advrm.convert.transforms import pad_vocabulary
from nemo_advrm.engine import checkpoint, runtime
from nemo_advrm.engine.context import SplitLogits
from nemo_advrm.engine.dimensions import padded_vocab_size
from nemo_advrm.engine.generation import generate
from nemo_advrm.engine.log_probs import log_probs_and_entropy
from nemo_advrm.engine.microbatches import Microbatch
from nemo_advrm.engine.model import MegatronModel, build_model
from nemo_advrm.engine.optim import MegatronOptimizer
from nemo_advrm.engine.sampling import Sampling
from nemo_advrm.engine.schedule import Sums, forward, forward_backward


def config_of(hf: PreTrainedModel) -> ModelConfig:
    """The ModelConfig that computes what ``hf`` does."""
    described = hf.config.to_dict() | {"architectures": [type(hf).__name__]}
    table, _ = find_architecture(described, "test")
    return model_config(table, described, "test")


def tensors_of(hf: PreTrainedModel) -> dict[str, torch.Tensor]:
    """The weights of ``hf`` under the parameter names of one unsplit model."""
    config, theirs = config_of(hf), revert_weight_conversion(hf, hf.state_dict())  # experts one by one, as in files
    table, head = find_architecture({"architectures": [type(hf).__name__]}, "test")
    rows = padded_vocab_size(config, 0)
    ours = {}
    for name, shape in canonical_shapes(config, head, config.vocab_size).items():
        found = table.parts(name, shape, config)
        assert found, name
        transform, parts = found
        tensor = transform.merge([theirs[part] for part in parts], config)
        tensor = pad_vocabulary(tensor, rows) if name in VOCABULARY_ROWS else tensor
        name = name.replace(ATTENTION_NORM, "input_layernorm.").replace(MLP_NORM, "pre_mlp_layernorm.")
        if ".experts." in name:
            parameter = name.replace("experts.experts.", "experts.local_experts.#.")
            ours |= {parameter.replace("#", str(i)): part.detach().clone() for i, part in enumerate(tensor)}
        else:
            ours[name] = tensor.detach().clone()
    return ours


def build(
    config: ModelConfig, head: str = "lm", path: str = "", trainable: bool = False, sequence_parallel: bool = False
) -> MegatronModel:
    """The model of ``config`` at the running layout, with the weights of the checkpoint ``path``."""
    layout = runtime.current().layout
    config = replace(
        config,
        tensor_model_parallel_size=layout.tensor,
        pipeline_model_parallel_size=layout.pipeline,
        context_parallel_size=layout.context,
        expert_model_parallel_size=layout.expert,
        sequence_parallel=sequence_parallel,
    )
    model = build_model(config, PrecisionConfig(), head, config.vocab_size, seed=3, trainable=trainable)  # type: ignore[arg-type]
    if path:
        checkpoint.load(Path(path), model)
    return model


def put(model: MegatronModel, tensors: dict[str, torch.Tensor]) -> None:
    """Give an unsplit model every one of its parameters."""
    parameters = dict(model.parts[0].named_parameters())
    assert parameters.keys() == tensors.keys()
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(tensors[name])


def _microbatch(tokens_BS: torch.Tensor, **forward: Any) -> Microbatch:
    rows, length = tokens_BS.shape
    predict_BS = torch.ones(rows, length, dtype=torch.bool)
    return Microbatch(tokens_BS, torch.full((rows,), length), {"predict_BS": predict_BS, **forward})


def logits(model: MegatronModel, tokens_BS: torch.Tensor) -> torch.Tensor:
    """[B, S, vocabulary] on all ranks."""
    found = forward(model, [_microbatch(tokens_BS, gather_logits=True)], lambda output, _: _whole(output))
    shape = (tokens_BS.numel(), model.vocab_size)
    whole = runtime.current().broadcast_from_last_stage(found[0] if found else torch.empty(shape))
    return whole.view(*tokens_BS.shape, -1)[..., : model.model_config.vocab_size]


def _whole(output: torch.Tensor | SplitLogits) -> torch.Tensor:
    return output.whole(output.own_NV.T).T if isinstance(output, SplitLogits) else output


def compute(
    config: ModelConfig, path: str, tokens_BS: torch.Tensor, prompts: list[list[int]], new: int, sequence_parallel: bool
) -> tuple[torch.Tensor, list[list[int]]]:
    """Logits [B, S, vocabulary] of whole sequences, and ``new`` tokens after each prompt, greedily."""
    model = build(config, "lm", path, sequence_parallel=sequence_parallel)
    made = generate(model, prompts, Sampling(new, (), temperature=0), torch.zeros(len(prompts), new))
    return logits(model, tokens_BS), made.responses


def descended(hf: PreTrainedModel, tokens_BS: torch.Tensor, rate: float) -> tuple[float, dict[str, torch.Tensor]]:
    """The next-token loss of ``hf``, and its weights after a step of gradient descent, under our names."""
    loss = F.cross_entropy(hf(tokens_BS).logits[:, :-1].flatten(0, 1), tokens_BS[:, 1:].flatten())
    loss.backward()
    with torch.no_grad():
        for parameter in hf.parameters():
            parameter -= rate * parameter.grad
    return loss.item(), tensors_of(hf)


def _next_token_loss(logits_NV: torch.Tensor, microbatch: Microbatch) -> tuple[torch.Tensor, int, Sums]:
    log_probs_N, _ = log_probs_and_entropy(logits_NV, microbatch.extra["targets_N"])
    return -log_probs_N.sum(), log_probs_N.numel(), {}


def descend(
    config: ModelConfig, path: str, tokens_BS: torch.Tensor, rate: float, sequence_parallel: bool, out: str
) -> float:
    """The next-token loss, and one step of gradient descent in two microbatches, whose weights go to ``out``."""
    model = build(config, "lm", path, trainable=True, sequence_parallel=sequence_parallel)
    optimizer = MegatronOptimizer(model, OptimConfig(name="sgd", lr=rate, weight_decay=0.0), clip=0.0)
    microbatches = [_microbatch(rows) for rows in tokens_BS.chunk(2)]
    for microbatch in microbatches:
        microbatch.forward["predict_BS"][:, -1] = False
        microbatch.extra["targets_N"] = microbatch.tokens_BS[:, 1:].flatten()
    optimizer.zero_grad()
    loss = forward_backward(model, microbatches, _next_token_loss)["loss"]
    optimizer.step(rate, 0)
    checkpoint.save(Path(out), model)
    return loss
