"""The command line: help without heavy imports, one clear line for a user's error, exit statuses."""

from __future__ import annotations

import os
import resource
import socket
import subprocess
import sys
from types import ModuleType

import pytest

from nemo_advrm import __version__, cli, tried_versions
from nemo_advrm.command_table import COMMANDS
from nemo_advrm.commands import doctor
from nemo_advrm.config.keys import all_keys
from nemo_advrm.config.schema import Config, ModelConfig
from nemo_advrm.engine import transformer_engine
from nemo_advrm.errors import DataError

HOST = socket.gethostname()


@pytest.fixture
def stage(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """A stage ``train_rm`` whose ``main`` a test sets."""
    module = ModuleType("nemo_advrm.commands.train_rm")
    monkeypatch.setitem(sys.modules, module.__name__, module)
    return module


@pytest.mark.parametrize("arguments", [["--help"], ["train_rm", "--help"]])
def test_help_is_quick_and_imports_nothing_heavy(arguments: list[str]) -> None:
    code = (
        "import sys; from nemo_advrm.cli import main; status = main(sys.argv[1:]); "
        "heavy = {'torch', 'numpy', 'nemo', 'lightning', 'megatron', 'transformers'} & set(sys.modules); "
        "sys.exit(status or str(heavy or '') or 0)"
    )
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    run = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    # processor time: other processes of a busy machine do not count
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 2


def test_a_reader_that_leaves_is_no_error() -> None:
    reading, writing = os.pipe()
    os.close(reading)
    code = "import sys; from nemo_advrm.cli import main; sys.exit(main(['--help']))"
    run = subprocess.run([sys.executable, "-c", code], stdout=writing, stderr=subprocess.PIPE, text=True, timeout=60)
    os.close(writing)
    assert (run.returncode, run.stderr) == (141, "")


def test_help_names_every_stage(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["--help"]) == 0
    out = capsys.readouterr().out
    assert all(name in out and stage.summary in out for name, stage in COMMANDS.items())


def test_no_stage_shows_help_and_fails(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([]) == 2
    assert "usage: nemo-advrm COMMAND" in capsys.readouterr().out


@pytest.mark.parametrize("name", list(COMMANDS))
def test_stage_help_shows_only_keys_that_exist(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    for key in COMMANDS[name].keys.split():
        assert key in all_keys() or any(other.startswith(key) and key.endswith(".") for other in all_keys()), key
    assert cli.main([name, "--help"]) == 0
    assert COMMANDS[name].example in capsys.readouterr().out


def test_stage_help_shows_defaults_and_comments(capsys: pytest.CaptureFixture[str]) -> None:
    cli.main(["pipeline", "-h"])
    lines = capsys.readouterr().out.splitlines()
    assert any("pipeline.rounds=2" in line for line in lines)
    assert any("pipeline.rlhf.NAME.reward=r1" in line and "hardened" in line for line in lines)
    assert any("data.on_bad_row=error" in line and "counted and reported" in line for line in lines)
    assert any('data.train_path=""' in line for line in lines)


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out == f"nemo-advrm {__version__}\n"


def test_unknown_stage_names_the_nearest(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["train-rm"]) == 2
    assert "error: unknown command train-rm: did you mean train_rm?" in capsys.readouterr().err


def test_stage_gets_its_configuration_and_its_status_is_returned(stage: ModuleType) -> None:
    seen: list[Config] = []
    stage.main = lambda cfg: seen.append(cfg)
    assert cli.main(["train_rm", "experiment=synthetic", "seed=3"]) == 0
    assert (seen[0].seed, seen[0].model.optim.lr) == (3, 2.0e-3)
    stage.main = lambda cfg: 7
    assert cli.main(["train_rm"]) == 7


@pytest.mark.parametrize(("rank", "start"), [(None, "error: "), ("0", "error: "), ("3", f"error (rank 3 on {HOST}): ")])
def test_user_error_is_one_line_that_names_the_process_unless_it_is_the_first(
    rank: str | None,
    start: str,
    stage: ModuleType,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.delenv("RANK", raising=False)
    monkeypatch.delenv("SLURM_PROCID", raising=False)
    if rank is not None:
        monkeypatch.setenv("RANK", rank)
        monkeypatch.setenv("WORLD_SIZE", "4")
    monkeypatch.setattr(cli, "OTHERS_WAIT", 0.0)

    def fail(cfg: Config) -> None:
        raise DataError("rows.jsonl:3: no key rejected")

    stage.main = fail
    assert cli.main(["train_rm"]) == 2
    assert capsys.readouterr().err == f"{start}rows.jsonl:3: no key rejected\n"


def test_configuration_error_ends_before_the_stage_is_imported(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["train_rm", "model.num_layrs=3"]) == 2
    assert capsys.readouterr().err == "error: unknown key model.num_layrs: did you mean model.num_layers?\n"


def test_interrupt_exits_with_130(stage: ModuleType) -> None:
    def interrupt(cfg: Config) -> None:
        raise KeyboardInterrupt

    stage.main = interrupt
    assert cli.main(["train_rm"]) == 130


def test_a_bug_keeps_its_traceback(stage: ModuleType) -> None:
    def broken(cfg: Config) -> None:
        raise ZeroDivisionError

    stage.main = broken
    with pytest.raises(ZeroDivisionError):
        cli.main(["train_rm"])


def test_report_without_a_run_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["report", "run_dir=/nowhere"]) == 2
    assert "run_dir=/nowhere" in capsys.readouterr().err


# doctor


def test_doctor_names_everything_and_exits_with_0(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["doctor"]) == 0
    out = capsys.readouterr().out
    parts = "Python", "torch", "megatron-core", "nemo-toolkit", "lightning", "transformers", "Transformer Engine"
    for what in (*parts, "Apex", "GPU", "FP8", "NCCL", "gloo", "CPU"):
        assert what in out


def test_doctor_says_what_every_absence_means(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tried_versions, "version_of", lambda package: "")
    absent = {finding.what: finding.meaning for finding in doctor.findings(ModelConfig()) if not finding.present}
    assert {"torch", "megatron-core", "Transformer Engine", "Apex"} <= set(absent)
    assert all(absent.values())


def test_doctor_says_why_transformer_engine_is_not_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tried_versions, "version_of", lambda package: "2.9.0")
    monkeypatch.setattr(transformer_engine, "import_error", lambda: "cannot be imported (OSError: libcuda.so.1)")
    found = doctor._transformer_engine()
    assert not found.present and found.found == "2.9.0"
    assert found.meaning == "cannot be imported (OSError: libcuda.so.1); treated as absent"
    monkeypatch.setattr(transformer_engine, "import_error", lambda: "")
    assert doctor._transformer_engine().present
    assert "Transformer Engine" not in doctor._kernels(on_gpu=False).found  # what runs on a CPU takes none of it
    assert "Transformer Engine" in doctor._kernels(on_gpu=True).found


@pytest.mark.parametrize(
    ("capabilities", "engine", "found", "meaning"),
    [
        ([], True, "no", "needs a GPU"),
        ([(8, 0)], True, "no", "8.9"),
        ([(9, 0)], False, "hardware only", "Transformer Engine"),
        ([(9, 0)], True, "yes", "fp8_blockwise"),
        ([(9, 0), (8, 0)], True, "no", "8.9"),
        ([(10, 0)], True, "yes, MXFP8 too", "mxfp8"),
    ],
)
def test_fp8_by_the_weakest_gpu(capabilities: list, engine: bool, found: str, meaning: str) -> None:
    finding = doctor.fp8_finding(capabilities, engine)
    assert finding.found == found and meaning in finding.meaning


def test_a_full_disk_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    def write() -> None:
        with open("/dev/full", "w") as file:
            file.write("x")

    assert cli.guarded(write) == 2
    told = capsys.readouterr().err
    assert told.startswith("error: ") and "No space left on device" in told and told.count("\n") == 1


def test_names_that_a_stranger_chose_stay_in_their_line(capsys: pytest.CaptureFixture[str]) -> None:
    def fail() -> int:
        raise DataError("a\nb\x1b]0;c\x07 \udcff über.jsonl: damaged")

    assert cli.guarded(fail) == 2
    assert capsys.readouterr().err == "error: a\\nb\\x1b]0;c\\x07 \\udcff über.jsonl: damaged\n"
