"""Reads the files of a Megatron checkpoint without running code in them; Megatron reads through this module.

Megatron's own readers unpickle; they are replaced by those of :mod:`nemo_advrm.engine.safe_readers`.
"""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import torch
from megatron.core.dist_checkpointing.core import CONFIG_FNAME
from megatron.core.dist_checkpointing.strategies.common import COMMON_STATE_FNAME
from megatron.core.dist_checkpointing.strategies.torch import MCoreLoadPlanner
from torch.distributed.checkpoint._nested_dict import set_element
from torch.distributed.checkpoint.planner import ReadItem

from nemo_advrm.engine import compat
from nemo_advrm.engine.safe_readers import WeightsReader, load_plain, only_torch_classes
from nemo_advrm.engine.weights_metadata import open_metadata
from nemo_advrm.errors import CheckpointError, one_line
from nemo_advrm.untrusted_files import read_json_object


def load_weights(state: dict[str, Any], directory: Path) -> dict[str, Any]:
    """Load the weights in ``directory`` into the sharded ``state``; all ranks call.

    Raises CheckpointError, naming the file, if a file is damaged or unsafe, and Megatron's own errors if the state does
    not match.
    """
    backend = read_json_object(directory / CONFIG_FNAME).get("sharded_backend")
    if backend != "torch_dist":
        raise CheckpointError(f"{directory / CONFIG_FNAME}: the format {one_line(repr(backend), 40)} is not supported")
    metadata = open_metadata(directory)
    with only_torch_classes():
        return compat.load_sharded(state, directory, lambda: WeightsReader(directory, metadata), _Planner, _load_common)


def _load_common(directory: Path) -> dict[str, Any]:
    path = directory / COMMON_STATE_FNAME
    try:
        with open(path, "rb") as file:
            state = load_plain(file, str(path))
    except OSError as error:
        raise CheckpointError(f"{path}: could not be read ({error.strerror})") from None
    if not isinstance(state, dict):
        raise CheckpointError(f"{path}: holds no state of a training")
    return state


class _Planner(MCoreLoadPlanner):
    def load_bytes(self, read_item: ReadItem, value: io.BytesIO) -> None:
        loaded, name = torch.load(value, map_location="cpu", weights_only=True), read_item.dest_index.fqn
        if self.flatten_state_dict:
            set_element(self.original_state_dict, self.mappings[name], loaded)
        else:
            self.state_dict[name] = loaded
