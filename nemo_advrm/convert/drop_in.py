"""Writes a trained reward model in the format that it came in, so that it can take the original's place."""

from __future__ import annotations

import shutil
from collections import Counter
from pathlib import Path

import torch
from torch import Tensor

from nemo_advrm.config.schema import ConvertConfig
from nemo_advrm.convert.conversion import cast, convert, open_source
from nemo_advrm.convert.hf_source import HFSource
from nemo_advrm.convert.megatron_checkpoint import MegatronSource
from nemo_advrm.convert.model_card import model_card
from nemo_advrm.convert.partial import failure_named
from nemo_advrm.convert.safetensors_files import ShardWriter
from nemo_advrm.convert.tensors import TensorSink, TensorSource
from nemo_advrm.convert.tokenizer_files import copy_tokenizer
from nemo_advrm.errors import CheckpointError, list_names

_SHARD_SIZE = "5GB"
_COPIED = ("config.json", "LICENSE*", "NOTICE*")  # beside the tokenizer; a README tells of the original's weights


class DropInSink(TensorSink):
    """Writes a Hugging Face directory that differs from ``original`` in its weights alone.

    Classes, config.json, tokenizer, chat template, names and number formats of the tensors are the original's. So it is
    not :class:`HFSink`, which writes a configuration of its own and may choose another padding token.
    """

    def __init__(self, path: Path, original: HFSource, note: str) -> None:
        self._original, self._note = original, note
        stored = original.stored
        self._writer = ShardWriter(stored, _SHARD_SIZE)
        self._left_out = set(stored)
        rows = original.description.model.vocab_size
        super().__init__(path, original.specs, rows, sum(spec.nbytes for spec in stored.values()))

    def native(self, name: str) -> str:
        return self._original.native(name)

    def _open(self, partial: Path) -> None:
        self._writer.open(partial)

    def _put(self, name: str, tensor: Tensor) -> None:
        for theirs, part in self._original.split(name, tensor).items():
            self._writer.write(theirs, part)
            self._left_out.discard(theirs)

    def _complete(self, partial: Path) -> Path:
        for name in sorted(self._left_out):  # buffers, which are not trained
            self._writer.write(name, self._original.read_stored(name))
        self._writer.close()
        source = self._original.path
        copy_tokenizer(source, partial)
        for file in sorted(file for pattern in _COPIED for file in source.glob(pattern)):
            shutil.copyfile(file, partial / file.name)
        about = self._original.description
        card = model_card(about, str(about.hf_config["architectures"][0]), [self._note])
        (partial / "README.md").write_text(card, encoding="utf-8")
        return partial

    def _close(self) -> None:
        self._writer.abandon()


def write_drop_in(kind: str, original: Path, trained: Path, out: Path, note: str) -> None:
    """Write the weights of the checkpoint ``trained`` to ``out``, in the format and number format of ``original``.

    Args:
        kind: format of ``original``: hf, megatron or nemo.
        note: sentences for the README of a Hugging Face directory.

    Raises CheckpointError when ``out`` exists, or the tensors are not those of ``original``.
    """
    if kind != "hf":
        with open_source(ConvertConfig(from_=kind, path=str(original), drop_reference_features=True)) as source:
            dtypes = {name: spec.dtype for name, spec in source.specs.items()}
        settings = ConvertConfig(from_="megatron", path=str(trained), to=kind, out=str(out))
        convert(settings, report=lambda _: None, dtypes=dtypes)
        return
    with HFSource(original) as before, MegatronSource(trained) as after:
        if before.specs.keys() != after.specs.keys():
            others = list_names("tensors that only one of them has:", sorted(before.specs.keys() ^ after.specs.keys()))
            raise CheckpointError(f"{out}: {trained} is no training of {original}: {others}")
        sink = DropInSink(out, before, note)
        with failure_named(out), sink:
            for name, spec in before.specs.items():
                sink.write(name, cast(name, after.read(name), spec.dtype))


def body_and_head_dtype(source: TensorSource) -> tuple[torch.dtype, torch.dtype]:
    """Return the number format that most tensors have, and that of the head."""
    common = Counter(spec.dtype for spec in source.specs.values()).most_common(1)[0][0]
    return common, source.specs["head.weight"].dtype if "head.weight" in source.specs else common
