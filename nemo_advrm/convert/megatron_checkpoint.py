"""Reads and writes Megatron checkpoint directories ``{meta.json, weights/}`` without building a model."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import yaml
from torch import Tensor

from nemo_advrm.config.schema import ModelConfig, OptimConfig, ScheduleConfig
from nemo_advrm.convert.differences import check_layers, check_tensors, list_names
from nemo_advrm.convert.dist_weights import StackedReader, StackedWriter
from nemo_advrm.convert.partial import PartialDirectory
from nemo_advrm.convert.tensor_names import VOCABULARY_ROWS, canonical_shapes, layer_of, stacked_name
from nemo_advrm.convert.tensors import Description, TensorSpec
from nemo_advrm.convert.tokenizer_files import check_tokenizer, copy_tokenizer
from nemo_advrm.convert.transforms import pad_vocabulary, unpad_vocabulary
from nemo_advrm.data.reading import KEY, ReadingRule, rule_from_meta
from nemo_advrm.data.tokenizers import Tokenizer, build_tokenizer
from nemo_advrm.engine import manifest
from nemo_advrm.engine.checkpoint import FORMAT, WEIGHTS, read_meta
from nemo_advrm.engine.file_readers import reason
from nemo_advrm.engine.model import padded_vocab_size
from nemo_advrm.engine.weights_metadata import open_metadata
from nemo_advrm.errors import CheckpointError, ConfigError, DataError
from nemo_advrm.untrusted_files import read_json_object

TOKENIZER, HF_CONFIG = "tokenizer", "hf_config.json"
MODEL_FILE = Path("conf", "model", "imported.yaml")  # selected by hydra.searchpath=[DIR/conf] model=imported
# keys of meta.json that describe the checkpoint itself, not its provenance
_STRUCTURE = (
    "format",
    "head",
    "head_outputs",
    "vocab_size",
    "model",
    "tokenizer",
    "tokenizer_spec",
    KEY,
    "has_optimizer",
    "optimizer_started",
    "conversion",
)


class MegatronSource:
    """Reads a checkpoint written by training or conversion at any layout; ignores optimizer state.

    Raises CheckpointError when it is incomplete, a file size differs from its manifest (if it has one), or its tensors
    do not match its description.
    """

    def __init__(self, path: Path, tokenizer: Path | None = None) -> None:
        self.path = path
        meta = read_meta(path)
        problem = manifest.small_damage(path, except_for="meta.json") if (path / manifest.NAME).exists() else None
        if problem is not None:
            raise CheckpointError(f"{path}: could not be read ({problem})")
        model = read_model(meta, path)
        self._reader = StackedReader(path / WEIGHTS, open_metadata(path / WEIGHTS))
        self.tokenizer = tokenizer or _tokenizer_of(path, meta)
        rule = rule_from_meta(meta, path)
        own = _open_tokenizer(model, self.tokenizer, rule)
        if own is not None and tokenizer is None and meta.get("tokenizer") not in (None, own.fingerprint):
            raise CheckpointError(f"{path}: the tokenizer {own.name} has changed since training: set tokenizer=DIR")
        self._vocabulary = model.vocab_size or _vocabulary_of(path, meta, model, own)
        # padded rows are never used, so they are not converted
        self._specs = self._check(meta, model)
        self.description = Description(
            model=replace(model, vocab_size=self._vocabulary),
            head=meta["head"],
            tokenizer=self.tokenizer,
            hf_config=_hf_config_of(path, self.tokenizer),
            rule=rule,
            provenance={
                **meta.get("conversion", {}),
                **{k: v for k, v in meta.items() if k not in _STRUCTURE},
                "converted_from": f"megatron:{path}",
            },
        )

    def _check(self, meta: dict[str, Any], model: ModelConfig) -> dict[str, TensorSpec]:
        stored = self._reader.specs
        check_layers(self.path, model, stored)
        outputs = stored["head.weight"].shape[0] if "head.weight" in stored else 1
        padded = canonical_shapes(model, meta["head"], meta["vocab_size"], outputs)
        check_tensors(self.path, stored, padded)
        unpadded = canonical_shapes(model, meta["head"], self._vocabulary, outputs)
        return {name: TensorSpec(shape, stored[name].dtype) for name, shape in unpadded.items()}

    def tensors(self) -> dict[str, TensorSpec]:
        return self._specs

    def read(self, name: str) -> Tensor:
        try:
            tensor = self._reader.read(name)
        except Exception as error:  # torch raises many types for a damaged file
            raise CheckpointError(f"{self.path}: {name} could not be read ({reason(error)})") from None
        return unpad_vocabulary(tensor, self._vocabulary) if name in VOCABULARY_ROWS else tensor

    def native(self, name: str) -> str:
        return _native(name)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Do nothing: files are open only while a tensor is read."""


