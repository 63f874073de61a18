"""The rollout engine for policies that are served elsewhere, behind an OpenAI-compatible endpoint."""

from __future__ import annotations

import logging
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from nemo_advrm.answer_cache import AnswerCache, digest
from nemo_advrm.config.schema import Config
from nemo_advrm.data.tokenizers import Tokenizer
from nemo_advrm.endpoints import endpoint_key, key_hint, parse_endpoint
from nemo_advrm.engine.generation import Generation
from nemo_advrm.engine.microbatches import EncodedResponse
from nemo_advrm.engine.replica import in_threads, once_per_replica, turn_seconds
from nemo_advrm.engine.sampling import Sampling
from nemo_advrm.errors import ConfigError, DataError, RewardSourceError, one_line
from nemo_advrm.optional_deps import require_extra
from nemo_advrm.rollouts.base import RolloutEngine
from nemo_advrm.rollouts.language_model import LanguageModel
from nemo_advrm.rollouts.megatron_engine import MegatronEngine
from nemo_advrm.rollouts.told_log_probs import of_our_tokens, told_by

if TYPE_CHECKING:
    from nemo_advrm.http_client import RequestRefused

_log = logging.getLogger(__name__)

_PLACE = "pretrained_checkpoint.restore_from_path"
_ALONE = (
    "an endpoint writes text and tells neither next tokens nor log-probabilities of ours: choose another attack or "
    "detector, or name a language model of its own (adversarial.lm=hf:DIR)"
)

# of so many prompts a filter may refuse every answer by chance
_FEW_PROMPTS = 4
_NOTHING: dict[str, Any] = {"text": "", "ended": False, "tokens": [], "log_probs": []}


class OpenAIEngine(RolloutEngine):
    """Samples a policy ``openai:URL#MODEL``: SFT responses, and attacks that train nothing.

    With ``policy_server.policy`` a policy of this package learns from what the served one writes
    (:meth:`behaviour`), and writes itself only where it is measured.

    ``model.tokenizer`` must be the served model's: prompts are sent as its tokens, rendered by its chat template here,
    so that the server sees what a policy of this package would see.
    """

    def open_policy(self, path: str) -> ServedLanguageModel:
        """See :meth:`RolloutEngine.open_policy`: the served policy, if ``path`` is the local copy of it too.

        Raises ConfigError unless it is ``openai:URL#MODEL``.
        """
        model = ServedLanguageModel(self.cfg.policy_server.policy or path, self.cfg, self.tokenizer)
        model.connect()
        return model

    def language_model(self, policy: Any) -> LanguageModel:
        assert isinstance(policy, ServedLanguageModel)
        return policy

    def behaviour(self) -> ServedLanguageModel | None:
        """See :meth:`RolloutEngine.behaviour`."""
        served = self.cfg.policy_server.policy
        return self.open_policy(served) if served else None

    def generate(self, policy: Any, prompts: list[list[int]], uniforms_NT: Tensor) -> Generation:
        """See :meth:`RolloutEngine.generate`. Raises ConfigError for a policy that is trained without a served one."""
        if isinstance(policy, ServedLanguageModel):
            return policy.generate(prompts, self.sampling, uniforms_NT)
        if not self.cfg.policy_server.policy:
            raise ConfigError(
                "rl.rollout_engine=openai samples policies that are not trained: an attack by RL and rlhf need "
                "policy_server.policy beside a local copy, or rl.rollout_engine=megatron"
            )
        return MegatronEngine(self.cfg, self.tokenizer).generate(policy, prompts, uniforms_NT)


