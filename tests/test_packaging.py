"""What is installed: a wheel that carries conf/, the command, and requirements bounded on both sides.

torch has no upper bound, and neither has the triton that belongs to it: NVIDIA's containers bring builds of their own.
"""

from __future__ import annotations

import ast
import json
import os
import re
import subprocess
import sys
import venv
import zipfile
from pathlib import Path

import pytest
from wheels import build_wheel

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("setuptools", minversion="77", reason="building a wheel needs setuptools 77")
    return build_wheel(tmp_path_factory.mktemp("build"))


def test_wheel_holds_every_file_of_the_package(wheel: Path) -> None:
    package = [file for file in (ROOT / "nemo_advrm").rglob("*") if file.is_file() and "__pycache__" not in file.parts]
    names = set(zipfile.ZipFile(wheel).namelist())
    assert {file.relative_to(ROOT).as_posix() for file in package} <= names


def test_wheel_holds_every_configuration_file(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    files = {f"nemo_advrm/{file.relative_to(ROOT).as_posix()}" for file in (ROOT / "conf").rglob("*.yaml")}
    assert files and files <= set(names)
    assert not any(name.startswith(("conf/", "tests/")) for name in names)
    assert "nemo_advrm/py.typed" in names and any(name.endswith("licenses/LICENSE") for name in names)


def test_wheel_loads_its_own_configuration(wheel: Path, tmp_path: Path) -> None:
    zipfile.ZipFile(wheel).extractall(tmp_path)
    code = "from nemo_advrm.config import *; load_config(['experiment=synthetic']); print(conf_dir())"
    command = [sys.executable, "-c", code]
    run = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env={"PYTHONPATH": str(tmp_path)})
    assert run.stdout.strip() == str(tmp_path / "nemo_advrm" / "conf"), run.stderr


def test_wheel_installs_the_command_and_bounds_every_requirement(wheel: Path) -> None:
    archive = zipfile.ZipFile(wheel)
    info = next(name for name in archive.namelist() if name.endswith("entry_points.txt"))
    assert "nemo-advrm = nemo_advrm.cli:main" in archive.read(info).decode()
    metadata = archive.read(info.replace("entry_points.txt", "METADATA")).decode()
    requirements = re.findall(r"^Requires-Dist: (.+)$", metadata, re.M)
    extras = re.findall(r"^Provides-Extra: (.+)$", metadata, re.M)
    assert set(extras) == {"gguf", "serve", "gpu", "docs", "dev"}
    specifiers = {line: line.partition(";")[0] for line in requirements}
    assert requirements and all(">=" in specifier for specifier in specifiers.values()), requirements
    open_ended = [line for line, specifier in specifiers.items() if "<" not in specifier]
    assert [re.split(r"\W", line)[0] for line in open_ended] == ["torch", "triton"], open_ended
    assert set(re.findall(r"^Requires-Python: (.+)$", metadata, re.M)[0].split(",")) == {">=3.11", "<3.14"}


def test_every_python_gets_a_megatron_core_that_exists_for_it() -> None:
    """0.16 is the last series for Python 3.11."""
    from packaging.requirements import Requirement

    source = ast.parse((ROOT / "setup.py").read_text())
    names = {t.id: node.value for node in source.body if isinstance(node, ast.Assign) for t in node.targets}
    wanted = [Requirement(line) for line in ast.literal_eval(names["INSTALL"]) if line.startswith("megatron-core")]
    newest = {"3.11": "0.16.1", "3.12": "0.19.2", "3.13": "0.19.2"}
    for python, version in newest.items():
        chosen = [r for r in wanted if r.marker is not None and r.marker.evaluate({"python_version": python})]
        assert len(chosen) == 1 and version in chosen[0].specifier, python
    assert not any("0.17.0" in r.specifier for r in wanted if r.marker.evaluate({"python_version": "3.11"}))


