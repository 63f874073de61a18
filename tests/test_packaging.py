"""What is installed: a wheel that carries conf/, the command, and requirements bounded on both sides."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("setuptools", minversion="77", reason="building a wheel needs setuptools 77")
    source, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    # A copy, because a build leaves build/ and *.egg-info behind.
    for name in ("setup.py", "pyproject.toml", "LICENSE"):
        shutil.copy(ROOT / name, source)
    for name in ("conf", "nemo_advrm"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    pip = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "--no-index"]
    run = subprocess.run([*pip, "-w", str(out), str(source)], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    return next(out.glob("*.whl"))


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
    assert set(extras) == {"smollm2", "serve", "gpu", "docs", "dev"}
    assert requirements and all(">=" in line and "<" in line for line in requirements), requirements
    assert set(re.findall(r"^Requires-Python: (.+)$", metadata, re.M)[0].split(",")) == {">=3.11", "<3.12"}


def test_makefile_names_a_missing_python_in_one_line(tmp_path: Path) -> None:
    make = ["make", "-C", str(ROOT), "setup", "PYTHON=no-such-python", f"VENV={tmp_path / 'venv'}"]
    run = subprocess.run(make, capture_output=True, text=True)
    assert run.returncode != 0
    errors = [line for line in run.stderr.splitlines() if line.startswith("error:")]
    assert len(errors) == 1 and "no-such-python" in errors[0] and "3.11" in errors[0]
    assert not (tmp_path / "venv").exists()
