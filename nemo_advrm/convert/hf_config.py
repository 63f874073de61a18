"""Converts config.json to ModelConfig and back, using :mod:`nemo_advrm.convert.architecture_tables`."""

from __future__ import annotations

from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

from nemo_advrm.config.schema import ModelConfig
from nemo_advrm.convert import hf_directory
from nemo_advrm.convert.architecture_tables import ARCHITECTURES, Architecture
from nemo_advrm.convert.tensor_names import with_all_sizes
from nemo_advrm.engine.architecture import first_difference
from nemo_advrm.engine.dimensions import Head
from nemo_advrm.errors import CheckpointError, one_line
from nemo_advrm.nearest_name import nearest_name

CLASSES: dict[str, Head] = {"ForCausalLM": "lm", "ForSequenceClassification": "reward"}

# (key of config.json, key of ModelConfig) of all architectures
_SHARED = (
    ("num_hidden_layers", "num_layers"),
    ("hidden_size", "hidden_size"),
    ("intermediate_size", "ffn_hidden_size"),
    ("num_attention_heads", "num_attention_heads"),
    ("num_key_value_heads", "num_query_groups"),
    ("head_dim", "kv_channels"),
    ("vocab_size", "vocab_size"),
    ("max_position_embeddings", "encoder_seq_length"),
    ("initializer_range", "init_method_std"),
    ("tie_word_embeddings", "share_embeddings_and_output_weights"),
)
_SIZES = [theirs for theirs, _ in _SHARED if theirs not in ("initializer_range", "tie_word_embeddings")]
_EXPERT_SIZES = ("num_moe_experts", "moe_router_topk", "ffn_hidden_size")
_LLAMA3_ROPE = (
    ("factor", "rope_scaling_factor"),
    ("low_freq_factor", "rope_scaling_low_freq_factor"),
    ("high_freq_factor", "rope_scaling_high_freq_factor"),
    ("original_max_position_embeddings", "rope_scaling_original_context"),
)
# keys that transformers writes for every model and that do not describe the architecture
_IRRELEVANT_KEYS = (
    "_model_name_or_path",
    "_name_or_path",
    "chunk_size_feed_forward",
    "id2label",
    "is_encoder_decoder",
    "label2id",
    "output_attentions",
    "output_hidden_states",
    "problem_type",
    "quantization_config",
    "return_dict",
    "transformers_version",
)


def read_config(directory: Path) -> dict[str, Any]:
    """Read config.json of a Hugging Face directory; transformers fills in the defaults of the architecture.

    Raises CheckpointError for an unsupported architecture or value, or a classifier with other than one label.
    """
    path = directory / "config.json"
    raw = hf_directory.read_config(directory)
    find_architecture(raw, str(path))
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(str(directory), local_files_only=True, trust_remote_code=False).to_dict()
    except Exception as error:  # transformers raises many types for a wrong value
        raise CheckpointError(f"{path}: {one_line(error, 300)}") from None
    if hf_directory.is_classifier(raw) and (labels := hf_directory.labels(path, raw)) != 1:
        raise CheckpointError(f"{path}: a reward model must have one label, this classifier has {labels}")
    return without_irrelevant_keys(config, raw["architectures"])


def without_irrelevant_keys(config: dict[str, Any], architectures: list[str]) -> dict[str, Any]:
    """Return a transformers configuration without keys that do not describe the model, with ``architectures``."""
    kept = {key: value for key, value in config.items() if key not in _IRRELEVANT_KEYS}
    return kept | {"architectures": architectures}


def check_config(config: dict[str, Any]) -> None:
    """Raise CheckpointError unless transformers accepts ``config`` as a config.json."""
    from transformers import AutoConfig

    try:
        AutoConfig.for_model(**config)
    except Exception as error:  # transformers raises many types for a wrong value
        raise CheckpointError(f"transformers refuses the configuration: {one_line(error, 300)}") from None


def find_architecture(config: dict[str, Any], where: str) -> tuple[Architecture, Head]:
    """Return the table and the head of the class in ``config["architectures"]``. Raises CheckpointError."""
    names = config.get("architectures")
    if not isinstance(names, list) or len(names) != 1:
        raise CheckpointError(f"{where}: the key architectures must name one class, not {names!r}")
    for table in ARCHITECTURES:
        for suffix, head in CLASSES.items():
            if names[0] == table.family + suffix:
                return table, head
    known = [table.family + suffix for table in ARCHITECTURES for suffix in CLASSES]
    raise CheckpointError(
        f"{where}: {names[0]} cannot be converted; the nearest that can is {nearest_name(names[0], known)} "
        f"(families: {', '.join(table.family for table in ARCHITECTURES)}; classes: {', '.join(CLASSES)}). "
        "Megatron-Bridge may know it (convert from=hf to=bridge), but this package does not train it: docs/bridge.md"
    )


