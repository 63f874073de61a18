"""The members of a run that are used with their reference features: the weights are fitted for these alone."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from nemo_advrm.config.schema import Config
from nemo_advrm.engine.feature_file import FILE
from nemo_advrm.errors import ConfigError
from nemo_advrm.pipeline.branches import MAIN, all_branches, arm_round, is_attacked, member_step, used_members
from nemo_advrm.pipeline.dag import Step


def hybrid_members(cfg: Config) -> set[str]:
    """Returns the names of the steps that train a member which an attack, an arm or the room uses as a hybrid."""
    if not cfg.reward_model.reference_features:
        return set()
    members = range(1, cfg.ensemble.size + 1)
    found: set[str] = set()
    for branch, options in all_branches(cfg).items():
        attacked = [number for number in range(options.rounds + 1) if is_attacked(cfg, branch, number)]
        hybrid = [k for k in members if k not in options.plain_members]
        found |= {member_step(cfg, branch, number, k) for number in attacked for k in hybrid}
    for name, arm in cfg.pipeline.rlhf.items():
        if not arm.reference_features:
            continue
        for number in range(arm_round(cfg, arm) + 1):  # rounds may end early, and then earlier members are used
            found.update(used_members(cfg, arm, number))
        if name == cfg.pipeline.room:
            found |= {member_step(cfg, MAIN, 0, k) for k in members}
    return found


def lacks_features(cfg: Config, step: Step, detail: Callable[[str, str], Any]) -> bool:
    """Returns whether the member of a complete step was trained before anything used its reference features."""
    complete = step.kind == "train_rm" and detail(step.name, "status") == "complete"
    return complete and step.name in hybrid_members(cfg) and not (_model(cfg, step) / FILE).exists()


def check_fitted(run_dir: Path, models: list[Path]) -> None:
    """Raises ConfigError for a member of the run that has no reference features."""
    for model in models:
        if not (model / FILE).exists():
            # pipeline.only of the step that uses the member does not open the one that trains it
            raise ConfigError(
                f"{model} was trained before anything used its reference features: run the pipeline without "
                f"pipeline.only, or first with pipeline.only={model.parent.relative_to(run_dir)}, which fits them"
            )


def _model(cfg: Config, step: Step) -> Path:
    return Path(cfg.run_dir) / step.name / "model"
