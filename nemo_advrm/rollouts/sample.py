"""Samples several responses per prompt, with the work split over the data-parallel ranks."""

from __future__ import annotations

from nemo_advrm.engine import runtime
from nemo_advrm.engine.generation import uniforms
from nemo_advrm.engine.model import MegatronModel
from nemo_advrm.rollouts.base import RolloutEngine
from nemo_advrm.rollouts.types import Prompt, Rollouts


def sample(engine: RolloutEngine, model: MegatronModel, prompts: list[Prompt], per_prompt: int, seed: int) -> Rollouts:
    """Samples ``per_prompt`` responses to every prompt and returns all of them on every rank.

    Responses to one prompt are adjacent. Every data-parallel rank samples its share, and the shares are gathered.
    """
    rt = runtime.current()
    repeated = [prompt for prompt in prompts for _ in range(per_prompt)]
    numbers = uniforms(seed, len(repeated), engine.sampling.max_new_tokens)
    own = rt.dp_slice(len(repeated))
    part = engine.roll_out(model, repeated[own], numbers[own])
    return Rollouts.concatenated(rt.gather_data_parallel(part))
