"""Reads ``.nemo`` files of NeMo-Aligner (reward models, critics, actors) and writes reward models and actors."""

from __future__ import annotations

import contextlib
import tarfile
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Self

import torch
import yaml
from torch import Tensor

from nemo_advrm.convert.differences import check_layers, check_tensors, list_names
from nemo_advrm.convert.dist_weights import PREFIX, StackedReader, StackedWriter
from nemo_advrm.convert.nemo_archive import NemoArchive
from nemo_advrm.convert.nemo_config import UnresolvedConfig, read_model, write_config
from nemo_advrm.convert.nemo_tokenizer_files import TEMPORARY, pack_tokenizer, unpack_tokenizer
from nemo_advrm.convert.partial import PartialDirectory
from nemo_advrm.convert.tensor_names import VOCABULARY_ROWS, Shape, canonical_shapes, layer_of, stacked_name
from nemo_advrm.convert.tensors import Description, TensorSpec
from nemo_advrm.convert.transforms import pad_vocabulary, unpad_vocabulary
from nemo_advrm.data.tokenizers import Tokenizer, build_tokenizer
from nemo_advrm.data.vocabulary import check_vocabulary
from nemo_advrm.engine.file_readers import reason
from nemo_advrm.engine.gpt import Head
from nemo_advrm.engine.model import padded_vocab_size
from nemo_advrm.engine.weights_metadata import check_positions, read_metadata
from nemo_advrm.errors import CheckpointError, DataError
from nemo_advrm.files import atomic_replace
from nemo_advrm.untrusted_files import decode_json, parse_yaml

CONFIG, WEIGHTS = "model_config.yaml", "model_weights"
# canonical name -> name in NeMo-Aligner
_RENAMED = {"head.weight": "rm_head.weight", "head.bias": "rm_head.bias"}
# reward models and critics of NeMo-Aligner contain an unused language model output layer
_UNUSED = "output_layer.weight"
_ARCHIVE = "archive"
_MAX_CONFIG_BYTES = 16 << 20


class NemoSource:
    """Reads a reward model, critic or actor of NeMo-Aligner from the archive, one tensor at a time.

    No pickled code runs: the metadata is read without its classes, tensors are read with ``weights_only``, and
    ``common.pt`` is not read. Reward standardisation and the merging of several attributes into one reward are applied
    to the weights of the head.

    Args:
        tokenizer: directory or SentencePiece file to use instead of the archive's tokenizer.

    Raises:
        CheckpointError: the file is incomplete, of an unsupported kind, or its tensors do not match its configuration.
    """

    def __init__(self, path: Path, tokenizer: Path | None = None) -> None:
        self.path = path
        with contextlib.ExitStack() as opened:
            self._archive = opened.enter_context(NemoArchive(path))
            config = UnresolvedConfig(read_config(self._archive), f"{path}: {CONFIG}")
            model, head = read_model(config, str(path))
            self._head = _head_transform(config, head, str(path)) if head != "lm" else None
            self._attributes = _attributes(config) if head != "lm" else None
            self._reader = archived_weights(self._archive)
            self._tokenizer = opened.enter_context(tempfile.TemporaryDirectory(prefix=TEMPORARY))
            directory = Path(self._tokenizer)
            unpack_tokenizer(self._archive, config, directory, tokenizer)
            try:
                own = build_tokenizer(f"hf:{directory}")
            except DataError as error:
                raise CheckpointError(f"{path}: its tokenizer cannot be opened: {error}") from None
            self._specs = self._check(replace(model, vocab_size=own.vocab_size), head, own)
            self._opened = opened.pop_all()
        self.description = Description(
            model=replace(model, vocab_size=own.vocab_size),
            head=head,
            tokenizer=directory,
            provenance={
                "converted_from": f"nemo:{path}",
                "nemo_version": str(config.get("nemo_version")),
                "target": str(config.get("target")),
            },
        )

    def _check(self, model: Any, head: Any, tokenizer: Tokenizer) -> dict[str, TensorSpec]:
        stored = dict(self._reader.specs)
        if head != "lm":
            stored.pop(_UNUSED, None)
        rows = (
            stored["embedding.word_embeddings.weight"].shape[0] if "embedding.word_embeddings.weight" in stored else 0
        )
        outputs = stored["head.weight"].shape[0] if "head.weight" in stored else 1
        check_layers(self.path, model, stored)
        if self._attributes not in (None, outputs):
            raise CheckpointError(
                f"{self.path}: regression.num_attributes={self._attributes}, but the head has {outputs} outputs"
            )
        expected = canonical_shapes(model, head, rows, outputs)
        check_complete(self.path, stored, expected)
        check_vocabulary(tokenizer, rows, str(self.path))
        final = 1 if self._head is not None and self._head.merges else outputs
        shapes = canonical_shapes(model, head, tokenizer.vocab_size, final)
        return {name: TensorSpec(shape, stored[name].dtype) for name, shape in shapes.items()}

    def tensors(self) -> dict[str, TensorSpec]:
        return self._specs

    def read(self, name: str) -> Tensor:
        try:
            tensor = self._reader.read(name)
        except Exception as error:  # torch raises many types for a damaged file
            raise CheckpointError(f"{self.path}: {name} could not be read ({reason(error)})") from None
        if name in _RENAMED and self._head is not None:
            return self._head.apply(name, tensor)
        return unpad_vocabulary(tensor, self._specs[name].shape[0]) if name in VOCABULARY_ROWS else tensor

    def native(self, name: str) -> str:
        return _native(name)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._opened.close()


