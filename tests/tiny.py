"""Tiny models and data for tests: two architectures over the words of the embedded language."""

from __future__ import annotations

import random
from typing import Any

import torch

from nemo_advrm.config.schema import Config, ModelConfig
from nemo_advrm.data.encoding import EncodedPair
from nemo_advrm.engine.microbatches import EncodedResponse
from nemo_advrm.engine.optim import MegatronOptimizer
from nemo_advrm.engine.runtime import Layout
from nemo_advrm.models.rollout_batch import RolloutBatch
from nemo_advrm.rollouts.types import Rollouts
from nemo_advrm.synthetic.tokenizer import SyntheticTokenizer

TOKENIZER = SyntheticTokenizer()
VOCABULARY = TOKENIZER.vocab_size

ARCHITECTURES: dict[str, dict[str, Any]] = {
    # rotary positions, grouped queries, RMSNorm, gated, tied, no biases
    "llama": {"num_query_groups": 2, "ffn_hidden_size": 48},
    # learned positions, LayerNorm, gelu, biases, untied
    "gpt": {
        "normalization": "LayerNorm",
        "activation": "gelu",
        "position_embedding_type": "learned_absolute",
        "bias": True,
        "share_embeddings_and_output_weights": False,
    },
}
# a mixture of experts; not among the others, as layouts of its own are its tests
EXPERTS: dict[str, dict[str, Any]] = {
    "experts": {**ARCHITECTURES["llama"], "num_moe_experts": 4, "moe_router_topk": 2, "ffn_hidden_size": 24}
}


def tiny_config(architecture: str = "llama", layout: Layout | None = None, **model: Any) -> Config:
    """Configuration of a 4-layer model of width 32; ``model`` overrides keys of ``cfg.model``."""
    layout = layout or Layout()
    settings = {
        "num_layers": 4,
        "hidden_size": 32,
        "num_attention_heads": 4,
        "encoder_seq_length": 64,
        "tokenizer": "synthetic",
        "init_method_std": 0.08,
        "micro_batch_size": 3,
        "micro_batch_tokens": 96,
        "global_batch_size": 8,
        "tensor_model_parallel_size": layout.tensor,
        "pipeline_model_parallel_size": layout.pipeline,
        "context_parallel_size": layout.context,
        "expert_model_parallel_size": layout.expert,
        **(ARCHITECTURES | EXPERTS)[architecture],
        **model,
    }
    cfg = Config(model=ModelConfig(**settings))
    cfg.model.optim.lr = 1e-3
    cfg.model.optim.sched.name = "constant"
    # Adam divides a gradient by its own size: without this, rounding noise in a gradient near 0 moves a weight
    cfg.model.optim.eps = 1e-4
    cfg.reward_model.head_init_std = 0.2
    cfg.trainer.max_steps = 1000
    return cfg


def sequences(count: int, seed: int = 0, longest: int = 20) -> list[list[int]]:
    """Token rows of 2 to ``longest`` tokens without special tokens."""
    draw = random.Random(seed)
    return [[draw.randrange(3, 64) for _ in range(draw.randint(2, longest))] for _ in range(count)]


def responses(count: int, seed: int = 0) -> list[EncodedResponse]:
    """Prompts of 2 to 6 tokens with responses that end in eos."""
    draw = random.Random(seed)
    return [
        EncodedResponse([*row, TOKENIZER.eos_id], draw.randint(1, min(6, len(row) - 1)))
        for row in sequences(count, seed)
    ]


def pairs(count: int, seed: int = 0) -> list[EncodedPair]:
    """Preference pairs of unequal lengths with margins, weights and two labels a side."""
    draw = random.Random(seed)
    rows = []
    for i, prompt in enumerate(sequences(count, seed, longest=6)):
        chosen, rejected = ([draw.randrange(3, 64) for _ in range(draw.randint(1, 12))] for _ in range(2))
        labels = [tuple(round(draw.uniform(-1, 1), 2) for _ in range(2)) for _ in range(2)]
        rows.append(
            EncodedPair(
                [*prompt, *chosen, TOKENIZER.eos_id],
                [*prompt, *rejected, TOKENIZER.eos_id],
                len(prompt),
                round(draw.uniform(0.2, 2), 2),
                draw.choice((0.5, 1.0)),
                f"row {i}",
                *labels,
            )
        )
    return rows


def rollout_batch(rows: list[EncodedResponse]) -> RolloutBatch:
    """The rows as a batch of finished rollouts, whose text nobody reads."""
    return RolloutBatch.of(
        Rollouts(
            prompts=[()] * len(rows),
            responses=[""] * len(rows),
            ended=[True] * len(rows),
            prompt_tokens=[r.tokens[: r.prompt_length] for r in rows],
            response_tokens=[r.tokens[r.prompt_length :] for r in rows],
            prompt_index=[0] * len(rows),
            fingerprint="",
        )
    )


def optimizer_state(optimizer: MegatronOptimizer) -> list[torch.Tensor]:
    """All tensors of an optimizer's state, by parameter and name."""
    states = (state for inner in optimizer._inner for state in inner.state.values())
    return [tensor for state in states for _, tensor in sorted(state.items()) if isinstance(tensor, torch.Tensor)]
