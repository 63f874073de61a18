"""The lines of a study that a run directory gives: one for every RLHF run and for every best-of-n curve in it."""

from __future__ import annotations

import contextlib
import os
import platform
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TypeVar

import torch

from nemo_advrm.objectives.best_of_n_curve import best_of_n_measures
from nemo_advrm.report.collect import collect
from nemo_advrm.report.collect_rlhf import HARDENED, PLAIN
from nemo_advrm.report.measures import measures_of
from nemo_advrm.report.records import Reward, Run
from nemo_advrm.report.study import BEST_OF_N, RLHF, Line

T = TypeVar("T")
U = TypeVar("U")


def lines_of(run_dir: Path, experiment: str = "", hardware: str = "") -> list[Line]:
    """The lines of the finished RLHF runs and best-of-n curves of a run directory; see `lines_of_run`."""
    return lines_of_run(collect(run_dir), experiment, hardware)


def lines_of_run(run: Run, experiment: str = "", hardware: str = "") -> list[Line]:
    """The lines of a run.

    `cpu_seconds`, `flops` and `commit` are those of the RLHF stage itself (`commit` the run's where versions before did
    not keep it). An arm is compared with the plain one of the same KL
    coefficient; `experiment` is the run's `name` unless it is given.
    """
    name, seed = experiment or run.experiment or run.directory.resolve().name, run.seed or 0
    compared = baselines([one.name for one in run.rlhf], run.rewards)
    lines = []
    for arm in run.rlhf:
        reward = run.rewards.get(arm.name)
        for one in arm.runs:
            if one.finished:
                lines.append(
                    Line(
                        name,
                        RLHF,
                        seed,
                        arm.name,
                        one.seed,
                        kl=reward.kl if reward else None,
                        baseline=compared[arm.name],
                        measures=measures_of(one.measured, run.options),
                        cpu_seconds=_of_stage(run.cpu_seconds, arm.name, one.seed, None),
                        flops=_of_stage(run.flops, arm.name, one.seed, None),
                        commit=_of_stage(run.commits, arm.name, one.seed, run.commit),
                        hardware=hardware,
                    )
                )
    compared = baselines([one.name for one in run.best_of_n], run.rewards, equal_kl=False)
    for curve in run.best_of_n:
        gold = [value if value == value else None for value in curve.gold_S.tolist()]
        found = best_of_n_measures(curve.kl_S.tolist(), gold)
        lines.append(
            Line(
                name,
                BEST_OF_N,
                seed,
                curve.name,
                baseline=compared[curve.name],
                measures=dict(found),
                commit=run.commits.get(f"best_of_n/{curve.name}", run.commit),
                hardware=hardware,
            )
        )
    return lines


def _of_stage(known: Mapping[str, T], arm: str, seed: int, otherwise: U) -> T | U:
    """What is known of the stage of one RLHF run."""
    stages = (f"rlhf/{arm}/seed_{seed}", f"rlhf/{arm}")
    return next((known[stage] for stage in stages if stage in known), otherwise)


def baselines(names: Iterable[str], rewards: Mapping[str, Reward], equal_kl: bool = True) -> dict[str, str]:
    """The arm that each arm is compared with, "" for none: the first plain one, of the same KL coefficient.

    Runs that do not say what their arms are have the names of earlier versions.
    """
    names = list(names)
    plain = [name for name in names if (rewards[name].is_plain if name in rewards else name == PLAIN)]

    def of(name: str) -> str:
        own = rewards.get(name)
        for one in plain:
            other = rewards.get(one)
            if own is None or other is None or not equal_kl or own.kl == other.kl:
                return one
        return ""

    return {name: "" if name in plain else of(name) for name in names}


def hardened_arm(names: Iterable[str], rewards: Mapping[str, Reward]) -> str | None:
    """The arm that the headline is about: the first on a hardened reward model, else the first that is not plain."""
    names = list(names)
    hardened = [name for name in names if name in rewards and rewards[name].kind == "hardened"]
    kinds = sorted(hardened, key=lambda name: bool(rewards[name].branch))  # those of the main rounds first
    known = [name for name in names if name == HARDENED]
    others = [name for name in names if not (rewards[name].is_plain if name in rewards else name == PLAIN)]
    return next(iter([*kinds, *known, *others]), None)


def this_machine() -> str:
    """Processor, cores and GPUs in words."""
    model = platform.processor() or platform.machine()
    with contextlib.suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        model = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), model)
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    cores = len(os.sched_getaffinity(0))
    return ", ".join([f"{model} ({cores} core{'s' if cores > 1 else ''})", *gpus])
