"""Reads and writes Megatron checkpoint directories ``{meta.json, weights/}`` without building a model."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import yaml
from torch import Tensor

from nemo_advrm.config.schema import ConvertConfig, ModelConfig, OptimConfig, ScheduleConfig
from nemo_advrm.convert.adapters import AdapterReader, MergedReader
from nemo_advrm.convert.differences import check_tensors, head_outputs
from nemo_advrm.convert.dist_weights import Reader, StackedReader, StackedSource, StackedWriter, stored_place
from nemo_advrm.convert.tensor_names import TensorSpec, canonical_shapes
from nemo_advrm.convert.tensors import Description, TensorSink, TensorSource
from nemo_advrm.convert.tokenizer_files import check_tokenizer, copy_tokenizer
from nemo_advrm.data.reading import KEY, ReadingRule, rule_from_meta
from nemo_advrm.data.tokenizers import Tokenizer, build_tokenizer
from nemo_advrm.engine import manifest
from nemo_advrm.engine.adapter_base import chain
from nemo_advrm.engine.checkpoint_meta import FORMAT, WEIGHTS, check_head, read_meta
from nemo_advrm.engine.description import FIELDS
from nemo_advrm.engine.dimensions import padded_vocab_size
from nemo_advrm.engine.weights_metadata import open_metadata
from nemo_advrm.errors import CheckpointError, ConfigError, DataError
from nemo_advrm.untrusted_files import read_json_object

TOKENIZER, HF_CONFIG = "tokenizer", "hf_config.json"
MODEL_FILE = Path("conf", "model", "imported.yaml")  # selected by hydra.searchpath=[DIR/conf] model=imported


class MegatronSource(StackedSource):
    """Reads a checkpoint written by training or conversion at any layout; ignores optimizer state.

    Adapters are merged into the checkpoint below them.

    Args:
        head: of a checkpoint with several members on one trunk, the one to read, from 1; 0: there is one.

    Raises CheckpointError when it is incomplete, a file size differs from its manifest (if it has one), or its tensors
    do not match its description; and when it has other members than ``head`` says.
    """

    def __init__(self, path: Path, tokenizer: Path | None = None, head: int = 0) -> None:
        self.path = path
        meta = read_meta(path)
        stack = chain(path, meta, manifest.digest)
        for place, _ in stack:
            check_files(place)
        self._member = _member(path, meta, head)
        model, kind = read_model(meta, path), meta["head"]
        *adapters, (whole, below) = stack
        self._reader: Reader = StackedReader(whole / WEIGHTS, open_metadata(whole / WEIGHTS))
        for place, described in reversed(adapters):
            self._reader = MergedReader(self._reader, AdapterReader(place, described), below["head"] == kind)
            below = described
        named = tokenizer or _tokenizer_of(path, meta)
        rule = rule_from_meta(meta, path)
        own = _open_tokenizer(model, named, rule)
        if own is not None and tokenizer is None and meta.get("tokenizer") not in (None, own.fingerprint):
            raise CheckpointError(f"{path}: the tokenizer {own.name} has changed since training: set tokenizer=DIR")
        vocabulary = model.vocab_size or _vocabulary_of(path, meta, model, own)
        check_tensors(path, self._reader.specs, model, kind, meta["vocab_size"])
        model = replace(model, vocab_size=vocabulary)
        outputs = head_outputs(self._reader.specs) if self._member is None else 1
        self.specs = self._specs(model, kind, outputs)
        self.description = Description(
            model=model,
            head=kind,
            tokenizer=named,
            hf_config=_hf_config_of(path, named),
            rule=rule,
            provenance={
                **meta.get("conversion", {}),
                **{k: v for k, v in meta.items() if k not in (*FIELDS, KEY)},
                "converted_from": f"megatron:{path}{f'?head={head}' if head else ''}",
                **({"base_model": str(stack[1][0])} if adapters else {}),
            },
        )

    def read(self, name: str) -> Tensor:
        tensor = super().read(name)
        return tensor[self._member] if self._member is not None and name.startswith("head.") else tensor


class MegatronSink(TensorSink):
    """Writes a checkpoint that :mod:`nemo_advrm.engine.checkpoint` opens at any layout.

    It also writes ``tokenizer/`` and ``hf_config.json``, which use and later export of the checkpoint need.
    """

    def __init__(self, path: Path, source: TensorSource, specs: dict[str, TensorSpec], _: ConvertConfig) -> None:
        self._description = about = source.description
        self._model = replace(about.model)
        self._outputs = head_outputs(specs)
        rows = padded_vocab_size(self._model, 0)
        shapes = canonical_shapes(self._model, about.head, rows, self._outputs)
        assert shapes.keys() == specs.keys(), shapes.keys() ^ specs.keys()
        self._padded = {name: TensorSpec(shape, specs[name].dtype) for name, shape in shapes.items()}
        if about.tokenizer is not None:
            check_tokenizer(about.tokenizer)
        super().__init__(path, specs, rows, sum(spec.nbytes for spec in self._padded.values()))

    def native(self, name: str) -> str:
        return stored_place(name)

    def _open(self, partial: Path) -> None:
        (partial / WEIGHTS).mkdir()
        self._writer = StackedWriter(partial / WEIGHTS, self._model.num_layers, self._padded)

    def _put(self, name: str, tensor: Tensor) -> None:
        self._writer.write(name, tensor)

    def _complete(self, partial: Path) -> Path:
        self._writer.close()
        about = self._description
        tokenizer = {}
        if about.tokenizer is not None:
            copy_tokenizer(about.tokenizer, partial / TOKENIZER)
            self._model.tokenizer = f"hf:{self.path.resolve() / TOKENIZER}"
            fingerprint = build_tokenizer(f"hf:{partial / TOKENIZER}", about.rule).fingerprint
            tokenizer = {"tokenizer": fingerprint, "tokenizer_spec": self._model.tokenizer}
        elif self._model.tokenizer and not self._model.tokenizer.startswith("hf:") and not about.hf_config:
            own = build_tokenizer(self._model.tokenizer)
            tokenizer = {"tokenizer": own.fingerprint, "tokenizer_spec": self._model.tokenizer}
        _write_model_file(self._model, partial / MODEL_FILE)
        if about.hf_config:
            (partial / HF_CONFIG).write_text(json.dumps(about.hf_config, indent=2) + "\n", encoding="utf-8")
        meta = {
            "format": FORMAT,
            "head": about.head,
            "head_outputs": self._outputs,
            "vocab_size": self._rows,
            "model": asdict(self._model),
            "has_optimizer": False,
            **tokenizer,
            KEY: about.rule.meta(),
            "conversion": about.provenance,
        }
        (partial / "meta.json").write_text(json.dumps(meta, indent=1) + "\n", encoding="utf-8")
        # users may edit the tokenizer and the model file, so the manifest leaves them out
        names = ["meta.json", *(f"{WEIGHTS}/{name}" for name in manifest.names_in(partial / WEIGHTS))]
        manifest.write(partial, manifest.describe(partial, names))
        return partial


def _member(path: Path, meta: dict[str, Any], head: int) -> slice | None:
    """Return the row of the head that is one of several members; None for a checkpoint of one model."""
    heads = check_head(meta, head, str(path), f"name the one to convert, as in '{path}?head=1'")
    return slice(head - 1, head) if heads > 1 else None


def _write_model_file(model: ModelConfig, path: Path) -> None:
    """Write the architecture as a file of the configuration group ``model``, which commands can select."""
    default = ModelConfig()
    settings = {k: v for k, v in asdict(model).items() if k != "optim" and v != getattr(default, k)}
    path.parent.mkdir(parents=True)
    path.write_text(yaml.safe_dump(settings, sort_keys=False), encoding="utf-8")


def check_files(path: Path) -> None:
    """Raise CheckpointError if a small file of a checkpoint is not what its manifest lists."""
    problem = manifest.small_damage(path, except_for="meta.json") if (path / manifest.NAME).exists() else None
    if problem is not None:
        raise CheckpointError(f"{path}: could not be read ({problem})")


def read_model(meta: dict[str, Any], path: Path) -> ModelConfig:
    """Return the ModelConfig in a checkpoint's meta.json; missing keys get their defaults."""
    settings = {key: value for key, value in meta["model"].items() if key not in ("peft", "lora")}
    try:
        optim = dict(settings.pop("optim", {}))
        schedule = ScheduleConfig(**optim.pop("sched", {}))
        return ModelConfig(**settings, optim=OptimConfig(**optim, sched=schedule))
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"{path}: meta.json describes a model unknown to this version ({error})") from None


