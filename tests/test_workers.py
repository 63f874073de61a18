"""Workers of one command: how many there are, whose status counts, and that none outlives the command."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from nemo_advrm.config import load_config
from nemo_advrm.errors import ConfigError
from nemo_advrm.pipeline import workers
from nemo_advrm.pipeline.workers import Worker

DISTRIBUTED = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "SLURM_PROCID", "SLURM_NTASKS", "SLURM_STEP_NUM_TASKS")
SAYS_PID = "import os, sys, time; from pathlib import Path\n"
SAYS_PID += "number = os.environ['NEMO_ADVRM_WORKER']\n"
SAYS_PID += "Path(os.environ['HOME_OF_TEST'], f'pid_{number}').write_text(str(os.getpid()))\n"
SLEEPS = SAYS_PID + "time.sleep(60)"
# the second ends badly, once the first runs: ended before that, the first would have said no process id
ENDS_BADLY = SAYS_PID + "first = Path(os.environ['HOME_OF_TEST'], 'pid_1')\n"
ENDS_BADLY += "while number == '2' and not (first.exists() and first.read_text()): time.sleep(0.02)\n"
# as a worker of the command does: it hears signals, and ends when its parent does
SAVES = SAYS_PID.replace("pid_", "early_") + "from nemo_advrm import signals\n"
SAVES += "from nemo_advrm.parent_process import end_with_parent\n"
SAVES += "with signals.owned():\n    end_with_parent()\n" + "    " + SAYS_PID.splitlines()[-1]
SAVES += "\n    while not signals.received(): time.sleep(0.02)\n    Path(os.environ['HOME_OF_TEST'], f'saved_{number}')"
SAVES += ".write_text(signals.received())\n    sys.exit(75)"


def launch(script: str, home: Path) -> subprocess.Popen[str]:
    """A process that runs ``script`` in two workers and exits with their status."""
    code = "import sys; from nemo_advrm import cli, signals; from nemo_advrm.pipeline.workers import Worker, _run\n"
    code += "with signals.owned(): sys.exit(cli.guarded(lambda: _run("
    code += f"[sys.executable, '-c', {script!r}], [Worker(1), Worker(2)])))"
    environment = {k: v for k, v in os.environ.items() if k not in DISTRIBUTED} | {"HOME_OF_TEST": str(home)}
    return subprocess.Popen([sys.executable, "-c", code], env=environment, stderr=subprocess.PIPE, text=True)


def both(home: Path, name: str = "pid") -> list[int]:
    """The numbers of the workers' processes, once both have said that they run."""
    deadline = time.monotonic() + 60
    paths = [home / f"{name}_{number}" for number in (1, 2)]
    while not all(path.exists() and path.read_text() for path in paths):
        assert time.monotonic() < deadline, "the workers did not start"
        time.sleep(0.02)
    return [int(path.read_text()) for path in paths]


def assert_all_end(pids: list[int]) -> None:
    deadline = time.monotonic() + 60
    while any(psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE for pid in pids):
        assert time.monotonic() < deadline, "a worker outlives its command"
        time.sleep(0.02)


@pytest.mark.parametrize(
    ("script", "status", "told"),
    [
        ("pass", 0, ""),
        ("raise SystemExit(75)", 75, ""),
        (ENDS_BADLY + "number == '2' and sys.exit(2); time.sleep(60)", 2, ""),
        (ENDS_BADLY + "number == '2' and os.kill(os.getpid(), 9); time.sleep(60)", 137,
         "error: worker 2 was ended by SIGKILL (by the kernel, if the host ran out of memory)"),
    ],
)  # fmt: skip
def test_the_first_bad_status_counts_and_ends_all(script: str, status: int, told: str, tmp_path: Path) -> None:
    command = launch(script, tmp_path)
    _, err = command.communicate(timeout=60)
    assert command.returncode == status and told in err
    if "pid_" in script:
        assert_all_end(both(tmp_path))


@pytest.mark.parametrize("name", ["SIGTERM", "SIGUSR1"])
def test_a_signal_is_handed_on_and_all_save(name: str, tmp_path: Path) -> None:
    command = launch(SAVES, tmp_path)
    pids = both(tmp_path)
    command.send_signal(signal.Signals[name])
    assert command.wait(60) == 75
    assert [(tmp_path / f"saved_{number}").read_text() for number in (1, 2)] == [name, name]
    assert_all_end(pids)


