"""The stages of a pipeline in their order and what each waits for; stage ``stages`` prints them for job schedulers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nemo_advrm.errors import ConfigError
from nemo_advrm.keys import nearest
from nemo_advrm.schema import Config

# stages that compute nothing with a model: one process is enough
LIGHT = ("select", "report")


@dataclass(frozen=True)
class Step:
    """One stage of the pipeline. ``name`` is its name in ``state.json``, ``after`` are the names it waits for."""

    name: str
    kind: str  # sft | preferences | train_rm | reference | attack | select | rlhf | report
    after: tuple[str, ...] = ()
    round: int = 0
    member: int = 0  # of train_rm, from 1
    run: str = ""  # of rlhf, a name of pipeline.rlhf


def labels_by_gold(cfg: Config) -> bool:
    """Whether the gold reward labels the first preference pairs."""
    return cfg.pipeline.gold == "synthetic" and not cfg.data.train_path


def order(cfg: Config) -> list[Step]:
    """Every stage, each after those it waits for; the rounds as if none ended them early."""
    steps: list[Step] = []
    start: tuple[str, ...] = ()
    if cfg.pipeline.sft:
        steps.append(Step("sft", "sft"))
        start = ("sft",)
    if labels_by_gold(cfg):
        steps.append(Step("preferences", "preferences", start))
        start = ("preferences",)
    members: list[tuple[str, ...]] = []
    for number in range(cfg.pipeline.rounds + 1):
        home = f"round_{number}"
        names = tuple(f"{home}/rm_{k}" for k in range(1, cfg.ensemble.size + 1))
        members.append(names)
        steps += [Step(name, "train_rm", start, number, k) for k, name in enumerate(names, 1)]
        steps.append(Step(f"{home}/reference", "reference", names, number))
        steps.append(Step(f"{home}/attack", "attack", (f"{home}/reference",), number))
        if number < cfg.pipeline.rounds:
            steps.append(Step(f"{home}/select", "select", (f"{home}/attack",), number))
            start = (f"{home}/select",)
    last_attack = steps[-1].name
    for name, options in cfg.pipeline.rlhf.items():
        needed = members[-1] if options.reward == "hardened" else members[0]
        if options.reward == "ensemble" and cfg.ensemble.standardise:
            needed = (*needed, "round_0/reference")  # by whose responses the members are standardised
        steps.append(Step(f"rlhf/{name}", "rlhf", needed, run=name))
    rlhf = tuple(f"rlhf/{name}" for name in cfg.pipeline.rlhf)
    return [*steps, Step("report", "report", (last_attack, *rlhf))]


def find(cfg: Config, name: str) -> Step:
    """The stage of that name; ConfigError when there is none."""
    steps = {step.name: step for step in order(cfg)}
    if name not in steps:
        raise ConfigError(
            f"pipeline.only={name}: did you mean {nearest(name, list(steps))}? stages: {', '.join(steps)}"
        )
    return steps[name]


def last_round(cfg: Config, detail: Callable[[str, str], Any]) -> int:
    """The last round whose reward models are trained; ``detail(stage, key)`` reads ``state.json``."""
    ended = (n for n in range(cfg.pipeline.rounds) if detail(f"round_{n}/select", "stop"))
    return next(ended, cfg.pipeline.rounds)


def main(cfg: Config) -> int:
    """Print a line per stage: name, kind, state (complete, skipped or to do) and the names it waits for, with tabs."""
    directory = Path(cfg.run_dir)
    state = _read_state(directory / "state.json")

    def detail(name: str, key: str) -> Any:
        return state.get(name, {}).get(key)

    last = last_round(cfg, detail)
    report = directory / "report" / "index.html"
    reported = bool(state) and report.exists() and _written_at(report) >= _written_at(directory / "state.json")
    for step in order(cfg):
        if step.round > last:
            status = "skipped"
        elif detail(step.name, "status") == "complete" or (step.kind == "report" and reported):
            status = "complete"
        else:
            status = "todo"
        print(step.name, step.kind, status, ",".join(step.after) or "-", sep="\t")
    return 0


def _written_at(path: Path) -> float:
    return path.stat().st_mtime


def _read_state(path: Path) -> dict[str, dict[str, Any]]:
    if not path.exists():
        return {}
    from nemo_advrm.stages.state import read_state

    stages: dict[str, dict[str, Any]] = read_state(path)["stages"]
    return stages
