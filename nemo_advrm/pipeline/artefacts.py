"""Lists the files that each step of a pipeline writes, and checks that they are still there."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from nemo_advrm.attacks import summary_file
from nemo_advrm.attacks.attack_summary import check_samples
from nemo_advrm.engine import manifest
from nemo_advrm.errors import DataError
from nemo_advrm.pipeline.branches import home
from nemo_advrm.pipeline.dag import Step
from nemo_advrm.run_directory import results

# kinds of steps with a directory of their own: the file that marks them as finished, and the check of its content
_MARKS: dict[str, tuple[str, results.Check]] = {
    **dict.fromkeys(("sft", "train_rm", "rlhf"), ("result.json", results.wrong_metrics)),
    "attack": ("summary.json", summary_file.wrong_adversary),
    "join": ("summary.json", summary_file.wrong_attack),
}
# the files of the others, in the run directory or in that of a branch and round
_FILES = {
    "reference": ("reference.jsonl", "reference.hidden_states.safetensors"),
    "select": ("pairs.jsonl",),
    "random": ("random_pairs.jsonl",),
    "samples": ("best_of_n/samples.jsonl",),
    "room": ("room.json",),
}


def describe(directory: Path, step: Step) -> dict[str, manifest.Entry]:
    """Sizes and hashes of the files of a step without a directory of its own."""
    return manifest.describe(directory, [name for name in _names(directory, step) if (directory / name).exists()])


def are_there(directory: Path, step: Step, written: dict[str, Any] | None) -> bool:
    """Whether the files of a complete step are there; False when all are gone.

    ``written`` is what :func:`describe` returned when the step ended. Raises DataError, which names file and cure, when
    some are missing, cut or changed.
    """
    if step.kind in _MARKS:
        place = directory / step.name
        if not place.exists():
            return False
        mark, wrong = _MARKS[step.kind]
        if results.read_finished(place, mark, wrong=wrong) is None:
            raise _damaged(step, f"{place / mark} is missing", place)
        if step.kind == "join":  # selection marks rows of it, so it is in no manifest
            check_samples(place, f"remove {place} to run the step again")
        return True
    entries = written or {}
    missing = [name for name in entries if not (directory / name).exists()]
    if entries and len(missing) == len(entries):
        return False
    for name, entry in entries.items():
        path = directory / name
        if name in missing:
            raise _damaged(step, f"{path} is missing", path.parent)
        if not path.is_file() or manifest.describe(directory, [name])[name] != entry:
            raise _damaged(step, f"the content of {path} is not what was written", path)
    return True


def _names(directory: Path, step: Step) -> list[str]:
    if step.kind == "preferences":  # one file per member, and the validation pairs
        return sorted(str(path.relative_to(directory)) for path in (directory / step.name).glob("*.jsonl"))
    if step.kind == "best_of_n":
        return [f"{step.name}.json"]
    place = f"{home(step.branch, step.round)}/" if step.kind in ("reference", "select", "random") else ""
    return [f"{place}{name}" for name in _FILES.get(step.kind, ())]


def _damaged(step: Step, problem: str, remove: Path) -> DataError:
    return DataError(f"{step.name} is complete, but {problem}: restore it, or remove {remove} to run the step again")
