"""Markdown tables and sentences of a study, for docs: every figure in them is computed from the study's lines."""

from __future__ import annotations

from collections.abc import Sequence

from nemo_advrm.report.names import ABSENT, fixed, flops_text, reward_name
from nemo_advrm.report.statistics import Comparison, interval_text
from nemo_advrm.report.study import BEST_OF_N, GATES, RLHF, Arm, Line, against_baseline, arms, experiments, missed_gates

COLUMNS = {
    RLHF: (
        ("area", "Area"),
        ("second_half", "Second half"),
        ("final", "Final"),
        ("peak", "Peak"),
        ("gold_at_kl", "Gold at matched KL"),
    ),
    BEST_OF_N: (("area", "Area"), ("final", "Largest n"), ("peak", "Peak")),
}
TITLES = {RLHF: "RLHF", BEST_OF_N: "Best of n"}
GOLD_MEASURES = ("start", *(name for name, _ in COLUMNS[RLHF]))
MAIN_MEASURE = "area"


def render_study(lines: Sequence[Line]) -> str:
    """Every table of a study as Markdown, experiment by experiment; "" for no lines."""
    blocks = []
    for experiment in experiments(lines):
        blocks.append(f"### {experiment}")
        blocks += [_gates(lines, experiment)]
        for kind in (RLHF, BEST_OF_N):
            found = arms(lines, experiment, kind)
            if found:
                blocks += [f"#### {TITLES[kind]}", _means(found, kind), _comparisons(found, kind)]
                blocks += [_sentences(found, kind), _footnote(found, kind)]
        blocks.append(_provenance([line for line in lines if line.experiment == experiment]))
    return "\n\n".join(block for block in blocks if block) + "\n" if blocks else ""


def markdown_table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table whose first column is text and whose others are numbers."""
    marks = ["---", *["---:"] * (len(columns) - 1)]
    cells = [[cell.replace("|", "\\|") for cell in row] for row in (columns, *rows)]
    return "\n".join(f"| {' | '.join(row)} |" for row in (cells[0], marks, *cells[1:]))


def runs_text(arm: Arm) -> str:
    """`10 x 3`: reward-model seeds times RLHF seeds; the number of runs where it is no such product."""
    seeds = len(arm.seeds)
    each = {sum(line.seed == seed for line in arm.lines) for seed in arm.seeds}
    return f"{seeds} x {each.pop()}" if len(each) == 1 else f"{seeds} seeds, {len(arm.lines)} runs"


def _means(found: dict[str, Arm], kind: str) -> str:
    columns = COLUMNS[kind]
    rows = []
    for arm in found.values():
        means = [arm.mean(measure) for measure, _ in columns]
        rows.append(
            [
                reward_name(arm.name),
                ABSENT if arm.kl is None else f"{arm.kl:g}",
                runs_text(arm),
                *(fixed(None if mean is None else mean.mean) for mean in means),
                fixed(arm.cost("cpu_seconds"), 0),
                flops_text(arm.cost("flops")),
            ]
        )
    heads = ["Arm", "KL coefficient", "Seeds x RLHF seeds", *(title for _, title in columns), "CPU s", "FLOPs"]
    return markdown_table(heads, rows)


def _comparisons(found: dict[str, Arm], kind: str) -> str:
    columns = COLUMNS[kind]
    rows = []
    for name, arm in found.items():
        compared = [against_baseline(found, name, measure) for measure, _ in columns]
        main = compared[0]
        if main is None:
            continue
        cells = [ABSENT if one is None else interval_text(one.interval) for one in compared]
        better = f"{main.better} of {len(main.seeds)}"
        rows.append([f"{reward_name(name)} − {reward_name(arm.baseline)}", better, *cells])
    if not rows:
        return ""
    return markdown_table(["Difference", "Seeds better (area)", *(title for _, title in columns)], rows)


def _sentences(found: dict[str, Arm], kind: str) -> str:
    items = []
    for name, arm in found.items():
        comparison = against_baseline(found, name, MAIN_MEASURE)
        if comparison is not None:
            items.append(f"- {sentence(comparison, reward_name(name), reward_name(arm.baseline), kind)}")
    return "\n".join(items)


def sentence(comparison: Comparison, arm: str, baseline: str, kind: str) -> str:
    """What a comparison of mean gold says, in one plain sentence with its interval, whatever it is."""
    interval = comparison.interval
    seeds = len(comparison.seeds)
    over = "over RLHF" if kind == RLHF else "over the best-of-n curve"
    amount = f"{abs(interval.mean):.2f} {'higher' if interval.mean >= 0 else 'lower'}"
    if interval.low is None or interval.high is None:
        return (
            f"With {arm}, mean gold {over} was {amount} than with {baseline} in the one seed that was run, which "
            "cannot tell an effect from chance."
        )
    bounds = f"95 % interval {interval.low:+.2f} to {interval.high:+.2f}, {comparison.better} of {seeds} seeds higher"
    if not interval.excludes_zero:
        return (
            f"With {arm}, mean gold {over} was {amount} than with {baseline} ({bounds}): the interval includes 0, so "
            "this does not show a difference."
        )
    verdict = "better" if interval.mean > 0 else "worse"
    return f"With {arm}, mean gold {over} was {amount} than with {baseline} ({bounds}): {verdict}, beyond chance."


def _footnote(found: dict[str, Arm], kind: str) -> str:
    """Stable steps: a number that jumps with small changes of a curve, so no measure of its own."""
    if kind != RLHF:
        return ""
    parts = []
    for arm in found.values():
        steps = [line.measures.get("stable_steps") for line in arm.lines if line.measures.get("start") is not None]
        if steps:
            fell = [step for step in steps if step is not None]
            text = f"gold fell below its start for good in {len(fell)} of {len(steps)} runs"
            if fell:
                text += f", at step {min(fell)} to {max(fell)}" if min(fell) < max(fell) else f", at step {fell[0]}"
            parts.append(f"{reward_name(arm.name)}: {text}")
    return f"Stable steps, a footnote: {'; '.join(parts)}." if parts else ""


def _gates(lines: Sequence[Line], experiment: str) -> str:
    rows = sorted(
        (one for one in lines if one.kind == GATES and one.experiment == experiment), key=lambda one: one.seed
    )
    if not rows:
        return ""
    names = list(dict.fromkeys(name for one in rows for name in one.measures if name != "met"))
    cells = [
        [f"{one.seed}", *(_cell(one.measures.get(name)) for name in names), _met(one.measures.get("met"))]
        for one in rows
    ]
    missed = missed_gates(lines, experiment)
    told = "Every seed meets the gates."
    if missed:
        told = f"Seeds that miss a gate, and stay in all tables: {', '.join(map(str, missed))}."
    return f"{markdown_table(['Seed', *names, 'Gates met'], cells)}\n\n{told}"


def _cell(value: object) -> str:
    if isinstance(value, bool) or value is None:
        return {True: "yes", False: "no", None: ABSENT}[value]
    return f"{value:.3f}" if isinstance(value, float) else str(value)


def _met(value: object) -> str:
    return "yes" if value is True else "no" if value is False else ABSENT


def _provenance(lines: Sequence[Line]) -> str:
    commits = sorted({line.commit[:12] for line in lines if line.commit})
    machines = sorted({line.hardware for line in lines if line.hardware})
    parts = [f"{len(lines)} lines"]
    parts += [f"commit {', '.join(commits)}"] if commits else []
    parts += [f"hardware: {'; '.join(machines)}"] if machines else []
    return f"From {', '.join(parts)}."