def test_an_interrupt_ends_all_and_is_said_once(tmp_path: Path) -> None:
    command = launch(SLEEPS, tmp_path)
    pids = both(tmp_path)
    command.send_signal(signal.SIGINT)
    _, err = command.communicate(timeout=60)
    assert command.returncode == 130 and err.count("interrupted") == 1
    assert_all_end(pids)


def test_workers_save_and_end_when_their_command_is_killed(tmp_path: Path) -> None:
    command = launch(SAVES, tmp_path)
    pids = both(tmp_path)
    command.kill()
    command.communicate(timeout=60)
    assert_all_end(pids)
    assert [(tmp_path / f"saved_{number}").read_text() for number in (1, 2)] == ["SIGTERM", "SIGTERM"]


# three members side by side, then one arm
WIDE = ["data.train_path=pairs.jsonl", "ensemble.size=3", "pipeline.rounds=0", "trainer.accelerator=cpu"]
WIDE += ["pretrained_checkpoint.restore_from_path=policy", "pipeline.rlhf={a:{reward: r1}}"]


def planned(
    monkeypatch: pytest.MonkeyPatch, *settings: str, cores: int = 8, gpus: tuple[str, ...] = ()
) -> list[Worker]:
    for name in DISTRIBUTED:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(cores)))
    monkeypatch.setattr(workers, "_gpus", lambda accelerator: list(gpus))
    return workers.plan(load_config([*WIDE, *settings], "pipeline"))


@pytest.mark.parametrize(
    ("settings", "cores", "count"),
    [
        ([], 8, 1),  # a process takes all cores
        (["trainer.cpu_threads=1"], 8, 3),  # no more than there are steps side by side
        (["trainer.cpu_threads=1"], 2, 2),
        (["trainer.cpu_threads=4"], 8, 2),
        (["trainer.cpu_threads=1", "trainer.devices=4"], 8, 2),
        (["trainer.cpu_threads=16"], 8, 1),
        (["trainer.cpu_threads=1", "pipeline.jobs=1"], 8, 1),
        (["pipeline.jobs=5"], 2, 5),
        (["trainer.cpu_threads=1", "pipeline.only=round_0/rm_1"], 8, 1),
    ],
)
def test_workers_on_cpus(monkeypatch: pytest.MonkeyPatch, settings: list[str], cores: int, count: int) -> None:
    found = planned(monkeypatch, *settings, cores=cores)
    assert [(worker.number, worker.gpus) for worker in found] == [(i, None) for i in range(1, count + 1)]


def test_workers_share_out_the_gpus_by_what_their_layout_needs(monkeypatch: pytest.MonkeyPatch) -> None:
    four = ("0", "1", "GPU-5ab", "3")
    assert [worker.gpus for worker in planned(monkeypatch, gpus=four)] == [("0",), ("1",), ("GPU-5ab",)]
    two = planned(monkeypatch, "trainer.devices=2", gpus=four)
    assert [worker.gpus for worker in two] == [("0", "1"), ("GPU-5ab", "3")]
    assert len(planned(monkeypatch, "trainer.devices=8", gpus=four)) == 1  # too few: the layout's own check says so
    with pytest.raises(ConfigError, match=r"pipeline.jobs=3: needs 6 GPUs \(trainer.devices=2 for each\), but 4 are"):
        planned(monkeypatch, "trainer.devices=2", "pipeline.jobs=3", gpus=four)


def test_a_distributed_launch_runs_one_step_at_a_time_and_says_so(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    cfg = load_config([*WIDE, "pipeline.jobs=4"], "pipeline")
    for name in ("RANK", "SLURM_STEP_NUM_TASKS"):
        monkeypatch.setenv(name, "1")
        assert len(workers.plan(cfg)) == 1
        assert capsys.readouterr().out == "pipeline.jobs=4: a distributed launch runs one step at a time\n"
        monkeypatch.delenv(name)


def test_jobs_that_are_no_number_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    for jobs in ("0", "-1", "two"):
        with pytest.raises(ConfigError, match=f"pipeline.jobs={jobs}: must be auto or a number"):
            planned(monkeypatch, f"pipeline.jobs={jobs}")
