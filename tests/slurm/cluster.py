"""A real SLURM of three nodes on this host: munged, slurmctld and three slurmd in a directory of their own.

Nothing of the machine's own SLURM or munge is read or changed: ports, sockets, keys and spool are the cluster's.
"""

from __future__ import annotations

import contextlib
import json
import os
import pwd
import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scontrol", "squeue", "scancel", "curl")
NODES = ("n1", "n2", "n3")
START_SECONDS = 40.0
WAIT_SECONDS = 600.0  # for a job: many times what one needs on two cores without other work
FINAL_STATES = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY", "DEADLINE")
_PREFIX = "advrm-slurm-"
_OWNER = "owner.json"  # pid file of the tests that started a cluster
_DAEMONS = "daemons.json"  # pid file of its daemons

_CONFIGURATION = """\
ClusterName=advrm
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={controller_port}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
AuthInfo=socket={home}/munge.socket
CredType=cred/munge
StateSaveLocation={home}/state
SlurmdSpoolDir={home}/spool_%n
SlurmctldPidFile={home}/slurmctld.pid
SlurmdPidFile={home}/slurmd_%n.pid
SlurmctldLogFile={home}/slurmctld.log
SlurmdLogFile={home}/slurmd_%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
SwitchType=switch/none
ReturnToService=2
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SchedulerType=sched/backfill
SchedulerParameters=bf_interval=1,sched_interval=1,sched_min_interval=0,batch_sched_delay=0,requeue_setup_env_fail
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
JobRequeue=1
KillWait=5
MinJobAge=3600
InactiveLimit=0
SlurmdTimeout=300
{nodes}
PartitionName=main Nodes=n1,n2 Default=YES MaxTime=60 State=UP GraceTime=60
PartitionName=spare Nodes=n3 MaxTime=60 State=UP
PartitionName=all Nodes=n1,n2,n3 MaxTime=60 State=UP
PartitionName=urgent Nodes=n1,n2 MaxTime=60 State=UP PriorityTier=10 PreemptMode=OFF
"""


def missing_programs() -> list[str]:
    """Programs of SLURM and munge, and curl, that are not on the path (Debian keeps daemons in /usr/sbin)."""
    return [name for name in PROGRAMS if _find(name) is None]


def _find(name: str) -> str | None:
    return shutil.which(name, path=os.environ.get("PATH", "") + ":/usr/sbin:/sbin")


def _free_ports(count: int) -> list[int]:
    sockets = [socket.socket() for _ in range(count)]
    for s in sockets:
        s.bind(("127.0.0.1", 0))
    ports = [s.getsockname()[1] for s in sockets]
    for s in sockets:
        s.close()
    return ports


def environment_of(home: Path) -> dict[str, str]:
    """The variables of a user of the cluster."""
    foreign = ("SLURM", "SBATCH", "ADVRM_", "RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_")
    kept = {k: v for k, v in os.environ.items() if not k.startswith(foreign)}
    return {**kept, "SLURM_CONF": str(home / "slurm.conf"), "OMP_NUM_THREADS": "1"}


