"""The tables of the report: data for the page, and text for the console (rich on a terminal, plain when piped)."""

from __future__ import annotations

import io
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table as RichTable

from nemo_advrm.data.mismatch import LOW_MISMATCH_ACCURACY
from nemo_advrm.report.collect import collect
from nemo_advrm.report.names import ABSENT, duration, fixed, percent, reward_name, stage_name
from nemo_advrm.report.summary import summarise


@dataclass(frozen=True)
class Table:
    """Cells are text, the first column names the row; `caption` explains the columns to a reader."""

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    caption: str


def tables(summary: dict[str, Any]) -> list[Table]:
    """Every table that has something to say, in reading order."""
    makers = (_rewards, _definitions, _attacks, _accuracy, _mismatch, _cost, _stages)
    return [table for table in (make(summary) for make in makers) if table is not None]


def render_summary(run_dir: Path, terminal: bool | None = None) -> str:
    """The closing table of a run: with rich's rules and bold on a terminal, aligned plain text otherwise.

    terminal: None asks standard output. Raises DataError when `run_dir` is not a directory.
    """
    summary = summarise(collect(Path(run_dir)))
    if terminal is None:
        terminal = sys.stdout.isatty()
    return _rich(summary) if terminal else _plain(summary)


# ---- the tables


def _rewards(summary: dict[str, Any]) -> Table | None:
    if not summary["rlhf"]:
        return None
    rows = []
    for name, one in summary["rlhf"].items():
        if one["gold_start"] is None:
            stable = ABSENT
        else:
            stable = f"> {one['steps']}" if one["stable_steps"] is None else str(one["stable_steps"])
        gold = [fixed(one[key]) for key in ("gold_start", "gold_peak", "gold_final")]
        rows.append((reward_name(name), stable, *gold, fixed(one["kl_final"], 1)))
    tolerance = summary["settings"]["tolerance"]
    return Table(
        "Over-optimisation, per optimised reward",
        ("Reward", "Stable steps", "Gold start", "Gold peak", "Gold final", "KL final"),
        tuple(rows),
        f"Stable steps: the step from which gold reward (smoothed over {summary['settings']['smoothing_window']} "
        f'logged steps) stays more than {tolerance:g} below its start; "> N" means that it did not within N steps. '
        "Peak and final gold are smoothed likewise. KL: nats per response.",
    )


def _definitions(summary: dict[str, Any]) -> Table | None:
    rows = [(reward_name(name), one["reward"]) for name, one in summary["rlhf"].items() if one.get("reward")]
    if not rows:
        return None
    return Table(
        "What each reward is",
        ("Reward", "Definition"),
        tuple(rows),
        "The names of ensemble rewards differ between papers: Adv-RM calls mean - standard deviation UWO, Coste et al. "
        "mean - variance; here they are lcb and uwo.",
    )


def _attacks(summary: dict[str, Any]) -> Table | None:
    rows = []
    for one in summary["rounds"]:
        for target, attack in (one["attack"] or {"directions": {}})["directions"].items():
            chosen, samples = attack["selected"], attack["samples"]
            share = chosen / samples if samples and chosen is not None else None
            rates = (attack["standard"], attack["strict"], attack["selected_success"], share)
            count = ABSENT if chosen is None else str(chosen)
            rows.append((f"Round {one['round']}, model {target} attacked", *(percent(rate) for rate in rates), count))
    if not rows:
        return None
    return Table(
        "Attack success, per round",
        ("Attack", "Standard", "Strict", "Selected", "Selected share", "Selected count"),
        tuple(rows),
        "Standard: scored above, yet by gold below, the normal responses to the prompt. Strict: scored above them, "
        "and gold more than 1.96 deviations below. Selected: share of the selected responses whose gold is below the "
        "mean of normal (SFT) responses. Selected share and count: how many adversarial responses passed the "
        "selection.",
    )


def _accuracy(summary: dict[str, Any]) -> Table | None:
    return _by_round(
        summary,
        "accuracy",
        "Accuracy on clean held-out pairs",
        "Share of held-out, unattacked pairs that are ordered correctly: what the hardening costs.",
    )


