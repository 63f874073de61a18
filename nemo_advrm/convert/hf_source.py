"""Reads Hugging Face checkpoints: a directory of safetensors files, or a GGUF file loaded by transformers."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from nemo_advrm.convert.architecture_tables import EMBEDDING, IGNORED, LM_HEAD, Architecture
from nemo_advrm.convert.differences import check_layers, refuse
from nemo_advrm.convert.hf_config import find_architecture, model_config, read_config, without_irrelevant_keys
from nemo_advrm.convert.hf_directory import explain_tensor
from nemo_advrm.convert.safetensors_files import SafetensorsDirectory
from nemo_advrm.convert.tensor_names import TensorSpec, canonical_shapes
from nemo_advrm.convert.tensors import Description, TensorSource
from nemo_advrm.convert.transforms import Transform
from nemo_advrm.data.reading import rule_from_hf_config
from nemo_advrm.engine.dimensions import Head
from nemo_advrm.errors import CheckpointError, list_names, one_line
from nemo_advrm.gguf_limits import check_header

TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "vocab.json", "spiece.model")


# config.json, the specs of the tensors by their Hugging Face names, and a function that reads one of them
_Opened = tuple[dict[str, Any], dict[str, TensorSpec], Callable[[str], Tensor]]


class HFSource(TensorSource):
    """A causal language model, or a sequence classifier with one label (a reward model), of a known architecture.

    Raises CheckpointError, with a list of all problems, for missing or unknown tensors and for shapes that differ from
    config.json.
    """

    def __init__(self, path: Path, tokenizer: Path | None = None) -> None:
        self.path = path
        config, self._stored, self._read = _open(path)
        where = str(path / "config.json") if path.is_dir() else str(path)
        table, head = find_architecture(config, where)
        self._model = model_config(table, config, where)
        self._parts: dict[str, tuple[Transform, list[str]]] = {}
        self.specs = self._map(table, head)
        own = path if path.suffix == ".gguf" or any((path / name).exists() for name in TOKENIZER_FILES) else None
        self.description = Description(
            model=self._model,
            head=head,
            tokenizer=tokenizer or own or (path if any(path.glob("*.gguf")) else None),
            hf_config=config,
            rule=rule_from_hf_config(path),
            provenance={"converted_from": f"hf:{path}", "class": config["architectures"][0]},
        )

    def read(self, name: str) -> Tensor:
        transform, theirs = self._parts[name]
        return transform.merge([self._read(part) for part in theirs], self._model)

    def native(self, name: str) -> str:
        return " + ".join(self._parts[name][1])

    @property
    def stored(self) -> dict[str, TensorSpec]:
        """The specs of all tensors in the files, by their Hugging Face names."""
        return dict(self._stored)

    def read_stored(self, name: str) -> Tensor:
        """Read one tensor by its Hugging Face name."""
        return self._read(name)

    def split(self, name: str, tensor: Tensor) -> dict[str, Tensor]:
        """Return the Hugging Face tensors that make up one canonical tensor; the inverse of :meth:`read`."""
        transform, theirs = self._parts[name]
        return dict(zip(theirs, transform.split(tensor, self._model), strict=True))

    def _map(self, table: Architecture, head: Head) -> dict[str, TensorSpec]:
        """Find the parts of each canonical tensor, and return its spec.

        Raises CheckpointError with a list of missing, unknown and wrong tensors.
        """
        stored, model = self._stored, self._model
        check_layers(self.path, model, stored)
        specs: dict[str, TensorSpec] = {}
        missing: list[str] = []
        wrong: list[str] = []
        left = {name for name in stored if not IGNORED.search(name)}
        for name, shape in canonical_shapes(model, head, model.vocab_size).items():
            found = table.parts(name, shape, model)
            assert found is not None, f"{table.family} has no entry for {name}"
            transform, theirs = found
            self._parts[name] = transform, list(theirs)
            left -= theirs.keys()
            if absent := [part for part in theirs if part not in stored]:
                missing += absent
                continue
            wrong += [
                f"{part} is {list(stored[part].shape)} but should be {list(wanted)}"
                for part, wanted in theirs.items()
                if stored[part].shape != wanted
            ]
            dtypes = {stored[part].dtype for part in theirs}
            if len(dtypes) > 1:
                wrong.append(f"{', '.join(theirs)} differ in their data type")
            specs[name] = TensorSpec(shape, dtypes.pop())
        if LM_HEAD in left and head == "lm" and self._is_tied():
            left.remove(LM_HEAD)
        refuse(
            self.path,
            list_names("missing tensors:", missing),
            list_names(f"tensors that {table.family} does not have:", [explain_tensor(name) for name in sorted(left)]),
            list_names("wrong tensors:", wrong),
        )
        return specs

    def _is_tied(self) -> bool:
        """Return whether the output layer equals the embedding; some files of tied models store both."""
        same_spec = self._stored[LM_HEAD] == self._stored.get(EMBEDDING)
        return same_spec and torch.equal(self._read(LM_HEAD), self._read(EMBEDDING))


def _open(path: Path) -> _Opened:
    if not path.exists():
        raise CheckpointError(f"{path}: there is no such file or directory (nothing is downloaded)")
    if path.is_dir() and ((path / "config.json").exists() or not any(path.glob("*.gguf"))):
        config, weights = read_config(path), SafetensorsDirectory(path)
        return config, weights.specs, weights.read
    files = sorted(path.glob("*.gguf")) if path.is_dir() else [path]
    if len(files) != 1 or files[0].suffix != ".gguf":
        raise CheckpointError(f"{path}: neither a directory with config.json nor one GGUF file")
    return _open_gguf(files[0])


def _open_gguf(file: Path) -> _Opened:
    """Load a GGUF file with transformers, which dequantises the whole model in memory."""
    import importlib.util

    if importlib.util.find_spec("gguf") is None:
        raise CheckpointError(f"{file}: reading GGUF needs the package gguf (pip install 'nemo_advrm[gguf]')")
    check_header(file)
    from transformers import AutoModelForCausalLM

    try:
        model = AutoModelForCausalLM.from_pretrained(
            str(file.parent), gguf_file=file.name, dtype=torch.float32, local_files_only=True, trust_remote_code=False
        )
    except Exception as error:  # transformers and gguf raise many types for a damaged file
        raise CheckpointError(f"{file}: could not be read ({one_line(error, 300)})") from None
    tensors: dict[str, Tensor] = model.state_dict()
    if model.config.tie_word_embeddings:
        tensors.pop(LM_HEAD, None)
    config = without_irrelevant_keys(model.config.to_dict(), [type(model).__name__])
    # GGUF stores numbers in fp32, where 1e-5 is 9.99999974737875e-06: use the shortest decimal with that fp32 value
    config |= {key: float(str(np.float32(v))) for key, v in config.items() if isinstance(v, float)}
    return config, {name: TensorSpec(tuple(t.shape), t.dtype) for name, t in tensors.items()}, tensors.__getitem__
