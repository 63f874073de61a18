"""Writes a run directory by hand, small enough that every number of its report can be computed on paper."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

# Gold starts at 1; smoothed over 5 values (each and up to 4 before it) it is, for PLAIN_GOLD:
#   1, 1.5, 5/3, 1.25, 0.8, 0.4, -0.4, -1.2, -1.8, -2.2: from step 4 on below 1 - 0.1.
PLAIN_GOLD = (1.0, 2.0, 2.0, 0.0, -1.0, -1.0, -2.0, -2.0, -3.0, -3.0)
HARDENED_GOLD = (1.0, 2.0, 3.0, 3.0, 3.0, 3.0, 3.0, 3.0, 3.0, 3.0)

HOSTILE = "<script>alert('x')</script> & \"quoted\""


def write_lines(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def write_rlhf(run_dir: Path, name: str, gold: Iterable[float | None]) -> None:
    rows = [
        {"step": step, "proxy": 0.5 * step, "gold": value, "kl": 0.25 * step, "entropy": 1.0}
        for step, value in enumerate(gold)
    ]
    write_lines(run_dir / "rlhf" / name / "metrics.jsonl", rows)


def write_round(run_dir: Path, number: int, accuracy: tuple[float, ...], pairs: int, members: int = 2) -> None:
    root = run_dir / f"round_{number}"
    for member, value in enumerate(accuracy, 1):
        rows = [{"step": 1, "train/loss": 0.7}, {"step": 1, "val/loss": 0.6, "val/accuracy": 0.5}]
        write_lines(
            root / f"rm_{member}" / "metrics.jsonl", [*rows, {"step": 2, "val/loss": 0.5, "val/accuracy": value}]
        )
    z = [[0.5 * index] * members for index in range(-2, 3)]
    write_lines(
        root / "reference.jsonl",
        [{"prompt_id": i, "prompt": "p", "response": f"sft {i}", "scores": row, "z": row, "gold": 1.5}
         for i, row in enumerate(z)],
    )  # fmt: skip
    samples = [
        {"direction": direction, "step": step, "prompt_id": 0, "prompt": "p", "response": "adv",
         "scores": [1.0] * members, "z": [0.4 * step if k == direction - 1 else -0.3 * step for k in range(members)],
         "disagreement_z": 0.6 * step, "gold": -1.0, "selected": step == 4}
        for direction in range(1, members + 1) for step in range(5)
    ]  # fmt: skip
    write_lines(root / "attack" / "samples.jsonl", samples)
    rates = {
        "1": {"samples": 100, "success_standard": 0.6, "success_strict": 0.2, "selected": 10, "selected_success": 0.9},
        "2": {"samples": 300, "success_standard": 0.2, "success_strict": None, "selected": 30, "selected_success": 0.5},
    }
    (root / "attack" / "summary.json").write_text(json.dumps({"directions": rates, "threshold_z": 1.96}))
    write_lines(root / "pairs.jsonl", [pair(index) for index in range(pairs)])


def pair(index: int) -> dict[str, Any]:
    """The pair number `index`; its gold gap grows with the index."""
    return {
        "prompt": [{"role": "user", "content": "What is <b>bold</b>?"}],
        "chosen": "sft 0",
        "rejected": f"{HOSTILE} number {index}.",
        "provenance": {
            "round": 0, "step": 7, "direction": 1, "prompt_id": 0, "scores": [3.25, -1.5], "z": [2.5, -1.25],
            "disagreement_z": 3.75, "chosen_scores": [0.5, 0.75], "chosen_gold": 1.5, "rejected_gold": -float(index),
        },
    }  # fmt: skip


def write_state(run_dir: Path, seconds: dict[str, float]) -> None:
    stages = {name: {"status": "complete", "seconds": value} for name, value in seconds.items()}
    (run_dir / "state.json").write_text(json.dumps({"stages": stages, "versions": {}, "seed": 3}))


SECONDS = {
    "sft": 10.0, "round_0/rm_1": 5.0, "round_0/rm_2": 5.0, "round_0/reference": 1.0, "round_0/attack": 20.0,
    "round_0/select": 0.5, "round_1/rm_1": 6.0, "round_1/rm_2": 6.0, "round_1/reference": 1.0, "round_1/attack": 20.0,
    "rlhf/r1": 10.0, "rlhf/lcb": 11.0, "rlhf/adv_rm": 12.5,
}  # fmt: skip