def check_complete(path: Path, stored: dict[str, TensorSpec], expected: dict[str, Shape]) -> None:
    """Raise CheckpointError when the tensors differ from those expected, or the file is too small to contain them."""
    check_tensors(path, stored, expected)
    if sum(spec.nbytes for spec in stored.values()) > path.stat().st_size:
        raise CheckpointError(f"{path}: the file is smaller than the tensors it describes")


class _HeadTransform:
    """Applies NeMo-Aligner's operations on rewards, ``r @ weights`` and ``(r - mean) / std``, to the head's weights."""

    def __init__(self, merge: list[float] | None, mean: float, std: float) -> None:
        self.merges = merge is not None
        self._merge, self._mean, self._std = merge, mean, std

    def apply(self, name: str, tensor: Tensor) -> Tensor:
        dtype, tensor = tensor.dtype, tensor.double()
        if self._merge is not None:
            tensor = torch.tensor(self._merge, dtype=torch.float64)[None] @ tensor.reshape(len(self._merge), -1)
            tensor = tensor.reshape(-1) if name == "head.bias" else tensor
        if name == "head.bias":
            tensor = tensor - self._mean
        return (tensor / self._std).to(dtype)


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


class NemoSink:
    """Writes a ``.nemo`` file that NeMo-Aligner 0.7.0 restores at any layout, one tensor at a time."""

    def __init__(self, path: Path, description: Description, specs: dict[str, TensorSpec]) -> None:
        self.path = path
        if path.suffix != ".nemo":
            raise CheckpointError(f"{path}: the name of a .nemo file must end in .nemo")
        if description.tokenizer is None:
            raise CheckpointError(f"{path}: a .nemo file needs a tokenizer that NeMo supports: set tokenizer=DIR")
        model, head = description.model, description.head
        outputs = specs["head.weight"].shape[0] if "head.weight" in specs else 1
        tokenizer, self._files, append_eod = pack_tokenizer(description.tokenizer)
        self._config = write_config(model, head, outputs, tokenizer)
        self._config["data"] = {"data_impl": "jsonl", "append_eod": append_eod and head == "reward"}
        self._rows = padded_vocab_size(model, 0)
        self._layers = model.num_layers
        self._left = set(specs)
        # NeMo-Aligner's reward models have a head bias and an unused output layer
        shapes = canonical_shapes(replace(model, head_bias=head == "reward"), head, self._rows, outputs)
        dtype = next(iter(specs.values())).dtype
        dtypes = {name: spec.dtype for name, spec in specs.items()}
        self._specs = {name: TensorSpec(shape, dtypes.get(name, dtype)) for name, shape in shapes.items()}
        if head == "reward":
            self._specs[_UNUSED] = TensorSpec((self._rows, model.hidden_size), dtype)
        self.nbytes = sum(spec.nbytes for spec in self._specs.values())
        self._directory = PartialDirectory(path, self.nbytes)
        self._received: set[str] = set()
        self._writer: StackedWriter | None = None
        self._tar: tarfile.TarFile | None = None

    def native(self, name: str) -> str:
        return _native(name)

    def write(self, name: str, tensor: Tensor) -> None:
        if name not in self._left:
            raise CheckpointError(f"{self.path}: {name} is unexpected or was written twice")
        self._left.remove(name)
        self._put(name, pad_vocabulary(tensor, self._rows) if name in VOCABULARY_ROWS else tensor)

    def _put(self, name: str, tensor: Tensor) -> None:
        assert self._writer is not None
        self._writer.write(_RENAMED.get(name, name), tensor)
        self._received.add(name)
        self._pack()

    def _pack(self) -> None:
        """Move the files that the writer has finished into the archive."""
        assert self._tar is not None
        for file in sorted(self._weights.iterdir()):
            self._tar.add(file, arcname=f"./{WEIGHTS}/{file.name}")
            file.unlink()

    def close(self) -> None:
        if self._left:
            raise CheckpointError(f"{self.path}: {list_names('tensors that were not written:', sorted(self._left))}")
        assert self._writer is not None and self._tar is not None
        for name in [name for name in self._specs if name not in self._received]:
            self._put(name, torch.zeros(self._specs[name].shape, dtype=self._specs[name].dtype))
        self._writer.close()
        self._writer = None
        self._pack()
        config = self._directory.partial / CONFIG
        config.write_text(yaml.safe_dump(self._config, sort_keys=False, allow_unicode=True), encoding="utf-8")
        for member, file in {CONFIG: config, **self._files}.items():
            self._tar.add(file, arcname=f"./{member}")
        self._tar.close()
        atomic_replace(self._directory.partial / _ARCHIVE, self.path)

    def __enter__(self) -> Self:
        partial = self._directory.make()
        self._weights = partial / WEIGHTS
        self._weights.mkdir()
        stored = {_RENAMED.get(name, name): spec for name, spec in self._specs.items()}
        self._writer = StackedWriter(self._weights, self._layers, stored, sync=False)
        self._tar = tarfile.open(partial / _ARCHIVE, "w:")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if kind is None and self._writer is not None:
                self.close()
        finally:
            if self._tar is not None:
                self._tar.close()
            self._directory.remove()


def _native(name: str) -> str:
    layer = layer_of(name)
    return PREFIX + stacked_name(_RENAMED.get(name, name)) + (f"[{layer}]" if layer is not None else "")
