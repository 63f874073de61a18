"""Hardens a trained reward model: on from its own weights, on finds and on replay of its own scores."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nemo_advrm import files
from nemo_advrm.config.schema import Config
from nemo_advrm.convert.drop_in import write_drop_in
from nemo_advrm.data.attributes import combine
from nemo_advrm.data.encoding import EncodedPair
from nemo_advrm.data.messages import prompt_key
from nemo_advrm.data.tokenizers import Tokenizer
from nemo_advrm.engine import runtime
from nemo_advrm.engine.collectives import run_on_rank_zero
from nemo_advrm.engine.scoring import score_sequences
from nemo_advrm.errors import ConfigError
from nemo_advrm.models.hardened_reward_model import HardenedRewardModel, ReplayRow, round_weights
from nemo_advrm.objectives.accuracy import accuracy
from nemo_advrm.objectives.hardening import drift
from nemo_advrm.objectives.intervals import share_interval
from nemo_advrm.run_directory import results
from nemo_advrm.training.hardening_data import HardeningData
from nemo_advrm.training.hardening_target import Target
from nemo_advrm.training.run_training import fit, read_result, write_result

ORIGINAL, EXPORT = "original.json", "export.json"
# metrics that every hardening has
MEASURED = ("success/before", "success/after", "drift/mean_absolute")
Scores = dict[str, Tensor]
"""Outputs of the head for each group of sequences, [N, A] fp32."""


def harden(
    cfg: Config,
    tokenizer: Tokenizer,
    directory: Path,
    target: Target,
    restore_from: str,
    data: HardeningData,
) -> dict[str, float]:
    """Trains into ``directory/model`` and returns what was measured; a finished training is not repeated.

    The scores before the first step are kept in ``directory/original.json``, so that a resumed training has the same
    anchors. Scores after it are those of the weights as they will be stored.

    Args:
        cfg: configuration of the training, :meth:`Target.configuration`.
        restore_from: the target as a checkpoint of this package.
    """
    finished = read_result(directory, *MEASURED)
    if finished is not None:
        return finished
    attributes = target.spec.attributes
    module = HardenedRewardModel(cfg, tokenizer, data.finds, restore_from, cfg.seed, attributes)
    groups = {
        "clean": data.clean,
        "held_out_clean": data.held_out_clean,
        **{name: _sides(getattr(data, name)) for name in ("finds", "held_out_finds", "pairs")},
    }
    before = _original_scores(module, groups, directory / ORIGINAL)
    rows = zip(data.clean, before["clean"].tolist(), strict=True)
    module.anchor_to([ReplayRow(tokens, tuple(outputs)) for tokens, outputs in rows])
    fit(module, cfg, directory, "harden")
    round_weights(module, target.dtype, target.head_dtype)
    after = _scores(module, groups)
    metrics = measured(
        {name: combine(scores, attributes) for name, scores in before.items()},
        {name: combine(scores, attributes) for name, scores in after.items()},
        module.spread,
        {name: _prompts(getattr(data, name)) for name in ("finds", "held_out_finds")},
    )
    write_result(directory, module, metrics, None, steps=module.max_steps, **metrics)
    return metrics


def measured(before: Scores, after: Scores, spread: float, prompts: dict[str, Tensor]) -> dict[str, float]:
    """Returns what hardening changed, from the scores [N] of each group before and after.

    A find succeeds where its score is above that of the ordinary answer it is paired with; ``low`` and ``high`` are the
    95 % interval of the share, in which finds to one prompt are not independent. ``drift/correlation`` is absent where
    the scores of all held-out clean responses are equal.

    Args:
        spread: standard deviation of the original scores, the unit of margins and drift.
        prompts: number of the prompt of each pair of both groups of finds.
    """
    metrics = {"spread": spread, "clean/replayed": float(len(before["clean"]))}
    for when, scores in (("before", before), ("after", after)):
        for prefix, group in (("success", "held_out_finds"), ("trained_success", "finds")):
            chosen_N, rejected_N = scores[group].chunk(2)
            wins_N = (rejected_N > chosen_N).double()
            low, high = share_interval(wins_N, prompts[group])
            metrics |= {
                f"{prefix}/{when}": wins_N.mean().item(),
                f"{prefix}/{when}_low": low,
                f"{prefix}/{when}_high": high,
            }
            metrics[f"{prefix}/finds"] = float(len(chosen_N))
            if prefix == "success":
                metrics[f"margin/{when}"] = (chosen_N - rejected_N).mean().item() / spread
        if len(scores["pairs"]):
            metrics[f"pairs/accuracy_{when}"] = accuracy(scores["pairs"])
            metrics["pairs/count"] = len(scores["pairs"]) / 2
    moved = drift(before["held_out_clean"], after["held_out_clean"], spread)
    metrics |= {"drift/responses": float(len(before["held_out_clean"])), "drift/mean_absolute": moved.mean_absolute}
    if moved.correlation is not None:
        metrics["drift/correlation"] = moved.correlation
    return metrics


def refuse_existing(out: Path, directory: Path) -> None:
    """Raise ConfigError when ``out`` exists and this run has not written it."""
    if not out.exists() or _exported(directory) == str(out.absolute()):
        return
    raise ConfigError(f"harden.out={out}: already exists; choose another out, or remove it")


def export(target: Target, directory: Path, out: Path, finds: str) -> None:
    """Writes the trained model to ``out`` in the target's format, unless this run has done so; all ranks call."""

    def write() -> None:
        # The mark comes first: what has the name `out` afterwards is this run's, since it appears only when complete.
        files.write_text(directory / EXPORT, json.dumps({"out": str(out.absolute())}) + "\n")
        if not out.exists():
            out.parent.mkdir(parents=True, exist_ok=True)
            note = (
                f"Hardened by `nemo-advrm harden` from `{target.spec.text}` on the finds `{finds}`: the weights "
                "differ from the original's, the configuration and the tokenizer do not."
            )
            write_drop_in(target.spec.kind, target.spec.path, directory / "model", out, note)

    run_on_rank_zero(write)


