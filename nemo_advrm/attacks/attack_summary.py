"""Writes the ``summary.json`` of an attack, adds the results of selection to it, and reads success rates from it.

The file keys results by target under ``directions``, the name that earlier versions used for targets.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from nemo_advrm import files
from nemo_advrm.attacks import summary_file
from nemo_advrm.config.schema import Config
from nemo_advrm.data.jsonl import read_jsonl
from nemo_advrm.data.run_records import ATTACK_SAMPLE, RESTORE_ROWS, read_metrics, read_rows
from nemo_advrm.engine import manifest
from nemo_advrm.errors import ConfigError, DataError
from nemo_advrm.rewards.find_rule import asks_others
from nemo_advrm.run_directory import results

_RESTORE = "restore it, or run the attack again"


def of_adversary(directory: Path, seconds: float, held_out: dict[str, Any] | None = None) -> dict[str, Any]:
    """Summarises one adversary's training from its records. Raises DataError for a bad row."""
    path = directory / "metrics.jsonl"
    rows = read_metrics(path) if path.exists() else []  # missing for an attack that trains nothing
    return {
        "samples": sum(1 for _ in read_rows(directory / "samples.jsonl", ATTACK_SAMPLE, "an attack", RESTORE_ROWS)),
        "success_standard": _mean_of_steps(rows, "success"),
        "success_strict": _mean_of_steps(rows, "success_strict"),
        "ended": _mean_of_steps(rows, "ended"),
        "steps": len(rows),
        "seconds": seconds,
        **({"held_out": held_out} if held_out else {}),
    }


def of_target(adversaries: list[dict[str, Any]]) -> dict[str, Any]:
    """Combines the summaries of one target's adversaries: sums counts and seconds, averages rates."""
    result = {key: sum(s[key] for s in adversaries) for key in ("samples", "steps", "seconds")}
    for key in ("success_standard", "success_strict", "ended"):
        result[key] = _mean(adversaries, key)
    held_out = [s["held_out"] for s in adversaries if s.get("held_out")]
    if held_out:  # the SFT responses under "null" are the same for all adversaries
        rates = {key: _mean(held_out, key) for key in summary_file.RATES}
        result["held_out"] = {**held_out[0], **rates, "responses": sum(h["responses"] for h in held_out)}
    return result


def has_summary(directory: Path) -> bool:
    """Returns whether ``directory`` has a ``summary.json``; samples that were not written by an attack have none.

    Raises DataError when it is missing although the attack is finished.
    """
    path = directory / "summary.json"
    if not path.exists() and (directory / manifest.NAME).exists():
        raise DataError(f"{path} is missing: {_RESTORE}")
    return path.exists()


def check_samples(directory: Path, cure: str = "") -> None:
    """Raises DataError when ``samples.jsonl`` has not as many rows as its attack wrote.

    Args:
        cure: what to do instead of restoring the file; empty: what ``nemo-advrm attack`` needs.
    """
    path = directory / "samples.jsonl"
    rejoin = f"remove {directory / 'summary.json'} and run the attack again, which joins the rows of its policies"
    cure = cure or rejoin
    targets = summary_file.read_targets(directory / "summary.json", cure)
    wanted = sum(found["samples"] for found in targets.values())
    if not path.is_file():
        raise DataError(f"{path} is missing: restore it, or {cure}")
    try:
        rows = sum(1 for _ in read_jsonl(path))
    except DataError as error:
        raise DataError(f"{error}: restore it, or {cure}") from error
    if rows != wanted:
        raise DataError(f"{path} has {rows} rows, but the attack wrote {wanted}: restore it, or {cure}")


