"""Writes docs/configuration.md from the schema: ``python -m nemo_advrm.config.reference > docs/configuration.md``."""

from __future__ import annotations

import dataclasses
import typing
from collections.abc import Iterator

from nemo_advrm.config import schema
from nemo_advrm.config.keys import ANY_NAME, Key, all_keys, shown, type_name

_HEAD = """# Configuration

Every key, with its default. It is set on the command line as `key=value`, in a file of `conf/` or of your own
(`hydra.searchpath=[DIR]`), or for one command as `stage.COMMAND.key=value`. `NAME` is a name of your choice.

The last column says what happens when a command is run again in its run directory with another value: it is refused
(empty), goes on and records the change (*recorded*), or goes on (*free*). The role *architecture* marks the keys that a
checkpoint carries.

This page is generated from the schema, `nemo_advrm/config/schema.py`.
"""


def page() -> str:
    """The whole page as Markdown."""
    sections: dict[str, list[Key]] = {"": []}
    for name, key in all_keys().items():
        sections.setdefault(name.partition(".")[0] if "." in name else "", []).append(key)
    parts = [_HEAD]
    for title, keys in sections.items():
        kind = typing.get_type_hints(schema.Config).get(title)
        about = (kind.__doc__ or "").strip() if dataclasses.is_dataclass(kind) else "Keys outside of any section."
        parts += [f"## {title or 'Run'}\n", f"{about}\n", *_table(keys)]
    flat_ones = {
        "audit": schema.AuditConfig,
        "convert": schema.ConvertConfig,
        "export_pairs": schema.ExportPairsConfig,
    }
    for command, flat in flat_ones.items():
        parts += [f"## nemo-advrm {command}\n", "Typed without a section.\n", *_table(all_keys(flat).values())]
    return "\n".join(parts).rstrip() + "\n"


def _table(keys: typing.Iterable[Key]) -> Iterator[str]:
    yield "| key | type | default | meaning | role | at a restart |"
    yield "|---|---|---|---|---|---|"
    for key in keys:
        about = key.about
        allowed = "" if about.limits is None or str(about.limits) == "finite" else f" ({about.limits})"
        restart = "" if about.restart.value == "same" else about.restart.value
        name = key.name.replace(ANY_NAME, "NAME").rstrip("_")
        cells = [f"`{name}`", type_name(key.annotation), f"`{shown(key.default)}`"]
        cells += [about.line + allowed, about.role.value, restart]
        yield "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"
    yield ""


if __name__ == "__main__":
    print(page(), end="")
