"""NeMo-Aligner's actors and reward models do not support context parallelism: the plug-in says so at once."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from nemo_advrm.errors import ConfigError
from nemo_advrm.integrations.nemo_aligner.parallel_layout import refuse_context_parallelism


def test_a_size_of_one_is_accepted() -> None:
    refuse_context_parallelism(0)  # before NeMo-Aligner has made its groups
    refuse_context_parallelism(1)
    with pytest.raises(ConfigError, match=r"^model\.context_parallel_size=4: .* set it to 1$"):
        refuse_context_parallelism(4)


def test_every_class_refuses_a_larger_size(aligner: Callable[..., list[Any]]) -> None:
    (told,) = aligner(("layout_jobs.refusals", {"ranks": 2}))
    assert set(told) == {"actor", "client", "pairs", "fp8"}
    for name, message in told.items():
        assert message.startswith("ConfigError: model.context_parallel_size=2"), (name, message)
