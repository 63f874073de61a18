"""A user's working directory on the cluster: the shipped scripts are submitted from it, and jobs are disturbed."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import psutil
from cluster import FINAL_STATES, WAIT_SECONDS, Cluster

ROOT = Path(__file__).resolve().parents[2]
SCRIPTS = ROOT / "slurm"
# the embedded experiment, as small as it can be; the other stages start from what its pipeline made
SMALL = [
    "experiment=synthetic",
    "trainer.accelerator=cpu",
    "exp_manager.create_tensorboard_logger=false",
    "stage.sft.trainer.max_steps=20",
    "stage.train_rm.trainer.max_steps=6",
    "synthetic.sft_rows=500",
    "synthetic.preference_pairs=60",
    "synthetic.validation_pairs=20",
    "sft_statistics.num_prompts=16",
    "sft_statistics.samples_per_prompt=3",
    "adversarial.target_members=[1]",
    "adversarial.held_out_prompts=0",
    "rl.held_out_prompts=0",
    "reward_model.reference_features=[]",
    "ensemble.own_trunk=false",
    "pipeline.rounds=0",
    "pipeline.best_of_n=false",
    "pipeline.room=",
    "pipeline.rlhf.r1.standardise=false",  # as the stage of its own does with one member
    "~pipeline.rlhf.r1_kl",
    "~pipeline.rlhf.adv_rm",
    "~pipeline.rlhf.hybrid",
]


class Site:
    """Jobs get the paths of the repository and of ``home``, and one process a node."""

    def __init__(self, cluster: Cluster, home: Path) -> None:
        self.cluster = cluster
        self.home = home
        cluster.environment.update(ADVRM_HOME=str(ROOT), ADVRM_TASKS_PER_NODE="1", ADVRM_SITE=str(home / "site.sh"))

    def sbatch(self, script: str, *settings: str, options: tuple[str, ...] = ("--nodes=2",), **variables: str) -> str:
        """The number of a job of the shipped script."""
        command = ("sbatch", "--parsable", f"--chdir={self.home}", *options, str(SCRIPTS / script), *settings)
        return self.cluster.run(*command, **variables).strip()

    def submit_attack(self, *arguments: str, **variables: str) -> str:
        """The number of a heterogeneous job on all nodes."""
        variables = {"ADVRM_SBATCH": f"--partition=all --chdir={self.home}", **variables}
        shown = self.cluster.run(str(SCRIPTS / "submit_attack.sh"), *arguments, **variables)
        assert shown.startswith("Submitted batch job "), shown
        return shown.split()[-1]

    def submit_pipeline(self, *settings: str) -> dict[str, str]:
        """What submit_pipeline.sh says of each stage."""
        lines = self.cluster.run(str(SCRIPTS / "submit_pipeline.sh"), *settings, timeout=120).splitlines()
        return dict(line.split(": ", 1) for line in lines)

    def completed(self, job: str, timeout: float = WAIT_SECONDS) -> str:
        """Output of a job that must end well."""
        shown = self.cluster.wait_for(job, timeout=timeout)
        output = self.cluster.output(shown)
        assert shown["JobState"] == "COMPLETED", output
        return output

    def script(self, name: str, body: str) -> str:
        """Path of a program of the user's, to stand in ADVRM_COMMAND."""
        path = self.home / name
        path.write_text(f"#!/bin/bash\n{body}")
        path.chmod(0o755)
        return str(path)

    def process(self, job: str, *words: str, rank: int = 0) -> psutil.Process:
        """The process of one rank of the step of a job that has ``words`` in its command."""
        for process in psutil.process_iter():
            try:
                variables = process.environ()
                mine = variables.get("SLURM_JOB_ID") == job and variables.get("SLURM_PROCID") == str(rank)
                # not srun or slurmstepd, nor the batch script, which is not in a step
                if mine and "SLURM_STEP_NUM_TASKS" in variables and set(words) <= set(process.cmdline()[2:]):
                    return process
            except psutil.Error:
                continue
        raise AssertionError(f"job {job} has no process of rank {rank}\n{self.cluster.output(self.cluster.job(job))}")

    def wait_for_steps(self, job: str, run_dir: Path, count: int, last: int) -> None:
        """Until ``count`` of ``last`` steps are logged."""
        self.until(lambda: len(steps(run_dir)) >= count, job)
        assert len(steps(run_dir)) < last, "the training ended before it could be disturbed"

    def until(self, ready: Callable[[], bool], job: str, seconds: float = WAIT_SECONDS) -> None:
        deadline = time.monotonic() + seconds
        while not ready():
            shown = self.cluster.job(job)
            assert shown["JobState"] not in FINAL_STATES, f"{shown}\n{self.cluster.output(shown)}"
            assert time.monotonic() < deadline, f"{shown}\n{self.cluster.output(shown)}"
            time.sleep(0.1)

    def start_requeued(self, job: str, restarts: int) -> None:
        """Wait for the requeue and take the two minutes off that SLURM lets pass before a requeued job starts."""
        requeued = ("PENDING", "RUNNING", "COMPLETED")  # the last two where this comes late
        self.until(lambda: self.cluster.job(job)["Restarts"] == str(restarts), job)
        self.until(lambda: self.cluster.job(job)["JobState"] in requeued, job)
        # within one second of the requeue a node takes the job for the one that has just been ended
        time.sleep(2)
        self.cluster.run("scontrol", "update", f"JobId={job}", "StartTime=now", check=False)


def metrics(run_dir: Path) -> list[dict[str, float]]:
    """Rows of the training's metrics.jsonl so far."""
    path = run_dir / "metrics.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines() if line.endswith("}")] if path.exists() else []
    return [row for row in rows if "loss" in row or "train/loss" in row]


def steps(run_dir: Path) -> list[float]:
    return [row["step"] for row in metrics(run_dir)]


def job_numbers(said: dict[str, str]) -> dict[str, str]:
    """The job of each stage in what submit_pipeline.sh says."""
    return {name: found[1] for name, text in said.items() if (found := re.search(r"job (\d+)", text))}


@dataclass
class PipelineRun:
    """A finished pipeline whose RLHF was cancelled on the way, and what submit_pipeline.sh said each time."""

    directory: Path
    said: list[dict[str, str]]
    waiting: int  # jobs in the queue after two submissions
