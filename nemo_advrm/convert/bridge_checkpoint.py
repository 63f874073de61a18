"""Reads checkpoints of Megatron-Bridge whose architecture has a table here; runs no code of them and needs no Bridge.

Such a checkpoint is a directory ``iter_N`` with ``run_config.yaml`` and Megatron's ``torch_dist`` files. Its tensors
have the names of ours without the prefix ``model.``. What decides the scores but not the shapes (rotary base, norms,
activation) is taken from the Hugging Face model that it was made from, and must agree with ``run_config.yaml``.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from nemo_advrm.config.schema import ModelConfig
from nemo_advrm.convert.differences import check_tensors, refuse
from nemo_advrm.convert.dist_weights import StackedReader, StackedSource
from nemo_advrm.convert.hf_config import find_architecture, model_config, read_config
from nemo_advrm.convert.hf_source import TOKENIZER_FILES
from nemo_advrm.convert.tensors import Description
from nemo_advrm.data.reading import rule_from_hf_config
from nemo_advrm.engine.dimensions import GATED, NORMALIZATIONS, ffn_size, head_size, query_groups
from nemo_advrm.engine.weights_metadata import open_metadata
from nemo_advrm.errors import CheckpointError, ConfigError, list_names, one_line
from nemo_advrm.untrusted_files import read_json_object, read_yaml

RUN_CONFIG = "run_config.yaml"
_ITERATION = re.compile(r"iter_(\d+)")
_OF_THE_MODEL = ("embedding.", "decoder.", "output_layer.")
# state of a training, which a conversion leaves behind
_OF_TRAINING = ("optimizer", "chained_", "rng_state", "rerun_state", "opt_param_scheduler", "num_floating_point")
_ONE_BY_ONE = re.compile(r"decoder\.layers\.\d+\.")
# what no model of ours has; True for values that say so
_REFUSED: dict[str, Any] = {
    "moe_layer_freq": (None, 1),
    "moe_shared_expert_intermediate_size": (None, 0),
    "multi_latent_attention": (None, False),
    "mtp_num_layers": (None, 0),
    "seq_len_interpolation_factor": (None,),
    "heterogeneous_block_specs": (None, False),
    "apply_residual_connection_post_layernorm": (None, False),
    "rotary_interleaved": (None, False),
    "fp32_residual_connection": (None, False),
}


class BridgeSource(StackedSource):
    """A language model in a checkpoint of Megatron-Bridge.

    Args:
        path: directory with ``iter_N``, of which the last counts, or one such directory.
        tokenizer: directory of the Hugging Face model that it was made from (config.json and tokenizer); None takes the
            one that ``run_config.yaml`` names.

    Raises CheckpointError for another format, for keys of ``run_config.yaml`` that contradict the Hugging Face model,
    and for missing, unknown and wrong tensors.
    """

    def __init__(self, path: Path, tokenizer: Path | None = None) -> None:
        self.path = path
        directory = iteration(path)
        settings = _model_section(directory)
        origin = tokenizer or hf_origin(path)
        config = read_config(origin)
        where = str(origin / "config.json")
        table, head = find_architecture(config, where)
        if head != "lm":
            raise CheckpointError(f"{where}: {config['architectures'][0]} is no language model, as Bridge's are")
        model = model_config(table, config, where)
        refuse(directory / RUN_CONFIG, list_names(f"other than {where}:", list(_contradictions(settings, model))))
        backend = read_json_object(directory / "metadata.json").get("sharded_backend")
        if backend != "torch_dist":
            raise CheckpointError(f"{directory}: the format {one_line(repr(backend), 40)} is not read, torch_dist is")
        metadata = open_metadata(directory)
        _check_names(directory, metadata.state_dict_metadata)
        self._reader = StackedReader(directory, metadata, prefix="", only=_OF_THE_MODEL)
        embedding = self._reader.specs.get("embedding.word_embeddings.weight")
        rows = embedding.shape[0] if embedding is not None else 0
        if embedding is not None and rows < model.vocab_size:
            raise CheckpointError(f"{directory}: the embedding has {rows} rows, {where} has {model.vocab_size} words")
        check_tensors(directory, self._reader.specs, model, head, rows)
        self.specs = self._specs(model, head, 1)
        self.description = Description(
            model=model,
            head=head,
            tokenizer=origin if any((origin / name).exists() for name in TOKENIZER_FILES) else None,
            hf_config=config,
            rule=rule_from_hf_config(origin),
            provenance={"converted_from": f"bridge:{directory}", "class": config["architectures"][0]},
        )

    def native(self, name: str) -> str:
        return super().native(name).removeprefix("model.")


def iteration(path: Path) -> Path:
    """Returns ``path`` if it is an iteration's directory, else the last ``iter_N`` in it. Raises CheckpointError."""
    if not path.is_dir():
        raise CheckpointError(f"{path}: there is no such directory")
    if (path / RUN_CONFIG).exists() and (path / ".metadata").exists():
        return path
    found = {int(match[1]): entry for entry in path.iterdir() if (match := _ITERATION.fullmatch(entry.name))}
    if not found:
        raise CheckpointError(f"{path}: no checkpoint of Megatron-Bridge (iter_N with {RUN_CONFIG} and .metadata)")
    last = found[max(found)]
    if not (last / RUN_CONFIG).exists():
        raise CheckpointError(f"{last}: {RUN_CONFIG} is missing (Megatron-LM writes none: such are not read)")
    return last


