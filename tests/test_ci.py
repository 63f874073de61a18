"""The script of continuous integration, with a ``make`` that only writes down what it is asked for."""

from __future__ import annotations

import fcntl
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

# writes a line to calls.log; the words in a file `fails` are the calls that fail, each as often as it stands there; the
# call in `hangs` does not end, that in `daemon` leaves a process behind
MAKE = """#!/usr/bin/env bash
call="$*"
case $call in setup*) call=setup ;; test*platform*) call="$call on $(basename "$VENV")" ;; esac
echo "$call" >>calls.log
case "$(cat hangs 2>/dev/null)" in "$1") sleep 100 ;; esac
case "$(cat daemon 2>/dev/null)" in "$1") sleep 100 >/dev/null 2>&1 & echo $! >daemon.pid ;; esac
test "$1" != setup || { mkdir -p "${3#VENV=}/bin" && printf '#!/bin/sh\\necho Python 3.13' >"${3#VENV=}/bin/python" &&
    chmod +x "${3#VENV=}/bin/python"; }
if test -s fails && test "$(head -n 1 fails)" = "$1${2:+ $2}"; then
    sed -i 1d fails
    echo "the reason"
    exit 2
fi
"""


class Checkout:
    """A copy of the script beside programs that replace make, df and the environment's Python."""

    def __init__(self, path: Path) -> None:
        self.path = path
        shutil.copytree(ROOT / ".ci", path / ".ci")
        self.program("bin/make", MAKE)
        self.free_kilobytes(99_000_000)
        self.program(".venv/bin/python", "#!/bin/sh\necho 3.0.0\n")

    def program(self, name: str, text: str) -> None:
        file = self.path / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
        file.chmod(0o755)

    def free_kilobytes(self, number: int) -> None:
        self.program("bin/df", f"#!/bin/sh\necho Avail\necho {number}\n")

    def run(self, minutes: int = 80, newest: str = sys.executable) -> tuple[int, str, list[str]]:
        """Exit status, the last line, and what make was asked for, without the set-up in the background."""
        environment = os.environ | {
            "PATH": f"{self.path / 'bin'}:{os.environ['PATH']}",
            "XDG_CACHE_HOME": str(self.path / "cache"),
            "CI_LIMIT_MINUTES": str(minutes),
            "CI_NEWEST_PYTHON": newest,
        }
        done = subprocess.run(
            [self.path / ".ci" / "run"], cwd="/", env=environment, capture_output=True, text=True, timeout=60
        )
        calls = (self.path / "calls.log").read_text().splitlines()
        last = (done.stdout.splitlines() or [""])[-1]
        return done.returncode, last, [" ".join(call.split()) for call in calls if call != "setup"]


@pytest.fixture
def checkout(tmp_path: Path) -> Checkout:
    return Checkout(tmp_path)


THIS = ".".join(map(str, sys.version_info[:3]))
MARKED = f"test ARGS=-m platform on newest-{THIS}"
FIRST = ["lint", "docs", "test", "test-judges ARGS=", "test-long ARGS="]
LAST = ["test-slurm ARGS=", "test-aligner ARGS="]


def test_the_marked_tests_run_on_the_newest_python_after_all_tests_on_the_oldest(checkout: Checkout) -> None:
    status, last, calls = checkout.run()
    assert (status, calls) == (0, [*FIRST, MARKED, *LAST]) and last.endswith("left out: nothing")


def test_a_marked_test_that_fails_twice_fails_and_one_that_passes_the_second_time_does_not(checkout: Checkout) -> None:
    (checkout.path / "fails").write_text("test ARGS=-m platform\n")
    status, _, calls = checkout.run()
    again = f"test ARGS=-m platform --last-failed on newest-{THIS}"
    assert (status, calls) == (0, [*FIRST, MARKED, again, *LAST])

    (checkout.path / "calls.log").unlink()
    (checkout.path / "fails").write_text("test ARGS=-m platform\ntest ARGS=-m platform --last-failed\n")
    status, _, calls = checkout.run()
    assert status != 0 and calls == [*FIRST, MARKED, again]


def test_without_such_a_python_without_space_or_when_set_up_fails_the_rest_runs_and_the_reason_is_told(
    checkout: Checkout,
) -> None:
    expected = (0, [*FIRST, *LAST])
    status, last, calls = checkout.run(newest="3.99")
    assert (status, calls) == expected and "newest Python (3.99: none here)" in last

    checkout.free_kilobytes(1_000_000)
    (checkout.path / "calls.log").unlink()
    status, last, calls = checkout.run()
    assert (status, calls) == expected and "no space in" in last

    checkout.free_kilobytes(99_000_000)
    (checkout.path / "calls.log").unlink()
    (checkout.path / "fails").write_text(f"setup PYTHON={sys.executable}\n")
    status, last, calls = checkout.run()
    assert (status, calls) == expected and "its set-up failed: the reason" in last


def test_one_run_at_a_time_uses_the_environment_and_what_a_test_leaves_behind_does_not_hold_it(
    checkout: Checkout,
) -> None:
    lock = checkout.path / "cache" / "nemo_advrm" / f"newest-{THIS}.lock"
    lock.parent.mkdir(parents=True)
    with open(lock, "w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        status, last, calls = checkout.run()
    assert (status, calls) == (0, [*FIRST, *LAST]) and "another run is using its environment" in last

    (checkout.path / "calls.log").unlink()
    (checkout.path / "daemon").write_text("test-slurm")
    assert checkout.run()[0] == 0
    with open(lock, "w") as free:
        fcntl.flock(free, fcntl.LOCK_EX | fcntl.LOCK_NB)
    os.kill(int((checkout.path / "daemon.pid").read_text()), signal.SIGTERM)


def test_a_cache_that_cannot_be_written_leaves_the_newest_python_out(checkout: Checkout) -> None:
    (checkout.path / "cache" / "nemo_advrm" / f"newest-{THIS}.lock").mkdir(parents=True)
    status, last, calls = checkout.run()
    assert (status, calls) == (0, [*FIRST, *LAST]) and "cannot be written" in last


def test_a_set_up_that_does_not_end_is_stopped_when_time_is_short(checkout: Checkout) -> None:
    (checkout.path / "hangs").write_text("setup")
    status, last, calls = checkout.run(minutes=9)
    assert (status, calls) == (0, FIRST)
    assert "its set-up took too long" in last and "test-slurm (no time)" in last


def test_a_failing_test_of_the_oldest_python_ends_it_with_the_set_up_under_way(checkout: Checkout) -> None:
    (checkout.path / "hangs").write_text("setup")
    (checkout.path / "fails").write_text("test\n")
    status, _, calls = checkout.run()
    assert status != 0 and calls == ["lint", "docs", "test"]
