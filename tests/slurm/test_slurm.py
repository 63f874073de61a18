"""The shipped SLURM scripts on a real SLURM: two nodes, lost processes, preemption, the pipeline, user errors."""

from __future__ import annotations

import hashlib
import json
import re
import signal
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
from cluster import FINAL_STATES, Cluster

ROOT = Path(__file__).resolve().parents[2]
SCRIPTS = ROOT / "slurm"
pytestmark = pytest.mark.timeout(900)

TINY = [
    "model=tiny",
    "trainer.accelerator=cpu",
    "trainer.timeout_minutes=2",
    "exp_manager.create_tensorboard_logger=false",
]
STEPS = 40
TRAINING = [
    *TINY,
    "model.global_batch_size=16",
    "model.micro_batch_tokens=1024",
    "model.hidden_dropout=0.1",
    f"trainer.max_steps={STEPS}",
    "trainer.checkpoint_every_n_steps=5",
]


class Site:
    """A user's working directory on the cluster."""

    def __init__(self, cluster: Cluster, home: Path) -> None:
        self.cluster = cluster
        self.home = home
        cluster.environment.update(ADVRM_HOME=str(ROOT), ADVRM_TASKS_PER_NODE="1", ADVRM_SITE=str(home / "site.sh"))
        rows = (
            {"prompt": f"What is {i} plus {i % 7}?", "chosen": f"It is {i + i % 7}.", "rejected": "no " * (1 + i % 5)}
            for i in range(64)
        )
        (home / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

    def sbatch(self, script: str, *settings: str, options: tuple[str, ...] = ("--nodes=2",), **variables: str) -> str:
        """The number of a job of the shipped script."""
        command = ("sbatch", "--parsable", f"--chdir={self.home}", *options, str(SCRIPTS / script), *settings)
        return self.cluster.run(*command, **variables).strip()

    def train(self, run_dir: Path) -> str:
        return self.sbatch(
            "train_rm.sbatch", *TRAINING, f"data.train_path={self.home}/pairs.jsonl", f"run_dir={run_dir}"
        )

    def rank(self, job: str, rank: int) -> psutil.Process:
        """The process of one rank of a job's step."""
        for process in psutil.process_iter():
            try:
                variables = process.environ()
                mine = variables.get("SLURM_JOB_ID") == job and variables.get("SLURM_PROCID") == str(rank)
                # not srun or slurmstepd, nor the batch script, which is not in a step
                if mine and "SLURM_STEP_NUM_TASKS" in variables and "train_rm" in process.cmdline()[2:3]:
                    return process
            except psutil.Error:
                continue
        raise AssertionError(f"job {job} has no process of rank {rank}\n{self.cluster.output(self.cluster.job(job))}")

    def wait_for_steps(self, job: str, run_dir: Path, count: int) -> None:
        """Until ``count`` steps are logged."""
        self.until(lambda: steps(run_dir)[-1:] >= [count], job)
        assert steps(run_dir)[-1] < STEPS, "the training ended before it could be disturbed"

    def until(self, ready: Callable[[], bool], job: str, seconds: float = 240) -> None:
        deadline = time.monotonic() + seconds
        while not ready():
            shown = self.cluster.job(job)
            assert shown["JobState"] not in FINAL_STATES, f"{shown}\n{self.cluster.output(shown)}"
            assert time.monotonic() < deadline, f"{shown}\n{self.cluster.output(shown)}"
            time.sleep(0.1)

    def start_requeued(self, job: str, restarts: int) -> None:
        """Wait for the requeue and take the two minutes off that SLURM lets pass before a requeued job starts."""
        self.until(lambda: self.cluster.job(job)["Restarts"] == str(restarts), job)
        self.until(lambda: self.cluster.job(job)["JobState"] == "PENDING", job)
        self.cluster.run("scontrol", "update", f"JobId={job}", "StartTime=now")


def steps(run_dir: Path) -> list[int]:
    path = run_dir / "metrics.jsonl"
    if not path.exists():
        return []
    rows = [json.loads(line) for line in path.read_text().splitlines() if line.endswith("}")]
    return [row["step"] for row in rows if "loss" in row or "train/loss" in row]


def weights(run_dir: Path) -> dict[str, str]:
    """Hash of every file of the trained weights that holds tensors."""
    files = sorted((run_dir / "model" / "weights").glob("*.distcp"))
    assert files
    return {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


@pytest.fixture(scope="module")
def site(cluster: Cluster, tmp_path_factory: pytest.TempPathFactory) -> Site:
    return Site(cluster, tmp_path_factory.mktemp("site"))


@pytest.fixture(scope="module")
def limited(site: Site) -> str:
    """A job on the spare node whose command only waits; its time limit is near from the start."""
    command = site.home / "patient"
    command.write_text(
        "#!/bin/bash\n[[ ${SLURM_RESTART_COUNT:-0} == 0 ]] || { echo went on; exit 0; }\n"
        "trap 'echo saved; exit 75' USR1\nfor _ in {1..1200}; do sleep 0.1; done\n"
    )
    command.chmod(0o755)
    options = ("--partition=spare", "--time=1")
    return site.sbatch("train_rm.sbatch", options=options, ADVRM_COMMAND=str(command))


@pytest.fixture(scope="module")
def unbroken(site: Site, limited: str) -> Path:
    run_dir = site.home / "unbroken"
    job = site.cluster.wait_for(site.train(run_dir))
    assert job["JobState"] == "COMPLETED", site.cluster.output(job)
    assert job["NodeList"] == "n[1-2]" and "reward model: " in site.cluster.output(job)
    return run_dir


@pytest.fixture(scope="module")
def disturbed(site: Site, unbroken: Path) -> dict[str, str]:
    """A training that lost a rank, was submitted again, got a signal to one rank, and was requeued in mid-step."""
    run_dir = site.home / "disturbed"
    job = site.train(run_dir)
    site.wait_for_steps(job, run_dir, 3)
    found = {"killed_at": str(time.monotonic())}
    site.rank(job, 1).send_signal(signal.SIGKILL)
    failed = site.cluster.wait_for(job)
    found.update(failed=failed["JobState"], code=failed["ExitCode"], output=site.cluster.output(failed))
    found["seconds"] = str(time.monotonic() - float(found["killed_at"]))

    job = site.train(run_dir)
    site.wait_for_steps(job, run_dir, 6)
    site.rank(job, 1).send_signal(signal.SIGUSR1)
    site.start_requeued(job, 1)
    found["signalled"] = site.cluster.output(site.cluster.job(job))
    site.wait_for_steps(job, run_dir, 18)
    site.cluster.run("scontrol", "requeue", job)
    site.start_requeued(job, 2)
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


def test_a_signal_to_one_rank_saves_and_requeues_the_job(disturbed: dict[str, str]) -> None:
    assert "stopped by a signal to another rank after step " in disturbed["signalled"]
    assert "requeued: it goes on from its last checkpoint" in disturbed["signalled"]


def test_the_disturbed_training_ends_with_the_weights_of_the_unbroken_one(
    site: Site, unbroken: Path, disturbed: dict[str, str]
) -> None:
    assert (disturbed["last"], disturbed["restarts"]) == ("COMPLETED", "2"), disturbed["all_output"]
    assert weights(site.home / "disturbed") == weights(unbroken)
    assert steps(site.home / "disturbed") == steps(unbroken) == list(range(1, STEPS + 1))


def test_the_time_limit_saves_and_requeues(site: Site, limited: str) -> None:
    site.start_requeued(limited, 1)
    job = site.cluster.wait_for(limited)
    output = site.cluster.output(job)
    assert job["JobState"] == "COMPLETED", output
    order = ["signal USR1: the tasks are told to save and end", "saved", "requeued", "went on"]
    assert sorted(order, key=output.index) == order


def test_a_cancelled_job_is_not_requeued(site: Site) -> None:
    command = site.home / "stubborn"
    command.write_text("#!/bin/bash\ntrap 'exit 75' USR1 TERM\necho here\nfor _ in {1..600}; do sleep 0.1; done\n")
    command.chmod(0o755)
    job = site.sbatch("train_rm.sbatch", options=("--partition=spare",), ADVRM_COMMAND=str(command))
    site.until(lambda: "here" in site.cluster.output(site.cluster.job(job)), job)
    site.cluster.run("scancel", job)
    shown = site.cluster.wait_for(job)
    site.cluster.run("sleep", "1")
    assert site.cluster.job(job)["JobState"] == shown["JobState"] == "CANCELLED"


def submit_attack(site: Site, *arguments: str, **variables: str) -> str:
    command = (str(SCRIPTS / "submit_attack.sh"), *arguments)
    variables = {"ADVRM_SBATCH": f"--partition=all --chdir={site.home}", **variables}
    shown = site.cluster.run(*command, **variables)
    assert shown.startswith("Submitted batch job "), shown
    return shown.split()[-1]


def test_an_attack_has_a_component_for_the_policy_and_one_for_each_reward_model(site: Site) -> None:
    stand_in = str(Path(__file__).with_name("stand_in.py"))
    job = submit_attack(site, "rm_a", "rm_b", "--", "run_dir=out", ADVRM_COMMAND=stand_in)
    output = site.cluster.output(shown := site.cluster.wait_for(job))
    assert shown["JobState"] == "COMPLETED", output
    found = re.findall(r"^(attack on n\d out 1|\[rm_.\] on n\d known)$", output, re.M)
    assert [line.split(" on ")[0] for line in found] == ["attack", "[rm_a]", "[rm_b]"]
    assert len({re.search(r"n\d", line)[0] for line in found}) == 3  # type: ignore[index]


def test_a_server_that_does_not_start_ends_the_attack(site: Site) -> None:
    job = submit_attack(site, "rm_a", "rm_b", "--", "run_dir=out", ADVRM_COMMAND="false")
    shown = site.cluster.wait_for(job)
    assert (shown["JobState"], shown["ExitCode"]) == ("FAILED", "2:0")
    assert "the server of rm_a at http://127.0.0.1:" in site.cluster.output(shown)


SMALL_PIPELINE = [
    "experiment=synthetic",
    "trainer.accelerator=cpu",
    "stage.sft.trainer.max_steps=20",
    "stage.train_rm.trainer.max_steps=6",
    "rl.max_steps=2",
    "synthetic.sft_rows=500",
    "synthetic.preference_pairs=60",
    "synthetic.validation_pairs=20",
    "reference.num_prompts=16",
    "reference.samples_per_prompt=3",
    "adversarial.policies=1",
    "adversarial.directions=[1]",
    "pipeline.rounds=0",
    "~pipeline.rlhf.ensemble_mean",
    "~pipeline.rlhf.lcb",
    "~pipeline.rlhf.adv_rm",
]


def submit(site: Site, *settings: str) -> dict[str, str]:
    """What submit_pipeline.sh says of each stage."""
    lines = site.cluster.run(str(SCRIPTS / "submit_pipeline.sh"), *settings, timeout=120).splitlines()
    return dict(line.split(": ", 1) for line in lines)


def jobs_of(said: dict[str, str]) -> dict[str, str]:
    return {name: found[1] for name, text in said.items() if (found := re.search(r"job (\d+)", text))}


def test_the_pipeline_is_one_job_a_stage_and_submitting_again_doubles_nothing(site: Site) -> None:
    cluster, run_dir = site.cluster, site.home / "pipeline"
    settings = [*SMALL_PIPELINE, f"run_dir={run_dir}"]
    wrong = cluster.call(str(SCRIPTS / "submit_pipeline.sh"), f"run_dir={run_dir}", "pipeline.round=1", timeout=120)
    assert wrong.returncode == 2 and "did you mean pipeline.rounds?" in wrong.stderr

    first = submit(site, *settings)
    jobs = jobs_of(first)
    names = ["sft", "preferences", "round_0/rm_1", "round_0/rm_2", "round_0/reference", "round_0/attack", "rlhf/r1"]
    assert list(first) == [*names, "report"] and set(jobs) == set(first)
    assert all("submitted" in text for text in first.values())
    second = submit(site, *settings)
    assert jobs_of(second) == jobs and not any("submitted" in text for text in second.values())
    assert len(cluster.run("squeue", "--noheader", "--name=" + ",".join(_names(cluster, jobs))).splitlines()) == 8
    recorded = [line.split("\t")[:2] for line in (run_dir / "slurm" / "jobs.tsv").read_text().splitlines()]
    assert dict(recorded) == jobs

    # one stage is lost: what waits for it goes too, and submitting again brings back these two only
    cluster.run("scancel", jobs["rlhf/r1"])
    for name in names[:-1]:
        job = cluster.wait_for(jobs[name], timeout=400)
        assert job["JobState"] == "COMPLETED", cluster.output(job)
    assert cluster.wait_for(jobs["report"])["JobState"] == "CANCELLED"
    third = submit(site, *settings)
    assert {name for name, text in third.items() if text == "complete"} == set(names[:-1])
    assert {name for name, text in third.items() if "submitted" in text} == {"rlhf/r1", "report"}
    for job in jobs_of(third).values():
        shown = cluster.wait_for(job)
        assert shown["JobState"] == "COMPLETED", cluster.output(shown)
    assert set(submit(site, *settings).values()) == {"complete"}
    assert (run_dir / "report" / "index.html").exists()
    state = json.loads((run_dir / "state.json").read_text())["stages"]
    assert set(state) == set(names) and all(stage["status"] == "complete" for stage in state.values())


def _names(cluster: Cluster, jobs: dict[str, str]) -> list[str]:
    return [cluster.job(job)["JobName"] for job in jobs.values()]
