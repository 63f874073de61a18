"""Finds the data files of a directory, assigns them to splits, and selects the split for a purpose.

Split keywords are those of Hugging Face `datasets`. Its own search is not used: it treats files without a keyword as
training data and silently concatenates files that it cannot distinguish.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
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
_NO_DATA_SUFFIXES = ("", ".md", ".txt", ".lock", ".py", ".gitattributes")


def _families(name: str) -> set[str]:
    """Return the families whose keywords occur in a name: {"train"} for "trainPairs"."""
    words = re.sub(r"([a-z])(?=[A-Z])", r"\1_", name).lower()
    return {_FAMILIES[word] for word in re.split(r"[^a-z]+", words) if word in _FAMILIES}


def _family(split: str) -> str:
    """Return train, validation or test for the name of a split ("train_prefs"); "" without one keyword."""
    found = _families(split.rpartition("/")[2])
    return found.pop() if len(found) == 1 else ""


def choose_split(splits: Iterable[str], role: str, wanted: str, place: str) -> str:
    """Return the split for `role` (train, prompts or validation) among those at `place`, or the one named `wanted`.

    Training never uses a test or validation split unless it is named. Validation uses the validation split, otherwise
    the test split, otherwise the only split.

    Raises DataError, with the list of splits, when none or more than one matches.
    """
    known = list(dict.fromkeys(splits))
    listing = ", ".join(split or "(files without a split name)" for split in known)
    key = _KEY[role]
    if wanted:
        near = [split for split in known if wanted in (split.rpartition("/")[2], _family(split))]
        found = [wanted] if wanted in known else near
        if not found:
            raise DataError(f"{place}: has no split {wanted!r}; it has: {listing} ({key})")
    else:
        by_family = ([split for split in known if _family(split) == family] for family in _WANTED[role])
        found = next(filter(None, by_family), [])
        # A single split is used whatever its name, except a test split for training. Files without a split name next to
        # a split are ambiguous.
        if len(known) == 1 and (role == "validation" or _family(known[0]) in ("", "train")):
            found = known
        elif "" in known:
            raise DataError(f"{place}: ambiguous files: {listing}; choose with {key}, or name a file")
        elif not found:
            raise DataError(f"{place}: has no {_WANTED[role][0]} split; it has: {listing}; choose with {key}")
    if len(found) > 1:
        raise DataError(f"{place}: more than one split matches: {', '.join(found)} (of: {listing}); choose with {key}")
    return found[0]


def find_files(directory: Path) -> tuple[dict[str, list[Path]], list[str]]:
    """Return the data files in `directory` and its folders by split ("" for none), and the names of other files.

    Hidden files (`._x.jsonl`), descriptions (dataset_info.json, README.md) and the like are left out. The layout is
    that of the HF hub. Raises DataError when there are no data files.
    """
    data: dict[str, list[Path]] = {}
    others = []
    for file in sorted(directory.rglob("*")):
        inside = file.relative_to(directory)
        hidden = any(part.startswith((".", "__")) for part in inside.parts)
        if hidden or not file.is_file() or file.name in _NO_DATA:
            continue
        if file.name.endswith(SUFFIXES):
            data.setdefault(_split_of(inside), []).append(file)
        elif file.suffix.lower() not in _NO_DATA_SUFFIXES:
            others.append(str(inside))
    if not data:
        beside = f"; it contains: {', '.join(others)}" if others else ""
        raise DataError(f"{directory}: no data files in this directory ({', '.join(SUFFIXES)}){beside}")
    return data, others


def _split_of(inside: PurePath) -> str:
    """Return the split of a file, from its own name or from a folder; the split's name includes the folders above."""
    stem = _stem(inside.name)
    shard = _SHARD.fullmatch(stem)
    # A number at the end counts the parts of a split, but not a version: "train_v1" and "train_v2" hold the same rows.
    own = shard[1] if shard else re.sub(r"(?<![-_. ][vV])(?<!\d)[-_. ]?\d+$", "", stem)
    folders = [part for part in inside.parts[:-1] if part != "data"]
    if _families(own):  # a name of two families ("train_test") stays a split of its own
        return "/".join((*folders, own))
    for depth in range(len(folders), 0, -1):
        if _family(folders[depth - 1]):
            return "/".join(folders[:depth])
    return "/".join((*folders, shard[1] if shard else ""))


def _stem(name: str) -> str:
    suffix = max((suffix for suffix in SUFFIXES if name.endswith(suffix)), key=len)
    return name.removesuffix(suffix)


def refuse_copies(directory: Path, files: Sequence[Path]) -> None:
    """Raise DataError for files that differ only in their suffix: the same rows would be read twice."""
    seen: dict[Path, Path] = {}
    for file in files:
        first = seen.setdefault(file.parent / _stem(file.name), file)
        if first != file:
            raise DataError(
                f"{directory}: {first.name} and {file.name} look like the same rows twice: name one of them"
            )
