"""Checks that transformers uses everything in a reward model directory; shared by ``hf:`` members and ``convert``.

transformers silently ignores tensors that its class does not have, weight files that it does not read and unknown keys
of config.json. Such a model would compute other scores than it was trained for.
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
from nemo_advrm.errors import CheckpointError, list_names, one_line
from nemo_advrm.hf_limits import check_counts
from nemo_advrm.untrusted_files import read_json_object

CLASSIFIER = "ForSequenceClassification"
_ADAPTER = re.compile(r"adapter_(config\.json|model.*)|non_lora_trainables\.bin|lora.*")
# copies of the model in another library's format
_OTHER_FORMATS = re.compile(r"consolidated.*")
# files with parts of a model, which transformers does not read
_PARTS = re.compile(r"(head|score|reward|value|lora)", re.IGNORECASE)
_PICKLED = (".bin", ".pt", ".pth", ".ckpt")
# keys of config.json with which trainers describe the head's output; transformers reads none of them
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
# explanations of tensors that a model does not have
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
    """Limits of a transformers reward model.

    Attributes:
        vocabulary: number of rows of the embedding.
        longest: maximum number of tokens of a sequence; 0 without a limit.
    """

    vocabulary: int
    longest: int


def read_config(path: Path) -> dict[str, Any]:
    """Read config.json and check that transformers would use everything in the directory.

    Raises CheckpointError, with the file or key, for an adapter, quantised weights, weight files that transformers
    would not read or that contradict each other, and keys that change the reward.
    """
    where = f"hf:{path}"
    adapters = sorted(file.name for file in path.iterdir() if _ADAPTER.fullmatch(file.name)) if path.is_dir() else []
    if adapters:
        raise CheckpointError(
            f"{where}: contains a LoRA adapter ({', '.join(adapters)}), which is not applied: merge it into the "
            "weights first (PEFT: merge_and_unload, then save_pretrained into another directory)"
        )
    config = read_json_object(path / "config.json", what=f"{where}: not a transformers model")
    if config.get("quantization_config"):
        raise CheckpointError(
            f"{path / 'config.json'}: the weights are quantised (quantization_config); use the full-precision model"
        )
    if config.get("transformers_weights"):  # transformers would read that file, but the checks here read others
        raise CheckpointError(f"{path / 'config.json'}: names a file of weights (transformers_weights): remove the key")
    _check_weight_files(path)
    check_counts(config, path)
    if is_classifier(config):
        _check_keys(path / "config.json", config)
    return config


def read_classifier(path: Path, attributes: tuple[float, ...] = ()) -> HFDirectory:
    """Check the directory of a reward model; of its weights only the headers are read.

    Args:
        attributes: weights of the head's outputs; () for a head with one output.

    Raises:
        CheckpointError: from :func:`read_config` and :func:`load_classifier`, and when the model is not a classifier,
            its weights are missing or pickled, or the number of outputs is not that of ``attributes``.
    """
    if not path.is_dir():
        raise CheckpointError(f"hf:{path}: there is no such directory (nothing is downloaded: save the model there)")
    config = read_config(path)
    if not is_classifier(config):
        names = config.get("architectures") or ()
        kind = str(names[0]) if names else "a model without a head"
        raise CheckpointError(f"hf:{path}: is {kind}, not a reward model (*{CLASSIFIER})")
    check_attributes(f"hf:{path}", labels(path / "config.json", config), attributes)
    if not any(path.glob("*.safetensors")):
        raise CheckpointError(f"hf:{path}: no .safetensors files (pickled weights are not opened: convert them first)")
    _check_formats(path)
    model = load_classifier(path, device_map="meta")
    return HFDirectory(int(model.get_input_embeddings().weight.size(0)), _longest(model))


def check_language_model(path: Path) -> None:
    """Check the directory of a language model without reading its weights.

    Raises CheckpointError from :func:`read_config`, and when the model is a classifier, its weights are pickled or
    quantised, or there is no such directory.
    """
    if not path.is_dir():
        raise CheckpointError(f"hf:{path}: there is no such directory (nothing is downloaded: save the model there)")
    config = read_config(path)
    names = config.get("architectures")
    name = str(names[0]) if isinstance(names, list) and names else "a model without a head"
    if not name.endswith(("ForCausalLM", "LMHeadModel")):
        raise CheckpointError(f"hf:{path}: is {name}, not a language model (*ForCausalLM)")
    if not any(path.glob("*.safetensors")):
        raise CheckpointError(f"hf:{path}: no .safetensors files (pickled weights are not opened: convert them first)")
    _check_formats(path)


def load_classifier(path: Path, **options: Any) -> Any:
    """Call ``AutoModelForSequenceClassification.from_pretrained``.

    Raises CheckpointError for missing, unknown or wrongly shaped tensors, and for a directory that cannot be read.
    """
    return _load("AutoModelForSequenceClassification", path, options)


def load_language_model(path: Path, **options: Any) -> Any:
    """Call ``AutoModelForCausalLM.from_pretrained``; raises as :func:`load_classifier`."""
    return _load("AutoModelForCausalLM", path, options)


def _load(kind: str, path: Path, options: dict[str, Any]) -> Any:
    import transformers  # takes seconds to import

    try:
        with _without_report():
            model, found = getattr(transformers, kind).from_pretrained(
                str(path),
                local_files_only=True,
                trust_remote_code=False,
                use_safetensors=True,
                output_loading_info=True,
                ignore_mismatched_sizes=True,  # refused below with their names
                **options,
            )
    except Exception as error:  # OSError, ValueError, RuntimeError, safetensors' own
        raise CheckpointError(f"hf:{path}: could not be read: {one_line(error, 300)}") from error
    lost = sorted(found["missing_keys"])
    if lost:  # transformers would initialise them at random
        raise CheckpointError(f"hf:{path}: the weights have no {', '.join(lost[:5])} ({len(lost)} tensors missing)")
    if found["mismatched_keys"]:
        wrong = [f"{name} {list(has)}, not {list(means)}" for name, has, means in found["mismatched_keys"]]
        raise CheckpointError(f"hf:{path}: sizes differ from config.json: {'; '.join(sorted(wrong)[:5])}")
    left = sorted(found["unexpected_keys"])
    if left:
        names = list_names(f"{type(model).__name__} does not have", list(map(explain_tensor, left)), most=5)
        raise CheckpointError(f"hf:{path}: {names}")
    return model


def explain_tensor(name: str) -> str:
    """Return the name of a tensor that a model does not have, with an explanation in brackets if its name is known."""
    meaning = next((what for pattern, what in _TENSORS if pattern.search(name)), "")
    return f"{name} ({meaning})" if meaning else name


def is_classifier(config: dict[str, Any]) -> bool:
    """Return whether config.json names a sequence classifier."""
    names = config.get("architectures")
    return isinstance(names, list) and any(str(name).endswith(CLASSIFIER) for name in names)


def labels(where: Path, config: dict[str, Any]) -> int:
    """Return the number of outputs of the head, which is the number of labels (transformers' default is 2).

    Raises CheckpointError for contradictory or invalid labels.
    """
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
            f"{where}: {', '.join(wrong)} would change the reward, but transformers does not read it: fold it into the "
            "weights, or remove it if it has no effect"
        )


def _known_keys(model_type: str) -> set[str]:
    """Return the keys that the model's configuration class reads."""
    from transformers import CONFIG_MAPPING

    try:
        return set(CONFIG_MAPPING[model_type]().to_dict())
    except Exception:  # loading the model reports an unknown type; some classes need arguments
        return set()


def _is_neutral(key: str, value: Any) -> bool:
    """Return whether the key does not change the head's output."""
    if isinstance(value, dict):
        return all(_is_neutral(inner.lower(), part) for inner, part in value.items() if inner != "version")
    if isinstance(value, list):
        return all(_is_neutral(key, part) for part in value)
    if value is None or value is False or value is True:
        return not value
    if isinstance(value, str):  # "torch.nn.modules.linear.Identity"; transformers names the head "score"
        return value.lower().rpartition(".")[2] in ("", "none", "identity", "score")
    return value == (1 if re.search("std|variance|scale", key) else 0)


def _check_weight_files(path: Path) -> None:
    """Raise CheckpointError for weight files that are not read: they contain a part of the model, or another model."""
    # imported here: huggingface_hub, which it needs, is of no use to members of other kinds
    from nemo_advrm.convert.safetensors_files import INDEX, SINGLE, indexed_files

    if not path.is_dir():
        return
    files = sorted(file.name for file in path.iterdir() if file.is_file())
    read = indexed_files(path) if INDEX in files else {SINGLE}
    if INDEX in files and SINGLE in files and SINGLE not in read:
        raise CheckpointError(f"{path}: contains {SINGLE} and {INDEX}, which are two models: keep one of them")
    left = [f for f in files if f.endswith(".safetensors") and f not in read and not _OTHER_FORMATS.fullmatch(f)]
    left = left if SINGLE in files or INDEX in files else []  # reading the weights reports when there are none
    left += [f for f in files if f.endswith(_PICKLED) and _PARTS.search(f)]
    if left:
        raise CheckpointError(f"{path}: {', '.join(left)} would not be read, only {', '.join(sorted(read)[:3])}")


def _check_formats(path: Path) -> None:
    """Raise CheckpointError for integer and 8-bit weights: they need scales, which transformers would not apply."""
    from nemo_advrm.convert.safetensors_files import ANY_FORMAT, SafetensorsDirectory

    for name, spec in SafetensorsDirectory(path, ANY_FORMAT).specs.items():
        scaled = not spec.dtype.is_floating_point or spec.dtype.itemsize == 1
        if scaled and name.endswith(("weight", "bias")):
            raise CheckpointError(f"hf:{path}: {name} is stored as {spec.dtype}: quantised weights are not supported")


def _longest(model: Any) -> int:
    """Return the maximum number of tokens of a sequence, 0 without a limit.

    It is the smaller of the learned positions, minus those before the first (RoBERTa counts from the padding id), and
    ``max_position_embeddings`` of config.json. A sliding window is not a limit.
    """
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
    """Silence transformers' report on tensors and its progress bar: here such problems are errors."""
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
