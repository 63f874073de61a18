"""The interface of a rollout engine, which writes a policy's responses to prompts, and what it returns."""

from __future__ import annotations

from abc import ABC, abstractmethod

from torch import Tensor

from nemo_advrm.config.schema import Config
from nemo_advrm.data.tokenizers import Tokenizer
from nemo_advrm.engine.generation import Generation
from nemo_advrm.engine.model import MegatronModel
from nemo_advrm.engine.sampling import Sampling
from nemo_advrm.registry import ROLLOUT_ENGINES
from nemo_advrm.rollouts.types import Prompt, Rollouts


class RolloutEngine(ABC):
    """Writes responses with the current weights of a policy. ``rl.rollout_engine`` names the one that is used.

    Args:
        cfg: configuration of the stage; ``cfg.rl`` holds the sampling parameters.
        tokenizer: of the policy.
    """

    def __init__(self, cfg: Config, tokenizer: Tokenizer) -> None:
        rl = cfg.rl
        self.tokenizer = tokenizer
        self.sampling = Sampling(rl.max_new_tokens, (tokenizer.eos_id,), rl.temperature, rl.top_k, rl.top_p)

    @abstractmethod
    def generate(self, policy: MegatronModel, prompts: list[list[int]], uniforms_NT: Tensor) -> Generation:
        """Continue every prompt by at most ``self.sampling.max_new_tokens`` tokens.

        All ranks of a model replica call with the same prompts and must get the same result. Every replica calls, one
        without prompts too.

        Args:
            prompts: token ids; lengths may differ.
            uniforms_NT: [len(prompts), max_new_tokens] numbers in [0, 1) that decide the samples. An engine that
                samples by random numbers of its own may take its seeds from them.
        """

    def roll_out(self, policy: MegatronModel, prompts: list[Prompt], uniforms_NT: Tensor) -> Rollouts:
        """One response to every prompt of the list; a prompt that is listed several times gets as many."""
        generated = self.generate(policy, [prompt.tokens for prompt in prompts], uniforms_NT)
        return Rollouts(
            prompts=[prompt.messages for prompt in prompts],
            responses=[self.tokenizer.decode_response(tokens) for tokens in generated.responses],
            ended=generated.ended,
            prompt_tokens=[prompt.tokens for prompt in prompts],
            response_tokens=generated.responses,
            prompt_index=[prompt.index for prompt in prompts],
            fingerprint=self.tokenizer.fingerprint,
        )


def rollout_engine(cfg: Config, tokenizer: Tokenizer) -> RolloutEngine:
    """The engine that ``rl.rollout_engine`` names. Raises ConfigError for an unknown one."""
    engine: RolloutEngine = ROLLOUT_ENGINES[cfg.rl.rollout_engine](cfg, tokenizer)
    return engine
