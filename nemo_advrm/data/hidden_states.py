"""Reads and writes the hidden states of SFT responses, in a file beside their ``reference.jsonl``.

They are not fields of its rows: as text, 3,072 states of width 4,096 would take 150 MB instead of 50.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from nemo_advrm import files
from nemo_advrm.errors import DataError


def beside(reference: Path) -> Path:
    """The file of the hidden states that belong to a ``reference.jsonl``."""
    return reference.with_name(f"{reference.stem}.hidden_states.safetensors")


def write_hidden_states(path: Path, states: Mapping[int, Tensor]) -> None:
    """Write [S, D] states by member, counted from 0; without any, the file of an earlier run is removed."""
    if not states:
        path.unlink(missing_ok=True)
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    new = files.temporary_name(path)
    save_file({f"member_{k + 1}": states_SD.contiguous() for k, states_SD in states.items()}, new)
    files.atomic_replace(new, path)


def read_hidden_states(path: Path, rows: int) -> dict[int, Tensor]:
    """Read the states by member, counted from 0; {} without a file.

    Raises DataError, which names the file, unless it holds finite [rows, D] states.
    """
    if not path.exists():
        return {}
    try:
        found = load_file(path)
        states = {int(name.removeprefix("member_")) - 1: tensor for name, tensor in found.items()}
    except (SafetensorError, OSError, ValueError) as error:
        raise DataError(f"{path}: not a file of hidden states ({error}); restore it") from None
    for k, tensor in states.items():
        if tensor.dim() != 2 or len(tensor) != rows or not tensor.is_floating_point() or not tensor.isfinite().all():
            raise DataError(
                f"{path}: member {k + 1} has {tensor.dtype} values of shape {tuple(tensor.shape)}, not finite hidden "
                f"states of {rows} responses; restore it"
            )
    return states
