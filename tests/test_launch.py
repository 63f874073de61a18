"""Starting processes: the exit status is that of the first process that failed, and signals reach them."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import psutil
import pytest

from nemo_advrm import cli, parent_process
from nemo_advrm.rank_info import RankInfo

TORCHRUN = ("RANK", "WORLD_SIZE", "LOCAL_RANK")
VARIABLES = (*TORCHRUN, "SLURM_PROCID", "SLURM_NTASKS", "SLURM_LOCALID", "SLURM_STEP_NUM_TASKS")


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ({}, RankInfo(0, 1, 0)),
        ({"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1"}, RankInfo(5, 8, 1)),
        # a step that srun started
        (
            {"SLURM_PROCID": "3", "SLURM_LOCALID": "1", "SLURM_NTASKS": "4", "SLURM_STEP_NUM_TASKS": "4"},
            RankInfo(3, 4, 1),
        ),
        # torchrun inside a step of one task a node
        (
            {"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "SLURM_PROCID": "1", "SLURM_STEP_NUM_TASKS": "2"},
            RankInfo(5, 8, 1),
        ),
        # a batch script without srun is one process, however many tasks were allocated
        ({"SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_NTASKS": "4"}, RankInfo(0, 1, 0)),
    ],
)
def test_rank_of_a_process(monkeypatch: pytest.MonkeyPatch, variables: dict[str, str], expected: RankInfo) -> None:
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert RankInfo.from_environment() == expected


def launch(script: str, **options: object) -> subprocess.Popen[str]:
    """A process that starts two processes of ``script`` as the command line does and exits with their status."""
    code = f"import sys; from nemo_advrm.launch import _run; sys.exit(_run([sys.executable, '-c', {script!r}], 2))"
    environment = {k: v for k, v in os.environ.items() if k not in VARIABLES}
    return subprocess.Popen([sys.executable, "-c", code], env=environment, stderr=subprocess.PIPE, text=True, **options)  # type: ignore[call-overload,no-any-return]


@pytest.mark.parametrize(
    ("script", "status", "told"),
    [
        ("pass", 0, ""),
        # a user's error of all processes, and of the second only
        ("raise SystemExit(2)", 2, ""),
        ("import os, time; time.sleep(60 * (os.environ['RANK'] == '0')); raise SystemExit(2)", 2, ""),
        ("raise SystemExit(75)", 75, ""),
        ("import os, time; os.environ['RANK'] == '1' and os.kill(os.getpid(), 9); time.sleep(60)", 137, "rank 1 on "),
    ],
)
def test_the_exit_status_is_that_of_the_first_process_that_failed(script: str, status: int, told: str) -> None:
    process = launch(script)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == status, errors
    assert told in errors


_WAITING = (
    "import os, signal, sys, time; from pathlib import Path; "
    "signal.signal(signal.{name}, lambda *_: sys.exit({status})); "
    "Path({home!r}, os.environ['RANK']).touch(); time.sleep(60)"
)


@pytest.mark.parametrize(("name", "status"), [("SIGUSR1", 75), ("SIGTERM", 75), ("SIGTERM", 0)])
def test_a_signal_is_handed_to_the_processes_whose_status_counts(tmp_path: Path, name: str, status: int) -> None:
    process = launch(_WAITING.format(name=name, status=status, home=str(tmp_path)))
    deadline = time.monotonic() + 60
    while len(list(tmp_path.iterdir())) < 2:
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.05)
    process.send_signal(getattr(signal, name))
    process.communicate(timeout=60)
    assert process.returncode == status


def test_a_signal_reaches_processes_that_start_later_and_one_that_cannot_hear_it_yet_loses_nothing() -> None:
    code = (
        "import os, signal, sys; from nemo_advrm import launch, signals\n"
        "with signals.owned():\n"
        "    os.kill(os.getpid(), signal.SIGTERM)\n"
        "    sys.exit(launch._run([sys.executable, '-c', 'import time; time.sleep(60)'], 2))"
    )
    environment = {k: v for k, v in os.environ.items() if k not in VARIABLES}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=60)
    assert done.returncode == 75
    assert done.stderr.splitlines()[-1] == "stopped by SIGTERM before the first step: nothing is lost"


# as a rank of the command does; with `deaf` it ignores TERM, as one that hangs
_RANK = """
import os, signal, sys, time
from pathlib import Path
from nemo_advrm import parent_process, signals
parent_process.SHUTDOWN_SECONDS = 1
home, deaf = Path({home!r}), {deaf}
with signals.owned():
    parent_process.end_with_parent()
    (home / f"pid_{{os.environ['RANK']}}").write_text(str(os.getpid()))
    while deaf or not signals.received():
        time.sleep(0.02)
    (home / f"saved_{{os.environ['RANK']}}").write_text(signals.received())
"""


def _runs(pid: int) -> bool:
    try:
        return bool(psutil.Process(pid).status() != psutil.STATUS_ZOMBIE)  # a container may have no init that reaps it
    except psutil.NoSuchProcess:
        return False


@pytest.mark.parametrize("deaf", [False, True])
def test_the_processes_end_when_their_launcher_is_killed(tmp_path: Path, deaf: bool) -> None:
    launcher = launch(_RANK.format(home=str(tmp_path), deaf=deaf))
    paths, deadline = [tmp_path / "pid_0", tmp_path / "pid_1"], time.monotonic() + 60
    while not all(path.exists() and path.read_text() for path in paths):
        assert time.monotonic() < deadline and launcher.poll() is None
        time.sleep(0.05)
    ranks = [int(path.read_text()) for path in paths]
    assert all(map(_runs, ranks))
    launcher.kill()
    launcher.communicate(timeout=60)
    while any(map(_runs, ranks)):
        assert time.monotonic() < deadline + 60, "a process outlives its launcher"
        time.sleep(0.05)
    saved = {path.name: path.read_text() for path in tmp_path.glob("saved_*")}
    assert saved == ({} if deaf else {"saved_0": "SIGTERM", "saved_1": "SIGTERM"})


def test_processes_of_another_launcher_are_not_watched(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "0")  # torchrun's
    monkeypatch.setenv("WORLD_SIZE", "2")
    before = threading.active_count()
    parent_process.end_with_parent()
    assert threading.active_count() == before


def test_a_process_whose_launcher_is_gone_already_starts_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    with parent_process.inherited():  # this process is not its own parent
        assert cli.main(["--version"]) == 75
    assert "the command that started this process has ended: the same command resumes" in capsys.readouterr().err
