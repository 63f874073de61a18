"""What a directory of Hugging Face transformers holds, and whether all of it is used: one check for hf: and convert.

transformers itself goes on where a tensor has no place, a file is not read or a key of config.json means nothing to the
class: what such a model computes is not what was trained.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from nemo_advrm.data.attributes import check_attributes
from nemo_advrm.errors import CheckpointError
from nemo_advrm.hf_limits import check_counts
from nemo_advrm.untrusted_files import read_json

CLASSIFIER = "ForSequenceClassification"
_ADAPTER = re.compile(r"adapter_(config\.json|model.*)|non_lora_trainables\.bin|lora.*")
# duplicates in another library's format, which are no second part of the model
_OTHER_FORMATS = re.compile(r"consolidated.*")
# parts of a model in files of their own, which transformers does not read
_PARTS = re.compile(r"(head|score|reward|value|lora)", re.IGNORECASE)
_PICKLED = (".bin", ".pt", ".pth", ".ckpt")
# keys of config.json by which trainers say how the head's output becomes the reward; transformers reads none of them
_REWARD_KEYS = re.compile(
    r"""(^|_)(reward|rewards|score|scores|scoring|critic)(_|$)
    | (^|_)(v|value|regression|ranking|classification|rm)_head(_|$)
    | ^(mean|std|variance|bias|scale|shift|offset)$
    | ^normali[sz](e|ed|ation)(_|$)
    | (^|_)(lora|peft|adapter|adapters)(_|$)
    | (^|_)pooling(_|$)
    | activation_(fn|function)$
    | ^(sentence_transformers|sigmoid|apply_sigmoid|function_to_apply)$""",
    re.VERBOSE,
)
# what a tensor without a place is
_TENSORS = (
    (re.compile(r"lora_|\.adapter|modules_to_save|base_model\.model\."), "part of a LoRA adapter: merge it first"),
    (re.compile(r"(^|\.)(score|classifier|reward_head|v_head|value_head|head)\b.*bias$"), "a bias of the head"),
    (re.compile(r"(v_head|value_head|reward_head|rm_head|regression|score_head)"), "another head"),
    (re.compile(r"(qweight|qzeros|scales|absmax|quant|weight_scale|g_idx)"), "part of quantised weights"),
    (re.compile(r"(^|[._])(mean|std|running_\w+|scale|shift)$"), "a normalisation of the reward"),
    (re.compile(r"layers?\.\d+\.|\.h\.\d+\.|block"), "of a layer that config.json does not have"),
    (re.compile(r"^lm_head|\.lm_head"), "a language model's head"),
)


@dataclass(frozen=True)
class HFDirectory:
    """A reward model of transformers as its files describe it.

    Attributes:
        config: config.json.
        outputs: numbers that the head gives.
        vocabulary: rows of the embedding.
        longest: most tokens of a row; 0 where nothing limits them.
    """

    path: Path
    config: dict[str, Any]
    outputs: int
    vocabulary: int
    longest: int


def read_config(path: Path) -> dict[str, Any]:
    """config.json of a directory of which every part can be used; the check that ``hf:`` and ``convert`` share.

    Raises CheckpointError, which names the file or key, for an adapter, quantised weights, weight files that
    transformers would not read or that contradict each other, and keys that change the reward.
    """
    where = f"hf:{path}"
    adapters = sorted(file.name for file in path.iterdir() if _ADAPTER.fullmatch(file.name)) if path.is_dir() else []
    if adapters:
        raise CheckpointError(
            f"{where}: holds a LoRA adapter ({', '.join(adapters)}), which is not applied: merge it into the weights "
            "first (PEFT: merge_and_unload, then save_pretrained into another directory)"
        )
    try:
        config = read_json(path / "config.json")
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{where}: not a model of transformers (config.json: {error})") from error
    if not isinstance(config, dict):
        raise CheckpointError(f"{where}: not a model of transformers (config.json holds no object)")
    if config.get("quantization_config"):
        raise CheckpointError(
            f"{path / 'config.json'}: the weights are quantised (quantization_config); take the full ones"
        )
    if config.get("transformers_weights"):  # transformers would read that file, and the checks here others
        raise CheckpointError(f"{path / 'config.json'}: names a file of weights (transformers_weights): remove the key")
    _check_weight_files(path)
    check_counts(config, path)
    if is_classifier(config):
        _check_keys(path / "config.json", config)
    return config


def read_classifier(path: Path, attributes: tuple[float, ...] = ()) -> HFDirectory:
    """What the directory of a reward model holds; nothing but the headers of its weights is read.

    Args:
        attributes: weights of the head's outputs; () for a head with one.

    Raises:
        CheckpointError: what :func:`read_config` and :func:`unused` refuse, no classifier, missing or pickled weights,
            another number of outputs than ``attributes``.
    """
    if not path.is_dir():
        raise CheckpointError(f"hf:{path}: there is no such directory (nothing is downloaded: save the model there)")
    config = read_config(path)
    if not is_classifier(config):
        names = config.get("architectures") or ()
        kind = str(names[0]) if names else "a model without a head"
        raise CheckpointError(f"hf:{path}: holds {kind}, which is not a reward model (*{CLASSIFIER})")
    outputs = labels(path / "config.json", config)
    check_attributes(f"hf:{path}", outputs, attributes)
    if not any(path.glob("*.safetensors")):
        raise CheckpointError(f"hf:{path}: no .safetensors files (pickled weights are not opened: convert them first)")
    _check_formats(path)
    model = load_classifier(path, device_map="meta")
    return HFDirectory(path, config, outputs, _rows(model), _longest(model))


def load_classifier(path: Path, **options: Any) -> Any:
    """``AutoModelForSequenceClassification.from_pretrained``; CheckpointError unless every tensor has its place."""
    from transformers import AutoModelForSequenceClassification  # seconds to import: only for those who use it

    try:
        with _without_report():
            model, found = AutoModelForSequenceClassification.from_pretrained(
                str(path),
                local_files_only=True,
                trust_remote_code=False,
                use_safetensors=True,
                output_loading_info=True,
                ignore_mismatched_sizes=True,  # they are refused below, by name
                **options,
            )
    except Exception as error:  # OSError, ValueError, RuntimeError, safetensors' own
        raise CheckpointError(f"hf:{path}: could not be read: {' '.join(str(error).split())[:300]}") from error
    lost = sorted(found["missing_keys"])
    if lost:  # transformers draws them at random and goes on
        raise CheckpointError(f"hf:{path}: the weights lack {', '.join(lost[:5])} ({len(lost)} tensors)")
    if found["mismatched_keys"]:
        wrong = [f"{name} {list(has)}, not {list(means)}" for name, has, means in found["mismatched_keys"]]
        raise CheckpointError(f"hf:{path}: config.json means other sizes: {'; '.join(sorted(wrong)[:5])}")
    left = sorted(found["unexpected_keys"])
    if left:
        raise CheckpointError(f"hf:{path}: {type(model).__name__} has no place for {unused(left)}")
    return model


def unused(names: list[str]) -> str:
    """Tensors that a model has no place for, by name, and what they are where that is known."""
    more = f" and {len(names) - 5} more" if len(names) > 5 else ""
    return ", ".join(map(explained, names[:5])) + more


def explained(name: str) -> str:
    meaning = next((what for pattern, what in _TENSORS if pattern.search(name)), "")
    return f"{name} ({meaning})" if meaning else name


def is_classifier(config: dict[str, Any]) -> bool:
    names = config.get("architectures")
    return isinstance(names, list) and any(str(name).endswith(CLASSIFIER) for name in names)


def labels(where: Path, config: dict[str, Any]) -> int:
    """Outputs of the head: the labels, of which transformers has two where nothing says how many."""
    named, number = config.get("id2label"), config.get("num_labels")
    if not isinstance(named, dict | None) or type(number) not in (int, type(None)):
        raise CheckpointError(f"{where}: id2label={named!r}, num_labels={number!r}: not the labels of a classifier")
    if named and number is not None and len(named) != number:
        raise CheckpointError(f"{where}: num_labels={number} contradicts id2label, which names {len(named)}")
    count = len(named) if named else (2 if number is None else number)
    if count == 1 and config.get("problem_type") == "single_label_classification":
        raise CheckpointError(
            f"{where}: problem_type=single_label_classification with one label trains nothing (its loss is always 0)"
        )
    return count


def _check_keys(where: Path, config: dict[str, Any]) -> None:
    known = _known_keys(str(config.get("model_type", "")))
    wrong = [
        f"{key}={value!r}"
        for key, value in config.items()
        if key not in known and _REWARD_KEYS.search(key.lower()) and not _is_neutral(key.lower(), value)
    ]
    remote = config.get("auto_map") or {}
    wrong += [f"auto_map.{key}={remote[key]!r}" for key in remote if key.endswith(CLASSIFIER)]
    if wrong:
        raise CheckpointError(
            f"{where}: {', '.join(wrong)} would change the reward, and transformers does not read it: fold it into the "
            "weights, or remove it where it has no effect"
        )


def _known_keys(model_type: str) -> set[str]:
    """Keys that the class of the model reads, whatever they are called."""
    from transformers import CONFIG_MAPPING

    try:
        return set(CONFIG_MAPPING[model_type]().to_dict())
    except Exception:  # an unknown type is told when it is opened; a class may not open without arguments
        return set()


def _is_neutral(key: str, value: Any) -> bool:
    """Whether the key leaves the head's output as it is."""
    if isinstance(value, dict):
        return all(_is_neutral(inner.lower(), part) for inner, part in value.items() if inner != "version")
    if isinstance(value, list):
        return all(_is_neutral(key, part) for part in value)
    if value is None or value is False or value is True:
        return not value
    if isinstance(value, str):  # "torch.nn.modules.linear.Identity"; "score" is what transformers calls the head
        return value.lower().rpartition(".")[2] in ("", "none", "identity", "score")
    return value == (1 if re.search("std|variance|scale", key) else 0)


