"""Best-of-n: proxy and gold of the response that a reward likes best of n samples, against KL; nothing is trained.

``best_of_n/samples.jsonl`` holds ``best_of_n.samples`` responses of the SFT policy to each of ``best_of_n.prompts``
fixed held-out prompts, with their gold. They are sampled once. Each reward scores all of them and writes a file
``best_of_n/NAME.json``:

    {"reward": its name, "prompts": P, "samples": N, "n": [int], "kl": [nats], "proxy": [f], "gold": [f | null],
     "measures": {"start": f, "area": f, "final": f, "peak": f}, "sampled": SHA-256 of samples.jsonl}

The best response is the one with the highest proxy, including responses cut off by the length limit.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

from nemo_advrm import files
from nemo_advrm.config.schema import Config
from nemo_advrm.data.jsonl import write_jsonl_atomic
from nemo_advrm.data.messages import Message, ReadPrompt
from nemo_advrm.data.run_records import BEST_OF_N_CURVE, RESPONSE, problem, read_rows
from nemo_advrm.data.tokenizers import Tokenizer
from nemo_advrm.engine import manifest, runtime
from nemo_advrm.engine.collectives import run_on_rank_zero
from nemo_advrm.engine.model import MegatronModel
from nemo_advrm.errors import DataError
from nemo_advrm.objectives.best_of_n_curve import best_of_n_curve, best_of_n_measures, curve_points
from nemo_advrm.rewards.base import RewardSource, checked_scores
from nemo_advrm.rewards.ensemble import UncertaintyReward
from nemo_advrm.rewards.sft_responses import as_rollouts
from nemo_advrm.rollouts.base import rollout_engine
from nemo_advrm.rollouts.run_prompts import encode_prompts, held_out_prompts
from nemo_advrm.rollouts.sample import sample
from nemo_advrm.rollouts.types import Prompt, Rollouts
from nemo_advrm.run_directory import results
from nemo_advrm.seeds import derive_seed

SAMPLES = "samples.jsonl"
_CURVE_KEYS = ("samples", "n", "kl", "proxy", "gold", "measures", "sampled")


def best_of_n_prompts(cfg: Config, tokenizer: Tokenizer, trained: Iterable[tuple[Message, ...]]) -> list[Prompt]:
    """Returns ``best_of_n.prompts`` fixed held-out prompts, none of them in ``trained``."""
    return encode_prompts(held_out_prompts(cfg, cfg.best_of_n.prompts, trained), tokenizer, cfg)


def sample_best_of_n(
    cfg: Config,
    tokenizer: Tokenizer,
    path: Path,
    policy: MegatronModel,
    prompts: list[Prompt],
    gold: RewardSource | None,
) -> None:
    """Samples ``best_of_n.samples`` responses to every prompt and writes them with their gold; all ranks call."""
    engine, seed = rollout_engine(cfg, tokenizer), derive_seed(cfg.seed, "best of n")
    rollouts = sample(engine, policy, prompts, cfg.best_of_n.samples, seed)
    scores = checked_scores(gold, rollouts).tolist() if gold is not None else [None] * len(rollouts)
    rows = (
        {
            "prompt_id": i // cfg.best_of_n.samples,
            "messages": rollouts.prompts[i],
            "response": rollouts.responses[i],
            "ended": rollouts.ended[i],
            "tokens": rollouts.response_tokens[i],
            "gold": scores[i],
        }
        for i in range(len(rollouts))
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    run_on_rank_zero(write_jsonl_atomic, path, rows)


def curve_of_reward(
    cfg: Config, tokenizer: Tokenizer, path: Path, samples: Path, reward: UncertaintyReward
) -> dict[str, Any]:
    """Scores all samples by ``reward``, writes its curve to ``path`` and returns it; all ranks call.

    An existing curve of the same samples is returned without scoring. Raises DataError when ``samples`` is missing or
    is not a file of samples, and when the curve at ``path`` was computed from other samples.
    """
    sampled = run_on_rank_zero(_digest, samples)
    found = run_on_rank_zero(_read_curve, path, samples, sampled)
    if found is not None:
        return found
    rollouts, count, gold = _read_samples(samples, cfg, tokenizer)
    rt = runtime.current()
    own = rollouts.select(range(len(rollouts))[rt.dp_slice(len(rollouts))])
    proxy_PN = torch.cat(rt.gather_data_parallel(reward.compute_rewards(own).proxy_N)).reshape(-1, count)
    gold_PN = None if gold is None else torch.tensor(gold).reshape(-1, count)
    curve = best_of_n_curve(proxy_PN, gold_PN)
    result = {
        "reward": reward.name,
        "prompts": proxy_PN.size(0),
        "samples": count,
        **curve,
        "measures": best_of_n_measures(curve["kl"], curve["gold"]),
        "sampled": sampled,
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    run_on_rank_zero(lambda: files.write_text(path, json.dumps(result, indent=1, allow_nan=False) + "\n"))
    return result


def _digest(path: Path) -> str:
    try:
        digest = manifest.digest(path)
    except OSError as error:
        raise DataError(f"{path}: the samples of best-of-n cannot be read: {error.strerror or error}") from None
    if not path.is_file():
        raise DataError(f"{path}: the samples of best-of-n cannot be read: there is no such file")
    return digest


def _read_curve(path: Path, samples: Path, sampled: str) -> dict[str, Any] | None:
    if not path.exists():
        return None
    found = results.read_object(path, _CURVE_KEYS, "remove it to compute the curve again", _wrong_curve)
    if found["sampled"] != sampled:
        raise DataError(
            f"{path} is the curve of other samples than {samples} holds: restore the samples, or remove the curve to "
            "compute it again"
        )
    return found


def _wrong_curve(found: dict[str, Any]) -> str:
    """Returns what is wrong with the values of a curve, "" when nothing is."""
    if wrong := problem(BEST_OF_N_CURVE, found):
        return wrong
    if found["n"] != curve_points(found["samples"]):
        return f"n does not match {found['samples']} samples"
    if any(len(found[key]) != len(found["n"]) for key in ("kl", "proxy", "gold")):
        return "kl, proxy and gold are not lists as long as n"
    if found["measures"] != best_of_n_measures(found["kl"], found["gold"]):
        return "its measures do not match its curve"
    return ""


def _read_samples(path: Path, cfg: Config, tokenizer: Tokenizer) -> tuple[Rollouts, int, list[float] | None]:
    """Reads samples: (responses, number per prompt, gold or None). Raises DataError for rows that are no samples."""
    cure = "remove it to sample again"
    numbered = list(read_rows(path, RESPONSE, "the samples of best-of-n", cure))
    rows = [row for _, row in numbered]
    try:
        ids = [row["prompt_id"] for row in rows]
        count = ids.count(ids[0])
        if ids != sorted(ids) or set(Counter(ids).values()) != {count}:
            raise ValueError("prompts have unequal numbers of samples, or are not in order")
        prompts = encode_prompts(
            [ReadPrompt(row["messages"], f"{path}:{number}") for number, row in numbered[::count]], tokenizer, cfg
        )
        gold = [row["gold"] for row in rows]
        rollouts = as_rollouts(rows, [prompt for prompt in prompts for _ in range(count)], tokenizer, path)
    except (KeyError, TypeError, ValueError) as error:
        reason = f"it lacks {error}" if isinstance(error, KeyError) else str(error)
        raise DataError(f"{path}: not samples of best-of-n ({reason}): {cure}") from error
    return rollouts, count, None if any(value is None for value in gold) else gold
