"""Adapters in the format of Hugging Face's ``peft``: ``adapter_config.json`` and ``adapter_model.safetensors``.

Here queries, keys and values of a layer are one matrix with one adapter, as are both halves of a gated MLP's first.
Going out, such an adapter becomes one for each of theirs, with equal A and the rows of B that are its own. Coming in,
adapters with equal A become one again; others are put side by side, with the sum of their ranks, which computes the
same.

``peft`` 0.21.2 opened what is written here and wrote what is read here (tests/convert/test_peft_library.py).
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from nemo_advrm import __version__
from nemo_advrm.config.schema import ConvertConfig, LoraConfig, ModelConfig
from nemo_advrm.convert.adapter_shapes import Matrices, of_one_rank, side_by_side
from nemo_advrm.convert.adapters import AdapterReader
from nemo_advrm.convert.architecture_tables import Architecture
from nemo_advrm.convert.conversion import DTYPES, cast
from nemo_advrm.convert.differences import refuse
from nemo_advrm.convert.dist_weights import StackedWriter
from nemo_advrm.convert.hf_config import choose_architecture
from nemo_advrm.convert.megatron_checkpoint import MegatronSource, read_model
from nemo_advrm.convert.partial import PartialDirectory, failure_named
from nemo_advrm.convert.tensor_names import TensorSpec
from nemo_advrm.convert.transforms import Transform
from nemo_advrm.engine import manifest
from nemo_advrm.engine.adapter_base import HOLDERS
from nemo_advrm.engine.checkpoint_meta import FORMAT, WEIGHTS, read_meta
from nemo_advrm.engine.parameters import adapted_sizes
from nemo_advrm.errors import CheckpointError, ConfigError, list_names
from nemo_advrm.files import atomic_replace
from nemo_advrm.untrusted_files import read_json_object

CONFIG, WEIGHTS_FILE = "adapter_config.json", "adapter_model.safetensors"
_PREFIX, _HEAD = "base_model.model.", "score.weight"
_TASKS = {"lm": "CAUSAL_LM", "reward": "SEQ_CLS"}
# keys of adapter_config.json with the values that compute what is read here
_ONLY: dict[str, tuple[Any, ...]] = {
    "peft_type": ("LORA",),
    "bias": ("none",),
    "fan_in_fan_out": (False,),
    "use_dora": (False,),
    "lora_bias": (False,),
    "rank_pattern": ({}, None),
    "alpha_pattern": ({}, None),
    "megatron_config": (None,),
    # pissa, olora, corda and loftq change the base weights that the adapters belong to
    "init_lora_weights": (True, False, None, "gaussian", "eva", "orthogonal"),
    "alora_invocation_tokens": (None, []),
    "layer_replication": (None, []),
    "trainable_token_indices": (None, [], {}),
    "target_parameters": (None, []),
    "use_qalora": (False, None),
}


def convert_adapters(cfg: ConvertConfig, report: Callable[[str], Any]) -> None:
    """Convert adapters between a checkpoint of this package and ``peft``'s format.

    Raises ConfigError for other formats, CheckpointError for adapters that the other format cannot hold.
    """
    if (cfg.from_, cfg.to) not in (("megatron", "peft"), ("peft", "megatron")):
        raise ConfigError(
            f"from={cfg.from_} to={cfg.to}: peft's format is converted from and to megatron; a whole model with the "
            "adapters merged into it is written by from=megatron to=hf or to=nemo"
        )
    if cfg.to == "peft":
        _export(cfg, report)
    else:
        _import(cfg, report)


def _export(cfg: ConvertConfig, report: Callable[[str], Any]) -> None:
    path = Path(cfg.path)
    meta = read_meta(path)
    if "base" not in meta:
        raise CheckpointError(f"{path}: holds no adapters, but a whole model: convert it with to=hf")
    below = read_meta(Path(meta["base"]["path"]))
    if "base" in below:
        raise CheckpointError(
            f"{path}: its adapters were trained on adapters ({meta['base']['path']}): to=hf merges all of them"
        )
    with MegatronSource(path) as source:  # checks files, architecture and base
        about = source.description
    if about.head not in _TASKS:
        raise CheckpointError("Hugging Face has no model with a value per token: a critic cannot be exported")
    reader = AdapterReader(path, meta)
    table = choose_architecture(about.model, about.head, about.hf_config, cfg.architecture)
    tensors: dict[str, Tensor] = {}
    modules: dict[str, None] = {}
    for name, transform, theirs in _weights(table, about.model, reader.lora.targets):
        adapter = reader.adapter(name)
        assert adapter is not None
        for module, lora_B in zip(theirs, transform.split(adapter.lora_B, about.model), strict=True):
            tensors[f"{_PREFIX}{module}.lora_A.weight"] = adapter.lora_A
            tensors[f"{_PREFIX}{module}.lora_B.weight"] = lora_B
            modules[module.rpartition(".")[2]] = None
    if about.head == "reward":
        tensors[_PREFIX + _HEAD] = _head(reader, cfg.drop_head_bias)
    dtype = DTYPES.get(cfg.dtype)
    tensors = {name: cast(name, tensor, dtype or tensor.dtype).clone().contiguous() for name, tensor in tensors.items()}
    origin = str(about.provenance.get("converted_from", ""))
    named = cfg.base or str(below.get("conversion", {}).get("converted_from", origin))
    settings = _settings(reader.lora, about.head, list(modules), named.removeprefix("hf:"))
    size = sum(tensor.nbytes for tensor in tensors.values())
    report(f"adapters of rank {reader.lora.rank}, {len(tensors)} tensors: {size / 1e9:.3f} GB")
    if cfg.dry_run:
        return

    def write(partial: Path) -> None:
        save_file(tensors, partial / WEIGHTS_FILE, {"format": "pt"})
        (partial / CONFIG).write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")

    _write(Path(cfg.out), size, write)
    report(f"written: {cfg.out}")


def _head(reader: AdapterReader, drop_bias: bool) -> Tensor:
    weight = reader.read("head.weight")
    if weight.size(0) != 1:
        raise CheckpointError(f"the reward head has {weight.size(0)} outputs; only one output can be exported")
    bias = reader.read("head.bias") if "head.bias" in reader.specs else torch.zeros(1)
    if bool(bias.any()) and not drop_bias:
        raise CheckpointError(
            f"the reward head has the bias {bias.item():g}, but Hugging Face's heads have no bias; drop_head_bias=true "
            "drops it, which shifts all scores by that constant"
        )
    return weight


def _settings(lora: LoraConfig, head: str, modules: list[str], base: str) -> dict[str, Any]:
    return {
        "alpha_pattern": {},
        "auto_mapping": None,
        "base_model_name_or_path": base,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
        "layers_pattern": None,
        "layers_to_transform": None,
        "lora_alpha": int(lora.alpha) if lora.alpha.is_integer() else lora.alpha,
        "lora_bias": False,
        "lora_dropout": lora.dropout,
        "modules_to_save": ["score"] if head == "reward" else None,
        "peft_type": "LORA",
        "r": lora.rank,
        "rank_pattern": {},
        "revision": None,
        "target_modules": modules,
        "task_type": _TASKS[head],
        "use_dora": False,
        "use_rslora": False,
    }


def _import(cfg: ConvertConfig, report: Callable[[str], Any]) -> None:
    path, base = Path(cfg.path), Path(cfg.base)
    if not cfg.base:
        raise ConfigError("base is not set: name the checkpoint of this package that the adapters belong to")
    with MegatronSource(base) as source:
        about = source.description
        table = choose_architecture(about.model, about.head, about.hf_config, cfg.architecture)
        own_head: dict[str, Tensor] = {
            name: source.read(name) for name in ("head.weight", "head.bias") if name in source.specs
        }
    settings, tensors = _read(path)
    scale = _scale(path, settings)
    adapters: dict[str, Matrices] = {}
    for name, transform, theirs in _weights(table, about.model, list(HOLDERS)):
        parts = [_part(path, tensors, module, shape) for module, shape in theirs.items()]
        if any(part is not None for part in parts):
            lora_A, columns = side_by_side(parts, [shape[0] for shape in theirs.values()])
            adapters[name] = lora_A, transform.merge(columns, about.model)
    theirs_head = tensors.pop(_PREFIX + _HEAD, None)
    head = own_head if theirs_head is None else {"head.weight": theirs_head}
    wanted = (1, about.model.hidden_size)
    refuse(
        path,
        f"{_PREFIX + _HEAD}: the base's head has a bias, which would stay under this head"
        if theirs_head is not None and "head.bias" in own_head
        else "",
        f"{_PREFIX + _HEAD}: shape {tuple(theirs_head.shape)}, not {wanted}"
        if theirs_head is not None and tuple(theirs_head.shape) != wanted
        else "",
        list_names(f"tensors that are no adapters of {table.family}'s linear layers:", sorted(tensors)),
        "" if adapters else "there are no adapters of linear layers",
    )
    rank, targets, weights = of_one_rank(adapters, about.model)
    dropout = settings.get("lora_dropout") or 0.0
    lora = LoraConfig(rank=rank, alpha=scale * rank, dropout=float(dropout), targets=targets)
    weights |= head
    size = sum(tensor.nbytes for tensor in weights.values())
    report(f"adapters of rank {lora.rank}, {len(weights)} tensors: {size / 1e9:.3f} GB")
    if cfg.dry_run:
        return
    below = read_meta(base)
    model = replace(read_model(below, base), peft="lora", lora=lora)
    meta = {
        **{key: value for key, value in below.items() if key not in ("base", "optimizer_started")},
        "format": FORMAT,
        "head": "reward" if head else "lm",
        "head_outputs": head["head.weight"].size(0) if head else 1,
        "model": asdict(model),
        "has_optimizer": False,
        "base": {"path": str(base.resolve()), "digest": manifest.digest(base)},
        "conversion": {"converted_from": f"peft:{path}", "converted_by": f"nemo_advrm {__version__}"},
    }

    def write(partial: Path) -> None:
        (partial / WEIGHTS).mkdir()
        specs = {name: TensorSpec(tuple(tensor.shape), tensor.dtype) for name, tensor in weights.items()}
        writer = StackedWriter(partial / WEIGHTS, model.num_layers, specs)
        for name, tensor in weights.items():
            writer.write(name, tensor)
        writer.close()
        (partial / "meta.json").write_text(json.dumps(meta, indent=1) + "\n", encoding="utf-8")
        manifest.write(partial, manifest.describe(partial, manifest.names_in(partial)))

    _write(Path(cfg.out), size, write)
    report(f"written: {cfg.out}")


def _read(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Read adapter_config.json and the tensors. Raises CheckpointError for what is not plain LoRA."""
    settings = read_json_object(path / CONFIG)
    refuse(
        path / CONFIG,
        *(
            f"{key}={settings[key]!r} is not supported"
            for key, values in _ONLY.items()
            if key in settings and settings[key] not in values
        ),
    )
    try:
        return settings, load_file(path / WEIGHTS_FILE)
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path / WEIGHTS_FILE}: not a complete safetensors file ({error})") from None


