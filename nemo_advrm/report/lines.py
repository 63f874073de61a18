"""Makes lines of a study from a run directory: one for every finished RLHF run and every best-of-n curve."""

from __future__ import annotations

import contextlib
import os
import platform
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch

from nemo_advrm.report.collect import collect
from nemo_advrm.report.collect_rlhf import HARDENED, PLAIN
from nemo_advrm.report.measures import measures_of
from nemo_advrm.report.records import Reward, Run
from nemo_advrm.report.study import BEST_OF_N, RLHF, Line


def lines_of(run_dir: Path, experiment: str = "", hardware: str = "") -> list[Line]:
    """The lines of the finished RLHF runs and best-of-n curves of a run directory; see `lines_of_run`."""
    return lines_of_run(collect(run_dir), experiment, hardware)


def lines_of_run(run: Run, experiment: str = "", hardware: str = "") -> list[Line]:
    """The lines of a run; `experiment` defaults to the run's `name`.

    An arm is compared with the plain arm of the same KL coefficient. `cpu_seconds`, `flops` and `commit` are those of
    the RLHF stage itself; runs of earlier versions know only the commit of the whole run.
    """
    name, seed = experiment or run.experiment or run.directory.resolve().name, run.seed or 0
    compared = baselines([one.name for one in run.rlhf], run.rewards)
    lines = []
    for arm in run.rlhf:
        reward = run.rewards.get(arm.name)
        for one in arm.runs:
            if not one.finished:
                continue
            stages = (f"rlhf/{arm.name}/seed_{one.seed}", f"rlhf/{arm.name}")
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
                    cpu_seconds=_first(run.cpu_seconds, stages),
                    flops=_first(run.flops, stages),
                    commit=_first(run.commits, stages) or run.commit,
                    hardware=hardware,
                )
            )
    compared = baselines([one.name for one in run.best_of_n], run.rewards, equal_kl=False)
    for curve in run.best_of_n:
        lines.append(
            Line(
                name,
                BEST_OF_N,
                seed,
                curve.name,
                baseline=compared[curve.name],
                measures=dict(curve.measures),
                commit=run.commits.get(f"best_of_n/{curve.name}", run.commit),
                hardware=hardware,
            )
        )
    return lines


def _first(by_stage: Mapping[str, Any], stages: Iterable[str]) -> Any:
    return next((by_stage[stage] for stage in stages if stage in by_stage), None)


def _is_plain(name: str, rewards: Mapping[str, Reward]) -> bool:
    """Runs of earlier versions do not describe their arms: there the name decides."""
    return rewards[name].is_plain if name in rewards else name == PLAIN


def baselines(names: Iterable[str], rewards: Mapping[str, Reward], equal_kl: bool = True) -> dict[str, str]:
    """The arm that each arm is compared with: the first plain one, of the same KL coefficient; "" if there is none."""
    names = list(names)
    plain = [name for name in names if _is_plain(name, rewards)]

    def comparable(name: str, baseline: str) -> bool:
        own, other = rewards.get(name), rewards.get(baseline)
        return own is None or other is None or not equal_kl or own.kl == other.kl

    return {name: "" if name in plain else next((one for one in plain if comparable(name, one)), "") for name in names}


def hardened_arm(names: Iterable[str], rewards: Mapping[str, Reward]) -> str | None:
    """The arm of the headline: the first on a hardened reward model, the main rounds' before a branch's.

    Without one, the arm with the name that earlier versions gave it, else the first that is not plain.
    """
    names = list(names)
    hardened = [name for name in names if name in rewards and rewards[name].kind == "hardened"]
    hardened.sort(key=lambda name: bool(rewards[name].branch))
    known = [name for name in names if name == HARDENED]
    others = [name for name in names if not _is_plain(name, rewards)]
    return next(iter([*hardened, *known, *others]), None)


def this_machine() -> str:
    """Processor, cores and GPUs in words."""
    model = platform.processor() or platform.machine()
    with contextlib.suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        model = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), model)
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    cores = len(os.sched_getaffinity(0))
    return ", ".join([f"{model} ({cores} core{'s' if cores > 1 else ''})", *gpus])