def _mismatch(summary: dict[str, Any]) -> Table | None:
    return _by_round(
        summary,
        "mismatch_accuracy",
        "Do the reward models read the prompt? Accuracy on mismatched prompts",
        "Share of held-out pairs ordered correctly when the rejected answer is a good one to another prompt. 50 % is "
        f"chance: below {percent(LOW_MISMATCH_ACCURACY)} a reward model hardly reads the prompt, and members that all "
        "ignore it cannot see by their disagreement that an answer is about something else.",
    )


def _by_round(summary: dict[str, Any], key: str, title: str, note: str) -> Table | None:
    """One value of every member, round by round; None where no member has it."""
    by_member: dict[int, dict[int, float]] = {}
    for one in summary["rounds"]:
        for rm in one["rm"]:
            if rm[key] is not None:
                by_member.setdefault(rm["member"], {})[one["round"]] = rm[key]
    if not by_member:
        return None
    numbers = [one["round"] for one in summary["rounds"]]
    rows = []
    for member, values in sorted(by_member.items()):
        known = [values[number] for number in numbers if number in values]
        change = f"{100 * (known[-1] - known[0]):+.1f} points" if len(known) > 1 else ABSENT
        rows.append((f"Reward model {member}", *(percent(values.get(number)) for number in numbers), change))
    heads = ["Before" if number == 0 else f"After round {number - 1}" for number in numbers]
    return Table(title, ("Member", *heads, "Change"), tuple(rows), note)


def _cost(summary: dict[str, Any]) -> Table | None:
    cost, ratio = summary["cost"], summary["cost_ratio"]
    if cost["plain"] is None and cost["adv_rm"] is None:
        return None
    rows = (
        ("Plain RLHF", duration(cost["plain"]), ABSENT if cost["plain"] is None else "1.0x"),
        ("Adv-RM, then RLHF", duration(cost["adv_rm"]), ABSENT if ratio is None else f"{ratio:.1f}x"),
    )
    return Table(
        "Cost of the Adv-RM pipeline",
        ("Pipeline", "Wall-clock", "Ratio"),
        rows,
        "Plain: SFT, labelled pairs, one reward model, RLHF. Adv-RM: every stage that leads to the hardened reward "
        "model, and RLHF with it; the last round's other models and its attack only measure and are not counted.",
    )


def _stages(summary: dict[str, Any]) -> Table | None:
    if not summary["seconds"]:
        return None
    rows = [(stage_name(stage), duration(seconds)) for stage, seconds in summary["seconds"].items()]
    rows.append(("Total", duration(summary["seconds_total"])))
    return Table("Wall-clock per stage", ("Stage", "Wall-clock"), tuple(rows), "")


# ---- the console


def _plain(summary: dict[str, Any]) -> str:
    blocks = [summary["headline"]]
    for table in tables(summary):
        widths = [max(len(row[index]) for row in (table.columns, *table.rows)) for index in range(len(table.columns))]
        lines = [_aligned(row, widths) for row in (table.columns, *table.rows)]
        lines.insert(1, "  ".join("-" * width for width in widths))
        blocks.append("\n".join([table.title, *lines]))
    if summary["notes"]:
        blocks.append("\n".join(["Notes", *(f"- {note}" for note in summary["notes"])]))
    return "\n\n".join(blocks) + "\n"


def _aligned(row: tuple[str, ...], widths: list[int]) -> str:
    cells = [
        cell.ljust(width) if index == 0 else cell.rjust(width)
        for index, (cell, width) in enumerate(zip(row, widths, strict=True))
    ]
    return "  ".join(cells).rstrip()


def _rich(summary: dict[str, Any]) -> str:
    stream = io.StringIO()
    # The width is asked of the real terminal, since the stream has none.
    console = Console(file=stream, force_terminal=True, width=Console().width, highlight=False)
    console.print(f"[bold]{escape(summary['headline'])}[/bold]")
    for table in tables(summary):
        drawn = RichTable(title=table.title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD)
        for index, column in enumerate(table.columns):
            drawn.add_column(column, justify="left" if index == 0 else "right")
        for row in table.rows:
            drawn.add_row(*(escape(cell) for cell in row))
        console.print(drawn)
    for note in summary["notes"]:
        console.print(f"[dim]- {escape(note)}[/dim]")
    return stream.getvalue()
