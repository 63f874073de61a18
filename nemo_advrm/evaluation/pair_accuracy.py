"""Accuracy of reward sources on preference pairs, and on pairs with mismatched prompts."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from nemo_advrm.config.schema import Config
from nemo_advrm.data import inputs
from nemo_advrm.data.encoding import encode_pairs
from nemo_advrm.data.mismatch import mismatch_line
from nemo_advrm.data.preferences import PreferencePair
from nemo_advrm.errors import DataError, RewardSourceError
from nemo_advrm.objectives.accuracy import accuracy
from nemo_advrm.objectives.sft_statistics import standardise_members
from nemo_advrm.objectives.uncertainty import combine
from nemo_advrm.rewards.base import RewardSource, checked_scores
from nemo_advrm.rewards.limits import longest_row
from nemo_advrm.rewards.standardisation import described, read_statistics
from nemo_advrm.rewards.token_sequences import rollouts_of
from nemo_advrm.rollouts.types import Rollouts

# number of pairs that are scored a second time, spread evenly over the file
SWAPPED_PAIRS = 256
# relative; scores of a bf16 model in two batches differ by less, scores that depend on the batch by more
ROUNDING = 2.0**-5

Scored = tuple[list[str], Tensor]
"""The sources of the pairs that a member scored, and its scores [2 N]: all chosen, then all rejected."""


def combined_line(cfg: Config, members: list[RewardSource], scored: list[Scored]) -> str:
    """Returns the printed line of the combined reward; all ranks call, since members may score SFT responses."""
    options = cfg.ensemble
    if any(kept != scored[0][0] for kept, _ in scored):
        return "not combined: the members scored different pairs (some were too long or refused by a template)"
    combined_N = combined_scores(cfg, members, torch.stack([scores for _, scores in scored], -1))
    if isinstance(combined_N, str):
        return combined_N
    notes = described(options.aggregate, options.coefficient, len(members), options.standardise)
    return "\n".join([f"{options.aggregate} of the members: {accuracy_line(combined_N)}", *notes])


def combined_scores(cfg: Config, members: list[RewardSource], scores_NK: Tensor) -> Tensor | str:
    """Returns the combined reward of the members' scores, [N], or the line that says why there is none."""
    options = cfg.ensemble
    if options.standardise:
        if not options.reference_path:
            return (
                "not combined: the members' raw scores are on different scales; set ensemble.reference_path to the "
                "reference.jsonl of an attack on these members, or ensemble.standardise=false"
            )
        statistics = read_statistics(Path(options.reference_path), members, "ensemble.reference_path")
        scores_NK = standardise_members(scores_NK, statistics)
    return combine(options.aggregate, scores_NK, options.coefficient)


def mismatch_scores(
    source: RewardSource, rows: list[PreferencePair], reason: str, cfg: Config
) -> tuple[Tensor, list[int], str]:
    """Scores pairs whose rejected response answers another prompt; all ranks call.

    Returns:
        (scores [2 N]: all chosen, then all rejected; the places of their pairs in ``rows``; the printed line).
    """
    if not rows:
        return torch.zeros(0), [], mismatch_line(None, 0, reason)
    try:
        rollouts, places = kept_rollouts(source, rows, inputs.with_unusable_rows_skipped(cfg), report=False)
    except DataError as error:  # no pair is left
        return torch.zeros(0), [], mismatch_line(None, 0, str(error))
    scores = checked_scores(source, rollouts)
    return scores, places, mismatch_line(accuracy(scores), len(places), "")


def kept_rollouts(
    source: RewardSource, rows: list[PreferencePair], cfg: Config, report: bool = True
) -> tuple[Rollouts, list[int]]:
    """Returns all chosen responses, then all rejected ones, and the places of their pairs in ``rows``.

    They are tokens when the source's tokenizer is known here, else text. ``report`` prints how many pairs were left out
    or truncated. Raises DataError when no pair is left.
    """
    tokenizer = getattr(source, "tokenizer", None)
    if tokenizer is None:
        texts = [row.chosen for row in rows] + [row.rejected for row in rows]
        ended = [row.chosen_ended for row in rows] + [row.rejected_ended for row in rows]
        none: list[list[int]] = [[] for _ in texts]
        prompts = [row.prompt for row in rows] * 2
        rollouts = Rollouts(prompts, texts, ended, none, none, [0] * len(texts), fingerprint="")
        return rollouts, list(range(len(rows)))
    limit, own, data = cfg.model.encoder_seq_length, longest_row(source), cfg.data
    try:
        pairs, counts = encode_pairs(rows, tokenizer, min(limit, own or limit), data.on_overlong, data.on_bad_row)
    except DataError as error:
        if not own or own > limit:
            raise
        raise DataError(f"{source.name}, which takes {own} tokens: {error}") from error
    if report:
        inputs.print_encoding_counts(f"pairs for {source.name}", counts)
    place_of = {id(row): place for place, row in enumerate(rows)}
    return rollouts_of(pairs, tokenizer), [place_of[id(pair.row)] for pair in pairs]


def accuracy_line(scores: Tensor) -> str:
    """Returns the printed line of accuracy and margin; ``scores`` [2 N]: all chosen, then all rejected."""
    chosen, rejected = scores.chunk(2)
    return f"accuracy {accuracy(scores):.4f}  margin {(chosen - rejected).mean():.4f}  ({len(chosen)} pairs)"


def check_swapped(source: RewardSource, rollouts: Rollouts, scores: Tensor) -> None:
    """Scores up to SWAPPED_PAIRS pairs again with chosen and rejected exchanged, in reverse order.

    The accuracy must become one minus the first one. It is meaningless for a scorer whose scores depend on the position
    of a response or on the other responses of its batch. Rounding in another batch is allowed: ROUNDING times the
    larger of a score's magnitude and the standard deviation of the scores.

    Args:
        rollouts: all chosen responses, then all rejected ones.
        scores: [2 N], the scores of ``rollouts``.

    Raises:
        RewardSourceError: the second score of a response differs from the first.
    """
    pairs = len(rollouts) // 2
    count = min(pairs, SWAPPED_PAIRS)
    sample = [pairs * i // count for i in range(count)][::-1]
    places = [*(pairs + i for i in sample), *sample]
    before, again = scores[places], checked_scores(source, rollouts.select(places))
    spread = before.std(correction=0) if len(places) > 1 else before.new_zeros(())
    allowed = ROUNDING * torch.maximum(before.abs(), again.abs()).clamp(min=float(spread))
    moved = (again - before).abs()
    if (moved <= allowed).all():
        return
    worst = int((moved - allowed).argmax())
    raise RewardSourceError(
        f"reward source {source.name}: the accuracy of {count} pairs with chosen and rejected exchanged is "
        f"{accuracy(again):.4f}, not one minus the first accuracy of {1 - accuracy(before):.4f}: in another order "
        f"{int((moved > allowed).sum())} of {len(places)} responses have another score, for example "
        f"{again[worst]:.4g} after {before[worst]:.4g}. Accuracy is meaningless while a score depends on the position "
        "or the batch of a response"
    )
