"""The interface of a rollout engine, which samples a policy's responses to prompts."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

from torch import Tensor

from nemo_advrm.config.schema import Config
from nemo_advrm.data.tokenizers import Tokenizer
from nemo_advrm.engine.builders import build_policy
from nemo_advrm.engine.generation import Generation
from nemo_advrm.engine.model import MegatronModel
from nemo_advrm.engine.sampling import Sampling
from nemo_advrm.errors import ConfigError
from nemo_advrm.registry import ROLLOUT_ENGINES
from nemo_advrm.rollouts.language_model import LanguageModel
from nemo_advrm.rollouts.megatron_language_model import MegatronLanguageModel
from nemo_advrm.rollouts.types import Prompt, Rollouts

UNTRAINED = ("transformers", "openai")  # engines whose policies no command trains


def check_trainable(cfg: Config, what: str) -> None:
    """Raises ConfigError where ``rl.rollout_engine`` samples no policy that ``what`` could train."""
    engine = cfg.rl.rollout_engine
    if engine not in UNTRAINED or cfg.policy_server.policy:
        return
    cure = "convert the policy (nemo-advrm convert from=hf)"
    if engine == "openai":
        cure = "name a local copy of it, and the served one in policy_server.policy"
    raise ConfigError(
        f"{what} trains the policy; rl.rollout_engine={engine} cannot: {cure}, or choose an attack without RL "
        "(docs/attacks.md)"
    )


class RolloutEngine(ABC):
    """Samples responses with the current weights of a policy. ``rl.rollout_engine`` names the implementation.

    Args:
        cfg: configuration of the stage; ``cfg.rl`` holds the sampling parameters.
        tokenizer: of the policy.
    """

    def __init__(self, cfg: Config, tokenizer: Tokenizer) -> None:
        rl = cfg.rl
        self.cfg = cfg
        self.tokenizer = tokenizer
        self.sampling = Sampling(rl.max_new_tokens, (tokenizer.eos_id,), rl.temperature, rl.top_k, rl.top_p)

    @abstractmethod
    def generate(self, policy: MegatronModel, prompts: list[list[int]], uniforms_NT: Tensor) -> Generation:
        """Continues every prompt by at most ``self.sampling.max_new_tokens`` tokens.

        All ranks of a model replica call with the same prompts and must return the same result. Every replica calls,
        also one without prompts.

        Args:
            prompts: token ids; lengths may differ.
            uniforms_NT: [len(prompts), max_new_tokens] numbers in [0, 1) that determine the samples. An engine with its
                own random numbers may derive its seeds from them.
        """

    def open_policy(self, path: str) -> Any:
        """Loads a frozen policy for :meth:`generate`; all ranks call. ``path`` is as in ``pretrained_checkpoint``."""
        return build_policy(self.cfg, self.tokenizer, path, 0, trainable=False)

    def language_model(self, policy: Any) -> LanguageModel:
        """Returns what :meth:`open_policy` has loaded as a language model, for attacks that train nothing."""
        return MegatronLanguageModel("the SFT policy", policy, self.tokenizer, self.cfg.rl)

    def behaviour(self) -> Any | None:
        """Opens the policy that writes what a trained policy learns from; None: the trained one writes it itself."""
        return None

    def roll_out(self, policy: Any, prompts: list[Prompt], uniforms_NT: Tensor) -> Rollouts:
        """Samples one response to every entry of ``prompts``; a prompt may be listed several times."""
        generated = self.generate(policy, [prompt.tokens for prompt in prompts], uniforms_NT)
        return Rollouts(
            prompts=[prompt.messages for prompt in prompts],
            responses=[self.tokenizer.decode_response(tokens) for tokens in generated.responses],
            ended=generated.ended,
            prompt_tokens=[prompt.tokens for prompt in prompts],
            response_tokens=generated.responses,
            prompt_index=[prompt.index for prompt in prompts],
            fingerprint=self.tokenizer.fingerprint,
            log_probs=generated.log_probs,
        )


def rollout_engine(cfg: Config, tokenizer: Tokenizer) -> RolloutEngine:
    """Returns the engine named by ``rl.rollout_engine``. Raises ConfigError for an unknown name."""
    engine: RolloutEngine = ROLLOUT_ENGINES[cfg.rl.rollout_engine](cfg, tokenizer)
    return engine
