"""How the members of an ensemble are brought to one scale before they are combined, and what is said of it."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor

from nemo_advrm.data.jsonl import write_jsonl_atomic
from nemo_advrm.data.sft_scores import SFTScores
from nemo_advrm.data.tokenizers import Tokenizer
from nemo_advrm.engine import runtime
from nemo_advrm.engine.collectives import run_on_rank_zero
from nemo_advrm.errors import ConfigError, DataError, UserError
from nemo_advrm.objectives.sft_statistics import MemberStatistics, fit_members
from nemo_advrm.objectives.uncertainty import FORMULAS, same_as
from nemo_advrm.rewards.base import RewardSource, checked_scores
from nemo_advrm.rewards.ensemble import UncertaintyReward
from nemo_advrm.rewards.limits import places_that_fit
from nemo_advrm.rewards.remote import plain_text, written_out
from nemo_advrm.rollouts.types import Rollouts

FILE = "standardisation.jsonl"
# SFT responses that are scored anew to see that a file's scores are those of the members at hand
PROBES = 8
# members of other weights differ by about a standard deviation, the same weights in another precision by little
TOLERANCE = 0.1


def read_statistics(path: Path, sources: Sequence[RewardSource], key: str) -> MemberStatistics:
    """Mean and spread of every member over all SFT responses of a ``reference.jsonl``; all ranks call.

    Args:
        key: the configuration key that names the file, for messages.

    Raises:
        ConfigError: the file has scores of another number of members, or of other members: some of its responses are
            scored anew and compared.
    """
    sft_responses = run_on_rank_zero(SFTScores.read, path)  # other nodes may see a new file later
    check_members(sft_responses, sources, f"{key}={path}")
    return fit_members(sft_responses.scores_PNK.flatten(0, 1))


def check_members(sft_responses: SFTScores, sources: Sequence[RewardSource], place: str) -> None:
    """Raise ConfigError, naming ``place``, where the scores of a reference are not those of ``sources``."""
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
                f"{place}: its scores of member {k + 1} are not those of {source.name}, which scores the same "
                f"responses {moved:.2g} standard deviations apart: take the reference of an attack on these members"
            )


def _moved(source: RewardSource, probes: Rollouts, old_N: Tensor, std: Tensor) -> float:
    """How far, in standard deviations, ``source`` scores the responses from ``old_N`` (median); the same on all ranks.

    0 where it can take none of them: of a long prompt the policy may have seen the end alone, and a member with few
    positions cannot take its whole text. Infinite where it refuses them.
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
    # each replica scores the same responses: all of them must decide alike
    return max(runtime.current().gather_data_parallel(moved)) if runtime.is_running() else moved


def _as_texts(source: RewardSource, probes: Rollouts) -> Iterator[Rollouts]:
    """The same responses behind the texts of their prompts, in the ways in which NeMo-Aligner's actors send them.

    Such actors are given prompts into which a template has been written already. They send tokens: those of the prompt
    and those that they wrote (or, where the file does not have these, those of the response), or one text.
    """
    tokenizer: Tokenizer | None = getattr(source, "tokenizer", None)
    if tokenizer is not None:
        written = [probes.response_tokens] if all(probes.response_tokens) else []
        with contextlib.suppress(DataError):  # a vocabulary of words may not know the text
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
    """A few responses, spread over the prompts, as text; and their scores [N, K] in the file."""
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
) -> UncertaintyReward:
    """The members as one reward; says which, warns where it equals a simpler one, and writes its statistics.

    See :class:`UncertaintyReward` for the arguments.
    """
    reward = UncertaintyReward(members, aggregate, coefficient, statistics, one_too)
    used = reward.statistics

    def tell() -> None:
        for line in described(aggregate, coefficient, len(members), used is not None):
            print(line, flush=True)
        if used is not None:
            write_statistics(directory, used, members)

    run_on_rank_zero(tell)
    return reward


def write_statistics(directory: Path, statistics: MemberStatistics, sources: Sequence[RewardSource]) -> None:
    """Write what the members were standardised by to ``standardisation.jsonl``, a row a member."""
    write_jsonl_atomic(
        directory / FILE,
        [
            {"member": source.name, "mean": mean, "std": std}
            for source, mean, std in zip(
                sources, statistics.mean_K.tolist(), statistics.std_K.tolist(), strict=True
            )
        ],
    )


def described(aggregate: str, coefficient: float, members: int, standardised: bool) -> list[str]:
    """What a stage says of a reward: the formula of several members, and a warning where it equals a simpler one."""
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
