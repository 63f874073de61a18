"""Copies a tokenizer beside converted weights, so that they can be used without what they came from."""

from __future__ import annotations

import shutil
from pathlib import Path

from nemo_advrm.data.chat_template import fixed_text
from nemo_advrm.data.reading import ReadingRule
from nemo_advrm.data.tokenizers import build_tokenizer, load_hf_tokenizer
from nemo_advrm.errors import CheckpointError, DataError

# every file that a tokenizer of transformers consists of, and what configures generation
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
    """Raise CheckpointError for a tokenizer that could not be opened beside the weights."""
    try:
        build_tokenizer(f"hf:{source}")
    except DataError as error:
        raise CheckpointError(f"the tokenizer cannot be written beside the weights: {error}") from error


def copy_tokenizer(source: Path, target: Path) -> None:
    """Copy the files as they are; from a GGUF file write them. The target may exist.

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
    """Write the date of ``rule`` into a chat template that asks for today's: scores are those of that date, always."""
    tokenizer = load_hf_tokenizer(directory)
    if isinstance(tokenizer.chat_template, str) and (fixed := fixed_text(tokenizer.chat_template, rule)):
        tokenizer.chat_template = fixed
        tokenizer.save_pretrained(str(directory))
