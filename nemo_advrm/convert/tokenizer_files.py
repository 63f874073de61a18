"""Copies a tokenizer next to converted weights, so that they can be used without the original."""

from __future__ import annotations

import shutil
from pathlib import Path

from nemo_advrm.data.chat_template import fixed_text
from nemo_advrm.data.hf_tokenizer import load_hf_tokenizer
from nemo_advrm.data.reading import ReadingRule
from nemo_advrm.data.tokenizers import build_tokenizer
from nemo_advrm.errors import CheckpointError, DataError

# all files of transformers tokenizers, and the generation settings
_PATTERNS = (
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.*",
    "merges.txt",
    "*.model",
    "*.tiktoken",
    "chat_template*",
    "additional_chat_templates/*",
    "generation_config.json",
)


def check_tokenizer(source: Path) -> None:
    """Raise CheckpointError for a tokenizer that cannot be opened."""
    try:
        build_tokenizer(f"hf:{source}")
    except DataError as error:
        raise CheckpointError(f"the tokenizer cannot be copied next to the weights: {error}") from error


def copy_tokenizer(source: Path, target: Path) -> None:
    """Copy the tokenizer files, or write them from a GGUF file. The target may exist.

    Raises DataError when no tokenizer can be read from ``source``.
    """
    target.mkdir(parents=True, exist_ok=True)
    files = sorted({file for pattern in _PATTERNS if source.is_dir() for file in source.glob(pattern)})
    if any(file.name.startswith(("tokenizer", "vocab")) for file in files):
        for file in files:
            if file.is_file():
                place = target / file.relative_to(source)
                place.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(file, place)
        return
    load_hf_tokenizer(source).save_pretrained(str(target))


def pin_date(directory: Path, rule: ReadingRule) -> None:
    """Write the date of ``rule`` into a chat template that uses the current date, so that scores never change."""
    tokenizer = load_hf_tokenizer(directory)
    if isinstance(tokenizer.chat_template, str) and (fixed := fixed_text(tokenizer.chat_template, rule)):
        tokenizer.chat_template = fixed
        tokenizer.save_pretrained(str(directory))
