"""The batch scripts without a SLURM: what they ask srun for, in containers too, and what they make of its status."""

from __future__ import annotations

import json
import os
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
from slurm_site import ROOT, SCRIPTS

# commands of SLURM that only note how they were called; each call is a file, for two steps may start at once
_SRUN = """\
#!/bin/bash
python3 - "$@" <<'END'
import json, os, sys, uuid
names = ("MASTER_ADDR", "OMP_NUM_THREADS", "NEMO_ADVRM_TOKEN", "NO_PROXY")
call = {"arguments": sys.argv[1:], **{name: os.environ.get(name) for name in names}}
open(os.path.join(os.environ["CALLS"], f"{uuid.uuid4()}.json"), "w").write(json.dumps(call))
END
if [[ " $* " == *" serve "* ]]; then
    until [[ -e $CALLS/end || (-n ${SERVER_STATUS:-} && -e $CALLS/${SERVERS_END_AFTER:-policy}) ]]; do sleep 0.05; done
    exit "${SERVER_STATUS:-0}"
fi
touch "$CALLS/policy"
if [[ -n ${SAVE_SECONDS:-} ]]; then # the time limit comes, and this needs a while to save
    trap 'touch "$CALLS/stopped"' USR1
    kill -USR1 "$PPID"
    until [[ -e $CALLS/stopped ]]; do sleep 0.05; done
    for ((i = 0; i < 10 * SAVE_SECONDS; i++)); do sleep 0.1; done
    exit "${SRUN_STATUS:-0}"
fi
[[ -z ${SERVER_STATUS:-} ]] || while sleep 0.05; do :; done # until USR1
exit "${SRUN_STATUS:-0}"
"""
_SCONTROL = """\
#!/bin/bash
case "$1 $2" in
    "show hostnames") tr ' ' '\\n' <<<"$3" ;;
    "show node") echo "NodeName=$3 NodeAddr=$3.cluster" ;;
    *) echo "scontrol $*" ;;
esac
"""
_SCANCEL = """\
#!/bin/bash
echo "scancel $*"
touch "$CALLS/end"
"""
_OTHERS = {"scancel": _SCANCEL, "squeue": "#!/bin/bash\necho RUNNING\n", "curl": "#!/bin/bash\nexit 0\n"}


@pytest.fixture
def calls(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    programs = tmp_path / "bin"
    programs.mkdir()
    for name, text in {"srun": _SRUN, "scontrol": _SCONTROL, **_OTHERS}.items():
        (programs / name).write_text(text)
        (programs / name).chmod(0o755)
    for name in [name for name in os.environ if name.startswith(("SLURM", "SBATCH", "ADVRM_", "OMP", "NEMO_ADVRM"))]:
        monkeypatch.delenv(name)
    monkeypatch.delenv("no_proxy", raising=False)
    monkeypatch.setenv("PATH", f"{programs}:{os.environ['PATH']}")
    monkeypatch.setenv("CALLS", str(tmp_path / "calls"))
    monkeypatch.setenv("ADVRM_SITE", str(tmp_path / "site.sh"))
    monkeypatch.setenv("SLURM_SUBMIT_DIR", str(ROOT))
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    monkeypatch.setenv("SLURM_JOB_NODELIST", "a b")
    monkeypatch.setenv("SLURM_CPUS_ON_NODE", "64")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "calls").mkdir()
    return tmp_path / "calls"


def run(script: str, *settings: str, **variables: str) -> subprocess.CompletedProcess[str]:
    command = ["bash", str(SCRIPTS / script), *settings]
    return subprocess.run(command, env={**os.environ, **variables}, capture_output=True, text=True, timeout=60)


def recorded(calls: Path) -> list[dict[str, Any]]:
    """What srun was asked for; steps of one job may start in any order."""
    return [json.loads(file.read_text()) for file in calls.glob("*.json")]


@pytest.mark.parametrize("script", sorted(path.name for path in SCRIPTS.iterdir()))
def test_the_syntax_is_right(script: str) -> None:
    subprocess.run(["bash", "-n", str(SCRIPTS / script)], check=True, timeout=20)


def test_one_process_per_gpu_with_its_share_of_the_cores(calls: Path) -> None:
    done = run("train_rm.sbatch", "model=tiny", "name=a b", ADVRM_COMMAND="/opt/nemo-advrm", SLURM_GPUS_ON_NODE="8")
    assert done.returncode == 0, done.stderr
    (call,) = recorded(calls)
    options, program = call["arguments"], call["arguments"].index("/opt/nemo-advrm")
    wanted = {"--nodes=2", "--ntasks-per-node=8", "--cpus-per-task=8", "--wait=30", "--kill-on-bad-exit=0"}
    assert wanted == set(options[:program])
    assert options[program + 1 :] == ["train_rm", "model=tiny", "name=a b", "trainer.num_nodes=2", "trainer.devices=8"]
    assert (call["MASTER_ADDR"], call["OMP_NUM_THREADS"]) == ("a.cluster", "8")


@pytest.mark.parametrize("script", ["train_rm.sbatch", "convert.sbatch"])
def test_the_container_of_the_site(calls: Path, tmp_path: Path, script: str) -> None:
    example = (SCRIPTS / "site.sh.example").read_text()
    (tmp_path / "site.sh").write_text(re.sub(r"^# (export ADVRM_)", r"\1", example, flags=re.M))
    assert run(script, "path=x").returncode == 0
    (call,) = recorded(calls)
    arguments = call["arguments"]
    program = arguments.index("nemo-advrm")  # the one of the image
    assert arguments[program + 1 : program + 3] == [script.removesuffix(".sbatch"), "path=x"]
    assert [option for option in arguments[:program] if "container" in option] == [
        "--container-image=/shared/images/nemo_advrm.sqsh",
        f"--container-workdir={tmp_path}",
        "--no-container-mount-home",
        "--container-mounts=/shared:/shared",
    ]


