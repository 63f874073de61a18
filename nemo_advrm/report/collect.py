"""Reads a run directory into the records of the report, tolerating whatever part of it is missing.

Nothing is written and nothing is raised for absent or damaged parts: each one becomes a sentence in `Run.notes`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from nemo_advrm.errors import DataError
from nemo_advrm.report.collect_rlhf import (
    numbered,
    read_best_of_n,
    read_options,
    read_rewards,
    read_rlhf,
    read_settings,
)
from nemo_advrm.report.files import Row, Scores, as_object, count, number, numbers, read_json, read_jsonl
from nemo_advrm.report.measures import column
from nemo_advrm.report.records import Direction, FloatArray, Member, Pair, Round, Run

DEFAULT_THRESHOLD_Z = 1.96


def collect(run_dir: Path) -> Run:
    """Read everything the report shows. Raises DataError only when `run_dir` is not a directory."""
    run_dir = Path(run_dir)
    if not run_dir.is_dir():
        raise DataError(f"{run_dir}: no such run directory")
    notes: list[str] = []
    state = read_json(run_dir / "state.json", run_dir, notes)
    stages = as_object(state.get("stages"))
    rounds = tuple(
        _read_round(path, run_dir, notes, f"{path.name}/select" in stages) for path in numbered(run_dir, "round")
    )
    if not rounds:
        notes.append("No adversarial rounds: attack success, scatter, examples and pair accuracy are absent.")
    settings = read_settings(run_dir, notes)
    rewards = read_rewards(settings)
    seed = number(state.get("seed"))
    return Run(
        directory=run_dir,
        seed=None if seed is None else int(seed),
        rounds=rounds,
        rlhf=read_rlhf(run_dir, rewards, stages, notes),
        seconds=_read_seconds(stages, notes),
        notes=notes,
        options=read_options(settings),
        rewards=rewards,
        best_of_n=read_best_of_n(run_dir, rewards, notes),
        cpu_seconds=_read_amounts(stages, "cpu_seconds"),
        gpu_seconds=_read_amounts(stages, "gpu_seconds"),
        flops=_read_amounts(stages, "flops"),
        experiment=str(settings.get("name") or ""),
        commit=str(as_object(state.get("versions")).get("git") or ""),
        commits={stage: str(entry["git"]) for stage, entry in stages.items() if "git" in as_object(entry)},
        study_path=str(as_object(settings.get("report")).get("study_path") or ""),
    )


def _trailing_number(path: Path) -> int:
    return int(path.name.rsplit("_", 1)[1])


def _matrix(lists: Sequence[Scores]) -> FloatArray:
    """[N, K] with NaN for what is missing; K is the longest list."""
    width = max((len(entry) for entry in lists), default=0)
    matrix_NK = np.full((len(lists), width), math.nan)
    for index, entry in enumerate(lists):
        matrix_NK[index, : len(entry)] = [math.nan if value is None else value for value in entry]
    return matrix_NK


# ---- parts of a run


def _read_seconds(stages: Row, notes: list[str]) -> dict[str, float]:
    for stage, entry in stages.items():
        status = as_object(entry).get("status")
        if status != "complete":
            notes.append(f"Stage {stage} is not complete (status: {status}).")
    seconds = _read_amounts(stages, "seconds")
    if not seconds:
        notes.append("No stage times: the cost table and figure are absent.")
    return seconds


def _read_amounts(stages: Row, key: str) -> dict[str, float]:
    found = {stage: number(as_object(entry).get(key)) for stage, entry in stages.items()}
    return {stage: value for stage, value in found.items() if value is not None}


def _read_round(path: Path, run_dir: Path, notes: list[str], selection: bool) -> Round:
    round_number = _trailing_number(path)
    members = tuple(_read_member(member, run_dir, notes) for member in numbered(path, "rm"))
    if not members:
        notes.append(f"Round {round_number} has no reward models.")
    reference = read_jsonl(path / "reference.jsonl", run_dir, notes)
    if not reference:
        notes.append(f"Round {round_number} has no reference samples: its scatter lacks the SFT cloud.")
    selection = selection or (path / "pairs.jsonl").is_file()
    directions, threshold_z = _read_attack(path, run_dir, notes, _gold_means(reference), selection)
    pair_rows = read_jsonl(path / "pairs.jsonl", run_dir, notes)
    known = {(str(row.get("prompt_id")), str(row.get("response"))): row for row in reference}
    pairs = tuple(_read_pair(row, known) for row in pair_rows)
    reference_z_NK = _matrix([numbers(row.get("z")) for row in reference])
    return Round(round_number, members, reference_z_NK, directions, threshold_z, pairs)


def _read_member(path: Path, run_dir: Path, notes: list[str]) -> Member:
    rows = read_jsonl(path / "metrics.jsonl", run_dir, notes)
    if (path / "result.json").is_file():
        rows.append(read_json(path / "result.json", run_dir, notes))
    validated = [row for row in rows if number(row.get("val/accuracy")) is not None]
    if not validated:
        notes.append(f"{path.relative_to(run_dir)} has no validation accuracy.")
        return Member(_trailing_number(path), None, None)
    last = validated[-1]
    names = ("accuracy", "loss", "mismatch_accuracy", "hybrid_accuracy", "hybrid_mismatch_accuracy")
    return Member(_trailing_number(path), *(number(last.get(f"val/{name}")) for name in names))


def _gold_means(reference: list[Row]) -> dict[str, float]:
    """Mean gold of the SFT responses to each prompt."""
    by_prompt: dict[str, list[float]] = {}
    for row in reference:
        if (gold := number(row.get("gold"))) is not None:
            by_prompt.setdefault(str(row.get("prompt_id")), []).append(gold)
    return {prompt: sum(golds) / len(golds) for prompt, golds in by_prompt.items()}


def _read_attack(
    path: Path, run_dir: Path, notes: list[str], gold_means: dict[str, float], selection: bool
) -> tuple[tuple[Direction, ...], float]:
    attack, round_number = path / "attack", _trailing_number(path)
    if not attack.is_dir():
        notes.append(f"Round {round_number} was not attacked.")
        return (), DEFAULT_THRESHOLD_Z
    summary = read_json(attack / "summary.json", run_dir, notes)
    rows = read_jsonl(attack / "samples.jsonl", run_dir, notes)
    if not rows:
        notes.append(f"Round {round_number} has no adversarial samples.")
    told = as_object(summary.get("directions"))
    rates = {int(key): as_object(value) for key, value in told.items() if key.isdecimal()}
    by_target: dict[int, list[Row]] = {target: [] for target in rates}
    for row in rows:
        if (target := count(row.get("direction"))) is not None:
            by_target.setdefault(target, []).append(row)
    # The last attack only measures: nothing is selected there, which differs from a selection that found nothing.
    if not selection:
        notes.append(f"Round {round_number} only measures its attack: no pairs were selected from it.")
    directions = tuple(
        _read_direction(target, rates.get(target, {}), by_target[target], gold_means, selection)
        for target in sorted(by_target)
    )
    if directions and all(one.success_standard is None and one.success_strict is None for one in directions):
        notes.append(f"Round {round_number} has no gold reward, so attack success is not measured.")
    threshold_z = number(summary.get("threshold_z"))
    return directions, DEFAULT_THRESHOLD_Z if threshold_z is None else threshold_z


def _read_direction(
    target: int, rates: Row, rows: list[Row], gold_means: dict[str, float], selection: bool
) -> Direction:
    """The attack's own summary first; what selection adds later is counted from the marked samples."""
    held_out = as_object(rates.get("held_out"))
    selected_N = np.array([row.get("selected") is True for row in rows], dtype=np.bool_)
    samples, selected = count(rates.get("samples")), count(rates.get("selected"))
    success = number(rates.get("selected_success"))
    if selected is None and selection and rows:
        selected = int(selected_N.sum())
    if success is None:
        success = _selected_success([row for row in rows if row.get("selected") is True], gold_means)
    return Direction(
        target=target,
        samples=samples if samples is not None else (len(rows) or None),
        success_standard=number(rates.get("success_standard")),
        success_strict=number(rates.get("success_strict")),
        selected=selected,
        selected_success=success,
        steps=count(rates.get("steps")),
        seconds=number(rates.get("seconds")),
        z_NK=_matrix([numbers(row.get("z")) for row in rows]),
        disagreement_z_N=column(rows, "disagreement_z"),
        selected_N=selected_N,
        held_out=number(held_out.get("success_standard")),
        held_out_null=number(as_object(held_out.get("null")).get("success_standard")),
        found=number(rates.get("found")),
        null=number(rates.get("null")),
        wrong_labels=number(rates.get("wrong_labels")),
    )