def hf_origin(path: Path) -> Path:
    """Returns the directory of the Hugging Face model that a checkpoint names as its origin.

    Raises ConfigError when it names none, or one that is not a directory here: nothing is downloaded.
    """
    settings = _model_section(iteration(path))
    more = settings.get("extra_checkpoint_metadata")
    named = (more.get("hf_model_id") if isinstance(more, dict) else None) or settings.get("hf_model_id")
    if not isinstance(named, str) or not (Path(named) / "config.json").exists():
        raise ConfigError(
            f"tokenizer is not set: {path} was made from {one_line(repr(named), 100)}, which is no directory with "
            "config.json here: set tokenizer=DIR to the Hugging Face model that it was made from"
        )
    return Path(named)


def is_known(origin: Path) -> bool:
    """Whether the model in ``origin`` has a table here. Raises CheckpointError when its config.json cannot be read."""
    config = read_json_object(origin / "config.json")
    try:
        find_architecture(config, str(origin))
    except CheckpointError:
        return False
    return True


def _model_section(directory: Path) -> dict[str, Any]:
    section = read_yaml(directory / RUN_CONFIG).get("model")
    if not isinstance(section, dict):
        raise CheckpointError(f"{directory / RUN_CONFIG}: the section model is missing")
    return section


def _contradictions(settings: Mapping[str, Any], model: ModelConfig) -> Iterator[str]:
    """Yields the keys whose value is another one than that of ``model``; a key that is absent says nothing.

    Bridge writes them in the section ``model``, or in ``model.transformer``.
    """
    inner = settings.get("transformer")
    given = {**(inner if isinstance(inner, dict) else {}), **settings}
    normalization, zero_centered = NORMALIZATIONS[model.normalization]
    rope = model.position_embedding_type == "rope"
    wanted = {
        "num_layers": model.num_layers,
        "hidden_size": model.hidden_size,
        "num_attention_heads": model.num_attention_heads,
        "num_query_groups": query_groups(model),
        "kv_channels": head_size(model),
        "normalization": normalization,
        "layernorm_zero_centered_gamma": zero_centered,
        "layernorm_epsilon": model.layernorm_epsilon,
        "gated_linear_unit": model.activation in GATED,
        "add_bias_linear": model.bias,
        "add_qkv_bias": model.qkv_bias or model.bias,
        "qk_layernorm": model.qk_layernorm,
        "num_moe_experts": model.num_moe_experts,
        **(
            {"moe_ffn_hidden_size": ffn_size(model), "moe_router_topk": model.moe_router_topk}
            if model.num_moe_experts
            else {"ffn_hidden_size": ffn_size(model)}
        ),
        "share_embeddings_and_output_weights": model.share_embeddings_and_output_weights,
        "position_embedding_type": model.position_embedding_type,
        **({"rotary_base": model.rotary_base, "rotary_percent": model.rotary_percent} if rope else {}),
        "rope_scaling": bool(model.rope_scaling),
        **({"rope_scaling_factor": model.rope_scaling_factor} if model.rope_scaling else {}),
        "window_size": [model.sliding_window - 1, 0] if model.sliding_window else None,
    }
    for key, mine in wanted.items():
        theirs = given.get(key)
        if theirs is not None and not _equal(theirs, mine):
            yield f"{key} is {one_line(repr(theirs), 60)}, not {mine!r}"
    words = given.get("vocab_size")
    if isinstance(words, int) and words > model.vocab_size:  # more rows are padding, which is cut off
        yield f"vocab_size is {words}, more than {model.vocab_size}"
    for key, fine in _REFUSED.items():
        if given.get(key) not in fine:
            yield f"{key} is {one_line(repr(given[key]), 60)}, which no model here has"


def _equal(theirs: Any, mine: Any) -> bool:
    numbers = (int, float)
    if isinstance(theirs, numbers) and isinstance(mine, numbers) and bool not in (type(theirs), type(mine)):
        return math.isclose(theirs, mine, rel_tol=1e-6)
    return bool(theirs == mine)


def _check_names(directory: Path, stored: Mapping[str, Any]) -> None:
    """Raises CheckpointError for parts of a model that would be left out, and for layers stored one by one."""
    keys = [key for key in stored if not key.startswith(_OF_TRAINING)]
    if any(_ONE_BY_ONE.match(key) for key in keys):
        raise CheckpointError(f"{directory}: its layers are stored one by one, not as a stack, which is not read")
    others = sorted(key for key in keys if not key.startswith(_OF_THE_MODEL))
    refuse(directory, list_names("tensors that no language model here has:", others))