def _tokenizer_of(path: Path, meta: dict[str, Any]) -> Path | None:
    """Return the tokenizer directory of the checkpoint, or the one used in training; None without either."""
    if (path / TOKENIZER).is_dir():
        return path / TOKENIZER
    spec = str(meta.get("tokenizer_spec") or meta["model"].get("tokenizer", ""))
    named = Path(spec.removeprefix("hf:"))
    return named if spec.startswith("hf:") and spec != "hf:" and named.exists() else None


def _open_tokenizer(model: ModelConfig, tokenizer: Path | None, rule: ReadingRule) -> Tokenizer | None:
    """Open the tokenizer of the weights; None when it cannot be opened."""
    try:
        return build_tokenizer(f"hf:{tokenizer}" if tokenizer else model.tokenizer, rule)
    except (ConfigError, DataError):
        return None


def _vocabulary_of(path: Path, meta: dict[str, Any], model: ModelConfig, tokenizer: Tokenizer | None) -> int:
    """Return the unpadded vocabulary size: that of the tokenizer, or all stored rows without one.

    Raises CheckpointError when the number of stored rows is neither the tokenizer's size nor that size padded.
    """
    stored = int(meta["vocab_size"])
    if tokenizer is None:
        return stored
    padded = padded_vocab_size(model, tokenizer.vocab_size)
    if stored not in (padded, tokenizer.vocab_size):
        raise CheckpointError(
            f"{path}: the tokenizer {tokenizer.name} has {tokenizer.vocab_size} entries, padded {padded}, but the "
            f"weights have {stored} rows: set tokenizer=DIR to the tokenizer used in training"
        )
    return tokenizer.vocab_size


def _hf_config_of(path: Path, tokenizer: Path | None) -> dict[str, Any]:
    """Read hf_config.json of the checkpoint, or of the imported checkpoint from which its tokenizer comes."""
    for directory in (path, *([tokenizer.parent] if tokenizer else [])):
        file = directory / HF_CONFIG
        if file.exists():
            return read_json_object(file)
    return {}
