"""Fixtures of the SLURM tier: it runs in make test-slurm only, on a cluster of its own."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
from cluster import Cluster, missing_programs
from slurm_site import SMALL, PipelineRun, Site, job_numbers


@pytest.fixture(scope="session")
def cluster() -> Iterator[Cluster]:
    """Nodes n1 and n2 (partitions main and urgent, which preempts main) and n3 (partition spare)."""
    if "ADVRM_TEST_SLURM" not in os.environ:
        pytest.skip("takes minutes: run make test-slurm")
    missing = missing_programs()
    if missing:
        pytest.skip(f"SLURM is not installed ({', '.join(missing)}): run tests/slurm/setup.sh as root")
    cluster = Cluster()
    try:
        yield cluster
    finally:
        cluster.close()


@pytest.fixture(scope="session")
def site(cluster: Cluster, tmp_path_factory: pytest.TempPathFactory) -> Site:
    return Site(cluster, tmp_path_factory.mktemp("site"))


@pytest.fixture(scope="session")
def pipeline(site: Site) -> PipelineRun:
    cluster, directory = site.cluster, site.home / "pipeline"
    settings = [*SMALL, "rl.max_steps=2", f"run_dir={directory}"]
    said = [site.submit_pipeline(*settings) for _ in range(2)]
    jobs = job_numbers(said[0])
    names = ",".join(cluster.job(job)["JobName"] for job in jobs.values())
    waiting = len(cluster.run("squeue", "--noheader", f"--name={names}").splitlines())
    cluster.run("scancel", jobs.pop("rlhf/r1"))  # what waits for it goes too
    report = jobs.pop("report")
    for job in jobs.values():
        site.completed(job)
    assert cluster.wait_for(report)["JobState"] == "CANCELLED"
    said.append(site.submit_pipeline(*settings))
    for job in job_numbers(said[-1]).values():
        site.completed(job)
    said.append(site.submit_pipeline(*settings))
    return PipelineRun(directory, said, waiting)
