"""A real SLURM of three nodes on this host: munged, slurmctld and three slurmd in a directory of their own.

Nothing of the machine's own SLURM or munge is read or changed: ports, sockets, keys and spool are the cluster's.
"""

from __future__ import annotations

import contextlib
import os
import pwd
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scontrol", "squeue", "scancel")
NODES = ("n1", "n2", "n3")
START_SECONDS = 40.0
FINAL_STATES = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY", "DEADLINE")

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
JobRequeue=1
KillWait=5
MinJobAge=3600
InactiveLimit=0
SlurmdTimeout=300
{nodes}
PartitionName=main Nodes=n1,n2 Default=YES MaxTime=60 State=UP
PartitionName=spare Nodes=n3 MaxTime=60 State=UP
PartitionName=all Nodes=n1,n2,n3 MaxTime=60 State=UP
"""


def missing_programs() -> list[str]:
    """Programs of SLURM and munge that are not on the path (Debian keeps the daemons in /usr/sbin)."""
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


class Cluster:
    """Starts on construction; :meth:`close` ends every daemon. Commands run with the cluster's environment."""

    def __init__(self, home: Path) -> None:
        self.home = home
        self.environment = {
            k: v
            for k, v in os.environ.items()
            if not k.startswith(("SLURM", "SBATCH", "ADVRM_", "RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_"))
        }
        self.environment.update(SLURM_CONF=str(home / "slurm.conf"), OMP_NUM_THREADS="1")
        self._daemons: list[subprocess.Popen[bytes]] = []
        self._configure()
        try:
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
        (self.home / "state").mkdir(parents=True)
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
        log = open(self.home / f"{program}_{len(self._daemons)}.out", "wb")  # noqa: SIM115 (lives as long as the daemon)
        # a session of its own: a Ctrl-C meant for pytest leaves the daemons to close()
        process = subprocess.Popen(
            [found, *arguments], env=self.environment, stdout=log, stderr=log, start_new_session=True
        )
        log.close()
        self._daemons.append(process)

    def _wait(self, ready: Callable[[], bool], failure: str) -> None:
        deadline = time.monotonic() + START_SECONDS
        while not ready():
            dead = [p for p in self._daemons if p.poll() is not None]
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

    def wait_for(self, identifier: str, *states: str, timeout: float = 240) -> dict[str, str]:
        """The job once it is in one of ``states`` (any final one by default)."""
        wanted = states or FINAL_STATES
        deadline = time.monotonic() + timeout
        while (job := self.job(identifier))["JobState"] not in wanted:
            assert time.monotonic() < deadline, f"job {identifier} is not {wanted} but {job}\n{self.output(job)}"
            time.sleep(0.2)
        return job

    def output(self, job: dict[str, str]) -> str:
        """What the job printed so far."""
        path = Path(job.get("StdOut", ""))
        return path.read_text(errors="replace") if path.is_file() else ""

    def logs(self) -> str:
        """The end of every daemon's log."""
        files = [*self.home.glob("*.out"), *self.home.glob("*.log")]
        return "\n".join(f"{file.name}:\n{file.read_text(errors='replace')[-1500:]}" for file in files)

    def close(self) -> None:
        """Cancel all jobs, then TERM and at last KILL the daemons."""
        with contextlib.suppress(Exception):
            jobs = self.run("squeue", "--noheader", "--format=%i", timeout=10).split()
            self.call("scancel", "--quiet", "--full", "--signal=KILL", *jobs, timeout=10)
            self.call("scancel", "--quiet", *jobs, timeout=10)
            deadline = time.monotonic() + 15
            while self.run("squeue", "--noheader", timeout=10) and time.monotonic() < deadline:
                time.sleep(0.2)
        for sent in (signal.SIGTERM, signal.SIGKILL):
            for process in reversed(self._daemons):
                if process.poll() is None:
                    process.send_signal(sent)
            deadline = time.monotonic() + 8
            for process in self._daemons:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(max(0.1, deadline - time.monotonic()))
        self._daemons.clear()
