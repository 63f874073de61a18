"""Reads ``.nemo`` files of NeMo-Aligner (reward models, critics, actors) and writes reward models and actors."""

from __future__ import annotations

import contextlib
import tarfile
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO, Any

import torch
import yaml
from torch import Tensor

from nemo_advrm.config.schema import ConvertConfig, ModelConfig
from nemo_advrm.convert.differences import check_tensors, head_outputs
from nemo_advrm.convert.dist_weights import PREFIX, StackedReader, StackedSource, StackedWriter, stored_place
from nemo_advrm.convert.nemo_archive import NemoArchive
from nemo_advrm.convert.nemo_config import UnresolvedConfig, read_model, write_config
from nemo_advrm.convert.nemo_tokenizer_files import TEMPORARY, pack_tokenizer, unpack_tokenizer
from nemo_advrm.convert.tensor_names import TensorSpec, canonical_shapes
from nemo_advrm.convert.tensors import Description, TensorSink, TensorSource
from nemo_advrm.data.tokenizers import Tokenizer, build_tokenizer, check_vocabulary
from nemo_advrm.engine.dimensions import Head, padded_vocab_size
from nemo_advrm.engine.weights_metadata import check_positions, read_metadata
from nemo_advrm.errors import CheckpointError, DataError, list_names
from nemo_advrm.untrusted_files import decode_json, parse_yaml

CONFIG, WEIGHTS = "model_config.yaml", "model_weights"
# canonical name -> name in NeMo-Aligner
_RENAMED = {"head.weight": "rm_head.weight", "head.bias": "rm_head.bias"}
# reward models and critics of NeMo-Aligner contain an unused language model output layer
_UNUSED = "output_layer.weight"
_ARCHIVE = "archive"
_MAX_CONFIG_BYTES = 16 << 20


class NemoSource(StackedSource):
    """Reads a reward model, critic or actor of NeMo-Aligner from the archive, one tensor at a time.

    No pickled code runs: the metadata is read without its classes, tensors are read with ``weights_only``, and
    ``common.pt`` is not read. Reward standardisation and the merging of several attributes into one reward are applied
    to the weights of the head.

    Args:
        tokenizer: directory or SentencePiece file to use instead of the archive's tokenizer.

    Raises:
        CheckpointError: the file is incomplete, of an unsupported kind, or its tensors do not match its configuration.
    """

    _renamed = _RENAMED

    def __init__(self, path: Path, tokenizer: Path | None = None) -> None:
        self.path = path
        with contextlib.ExitStack() as opened:
            archive = opened.enter_context(NemoArchive(path))
            config = UnresolvedConfig(read_config(archive), f"{path}: {CONFIG}")
            model, head = read_model(config, str(path))
            self._head = _head_transform(config, head, str(path)) if head != "lm" else None
            attributes = _attributes(config) if head != "lm" else None
            self._reader = archived_weights(archive)
            directory = Path(opened.enter_context(tempfile.TemporaryDirectory(prefix=TEMPORARY)))
            unpack_tokenizer(archive, config, directory, tokenizer)
            try:
                own = build_tokenizer(f"hf:{directory}")
            except DataError as error:
                raise CheckpointError(f"{path}: its tokenizer cannot be opened: {error}") from None
            model = replace(model, vocab_size=own.vocab_size)
            self._check(model, head, own, attributes)
            merged = self._head is not None and self._head.merge is not None
            self.specs = self._specs(model, head, 1 if merged else head_outputs(self._reader.specs))
            self._opened = opened.pop_all()
        self.description = Description(
            model=model,
            head=head,
            tokenizer=directory,
            provenance={
                "converted_from": f"nemo:{path}",
                "nemo_version": str(config.get("nemo_version")),
                "target": str(config.get("target")),
            },
        )

    def _check(self, model: ModelConfig, head: Head, tokenizer: Tokenizer, attributes: int | None) -> None:
        """Raise CheckpointError when configuration, tensors and tokenizer do not match."""
        stored = dict(self._reader.specs)
        if head != "lm":
            stored.pop(_UNUSED, None)
        embedding = stored.get("embedding.word_embeddings.weight")
        rows = embedding.shape[0] if embedding else 0
        outputs = head_outputs(stored)
        if attributes not in (None, outputs):
            raise CheckpointError(
                f"{self.path}: regression.num_attributes={attributes}, but the head has {outputs} outputs"
            )
        check_tensors(self.path, stored, model, head, rows)
        check_vocabulary(tokenizer, rows, str(self.path))

    def read(self, name: str) -> Tensor:
        tensor = super().read(name)
        return self._head.apply(name, tensor) if name in _RENAMED and self._head is not None else tensor

    def __exit__(self, *_: object) -> None:
        self._opened.close()


