"""Writes causal language models, and reward models as classifiers with one label, as Hugging Face directories."""

from __future__ import annotations

import contextlib
import json
from collections import Counter
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch
from torch import Tensor

from nemo_advrm.convert.differences import list_names
from nemo_advrm.convert.hf_config import check_config, choose_architecture, hf_config
from nemo_advrm.convert.model_card import model_card
from nemo_advrm.convert.padding_token import choose_padding_token, write_tokenizer
from nemo_advrm.convert.partial import PartialDirectory
from nemo_advrm.convert.safetensors_files import ShardWriter
from nemo_advrm.convert.tensor_names import VOCABULARY_ROWS
from nemo_advrm.convert.tensors import Description, TensorSpec
from nemo_advrm.convert.tokenizer_files import check_tokenizer, copy_tokenizer, pin_date
from nemo_advrm.convert.transforms import Transform, pad_vocabulary
from nemo_advrm.data.reading import HF_KEY
from nemo_advrm.data.tokenizers import build_tokenizer, load_hf_tokenizer
from nemo_advrm.errors import CheckpointError

HEAD_BIAS = "head.bias"
OWN_TOKENIZERS = ("byte", "synthetic")


class HFSink:
    """Writes a directory for ``from_pretrained``: weights, config.json, tokenizer, model card.

    Args:
        head_bias: bias of the reward head, if it has one. Heads of Hugging Face have none.
        drop_head_bias: drop a bias that is not 0, which shifts all scores by a constant.
        architecture: family to write; the default is that of ``description.hf_config``, or the first that fits.

    Raises CheckpointError for a model that Hugging Face cannot represent.
    """

    def __init__(
        self,
        path: Path,
        description: Description,
        specs: dict[str, TensorSpec],
        *,
        head_bias: Tensor | None = None,
        drop_head_bias: bool = False,
        architecture: str = "",
        max_shard_bytes: int = 5 * 10**9,
    ) -> None:
        self.path = path
        self._description = description
        self._model = model = description.model
        self.notes: list[str] = []
        self._check_head(specs, head_bias, drop_head_bias)
        base = description.hf_config
        self._table = choose_architecture(model, description.head, base, architecture)
        self.config = hf_config(self._table, model, description.head, base)
        self.config.pop(HF_KEY, None)
        if description.head == "reward":
            self.config[HF_KEY] = description.rule.meta()
        self._set_own_tokenizer_ids()
        self._set_end_token_ids()
        self._rows = model.vocab_size
        self._padding = None
        if description.head == "reward":
            self._padding = self._choose_padding()
        self._parts = self._map(specs)
        theirs = {name: spec for part in self._parts.values() for name, spec in part[1].items()}
        self._writer = ShardWriter(theirs, max_shard_bytes)
        self._left = set(specs)
        common = Counter(spec.dtype for spec in theirs.values()).most_common(1)[0][0]
        self.config["dtype"] = str(common).removeprefix("torch.")
        check_config(self.config)
        self.nbytes = sum(spec.nbytes for spec in theirs.values())
        self._directory = PartialDirectory(path, self.nbytes)
        self._open = False

    def _check_head(self, specs: dict[str, TensorSpec], bias: Tensor | None, drop: bool) -> None:
        head = self._description.head
        if head == "value":
            raise CheckpointError("Hugging Face has no model with a value per token: a critic cannot be exported")
        if head == "reward" and specs["head.weight"].shape[0] != 1:
            raise CheckpointError(
                f"the reward head has {specs['head.weight'].shape[0]} outputs; only one output can be exported"
            )
        if HEAD_BIAS in specs and bias is not None and bool(bias.any()):
            if not drop:
                raise CheckpointError(
                    f"the reward head has the bias {bias.tolist()[0]:g}, but Hugging Face's heads have no bias; "
                    "drop_head_bias=true drops it, which shifts all scores by that constant"
                )
            self.notes.append(
                f"The head's bias {bias.tolist()[0]:g} was left out: scores here are lower by that constant."
            )

    def _set_own_tokenizer_ids(self) -> None:
        """Set the special token ids of this package's own tokenizers, which transformers cannot load."""
        name = self._model.tokenizer
        about = self._description
        if about.tokenizer is not None or about.hf_config or name not in OWN_TOKENIZERS:
            return
        own = build_tokenizer(name)
        self.config |= {"eos_token_id": own.eos_id, "pad_token_id": own.pad_id, "bos_token_id": None}
        self.notes.append(f"Text is encoded by nemo_advrm's tokenizer `{name}`, which transformers does not have.")

    def _set_end_token_ids(self) -> None:
        """Set missing bos and eos ids from the tokenizer; opens it before anything is written."""
        if self._description.tokenizer is None:
            return
        check_tokenizer(self._description.tokenizer)
        theirs = load_hf_tokenizer(self._description.tokenizer)
        for key in ("bos_token_id", "eos_token_id"):
            if self.config.get(key) is None and getattr(theirs, key) is not None:
                self.config[key] = getattr(theirs, key)

    def _choose_padding(self) -> Any:
        padding = choose_padding_token(self._description.tokenizer, self.config, self._rows, self._description.rule)
        self._rows = padding.rows
        self.config |= {
            "vocab_size": padding.rows,
            "pad_token_id": padding.id,
            "problem_type": "regression",
            "id2label": {"0": "reward"},
            "label2id": {"reward": 0},
        }
        if padding.token is not None or padding.rows != self._model.vocab_size:
            self.notes.append(
                f"Padding is the token {padding.id}{f' ({padding.token})' if padding.token else ''}, because the score "
                "is read at the last token that is not padding, and conversations may end with the former one."
            )
        return padding

    def _map(self, specs: dict[str, TensorSpec]) -> dict[str, tuple[Transform, dict[str, TensorSpec]]]:
        """Map each canonical name to its transform and the specs of its Hugging Face tensors."""
        parts, unknown = {}, []
        for name, spec in specs.items():
            if name == HEAD_BIAS:
                continue
            found = self._table.entry(name)
            if found is None:
                unknown.append(name)
                continue
            shape = (self._rows, *spec.shape[1:]) if name in VOCABULARY_ROWS else spec.shape
            split = found[0].split(torch.empty(shape, device="meta"), self._model)
            names = zip(found[1], split, strict=True)
            parts[name] = found[0], {theirs: TensorSpec(tuple(t.shape), spec.dtype) for theirs, t in names}
        if unknown:
            raise CheckpointError(list_names(f"{self._table.family} has no tensors for", unknown))
        return parts

    def native(self, name: str) -> str:
        return " + ".join(self._parts[name][1]) if name in self._parts else "(left out)"

    def write(self, name: str, tensor: Tensor) -> None:
        if name not in self._left:
            raise CheckpointError(f"{self.path}: {name} is unexpected or was written twice")
        self._left.remove(name)
        if name == HEAD_BIAS:
            return
        transform, theirs = self._parts[name]
        if name in VOCABULARY_ROWS:
            tensor = pad_vocabulary(tensor, self._rows)
        for part, split in zip(theirs, transform.split(tensor, self._model), strict=True):
            self._writer.write(part, split)

    def close(self) -> None:
        if self._left:
            raise CheckpointError(f"{self.path}: {list_names('tensors that were not written:', sorted(self._left))}")
        self._open = False
        self._writer.close()
        partial = self._directory.partial
        self._write_tokenizer(partial)
        (partial / "config.json").write_text(json.dumps(self.config, indent=2) + "\n", encoding="utf-8")
        card = model_card(self._description, self.config["architectures"][0], self.notes)
        (partial / "README.md").write_text(card, encoding="utf-8")
        self._directory.complete()

    def _write_tokenizer(self, partial: Path) -> None:
        tokenizer = self._description.tokenizer
        if tokenizer is None:
            return
        copy_tokenizer(tokenizer, partial)
        if self._padding is not None:
            (partial / "generation_config.json").unlink(missing_ok=True)
            if self._padding.token is not None:
                write_tokenizer(tokenizer, self._padding, partial)
        if self._description.head == "reward":
            pin_date(partial, self._description.rule)

    def __enter__(self) -> Self:
        with contextlib.ExitStack() as undo:
            undo.callback(self._directory.remove)
            undo.callback(self._writer.abandon)
            # creates sparse files of full size, which fails here if a file size limit is too low
            self._writer.open(self._directory.make())
            undo.pop_all()
        self._open = True
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if kind is None and self._open:
                self.close()
        finally:
            self._writer.abandon()
            self._directory.remove()  # does nothing after the rename
