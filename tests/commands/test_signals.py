"""SIGTERM and SIGUSR1 at every moment of a command: status 75, nothing lost, and the restarted run is the unbroken one.

A command whose work is complete but for a short rest ends it, with status 0.
"""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from lightning.pytorch import Trainer
from restart_driver import digest, steps_of
from signal_driver import SETTINGS, write_pairs
from signal_points import COMPLETE, signal_at

from nemo_advrm import cli, signals
from nemo_advrm.engine.runtime import Runtime
from nemo_advrm.errors import Preempted
from nemo_advrm.training.run_training import _keep_signals


def reward_model(run_dir: Path, pairs: Path, *more: str) -> int:
    return cli.main(["train_rm", *SETTINGS, f"data.train_path={pairs}", f"run_dir={run_dir}", *more])


@pytest.fixture(scope="module")
def unbroken(single: Runtime, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """(run directory of an undisturbed training, its data)."""
    home = tmp_path_factory.mktemp("unbroken")
    pairs = write_pairs(home / "pairs.jsonl")
    assert reward_model(home / "run", pairs) == 0
    return home / "run", pairs


FAST = [
    ("start", "SIGTERM", False),
    ("model", "SIGTERM", False),
    ("step", "SIGUSR1", False),
    ("begin of a save", "SIGTERM", True),
    ("end of a save", "SIGUSR1", True),
    ("final save", "SIGTERM", False),
]


@pytest.mark.parametrize(("moment", "name", "background"), FAST)
def test_a_signal_at_any_moment_ends_with_75_or_the_complete_result_and_the_run_goes_on(
    unbroken: tuple[Path, Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    moment: str,
    name: str,
    background: bool,
) -> None:
    expected, pairs = unbroken
    more = [f"trainer.async_checkpoint={str(background).lower()}"]
    before = {s: signal.getsignal(s) for s in signals.SIGNALS}
    with signal_at(moment, signal.Signals[name]) as came:
        status = reward_model(tmp_path, pairs, *more)
    assert came == [moment]
    assert {s: signal.getsignal(s) for s in signals.SIGNALS} == before
    told = capsys.readouterr().err
    if moment in COMPLETE:
        assert (status, told) == (0, "")
    else:
        assert status == 75 and told.startswith(f"stopped by {name} ") and len(told.splitlines()) == 1
        assert "resumes" in told or "starts over" in told
        saved = re.search(r"saved in (\S+);", told)
        assert saved is None or Path(saved[1]) == max((tmp_path / "checkpoints").iterdir())
        assert reward_model(tmp_path, pairs, *more) == 0
    assert digest(tmp_path / "model") == digest(expected / "model")
    assert steps_of(tmp_path / "metrics.jsonl") == steps_of(expected / "metrics.jsonl")
    rows = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert len(rows) == len((expected / "metrics.jsonl").read_text().splitlines())


def test_lightning_gets_no_handler_of_its_own() -> None:
    trainer = Trainer(logger=False, accelerator="cpu", enable_progress_bar=False, enable_model_summary=False)
    _keep_signals(trainer)
    with signals.owned():
        ours = {s: signal.getsignal(s) for s in signals.SIGNALS}
        trainer._signal_connector.register_signal_handlers()
        assert {s: signal.getsignal(s) for s in signals.SIGNALS} == ours
        trainer._signal_connector.teardown()
        assert {s: signal.getsignal(s) for s in signals.SIGNALS} == ours


def test_work_of_which_a_half_is_worth_nothing_ends_at_once(capsys: pytest.CaptureFixture[str]) -> None:
    with signal_at("evaluation", signal.SIGUSR1) as came:
        assert cli.main(["export_pairs", "pairs=a", "out=b"]) == 75
    assert came == ["evaluation"]
    assert "stopped by SIGUSR1: the same command starts over" in capsys.readouterr().err


def test_a_signal_is_recorded_once_and_only_inside(tmp_path: Path) -> None:
    with signals.owned():
        assert signals.received() == ""
        with signals.owned():
            signal.raise_signal(signal.SIGUSR1)
        signal.raise_signal(signal.SIGTERM)
        assert signals.received() == "SIGUSR1"
        with pytest.raises(Preempted, match="SIGUSR1"), signals.at_once():
            raise AssertionError("not reached")
    with signals.owned():
        assert signals.received() == ""
        with signals.at_once():
            with signals.at_once(raises=False):
                signal.raise_signal(signal.SIGTERM)
            assert signals.received() == "SIGTERM"


@pytest.mark.parametrize("ends", [True, False])
def test_objects_are_not_searched_for_cycles_at_exit(ends: bool) -> None:
    arguments = "" if ends else "['--version']"
    code = f"import gc; from nemo_advrm import cli; cli.main({arguments}); print(gc.get_freeze_count() > 1000)"
    done = subprocess.run([sys.executable, "-c", code, "--version"], capture_output=True, text=True, timeout=60)
    assert done.stdout.splitlines()[-1] == str(ends), done.stderr


def test_a_signal_after_the_work_changes_the_status_no_more() -> None:
    code = (
        "import signal, sys; from signal_points import signal_at; from nemo_advrm import cli\n"
        "with signal_at('exit', signal.SIGTERM):\n"
        "    status = cli.main()\n"
        "sys.exit(status)"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    done = subprocess.run([sys.executable, "-c", code, "--version"], env=environment, capture_output=True, timeout=60)
    assert done.returncode == 0, done.stderr