class MegatronSink:
    """Writes a checkpoint that :mod:`nemo_advrm.engine.checkpoint` opens at any layout.

    It also writes ``tokenizer/`` and ``hf_config.json``, which use and later export of the checkpoint need.
    """

    def __init__(self, path: Path, description: Description, specs: dict[str, TensorSpec]) -> None:
        self.path = path
        self._description = description
        self._model = replace(description.model)
        self._rows = padded_vocab_size(self._model, 0)
        outputs = specs["head.weight"].shape[0] if "head.weight" in specs else 1
        shapes = canonical_shapes(self._model, description.head, self._rows, outputs)
        assert shapes.keys() == specs.keys(), shapes.keys() ^ specs.keys()
        self._specs = {name: TensorSpec(shape, specs[name].dtype) for name, shape in shapes.items()}
        self._left = set(self._specs)
        self.nbytes = sum(spec.nbytes for spec in self._specs.values())
        self._outputs = outputs
        if description.tokenizer is not None:
            check_tokenizer(description.tokenizer)
        self._directory = PartialDirectory(path, self.nbytes)
        self._writer: StackedWriter | None = None

    def native(self, name: str) -> str:
        return _native(name)

    def write(self, name: str, tensor: Tensor) -> None:
        assert self._writer is not None
        if name not in self._left:
            raise CheckpointError(f"{self.path}: {name} is unexpected or was written twice")
        self._left.remove(name)
        self._writer.write(name, pad_vocabulary(tensor, self._rows) if name in VOCABULARY_ROWS else tensor)

    def close(self) -> None:
        if self._left:
            raise CheckpointError(f"{self.path}: {list_names('tensors that were not written:', sorted(self._left))}")
        assert self._writer is not None
        self._writer.close()
        self._writer = None
        partial, about = self._directory.partial, self._description
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
        self._directory.complete()

    def __enter__(self) -> Self:
        weights = self._directory.make() / WEIGHTS
        weights.mkdir()
        self._writer = StackedWriter(weights, self._model.num_layers, self._specs)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if kind is None and self._writer is not None:
                self.close()
        finally:
            self._directory.remove()  # does nothing after the rename


def _write_model_file(model: ModelConfig, path: Path) -> None:
    """Write the architecture as a file of the configuration group ``model``, which commands can select."""
    default = ModelConfig()
    settings = {k: v for k, v in asdict(model).items() if k != "optim" and v != getattr(default, k)}
    path.parent.mkdir(parents=True)
    path.write_text(yaml.safe_dump(settings, sort_keys=False), encoding="utf-8")


def read_model(meta: dict[str, Any], path: Path) -> ModelConfig:
    """Return the ModelConfig in a checkpoint's meta.json; missing keys get their defaults."""
    settings = dict(meta["model"])
    optim = dict(settings.pop("optim", {}))
    try:
        schedule = ScheduleConfig(**optim.pop("sched", {}))
        return ModelConfig(**settings, optim=OptimConfig(**optim, sched=schedule))
    except TypeError as error:
        raise CheckpointError(f"{path}: meta.json describes a model unknown to this version ({error})") from None


def _native(name: str) -> str:
    layer = layer_of(name)
    return f"model.{stacked_name(name)}" + (f"[{layer}]" if layer is not None else "")


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
