"""Tiny random Hugging Face models, one per architecture that is converted: the reference of tests.

Every norm weight and bias is random, because the usual ones and zeros would hide a missing tensor, and the vocabulary
of 67 is no multiple of anything.
"""

from __future__ import annotations

from typing import Any

import torch
import transformers
from transformers import PreTrainedConfig, PreTrainedModel

VOCABULARY = 67

_COMMON: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "initializer_range": 0.15,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}

# name -> (family in class names, configuration)
ARCHITECTURES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama2": ("Llama", {"num_key_value_heads": 4, "tie_word_embeddings": False}),
    "llama3": ("Llama", {"rope_parameters": {"rope_type": "default", "rope_theta": 500000.0}}),
    "llama31": (
        "Llama",
        {
            "rope_parameters": {
                "rope_type": "llama3",
                "rope_theta": 500.0,
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 32,
            }
        },
    ),
    "llama_tied": ("Llama", {"tie_word_embeddings": True}),
    "mistral": ("Mistral", {"sliding_window": 5}),
    "qwen2": ("Qwen2", {"rms_norm_eps": 1e-6}),
    "qwen3": ("Qwen3", {"head_dim": 16, "rms_norm_eps": 1e-6}),
    "mixtral": ("Mixtral", {"num_local_experts": 6, "num_experts_per_tok": 3, "sliding_window": 5}),
    "qwen3_moe": (
        "Qwen3Moe",
        {
            "head_dim": 16,
            "rms_norm_eps": 1e-6,
            "num_experts": 5,
            "num_experts_per_tok": 3,
            "norm_topk_prob": True,
            "moe_intermediate_size": 32,
        },
    ),
    "gemma2": (
        "Gemma2",
        {
            "head_dim": 16,
            "query_pre_attn_scalar": 20,
            "sliding_window": 5,
            "attn_logit_softcapping": 2.0,
            "final_logit_softcapping": 3.0,
        },
    ),
    "nemotron": ("Nemotron", {"partial_rotary_factor": 0.5}),
}


def tiny_hf(name: str, seed: int = 0, reward: bool = False, **overrides: Any) -> PreTrainedModel:
    """A model of the architecture ``name`` in fp32, in evaluation mode, with eager attention.

    Args:
        seed: equal seeds give equal weights.
        reward: the sequence classifier with one label instead of the language model.
        overrides: keys of the Hugging Face configuration.
    """
    family, keys = ARCHITECTURES[name]
    config_type: type[PreTrainedConfig] = getattr(transformers, f"{family}Config")
    settings = _COMMON | keys | overrides
    if reward:
        settings["num_labels"] = 1
    config = config_type(**settings)
    config._attn_implementation = "eager"
    kind = "ForSequenceClassification" if reward else "ForCausalLM"
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model: PreTrainedModel = getattr(transformers, f"{family}{kind}")(config)
        _randomise_vectors(model)
    return model.float().eval()


@torch.no_grad()
def _randomise_vectors(model: PreTrainedModel) -> None:
    """Norm weights and all biases, which start as ones and zeros."""
    for parameter in model.parameters():
        if parameter.dim() == 1:
            parameter += 0.3 * torch.randn_like(parameter)
