"""Extracts the tokenizer of a ``.nemo`` file into a directory, and packs it for a new one."""

from __future__ import annotations

import hashlib
import json
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from nemo_advrm.convert.nemo_archive import NemoArchive
from nemo_advrm.convert.tokenizer_files import copy_tokenizer
from nemo_advrm.data.nemo_tokenizer import SENTENCEPIECE, SETTINGS
from nemo_advrm.errors import CheckpointError
from nemo_advrm.untrusted_files import read_json_object

TEMPORARY = "nemo_advrm_"  # name prefix of directories that exist only while a .nemo file is open
_GPT2_NAMES = ("GPT2BPETokenizer", "gpt2")
_SENTENCEPIECE_NAMES = ("GPTSentencePieceTokenizer", "sentencepiece")
_VOCABULARY, _MERGES, _FAST = "vocab.json", "merges.txt", "tokenizer.json"
_PROBES = (
    "Hello, World!  Two  spaces",
    " lead",
    "trail ",
    "line\nbreak\ttab",
    "naïve 中文 🙂",
    "a,b.c (d) 1234567",
    "",
)


def unpack_tokenizer(archive: NemoArchive, config: Mapping[str, Any], target: Path, given: Path | None) -> None:
    """Write the tokenizer that ``config`` names into the empty directory ``target``.

    Args:
        given: a tokenizer directory or SentencePiece file to use instead of the archive's tokenizer.

    Raises:
        CheckpointError: the archive contains no tokenizer, or one of an unsupported library.
    """
    wanted = config.get("tokenizer") or {}
    if not isinstance(wanted, Mapping):
        raise CheckpointError(f"{archive.path}: tokenizer is not an object")
    library, kind = str(wanted.get("library", "")), str(wanted.get("type") or "")
    data = config.get("data") or {}
    settings: dict[str, Any] = {"append_eod": bool(isinstance(data, Mapping) and data.get("append_eod", False))}
    special = wanted.get("special_tokens")
    if special:
        special = dict(special) if isinstance(special, Mapping) else special
        texts = [*special, *special.values()] if isinstance(special, dict) else special
        if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
            raise CheckpointError(f"{archive.path}: tokenizer.special_tokens are not strings")
        settings["special_tokens"] = special
    if wanted.get("additional_special_tokens"):
        raise CheckpointError(f"{archive.path}: tokenizer.additional_special_tokens is not supported")
    if given is not None and (given / SETTINGS).exists():
        shutil.copytree(given, target, dirs_exist_ok=True)
        return
    if given is not None and given.is_dir():
        copy_tokenizer(given, target)
        settings["library"] = "huggingface"
    elif given is not None or library == "sentencepiece" or (library == "megatron" and kind in _SENTENCEPIECE_NAMES):
        file = given.read_bytes() if given is not None else _artifact(archive, wanted, "model")
        (target / SENTENCEPIECE).write_bytes(file)
        legacy = wanted.get("sentencepiece_legacy", library == "sentencepiece")
        settings |= {"library": "sentencepiece", "legacy": bool(legacy)}
    elif library == "megatron" and kind in _GPT2_NAMES:
        (target / _VOCABULARY).write_bytes(_artifact(archive, wanted, "vocab_file"))
        (target / _MERGES).write_bytes(_artifact(archive, wanted, "merge_file"))
        (target / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "GPT2Tokenizer"}))
        settings["library"] = "gpt2"
    elif library == "huggingface":
        if not Path(kind).is_absolute() or not Path(kind).is_dir():
            raise CheckpointError(
                f"{archive.path}: its tokenizer is {kind!r} of Hugging Face, which a .nemo file does not contain: "
                "download it to a directory and convert first (nemo-advrm convert from=nemo to=megatron) with "
                "tokenizer=DIR"
            )
        copy_tokenizer(Path(kind), target)
        settings["library"] = "huggingface"
    else:
        raise CheckpointError(f"{archive.path}: tokenizer library {library} {kind} is not supported: set tokenizer=DIR")
    (target / SETTINGS).write_text(json.dumps(settings, indent=1) + "\n", encoding="utf-8")
    if settings["library"] == "sentencepiece" and not (settings["legacy"] and special):
        _write_fast_tokenizer(target)


