"""Reads what a checkpoint says of itself (``meta.json``), without Megatron-Core."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from nemo_advrm import files
from nemo_advrm.engine.description import check_description
from nemo_advrm.errors import CheckpointError
from nemo_advrm.untrusted_files import read_json_object

FORMAT = 1
WEIGHTS = "weights"  # directory of Megatron's files


def read_meta(path: Path) -> dict[str, Any]:
    """The content of ``meta.json``; raises CheckpointError when the checkpoint is missing or incomplete."""
    path = Path(path)
    files.finish_interrupted_replace(path)
    if not path.exists():
        raise CheckpointError(f"{path}: there is no such checkpoint")
    try:
        meta = read_json_object(path / "meta.json")
    except CheckpointError as error:
        raise CheckpointError(f"{path}: not a complete checkpoint ({error})") from None
    if not {"format", "head", "model"} <= set(meta):
        raise CheckpointError(f"{path}: not a checkpoint of nemo_advrm (meta.json lacks format, head or model)")
    if type(meta["format"]) is int and meta["format"] > FORMAT:
        raise CheckpointError(f"{path}: written by a newer version (format {meta['format']}, this one knows {FORMAT})")
    check_description(meta, str(path / "meta.json"))
    return meta


def check_head(meta: dict[str, Any], head: int, text: str, advice: str) -> int:
    """Returns how many members share the checkpoint's trunk.

    Args:
        head: the member that is named, from 1; 0: none is.
        text, advice: for messages, what the user wrote, and how to name one of several members.

    Raises CheckpointError when none of several members is named, or one that is not there.
    """
    heads: int = meta.get("heads", 1)
    if not head and heads > 1:
        raise CheckpointError(f"{text}: holds {heads} members on one trunk: {advice}")
    if head > heads:
        raise CheckpointError(f"{text}: there is no head {head}, the checkpoint holds {heads}")
    return heads
