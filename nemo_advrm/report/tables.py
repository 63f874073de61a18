"""The tables of the report of one run, made of its summary."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from nemo_advrm.data.mismatch import LOW_MISMATCH_ACCURACY
from nemo_advrm.report.collect import collect
from nemo_advrm.report.measure_tables import best_of_n, comparisons, measures
from nemo_advrm.report.names import ABSENT, duration, fixed, flops_text, percent, reward_name, stage_name
from nemo_advrm.report.summary import summarise
from nemo_advrm.report.table import Table, as_text


def tables(summary: dict[str, Any]) -> list[Table]:
    """Every table that has something to say, in reading order."""
    makers = (
        *(measures, comparisons, best_of_n, _definitions),
        *(_attacks, _finds, _accuracy, _mismatch, _cost, _stages),
    )
    return [table for table in (make(summary) for make in makers) if table is not None]


def render_summary(run_dir: Path, terminal: bool | None = None) -> str:
    """The closing tables of a run; see `table.as_text`. Raises DataError when `run_dir` is not a directory."""
    summary = summarise(collect(Path(run_dir)))
    return as_text(summary["headline"], tables(summary), summary["notes"], terminal)


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
    rows = [
        (name, *(percent(attack[key]) for key in ("standard", "strict", "held_out", "held_out_null")))
        for name, attack in _directions(summary)
    ]
    if not rows:
        return None
    return Table(
        "Attack success, per round",
        ("Attack", "Standard", "Strict", "Held-out", "SFT (null)"),
        tuple(rows),
        "Standard: over all steps of the attack, scored above, yet by gold below, the normal responses to the prompt. "
        "Strict: scored above them, and gold more than 1.96 deviations below. Held-out: the standard success of the "
        "finished adversary on prompts that it was not trained on; SFT (null): that of normal responses to the same "
        "prompts, which are no attack.",
    )


def _finds(summary: dict[str, Any]) -> Table | None:
    rows = []
    for name, attack in _directions(summary):
        chosen, samples = attack["selected"], attack["samples"]
        share = chosen / samples if samples and chosen is not None else None
        count = ABSENT if chosen is None else str(chosen)
        found, null = fixed(attack["found"], 0), fixed(attack["null"], 1)
        rows.append(
            (
                name,
                found,
                null,
                count,
                percent(share),
                percent(attack["selected_success"]),
                percent(attack["wrong_labels"]),
            )
        )
    if not rows or all(cell == ABSENT for row in rows for cell in row[1:]):
        return None
    return Table(
        "What was selected for training, per round",
        ("Attack", "Finds", "Null", "Pairs", "Share", "Below SFT", "Wrong labels"),
        tuple(rows),
        "Finds: adversarial responses that qualify. Null: how many of as many normal (SFT) responses would. Pairs: "
        "selected for training, and their share of all responses. Below SFT: selected responses whose gold is below "
        "the mean of normal responses to the prompt. Wrong labels: pairs whose rejected side has the higher gold.",
    )


def _directions(summary: dict[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    return [
        (f"Round {one['round']}, model {target} attacked", attack)
        for one in summary["rounds"]
        for target, attack in (one["attack"] or {"directions": {}})["directions"].items()
    ]


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
    by_member: dict[tuple[int, str], dict[int, float]] = {}
    for one in summary["rounds"]:
        for rm in one["rm"]:
            for name, value in (("", rm[key]), (", with reference features", rm[f"hybrid_{key}"])):
                if value is not None:
                    by_member.setdefault((rm["member"], name), {})[one["round"]] = value
    if not by_member:
        return None
    numbers = [one["round"] for one in summary["rounds"]]
    rows = []
    for (member, name), values in sorted(by_member.items()):
        known = [values[number] for number in numbers if number in values]
        change = f"{100 * (known[-1] - known[0]):+.1f} points" if len(known) > 1 else ABSENT
        rows.append((f"Reward model {member}{name}", *(percent(values.get(number)) for number in numbers), change))
    heads = ["Before" if number == 0 else f"After round {number - 1}" for number in numbers]
    return Table(title, ("Member", *heads, "Change"), tuple(rows), note)


def _cost(summary: dict[str, Any]) -> Table | None:
    cost, ratio = summary["cost"], summary["cost_ratio"]
    if cost["plain"] is None and cost["adv_rm"] is None:
        return None
    rows = (
        ("Plain RLHF", duration(cost["plain"]), flops_text(cost["plain_flops"]), "1.0x" if cost["plain"] else ABSENT),
        (
            "Adv-RM, then RLHF",
            duration(cost["adv_rm"]),
            flops_text(cost["adv_rm_flops"]),
            ABSENT if ratio is None else f"{ratio:.1f}x",
        ),
    )
    return Table(
        "Cost of the Adv-RM pipeline",
        ("Pipeline", cost["unit"][0].upper() + cost["unit"][1:], "FLOPs", "Ratio"),
        rows,
        "Plain: SFT, labelled pairs, one reward model, RLHF. Adv-RM: every stage that leads to the hardened reward "
        "model, and RLHF with it; the last round's other models and its attack only measure and are not counted. "
        f"The ratio is that of {cost['unit']}.",
    )


def _stages(summary: dict[str, Any]) -> Table | None:
    if not summary["seconds"]:
        return None
    parts = ("seconds", "cpu_seconds", "flops")
    rows = [
        (
            stage_name(stage),
            *(duration(summary[part].get(stage)) for part in parts[:2]),
            flops_text(summary["flops"].get(stage)),
        )
        for stage in summary["seconds"]
    ]
    cpu, flops = (sum(summary[part].values()) or None for part in parts[1:])
    rows.append(("Total", duration(summary["seconds_total"]), duration(cpu), flops_text(flops)))
    return Table("Time per stage", ("Stage", "Wall-clock", "CPU time", "FLOPs"), tuple(rows), "")
