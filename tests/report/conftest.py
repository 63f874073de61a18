"""The fake run that the tests of the report share."""

from __future__ import annotations

from pathlib import Path

import pytest
from fake_run import HARDENED_GOLD, PLAIN_GOLD, SECONDS, write_rlhf, write_round, write_state


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    """One hardening: round 0 (12 pairs) and round 1 (measured, no pairs); RLHF with r1 and adv_rm."""
    root = tmp_path / "run"
    root.mkdir()
    write_state(root, SECONDS)
    write_round(root, 0, accuracy=(0.75, 0.7), pairs=12)
    write_round(root, 1, accuracy=(0.72, 0.71), pairs=0)
    write_rlhf(root, "adv_rm", HARDENED_GOLD)
    write_rlhf(root, "r1", PLAIN_GOLD)
    return root
