"""The command ``harden``: cures a reward model of what an attack found, without the data that it was trained on.

It has the configuration of all trainings and no flat schema like ``convert``: layout, number format, optimizer,
checkpoints and restart are those of a training. Its own keys are typed without the section's name (``target=``).
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

from nemo_advrm.config.schema import Config
from nemo_advrm.engine import runtime
from nemo_advrm.errors import ConfigError
from nemo_advrm.rank_info import RankInfo
from nemo_advrm.rewards import sources
from nemo_advrm.run_directory import run_dir
from nemo_advrm.training.hardening import export, harden, refuse_existing
from nemo_advrm.training.hardening_data import answered, encoded, read_rows
from nemo_advrm.training.hardening_target import check_out, describe_target, opened_tokenizer

# a larger drift, or a smaller correlation, is warned of
MOST_DRIFT, LEAST_CORRELATION = 0.5, 0.95


def main(cfg: Config) -> int:
    """Hardens ``harden.target``, prints success and drift before and after, and writes the model in its format."""
    if cfg.trainer.max_steps != -1:
        raise ConfigError(f"trainer.max_steps={cfg.trainer.max_steps}: hardening takes steps= (harden.steps)")
    directory = Path(cfg.run_dir)
    target = describe_target(cfg)
    out = check_out(cfg, target)
    refuse_existing(out, directory)
    cfg = target.configuration(cfg)
    run_dir.start(cfg)
    sources.check(target.spec, cfg, RankInfo.from_environment().world_size)
    rows = read_rows(cfg)
    run_dir.claim(cfg, directory, "harden")
    checkpoint = sources.as_checkpoint(target.spec, cfg)
    rows = answered(cfg, rows, directory)
    tokenizer, named = opened_tokenizer(target, checkpoint)
    cfg = dataclasses.replace(cfg, model=dataclasses.replace(cfg.model, tokenizer=named))
    data = encoded(cfg, rows, tokenizer)
    metrics = harden(cfg, tokenizer, directory, target, checkpoint.location, data)
    export(target, directory, out, cfg.harden.finds)
    if runtime.current().is_writer:
        print("\n".join([*lines(metrics), f"hardened reward model: {out}"]), flush=True)
    return 0


def lines(metrics: dict[str, float]) -> list[str]:
    """Returns what is printed of a hardening, with warnings where it failed or went too far."""
    finds, trained = int(metrics["success/finds"]), int(metrics["trained_success/finds"])
    table = [
        ("finds that win, held out", *_counts(metrics, "success", finds)),
        ("finds that win, trained on", *_counts(metrics, "trained_success", trained)),
        ("margin of the ordinary answer", f"{metrics['margin/before']:+.2f}", f"{metrics['margin/after']:+.2f}"),
    ]
    if "pairs/count" in metrics:
        before, after = (f"{metrics[f'pairs/accuracy_{when}']:.3f}" for when in ("before", "after"))
        table.append((f"accuracy on {int(metrics['pairs/count'])} pairs", before, after))
    width = max(len(name) for name, _, _ in table)
    shown = [f"{'':<{width}}  {'before':>22}  {'after':>22}"]
    shown += [f"{name:<{width}}  {before:>22}  {after:>22}" for name, before, after in table]
    correlation = metrics.get("drift/correlation")
    shown.append(
        f"clean responses ({int(metrics['drift/responses'])} held out): scores moved by "
        f"{metrics['drift/mean_absolute']:.3f} on average"
        + ("" if correlation is None else f", correlation {correlation:.3f}")
    )
    shown.append(f"margins and changes are in units of the original spread of clean scores, {metrics['spread']:.4g}")
    if metrics["success/before"] and metrics["success/after"] > metrics["success/before"] / 2:
        shown.append("warning: more than half of the held-out finds still win: give more finds, or raise steps")
    if metrics["drift/mean_absolute"] > MOST_DRIFT or (correlation is not None and correlation < LEAST_CORRELATION):
        shown.append("warning: clean scores moved much: raise replay_weight, give more prompts, or lower learning_rate")
    return shown


def _counts(metrics: dict[str, float], prefix: str, finds: int) -> tuple[str, str]:
    """Returns the numbers of finds that win before and after, each with the 95 % interval of its share."""
    before, after = (
        f"{round(metrics[name] * finds)} of {finds} [{metrics[f'{name}_low']:.2f}, {metrics[f'{name}_high']:.2f}]"
        for name in (f"{prefix}/before", f"{prefix}/after")
    )
    return before, after
