"""Used by install.sh: which packages of an image stay as they are, and whether they did.

    kept_packages.py plan FOLDER WHEEL [EXTRA...]   by the image's Python: write FOLDER/{constraints,requirements}.txt
    kept_packages.py check FOLDER                   by the new environment's Python: fail if one was replaced or hidden

Kept are the packages that are compiled against the image's CUDA and PyTorch, whatever their version: nemo-advrm doctor
says which versions were never tried. It needs nothing but the standard library and pip.
"""

from __future__ import annotations

import fnmatch
import importlib.metadata
import importlib.util
import json
import os
import re
import sys
import sysconfig
import zipfile
from collections.abc import Iterable
from email.parser import Parser
from pathlib import Path

try:
    from packaging.requirements import Requirement
except ImportError:
    from pip._vendor.packaging.requirements import Requirement

KEPT = (
    *("torch", "torchvision", "torchaudio", "torchao", "torch-tensorrt", "triton", "pytorch-triton*"),
    *("transformer-engine*", "apex", "flash-attn*", "megatron-core", "megatron-bridge", "megatron-fsdp"),
    # extensions that were compiled against numpy 1 do not load with numpy 2
    *("nvidia-*", "cuda-*", "cupy-*", "numpy"),
)
# A package that an image holds under another name (pytorch-triton), or without metadata, is known by its module.
MODULES = {"torch": "torch", "triton": "triton", "megatron-core": "megatron.core", "numpy": "numpy"}


def normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def is_of(patterns: Iterable[str], name: str) -> bool:
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)


def versions(path: list[str] | None = None) -> dict[str, str]:
    """Returns the packages of ``path`` (default: those that can be imported); the first of a name counts."""
    found: dict[str, str] = {}
    for one in importlib.metadata.distributions(**({} if path is None else {"path": path})):
        if one.metadata["Name"]:  # a folder that an interrupted pip left has none
            found.setdefault(normal(one.metadata["Name"]), one.version)
    return found


def has_module(name: str) -> bool:
    try:
        return importlib.util.find_spec(name) is not None
    except ImportError:  # its parent package is not there
        return False


def requirements(wheel: Path, extras: list[str]) -> list[Requirement]:
    """Returns what a wheel asks for on this Python."""
    with zipfile.ZipFile(wheel) as archive:
        name = next(name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
        metadata = Parser().parsestr(archive.read(name).decode())
    unknown = set(extras) - set(metadata.get_all("Provides-Extra") or [])
    if unknown:
        sys.exit(f"error: {wheel.name} has no extra {', '.join(sorted(unknown))}")
    wanted = [Requirement(line) for line in metadata.get_all("Requires-Dist") or []]
    return [
        one for one in wanted if one.marker is None or any(one.marker.evaluate({"extra": e}) for e in ("", *extras))
    ]


def plan(folder: Path, wheel: Path, extras: list[str]) -> None:
    here = versions()
    patterns = (*KEPT, *os.environ.get("ALSO_KEEP", "").split())
    kept = {name: version for name, version in here.items() if is_of(patterns, name)}
    wanted = []
    for one in requirements(wheel, extras):
        name = normal(one.name)
        if name in kept or (name in MODULES and has_module(MODULES[name])):
            continue
        one.marker = None
        wanted.append(one)
    (folder / "constraints.txt").write_text("".join(f"{name}=={version}\n" for name, version in sorted(kept.items())))
    (folder / "requirements.txt").write_text("".join(f"{one}\n" for one in wanted))
    added = [normal(one.name) for one in wanted]
    (folder / "before.json").write_text(json.dumps({"image": here, "kept": kept, "wanted": added}))
    print("kept as they are:", " ".join(f"{name}=={version}" for name, version in sorted(kept.items())) or "nothing")


def check(folder: Path) -> None:
    before = json.loads((folder / "before.json").read_text())  # noqa: TID251 (plan has just written it)
    own = versions([sysconfig.get_path("purelib")])
    now = versions()
    wrong = [
        f"{name} {version} became {now.get(name)}"
        for name, version in before["kept"].items()
        if now.get(name) != version
    ]
    # also one of another name, whose files would hide the image's (nvidia-cublas, triton over pytorch-triton)
    wrong += [f"{name} {own[name]} was added" for name in own if is_of(KEPT, name) and name not in before["wanted"]]
    if wrong:
        sys.exit("error: packages of the image would be replaced: " + "; ".join(sorted(wrong)))
    hidden = [f"{name} {version} by {now[name]}" for name, version in own.items() if now[name] != version]
    if hidden:  # PYTHONPATH, which modules of clusters set, comes before any environment
        sys.exit("error: needed packages are hidden by older ones of PYTHONPATH: " + "; ".join(sorted(hidden)))
    for name, version in sorted(own.items()):
        if name in before["image"]:
            print(f"newer here, the image's stays beneath: {name} {before['image'][name]} -> {version}")


if __name__ == "__main__":
    if sys.argv[1] == "plan":
        plan(Path(sys.argv[2]), Path(sys.argv[3]), sys.argv[4:])
    else:
        check(Path(sys.argv[2]))
