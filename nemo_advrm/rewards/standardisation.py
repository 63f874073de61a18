"""Standardises the members of an ensemble before they are combined, and reports how."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor

from nemo_advrm.data.jsonl import write_jsonl_atomic
from nemo_advrm.data.messages import plain_text
from nemo_advrm.data.sft_scores import SFTScores
from nemo_advrm.data.tokenizers import Tokenizer
from nemo_advrm.detectors.base import features_of
from nemo_advrm.engine import runtime
from nemo_advrm.engine.collectives import run_on_rank_zero
from nemo_advrm.errors import ConfigError, DataError, UserError
from nemo_advrm.objectives.sft_statistics import MemberStatistics, fit_members
from nemo_advrm.objectives.uncertainty import FORMULAS, same_as
from nemo_advrm.rewards.base import RewardSource, checked_scores
from nemo_advrm.rewards.ensemble import UncertaintyReward
from nemo_advrm.rewards.limits import places_that_fit
from nemo_advrm.rewards.monitor import Monitor
from nemo_advrm.rewards.token_sequences import written_out
from nemo_advrm.rollouts.types import Rollouts

FILE = "standardisation.jsonl"
# SFT responses that are scored again to check that a file's scores are those of the given members
PROBES = 8
# in standard deviations: other weights differ by about 1, the same weights in another precision by much less than 0.1
TOLERANCE = 0.1


def read_responses(path: Path, sources: Sequence[RewardSource], key: str, detectors: Sequence[str] = ()) -> SFTScores:
    """Reads the SFT responses of a ``reference.jsonl``, and what these detectors read of them. All ranks call.

    Args:
        key: the configuration key that names the file, for messages.

    Raises:
        ConfigError: the file has scores of another number of members, or of other members (some responses are scored
            again and compared).
    """
    reads = {feature for name in detectors for feature in features_of(name)}
    sft_responses = run_on_rank_zero(SFTScores.read, path, reads)  # other nodes may not see a new file yet
    check_members(sft_responses, sources, f"{key}={path}")
    return sft_responses


def read_statistics(path: Path, sources: Sequence[RewardSource], key: str) -> MemberStatistics:
    """Returns mean and standard deviation of every member over the SFT responses of a ``reference.jsonl``.

    See :func:`read_responses`.
    """
    return member_statistics(read_responses(path, sources, key))


def member_statistics(sft_responses: SFTScores) -> MemberStatistics:
    """Returns mean and standard deviation of every member over all SFT responses."""
    return fit_members(sft_responses.scores_PNK.flatten(0, 1))


def check_members(sft_responses: SFTScores, sources: Sequence[RewardSource], place: str) -> None:
    """Raises ConfigError that names ``place`` when the scores of ``sft_responses`` are not those of ``sources``."""
    count = sft_responses.scores_PNK.size(-1)
    if count != len(sources):
        raise ConfigError(f"{place} has scores of {count} members, ensemble.members names {len(sources)}")
    statistics = fit_members(sft_responses.scores_PNK.flatten(0, 1))
    probes, old_NK = _probes(sft_responses)
    for k, source in enumerate(sources):
        old_N, std = old_NK[:, k], statistics.std_K[k]
        moved = _moved(source, probes, old_N, std)
        if moved > TOLERANCE and all(_moved(source, p, old_N, std) > TOLERANCE for p in _as_texts(source, probes)):
            raise ConfigError(
                f"{place}: its scores of member {k + 1} are not those of {source.name}, which differ by "
                f"{moved:.2g} standard deviations: name the reference.jsonl of an attack on these members"
            )


def _moved(source: RewardSource, probes: Rollouts, old_N: Tensor, std: Tensor) -> float:
    """Returns the median difference of ``source``'s scores from ``old_N`` in standard deviations, equal on all ranks.

    0 when no response fits ``source``: the policy may have seen only the end of a long prompt, whose whole text exceeds
    a member with few positions. Infinite when ``source`` refuses the rows.
    """
    places = places_that_fit(source, probes)
    if not places:
        moved = 0.0
    else:
        try:
            now_N = checked_scores(source, probes.select(places))
            moved = ((now_N - old_N[places]).abs() / std).median().item()
        except UserError:
            if not probes.rendered and not probes.tokens_only:
                raise
            moved = float("inf")
    # all replicas must take the same decision
    return max(runtime.current().gather_data_parallel(moved)) if runtime.is_running() else moved


def _as_texts(source: RewardSource, probes: Rollouts) -> Iterator[Rollouts]:
    """Yields the responses in the forms that NeMo-Aligner's actors send.

    The prompts of such actors are texts already rendered by a template. The actors send the tokens of the prompt and of
    the response (encoded from its text when the file has no tokens), or both as one text.
    """
    tokenizer: Tokenizer | None = getattr(source, "tokenizer", None)
    if tokenizer is not None:
        written = [probes.response_tokens] if all(probes.response_tokens) else []
        with contextlib.suppress(DataError):  # a word-level vocabulary may not contain the text
            prompts = [tokenizer.encode(plain_text(prompt)) for prompt in probes.prompts]
            encode = {True: tokenizer.encode_response, False: tokenizer.encode}
            written.append([encode[e](text) for text, e in zip(probes.responses, probes.ended, strict=True)])
            for rows in written:
                if all(token < tokenizer.vocab_size for row in rows for token in row):
                    yield dataclasses.replace(
                        probes,
                        prompt_tokens=prompts,
                        response_tokens=rows,
                        fingerprint=tokenizer.fingerprint,
                        tokens_only=True,
                    )
    yield written_out(probes)


def _probes(sft_responses: SFTScores) -> tuple[Rollouts, Tensor]:
    """Returns a few responses spread over the prompts, and their scores in the file, [N, K]."""
    prompts = len(sft_responses.prompts_P)
    places = [(prompts * i // PROBES, i % sft_responses.scores_PNK.size(1)) for i in range(PROBES)]
    places = list(dict.fromkeys(places))
    none: list[list[int]] = [[] for _ in places]
    probes = Rollouts(
        prompts=[sft_responses.prompts_P[p] for p, _ in places],
        responses=[sft_responses.responses_PN[p][i] for p, i in places],
        ended=[i in sft_responses.finished(p) for p, i in places],
        prompt_tokens=none,
        response_tokens=none if sft_responses.tokens_PN is None else [sft_responses.tokens_PN[p][i] for p, i in places],
        prompt_index=[p for p, _ in places],
        fingerprint="",
    )
    return probes, torch.stack([sft_responses.scores_PNK[p, i] for p, i in places])


def combined(
    members: Sequence[RewardSource],
    aggregate: str,
    coefficient: float,
    statistics: MemberStatistics | None,
    directory: Path,
    one_too: bool = False,
    monitor: Monitor | None = None,
) -> UncertaintyReward:
    """Combines the members into one reward, prints its formula and writes its statistics to ``directory``.

    Warns when the reward equals a simpler one. See :class:`UncertaintyReward` for the arguments.
    """
    reward = UncertaintyReward(members, aggregate, coefficient, statistics, one_too, monitor)
    used = reward.statistics

    def report() -> None:
        about_detectors = [] if monitor is None else monitor.lines
        for line in (*described(aggregate, coefficient, len(members), used is not None), *about_detectors):
            print(line, flush=True)
        if used is not None:
            write_statistics(directory, used, members)

    run_on_rank_zero(report)
    return reward


def write_statistics(directory: Path, statistics: MemberStatistics, sources: Sequence[RewardSource]) -> None:
    """Writes the mean and standard deviation of each member to ``standardisation.jsonl``, one row per member."""
    columns = zip(sources, statistics.mean_K.tolist(), statistics.std_K.tolist(), strict=True)
    rows = [{"member": source.name, "mean": mean, "std": std} for source, mean, std in columns]
    write_jsonl_atomic(directory / FILE, rows)


def described(aggregate: str, coefficient: float, members: int, standardised: bool) -> list[str]:
    """Returns the lines a command prints about a reward: its formula, and a warning when it equals a simpler one."""
    lines = []
    if members > 1:
        scores = "standardised" if standardised else "raw"
        lines.append(f"reward: {aggregate} of {members} members, on {scores} scores: {FORMULAS[aggregate]}")
    other = same_as(aggregate, coefficient, members)
    if other is not None:
        plural = "s" if members > 1 else ""
        lines.append(
            f"warning: {aggregate} with {members} member{plural} and the coefficient {coefficient:g} is exactly the "
            f"{other}: runs of both compare nothing"
        )
    return lines
