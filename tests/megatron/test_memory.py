"""Running out of GPU memory ends with what was held and what to do."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from nemo_advrm.errors import ConfigError
from nemo_advrm.megatron import memory
from nemo_advrm.megatron.runtime import Runtime


def test_out_of_memory_names_rank_file_and_the_planner(single: Runtime, tmp_path: Path) -> None:
    message = r"rank 0 ran out of GPU memory .*out_of_memory_rank_0\.txt.*nemo-advrm plan with the same settings"
    with pytest.raises(ConfigError, match=message), memory.explained(tmp_path / "run"):
        raise torch.OutOfMemoryError("tried to allocate 4 GiB")
    assert "tried to allocate 4 GiB" in (tmp_path / "run" / "out_of_memory_rank_0.txt").read_text()


def test_other_errors_pass(single: Runtime, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="other"), memory.explained(tmp_path):
        raise ValueError("other")
    assert not list(tmp_path.iterdir())
