"""The tables of a report, made of its summary. Each function makes one table, without rows if it has nothing to say."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from nemo_advrm.data.mismatch import LOW_MISMATCH_ACCURACY
from nemo_advrm.report.conclusions import COLUMNS, MAIN_MEASURE, by_arm, interval_cells
from nemo_advrm.report.names import ABSENT, KIND_TITLES, duration, fixed, flops_text, percent, reward_name, stage_name
from nemo_advrm.report.statistics import Interval, interval_text
from nemo_advrm.report.study import RLHF
from nemo_advrm.report.table import Table

Summary = dict[str, Any]
Rows = list[tuple[str, ...]]

GOLD_MEASURES = ("start", *COLUMNS[RLHF])
BEST_OF_N_POINTS = (1, 4, 16, 64, 256)


def tables(summary: Summary) -> list[Table]:
    """Every table of a run that has rows, in reading order; the longest, one row per stage, is last."""
    makers = (
        *(_gold, _alarms, _comparisons, _best_of_n, _definitions),
        *(_attack_success, _selection, _accuracy, _mismatch, _cost, _stages),
    )
    return [table for make in makers if (table := make(summary)).rows]


def joined_tables(summary: Summary) -> list[Table]:
    """The tables of several runs together: the means of every arm, and every arm beside its baseline."""
    return [table for table in (_means(summary), _comparisons(summary)) if table.rows]


# ---- rewards


def _gold(summary: Summary) -> Table:
    arms = summary["rlhf"]
    kl = summary["settings"]["kl"]
    sources = {one["source"] for one in arms.values()}
    whose = "fixed held-out prompts"
    if "rollouts" in sources:
        whose = "the rollouts" if len(sources) == 1 else f"{whose}, or of the rollouts where there are none"
    several = max((len(one["runs"]) for one in arms.values()), default=0)
    return Table(
        "Gold over RLHF, per optimised reward",
        ("Reward", "Start", "Area", "2nd half", "Final", "Peak", f"At KL {kl:g}", "KL final"),
        [
            (reward_name(name), *(fixed(one[key]) for key in GOLD_MEASURES), fixed(one["kl_final"], 1))
            for name, one in arms.items()
        ],
        f"Gold of {whose}. Area: its mean over all steps; 2nd half: over the second half; final: over the last tenth; "
        f"peak: the highest over any tenth. At KL {kl:g}: where the KL first reaches {kl:g} nats per response; "
        f"{ABSENT} where it never does."
        + (f" Means over up to {several} RLHF seeds." if several > 1 else "")
        + _stable_steps(summary),
    )


def _stable_steps(summary: Summary) -> str:
    """Stable steps as a footnote: one number that jumps with small changes of a curve."""
    parts = []
    for name, one in summary["rlhf"].items():
        if one["start"] is not None:
            shown = (
                f"> {run['steps']}" if run["stable_steps"] is None else f"{run['stable_steps']}" for run in one["runs"]
            )
            parts.append(f"{reward_name(name)} {', '.join(shown)}")
    if not parts:
        return ""
    options = summary["settings"]
    return (
        f" Footnote, stable steps (from where gold, smoothed over {options['smoothing_window']} evaluations, stays "
        f"more than {options['tolerance']:g} below its start): {'; '.join(parts)}."
    )


def _alarms(summary: Summary) -> Table:
    """A row for every detector of every watched arm."""
    rows: Rows = []
    for arm, one in summary["rlhf"].items():
        fell = ", ".join("never" if run["stable_steps"] is None else f"{run['stable_steps']}" for run in one["runs"])
        for name, found in one["detectors"].items():
            alarms = ", ".join("none" if step is None else f"{step}" for step in found["alarm_steps"])
            cells = fixed(found["z_start"]), fixed(found["z_final"])
            rows.append((reward_name(arm), name, alarms, fell if one["start"] is not None else ABSENT, *cells))
    level = summary["settings"]["alarm_share"]
    return Table(
        "Alarms of the detectors",
        ("Reward", "Detector", "Alarm at step", "Gold falls at step", "Score, start", "Score, end"),
        rows,
        f"Alarm: {level:.0%} of the responses of five steps are beyond the detector's threshold. Gold falls: it stays "
        "below its start from there on. Scores: in standard deviations of SFT responses. One entry for each RLHF run.",
    )


def _means(summary: Summary) -> Table:
    rows: Rows = []
    for name, one in summary["rlhf"].items():
        cells = [
            ABSENT if one[key] is None else interval_text(Interval(**one[key]), absent="").removeprefix("+")
            for key in ("area", "final", "peak")
        ]
        rows.append((reward_name(name), f"{len(one['seeds'])} ({one['runs']})", *cells))
    return Table(
        "Gold over RLHF, per optimised reward",
        ("Reward", "Seeds (runs)", "Area", "Final", "Peak"),
        rows,
        "Means over reward-model seeds with their 95 % intervals; RLHF seeds of one reward model are averaged first. "
        "Area: mean gold over all steps; final: over the last tenth; peak: the highest over any tenth.",
    )


def _comparisons(summary: Summary) -> Table:
    """Every arm minus its baseline, in this report and in the study."""
    study = summary["study"]["comparisons"] if summary["study"] else []
    rows = [*_comparison_rows(summary["comparisons"], ""), *_comparison_rows(study, "Study: ")]
    return Table(
        "Rewards beside the plain one",
        ("Difference", "Seeds", "Better", "Area", "Final"),
        rows,
        "Gold less that of the plain reward model at the same KL coefficient, with the same prompts and random "
        "numbers; in brackets the 95 % interval over reward-model seeds (Student's t, RLHF seeds of one reward model "
        "averaged first). One seed has no interval: it cannot tell an effect from chance.",
    )


def _comparison_rows(entries: Sequence[Summary], prefix: str) -> Rows:
    """A row for every arm and kind; the number of better seeds is that of the area."""
    rows: Rows = []
    for by_measure in by_arm(entries):
        main = by_measure.get(MAIN_MEASURE) or next(iter(by_measure.values()))
        title = f"{prefix}{KIND_TITLES[main['kind']]}: {reward_name(main['arm'])} − {reward_name(main['baseline'])}"
        cells = interval_cells(by_measure, ("area", "final"), "")
        rows.append((title, str(len(main["seeds"])), str(main["better"]), *cells))
    return rows


def _best_of_n(summary: Summary) -> Table:
    curves = summary["best_of_n"]
    known = {n for one in curves.values() for n in one["n"]}
    points = sorted(n for n in known if n in BEST_OF_N_POINTS or n == max(known))
    rows: Rows = []
    for name, one in curves.items():
        gold, found = dict(zip(one["n"], one["gold"], strict=True)), one["measures"]
        rows.append(
            (reward_name(name), *(fixed(gold.get(n)) for n in points), fixed(found["area"]), fixed(found["peak"]))
        )
    return Table(
        "Gold of the best of n responses, per reward",
        ("Reward", *(f"n = {n}" for n in points), "Area", "Peak"),
        rows,
        "The SFT policy writes many responses to each of a few fixed held-out prompts; the reward picks the best of n "
        "of them. Exact expectations over all draws of n. Area: mean gold over the KL log n - (n - 1)/n. No training, "
        "and so none of its noise.",
    )


def _definitions(summary: Summary) -> Table:
    rows: Rows = [(reward_name(name), one["reward"]) for name, one in summary["rlhf"].items() if one["reward"]]
    return Table(
        "What each reward is",
        ("Reward", "Definition"),
        rows,
        "The names of ensemble rewards differ between papers: Adv-RM calls mean - standard deviation UWO, Coste et al. "
        "mean - variance; here they are lcb and uwo.",
    )


# ---- rounds


def _attacks(summary: Summary) -> list[tuple[str, Summary]]:
    """(name, figures) of every attack on one member."""
    return [
        (f"Round {one['round']}, model {target} attacked", attack)
        for one in summary["rounds"]
        if one["attack"]
        for target, attack in one["attack"]["directions"].items()
    ]


def _attack_success(summary: Summary) -> Table:
    rows: Rows = [
        (name, *(percent(attack[key]) for key in ("standard", "strict", "held_out", "held_out_null")))
        for name, attack in _attacks(summary)
    ]
    return Table(
        "Attack success, per round",
        ("Attack", "Standard", "Strict", "Held-out", "SFT (null)"),
        rows,
        "Standard: over all steps of the attack, scored above, yet by gold below, the normal responses to the prompt. "
        "Strict: scored above them, and gold more than 1.96 deviations below. Held-out: the standard success of the "
        "finished adversary on prompts that it was not trained on; SFT (null): that of normal responses to the same "
        "prompts, which are no attack.",
    )


def _selection(summary: Summary) -> Table:
    rows: Rows = []
    for name, attack in _attacks(summary):
        selected, samples = attack["selected"], attack["samples"]
        rows.append(
            (
                name,
                fixed(attack["found"], 0),
                fixed(attack["null"], 1),
                ABSENT if selected is None else str(selected),
                percent(selected / samples if samples and selected is not None else None),
                percent(attack["selected_success"]),
                percent(attack["wrong_labels"]),
            )
        )
    if all(cell == ABSENT for row in rows for cell in row[1:]):
        rows = []
    return Table(
        "What was selected for training, per round",
        ("Attack", "Finds", "Null", "Pairs", "Share", "Below SFT", "Wrong labels"),
        rows,
        "Finds: adversarial responses that qualify. Null: how many of as many normal (SFT) responses would. Pairs: "
        "selected for training, and their share of all responses. Below SFT: selected responses whose gold is below "
        "the mean of normal responses to the prompt. Wrong labels: pairs whose rejected side has the higher gold.",
    )


def _accuracy(summary: Summary) -> Table:
    return _by_round(
        summary,
        "accuracy",
        "Accuracy on clean held-out pairs",
        "Share of held-out, unattacked pairs that are ordered correctly: what the hardening costs.",
    )


def _mismatch(summary: Summary) -> Table:
    return _by_round(
        summary,
        "mismatch_accuracy",
        "Do the reward models read the prompt? Accuracy on mismatched prompts",
        "Share of held-out pairs ordered correctly when the rejected answer is a good one to another prompt. 50 % is "
        f"chance: below {percent(LOW_MISMATCH_ACCURACY)} a reward model hardly reads the prompt, and members that all "
        "ignore it cannot see by their disagreement that an answer is about something else.",
    )


def _by_round(summary: Summary, key: str, title: str, caption: str) -> Table:
    """One value of every member, round by round."""
    by_member: dict[tuple[int, str], dict[int, float]] = {}
    for one in summary["rounds"]:
        for rm in one["rm"]:
            for name, value in (("", rm[key]), (", with reference features", rm[f"hybrid_{key}"])):
                if value is not None:
                    by_member.setdefault((rm["member"], name), {})[one["round"]] = value
    rounds = [one["round"] for one in summary["rounds"]]
    rows: Rows = []
    for (member, name), values in sorted(by_member.items()):
        known = [values[number] for number in rounds if number in values]
        change = f"{100 * (known[-1] - known[0]):+.1f} points" if len(known) > 1 else ABSENT
        rows.append((f"Reward model {member}{name}", *(percent(values.get(number)) for number in rounds), change))
    heads = ["Before" if number == 0 else f"After round {number - 1}" for number in rounds]
    return Table(title, ("Member", *heads, "Change"), rows, caption)


# ---- cost


def _cost(summary: Summary) -> Table:
    cost, ratio = summary["cost"], summary["cost_ratio"]
    ratios = ("1.0x" if cost["plain"] else ABSENT, ABSENT if ratio is None else f"{ratio:.1f}x")
    rows = [
        ("Plain RLHF", duration(cost["plain"]), flops_text(cost["plain_flops"]), ratios[0]),
        ("Adv-RM, then RLHF", duration(cost["adv_rm"]), flops_text(cost["adv_rm_flops"]), ratios[1]),
    ]
    return Table(
        "Cost of the Adv-RM pipeline",
        ("Pipeline", cost["unit"][0].upper() + cost["unit"][1:], "FLOPs", "Ratio"),
        rows if (cost["plain"], cost["adv_rm"]) != (None, None) else (),
        "Plain: SFT, labelled pairs, one reward model, RLHF. Adv-RM: every stage that leads to the hardened reward "
        "model, and RLHF with it; the last round's other models and its attack only measure and are not counted, "
        "nor is fitting reference features for other arms. "
        f"The ratio is that of {cost['unit']}.",
    )


def _stages(summary: Summary) -> Table:
    cpu, flops = summary["cpu_seconds"], summary["flops"]
    rows: Rows = [
        (stage_name(stage), duration(seconds), duration(cpu.get(stage)), flops_text(flops.get(stage)))
        for stage, seconds in summary["seconds"].items()
    ]
    if rows:
        totals = [sum(part.values()) or None for part in (cpu, flops)]
        rows.append(("Total", duration(summary["seconds_total"]), duration(totals[0]), flops_text(totals[1])))
    return Table("Time per stage", ("Stage", "Wall-clock", "CPU time", "FLOPs"), rows)