class ServedLanguageModel(LanguageModel):
    """See :class:`LanguageModel`. The first rank of each replica asks, and tells the others.

    The endpoint is asked for completions of tokens (``/completions``), one request a response. It has random numbers of
    its own, seeded by ours, so that samples are reproducible where it says that its seeds are. Answers come as text and
    are tokenized here; where they are other tokens than it sampled, the text is the same.

    Answers are kept below ``run_dir/policy_server``, a file for each call of :meth:`generate`: when one request fails
    for good, the same command asks for the missing ones only. Refusals are not kept: another setting may lift them.
    """

    def __init__(self, path: str, cfg: Config, tokenizer: Tokenizer) -> None:
        require_extra("serve", "httpx", "tenacity")
        from nemo_advrm.http_client import ReplicatedServer

        self.name = path
        self.tokenizer = tokenizer
        self.context = cfg.model.encoder_seq_length
        self.options = cfg.policy_server
        self.timeout_minutes = cfg.trainer.timeout_minutes
        self.directory = Path(cfg.run_dir) / "policy_server"
        self.clock = time.monotonic
        self.address, self.model = served_model(path)
        key = endpoint_key(self.options.key_variable)
        self.server = ReplicatedServer(f"policy {path}", [self.address], self.options, key, section="policy_server")

    def connect(self) -> None:
        """Waits until the endpoint answers; all ranks call. Raises RewardSourceError when it does not, or refuses."""
        once_per_replica(self.name, self._connect, "policy")

    def generate(self, prompts: list[list[int]], sampling: Sampling, uniforms_NT: Tensor) -> Generation:
        """See :class:`LanguageModel`.

        Raises RewardSourceError when the endpoint fails, if only for one response, and when it refuses all of them.
        """
        seeds = (uniforms_NT[:, 0].double() * 2**31).long().tolist() if len(prompts) else []
        bodies = [self._body(prompt, seed, sampling) for prompt, seed in zip(prompts, seeds, strict=True)]
        refused: dict[str, str] = {}
        return once_per_replica(self.name, lambda: self._generated(bodies, sampling, refused), "policy")

    def next_tokens(self, rows: list[list[int]], count: int) -> tuple[Tensor, Tensor]:
        raise ConfigError(f"{self.name}: {_ALONE}")

    def log_probs(self, rows: list[EncodedResponse]) -> Tensor:
        raise ConfigError(f"{self.name}: {_ALONE}")

    def _connect(self) -> bool:
        from nemo_advrm.http_client import NoJSON, RequestRefused

        deadline = time.monotonic() + self.options.connect_seconds
        try:
            self.server.call("GET", "/models", deadline=deadline, key="connect_seconds")
        except NoJSON:
            pass
        except RequestRefused as error:  # not every endpoint lists its models
            if error.status in (401, 403):
                raise self._explained(error) from None
        return True

    def _generated(
        self, bodies: list[dict[str, Any]], sampling: Sampling, refused: dict[str, str]
    ) -> Generation | None:
        """Asks for every response that is not kept; None where other ranks wait and some are left for another turn.

        ``refused`` says of the requests that were refused in earlier turns why, and gets those of this one.
        """
        if not bodies:
            return Generation([], [], [])
        stop = self.clock() + turn_seconds(self.timeout_minutes, self.options.deadline_seconds)
        # a file for each call, so that memory holds the answers of one
        path = self.directory / f"{digest([self.address, bodies])[:16]}.jsonl"
        cache = AnswerCache(path, "run_dir")

        keys = [digest(body) for body in bodies]
        missing = {
            key: body for key, body in zip(keys, bodies, strict=True) if cache.get(key) is None and key not in refused
        }

        def ask(key: str) -> bool:
            answer = self._completed(missing[key])
            if isinstance(answer, str):
                refused[key] = answer
            else:
                cache.put(key, answer)
            return True

        try:
            in_threads(ask, list(missing), self.options.connections, stop, self.clock)
        except RewardSourceError as error:
            raise RewardSourceError(
                f"{error}; {len(cache)} of {len(bodies)} answers are kept in {path}: the same command asks for the "
                "others only"
            ) from None
        answers = [_NOTHING if key in refused else cache.get(key) for key in keys]
        found = [answer for answer in answers if answer is not None]
        if len(found) < len(bodies):
            return None
        if all(key in refused for key in keys):
            self._check_refusals(bodies, set(refused.values()))
        rows = [self._tokens(each["text"], each["ended"], sampling.max_new_tokens) for each in found]
        return Generation(
            rows,
            [bool(row) and row[-1] == self.tokenizer.eos_id for row in rows],
            [
                of_our_tokens((each["tokens"], each["log_probs"]), row, self.tokenizer)
                for each, row in zip(found, rows, strict=True)
            ],
        )

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
            "logprobs": 1 if self._tells_log_probs(sampling) else None,
            **self.options.body,
        }
        return {key: value for key, value in body.items() if value is not None}

    def _tells_log_probs(self, sampling: Sampling) -> bool:
        """Whether log-probabilities are asked for: servers tell those of temperature 1 and of all tokens by default."""
        if self.options.log_probs == "auto":
            return sampling.temperature == 1 and not sampling.top_k and sampling.top_p == 1
        return self.options.log_probs == "always"

    def _check_refusals(self, bodies: list[dict[str, Any]], reasons: set[str]) -> None:
        """Raises RewardSourceError, after all answers were refused, where they would be each time."""
        from nemo_advrm.http_client import TOO_LONG

        every = f"policy {self.name}: refused every one of {len(bodies)} answers"
        if TOO_LONG in reasons:
            raise RewardSourceError(
                f"{every}, and some as too long: a prompt and its response must fit into the context that it serves: "
                "lower rl.max_new_tokens (or max_tokens of policy_server.body), or shorten the prompts"
            )
        if len({tuple(body["prompt"]) for body in bodies}) > _FEW_PROMPTS:
            raise RewardSourceError(f"{every}, by its filter of content: choose another policy or other prompts")

    def _explained(self, error: RequestRefused, body: dict[str, Any] | None = None) -> RewardSourceError:
        hint = ""
        if error.status in (401, 403):
            hint = key_hint(self.options.key_variable, "policy_server.key_variable")
        elif error.status in (400, 422) and body is not None and "logprobs" in body:
            hint = "; policy_server.log_probs=never asks for none"
        return RewardSourceError(f"{error}{hint}")

    def _completed(self, body: dict[str, Any]) -> dict[str, Any] | str:
        """Returns a completion: its text, whether the policy ended it, its tokens and their log-probabilities.

        Of what the endpoint refuses to answer (a filter, a prompt that is too long for it) it returns why, see
        :class:`RequestRefused`. That is an empty answer: one of thousands must not end the run.
        """
        from nemo_advrm.http_client import RequestRefused

        deadline = time.monotonic() + self.options.deadline_seconds
        try:
            completion = self.server.call("POST", "/completions", body, deadline)
        except RequestRefused as error:
            if error.concerns:
                _log.warning("%s: an answer counts as empty: %s", self.name, one_line(error))
                return error.concerns
            raise self._explained(error, body) from None
        try:
            choice = completion["choices"][0]
            text, finish = choice["text"], choice["finish_reason"]
            if not isinstance(text, str):
                raise TypeError
        except (TypeError, KeyError, IndexError):
            raise RewardSourceError(f"{self.server.name}: sent no completion: {one_line(completion, 200)}") from None
        tokens, log_probs = told_by(choice)
        return {"text": text, "ended": finish == "stop", "tokens": tokens, "log_probs": log_probs}

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