def _check_weight_files(path: Path) -> None:
    """Refuse weight files that are not read: part of the model, or another model, would be in them."""
    from nemo_advrm.convert.safetensors_files import INDEX, SINGLE, indexed_files  # conversion stands above rewards

    if not path.is_dir():
        return
    files = sorted(file.name for file in path.iterdir() if file.is_file())
    read = indexed_files(path) if INDEX in files else {SINGLE}
    if INDEX in files and SINGLE in files and SINGLE not in read:
        raise CheckpointError(f"{path}: holds {SINGLE} and {INDEX}, which are two models: keep one of them")
    left = [f for f in files if f.endswith(".safetensors") and f not in read and not _OTHER_FORMATS.fullmatch(f)]
    left = left if SINGLE in files or INDEX in files else []  # that there is none of them is told where they are read
    left += [f for f in files if f.endswith(_PICKLED) and _PARTS.search(f)]
    if left:
        raise CheckpointError(f"{path}: {', '.join(left)} would not be read beside {', '.join(sorted(read)[:3])}")


def _check_formats(path: Path) -> None:
    """Refuse weights in formats that mean nothing without a scale that transformers does not know of."""
    from nemo_advrm.convert.safetensors_files import ANY_FORMAT, SafetensorsDirectory

    for name, spec in SafetensorsDirectory(path, ANY_FORMAT).specs.items():
        scaled = not spec.dtype.is_floating_point or spec.dtype.itemsize == 1
        if scaled and name.endswith(("weight", "bias")):
            raise CheckpointError(f"hf:{path}: {name} is stored as {spec.dtype}: quantised weights are not opened")