def test_the_repository_is_mounted_where_the_site_names_nothing_else(calls: Path) -> None:
    assert run("train_rm.sbatch", ADVRM_CONTAINER_IMAGE="image.sqsh").returncode == 0
    assert f"--container-mounts={ROOT}:{ROOT}" in recorded(calls)[0]["arguments"]


HET = {
    "SLURM_HET_SIZE": "3",
    "SLURM_JOB_NODELIST_HET_GROUP_0": "a b",
    "SLURM_JOB_NODELIST_HET_GROUP_1": "c d",
    "SLURM_JOB_NODELIST_HET_GROUP_2": "e",
    "ADVRM_MEMBERS": "rm_1/model rm_2/model",
    "ADVRM_SERVE_SETTINGS": "parallel=tp2",
    "ADVRM_TASKS_SERVE": "1",
    "ADVRM_TASKS_PER_NODE": "4",
    "ADVRM_CONTAINER_IMAGE": "image.sqsh",
    "ADVRM_GRACE": "1",
}


def test_servers_start_on_their_components_and_end_with_the_attack(calls: Path) -> None:
    done = run("attack.sbatch", "run_dir=out", **HET, NO_PROXY="the.site")
    assert done.returncode == 0, done.stderr
    assert "scancel --quiet --signal=TERM 7" in done.stdout
    by_group = sorted(recorded(calls), key=lambda call: min(w for w in call["arguments"] if "--het-group=" in w))
    policy, *servers = by_group
    assert all("--container-image=image.sqsh" in call["arguments"] for call in by_group)
    for k, (call, host) in enumerate(zip(servers, ("c", "e"), strict=True), start=1):
        words = call["arguments"]
        assert {f"--het-group={k}", f"--nodes={3 - k}", "--ntasks-per-node=1"} <= set(words)
        stage = ["serve", "parallel=tp2", f"run_dir=out/servers/{k}", f"ensemble.members=[rm_{k}/model]"]
        address = ["serve.host=0.0.0.0", f"serve.port={30112 + k}"]
        start = words.index("nemo-advrm") + 1
        assert words[start:] == [*stage, *address, f"trainer.num_nodes={3 - k}", "trainer.devices=1"]
        assert call["MASTER_ADDR"] == f"{host}.cluster"
    words = policy["arguments"]
    assert {"--het-group=0", "--nodes=2", "--ntasks-per-node=4"} <= set(words)
    assert "ensemble.members=[http://c.cluster:30113,http://e.cluster:30114]" in words
    assert policy["NO_PROXY"] == "the.site,c.cluster,e.cluster"
    assert {call["NEMO_ADVRM_TOKEN"] for call in servers} == {policy["NEMO_ADVRM_TOKEN"]}
    assert re.fullmatch("[0-9a-f]{32}", policy["NEMO_ADVRM_TOKEN"])


@pytest.mark.parametrize(
    ("server", "status", "requeued"), [(0, 138, True), (143, 138, True), (137, 3, False), (2, 3, False)]
)
def test_a_server_that_ends_under_the_attack_ends_the_job(
    calls: Path, server: int, status: int, requeued: bool
) -> None:
    """SLURM tells all steps to end, by TERM, when it preempts a job: such an end of a server is no fault."""
    done = run("attack.sbatch", "run_dir=out", **HET, SERVER_STATUS=str(server))
    assert done.returncode == status, done.stderr
    assert ("scontrol requeue 7" in done.stdout) == requeued
    # both end: whichever is seen first is named
    either = r"(rm_1/model at http://c\.cluster:30113|rm_2/model at http://e\.cluster:30114)"
    lost = rf"error: the server of {either} ended with status {server} under the attack"
    assert bool(re.search(lost, done.stderr)) == (not requeued)


def test_a_server_that_ends_after_the_time_limit_was_told_is_no_fault(calls: Path) -> None:
    late = {"SERVER_STATUS": "137", "SERVERS_END_AFTER": "stopped", "SAVE_SECONDS": "3", "SRUN_STATUS": "2"}
    done = run("attack.sbatch", "run_dir=out", **HET | {"ADVRM_GRACE": "5"}, **late)
    assert done.returncode == 2, done.stderr
    assert done.stdout.count("scontrol requeue 7") == 1
    assert "under the attack" not in done.stderr and "no end within" not in done.stderr


@pytest.mark.parametrize(
    ("status", "restarts", "requeued"),
    [
        *((status, 0, False) for status in (0, 1, 2, 3, 137)),
        *((status, 0, True) for status in (75, 138)),
        *((75, restarts, restarts < 100) for restarts in (99, 100)),
    ],
)
def test_a_job_that_was_stopped_and_saved_is_requeued(calls: Path, status: int, restarts: int, requeued: bool) -> None:
    done = run("rlhf.sbatch", ADVRM_COMMAND="x", SRUN_STATUS=str(status), SLURM_RESTART_COUNT=str(restarts))
    assert done.returncode == status
    assert ("scontrol requeue 7" in done.stdout) == requeued
    assert ("error: job 7 ended with status" in done.stderr) == (status not in (0, 75, 138))


def test_without_the_program_the_job_says_so(calls: Path, tmp_path: Path) -> None:
    (tmp_path / "slurm").symlink_to(SCRIPTS)
    done = run("sft.sbatch", SLURM_SUBMIT_DIR=str(tmp_path), PATH=f"{tmp_path}/bin:/usr/bin:/bin")
    assert done.returncode == 2 and "error: nemo-advrm is not on the path: set ADVRM_COMMAND" in done.stderr