def model_config(table: Architecture, config: dict[str, Any], where: str) -> ModelConfig:
    """Return the ModelConfig of ``config``. Raises CheckpointError with the key of an unsupported value."""
    for key, wanted in table.required.items():
        if (config.get(key) or False) != wanted:
            raise CheckpointError(f"{where}: {key}={config.get(key)!r} is not supported (only {wanted!r})")
    _check_sizes(table, config, where)
    heads = config["num_attention_heads"]
    config = {"num_key_value_heads": heads, "head_dim": config["hidden_size"] // heads} | {
        key: value for key, value in config.items() if value is not None
    }
    # what neither the table nor config.json names has ModelConfig's defaults, which are Llama's
    settings = dict(table.fixed)
    types = {f.name: f.type for f in fields(ModelConfig)}
    for theirs, ours in (*_SHARED, *table.keys):
        value = config.get(theirs, 0)
        settings[ours] = float(value) if types[ours] == "float" else value
    settings |= table.derived(config) | _rope(table, config, where) | _windows(table, config, where)
    unknown = settings.keys() - types.keys()
    assert not unknown, unknown
    return ModelConfig(**settings)


def _check_sizes(table: Architecture, config: dict[str, Any], where: str) -> None:
    sizes = [*_SIZES, *(theirs for theirs, ours in table.keys if ours in _EXPERT_SIZES)]
    for key, ours in (*_SHARED, *table.keys):
        value = config.get(key)
        absent = value is None and key in ("num_key_value_heads", "head_dim")
        if key in sizes and not absent and not (type(value) is int and value > 0):
            raise CheckpointError(f"{where}: {key}={value!r} must be a whole number above 0 (model.{ours})")
    experts = next((config[theirs] for theirs, ours in table.keys if ours == "num_moe_experts"), 0)
    if experts and config["num_experts_per_tok"] > experts:
        raise CheckpointError(f"{where}: num_experts_per_tok={config['num_experts_per_tok']} of {experts} experts")
    heads, groups = config["num_attention_heads"], config.get("num_key_value_heads") or 1
    if heads % groups:
        raise CheckpointError(f"{where}: num_attention_heads={heads} cannot be divided by num_key_value_heads={groups}")


def hf_config(table: Architecture, model: ModelConfig, head: Head, base: dict[str, Any]) -> dict[str, Any]:
    """Return the config.json of ``model``: ``base`` with the values of the model.

    Raises CheckpointError, with the key, when the architecture does not support a value of the model.
    """
    suffix = next(suffix for suffix, of in CLASSES.items() if of == head)
    config: dict[str, Any] = dict(base) if base.get("model_type") == table.model_type else {}
    longest = config.get("max_position_embeddings") or 0
    config |= {"model_type": table.model_type, "architectures": [table.family + suffix]}
    config |= {key: wanted for key, wanted in table.required.items() if wanted is not False}
    whole = with_all_sizes(model)
    for theirs, ours in (*_SHARED, *table.keys):
        # a key of all architectures that this one has another for (Qwen3-MoE's intermediate_size) stays as it is
        if theirs not in config or (theirs, ours) in table.keys or ours not in {key for _, key in table.keys}:
            config[theirs] = getattr(whole, ours)
    # rotary positions have no table, so training on shorter sequences does not reduce the model's maximum
    config["max_position_embeddings"] = max(longest, model.encoder_seq_length)
    for cap in ("attn_logit_softcapping", "final_logit_softcapping"):
        if cap in config:
            config[cap] = config[cap] or None
    if "query_pre_attn_scalar" in config:  # transformers accepts only integers
        config["query_pre_attn_scalar"] = int(model.query_scale or whole.kv_channels)
    config["rope_parameters"] = _rope_parameters(table, model)
    if table.partial_rotary:
        config["partial_rotary_factor"] = model.rotary_percent
    config |= _window_keys(table, model)
    again = model_config(table, config, f"this model as {table.family}")
    difference = first_difference(asdict(model), asdict(again), head, head)
    if difference is not None and difference[0] != "head_bias":
        key, mine, theirs = difference
        raise CheckpointError(f"model.{key}={mine!r} cannot be written as {table.family} (it has {theirs!r})")
    # older releases of transformers read these keys instead of rope_parameters and num_local_experts
    config["rope_theta"] = model.rotary_base
    if table.model_type == "qwen3_moe":
        config["num_experts"] = model.num_moe_experts
    if model.rope_scaling:
        config["rope_scaling"] = {k: v for k, v in config["rope_parameters"].items() if k != "rope_theta"}
    return config


