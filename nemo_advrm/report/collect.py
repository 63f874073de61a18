"""Reads a run directory into the records of the report. A missing or damaged part becomes a sentence in `Run.notes`."""

from __future__ import annotations

import re
from collections import defaultdict
from pathlib import Path

import numpy as np

from nemo_advrm.data.run_records import (
    ATTACK_SAMPLE,
    ATTACK_SUMMARY,
    METRICS_ROW,
    PAIR_ROW,
    PIPELINE_STATE,
    REFERENCE_ROW,
)
from nemo_advrm.errors import DataError
from nemo_advrm.report.collect_rlhf import read_best_of_n, read_options, read_rewards, read_rlhf
from nemo_advrm.report.files import (
    Row,
    as_object,
    column,
    count,
    matrix,
    number,
    numbered,
    numbers,
    read_json,
    read_jsonl,
    read_settings,
)
from nemo_advrm.report.records import Attack, Member, Pair, Round, Run, Side

DEFAULT_THRESHOLD_Z = 1.96
_AMOUNTS = ("seconds", "cpu_seconds", "gpu_seconds", "flops")


def collect(run_dir: Path) -> Run:
    """Read everything that the report shows. Raises DataError only if `run_dir` is not a directory."""
    run_dir = Path(run_dir)
    if not run_dir.is_dir():
        raise DataError(f"{run_dir}: no such run directory")
    notes: list[str] = []
    state = read_json(run_dir / "state.json", run_dir, notes, PIPELINE_STATE)
    stages = as_object(state.get("stages"))
    rounds = tuple(
        _read_round(number, path, run_dir, notes, f"{path.name}/select" in stages)
        for number, path in numbered(run_dir, "round")
    )
    if not rounds:
        notes.append("No adversarial rounds: attack success, scatter, examples and pair accuracy are absent.")
    settings = read_settings(run_dir, notes)
    rewards = read_rewards(settings)
    return Run(
        directory=run_dir,
        seed=count(state.get("seed")),
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
        features={key: _read_amounts(stages, f"features_{key}") for key in _AMOUNTS},
        experiment=str(settings.get("name") or ""),
        commit=str(as_object(state.get("versions")).get("git") or ""),
        commits={stage: str(entry["git"]) for stage, entry in stages.items() if "git" in as_object(entry)},
        study_path=str(as_object(settings.get("report")).get("study_path") or ""),
    )


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


def _read_round(round_number: int, path: Path, run_dir: Path, notes: list[str], selects: bool) -> Round:
    """`selects`: whether the round selects pairs; the last round only measures its attack."""
    members = tuple(_read_member(index, member, run_dir, notes) for index, member in numbered(path, "rm"))
    if (path / "rm").is_dir():
        members = _read_heads(path / "rm", run_dir, notes)
    if not members:
        notes.append(f"Round {round_number} has no reward models.")
    reference = read_jsonl(path / "reference.jsonl", run_dir, notes, REFERENCE_ROW)
    if not reference:
        notes.append(f"Round {round_number} has no reference samples: its scatter lacks the SFT cloud.")
    selects = selects or (path / "pairs.jsonl").is_file()
    attacks, threshold_z = _read_attacks(round_number, path / "attack", run_dir, notes, reference, selects)
    known = {(str(row.get("prompt_id")), str(row.get("response"))): row for row in reference}
    pairs = tuple(_read_pair(row, known) for row in read_jsonl(path / "pairs.jsonl", run_dir, notes, PAIR_ROW))
    return Round(round_number, members, matrix(reference, "z"), attacks, threshold_z, pairs)


def _read_member(index: int, path: Path, run_dir: Path, notes: list[str]) -> Member:
    row = _last_validation(path, run_dir, notes)
    names = ("accuracy", "loss", "mismatch_accuracy", "hybrid_accuracy", "hybrid_mismatch_accuracy")
    return Member(index, *(number(row.get(f"val/{name}")) for name in names))


def _read_heads(path: Path, run_dir: Path, notes: list[str]) -> tuple[Member, ...]:
    """The members that share one trunk, which were trained together with one loss."""
    row = _last_validation(path, run_dir, notes)
    heads = sorted(int(key.rpartition("_")[2]) for key in row if re.fullmatch(r"val/accuracy_head_\d+", key))
    return tuple(
        Member(
            k,
            accuracy=number(row.get(f"val/accuracy_head_{k}")),
            mismatch_accuracy=number(row.get(f"val/mismatch_accuracy_head_{k}")),
        )
        for k in heads
    )


def _last_validation(path: Path, run_dir: Path, notes: list[str]) -> Row:
    rows = read_jsonl(path / "metrics.jsonl", run_dir, notes, METRICS_ROW)
    if (path / "result.json").is_file():
        rows.append(read_json(path / "result.json", run_dir, notes, METRICS_ROW))
    validated = [row for row in rows if number(row.get("val/accuracy")) is not None]
    if not validated:
        notes.append(f"{path.relative_to(run_dir)} has no validation accuracy.")
    return validated[-1] if validated else {}


