"""Reads the RLHF runs and best-of-n curves of a run directory, and the definitions of their rewards."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import numpy as np

from nemo_advrm.data.run_records import BEST_OF_N_CURVE, METRICS_ROW
from nemo_advrm.report.detectors import ALARM_SHARE, detector_curves
from nemo_advrm.report.files import Row, as_object, count, number, numbered, numbers, read_json, read_jsonl
from nemo_advrm.report.measures import MATCHED_KL, SMOOTHING_WINDOW, TOLERANCE, Options, measured_curve
from nemo_advrm.report.records import BestOfN, Reward, RlhfArm, RlhfRun

PLAIN, HARDENED = "r1", "adv_rm"
RLHF_ORDER = (PLAIN, "ensemble_mean", "lcb", HARDENED)


def read_options(settings: Row) -> Options:
    """The options of the measures in the run's configuration, or their defaults."""
    options = as_object(settings.get("pipeline"))
    window, tolerance = count(options.get("stable_window")), number(options.get("stable_tolerance"))
    kl = number(as_object(settings.get("report")).get("kl"))
    share = number(as_object(settings.get("detector")).get("alarm_share"))
    tolerance = TOLERANCE if tolerance is None else tolerance
    attacked: set[int] = set()
    if as_object(settings.get("reward_model")).get("reference_features"):
        attacked = set(range(1, 1 + (count(as_object(settings.get("ensemble")).get("size")) or 0)))
        plain = options.get("plain_members")
        attacked -= set(plain if isinstance(plain, list) else [])
    return Options(kl or MATCHED_KL, window or SMOOTHING_WINDOW, tolerance, share or ALARM_SHARE, frozenset(attacked))


def read_rewards(settings: Row) -> dict[str, Reward]:
    """The reward of each arm in `pipeline.rlhf`. Versions without `ensemble.standardise` combined raw scores."""
    standardised = as_object(settings.get("ensemble")).get("standardise") is True
    features = bool(as_object(settings.get("reward_model")).get("reference_features"))
    of_stage = as_object(as_object(settings.get("stage")).get("rlhf"))
    sections = [as_object(rl) for rl in (of_stage.get("rl"), settings.get("rl"))]
    penalties = [number(as_object(rl.get("kl")).get("coefficient")) for rl in sections]
    penalty = next((kl for kl in penalties if kl is not None), None)
    weights = [number(rl.get("detector_penalty")) for rl in sections]
    of_detector = next((weight for weight in weights if weight is not None), 0.0)
    rewards = {}
    for name, options in as_object(as_object(settings.get("pipeline")).get("rlhf")).items():
        one = as_object(options)
        coefficient, kl = number(one.get("coefficient")), number(one.get("kl"))
        weight = number(one.get("detector_penalty"))
        rewards[str(name)] = Reward(
            kind=str(one.get("reward")),
            aggregate=str(one.get("aggregate")),
            coefficient=1.0 if coefficient is None else coefficient,
            standardised=standardised,
            kl=penalty if kl is None else kl,
            branch=str(one.get("branch") or ""),
            round=count(one.get("round")),
            features=features and one.get("reference_features") is not False,
            detector_penalty=of_detector if weight is None else weight,
        )
    return rewards


def in_order(names: Iterable[str], rewards: Iterable[str]) -> list[str]:
    """Arms in the order of the configuration, then of the experiment of earlier versions; the rest by name."""
    places = {name: place for place, name in enumerate(dict.fromkeys((*rewards, *RLHF_ORDER)))}
    return sorted(names, key=lambda name: (places.get(name, len(places)), name))


def read_rlhf(run_dir: Path, rewards: Iterable[str], stages: Row, notes: list[str]) -> tuple[RlhfArm, ...]:
    """The arms in `rlhf/`: `rlhf/ARM` for one RLHF seed, `rlhf/ARM/seed_I` for several."""
    root = run_dir / "rlhf"
    names = in_order((path.name for path in root.iterdir() if path.is_dir()) if root.is_dir() else (), rewards)
    found = []
    for name in names:
        runs = []
        for seed, home in numbered(root / name, "seed") or [(1, root / name)]:
            rows = read_jsonl(home / "metrics.jsonl", run_dir, notes, METRICS_ROW)
            curve = measured_curve(rows)
            if curve is None:
                notes.append(f"{home.relative_to(run_dir)} has no metrics.")
                continue
            status = as_object(stages.get(home.relative_to(run_dir).as_posix())).get("status")
            runs.append(RlhfRun(seed, curve, status in (None, "complete"), detector_curves(rows)))
        if runs:
            found.append(RlhfArm(name, tuple(runs)))
    if not found:
        notes.append("No RLHF runs: over-optimisation curves and the comparison of rewards are absent.")
    elif not any(one.has_gold for one in found):
        notes.append("No gold reward in the RLHF runs (normal on real data): measures of gold are absent.")
    return tuple(found)


def read_best_of_n(run_dir: Path, rewards: Iterable[str], notes: list[str]) -> tuple[BestOfN, ...]:
    """The curves in `best_of_n/`, one file for each reward."""
    root = run_dir / "best_of_n"
    names = in_order((path.stem for path in root.glob("*.json")), rewards)
    found = []
    for name in names:
        curve = read_json(root / f"{name}.json", run_dir, notes, BEST_OF_N_CURVE)
        columns = (numbers(curve.get(key)) for key in ("n", "kl", "proxy", "gold"))
        points = [point for point in zip(*columns, strict=False) if point[0] is not None and point[1] is not None]
        if not points:
            notes.append(f"best_of_n/{name}.json is not a best-of-n curve.")
            continue
        n_S, kl_S, proxy_S, gold_S = np.array(points, dtype=np.float64).T
        found.append(BestOfN(name, n_S.astype(np.int64), kl_S, proxy_S, gold_S))
    return tuple(found)
