"""Trainings of the shipped scripts on a real SLURM: two nodes, lost processes, preemption, time limits, user errors."""

from __future__ import annotations

import hashlib
import json
import re
import signal
import time
from pathlib import Path

import pytest
from slurm_site import Site, steps

pytestmark = pytest.mark.timeout(1800)

STEPS = 40
TRAINING = [
    "model=tiny",
    "trainer.accelerator=cpu",
    "trainer.timeout_minutes=2",
    "exp_manager.create_tensorboard_logger=false",
    "model.global_batch_size=16",
    "model.micro_batch_tokens=1024",
    "model.hidden_dropout=0.1",
    f"trainer.max_steps={STEPS}",
    "trainer.checkpoint_every_n_steps=5",
]


def train(site: Site, run_dir: Path) -> str:
    pairs = site.home / "pairs.jsonl"
    rows = (
        {"prompt": f"What is {i} plus {i % 7}?", "chosen": f"It is {i + i % 7}.", "rejected": "no " * (1 + i % 5)}
        for i in range(64)
    )
    pairs.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return site.sbatch("train_rm.sbatch", *TRAINING, f"data.train_path={pairs}", f"run_dir={run_dir}")


def weights(run_dir: Path) -> dict[str, str]:
    """Hash of every file of the trained weights that holds tensors."""
    files = sorted((run_dir / "model" / "weights").glob("*.distcp"))
    assert files
    return {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


@pytest.fixture(scope="module")
def limited(site: Site) -> str:
    """A job on the spare node whose command only waits; its time limit is near from the start."""
    patient = site.script(
        "patient",
        "[[ ${SLURM_RESTART_COUNT:-0} == 0 ]] || { echo went on; exit 0; }\n"
        "trap 'echo saved; exit 75' USR1\nfor _ in {1..1200}; do sleep 0.1; done\n",
    )
    return site.sbatch("train_rm.sbatch", options=("--partition=spare", "--time=1"), ADVRM_COMMAND=patient)


@pytest.fixture(scope="module")
def unbroken(site: Site, limited: str) -> Path:
    run_dir = site.home / "unbroken"
    job = train(site, run_dir)
    assert "reward model: " in site.completed(job)
    assert site.cluster.job(job)["NodeList"] == "n[1-2]"
    return run_dir


@pytest.fixture(scope="module")
def disturbed(site: Site, unbroken: Path) -> dict[str, str]:
    """A training that lost a rank, was submitted again, was told of its time limit, and had to give way to a job."""
    run_dir = site.home / "disturbed"
    job = train(site, run_dir)
    site.wait_for_steps(job, run_dir, 3, STEPS)
    killed_at = time.monotonic()
    site.process(job, "train_rm", rank=1).send_signal(signal.SIGKILL)
    failed = site.cluster.wait_for(job)
    found = {"failed": failed["JobState"], "code": failed["ExitCode"], "output": site.cluster.output(failed)}
    found["seconds"] = str(time.monotonic() - killed_at)

    job = train(site, run_dir)
    site.wait_for_steps(job, run_dir, 6, STEPS)
    site.cluster.run("scancel", "--batch", "--signal=USR1", job)  # what --signal=B:USR1@120 does before the time limit
    site.start_requeued(job, 1)
    found["signalled"] = site.cluster.output(site.cluster.job(job))
    site.wait_for_steps(job, run_dir, 18, STEPS)
    urgent = ("--partition=urgent", "--nodes=2", "--exclusive", "--output=/dev/null", "--wrap=true")
    first = site.cluster.run("sbatch", "--parsable", f"--chdir={site.home}", *urgent).strip()
    site.start_requeued(job, 2)
    site.completed(first)
    last = site.cluster.wait_for(job)
    found.update(last=last["JobState"], restarts=last["Restarts"], all_output=site.cluster.output(last))
    return found


def test_a_user_error_ends_the_job_at_once(site: Site) -> None:
    job = site.cluster.wait_for(site.sbatch("train_rm.sbatch", "trainer.max_stepz=1"))
    assert (job["JobState"], job["ExitCode"]) == ("FAILED", "2:0")
    output = site.cluster.output(job)
    assert "error: unknown key trainer.max_stepz: did you mean trainer.max_steps?" in output
    assert job["Restarts"] == "0"


def test_a_lost_process_ends_the_job_and_is_named_with_its_node(disturbed: dict[str, str]) -> None:
    assert disturbed["failed"] == "FAILED" and not disturbed["code"].startswith("0:")
    assert re.search(r"error: rank 0 on n1 lost rank 1 on n2: ", disturbed["output"])
    assert "n2: task 1: Killed" in disturbed["output"]
    assert float(disturbed["seconds"]) < 120


def test_the_signal_before_the_time_limit_saves_and_requeues_the_job(disturbed: dict[str, str]) -> None:
    output = disturbed["signalled"]
    order = [
        "signal USR1: the tasks are told to save and end",
        "stopped by SIGUSR1 after step ",
        "requeued: it goes on",
    ]
    assert sorted(order, key=output.index) == order


def test_a_job_that_slurm_preempts_saves_within_its_grace(disturbed: dict[str, str]) -> None:
    output = disturbed["all_output"]
    assert re.search(
        r"stopped by (SIGTERM|SIGUSR1|a signal to another rank) after step (1[89]|[23]\d), saved in", output
    )
    assert output.count("requeued: it goes on from its last checkpoint") == 2


def test_the_disturbed_training_ends_with_the_weights_of_the_unbroken_one(
    site: Site, unbroken: Path, disturbed: dict[str, str]
) -> None:
    assert (disturbed["last"], disturbed["restarts"]) == ("COMPLETED", "2"), disturbed["all_output"]
    assert weights(site.home / "disturbed") == weights(unbroken)
    assert steps(site.home / "disturbed") == steps(unbroken) == list(range(1, STEPS + 1))


def test_the_time_limit_saves_and_requeues(site: Site, limited: str) -> None:
    site.start_requeued(limited, 1)
    output = site.completed(limited)
    order = ["signal USR1: the tasks are told to save and end", "saved", "requeued", "went on"]
    assert sorted(order, key=output.index) == order


def test_a_cancelled_job_is_not_requeued(site: Site) -> None:
    stubborn = site.script("stubborn", "trap 'exit 75' USR1 TERM\necho here\nfor _ in {1..600}; do sleep 0.1; done\n")
    job = site.sbatch("train_rm.sbatch", options=("--partition=spare",), ADVRM_COMMAND=stubborn)
    site.until(lambda: "here" in site.cluster.output(site.cluster.job(job)), job)
    site.cluster.run("scancel", job)
    shown = site.cluster.wait_for(job)
    site.cluster.run("sleep", "1")
    assert site.cluster.job(job)["JobState"] == shown["JobState"] == "CANCELLED"