@dataclass(frozen=True)
class _HeadTransform:
    """Applies NeMo-Aligner's operations on rewards, ``r @ merge`` and ``(r - mean) / std``, to the head's weights."""

    merge: list[float] | None
    mean: float
    std: float

    def apply(self, name: str, tensor: Tensor) -> Tensor:
        dtype, tensor = tensor.dtype, tensor.double()
        if self.merge is not None:
            tensor = torch.tensor(self.merge, dtype=torch.float64)[None] @ tensor.reshape(len(self.merge), -1)
            tensor = tensor.reshape(-1) if name == "head.bias" else tensor
        if name == "head.bias":
            tensor = tensor - self.mean
        return (tensor / self.std).to(dtype)


def _attributes(config: Mapping[str, Any]) -> int | None:
    """Return the number of outputs in the configuration; None when it is not set."""
    value = (config.get("regression") or {}).get("num_attributes")
    return None if value is None else int(value)


def _head_transform(config: Mapping[str, Any], head: Head, source: str) -> _HeadTransform | None:
    regression = config.get("regression") or {}
    standard = config.get("reward_standardization") or {}
    try:
        named = _attributes(config)
        outputs = 1 if named is None else named
        if outputs < 1:
            raise ValueError("num_attributes must be at least 1")
        merge = None
        if regression.get("merge_attributes") or head == "value":  # critics always merge attributes
            merge = [float(w) for w in regression.get("attribute_weights") or [1 / outputs] * outputs]
            if len(merge) != outputs:
                raise ValueError("attribute_weights must have num_attributes values")
        enabled = bool(standard.get("enable"))
        mean, std = (float(standard["mean"]), float(standard["std"])) if enabled else (0.0, 1.0)
        if std == 0:
            raise ValueError("std must not be 0")
    except (TypeError, ValueError, KeyError, AttributeError) as error:
        raise CheckpointError(f"{source}: regression or reward_standardization is damaged: {error}") from None
    return _HeadTransform(merge, mean, std) if merge is not None or enabled else None


def read_config(archive: NemoArchive) -> dict[str, Any]:
    """Read ``model_config.yaml``. Raises CheckpointError when it is missing or not a mapping."""
    if CONFIG not in archive.names:
        raise CheckpointError(f"{archive.path}: not a .nemo file: the archive has no {CONFIG}")
    return parse_yaml(archive.read(CONFIG, _MAX_CONFIG_BYTES), f"{archive.path}: {CONFIG}")


class _Members:
    """The archive with the file system interface that torch's reader uses."""

    def __init__(self, archive: NemoArchive) -> None:
        self._archive = archive

    def concat_path(self, path: Any, suffix: str) -> str:
        return f"{WEIGHTS}/{suffix}"

    @contextlib.contextmanager
    def create_stream(self, path: str, mode: str) -> Iterator[IO[bytes]]:
        yield self._archive.open(path)


class _ArchivedReader(StackedReader):
    def __init__(self, archive: NemoArchive) -> None:
        names = {PREFIX + theirs: PREFIX + ours for ours, theirs in _RENAMED.items()}
        metadata = read_metadata(archive.read(f"{WEIGHTS}/.metadata"), str(archive.path), names)
        check_positions(metadata, lambda name: archive.size(f"{WEIGHTS}/{name}"), str(archive.path))
        super().__init__(Path(WEIGHTS), metadata, str(archive.path))
        self._reader.fs = _Members(archive)  # type: ignore[assignment]


