"""The rollout engine for policies that are served elsewhere, behind an OpenAI-compatible endpoint."""

from __future__ import annotations

import logging
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from torch import Tensor

from nemo_advrm.config.schema import Config
from nemo_advrm.data.tokenizers import Tokenizer
from nemo_advrm.endpoints import endpoint_key, parse_endpoint
from nemo_advrm.engine import runtime
from nemo_advrm.engine.collectives import run_on_first_rank
from nemo_advrm.engine.generation import Generation
from nemo_advrm.engine.microbatches import EncodedResponse
from nemo_advrm.engine.sampling import Sampling
from nemo_advrm.errors import ConfigError, DataError, RewardSourceError, one_line
from nemo_advrm.optional_deps import require_extra
from nemo_advrm.rollouts.base import RolloutEngine
from nemo_advrm.rollouts.language_model import LanguageModel

_log = logging.getLogger(__name__)

# responses of one deadline, for each connection
_REQUESTS_AT_ONCE = 2
_PLACE = "pretrained_checkpoint.restore_from_path"
_ALONE = (
    "an endpoint writes text and tells neither next tokens nor log-probabilities of ours: choose another attack or "
    "detector, or name a language model of its own (adversarial.lm=hf:DIR)"
)


class OpenAIEngine(RolloutEngine):
    """Samples a policy ``openai:URL#MODEL`` that stays as it is: SFT responses, and attacks that train nothing.

    ``model.tokenizer`` must be the served model's: prompts are sent as its tokens, rendered by its chat template here,
    so that the server sees what a policy of this package would see.
    """

    def open_policy(self, path: str) -> ServedLanguageModel:
        """See :meth:`RolloutEngine.open_policy`. Raises ConfigError unless ``path`` is ``openai:URL#MODEL``."""
        model = ServedLanguageModel(path, self.cfg, self.tokenizer)
        model.connect()
        return model

    def language_model(self, policy: Any) -> LanguageModel:
        assert isinstance(policy, ServedLanguageModel)
        return policy

    def generate(self, policy: Any, prompts: list[list[int]], uniforms_NT: Tensor) -> Generation:
        """See :meth:`RolloutEngine.generate`. Raises ConfigError for a policy that is trained."""
        if not isinstance(policy, ServedLanguageModel):
            raise ConfigError(
                "rl.rollout_engine=openai samples policies that are not trained: an attack by RL, rlhf and sft need "
                "rl.rollout_engine=megatron"
            )
        return policy.generate(prompts, self.sampling, uniforms_NT)