def _selected_success(selected: list[Row], gold_means: dict[str, float]) -> float | None:
    """Share of the selected samples whose gold is below the mean of the SFT responses to their prompt."""
    below = [
        gold < gold_means[prompt]
        for row in selected
        if (gold := number(row.get("gold"))) is not None and (prompt := str(row.get("prompt_id"))) in gold_means
    ]
    return sum(below) / len(below) if below else None


def _read_pair(row: Row, reference: dict[tuple[str, str], Row]) -> Pair:
    """Provenance first; z and gold of the chosen response are looked up among the SFT samples it was taken from."""
    source = as_object(row.get("provenance"))
    chosen = str(row.get("chosen", ""))
    known = reference.get((str(source.get("prompt_id")), chosen), {})
    chosen_gold = number(source.get("chosen_gold"))
    return Pair(
        prompt=_prompt_text(row.get("prompt")),
        chosen=chosen,
        rejected=str(row.get("rejected", "")),
        direction=count(source.get("direction")),
        step=count(source.get("step")),
        z=numbers(source.get("z")),
        scores=numbers(source.get("scores")),
        disagreement_z=number(source.get("disagreement_z")),
        rejected_gold=number(source.get("rejected_gold")),
        chosen_scores=numbers(source.get("chosen_scores")) or numbers(known.get("scores")),
        chosen_z=numbers(known.get("z")),
        chosen_gold=chosen_gold if chosen_gold is not None else number(known.get("gold")),
    )


def _prompt_text(prompt: object) -> str:
    """Messages joined by blank lines, each led by its role when there is more than one."""
    if not isinstance(prompt, list):
        return str(prompt or "")
    messages = [as_object(message) for message in prompt]
    if len(messages) == 1:
        return str(messages[0].get("content", ""))
    return "\n\n".join(f"{message.get('role', '?')}: {message.get('content', '')}" for message in messages)
