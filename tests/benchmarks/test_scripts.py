"""The scripts of benchmarks/ can be opened: what they take from each other and from the package is there."""

from __future__ import annotations

import pytest
from scripts import BENCHMARKS, load

NAMES = sorted(path.stem for folder in ("", "gpu") for path in (BENCHMARKS / folder).glob("*.py"))


@pytest.mark.parametrize("name", NAMES)
def test_a_script_can_be_imported(name: str) -> None:
    assert load(name).__doc__
