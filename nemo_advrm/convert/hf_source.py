"""Reads Hugging Face checkpoints: a directory of safetensors files, or a GGUF file loaded by transformers."""

from __future__ import annotations

from pathlib import Path
from types import TracebackType
from typing import Any, Protocol, Self

import numpy as np
import torch
from torch import Tensor

from nemo_advrm.config.schema import ModelConfig
from nemo_advrm.convert.architecture_tables import EMBEDDING, IGNORED, LM_HEAD, Architecture
from nemo_advrm.convert.differences import check_layers, list_names
from nemo_advrm.convert.hf_config import find_architecture, model_config, read_config, without_irrelevant_keys
from nemo_advrm.convert.hf_directory import explain_tensor
from nemo_advrm.convert.safetensors_files import SafetensorsDirectory
from nemo_advrm.convert.tensor_names import canonical_shapes
from nemo_advrm.convert.tensors import Description, TensorSpec
from nemo_advrm.convert.transforms import Transform
from nemo_advrm.data.reading import rule_from_hf_config
from nemo_advrm.errors import CheckpointError
from nemo_advrm.gguf_limits import check_header

_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "vocab.json", "spiece.model")


class Weights(Protocol):
    """Tensors by their Hugging Face names."""

    specs: dict[str, TensorSpec]

    def read(self, name: str) -> Tensor: ...


class LoadedWeights:
    """The tensors of a model in memory."""

    def __init__(self, tensors: dict[str, Tensor]) -> None:
        self._tensors = tensors
        self.specs = {name: TensorSpec(tuple(t.shape), t.dtype) for name, t in tensors.items()}

    def read(self, name: str) -> Tensor:
        return self._tensors[name]


class HFSource:
    """A causal language model, or a sequence classifier with one label (a reward model), of a known architecture.

    Raises CheckpointError, with a list of all problems, for missing or unknown tensors and for shapes that differ from
    config.json.
    """

    def __init__(self, path: Path, tokenizer: Path | None = None) -> None:
        self.path = path
        config, weights = _open(path)
        where = str(path / "config.json") if path.is_dir() else str(path)
        self._table, head = find_architecture(config, where)
        self._model = model_config(self._table, config, where)
        self._weights = weights
        self._parts, self._specs = _map(self._table, self._model, head, weights, path)
        own = path if path.suffix == ".gguf" or any((path / name).exists() for name in _TOKENIZER_FILES) else None
        self.description = Description(
            model=self._model,
            head=head,
            tokenizer=tokenizer or own or (path if any(path.glob("*.gguf")) else None),
            hf_config=config,
            rule=rule_from_hf_config(path),
            provenance={"converted_from": f"hf:{path}", "class": config["architectures"][0]},
        )

    def tensors(self) -> dict[str, TensorSpec]:
        return self._specs

    def read(self, name: str) -> Tensor:
        transform, theirs = self._parts[name]
        return transform.merge([self._weights.read(part) for part in theirs], self._model)

    def native(self, name: str) -> str:
        return " + ".join(self._parts[name][1])

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Files are open only while a tensor is read."""


def _open(path: Path) -> tuple[dict[str, Any], Weights]:
    if not path.exists():
        raise CheckpointError(f"{path}: there is no such file or directory (nothing is downloaded)")
    if path.is_dir() and ((path / "config.json").exists() or not any(path.glob("*.gguf"))):
        return read_config(path), SafetensorsDirectory(path)
    files = sorted(path.glob("*.gguf")) if path.is_dir() else [path]
    if len(files) != 1 or files[0].suffix != ".gguf":
        raise CheckpointError(f"{path}: neither a directory with config.json nor one GGUF file")
    return _open_gguf(files[0])


def _open_gguf(file: Path) -> tuple[dict[str, Any], Weights]:
    """Load a GGUF file with transformers, which dequantises the whole model in memory."""
    import importlib.util

    if importlib.util.find_spec("gguf") is None:
        raise CheckpointError(f"{file}: reading GGUF needs the package gguf (pip install 'nemo_advrm[smollm2]')")
    check_header(file)
    from transformers import AutoModelForCausalLM

    try:
        model = AutoModelForCausalLM.from_pretrained(
            str(file.parent), gguf_file=file.name, dtype=torch.float32, local_files_only=True, trust_remote_code=False
        )
    except Exception as error:  # transformers and gguf raise many types for a damaged file
        raise CheckpointError(f"{file}: could not be read ({' '.join(str(error).split())[:300]})") from None
    tensors: dict[str, Tensor] = model.state_dict()
    if model.config.tie_word_embeddings:
        tensors.pop(LM_HEAD, None)
    config = without_irrelevant_keys(model.config.to_dict(), [type(model).__name__])
    # GGUF stores numbers in fp32, where 1e-5 is 9.99999974737875e-06: use the shortest decimal with that fp32 value
    config |= {key: float(str(np.float32(v))) for key, v in config.items() if isinstance(v, float)}
    return config, LoadedWeights(tensors)


def _map(
    table: Architecture, model: ModelConfig, head: Any, weights: Weights, path: Path
) -> tuple[dict[str, tuple[Transform, tuple[str, ...]]], dict[str, TensorSpec]]:
    """Map each canonical tensor to its transform and Hugging Face names, and to its spec.

    Raises CheckpointError with a list of missing, unknown and wrong tensors.
    """
    check_layers(path, model, weights.specs)
    parts, specs, missing, wrong = {}, {}, [], []
    left = {name for name in weights.specs if not IGNORED.search(name)}
    for name, shape in canonical_shapes(model, head, model.vocab_size).items():
        found = table.entry(name)
        assert found is not None, f"{table.family} has no entry for {name}"
        parts[name] = transform, theirs = found
        left.difference_update(theirs)
        absent = [part for part in theirs if part not in weights.specs]
        missing += absent
        if absent:
            continue
        given = [weights.specs[part] for part in theirs]
        wanted = transform.split(torch.empty(shape, device="meta"), model)
        wrong += [
            f"{part} is {list(spec.shape)} but should be {list(meta.shape)}"
            for part, spec, meta in zip(theirs, given, wanted, strict=True)
            if spec.shape != tuple(meta.shape)
        ]
        if len({spec.dtype for spec in given}) > 1:
            wrong.append(f"{', '.join(theirs)} differ in their data type")
        specs[name] = TensorSpec(shape, given[0].dtype)
    if LM_HEAD in left and head == "lm" and _is_tied(weights, missing):
        left.remove(LM_HEAD)
    problems = [
        list_names("missing tensors:", missing),
        list_names(f"tensors that {table.family} does not have:", [explain_tensor(name) for name in sorted(left)]),
        list_names("wrong tensors:", wrong),
    ]
    if any(problems):
        raise CheckpointError(f"{path}: {'; '.join(filter(None, problems))}")
    return parts, specs


def _is_tied(weights: Weights, missing: list[str]) -> bool:
    """Return whether the output layer equals the embedding; some files of tied models store both."""
    if EMBEDDING in missing or weights.specs[LM_HEAD] != weights.specs[EMBEDDING]:
        return False
    return torch.equal(weights.read(LM_HEAD), weights.read(EMBEDDING))
