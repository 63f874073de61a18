"""Writes causal language models, and reward models as classifiers with one label, as Hugging Face directories."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

from torch import Tensor

from nemo_advrm.config.schema import ConvertConfig
from nemo_advrm.convert.hf_config import check_config, choose_architecture, hf_config
from nemo_advrm.convert.model_card import model_card
from nemo_advrm.convert.nemo_tokenizer_files import check_exportable
from nemo_advrm.convert.padding_token import PaddingToken, choose_padding_token, write_tokenizer
from nemo_advrm.convert.safetensors_files import ShardWriter
from nemo_advrm.convert.tensor_names import VOCABULARY_ROWS, Shape, TensorSpec
from nemo_advrm.convert.tensors import TensorSink, TensorSource
from nemo_advrm.convert.tokenizer_files import check_tokenizer, copy_tokenizer, pin_date
from nemo_advrm.convert.transforms import Transform
from nemo_advrm.data.hf_tokenizer import load_hf_tokenizer
from nemo_advrm.data.reading import HF_KEY
from nemo_advrm.data.tokenizers import build_tokenizer
from nemo_advrm.errors import CheckpointError, list_names

HEAD_BIAS = "head.bias"
OWN_TOKENIZERS = ("byte", "synthetic")


class HFSink(TensorSink):
    """Writes a directory for ``from_pretrained``: weights, config.json, tokenizer, model card.

    Args:
        cfg: ``architecture`` is the family to write; the default is that of the source, or the first that fits.
            ``drop_head_bias`` drops a bias that is not 0, which shifts all scores by a constant.

    Raises CheckpointError for a model that Hugging Face cannot represent.
    """

    def __init__(self, path: Path, source: TensorSource, specs: dict[str, TensorSpec], cfg: ConvertConfig) -> None:
        self._description = about = source.description
        self._model = model = about.model
        check_exportable(about.tokenizer)
        self.notes: list[str] = []
        self._check_head(specs, source.read(HEAD_BIAS) if HEAD_BIAS in specs else None, cfg.drop_head_bias)
        self._table = choose_architecture(model, about.head, about.hf_config, cfg.architecture)
        self.config = hf_config(self._table, model, about.head, about.hf_config)
        self.config.pop(HF_KEY, None)
        self._set_own_tokenizer_ids()
        self._set_end_token_ids()
        rows, self._padding = model.vocab_size, None
        if about.head == "reward":
            self.config[HF_KEY] = about.rule.meta()
            self._padding = self._choose_padding()
            rows = self._padding.rows
        self._parts = self._map(specs, rows)
        theirs = {
            name: TensorSpec(shape, specs[ours].dtype)
            for ours, (_, parts) in self._parts.items()
            for name, shape in parts.items()
        }
        self._writer = ShardWriter(theirs, cfg.max_shard_size)
        common = Counter(spec.dtype for spec in theirs.values()).most_common(1)[0][0]
        self.config["dtype"] = str(common).removeprefix("torch.")
        check_config(self.config)
        super().__init__(path, specs, rows, sum(spec.nbytes for spec in theirs.values()))

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

    def _choose_padding(self) -> PaddingToken:
        rows = self._model.vocab_size
        padding = choose_padding_token(self._description.tokenizer, self.config, rows, self._description.rule)
        self.config |= {
            "vocab_size": padding.rows,
            "pad_token_id": padding.id,
            "problem_type": "regression",
            "id2label": {"0": "reward"},
            "label2id": {"reward": 0},
        }
        if padding.token is not None or padding.rows != rows:
            self.notes.append(
                f"Padding is the token {padding.id}{f' ({padding.token})' if padding.token else ''}, because the score "
                "is read at the last token that is not padding, and conversations may end with the former one."
            )
        return padding

    def _map(self, specs: dict[str, TensorSpec], rows: int) -> dict[str, tuple[Transform, dict[str, Shape]]]:
        """Map each canonical name to its transform and the shapes of its Hugging Face tensors."""
        parts, unknown = {}, []
        for name, spec in specs.items():
            if name == HEAD_BIAS:
                continue
            shape = (rows, *spec.shape[1:]) if name in VOCABULARY_ROWS else spec.shape
            if found := self._table.parts(name, shape, self._model):
                parts[name] = found
            else:
                unknown.append(name)
        if unknown:
            raise CheckpointError(list_names(f"{self._table.family} has no tensors for", unknown))
        return parts

    def native(self, name: str) -> str:
        return " + ".join(self._parts[name][1]) if name in self._parts else "(left out)"

    def _open(self, partial: Path) -> None:
        # creates sparse files of full size, which fails here if a file size limit is too low
        self._writer.open(partial)

    def _put(self, name: str, tensor: Tensor) -> None:
        if name == HEAD_BIAS:
            return
        transform, theirs = self._parts[name]
        for part, split in zip(theirs, transform.split(tensor, self._model), strict=True):
            self._writer.write(part, split)

    def _complete(self, partial: Path) -> Path:
        self._writer.close()
        self._write_tokenizer(partial)
        (partial / "config.json").write_text(json.dumps(self.config, indent=2) + "\n", encoding="utf-8")
        card = model_card(self._description, self.config["architectures"][0], self.notes)
        (partial / "README.md").write_text(card, encoding="utf-8")
        return partial

    def _close(self) -> None:
        self._writer.abandon()

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
