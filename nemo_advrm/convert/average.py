"""Weights of several fine-tunings of one model, averaged into one model (WARM, arXiv 2401.12187), tensor by tensor."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import asdict, replace
from typing import Self

import torch
from torch import Tensor

from nemo_advrm.convert.tensor_names import TensorSpec
from nemo_advrm.convert.tensors import TensorSource
from nemo_advrm.data.tokenizers import build_tokenizer
from nemo_advrm.engine.architecture import first_difference
from nemo_advrm.errors import CheckpointError, ConfigError, DataError


class AverageSource(TensorSource):
    """A source whose tensors are the means of those of ``sources``; at most two of a tensor are in memory at a time.

    The average is described as the first one is.

    Raises CheckpointError for sources that are not the same model with other weights: another kind, architecture or
    tokenizer, other tensors or number formats.
    """

    def __init__(self, sources: Sequence[TensorSource]) -> None:
        self._sources = sources
        self._opened = contextlib.ExitStack()
        first = sources[0]
        tokenizer = _fingerprint(first)
        for other in sources[1:]:
            _check_same(first, other, tokenizer)
        self.path, self.specs = first.path, first.specs
        paths = [str(source.path) for source in sources]
        self.description = replace(
            first.description, provenance={"converted_from": f"average: {', '.join(paths)}", "averaged": paths}
        )

    def read(self, name: str) -> Tensor:
        """Return the mean of one tensor, summed in fp32."""
        total = self._sources[0].read(name).to(torch.float32, copy=True)
        for source in self._sources[1:]:
            total += source.read(name)
        return total.div_(len(self._sources)).to(self.specs[name].dtype)

    def native(self, name: str) -> str:
        return self._sources[0].native(name)

    def __enter__(self) -> Self:
        for source in self._sources:
            self._opened.enter_context(source)
        return self

    def __exit__(self, *_: object) -> None:
        self._opened.close()


def _check_same(first: TensorSource, other: TensorSource, tokenizer: str) -> None:
    mine, theirs = first.description, other.description
    if theirs.head != mine.head:
        raise _other(first, other, f"the head is {theirs.head!r} and {mine.head!r}")
    difference = first_difference(asdict(theirs.model), asdict(mine.model), theirs.head, mine.head)
    if difference is not None:
        key, its, ours = difference
        raise _other(first, other, f"model.{key} is {its!r} and {ours!r}")
    for name in (*first.specs, *other.specs):
        its_spec, our_spec = other.specs.get(name), first.specs.get(name)
        if its_spec != our_spec:
            raise _other(first, other, f"{name} is {_shown(its_spec)} and {_shown(our_spec)}")
    if _fingerprint(other) != tokenizer:
        raise _other(first, other, "their tokenizers, or how conversations are read, differ")


def _shown(spec: TensorSpec | None) -> str:
    return "missing" if spec is None else f"{list(spec.shape)} in {str(spec.dtype).removeprefix('torch.')}"


def _other(first: TensorSource, other: TensorSource, difference: str) -> CheckpointError:
    return CheckpointError(
        f"average: {other.path} and {first.path} cannot be averaged, only fine-tunings of one model can: {difference}"
    )


def _fingerprint(source: TensorSource) -> str:
    about = source.description
    try:
        own = build_tokenizer(f"hf:{about.tokenizer}" if about.tokenizer else about.model.tokenizer, about.rule)
    except (ConfigError, DataError) as error:
        raise CheckpointError(f"average: {source.path}: its tokenizer cannot be compared: {error}") from None
    return own.fingerprint
