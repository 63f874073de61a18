"""The versions that this package was run with, and how the installed ones compare with them.

This is the only table of them. What may be installed is said by setup.py, and read here from the metadata of the
installed package. docs/install.md holds the table as ``python -m nemo_advrm.tried_versions`` prints it.
"""

from __future__ import annotations

import importlib.metadata
import platform
from collections.abc import Mapping
from dataclasses import dataclass

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import InvalidVersion, Version

PACKAGES = ("torch", "megatron-core", "nemo-toolkit", "lightning", "transformers", "numpy", "transformer-engine")


@dataclass(frozen=True)
class TriedSet:
    """Versions that ran together.

    Attributes:
        date: when, as year-month-day.
        ran: what was run, for a table and after a colon.
        versions: those of "python" and of PACKAGES, without local parts (+cpu). Empty: not installed. A package that is
            not named was not recorded.
    """

    date: str
    ran: str
    versions: Mapping[str, str]


def _on_cpu(python: str, torch: str, megatron_core: str, numpy: str, **others: str) -> dict[str, str]:
    """A set without Transformer Engine; ``others`` are the packages that differ from the usual ones."""
    usual = {"nemo-toolkit": "3.0.0", "lightning": "2.4.0", "transformers": "5.24.0", "transformer-engine": ""}
    named = {name.replace("_", "-"): version for name, version in others.items()}
    return {"python": python, "torch": torch, "megatron-core": megatron_core, **usual, "numpy": numpy, **named}


# A new row for every set that ran, the fullest run first.
TRIED = (
    TriedSet(
        "2026-11-28",
        "CPU: all tests, the pipeline and the study, over several commits",
        _on_cpu("3.11.7", "2.13.0", "0.16.1", numpy="2.4.6"),
    ),
    TriedSet(
        "2026-11-28",
        "CPU: tests of checkpoints, generation, parallel layouts, the optimizer, conversion and models",
        _on_cpu("3.12.1", "2.13.0", "0.19.2", numpy="2.5.5"),
    ),
    TriedSet(
        "2026-11-29",
        "CPU: the 172 tests marked platform",
        _on_cpu("3.13.0", "2.13.0", "0.19.2", numpy="2.5.5"),
    ),
    TriedSet(
        "2026-11-29",
        "CPU: the 172 tests marked platform",
        _on_cpu("3.13.0", "2.13.0", "0.18.2", numpy="2.5.5"),
    ),
    TriedSet(
        "2026-11-28",
        "CPU: 92 of the tests marked platform: checkpoints, generation, the optimizer, parallel layouts",
        _on_cpu("3.11.7", "2.9.1", "0.16.1", numpy="2.4.6"),
    ),
    TriedSet(
        "2026-11-28",
        "CPU: the wheel in an empty environment, every stage of experiment=synthetic in a few steps",
        _on_cpu("3.12.1", "2.14.1", "0.19.2", numpy="2.5.5"),
    ),
    TriedSet(
        "2026-11-27",
        "one H200, at commit cbcff36: training in bf16 and FP8, scoring, generation",
        {
            **{"python": "3.12.3", "torch": "2.11.0", "megatron-core": "0.16.1", "transformer-engine": "2.11.0"},
            **{"nemo-toolkit": "3.0.0", "lightning": "2.4.0", "transformers": "5.17.0"},
        },
    ),
)


def installed() -> dict[str, str]:
    """Returns the versions of this environment, by the names of a TriedSet; empty where nothing is installed."""
    return {"python": platform.python_version(), **{package: version_of(package) for package in PACKAGES}}


def requirements() -> dict[str, Requirement]:
    """Returns what the installed nemo_advrm asks for on this Python; empty if it runs without being installed."""
    try:
        lines = importlib.metadata.requires("nemo_advrm") or []
    except importlib.metadata.PackageNotFoundError:
        return {}
    wanted = [Requirement(line) for line in lines]
    valid = [one for one in wanted if one.marker is None or any(one.marker.evaluate({"extra": e}) for e in ("", "gpu"))]
    return {canonicalize_name(one.name): one for one in valid}


def compare(package: str, version: str) -> str:
    """Returns how an installed version of ``package`` stands to the tried ones and to what setup.py asks for."""
    tried = sorted({Version(one.versions[package]) for one in TRIED if one.versions.get(package)})
    try:
        # without the local part: 2.13.0+cpu and 2.13.0+cu130 are one release
        found = Version(Version(version).public)
    except InvalidVersion:
        return "untested: its version cannot be compared"
    span = str(tried[0]) if len(tried) == 1 else f"{tried[0]} to {tried[-1]}"
    if found in tried:
        said = "tried"
    elif tried[0] < found < tried[-1]:
        said = f"untested itself; {', '.join(map(str, tried))} were tried"
    else:
        said = f"untested: {span} {'was' if len(tried) == 1 else 'were'} tried"
    wanted = requirements().get(package)
    if wanted is not None and not wanted.specifier.contains(found, prereleases=True):
        said += f"; nemo_advrm asks for {_in_order(wanted)}"
    return said


def compare_set(here: Mapping[str, str]) -> tuple[bool, str]:
    """Returns whether the versions ``here`` ran together, and when, or what differs from the nearest set that did."""
    differing = [(_differences(one, here), one) for one in TRIED]
    differences, nearest = min(differing, key=lambda pair: len(pair[0]))  # the first of equals, the fullest run
    if not differences:
        return True, f"these versions ran together on {nearest.date}; {nearest.ran}"
    listed = ", ".join(
        f"{name} {there or 'absent'} (here {here.get(name) or 'absent'})" for name, there in differences.items()
    )
    return False, f"untested together. Nearest set, of {nearest.date}: {listed}"


def table() -> str:
    """Returns the table of docs/install.md."""
    names = ("python", *PACKAGES)
    lines = [f"| date | {' | '.join(name.capitalize() if name == 'python' else name for name in names)} | what ran |"]
    lines.append("|---" * (len(names) + 2) + "|")
    for one in TRIED:
        cells = [(one.versions[name] or "none") if name in one.versions else "not recorded" for name in names]
        lines.append("| " + " | ".join([one.date, *cells, one.ran]) + " |")
    return "\n".join(lines)


def version_of(package: str) -> str:
    """Returns the version of an installed package, empty where it is not installed."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return ""


def _in_order(wanted: Requirement) -> str:
    return ",".join(sorted(map(str, wanted.specifier), reverse=True))


def _differences(tried: TriedSet, here: Mapping[str, str]) -> dict[str, str]:
    """Returns the versions of ``tried`` that are not those ``here``; releases of one Python 3.x count as equal."""
    found = {}
    for name, there in tried.versions.items():
        mine = here.get(name, "").partition("+")[0]
        same = there.rpartition(".")[0] == mine.rpartition(".")[0] if name == "python" else there == mine
        if not same:
            found[name] = there
    return found


if __name__ == "__main__":
    print(table())
