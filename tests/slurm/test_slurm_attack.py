"""An attack as a heterogeneous job: real reward servers on nodes of their own, which die, or come back with it."""

from __future__ import annotations

import re
import signal
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest
from slurm_site import SMALL, PipelineRun, Site, steps
from tiny import TOKENIZER, tiny_config

from nemo_advrm.data.jsonl import read_jsonl
from nemo_advrm.data.messages import Message
from nemo_advrm.engine.runtime import Runtime
from nemo_advrm.rewards.sources import load_members
from nemo_advrm.rollouts.types import Rollouts

pytestmark = pytest.mark.timeout(1800)
STEPS = 60


@dataclass
class Attack:
    run_dir: Path
    members: list[str]
    lost: tuple[str, str, str]  # number, exit status and output of the job that lost a server
    job: str  # went on
    output: str
    running: list[str]  # jobs and components when it had ended


@pytest.fixture(scope="module")
def attack(site: Site, pipeline: PipelineRun) -> Attack:
    """A server is killed; the job is submitted again, told of its time limit, requeued, and goes on to the end."""
    cluster, run_dir = site.cluster, site.home / "attack"
    members = [str(pipeline.directory / "round_0" / f"rm_{k}" / "model") for k in (1, 2)]
    settings = [
        *SMALL,
        f"run_dir={run_dir}",
        f"pretrained_checkpoint.restore_from_path={pipeline.directory}/sft/model",
        f"rl.max_steps={STEPS}",
        "rl.prompts_per_step=4",
        "trainer.checkpoint_every_n_steps=5",
    ]
    variables = {"ADVRM_SERVE_SETTINGS": "trainer.accelerator=cpu", "ADVRM_GRACE": "10"}
    trajectory = run_dir / "attack" / "direction_1_policy_1"

    job = site.submit_attack(*members, "--", *settings, **variables)
    site.wait_for_steps(job, trajectory, 6, STEPS)
    site.process(job, "serve", f"run_dir={run_dir}/servers/2").send_signal(signal.SIGKILL)
    failed = cluster.wait_for(job)
    lost = (job, failed["ExitCode"], cluster.output(failed))

    job = site.submit_attack(*members, "--", *settings, **variables)
    site.wait_for_steps(job, trajectory, 12, STEPS)
    cluster.run("scancel", "--batch", "--signal=USR1", job)  # what --signal=B:USR1@120 does before the time limit
    site.start_requeued(job, 1)
    output = site.completed(job)
    return Attack(run_dir, members, lost, job, output, cluster.running())


def test_a_server_that_dies_ends_the_job_and_is_named(attack: Attack) -> None:
    job, status, output = attack.lost
    assert status == "3:0"
    address = rf"http://127\.0\.0\.1:{30000 + (int(job) * 16 + 2) % 2700}"
    named = rf"error: the server of {re.escape(attack.members[1])} at {address} ended with status 137 under the attack"
    assert re.search(named, output), output
    assert "requeued" not in output


def test_the_signal_before_the_time_limit_saves_and_requeues_the_job(site: Site, attack: Attack) -> None:
    assert re.search(r"stopped by SIGUSR1 after step \d+, saved in", attack.output)
    assert "requeued: it goes on from its last checkpoint" in attack.output
    assert (
        f"goes on with ensemble.members=['http://127.0.0.1:{30000 + (int(attack.job) * 16 + 1) % 2700}'"
        in attack.output
    )
    assert steps(attack.run_dir / "attack" / "direction_1_policy_1") == list(range(STEPS))


def test_servers_end_with_the_attack(site: Site, attack: Attack) -> None:
    assert attack.running == []
    assert attack.output.count("serving reward_model at http://0.0.0.0:") == 4
    assert not list(attack.run_dir.glob("servers/*/server.json"))  # each took its announcement back
    assert "did not end" not in attack.output
    assert not [p for p in psutil.process_iter() if "serve" in _words(p) and str(attack.run_dir) in " ".join(_words(p))]


def _words(process: psutil.Process) -> list[str]:
    try:
        return process.cmdline()
    except psutil.Error:
        return []


def test_the_scores_of_the_servers_are_those_of_the_models(single: Runtime, attack: Attack) -> None:
    members = load_members(tiny_config(), attack.members, TOKENIZER)
    rows: list[dict[str, Any]] = [row for _, row in read_jsonl(attack.run_dir / "reference.jsonl")]
    samples = [row for _, row in read_jsonl(attack.run_dir / "attack" / "samples.jsonl")]
    assert len(rows) == 16 * 3 and len(samples) == STEPS * 4 * 4
    rows += samples[::7]
    for k, member in enumerate(members):
        scores = member.score(_rollouts(rows)).tolist()
        assert [row["scores"][k] for row in rows] == pytest.approx(scores, abs=1e-4)
    # the members are not one model: two scores that are nearer to each other than the tolerance are a coincidence
    assert sum(abs(row["scores"][0] - row["scores"][1]) > 1e-3 for row in rows) > 0.9 * len(rows)


def _rollouts(rows: list[dict[str, Any]]) -> Rollouts:
    prompts: list[tuple[Message, ...]] = [(Message(role="user", content=row["prompt"]),) for row in rows]
    none: list[list[int]] = [[] for _ in rows]
    responses, ended = [row["response"] for row in rows], [row["ended"] for row in rows]
    return Rollouts(prompts, responses, ended, none, none, [0] * len(rows), fingerprint="")


def test_a_server_that_does_not_start_ends_the_attack(site: Site) -> None:
    job = site.submit_attack("rm_a", "rm_b", "--", "run_dir=out", ADVRM_COMMAND="false")
    shown = site.cluster.wait_for(job)
    assert (shown["JobState"], shown["ExitCode"]) == ("FAILED", "2:0")
    assert re.search(
        r"error: the server of rm_a at http://127\S+ ended before it was ready", site.cluster.output(shown)
    )


def test_a_server_that_is_not_ready_in_time_ends_the_attack(site: Site) -> None:
    hangs = site.script("hangs", "exec sleep 120\n")
    job = site.submit_attack("rm_a", "rm_b", "--", "run_dir=out", ADVRM_COMMAND=hangs, ADVRM_SERVER_MINUTES="0")
    shown = site.cluster.wait_for(job)
    assert (shown["JobState"], shown["ExitCode"]) == ("FAILED", "2:0")
    found = re.search(
        r"error: the server of rm_a at (http://\S+) was not ready within 0 min", site.cluster.output(shown)
    )
    assert found and found[1] == f"http://127.0.0.1:{30000 + (int(job) * 16 + 1) % 2700}"
    site.cluster.wait_until_idle()  # the servers end with the job