class ServedLanguageModel(LanguageModel):
    """See :class:`LanguageModel`. The first rank of each replica asks, and tells the others.

    The endpoint is asked for completions of tokens (``/completions``), one request a response. It has random numbers of
    its own, seeded by ours, so that samples are reproducible where it says that its seeds are. Answers come as text and
    are tokenized here; where they are other tokens than it sampled, the text is the same.
    """

    def __init__(self, path: str, cfg: Config, tokenizer: Tokenizer) -> None:
        require_extra("serve", "httpx", "tenacity")
        from nemo_advrm.http_client import ReplicatedServer

        self.name = path
        self.tokenizer = tokenizer
        self.context = cfg.model.encoder_seq_length
        self.options = cfg.policy_server
        address, self.model = served_model(path)
        key = endpoint_key(self.options.key_variable)
        self.server = ReplicatedServer(f"policy {path}", [address], self.options, key, section="policy_server")

    def connect(self) -> None:
        """Waits until the endpoint answers; all ranks call. Raises RewardSourceError when it does not, or refuses."""
        self._once(self._connect)

    def generate(self, prompts: list[list[int]], sampling: Sampling, uniforms_NT: Tensor) -> Generation:
        """See :class:`LanguageModel`. Raises RewardSourceError when the endpoint fails, if only for one response."""
        rows: list[list[int]] = []
        size = _REQUESTS_AT_ONCE * self.options.connections
        for start in range(0, len(prompts), size):  # each part has a deadline of its own, as other ranks wait for it
            part = slice(start, start + size)
            rows += self._once(self._generate, prompts[part], sampling, uniforms_NT[part])
        return Generation(rows, [bool(row) and row[-1] == self.tokenizer.eos_id for row in rows])

    def next_tokens(self, rows: list[list[int]], count: int) -> tuple[Tensor, Tensor]:
        raise ConfigError(f"{self.name}: {_ALONE}")

    def log_probs(self, rows: list[EncodedResponse]) -> Tensor:
        raise ConfigError(f"{self.name}: {_ALONE}")

    def _once(self, work: Any, *args: Any) -> Any:
        return run_on_first_rank(runtime.current().replica, work, *args) if runtime.is_running() else work(*args)

    def _connect(self) -> None:
        from nemo_advrm.http_client import NoJSON, RequestRefused

        deadline = time.monotonic() + self.options.connect_seconds
        try:
            self.server.call("GET", "/models", deadline=deadline, key="connect_seconds")
        except NoJSON:
            pass
        except RequestRefused as error:  # not every endpoint lists its models
            if error.status in (401, 403):
                raise RewardSourceError(
                    f"{error}; the key is read from the environment variable {self.options.key_variable} "
                    "(policy_server.key_variable)"
                ) from None

    def _generate(self, prompts: list[list[int]], sampling: Sampling, uniforms_NT: Tensor) -> list[list[int]]:
        deadline = time.monotonic() + self.options.deadline_seconds
        seeds = (uniforms_NT[:, 0].double() * 2**31).long().tolist() if len(prompts) else []

        def one(asked: tuple[list[int], int]) -> tuple[str, bool]:
            return self._completed(self._body(*asked, sampling), deadline)

        with ThreadPoolExecutor(max(1, min(len(prompts), self.options.connections))) as pool:
            answers = list(pool.map(one, zip(prompts, seeds, strict=True)))
        return [self._tokens(text, is_ended, sampling.max_new_tokens) for text, is_ended in answers]

    def _body(self, prompt: list[int], seed: int, sampling: Sampling) -> dict[str, Any]:
        body = {
            "model": self.model,
            "prompt": prompt,
            "max_tokens": sampling.max_new_tokens,
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            # not a field of OpenAI's own API, so it is sent only where it is asked for
            "top_k": sampling.top_k or None,
            "seed": seed,
            **self.options.body,
        }
        return {key: value for key, value in body.items() if value is not None}

    def _completed(self, body: dict[str, Any], deadline: float) -> tuple[str, bool]:
        """Returns the text of a completion, and whether the policy ended it."""
        completion = self.server.call("POST", "/completions", body, deadline)
        try:
            choice = completion["choices"][0]
            text, finish = choice["text"], choice["finish_reason"]
            if not isinstance(text, str):
                raise TypeError
        except (TypeError, KeyError, IndexError):
            raise RewardSourceError(f"{self.server.name}: sent no completion: {one_line(completion, 200)}") from None
        return text, finish == "stop"

    def _tokens(self, text: str, is_ended: bool, most: int) -> list[int]:
        """Returns the tokens of an answer, with the end token if it was ended within ``most``.

        A text that the tokenizer refuses, such as one that spells special tokens, is an empty answer: one of thousands
        must not end the run.
        """
        try:
            tokens = self.tokenizer.encode_response(text.encode("utf-8", "replace").decode())  # with an end token
        except DataError as error:
            _log.warning("%s: an answer counts as empty: %s", self.name, error)
            return []
        return (tokens if is_ended else tokens[:-1])[:most]


def served_model(policy: str) -> tuple[str, str]:
    """Returns the address and the model of ``openai:URL#MODEL``. Raises ConfigError for another policy."""
    if not policy.startswith("openai:"):
        raise ConfigError(f"{_PLACE}={policy}: rl.rollout_engine=openai samples openai:URL#MODEL")
    return parse_endpoint(policy.removeprefix("openai:"), policy, _PLACE, "policy_server.key_variable")