def _part(path: Path, tensors: dict[str, Tensor], module: str, shape: tuple[int, ...]) -> Matrices | None:
    """Take the adapter of one Hugging Face weight out of ``tensors``; None without one."""
    lora_A, lora_B = (tensors.pop(f"{_PREFIX}{module}.lora_{matrix}.weight", None) for matrix in "AB")
    if lora_A is None and lora_B is None:
        return None
    if lora_A is None or lora_B is None:
        raise CheckpointError(f"{path / WEIGHTS_FILE}: {module} has lora_A or lora_B alone")
    outputs, inputs = shape
    fits = lora_A.ndim == lora_B.ndim == 2 and lora_A.size(0) == lora_B.size(1)
    if not fits or (lora_B.size(0), lora_A.size(1)) != (outputs, inputs):
        raise CheckpointError(
            f"{path / WEIGHTS_FILE}: {module} has lora_A {list(lora_A.shape)} and lora_B {list(lora_B.shape)}: "
            f"no adapter of a weight [{outputs}, {inputs}]"
        )
    return lora_A, lora_B


def _scale(path: Path, settings: dict[str, Any]) -> float:
    rank, alpha = settings.get("r"), settings.get("lora_alpha")
    positive = isinstance(alpha, int | float) and 0 < alpha < math.inf
    if type(rank) is not int or rank < 1 or not positive:
        raise CheckpointError(f"{path / CONFIG}: r={rank!r}, lora_alpha={alpha!r}: two positive numbers were expected")
    return float(str(alpha)) / (math.sqrt(rank) if settings.get("use_rslora") else rank)


def _weights(
    table: Architecture, model: ModelConfig, targets: list[str]
) -> Iterator[tuple[str, Transform, dict[str, tuple[int, ...]]]]:
    """Yield each weight with an adapter: its canonical name, transform, and Hugging Face modules with their shapes."""
    for layer in range(model.num_layers):
        for target in targets:
            inputs, outputs = adapted_sizes(model)[target]
            name = f"decoder.layers.{layer}.{HOLDERS[target]}.{target}.weight"
            found = table.parts(name, (outputs, inputs), model)
            assert found is not None, f"{table.family} has no {name}"
            yield name, found[0], {theirs.removesuffix(".weight"): shape for theirs, shape in found[1].items()}


def _write(out: Path, size: int, write: Callable[[Path], None]) -> None:
    directory = PartialDirectory(out, size)
    try:
        partial = directory.make()
        with failure_named(out):
            write(partial)
        atomic_replace(partial, out)
    finally:
        directory.remove()