def check_rule(cfg: Config, directory: Path) -> None:
    """Raises ConfigError when the attack in ``directory`` had another kind of reward than ``adversarial`` configures.

    Summaries of earlier versions and of NeMo-Aligner's attacks do not record the kind and are not checked.
    """
    if not has_summary(directory):
        return
    summary = results.read_object(directory / "summary.json", (), _RESTORE, summary_file.wrong_attack)
    detector = summary.get("detector", cfg.adversarial.detector)
    if detector != cfg.adversarial.detector:
        raise ConfigError(
            f"adversarial.detector={cfg.adversarial.detector}: the attack in {directory} used {detector}; set the "
            "value that the attack had"
        )
    by_disagreement = summary.get("by_disagreement")
    if by_disagreement is None or by_disagreement == asks_others(cfg.adversarial):
        return
    options = cfg.adversarial
    name = "coefficient" if options.preset == "paper" else "others_weight"
    done = "penalised the other members' scores" if by_disagreement else "maximised the target alone"
    setting = f"adversarial.{name}={getattr(options, name):g}"
    raise ConfigError(f"{setting}: the attack in {directory} {done}; set the value that the attack had")


def has_underrated(directory: Path) -> bool:
    """Returns whether the finds of the attack in ``directory`` are good responses that are scored low."""
    if not has_summary(directory):
        return False
    summary = results.read_object(directory / "summary.json", (), _RESTORE, summary_file.wrong_attack)
    return bool(summary.get("underrates"))


def add_to_summary(directory: Path, by_target: dict[str, dict[str, Any]]) -> None:
    """Adds the results of selection, by target, to the attack's ``summary.json``, if it has one."""
    path = directory / "summary.json"
    if not has_summary(directory):
        return
    summary = results.read_object(path, (), _RESTORE, summary_file.wrong_attack)
    for target, facts in by_target.items():
        if target in summary["directions"]:
            summary["directions"][target].update(facts)
    files.write_text(path, json.dumps(summary, indent=1))


def success_rates(path: Path, cure: str) -> list[float]:
    """Returns the standard success rate of every target that has one in an attack's ``summary.json``.

    The rate is that of the finished adversary on held-out prompts if it was measured, else the mean over its training.
    Raises DataError with the ``cure`` when the file cannot be read or is not the summary of an attack.
    """
    found = summary_file.read_targets(path, cure).values()
    rates = [one.get("held_out", one)["success_standard"] for one in found]
    return [float(rate) for rate in rates if rate is not None]


def line(target: str, found: dict[str, Any]) -> str:
    """Returns the printed result of the attack on one target: one line, and a second one with held-out prompts."""
    share = found.get("ended")  # summaries of earlier versions do not have it
    ended = "" if share is None else f", {share:.0%} of them ended"
    text = f"target {target}: {found['samples']} samples{ended}, {_rates(found)}"
    held_out = found.get("held_out")
    if held_out is None:
        return text
    finds = f"finds {held_out['finds']:.2f}, of SFT responses {held_out['null']['finds']:.2f}"
    if held_out["success_standard"] is None:
        return f"{text}\n  finished adversary on {held_out['prompts']} held-out prompts: {finds}"
    return (
        f"{text}\n  finished adversary on {held_out['prompts']} held-out prompts: {_rates(held_out)}, "
        f"of SFT responses {_rates(held_out['null'])}; {finds}"
    )


def _mean(rows: list[dict[str, Any]], key: str) -> float | None:
    values = [row[key] for row in rows if row.get(key) is not None]
    return sum(values) / len(values) if values else None


def _mean_of_steps(rows: list[dict[str, Any]], key: str) -> float | None:
    """Returns the mean over the samples of all steps; the last step of a search may have fewer than the others."""
    values = [(row[key], row.get("samples", 1)) for row in rows if row.get(key) is not None]
    weight = sum(samples for _, samples in values)
    return sum(value * samples for value, samples in values) / weight if weight else None


def _rates(found: dict[str, Any]) -> str:
    if found["success_standard"] is None:
        return "success not measured (no gold reward)"
    return f"success {found['success_standard']:.2f} (strict {found['success_strict']:.2f})"
