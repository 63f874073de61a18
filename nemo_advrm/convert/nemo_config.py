"""Converts ``model_config.yaml`` of a NeMo GPT to ModelConfig and back.

One table of keys serves both directions. Every setting that changes the result is either converted or refused.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import fields
from typing import Any

from nemo_advrm.config.schema import ModelConfig
from nemo_advrm.convert.tensor_names import with_all_sizes
from nemo_advrm.engine.description import check_texts
from nemo_advrm.engine.dimensions import NORMALIZATIONS, Head
from nemo_advrm.errors import CheckpointError

REWARD_TARGET = "nemo_aligner.models.nlp.gpt.megatron_gpt_reward_model.MegatronGPTRewardModel"
REGRESSION_TARGET = "nemo_aligner.models.nlp.gpt.megatron_gpt_regression_reward_model.MegatronGPTRegressionRewardModel"
ACTOR_TARGET = "nemo.collections.nlp.models.language_modeling.megatron_gpt_model.MegatronGPTModel"
CRITIC_CLASS = "MegatronGPTCriticModel"
NEMO_VERSION = "2.2.1"

# (key of NeMo, key of ModelConfig, what NeMo takes for an absent key); None: the key is required
_KEYS: tuple[tuple[str, str, Any], ...] = (
    ("num_layers", "num_layers", None),
    ("hidden_size", "hidden_size", None),
    ("ffn_hidden_size", "ffn_hidden_size", 0),
    ("num_attention_heads", "num_attention_heads", None),
    ("num_query_groups", "num_query_groups", 0),
    ("kv_channels", "kv_channels", 0),
    ("layernorm_epsilon", "layernorm_epsilon", 1e-5),
    ("position_embedding_type", "position_embedding_type", "learned_absolute"),
    ("rotary_base", "rotary_base", 10000),
    ("rotary_percentage", "rotary_percent", 1.0),
    ("bias", "bias", True),
    ("qkv_bias", "qkv_bias", False),
    ("init_method_std", "init_method_std", 0.02),
    ("hidden_dropout", "hidden_dropout", 0.1),
    ("attention_dropout", "attention_dropout", 0.1),
    ("encoder_seq_length", "encoder_seq_length", 512),
    ("make_vocab_size_divisible_by", "make_vocab_size_divisible_by", 128),
)
# sizes for which null is the default in NeMo too: it passes null on to Megatron-Core's TransformerConfig, which takes
# 4 * hidden_size, num_attention_heads and hidden_size / num_attention_heads. Any other null fails in NeMo, whose
# `cfg.get(key, default)` returns the null of a key that is there.
_NULL_SIZES = ("ffn_hidden_size", "num_query_groups", "kv_channels")
# like _KEYS, for Llama 3.1's scaling, which `scale_positional_embedding` switches on
_ROPE_KEYS: tuple[tuple[str, str, Any], ...] = (
    ("scale_factor", "rope_scaling_factor", 8),
    ("low_freq_factor", "rope_scaling_low_freq_factor", 1),
    ("high_freq_factor", "rope_scaling_high_freq_factor", 4),
    ("old_context_len", "rope_scaling_original_context", 8192),
)
_TYPES = {field.name: field.type for field in fields(ModelConfig)}
_CASTS: dict[Any, Callable[[Any], Any]] = {"int": int, "float": float, "bool": bool, "str": str}
_CHECKPOINTING = ("granularity", "method", "num_layers", "layers_per_pipeline")  # off
# NeMo's name -> ours; the last of several is written
_ACTIVATIONS = {
    "gelu": "gelu",
    "fast-geglu": "geglu",
    "geglu": "geglu",
    "swiglu": "swiglu",
    "fast-swiglu": "swiglu",
    "squared-relu": "squared_relu",
}
_WRITTEN_ACTIVATIONS = {ours: theirs for theirs, ours in _ACTIVATIONS.items()} | {"geglu_tanh": "geglu"}
# settings with the values that do not change the model; any other value is refused
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "mcore_gpt": (True,),  # the older GPT implementation of NeMo has other weights
    "name": (None, "", "te_gpt", "megatron_gpt_full_te_layer_autocast"),
    "num_moe_experts": (None,),
    "rotary_interleaved": (None, False),
    "seq_len_interpolation_factor": (None, 1, 1.0),
    "window_size": (None,),
    "openai_gelu": (None, False),
    "qk_layernorm": (None, False),  # NeMo 2.2.1 has no layer for it
    "multi_latent_attention": (None, False),
    "reset_position_ids": (None, False),
    "reset_attention_mask": (None, False),
    "drop_layers": (None,),
    "hyena": (None,),
    "fsdp": (None, False),
    "mcore_customization_config": (None, {}),
}
_NEUTRAL_IN: dict[Head, dict[str, tuple[Any, ...]]] = {
    "lm": {},
    "reward": {"output_sequence": (None, False), "use_avg_pool": (None, False)},
    "value": {"output_sequence": (True,)},
}


class UnresolvedConfig(Mapping[str, Any]):
    """A configuration whose interpolations are not resolved; reading one raises CheckpointError.

    NeMo's files contain interpolations in settings that are not read here (``data.seq_length:
    ${model.encoder_seq_length}``). Resolving one that is read could reveal an environment variable; using it as text
    would be wrong.

    Args:
        source: name of the file in error messages, which also name the key.
    """

    def __init__(self, values: Mapping[str, Any], source: str, place: str = "") -> None:
        self._values, self._source, self._place = values, source, place

    def __getitem__(self, key: str) -> Any:
        value, place = self._values[key], f"{self._place}{key}"
        if isinstance(value, dict):
            return UnresolvedConfig(value, self._source, f"{place}.")
        check_texts([key, value], f"{self._source}: {place}")
        return value

    def __iter__(self) -> Iterator[str]:
        return iter(self._values)

    def __len__(self) -> int:
        return len(self._values)


def head_of(config: Mapping[str, Any]) -> Head:
    """Return the head from the class that wrote the file, or from a key that only reward models have."""
    target = str(config.get("target", "")).rpartition(".")[2]
    if target == CRITIC_CLASS:
        return "value"
    return "reward" if "RewardModel" in target or (not target and "reward_model_type" in config) else "lm"


def read_model(config: Mapping[str, Any], source: str) -> tuple[ModelConfig, Head]:
    """Return architecture and head. Raises CheckpointError with the first unsupported setting."""
    head = head_of(config)
    for key, allowed in {**_NEUTRAL, **_NEUTRAL_IN[head]}.items():
        if config.get(key) not in allowed:
            raise CheckpointError(f"{source}: {key}={config.get(key)} is not supported")
    try:
        model = _read(config, head != "lm")
    except KeyError as error:
        raise CheckpointError(f"{source}: model_config.yaml has no {error.args[0]}") from None
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"{source}: {error}") from None
    return model, head


def _read(config: Mapping[str, Any], scores: bool) -> ModelConfig:
    settings = {ours: _value(config, theirs, ours, default) for theirs, ours, default in _KEYS}
    activation = str(config.get("activation", "gelu"))
    if activation not in _ACTIVATIONS:
        raise ValueError(f"activation={activation} is not supported")
    norm = str(config.get("normalization", "layernorm")).lower()
    stored = norm.removesuffix("1p"), norm == "layernorm1p" or bool(config.get("layernorm_zero_centered_gamma"))
    norms = {(theirs.lower(), minus_one): ours for ours, (theirs, minus_one) in NORMALIZATIONS.items()}
    if stored not in norms:
        raise ValueError(f"normalization={config['normalization']} is not supported")
    if settings["position_embedding_type"] not in ("rope", "learned_absolute"):
        raise ValueError(f"position_embedding_type={settings['position_embedding_type']} is not supported")
    # NeMo-Aligner ignores these two settings when it builds reward models and critics
    if not scores and config.get("scale_positional_embedding"):
        settings["rope_scaling"] = "llama3"
        for theirs, ours, default in _ROPE_KEYS:
            settings[ours] = _value(config, theirs, ours, default)
            if settings[ours] <= 0:
                raise ValueError(f"{theirs}={config[theirs]} is not a number above 0")
    if not scores and config.get("apply_embedding_scaling"):
        settings["embedding_scale"] = math.sqrt(settings["hidden_size"])
    settings["ffn_hidden_size"] = settings["ffn_hidden_size"] or 4 * settings["hidden_size"]
    return ModelConfig(
        **settings,
        normalization=norms[stored],
        activation=_fused(config, _ACTIVATIONS[activation]),
        share_embeddings_and_output_weights=not scores
        and bool(config.get("share_embeddings_and_output_weights", True)),
        head_bias=scores,
    )


def _fused(config: Mapping[str, Any], activation: str) -> str:
    """Return the activation that NeMo computes; its fused kernels use the tanh approximation of GELU."""
    if not config.get("bias_activation_fusion", True):
        return activation
    # Megatron-Core fuses plain GELU only with a bias
    if activation == "gelu" and config.get("bias", True):
        raise ValueError("activation=gelu with bias_activation_fusion (tanh approximation) is not supported")
    return "geglu_tanh" if activation == "geglu" else activation


def _value(config: Mapping[str, Any], key: str, ours: str, default: Any) -> Any:
    """Return the value of a key with the type of our key. Raises KeyError, TypeError or ValueError."""
    cast = _CASTS[_TYPES[ours]]
    if cast in (bool, str):
        return cast(config.get(key, default))
    value = config.get(key)
    if value is None:
        if key in config and key not in _NULL_SIZES:
            raise ValueError(f"{key}=null is not a number")
        if default is None:
            raise KeyError(key)
        return cast(default)
    # NeMo writes some sizes as strings
    if cast is int and (isinstance(value, bool) or not str(value).isdigit() or int(value) == 0):
        raise ValueError(f"{key}={value!r} is not a number above 0")
    return cast(value)


def write_config(model: ModelConfig, head: Head, head_outputs: int, tokenizer: Mapping[str, Any]) -> dict[str, Any]:
    """Return ``model_config.yaml`` of a model. Raises CheckpointError for a setting without support in NeMo 2.2.1."""
    if head == "value":
        raise CheckpointError("a critic cannot be written as a .nemo file, only reward models and language models")
    reward = head == "reward"
    unknown = {
        "activation": model.activation not in _WRITTEN_ACTIVATIONS,
        "rope_scaling": model.rope_scaling not in ("", "llama3") or (reward and bool(model.rope_scaling)),
        "embedding_scale": model.embedding_scale != 1.0
        and (reward or not math.isclose(model.embedding_scale, math.sqrt(model.hidden_size), rel_tol=1e-6)),
        "sliding_window": model.sliding_window != 0,
        "attention_softcap": model.attention_softcap != 0,
        "logit_softcap": model.logit_softcap != 0 and not reward,
        "query_scale": model.query_scale != 0,
        "post_norms": model.post_norms,
        "qk_layernorm": model.qk_layernorm,
        "num_moe_experts": model.num_moe_experts != 0,
    }
    for key, refused in unknown.items():
        if refused:
            raise CheckpointError(
                f"{key}={getattr(model, key)} cannot be written as a .nemo file: NeMo-Aligner does not support it"
            )
    whole = with_all_sizes(model)
    norm, minus_one = NORMALIZATIONS[model.normalization]
    config: dict[str, Any] = {
        "mcore_gpt": True,
        "transformer_engine": True,
        "megatron_amp_O2": False,
        "precision": "bf16",
        "tensor_model_parallel_size": 1,
        "pipeline_model_parallel_size": 1,
        "micro_batch_size": 2,
        "global_batch_size": 64,
        **{theirs: getattr(whole, ours) for theirs, ours, _ in _KEYS},
        "normalization": "layernorm1p" if model.normalization == "layernorm1p" else norm.lower(),
        "layernorm_zero_centered_gamma": minus_one,
        "activation": _WRITTEN_ACTIVATIONS[model.activation],
        "bias_activation_fusion": model.activation == "geglu_tanh",  # only the fused kernel computes it
        "share_embeddings_and_output_weights": model.share_embeddings_and_output_weights and not reward,
        "max_position_embeddings": model.encoder_seq_length,
        "seq_len_interpolation_factor": None,
        "gradient_as_bucket_view": True,
        "sequence_parallel": False,
        **{f"activations_checkpoint_{key}": None for key in _CHECKPOINTING},
        # NeMo needs an optimizer section to restore a model; training scripts override it
        "optim": {"name": "distributed_fused_adam", "lr": 9.0e-6, "weight_decay": 0.1, "betas": [0.9, 0.98]},
        "tokenizer": dict(tokenizer),
    }
    if model.rope_scaling:
        config["scale_positional_embedding"] = True
        config |= {theirs: getattr(model, ours) for theirs, ours, _ in _ROPE_KEYS}
    if model.embedding_scale != 1.0:
        config["apply_embedding_scaling"] = True
    if reward:
        regression = head_outputs > 1
        config |= {
            "reward_model_type": "regression" if regression else "binary_ranking",
            "regression": {"num_attributes": head_outputs, "merge_attributes": False, "attribute_weights": None},
            "output_sequence": False,
            "use_avg_pool": False,
            "force_head_dtype": "float32",
        }
        config["target"] = REGRESSION_TARGET if regression else REWARD_TARGET
    else:
        config["target"] = ACTOR_TARGET
    return {**config, "nemo_version": NEMO_VERSION}