# One round with an attack, RLHF on the hardened model, best of n and the report, in two workers.
SHORT = [
    "experiment=synthetic",
    *("stage.sft.trainer.max_steps=20", "stage.train_rm.trainer.max_steps=6", "rl.max_steps=3"),
    *("synthetic.sft_rows=500", "synthetic.preference_pairs=60", "synthetic.validation_pairs=20"),
    *("sft_statistics.num_prompts=32", "sft_statistics.samples_per_prompt=3", "adversarial.held_out_prompts=0"),
    *("selection.threshold_z=0.5", "selection.null_ratio=0", "selection.last_fraction=1", "augmentation.warm_steps=2"),
    *("reward_model.reference_features=[]", "~pipeline.rlhf.r1_kl", "~pipeline.rlhf.hybrid", "rl.held_out_prompts=4"),
    *("best_of_n.prompts=4", "best_of_n.samples=4", "pipeline.room=", "pipeline.jobs=2"),
]


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_an_installed_wheel_runs_the_pipeline_from_any_directory(wheel: Path, tmp_path: Path) -> None:
    """The environment is empty but for the libraries, which are those of this one: to install them takes minutes."""
    environment, elsewhere = tmp_path / "environment", tmp_path / "elsewhere"
    elsewhere.mkdir()
    venv.create(environment, with_pip=False)
    python = environment / "bin" / "python"
    purelib = environment / "lib" / f"python{sys.version_info[0]}.{sys.version_info[1]}" / "site-packages"
    libraries = [path for path in sys.path if path.endswith("site-packages")]
    # a path in a .pth file is searched, but the .pth files there are not read: no editable nemo_advrm comes with it
    (purelib / "libraries.pth").write_text("\n".join(libraries))
    pip = [sys.executable, "-m", "pip", "--python", str(python), "install", "-q", "--no-deps", "--no-index"]
    # --ignore-installed: pip would find the editable installation among the libraries, and remove it
    installed = subprocess.run([*pip, "--ignore-installed", str(wheel)], capture_output=True, text=True)
    assert installed.returncode == 0, installed.stderr

    def run(*arguments: str) -> str:
        clean = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "VIRTUAL_ENV")}
        command = [environment / "bin" / "nemo-advrm", *arguments]
        done = subprocess.run(
            command, capture_output=True, text=True, cwd=elsewhere, env={**clean, "OMP_NUM_THREADS": "1"}
        )
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
        return done.stdout

    assert "pipeline" in run("--help")
    run("pipeline", *SHORT)
    (state,) = elsewhere.glob("runs/*/state.json")
    stages = json.loads(state.read_text())["stages"]
    assert {"round_0/attack", "round_0/select", "round_1/rm_1", "rlhf/adv_rm", "best_of_n/adv_rm"} <= set(stages)
    assert all(stage["status"] == "complete" for stage in stages.values())
    assert "<html" in (state.parent / "report" / "index.html").read_text()
    assert run("report", str(state.parent))  # its templates are of the wheel, too
    where = "import nemo_advrm, pathlib; print(pathlib.Path(nemo_advrm.__file__).parent)"
    found = subprocess.run([python, "-c", where], capture_output=True, text=True, cwd=elsewhere).stdout.strip()
    assert Path(found) == purelib / "nemo_advrm"


def test_makefile_names_a_missing_python_in_one_line(tmp_path: Path) -> None:
    make = ["make", "-C", str(ROOT), "setup", "PYTHON=no-such-python", f"VENV={tmp_path / 'venv'}"]
    run = subprocess.run(make, capture_output=True, text=True)
    assert run.returncode != 0
    errors = [line for line in run.stderr.splitlines() if line.startswith("error:")]
    assert len(errors) == 1 and "no-such-python" in errors[0] and "3.11" in errors[0]
    assert not (tmp_path / "venv").exists()


def test_an_environment_of_another_python_is_refused(tmp_path: Path) -> None:
    """Else the tests of one Python would run on another."""
    fake_python(tmp_path / "bin" / "python", "3.11")
    named = fake_python(tmp_path / "other" / "python3.12", "3.12")
    named.write_text(named.read_text() + "[ $1 = --version ] && echo Python 3.12.1; true\n")
    make = ["make", "-C", str(ROOT), "setup", f"PYTHON={named}", f"VENV={tmp_path}"]
    run = subprocess.run(make, capture_output=True, text=True)
    assert run.returncode != 0
    assert [line for line in run.stderr.splitlines() if line.startswith("error:")] == [
        f"error: {tmp_path} was not made with {named} ({tmp_path / 'bin' / 'python'}): remove it or name another VENV"
    ]


@pytest.mark.parametrize(("named", "accepted"), [("3.12", True), ("3.12.9", True), ("3.1", False), ("3.12.1", False)])
def test_a_named_version_is_any_release_of_it(tmp_path: Path, named: str, accepted: bool) -> None:
    """An environment of 3.12.9 stays good for PYTHON=3.12 when pyenv gets 3.12.10."""
    command(tmp_path / "bin" / "python", "echo Python 3.12.9")
    newer = command(tmp_path / "pyenv" / "versions" / "3.12.10" / "bin" / "python", "echo Python 3.12.10")
    make = ["make", "-C", str(ROOT), "same-python", f"PYTHON={named}", f"VENV={tmp_path}"]
    environment = {**os.environ, "PYENV_ROOT": str(newer.parents[3])}
    run = subprocess.run(make, capture_output=True, text=True, env=environment)
    refused = f"error: {tmp_path} was not made with {named} (Python 3.12.9): remove it or name another VENV"
    assert (run.returncode == 0, refused in run.stderr) == (accepted, not accepted), run.stderr


