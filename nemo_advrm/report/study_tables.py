"""The Markdown tables and sentences of a study for the docs; every figure is computed from the study's lines."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import median

from nemo_advrm.report.conclusions import (
    COLUMNS,
    MAIN_MEASURE,
    by_arm,
    compare_all,
    interval_cells,
    of_seeds,
    sentence,
)
from nemo_advrm.report.files import number
from nemo_advrm.report.names import ABSENT, KIND_TITLES, fixed, flops_text, reward_name
from nemo_advrm.report.statistics import Interval, by_seed, interval_text
from nemo_advrm.report.study import (
    ATTACKS,
    GATES,
    RLHF,
    Arm,
    Line,
    against_baseline,
    arms,
    experiments,
    missed_gates,
)
from nemo_advrm.report.table import to_markdown


def render_study(lines: Sequence[Line]) -> str:
    """Every table of a study as Markdown, experiment by experiment; "" for no lines."""
    blocks = []
    for experiment in experiments(lines):
        own = [line for line in lines if line.experiment == experiment]
        blocks += [f"### {experiment}", _gates(own, experiment), _attacks(own)]
        for kind in COLUMNS:
            found = arms(own, experiment, kind)
            if found:
                blocks += [f"#### {KIND_TITLES[kind]}", _means(found, kind), *_comparisons(own, kind)]
                blocks += [_footnote(found, kind)]
        blocks.append(_provenance(own))
    return "\n\n".join(block for block in blocks if block) + "\n" if blocks else ""


def _means(found: dict[str, Arm], kind: str) -> str:
    rows = []
    for arm in found.values():
        rows.append(
            [
                reward_name(arm.name),
                ABSENT if arm.kl is None else f"{arm.kl:g}",
                _runs_text(arm),
                *(_mean(arm, measure) for measure in COLUMNS[kind]),
                fixed(arm.cost("cpu_seconds"), 0),
                flops_text(arm.cost("flops")),
            ]
        )
    return to_markdown(["Arm", "KL coefficient", "Seeds x RLHF seeds", *COLUMNS[kind].values(), "CPU s", "FLOPs"], rows)


def render_main_arms(lines: Sequence[Line]) -> str:
    """The short table of the README: mean gold over RLHF of the main arms of `experiment=study`, and one difference."""
    found = arms(lines, "study", RLHF)
    columns = ("", "_kl")  # the ends of the arms' names at the two KL penalties
    if "r1" not in found:
        return ""

    def cell(name: str) -> str:
        return _mean(found[name], MAIN_MEASURE, len(found["r1"].seeds)) if name in found else ABSENT

    def difference(name: str) -> str:
        one = against_baseline(found, name, MAIN_MEASURE) if name in found else None
        if one is None:
            return ABSENT
        interval = interval_text(Interval(one.mean, one.low, one.high))
        return f"{interval}, higher in {one.better} of {len(one.seeds)} seeds"

    means = {"plain RM": "r1", "hardened RM": "adv_rm"}
    others = {"the same steps without adversarial pairs": "steps", "hybrid RM": "hybrid"}
    rows = [[title, *(cell(f"{arm}{end}") for end in columns)] for title, arm in means.items()]
    rows.append(["hardened less plain", *(difference(f"adv_rm{end}") for end in columns)])
    rows += [[title, *(cell(f"{arm}{end}") for end in columns)] for title, arm in others.items()]
    penalties = [found[f"r1{end}"].kl if f"r1{end}" in found else None for end in columns]
    told = [f"KL coefficient {kl:g}" if kl is not None else ABSENT for kl in penalties]
    tuned = "the best for plain RLHF of seven tried on two other seeds; the fairer comparison"
    return to_markdown(["reward", f"{told[0]}: a stress test, almost no penalty", f"{told[1]}: {tuned}"], rows)


def _mean(arm: Arm, measure: str, most: int = 0) -> str:
    """The mean of an arm; with the number of its seeds if it has fewer than its runs, or than `most`."""
    mean = arm.mean(measure)
    if mean is None:
        return ABSENT
    return f"{fixed(mean.mean)}{of_seeds(len(by_seed(arm.values(measure))), most or len(arm.seeds))}"


def _runs_text(arm: Arm) -> str:
    """`10 x 3`: reward-model seeds times RLHF seeds; both numbers if the seeds have unequal numbers of runs."""
    seeds = len(arm.seeds)
    each = {sum(line.seed == seed for line in arm.lines) for seed in arm.seeds}
    return f"{seeds} x {each.pop()}" if len(each) == 1 else f"{seeds} seeds, {len(arm.lines)} runs"


def _comparisons(lines: Sequence[Line], kind: str) -> list[str]:
    """The table of every arm minus its baseline, and a sentence for each; none if no arms are compared."""
    rows, sentences = [], []
    for by_measure in by_arm(entry for entry in compare_all(lines) if entry["kind"] == kind):
        main = by_measure.get(MAIN_MEASURE)
        if main is not None:
            difference = f"{reward_name(main['arm'])} − {reward_name(main['baseline'])}"
            cells = interval_cells(by_measure, COLUMNS[kind], " (one seed: no interval)")
            rows.append([difference, f"{main['better']} of {len(main['seeds'])}", *cells])
            sentences.append(f"- {sentence(main)}")
    if not rows:
        return []
    return [to_markdown(["Difference", "Seeds better (area)", *COLUMNS[kind].values()], rows), "\n".join(sentences)]


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
    rows = sorted((one for one in lines if one.kind == GATES), key=lambda one: one.seed)
    if not rows:
        return ""
    names = list(dict.fromkeys(name for one in rows for name in one.measures if name != "met"))
    cells = [[f"{one.seed}", *(_cell(one.measures.get(name)) for name in [*names, "met"])] for one in rows]
    missed = missed_gates(lines, experiment)
    told = "Every seed meets the gates."
    if missed:
        told = f"Seeds that miss a gate, and stay in all tables: {', '.join(map(str, missed))}."
    return f"{to_markdown(['Seed', *names, 'Gates met'], cells)}\n\n{told}"


def _attacks(lines: Sequence[Line]) -> str:
    """Each seed's attacks, and the median of the seeds."""
    rows = sorted((one for one in lines if one.kind == ATTACKS), key=lambda one: one.seed)
    if not rows:
        return ""
    names = list(dict.fromkeys(name for one in rows for name in one.measures))
    cells = [[f"{one.seed}", *(_cell(one.measures.get(name)) for name in names)] for one in rows]
    known = {name: [found for one in rows if (found := number(one.measures.get(name))) is not None] for name in names}
    cells.append(["median", *(_cell(median(known[name]) if known[name] else None) for name in names)])
    return f"#### Attacks and hardening\n\n{to_markdown(['Seed', *names], cells)}"


def _cell(value: object) -> str:
    if isinstance(value, bool) or value is None:
        return {True: "yes", False: "no", None: ABSENT}[value]
    return f"{value:.3f}" if isinstance(value, float) else str(value)


def _provenance(lines: Sequence[Line]) -> str:
    commits = sorted({line.commit[:12] for line in lines if line.commit})
    machines = sorted({line.hardware for line in lines if line.hardware})
    parts = [f"{len(lines)} lines"]
    parts += [f"commit {', '.join(commits)}"] if commits else []
    parts += [f"hardware: {'; '.join(machines)}"] if machines else []
    return f"From {', '.join(parts)}."
