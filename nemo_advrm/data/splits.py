"""Finds the data files of a directory, assigns them to splits, and selects the split for a purpose.

Split keywords are those of Hugging Face `datasets`. Its own search is not used: it treats files without a keyword as
training data and silently concatenates files that it cannot distinguish.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePath

from nemo_advrm.errors import DataError

JSON_SUFFIXES = (".jsonl", ".jsonl.gz", ".json", ".json.gz")
TABLE_SUFFIXES = (".parquet", ".arrow")
SUFFIXES = (*JSON_SUFFIXES, *TABLE_SUFFIXES)

# Families of splits per role, in order of preference, and the key that selects another split.
_WANTED = {"train": ("train",), "prompts": ("train",), "validation": ("validation", "test")}
_KEY = {role: f"data.{role}_split" for role in _WANTED}
_FAMILIES = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("validation", "valid", "val", "dev", "development", "eval", "evaluation"), "validation"),
    **dict.fromkeys(("held", "heldout", "holdout"), "validation"),
    **dict.fromkeys(("test", "testing"), "test"),
}
_SHARD = re.compile(r"(.+)-\d{5}-of-\d{5}")
_NO_DATA = (
    "config.json",
    "dataset_dict.json",
    "dataset_info.json",
    "dataset_infos.json",
    "metadata.json",
    "package.json",
    "state.json",
)


@dataclass(frozen=True)
class Split:
    """A named part of a data set; `family` is train, validation, test, or "" when the name contains no keyword."""

    name: str
    family: str = ""


def split_named(name: str) -> Split:
    """Return the split of this name: "train_prefs" has the family train."""
    found = _families(name)
    return Split(name, found.pop() if len(found) == 1 else "")


def _families(name: str) -> set[str]:
    """Return the families whose keywords occur in a name: {"train"} for "trainPairs"."""
    words = re.sub(r"([a-z])(?=[A-Z])", r"\1_", name).lower()
    return {_FAMILIES[word] for word in re.split(r"[^a-z]+", words) if word in _FAMILIES}


def choose_split(splits: Iterable[Split], role: str, wanted: str, place: str) -> Split:
    """Return the split for `role` (train, prompts or validation) among those at `place`, or the one named `wanted`.

    Training never uses a test or validation split unless it is named. Validation uses the validation split, otherwise
    the test split, otherwise the only split.

    Raises DataError, with the list of splits, when none or more than one matches.
    """
    known = list(dict.fromkeys(splits))
    listing = ", ".join(split.name or "(files without a split name)" for split in known)
    key = _KEY[role]
    if wanted:
        exact = [split for split in known if split.name == wanted]
        near = [split for split in known if wanted in (split.name.rpartition("/")[2], split.family)]
        found = exact or near
        if not found:
            raise DataError(f"{place}: has no split {wanted!r}; it has: {listing} ({key})")
    else:
        by_family = ([split for split in known if split.family == family] for family in _WANTED[role])
        found = next(filter(None, by_family), [])
        # A single split is used whatever its name, except a test split for training. Files without a split name next to
        # a split are ambiguous.
        loose = any(not split.name for split in known)
        if len(known) == 1 and (role == "validation" or known[0].family in ("", "train")):
            found = known
        elif loose:
            raise DataError(f"{place}: ambiguous files: {listing}; choose with {key}, or name a file")
        elif not found:
            raise DataError(f"{place}: has no {_WANTED[role][0]} split; it has: {listing}; choose with {key}")
    if len(found) > 1:
        names = ", ".join(split.name for split in found)
        raise DataError(f"{place}: more than one split matches: {names} (of: {listing}); choose with {key}")
    return found[0]


@dataclass(frozen=True)
class Found:
    """The selected data files of a directory, the name of their split ("" for none), and notes on the other files."""

    files: tuple[Path, ...]
    split: str
    notes: tuple[str, ...] = ()


def find_files(directory: Path, role: str, wanted: str = "") -> Found:
    """Return the files of one split in `directory` and its folders, in the layout of the HF hub.

    Hidden files (`._x.jsonl`), descriptions (dataset_info.json, README.md) and other kinds of files are skipped.

    Raises DataError when there are no data files, or when the split is ambiguous.
    """
    data: dict[Split, list[Path]] = {}
    others = []
    for file in sorted(directory.rglob("*")):
        inside = file.relative_to(directory)
        if any(part.startswith((".", "__")) for part in inside.parts) or not file.is_file():
            continue
        if file.name.endswith(SUFFIXES) and file.name not in _NO_DATA:
            data.setdefault(_split_of(inside), []).append(file)
        elif file.name not in _NO_DATA and file.suffix.lower() not in (
            "",
            ".md",
            ".txt",
            ".lock",
            ".py",
            ".gitattributes",
        ):
            others.append(str(inside))
    if not data:
        beside = f"; it contains: {', '.join(others)}" if others else ""
        raise DataError(f"{directory}: no data files in this directory ({', '.join(SUFFIXES)}){beside}")
    split = choose_split(data, role, wanted, str(directory))
    files = data[split]
    _refuse_copies(directory, files)
    rest = sorted(other.name for other in data if other != split)
    notes = [f"other splits there: {', '.join(rest)}"] if rest else []
    notes += [f"files not read: {', '.join(others)}"] if others else []
    return Found(tuple(files), split.name, tuple(notes))


def _split_of(inside: PurePath) -> Split:
    """Return the split of a file, from its own name or from a folder; the split's name includes the folders above."""
    stem = _stem(inside.name)
    shard = _SHARD.fullmatch(stem)
    # A number at the end counts the parts of a split, but not a version: "train_v1" and "train_v2" hold the same rows.
    own = shard[1] if shard else re.sub(r"(?<![-_. ][vV])(?<!\d)[-_. ]?\d+$", "", stem)
    folders = [part for part in inside.parts[:-1] if part != "data"]
    if _families(own):  # a name of two families ("train_test") stays a split of its own
        return _within(folders, own)
    for depth in range(len(folders) - 1, -1, -1):
        if split_named(folders[depth]).family:
            return _within(folders[:depth], folders[depth])
    return _within(folders, shard[1] if shard else "")


def _within(folders: Sequence[str], name: str) -> Split:
    return Split("/".join((*folders, name)), split_named(name).family)


def _stem(name: str) -> str:
    suffix = max((suffix for suffix in SUFFIXES if name.endswith(suffix)), key=len)
    return name.removesuffix(suffix)


def _refuse_copies(directory: Path, files: Sequence[Path]) -> None:
    """Raise DataError for files that differ only in their suffix: the same rows would be read twice."""
    seen: dict[Path, Path] = {}
    for file in files:
        first = seen.setdefault(file.parent / _stem(file.name), file)
        if first != file:
            raise DataError(
                f"{directory}: {first.name} and {file.name} look like the same rows twice: name one of them"
            )
