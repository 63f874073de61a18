"""Wheels for tests of installations: this package's own, and empty ones of any name and version."""

from __future__ import annotations

import base64
import hashlib
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def build_wheel(folder: Path) -> Path:
    """Builds the wheel of this tree in ``folder``, without the network."""
    source, out = folder / "source", folder / "wheel"
    source.mkdir()
    # A copy, because a build leaves build/ and *.egg-info behind.
    for name in ("setup.py", "pyproject.toml", "LICENSE"):
        shutil.copy(ROOT / name, source)
    for name in ("conf", "nemo_advrm"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    pip = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "--no-index"]
    run = subprocess.run([*pip, "-w", str(out), str(source)], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    return next(out.glob("*.whl"))


def metadata(name: str, version: str, requires: Sequence[str] = (), extras: Sequence[str] = ()) -> str:
    lines = ["Metadata-Version: 2.1", f"Name: {name}", f"Version: {version}"]
    lines += [f"Provides-Extra: {extra}" for extra in extras] + [f"Requires-Dist: {one}" for one in requires]
    return "\n".join(lines) + "\n"


def empty_wheel(folder: Path, name: str, version: str, *requires: str, extras: Sequence[str] = ()) -> Path:
    """A wheel with one module of its own, as an index would offer it."""
    stem = f"{name.replace('-', '_')}-{version}"
    files = {
        f"{stem.partition('-')[0]}_module.py": "",
        f"{stem}.dist-info/METADATA": metadata(name, version, requires, extras),
        f"{stem}.dist-info/WHEEL": "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }
    record = "".join(f"{path},sha256={_digest(text)},{len(text)}\n" for path, text in files.items())
    files[f"{stem}.dist-info/RECORD"] = f"{record}{stem}.dist-info/RECORD,,\n"
    wheel = folder / f"{stem}-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        for path, text in files.items():
            archive.writestr(path, text)
    return wheel


def install_by_hand(
    site_packages: Path,
    name: str,
    version: str,
    module: str = "",
    requires: Sequence[str] = (),
    extras: Sequence[str] = (),
) -> None:
    """Puts an installed package of this version into an environment, as pip would leave it."""
    info = site_packages / f"{name.replace('-', '_')}-{version}.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(metadata(name, version, requires, extras))
    (info / "INSTALLER").write_text("pip\n")
    files = [f"{info.name}/METADATA", f"{info.name}/INSTALLER", f"{info.name}/RECORD"]
    if module:
        path = site_packages / module.replace(".", "/") / "__init__.py"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"__version__ = {version!r}\n")
        files.append(str(path.relative_to(site_packages)))
    (info / "RECORD").write_text("".join(f"{file},,\n" for file in files))


def _digest(text: str) -> str:
    return base64.urlsafe_b64encode(hashlib.sha256(text.encode()).digest()).decode().rstrip("=")
