"""Reads and writes ``reference.jsonl``: the SFT responses and scores that an attack is measured against."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nemo_advrm.config.schema import Config
from nemo_advrm.data.hidden_states import beside, write_hidden_states
from nemo_advrm.data.jsonl import write_jsonl_atomic
from nemo_advrm.data.sft_scores import SFTScores
from nemo_advrm.data.tokenizers import Tokenizer
from nemo_advrm.detectors.base import features_of
from nemo_advrm.engine.collectives import run_on_rank_zero
from nemo_advrm.errors import DataError
from nemo_advrm.rewards.base import RewardSource
from nemo_advrm.rewards.detector_features import FeatureReader
from nemo_advrm.rewards.sample_rows import score_sft_responses
from nemo_advrm.rollouts.base import rollout_engine
from nemo_advrm.rollouts.sample import sample
from nemo_advrm.rollouts.types import Prompt, Rollouts

if TYPE_CHECKING:
    from nemo_advrm.engine.model import MegatronModel
    from nemo_advrm.rewards.features import ReferenceFeatures


def sample_sft_scores(
    cfg: Config,
    tokenizer: Tokenizer,
    path: Path,
    prompts: list[Prompt],
    reader: FeatureReader,
    gold: RewardSource | None,
    seed: int,
) -> None:
    """Samples responses of ``pretrained_checkpoint.restore_from_path`` and scores them, unless ``path`` exists.

    The policy is not loaded again where ``reader`` has it. A served one that it is a copy of writes in its place.
    """
    if run_on_rank_zero(path.exists):
        return
    engine = rollout_engine(cfg, tokenizer)
    policy: Any = engine.behaviour()
    if policy is None:
        policy = policy_to_sample(cfg, reader.sft_policy)
    if policy is None:
        policy = engine.open_policy(cfg.pretrained_checkpoint.restore_from_path)
    per_prompt = cfg.sft_statistics.samples_per_prompt
    rollouts = sample(engine, policy, prompts, per_prompt, seed)
    write_sft_scores(path, rollouts, per_prompt, reader, gold)


def policy_to_sample(cfg: Config, sft_policy: ReferenceFeatures | None) -> MegatronModel | None:
    """Returns the model of a loaded SFT policy if it takes conversations as long as the job's, else None."""
    if sft_policy is None or sft_policy.model.model_config.encoder_seq_length < cfg.model.encoder_seq_length:
        return None
    return sft_policy.model


def write_sft_scores(
    path: Path, rollouts: Rollouts, per_prompt: int, reader: FeatureReader, gold: RewardSource | None
) -> SFTScores:
    """Scores SFT responses by every member (and by gold, for evaluation) and writes ``path``; all ranks call.

    What ``reader`` reads for the attack's detector is stored too: log-probabilities in ``path``, hidden states beside
    it. So the detector is fitted to the same numbers in every process, and selection needs no model.
    """
    sft_responses, rows = score_sft_responses(rollouts, per_prompt, reader, gold)
    run_on_rank_zero(write_hidden_states, beside(path), sft_responses.hidden_states)
    run_on_rank_zero(write_jsonl_atomic, path, rows)
    run_on_rank_zero(lambda: print(finished_line(sft_responses), flush=True))
    return sft_responses


def finished_line(sft_responses: SFTScores) -> str:
    """Returns the printed line: how many SFT responses ended before the length limit, with a warning if few did."""
    share, count = sft_responses.finished_share, sum(map(len, sft_responses.responses_PN))
    line = f"reference: {count} SFT responses, {share:.0%} of them ended within rl.max_new_tokens"
    if share >= 0.5:
        return line
    empty = sum(
        not text and not is_ended
        for p, texts in enumerate(sft_responses.responses_PN)
        for text, is_ended in zip(texts, sft_responses.ended(p), strict=True)
    )
    if empty > (1 - share) * count / 2:
        return f"{line}\nwarning: {empty / count:.0%} are empty: the endpoint refused them, or the tokenizer their text"
    return f"{line}\nwarning: most were cut off, and a cut-off one is never chosen: raise rl.max_new_tokens"


def read_sft_scores(path: Path, prompts: list[Prompt], reads: Collection[str] = ()) -> SFTScores:
    """Reads ``reference.jsonl`` and what a detector ``reads``, see :meth:`SFTScores.read`.

    Raises DataError for a bad file and for one with other prompts than the run's.
    """
    sft_responses = SFTScores.read(path, reads)
    cure = "restore it, or remove it to sample the responses again"
    if len(sft_responses.prompts_P) != len(prompts):
        raise DataError(f"{path} has {len(sft_responses.prompts_P)} prompts, the run has {len(prompts)}: {cure}")
    for prompt, found in zip(prompts, sft_responses.prompts_P, strict=True):
        if prompt.messages != found:
            raise DataError(f"{path}: prompt_id={prompt.index} is not the run's prompt of that number: {cure}")
    return sft_responses


def read_for_attack(cfg: Config, path: Path, prompts: list[Prompt]) -> SFTScores:
    """Reads ``path`` on rank 0 for all ranks, with what the attack's detector reads; see :func:`read_sft_scores`."""
    return run_on_rank_zero(read_sft_scores, path, prompts, features_of(cfg.adversarial.detector))


def read_rollouts(path: Path, prompts: list[Prompt], tokenizer: Tokenizer) -> Rollouts:
    """Reads the SFT responses of an existing ``reference.jsonl``, to be scored by other members.

    Raises DataError for a bad file, other prompts, or rows without tokens.
    """
    sft_responses = read_sft_scores(path, prompts)
    if sft_responses.tokens_PN is None:
        raise DataError(f"{path}: its rows have no tokens: restore it")
    rows = [
        {"response": response, "ended": sft_responses.ended(p)[i], "tokens": sft_responses.tokens_PN[p][i]}
        for p, responses in enumerate(sft_responses.responses_PN)
        for i, response in enumerate(responses)
    ]
    per_prompt = len(rows) // len(prompts)
    return as_rollouts(rows, [prompt for prompt in prompts for _ in range(per_prompt)], tokenizer, path)


def as_rollouts(rows: list[dict[str, Any]], prompts: list[Prompt], tokenizer: Tokenizer, path: Path) -> Rollouts:
    """Returns rows of sampled responses as rollouts; ``rows[i]`` answers ``prompts[i]``.

    Raises DataError that names ``path``, the file of the rows, for a token that ``tokenizer`` does not have.
    """
    largest = max((token for row in rows for token in row["tokens"]), default=0)
    if largest >= tokenizer.vocab_size:
        raise DataError(f"{path}: a response has the token {largest}, the tokenizer has {tokenizer.vocab_size} tokens")
    return Rollouts(
        prompts=[p.messages for p in prompts],
        responses=[row["response"] for row in rows],
        ended=[row["ended"] for row in rows],
        prompt_tokens=[p.tokens for p in prompts],
        response_tokens=[row["tokens"] for row in rows],
        prompt_index=[p.index for p in prompts],
        fingerprint=tokenizer.fingerprint,
    )