def _exported(directory: Path) -> str:
    path = directory / EXPORT
    if not path.exists():
        return ""
    found = results.read_object(path, ("out",), f"remove {path} and the model is written again")
    return str(found["out"])


def _prompts(pairs: Sequence[EncodedPair]) -> Tensor:
    """Returns the number of the prompt of each pair."""
    numbers: dict[str, int] = {}
    keys = [prompt_key(pair.row.prompt) if pair.row else pair.source for pair in pairs]
    return torch.tensor([numbers.setdefault(key, len(numbers)) for key in keys])


def _sides(pairs: Sequence[EncodedPair]) -> list[list[int]]:
    return [pair.chosen for pair in pairs] + [pair.rejected for pair in pairs]


def _scores(module: HardenedRewardModel, groups: dict[str, list[list[int]]]) -> Scores:
    """Scores all groups; data-parallel ranks share the work. All ranks call."""
    rt = runtime.current()
    sequences = [row for rows in groups.values() for row in rows]
    own = sequences[rt.dp_slice(len(sequences))]
    part = score_sequences(module.model, own, module.tokenizer.pad_id)
    table_NA = torch.cat(rt.gather_data_parallel(part[:, None] if part.ndim == 1 else part))
    return dict(zip(groups, table_NA.split([len(rows) for rows in groups.values()]), strict=True))


def _original_scores(module: HardenedRewardModel, groups: dict[str, list[list[int]]], path: Path) -> Scores:
    """Returns the scores of the untrained model, which a resumed training reads back; all ranks call.

    Raises DataError for a damaged file.
    """
    if not run_on_rank_zero(path.exists):
        scores = _scores(module, groups)
        lists = {name: table.tolist() for name, table in scores.items()}
        run_on_rank_zero(lambda: files.write_text(path, json.dumps(lists) + "\n"))
        return scores
    sizes = {name: len(rows) for name, rows in groups.items()}
    cure = f"restore it, or remove {path.parent} and the hardening is done again"
    found = run_on_rank_zero(
        results.read_object,
        path,
        tuple(groups),
        cure,
        lambda value: _wrong_scores(value, sizes, module.model.head_outputs),
    )
    return {name: torch.tensor(found[name]).reshape(sizes[name], module.model.head_outputs) for name in groups}


def _wrong_scores(value: dict[str, Any], sizes: dict[str, int], outputs: int) -> str:
    for name, size in sizes.items():
        try:
            table = torch.tensor(value[name], dtype=torch.float32).reshape(size, outputs)
        except (TypeError, ValueError, RuntimeError):
            return f"{name} is not {size} rows of {outputs} numbers"
        if not table.isfinite().all():
            return f"{name} holds a number that is not finite"
    return ""
