"""First weights and responses of a mixture of experts; runs on all ranks of a layout."""

from __future__ import annotations

import torch
from tiny import TOKENIZER, sequences, tiny_config

from nemo_advrm.engine import runtime
from nemo_advrm.engine.generation import generate, uniforms
from nemo_advrm.engine.model import build_model
from nemo_advrm.engine.sampling import Sampling


def first_weights() -> list[torch.Tensor]:
    """The first matrix of each of this rank's experts, layer by layer."""
    cfg = tiny_config("experts", runtime.current().layout)
    model = build_model(cfg.model, cfg.precision, "lm", TOKENIZER.vocab_size, seed=3, trainable=False)
    named = model.parts[0].named_parameters()
    return [weight.detach() for name, weight in named if ".experts." in name and "linear_fc1" in name]


def responses(shares: list[list[int]]) -> dict[int, list[int]]:
    """Responses to those of 8 prompts that ``shares`` names for this data-parallel rank, by their numbers."""
    rt = runtime.current()
    cfg = tiny_config("experts", rt.layout)
    policy = build_model(cfg.model, cfg.precision, "lm", TOKENIZER.vocab_size, seed=3, trainable=False)
    own = shares[rt.dp_rank]
    prompts, sampling = sequences(8, seed=5, longest=9), Sampling(10, (TOKENIZER.eos_id, 5, 9), temperature=0.9)
    numbers_BT = uniforms(7, len(prompts), sampling.max_new_tokens)
    made = generate(policy, [prompts[i] for i in own], sampling, numbers_BT[own], max_rows=3)
    return dict(zip(own, made.responses, strict=True))