def check_exportable(tokenizer: Path | None) -> None:
    """Raise CheckpointError for a SentencePiece tokenizer that transformers would encode differently."""
    if tokenizer is None or not (tokenizer / SENTENCEPIECE).exists() or not (tokenizer / SETTINGS).exists():
        return
    if not (tokenizer / _FAST).exists():
        raise CheckpointError(
            f"{tokenizer}: transformers encodes text differently with this SentencePiece tokenizer: set tokenizer=DIR "
            "to a Hugging Face tokenizer with the same ids"
        )


def _write_fast_tokenizer(directory: Path) -> None:
    """Write the tokenizer for transformers if it gives every entry, and texts made of entries, the same ids."""
    import sentencepiece
    from transformers import PreTrainedTokenizerFast
    from transformers.convert_slow_tokenizer import SpmConverter

    model = sentencepiece.SentencePieceProcessor(model_file=str(directory / SENTENCEPIECE))
    plain = [i for i in range(model.get_piece_size()) if not (model.is_control(i) or model.is_unknown(i))]
    pieces = [model.id_to_piece(i).replace("▁", " ") for i in plain if not model.is_byte(i)]
    texts = [*pieces, *("".join(pieces[i : i + 7]) for i in range(0, len(pieces), 3)), *_PROBES]
    for byte_fallback in (False, True):
        try:
            converter = SpmConverter(
                SimpleNamespace(vocab_file=str(directory / SENTENCEPIECE), add_prefix_space=True, legacy=False)
            )
            converter.handle_byte_fallback = byte_fallback
            fast = PreTrainedTokenizerFast(tokenizer_object=converter.converted())
            equal = all(fast(text, add_special_tokens=False).input_ids == model.encode_as_ids(text) for text in texts)
        except Exception:  # transformers does not convert every kind of model
            continue
        if equal:
            named = {"bos": model.bos_id(), "eos": model.eos_id(), "pad": model.pad_id(), "unk": model.unk_id()}
            fast.add_special_tokens({f"{k}_token": model.id_to_piece(i) for k, i in named.items() if i >= 0})
            if len(fast) == model.get_piece_size():
                fast.save_pretrained(str(directory))
                return


def _artifact(archive: NemoArchive, wanted: Mapping[str, Any], key: str) -> bytes:
    value = str(wanted.get(key) or "")
    name = value.removeprefix("nemo:")
    if not value.startswith("nemo:") or name not in archive.names:
        raise CheckpointError(f"{archive.path}: tokenizer.{key}={value!r} is not in the archive: set tokenizer=DIR")
    return archive.read(name)


def _is_temporary(directory: Path) -> bool:
    """Return whether a directory is removed when the .nemo file is closed."""
    place = directory.absolute()
    inside = place.is_relative_to(tempfile.gettempdir())
    return inside and any(part.startswith(TEMPORARY) for part in place.parts)


def pack_tokenizer(directory: Path) -> tuple[dict[str, Any], dict[str, Path], bool]:
    """Return (``tokenizer`` section, {archive member: file}, append_eod) of a tokenizer for a ``.nemo`` file.

    A Hugging Face tokenizer is stored as its path, as NeMo does: NeMo cannot store its files in the archive.
    Raises CheckpointError when that path is a file or a temporary directory.
    """
    settings: dict[str, Any] = {"library": "huggingface", "append_eod": True}
    if (directory / SETTINGS).exists():
        settings = read_json_object(directory / SETTINGS)
    section: dict[str, Any] = {"library": settings["library"], "type": None, "model": None}
    section |= {"vocab_file": None, "merge_file": None}
    if settings.get("special_tokens"):
        section["special_tokens"] = settings["special_tokens"]
    files: dict[str, Path] = {}

    def add(key: str, file: Path) -> None:
        member = f"{hashlib.sha256(file.read_bytes()).hexdigest()[:32]}_{file.name}"
        files[member] = file
        section[key] = f"nemo:{member}"

    if settings["library"] == "sentencepiece":
        add("model", directory / SENTENCEPIECE)
        section["sentencepiece_legacy"] = bool(settings.get("legacy"))
    elif settings["library"] == "gpt2":
        section |= {"library": "megatron", "type": "GPT2BPETokenizer"}
        add("vocab_file", directory / _VOCABULARY)
        add("merge_file", directory / _MERGES)
    else:
        if not directory.is_dir() or _is_temporary(directory):
            raise CheckpointError(
                f"{directory}: a .nemo file stores the directory of a Hugging Face tokenizer, but this one is "
                "temporary: convert to=megatron first, then from=megatron to=nemo with tokenizer=DIR"
            )
        section |= {"type": str(directory.absolute()), "use_fast": True}
    return section, files, bool(settings.get("append_eod"))
