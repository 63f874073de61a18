"""Sizes that follow from a model's configuration, and the names it may hold.

No Megatron-Core here: checkpoints are described, compared and planned by these alone, and importing Megatron-Core takes
longer than that work.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

from nemo_advrm.config.schema import EnsembleConfig, ModelConfig, RewardModelConfig
from nemo_advrm.objectives.losses import reads_labels

Head = Literal["lm", "reward", "value"]

# activations of which the MLP's first matrix has two halves (gated linear unit)
GATED = frozenset({"swiglu", "geglu", "geglu_tanh"})
# name -> (Megatron's normalization, whether the stored weight is the scale minus one)
NORMALIZATIONS: dict[str, tuple[str, bool]] = {
    "RMSNorm": ("RMSNorm", False),
    "rmsnorm1p": ("RMSNorm", True),
    "LayerNorm": ("LayerNorm", False),
    "layernorm1p": ("LayerNorm", True),
}


def ffn_size(model: ModelConfig) -> int:
    return model.ffn_hidden_size or 4 * model.hidden_size


def head_size(model: ModelConfig) -> int:
    return model.kv_channels or model.hidden_size // model.num_attention_heads


def query_groups(model: ModelConfig) -> int:
    return model.num_query_groups or model.num_attention_heads


def padded_vocab_size(model: ModelConfig, tokenizer_size: int) -> int:
    """Vocabulary size, padded so that tensor-parallel ranks get equal parts.

    The padding is the same for TP 1, 2, 4 and 8, so that a checkpoint opens at each of them.
    """
    wanted = model.vocab_size or tokenizer_size
    unit = model.make_vocab_size_divisible_by
    if unit % model.tensor_model_parallel_size:
        unit *= model.tensor_model_parallel_size
    return -(-wanted // unit) * unit


def tokens_at_once(model: ModelConfig, vocab_size: int) -> int:
    """Most tokens whose logits over the padded vocabulary a rank makes at once (``model.logits_chunk_size``)."""
    return max(1, model.logits_chunk_size // (vocab_size // model.tensor_model_parallel_size))


def trunk_heads(options: EnsembleConfig) -> int:
    """Members that one reward model holds as heads of its trunk."""
    return options.size if options.share == "trunk" else 1


def member_model(model: ModelConfig, options: EnsembleConfig) -> ModelConfig:
    """How a reward model is trained: ``ensemble.share=lora`` makes it adapters, whatever ``model.peft`` is."""
    return replace(model, peft="lora") if options.share == "lora" else model


def head_outputs(options: RewardModelConfig) -> int:
    """Outputs of a reward model's head: one for each label of a loss that reads labels, else one."""
    return options.num_attributes if reads_labels(options.loss) else 1