class Cluster:
    """Starts on construction; :meth:`close` ends all of it. Commands run with the cluster's environment."""

    def __init__(self) -> None:
        end_abandoned()
        self.home = Path(tempfile.mkdtemp(prefix=_PREFIX))  # short: a socket's path may have 107 characters
        _write_pids(self.home / _OWNER, {os.getpid(): psutil.Process().create_time()})
        self.environment = environment_of(self.home)
        self._daemons: list[subprocess.Popen[bytes]] = []
        self._started: dict[int, float] = {}  # process and time of its start
        try:
            self._configure()
            self._start()
        except BaseException:
            self.close()
            raise

    def _configure(self) -> None:
        controller_port, *ports = _free_ports(1 + len(NODES))
        cpus = os.cpu_count() or 1
        node = "NodeName={} NodeHostname={} NodeAddr=127.0.0.1 Port={} CPUs={} State=UNKNOWN"
        nodes = "\n".join(
            node.format(name, socket.gethostname(), port, cpus) for name, port in zip(NODES, ports, strict=True)
        )
        (self.home / "state").mkdir()
        for name in NODES:
            (self.home / f"spool_{name}").mkdir()
        (self.home / "slurm.conf").write_text(
            _CONFIGURATION.format(
                host=socket.gethostname(),
                controller_port=controller_port,
                user=pwd.getpwuid(os.geteuid()).pw_name,
                home=self.home,
                nodes=nodes,
            )
        )
        key = self.home / "munge.key"
        key.write_bytes(os.urandom(128))
        key.chmod(0o400)

    def _start(self) -> None:
        files = {"key-file": "key", "socket": "socket", "pid-file": "pid", "log-file": "log", "seed-file": "seed"}
        options = [f"--{option}={self.home}/munge.{name}" for option, name in files.items()]
        self._spawn("munged", "--foreground", "--force", *options)
        self._wait(lambda: (self.home / "munge.socket").exists(), "munged did not start")
        self._spawn("slurmctld", "-D", "-c")
        for name in NODES:
            self._spawn("slurmd", "-D", "-N", name)
        self._wait(self._all_idle, "the nodes did not come up")

    def _all_idle(self) -> bool:
        found = self.call("sinfo", "--noheader", "--partition=all", "--states=idle", "--format=%D")
        return found.stdout.strip() == str(len(NODES))

    def _spawn(self, program: str, *arguments: str) -> None:
        found = _find(program)
        assert found is not None
        with (self.home / f"{program}_{len(self._daemons)}.out").open("wb") as log:
            # a session of its own: a Ctrl-C meant for pytest leaves the daemons to close()
            process = subprocess.Popen(
                [found, *arguments], env=self.environment, stdout=log, stderr=log, start_new_session=True
            )
        self._daemons.append(process)
        self._started[process.pid] = psutil.Process(process.pid).create_time()
        _write_pids(self.home / _DAEMONS, self._started)

    def _wait(self, ready: Callable[[], bool], failure: str) -> None:
        deadline = time.monotonic() + START_SECONDS
        while not ready():
            dead = [process for process in self._daemons if process.poll() is not None]
            if dead or time.monotonic() > deadline:
                raise RuntimeError(f"{failure}\n{self.logs()}")
            time.sleep(0.1)

    # what a user does

    def run(self, *command: str, check: bool = True, timeout: float = 60, **variables: str) -> str:
        """Standard output of a command; raises AssertionError with the error output when it fails."""
        done = self.call(*command, timeout=timeout, **variables)
        assert not check or done.returncode == 0, f"{' '.join(command)}: {done.stdout}{done.stderr}"
        return done.stdout

    def call(self, *command: str, timeout: float = 60, **variables: str) -> subprocess.CompletedProcess[str]:
        environment = {**self.environment, **variables}
        return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=timeout)

    def job(self, identifier: str) -> dict[str, str]:
        """What ``scontrol show job`` says."""
        # one line a job, and a heterogeneous job has one for each component, the batch script's first
        shown = self.run("scontrol", "-o", "show", "job", identifier).splitlines()[0]
        return dict(field.split("=", 1) for field in shown.split() if "=" in field)

    def wait_for(self, identifier: str, *states: str, timeout: float = WAIT_SECONDS) -> dict[str, str]:
        """The job once it is in one of ``states`` (any final one by default)."""
        wanted = states or FINAL_STATES
        deadline = time.monotonic() + timeout
        while (job := self.job(identifier))["JobState"] not in wanted:
            assert time.monotonic() < deadline, f"job {identifier} is not {wanted} but {job}\n{self.output(job)}"
            time.sleep(0.2)
        return job

    def running(self) -> list[str]:
        """Jobs and components of jobs that hold a node."""
        return self.run("squeue", "--noheader", "--states=RUNNING,COMPLETING", "--format=%i").split()

    def wait_until_idle(self, timeout: float = 30) -> None:
        """Until no job holds a node."""
        deadline = time.monotonic() + timeout
        while running := self.running():
            assert time.monotonic() < deadline, f"jobs {running} do not end"
            time.sleep(0.2)

    def output(self, job: dict[str, str]) -> str:
        """What the job printed so far."""
        path = Path(job.get("StdOut", ""))
        return path.read_text(errors="replace") if path.is_file() else ""

    def logs(self) -> str:
        """The end of every daemon's log."""
        files = [*self.home.glob("*.out"), *self.home.glob("*.log")]
        return "\n".join(f"{file.name}:\n{file.read_text(errors='replace')[-1500:]}" for file in files)

    def close(self) -> None:
        end(self.home)
        for process in self._daemons:
            process.wait(5)


# the end of a cluster, by its directory alone: its tests may be gone


def end(home: Path) -> None:
    """Cancel all jobs, end the daemons, then whatever is left of the jobs; raises RuntimeError when something stays."""
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        _cancel_jobs(environment_of(home))
    _end_processes(_read_pids(home / _DAEMONS))
    _end_processes(list(_processes_of(home)))
    left = list(_processes_of(home))
    if left:
        raise RuntimeError(f"processes of the cluster in {home} do not end: {left}")
    shutil.rmtree(home, ignore_errors=True)


def end_abandoned() -> None:
    """End the clusters of tests that were killed before they could do it."""
    for home in Path(tempfile.gettempdir()).glob(f"{_PREFIX}*"):
        with contextlib.suppress(FileNotFoundError):  # another run of the tests has just ended
            about = home.stat()
            new = not (home / _OWNER).exists() and time.time() - about.st_mtime < 60
            if about.st_uid == os.geteuid() and not new and not _read_pids(home / _OWNER):
                end(home)


def _cancel_jobs(environment: dict[str, str]) -> None:
    def run(*command: str) -> str:
        options = {"env": environment, "capture_output": True, "text": True, "timeout": 10, "check": True}
        return subprocess.run(command, **options).stdout  # type: ignore[call-overload, no-any-return]

    jobs = run("squeue", "--noheader", "--format=%i").split()
    if jobs:
        run("scancel", "--quiet", "--full", "--signal=KILL", *jobs)
        run("scancel", "--quiet", *jobs)
    deadline = time.monotonic() + 15
    while run("squeue", "--noheader") and time.monotonic() < deadline:
        time.sleep(0.2)


def _end_processes(processes: list[psutil.Process]) -> None:
    for stop in (psutil.Process.terminate, psutil.Process.kill):
        for process in reversed(processes):
            with contextlib.suppress(psutil.NoSuchProcess):
                stop(process)
        _, processes = psutil.wait_procs(processes, timeout=8)


def _processes_of(home: Path) -> Iterator[psutil.Process]:
    """Whatever was started by a cluster: the variable SLURM_CONF is inherited by its daemons, steps and tasks."""
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            if process.environ().get("SLURM_CONF") == str(home / "slurm.conf") and process.pid != os.getpid():
                yield process


def _write_pids(path: Path, started: dict[int, float]) -> None:
    """The time of its start tells a process from a later one of the same number."""
    path.write_text(json.dumps(started))


def _read_pids(path: Path) -> list[psutil.Process]:
    """Those of a pid file that live."""
    living = []
    for pid, started in json.loads(path.read_text()).items() if path.exists() else ():
        with contextlib.suppress(psutil.NoSuchProcess):
            process = psutil.Process(int(pid))
            if process.create_time() == started and process.status() != psutil.STATUS_ZOMBIE:
                living.append(process)
    return living
