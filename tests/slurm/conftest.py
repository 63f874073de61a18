"""Fixtures of the SLURM tier: it runs in make test-slurm only, on a cluster of its own."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from cluster import Cluster, missing_programs


@pytest.fixture(scope="session")
def cluster() -> Iterator[Cluster]:
    """Nodes n1 and n2 (partition main) and n3 (partition spare)."""
    if "ADVRM_TEST_SLURM" not in os.environ:
        pytest.skip("takes minutes: run make test-slurm")
    missing = missing_programs()
    if missing:
        pytest.skip(f"SLURM is not installed ({', '.join(missing)}): run tests/slurm/setup.sh as root")
    home = Path(tempfile.mkdtemp(prefix="advrm-slurm-"))  # short: a socket's path may have 107 characters
    cluster = None
    try:
        cluster = Cluster(home)
        yield cluster
    finally:
        if cluster is not None:
            cluster.close()
        shutil.rmtree(home, ignore_errors=True)
