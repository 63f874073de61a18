"""The command ``evaluate``: how good reward models of any kind are on preference pairs or on a benchmark."""

from __future__ import annotations

import torch

from nemo_advrm.config.schema import Config
from nemo_advrm.data import inputs
from nemo_advrm.data.mismatch import mismatched_pairs
from nemo_advrm.data.tokenizers import build_tokenizer
from nemo_advrm.engine import runtime
from nemo_advrm.errors import ConfigError, DataError
from nemo_advrm.evaluation import report
from nemo_advrm.evaluation.model_figures import ModelScores, score
from nemo_advrm.evaluation.pair_accuracy import accuracy_line, combined_line, combined_scores
from nemo_advrm.evaluation.rows import EvaluationRows, evaluation_rows
from nemo_advrm.rewards import sources
from nemo_advrm.rewards.base import RewardSource
from nemo_advrm.run_directory import run_dir


def main(cfg: Config) -> int:
    """Scores ``data.validation_path`` (or ``data.train_path``); prints accuracy, calibration and a benchmark's table.

    It scores with each of ``ensemble.members``, else with the reward model ``pretrained_checkpoint.restore_from_path``,
    also on mismatched prompts, and with several members combined, or compared with the first (``evaluate.compare``).
    All figures are also in ``run_dir/evaluation.json``.
    """
    if not cfg.data.validation_path and not cfg.data.train_path:
        raise ConfigError("data.validation_path is not set: name a file of preference pairs")
    if not cfg.ensemble.members and not cfg.pretrained_checkpoint.restore_from_path:
        raise ConfigError("pretrained_checkpoint.restore_from_path is not set: name a reward model")
    if cfg.evaluate.compare and len(cfg.ensemble.members) < 2:
        raise ConfigError("evaluate.compare=true: name the models in ensemble.members, first the one to compare with")
    cfg = sources.for_scoring(cfg, cfg.ensemble.members or [cfg.pretrained_checkpoint.restore_from_path])
    run_dir.start(cfg, megatron=False)
    rows = evaluation_rows(cfg)
    members = sources.load_members(cfg, cfg.ensemble.members, build_tokenizer(cfg.model.tokenizer))
    if cfg.evaluate.pairwise:
        from nemo_advrm.evaluation.pairwise_accuracy import pairwise_lines

        for member in members:
            _print_of(member, members, pairwise_lines(member, rows, cfg))
        return 0
    mismatched, reason = (
        mismatched_pairs(rows.to_mismatch) if cfg.evaluate.mismatch else ([], "evaluate.mismatch=false")
    )
    models: list[ModelScores] = []
    for member in members:
        model = score(member, rows, mismatched, reason, cfg)
        if not len(model.kept_pairs(rows)):
            raise DataError(f"{member.name}: no pair of the evaluated rows has two answers that it could score")
        models.append(model)
        lines = [accuracy_line(model.pair_scores(rows)), model.mismatch_line]
        _print_of(member, members, lines)
    if len(members) > 1 and not cfg.evaluate.compare:
        models += _combined(cfg, members, models, rows)
    if runtime.current().is_writer:
        found = report.evaluate(models, rows, cfg)
        path = report.write(found, cfg, inputs.evaluation_file(cfg)[0])
        _print("\n".join([*report.lines(found), "", f"all figures: {path}"]))
    return 0


def _combined(
    cfg: Config, members: list[RewardSource], models: list[ModelScores], rows: EvaluationRows
) -> list[ModelScores]:
    """Prints the line of the combined reward and returns it as a model; [] when the members cannot be combined."""
    scored = [([rows.sources[i] for i in model.kept_pairs(rows).tolist()], model.pair_scores(rows)) for model in models]
    _print(combined_line(cfg, members, scored))
    answers_AK = torch.stack([model.answers_A for model in models], -1)
    if not torch.equal(answers_AK.isnan().any(-1), answers_AK.isnan().all(-1)):
        return []  # they scored different rows
    combined_A = combined_scores(cfg, members, answers_AK)
    return [] if isinstance(combined_A, str) else [ModelScores(f"{cfg.ensemble.aggregate} of the members", combined_A)]


def _print_of(member: RewardSource, members: list[RewardSource], lines: list[str]) -> None:
    """Prints the lines of a member, and what a judge cost; with the member's name when there are several."""
    cost_line = getattr(member, "cost_line", None)
    lines = [*lines, cost_line()] if cost_line is not None else lines
    _print("\n".join(line if len(members) == 1 else f"{member.name}: {line}" for line in lines))


def _print(text: str) -> None:
    if runtime.current().is_writer:
        print(text, flush=True)
