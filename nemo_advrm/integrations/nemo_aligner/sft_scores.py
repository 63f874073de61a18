"""Samples SFT responses from the actor before training and writes their scores, which an attack needs."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from nemo_aligner.utils import parallel_state

from nemo_advrm.config.moved import old_names
from nemo_advrm.data.jsonl import write_jsonl_atomic
from nemo_advrm.engine.collectives import run_on_rank_zero
from nemo_advrm.errors import ConfigError, RewardSourceError, UserError
from nemo_advrm.integrations.nemo_aligner.rollout_reader import FINGERPRINT, RolloutReader, as_prompt
from nemo_advrm.rewards.base import RewardSource
from nemo_advrm.rewards.detector_features import FeatureReader
from nemo_advrm.rewards.sample_rows import score_sft_responses
from nemo_advrm.rollouts.types import Rollouts


def prompt_texts(*datasets: Any) -> list[str]:
    """Return the distinct prompts of NeMo-Aligner's ``RLHFDataset`` objects, without those that are too long.

    Raises ConfigError for data that is not jsonl.
    """
    texts: dict[str, None] = {}
    for dataset in datasets:
        if not dataset.use_json:
            raise ConfigError("model.data.data_impl must be jsonl: the SFT scores need the text of the prompts")
        for sample in dataset.data:
            if dataset.encode(sample["text"])[1] <= dataset.max_sample_length:
                texts.setdefault(sample["text"])
    return list(texts)


def write_sft_scores(
    path: Path, actor: Any, texts: Sequence[str], members: Sequence[RewardSource], per_prompt: int, rows: int
) -> None:
    """Sample ``per_prompt`` answers to every prompt, score them and write ``reference.jsonl``.

    All ranks call it after ``init_using_ptl`` and before training. The prompts are divided among the replicas; rank 0
    queries the members.

    Args:
        actor: NeMo-Aligner's actor with the weights of the SFT policy.
        rows: number of answers that are generated at once.

    Raises:
        ConfigError: ``per_prompt`` is below 2.
        RewardSourceError: a member failed; raised on every rank.
    """
    if per_prompt < 2:
        raise ConfigError(f"sft_statistics.samples_per_prompt must be at least 2, not {per_prompt}")
    replicas, replica = parallel_state.get_data_parallel_world_size(), parallel_state.get_data_parallel_rank()
    share = [(i, text) for i, text in enumerate(texts) for _ in range(per_prompt)][replica::replicas]
    # every replica must generate the same number of batches, because generation uses collectives
    size = -(-len(texts) * per_prompt // replicas)
    share += share[:1] * (size - len(share)) if share else [(0, texts[0])] * size
    actor.prepare_for_inference()
    answers: list[tuple[int, str, list[int], bool]] = []
    for start in range(0, size, rows):
        answers += _answer(actor, share[start : start + rows])
    actor.finish_inference()
    own = answers if torch.distributed.get_rank() == parallel_state.get_model_parallel_src_rank() else []
    parts: list[Any] | None = [None] * torch.distributed.get_world_size() if torch.distributed.get_rank() == 0 else None
    torch.distributed.gather_object(own, parts, 0)
    run_on_rank_zero(lambda: _score(path, texts, actor.tokenizer, parts or [], members, per_prompt))


def _answer(actor: Any, prompts: list[tuple[int, str]]) -> list[tuple[int, str, list[int], bool]]:
    """Return (prompt index, response, its tokens, ended) of each prompt."""
    tokenizer = actor.tokenizer
    ids = [tokenizer.text_to_ids(text) for _, text in prompts]
    lengths = torch.tensor([len(row) for row in ids])
    room = actor._length_params["max_length"]
    text = torch.full((len(ids), int(lengths.max()) + room), tokenizer.eos_id)
    for row, tokens in zip(text, ids, strict=True):
        row[: len(tokens)] = torch.tensor(tokens)
    rollouts = RolloutReader(tokenizer).read(actor.infer({"text": text, "length": lengths}))
    found = zip(rollouts.responses, rollouts.response_tokens, rollouts.ended, strict=True)
    return [(index, *answer) for (index, _), answer in zip(prompts, found, strict=True)]


def _score(
    path: Path, texts: Sequence[str], tokenizer: Any, parts: list[Any], members: Sequence[RewardSource], per_prompt: int
) -> None:
    """Score the responses and write the file. Raises RewardSourceError."""
    answers: list[list[tuple[str, list[int], bool]]] = [[] for _ in texts]
    for part in parts:
        for index, *answer in part:
            if len(answers[index]) < per_prompt:  # additional ones completed the last batch
                answers[index].append(tuple(answer))
    flat = [(i, *answer) for i, own in enumerate(answers) for answer in own]
    rollouts = Rollouts(
        prompts=[as_prompt(texts[i]) for i, *_ in flat],
        responses=[response for _, response, _, _ in flat],
        ended=[ended for *_, ended in flat],
        prompt_tokens=[tokenizer.text_to_ids(texts[i]) for i, *_ in flat],
        response_tokens=[tokens for _, _, tokens, _ in flat],
        prompt_index=[i for i, *_ in flat],
        fingerprint=FINGERPRINT,
    )
    try:
        _, rows = score_sft_responses(rollouts, per_prompt, FeatureReader(members))
        write_jsonl_atomic(path, rows)
    except UserError as error:
        raise RewardSourceError(str(error)) from error
    except Exception as error:  # a member may raise any type
        raise RewardSourceError(f"{path} could not be written: {type(error).__name__}: {error}") from error


__getattr__ = old_names(__name__)