def archived_weights(archive: NemoArchive) -> StackedReader:
    """Return a reader of the canonical tensors in ``model_weights/`` that unpickles nothing.

    Raises CheckpointError for another weight format, damaged metadata, and tensors that are not floating point.
    """
    path = archive.path
    if f"{WEIGHTS}/.metadata" not in archive.names:
        if any(name.endswith(".zarray") for name in archive.names):
            raise CheckpointError(f"{path}: its weights are in the zarr format: load and save it with NeMo 2.x first")
        if any(name.endswith("model_weights.ckpt") for name in archive.names):
            raise CheckpointError(f"{path}: its weights are a pickle (model_weights.ckpt), which is not loaded")
        raise CheckpointError(f"{path}: not a complete .nemo file: the archive has no {WEIGHTS}/.metadata")
    try:
        backend = decode_json(archive.read(f"{WEIGHTS}/metadata.json", _MAX_CONFIG_BYTES))["sharded_backend"]
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{path}: {WEIGHTS}/metadata.json is damaged: {error}") from None
    if backend != "torch_dist":
        raise CheckpointError(f"{path}: its weights are in the format {backend}: save it as torch_dist first")
    reader = _ArchivedReader(archive)
    bad = [name for name, spec in reader.specs.items() if not spec.dtype.is_floating_point]
    if bad:
        raise CheckpointError(f"{path}: {list_names('tensors that are not floating point:', bad)}")
    return reader


class NemoSink(TensorSink):
    """Writes a ``.nemo`` file that NeMo-Aligner 0.7.0 restores at any layout, one tensor at a time."""

    _writer: StackedWriter
    _tar: tarfile.TarFile | None = None

    def __init__(self, path: Path, source: TensorSource, specs: dict[str, TensorSpec], _: ConvertConfig) -> None:
        about = source.description
        model, head = about.model, about.head
        if path.suffix != ".nemo":
            raise CheckpointError(f"{path}: the name of a .nemo file must end in .nemo")
        if about.tokenizer is None:
            raise CheckpointError(f"{path}: a .nemo file needs a tokenizer that NeMo supports: set tokenizer=DIR")
        outputs = head_outputs(specs)
        tokenizer, self._files, append_eod = pack_tokenizer(about.tokenizer)
        self._config = write_config(model, head, outputs, tokenizer)
        self._config["data"] = {"data_impl": "jsonl", "append_eod": append_eod and head == "reward"}
        self._layers = model.num_layers
        rows = padded_vocab_size(model, 0)
        # NeMo-Aligner's reward models have a head bias and an unused output layer
        shapes = canonical_shapes(replace(model, head_bias=head == "reward"), head, rows, outputs)
        if head == "reward":
            shapes[_UNUSED] = (rows, model.hidden_size)
        dtypes = dict.fromkeys(shapes, next(iter(specs.values())).dtype)
        dtypes |= {name: spec.dtype for name, spec in specs.items()}
        stored = {name: TensorSpec(shape, dtypes[name]) for name, shape in shapes.items()}
        self._added = {name: stored[name] for name in stored.keys() - specs.keys()}
        self._stored = {_RENAMED.get(name, name): spec for name, spec in stored.items()}
        super().__init__(path, specs, rows, sum(spec.nbytes for spec in stored.values()))

    def native(self, name: str) -> str:
        return stored_place(_RENAMED.get(name, name))

    def _open(self, partial: Path) -> None:
        self._weights = partial / WEIGHTS
        self._weights.mkdir()
        self._writer = StackedWriter(self._weights, self._layers, self._stored, sync=False)
        self._tar = tarfile.open(partial / _ARCHIVE, "w:")  # noqa: SIM115 (closed by _close())

    def _put(self, name: str, tensor: Tensor) -> None:
        self._writer.write(_RENAMED.get(name, name), tensor)
        self._pack()

    def _pack(self) -> None:
        """Move the files that the writer has finished into the archive."""
        assert self._tar is not None
        for file in sorted(self._weights.iterdir()):
            self._tar.add(file, arcname=f"./{WEIGHTS}/{file.name}")
            file.unlink()

    def _complete(self, partial: Path) -> Path:
        assert self._tar is not None
        for name in sorted(self._added):
            self._put(name, torch.zeros(self._added[name].shape, dtype=self._added[name].dtype))
        self._writer.close()
        self._pack()
        config = partial / CONFIG
        config.write_text(yaml.safe_dump(self._config, sort_keys=False, allow_unicode=True), encoding="utf-8")
        for member, file in {CONFIG: config, **self._files}.items():
            self._tar.add(file, arcname=f"./{member}")
        self._tar.close()
        return partial / _ARCHIVE

    def _close(self) -> None:
        if self._tar is not None:
            self._tar.close()
