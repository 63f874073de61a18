"""docs/method.md names functions, files and configuration keys that exist, and every public objective."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

from nemo_advrm.config.schema import Config, RLHFRunConfig

ROOT = Path(__file__).parents[2]
TEXT = (ROOT / "docs" / "method.md").read_text()
LINKS = re.findall(r"\[`(\w+)`\]\(\.\./([\w/]+\.py)\)", TEXT)


def schema_keys(config: object, prefix: str = "") -> set[str]:
    keys = set()
    for field in dataclasses.fields(config):  # type: ignore[arg-type]
        value = getattr(config, field.name)
        keys |= (
            schema_keys(value, f"{prefix}{field.name}.") if dataclasses.is_dataclass(value) else {prefix + field.name}
        )
    return keys


def test_every_linked_function_stands_in_the_file_it_is_linked_to() -> None:
    assert LINKS
    for name, file in LINKS:
        assert re.search(rf"^(def|class) {name}\b", (ROOT / file).read_text(), re.MULTILINE), f"{name} is not in {file}"


def test_every_key_is_in_the_schema() -> None:
    known = schema_keys(Config()) | {f"pipeline.rlhf.NAME.{field.name}" for field in dataclasses.fields(RLHFRunConfig)}
    sections = {field.name for field in dataclasses.fields(Config)} - {"stage"}
    named = {key for key in re.findall(r"`([\w.]+\.\w+)`", TEXT) if key.split(".")[0] in sections}
    assert len(named) > 40
    assert named <= known, f"not in the schema: {sorted(named - known)}"


def test_every_equation_of_the_objectives_is_in_the_document() -> None:
    linked = {name for name, _ in LINKS}
    helpers = {"unknown_name", "zero_masked", "others", "others_mean", "reads_labels"}
    for file in (ROOT / "nemo_advrm" / "objectives").glob("*.py"):
        public = set(re.findall(r"^(?:def|class) ([a-zA-Z]\w*)", file.read_text(), re.MULTILINE))
        assert public - helpers <= linked, f"{file.name}: {sorted(public - helpers - linked)}"