def choose_architecture(model: ModelConfig, head: Head, base: dict[str, Any], wanted: str = "") -> Architecture:
    """Return the architecture ``wanted`` (a family), or that of ``base``, or the first that supports the model."""
    if wanted:
        by_name = {table.family.lower(): table for table in ARCHITECTURES}
        if wanted.lower() not in by_name:
            known = [table.family for table in ARCHITECTURES]
            raise CheckpointError(f"architecture={wanted}: did you mean {nearest_name(wanted, known)}?")
        return by_name[wanted.lower()]
    for table in ARCHITECTURES:
        if base.get("model_type") == table.model_type:
            return table
    reasons = []
    for table in ARCHITECTURES:
        try:
            hf_config(table, model, head, {})
            return table
        except CheckpointError as error:
            reasons.append(str(error))
    raise CheckpointError(f"no Hugging Face architecture computes this model: {'; '.join(reasons)}")


def _rope(table: Architecture, config: dict[str, Any], where: str) -> dict[str, Any]:
    rope = config.get("rope_parameters") or {}
    kind = rope.get("rope_type", "default")
    if kind not in ("default", "llama3"):
        raise CheckpointError(f"{where}: rope_type {kind!r} is not supported (only 'default' and 'llama3')")
    part = float(rope.get("partial_rotary_factor") or config.get("partial_rotary_factor") or 1.0)
    if part != 1.0 and not table.partial_rotary:
        raise CheckpointError(f"{where}: partial_rotary_factor={part:g} is not supported for {table.family} (only 1)")
    settings: dict[str, Any] = {"rotary_base": float(rope.get("rope_theta") or 10000.0), "rotary_percent": part}
    if kind == "llama3":
        try:
            settings |= {ours: float(rope[theirs]) for theirs, ours in _LLAMA3_ROPE}
        except KeyError as error:
            raise CheckpointError(f"{where}: rope_parameters has no {error.args[0]}") from None
        settings["rope_scaling"] = "llama3"
        settings["rope_scaling_original_context"] = int(settings["rope_scaling_original_context"])
    return settings


def _rope_parameters(table: Architecture, model: ModelConfig) -> dict[str, Any]:
    rope: dict[str, Any] = {"rope_type": model.rope_scaling or "default", "rope_theta": model.rotary_base}
    if table.partial_rotary:
        rope["partial_rotary_factor"] = model.rotary_percent
    if model.rope_scaling:
        rope |= {theirs: getattr(model, ours) for theirs, ours in _LLAMA3_ROPE}
    return rope


def _windows(table: Architecture, config: dict[str, Any], where: str) -> dict[str, Any]:
    window, layers = config.get("sliding_window"), config["num_hidden_layers"]
    if not table.windows or not window or config.get("use_sliding_window") is False:
        return {"sliding_window": 0, "sliding_window_every": 1}
    kinds = (table.windows == "pattern" and config.get("layer_types")) or ["sliding_attention"] * layers
    sliding = [kind == "sliding_attention" for kind in kinds]
    if not any(sliding):
        return {"sliding_window": 0, "sliding_window_every": 1}
    for every in range(1, layers + 1):
        if sliding == [i % every == 0 for i in range(layers)]:
            return {"sliding_window": window, "sliding_window_every": every}
    raise CheckpointError(f"{where}: this order of layer_types is not supported: {kinds}")


def _window_keys(table: Architecture, model: ModelConfig) -> dict[str, Any]:
    window = model.sliding_window
    if not table.windows:
        return {}
    if table.windows == "all":
        return {"sliding_window": window or None}
    every = model.sliding_window_every
    kinds = ["sliding_attention" if window and i % every == 0 else "full_attention" for i in range(model.num_layers)]
    keys: dict[str, Any] = {"sliding_window": window or None, "layer_types": kinds}
    if table.model_type != "gemma2":
        keys |= {"use_sliding_window": bool(window), "max_window_layers": 0 if window else model.num_layers}
    return keys
