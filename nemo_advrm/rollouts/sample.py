"""Samples several responses per prompt, with the work split over the data-parallel ranks."""

from __future__ import annotations

from typing import Any

from nemo_advrm.config.schema import Config
from nemo_advrm.data.tokenizers import Tokenizer
from nemo_advrm.engine import runtime
from nemo_advrm.engine.generation import uniforms
from nemo_advrm.engine.model import MegatronModel
from nemo_advrm.rollouts.base import rollout_engine
from nemo_advrm.rollouts.types import Prompt, Rollouts


def sample(
    cfg: Config, tokenizer: Tokenizer, model: MegatronModel, prompts: list[Prompt], per_prompt: int, seed: int
) -> Rollouts:
    """Samples ``per_prompt`` responses to every prompt and returns all of them on every rank.

    Responses to one prompt are adjacent. Every data-parallel rank samples its share, and the shares are gathered.
    """
    rt = runtime.current()
    repeated = [p for p in prompts for _ in range(per_prompt)]
    numbers = uniforms(seed, len(repeated), cfg.rl.max_new_tokens)
    own = rt.dp_slice(len(repeated))
    part = rollout_engine(cfg, tokenizer).roll_out(model, repeated[own], numbers[own])
    parts: list[Rollouts] = rt.gather_data_parallel(part)
    names = ("prompts", "responses", "ended", "prompt_tokens", "response_tokens", "prompt_index")
    joined: dict[str, Any] = {name: [x for p in parts for x in getattr(p, name)] for name in names}
    return Rollouts(**joined, fingerprint=tokenizer.fingerprint)