def _read_attacks(
    round_number: int, path: Path, run_dir: Path, notes: list[str], reference: list[Row], selects: bool
) -> tuple[tuple[Attack, ...], float]:
    """The attacks of a round by member, and the threshold of Z(U)."""
    if not path.is_dir():
        notes.append(f"Round {round_number} was not attacked.")
        return (), DEFAULT_THRESHOLD_Z
    summary = read_json(path / "summary.json", run_dir, notes, ATTACK_SUMMARY)
    rows = read_jsonl(path / "samples.jsonl", run_dir, notes, ATTACK_SAMPLE)
    if not rows:
        notes.append(f"Round {round_number} has no adversarial samples.")
    by_target: dict[int, tuple[Row, list[Row]]] = {
        int(key): (as_object(value), [])
        for key, value in as_object(summary.get("directions")).items()
        if key.isdecimal()
    }
    for row in rows:
        if (target := count(row.get("direction"))) is not None:
            by_target.setdefault(target, ({}, []))[1].append(row)
    # a round that selects nothing differs from one whose selection found nothing
    if not selects:
        notes.append(f"Round {round_number} only measures its attack: no pairs were selected from it.")
    gold_means = _gold_means(reference)
    attacks = tuple(_read_attack(target, *by_target[target], gold_means, selects) for target in sorted(by_target))
    if attacks and all(one.rates["standard"] is None and one.rates["strict"] is None for one in attacks):
        notes.append(f"Round {round_number} has no gold reward, so attack success is not measured.")
    threshold_z = number(summary.get("threshold_z"))
    return attacks, DEFAULT_THRESHOLD_Z if threshold_z is None else threshold_z


def _read_attack(target: int, rates: Row, rows: list[Row], gold_means: dict[str, float], selects: bool) -> Attack:
    """The attack's own summary counts first; what selection adds later is counted from the marked samples."""
    held_out = as_object(rates.get("held_out"))
    marked = [row for row in rows if row.get("selected") is True]
    samples, selected = count(rates.get("samples")), count(rates.get("selected"))
    if selected is None and selects and rows:
        selected = len(marked)
    success = number(rates.get("selected_success"))
    return Attack(
        target=target,
        rates={
            "samples": samples if samples is not None else (len(rows) or None),
            "selected": selected,
            "standard": number(rates.get("success_standard")),
            "strict": number(rates.get("success_strict")),
            "selected_success": _selected_success(marked, gold_means) if success is None else success,
            "steps": count(rates.get("steps")),
            "seconds": number(rates.get("seconds")),
            "held_out": number(held_out.get("success_standard")),
            "held_out_null": number(as_object(held_out.get("null")).get("success_standard")),
            **{key: number(rates.get(key)) for key in ("found", "null", "wrong_labels")},
        },
        z_NK=matrix(rows, "z"),
        disagreement_z_N=column(rows, "disagreement_z"),
        selected_N=np.array([row.get("selected") is True for row in rows], dtype=np.bool_),
    )


def _gold_means(reference: list[Row]) -> dict[str, float]:
    """Mean gold of the SFT responses to each prompt."""
    by_prompt: defaultdict[str, list[float]] = defaultdict(list)
    for row in reference:
        if (gold := number(row.get("gold"))) is not None:
            by_prompt[str(row.get("prompt_id"))].append(gold)
    return {prompt: sum(golds) / len(golds) for prompt, golds in by_prompt.items()}


def _selected_success(selected: list[Row], gold_means: dict[str, float]) -> float | None:
    """Share of the selected samples whose gold is below the mean of the SFT responses to their prompt."""
    below = [
        gold < gold_means[prompt]
        for row in selected
        if (gold := number(row.get("gold"))) is not None and (prompt := str(row.get("prompt_id"))) in gold_means
    ]
    return sum(below) / len(below) if below else None


def _read_pair(row: Row, reference: dict[tuple[str, str], Row]) -> Pair:
    """Its provenance; z of the SFT response, and its gold in older files, come from the samples it was taken from.

    That is the chosen response, or the rejected one where the find is a good response that is scored low.
    """
    source = as_object(row.get("provenance"))
    prompt_id, underrates = str(source.get("prompt_id")), source.get("underrates") is True

    def side(name: str, scores: str, is_find: bool) -> Side:
        text = str(row.get(name, ""))
        known = {} if is_find else reference.get((prompt_id, text), {})
        gold = number(source.get(f"{name}_gold"))
        return Side(
            text=text,
            scores=numbers(source.get(scores)) or numbers(known.get("scores")),
            z=numbers(source.get("z") if is_find else known.get("z")),
            gold=gold if gold is not None else number(known.get("gold")),
        )

    return Pair(
        prompt=_prompt_text(row.get("prompt")),
        chosen=side("chosen", "chosen_scores", underrates),
        rejected=side("rejected", "scores", not underrates),
        target=count(source.get("direction")),
        step=count(source.get("step")),
        disagreement_z=number(source.get("disagreement_z")),
    )


def _prompt_text(prompt: object) -> str:
    """Messages joined by blank lines, each led by its role if there is more than one."""
    if not isinstance(prompt, list):
        return str(prompt or "")
    messages = [as_object(message) for message in prompt]
    if len(messages) == 1:
        return str(messages[0].get("content", ""))
    return "\n\n".join(f"{message.get('role', '?')}: {message.get('content', '')}" for message in messages)
