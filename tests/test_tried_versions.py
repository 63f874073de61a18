"""The table of tried versions agrees with setup.py, and doctor says what of an environment it does not hold."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.version import Version

from nemo_advrm import tried_versions
from nemo_advrm.commands import doctor
from nemo_advrm.tried_versions import TRIED, TriedSet, compare, compare_set

ROOT = Path(__file__).resolve().parent.parent

OLD = TriedSet("2026-01-01", "all tests", {"python": "3.11.7", "torch": "2.11.0", "transformer-engine": ""})
NEW = TriedSet("2026-02-01", "one test", {"python": "3.12.1", "torch": "2.13.0", "transformer-engine": "2.11.0"})


@pytest.fixture
def two_sets(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tried_versions, "TRIED", (OLD, NEW))
    monkeypatch.setattr(tried_versions, "requirements", lambda: {"torch": Requirement("torch>=2.10,<2.15")})


def wanted(python: str) -> dict[str, Requirement]:
    """The requirements of setup.py on one Python, those of the extra gpu among them."""
    source = ast.parse((ROOT / "setup.py").read_text())
    values = {t.id: node.value for node in source.body if isinstance(node, ast.Assign) for t in node.targets}
    lines = ast.literal_eval(values["INSTALL"])
    extras = values["EXTRAS"]
    assert isinstance(extras, ast.Dict)
    (gpu,) = [
        v for k, v in zip(extras.keys, extras.values, strict=True) if ast.literal_eval(k or ast.Constant("")) == "gpu"
    ]
    found = [Requirement(line) for line in (*lines, *ast.literal_eval(gpu))]
    here = {"python_version": python.rpartition(".")[0]}
    return {one.name.replace("_", "-"): one for one in found if one.marker is None or one.marker.evaluate(here)}


@pytest.mark.parametrize("tried", TRIED, ids=lambda one: f"{one.date}-{one.versions['python']}")
def test_setup_py_allows_every_set_that_was_tried(tried: TriedSet) -> None:
    assert set(tried.versions) <= {"python", *tried_versions.PACKAGES}
    requirements = wanted(tried.versions["python"])
    versions = {name: version for name, version in tried.versions.items() if name != "python" and version}
    outside = {name: version for name, version in versions.items() if version not in requirements[name].specifier}
    assert not outside


def test_the_lower_bounds_of_setup_py_were_tried() -> None:
    """Except that of Transformer Engine, which is Megatron-Core's."""
    bounds = {}
    for python in ("3.11.7", "3.12.1", "3.13.0"):
        for name, one in wanted(python).items():
            bounds[name] = next(Version(s.version) for s in one.specifier if s.operator == ">=")
    for package in set(tried_versions.PACKAGES) - {"transformer-engine"}:
        tried = min(Version(one.versions[package]) for one in TRIED if package in one.versions)
        assert bounds[package] == tried, package


def test_the_page_on_installation_holds_the_table() -> None:
    made = "python -m nemo_advrm.tried_versions"
    assert tried_versions.table() in (ROOT / "docs" / "install.md").read_text(), f"put in what this prints: {made}"


@pytest.mark.parametrize(
    ("version", "said"),
    [
        ("2.13.0", "tried"),
        ("2.13.0+cpu", "tried"),
        ("2.12.0a0+5aff3928d8.nv26.06", "untested itself; 2.11.0, 2.13.0 were tried"),
        ("2.14.1", "untested: 2.11.0 to 2.13.0 were tried"),
        ("2.10.0", "untested: 2.11.0 to 2.13.0 were tried"),
        ("2.10.0a0+b4e4ee81d3", "untested: 2.11.0 to 2.13.0 were tried; nemo_advrm asks for >=2.10,<2.15"),
        ("2.15.0", "untested: 2.11.0 to 2.13.0 were tried; nemo_advrm asks for >=2.10,<2.15"),
        ("main", "untested: its version cannot be compared"),
    ],
)
def test_a_version_is_tried_or_untested(two_sets: None, version: str, said: str) -> None:
    assert compare("torch", version) == said


def test_a_single_tried_version_is_named(two_sets: None) -> None:
    assert compare("transformer-engine", "2.13.0") == "untested: 2.11.0 was tried"


def test_versions_that_ran_together_are_a_tried_set(two_sets: None) -> None:
    here = {"python": "3.11.9", "torch": "2.11.0+cpu", "numpy": "1.0", "transformer-engine": ""}
    assert compare_set(here) == (True, "these versions ran together on 2026-01-01; all tests")


def test_tried_versions_that_did_not_run_together_are_untested(two_sets: None) -> None:
    here = {"python": "3.12.3", "torch": "2.11.0", "transformer-engine": "2.11.0"}
    assert compare_set(here) == (
        False,
        "untested together. Nearest set, of 2026-02-01: torch 2.13.0 (here 2.11.0)",
    )
    here = {"python": "3.11.7", "torch": "2.11.0", "transformer-engine": "2.13.0"}
    assert compare_set(here)[1].endswith("transformer-engine absent (here 2.13.0)")


def test_doctor_tells_an_untested_environment(monkeypatch: pytest.MonkeyPatch, two_sets: None) -> None:
    monkeypatch.setattr(tried_versions, "version_of", lambda package: "2.99.0")
    required = doctor._required("torch")
    assert required.present and required.meaning.startswith(
        "untested: 2.11.0 to 2.13.0 were tried; nemo_advrm asks for"
    )
    together = doctor._tried_set(tried_versions.installed())
    assert not together.present and "torch 2.11.0 (here 2.99.0)" in together.meaning
    assert "untested" in doctor._python("3.14.0") and doctor._python("3.11.1") == "tried"


def test_the_requirements_are_read_from_the_metadata() -> None:
    found = tried_versions.requirements()
    assert {"torch", "megatron-core", "nemo-toolkit", "transformer-engine"} <= set(found)
    assert "pytest" not in found  # of the extra dev