@pytest.mark.parametrize(
    ("configuration", "installer"),
    [
        ("global.timeout='60'", "uv"),
        ("global.index-url='https://packages.example/simple'", "pip"),
        (":env:.extra-index-url='https://packages.example/simple'", "pip"),
    ],
)
def test_pip_installs_where_its_configuration_names_an_index(
    tmp_path: Path, configuration: str, installer: str
) -> None:
    python, uv = tmp_path / "venv" / "bin" / "python", tmp_path / "uv"
    answers = f'case "$*" in --version) echo Python 3.12.9 ;; *"config list") echo "{configuration}" ;; esac'
    command(python, f'echo "pip $*" >> {tmp_path}/calls; {answers}')
    command(uv, f'echo "uv $*" >> {tmp_path}/calls')
    make = ["make", "-C", str(ROOT), "setup", "PYTHON=", f"VENV={tmp_path / 'venv'}", f"UV={uv}"]
    run = subprocess.run(make, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    torch, package = [line for line in (tmp_path / "calls").read_text().splitlines() if " install " in line]
    assert torch.startswith("pip ") and "torch==" in torch
    assert package.startswith(f"{installer} ") and package.endswith("-e .[dev,serve]")
    by = uv if installer == "uv" else "pip, whose configuration names a package index that uv does not read"
    assert f"packages by {by}\n" in run.stdout


def test_without_a_python_the_environment_for_nemo_aligner_is_kept(tmp_path: Path) -> None:
    kept = tmp_path / "aligner" / "kept"
    kept.parent.mkdir()
    kept.touch()
    stamp = tmp_path / "aligner" / ".installed"
    names = [f"ALIGNER_VENV={kept.parent}", f"ALIGNER_STAMP={stamp}", "PYTHON=no-such-python"]
    run = subprocess.run(["make", "-C", str(ROOT), str(stamp), *names], capture_output=True, text=True)
    assert run.returncode != 0 and kept.exists() and not stamp.exists()
    assert "no-such-python" in run.stderr and "not found" not in run.stderr.replace("was found", "")


def command(path: Path, script: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)
    return path


def fake_python(path: Path, version: str) -> Path:
    """A command that answers as a Python of this version does."""
    minor = int(version.split(".")[1])
    return command(path, f"[ {minor} -ge 11 ] && [ {minor} -lt 14 ] && echo {path}")


def find_python(*names: str, path: Path, home: Path) -> str:
    environment = {"PATH": f"{path}:/usr/bin:/bin", "PYENV_ROOT": str(home)}
    run = subprocess.run([ROOT / ".ci" / "find_python", *names], capture_output=True, text=True, env=environment)
    return run.stdout.strip()


def test_the_first_version_that_is_there_is_used_from_path_or_pyenv(tmp_path: Path) -> None:
    on_path, pyenv = tmp_path / "bin", tmp_path / "pyenv"
    newer = fake_python(on_path / "python3.13", "3.13")
    for version in ("3.12.9", "3.12.10"):
        fake_python(pyenv / "versions" / version / "bin" / "python", version)
    tried = {"path": on_path, "home": pyenv}
    assert find_python("3.13", "3.12", **tried) == str(newer)
    assert find_python("3.12", "3.13", **tried) == str(pyenv / "versions" / "3.12.10" / "bin" / "python")
    assert find_python(str(newer), **tried) == str(newer)


def test_only_versions_of_pyenv_are_searched_not_what_is_below_them(tmp_path: Path) -> None:
    versions = tmp_path / "3.12" / "versions"  # pyenv's own folder is no version either
    fake_python(versions / "3.11.4" / "envs" / "3.12-study" / "bin" / "python", "3.11")
    fake_python(versions / "3.11.4" / "bin" / "python", "3.11")
    assert find_python("3.12", path=tmp_path, home=versions.parent) == ""


def test_a_python_outside_the_range_is_not_used(tmp_path: Path) -> None:
    old = fake_python(tmp_path / "bin" / "python3.10", "3.10")
    assert find_python("3.10", str(old), path=tmp_path / "bin", home=tmp_path) == ""