def _rows(model: Any) -> int:
    return int(model.get_input_embeddings().weight.size(0))


def _longest(model: Any) -> int:
    """Most tokens of a row: the positions that were learned, less those before the first (RoBERTa counts from its
    padding's), else the context that config.json names; 0 without either. A sliding window limits nothing."""
    limits = [getattr(model.config, "max_position_embeddings", None) or 0]
    for name, module in model.named_modules():
        if isinstance(module, nn.Embedding) and re.fullmatch(
            r"wpe|(embed_)?positions?(_embeddings?|al_embeddings?)?", name.rpartition(".")[2]
        ):
            before = getattr(module, "offset", 0) if module.padding_idx is None else module.padding_idx + 1
            limits.append(module.num_embeddings - before)
    return min(filter(None, limits), default=0)


@contextmanager
def _without_report() -> Iterator[None]:
    """Without transformers' table of tensors and its bar: what is wrong with them is an error here."""
    from transformers.utils import logging as theirs

    logger = logging.getLogger("transformers")
    level, bar = logger.level, theirs.is_progress_bar_enabled()
    logger.setLevel(logging.ERROR)
    theirs.disable_progress_bar()
    try:
        yield
    finally:
        logger.setLevel(level)
        if bar:
            theirs.enable_progress_bar()
