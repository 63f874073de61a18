"""Reward sources behind HTTP: the server of this package, and KServe v2 servers such as NeMo-Aligner's."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any
from urllib.parse import parse_qs, quote, urlsplit

import torch
from torch import Tensor

from nemo_advrm.config.moved import old_names
from nemo_advrm.config.schema import RemoteConfig
from nemo_advrm.data.messages import Message
from nemo_advrm.data.scores import as_scores
from nemo_advrm.data.tokenizers import Tokenizer, build_tokenizer
from nemo_advrm.engine.replica import once_per_replica
from nemo_advrm.errors import RewardSourceError
from nemo_advrm.http_client import ReplicatedServer, bearer_token
from nemo_advrm.rewards.base import RewardSource
from nemo_advrm.rewards.token_sequences import token_sequences, written_out
from nemo_advrm.rollouts.types import Rollouts


def connect(name: str, kind: str, addresses: Sequence[str], options: RemoteConfig) -> RewardSource:
    """Connects to servers of the kind ``http`` or ``triton``; all ranks call, one per replica sends requests.

    Raises RewardSourceError that names the source when no address has a ready server.
    """
    source = ServerReward(name, addresses, options) if kind == "http" else TritonReward(name, addresses, options)
    once_per_replica(name, source.wait_until_ready)
    return source


class _Remote:
    """Base class: sends rows in requests of bounded size, several at a time, with one deadline for all."""

    def __init__(self, name: str, addresses: Sequence[str], options: RemoteConfig) -> None:
        self.name = name
        self.options = options
        self.server = ReplicatedServer(f"reward source {name}", addresses, options, bearer_token(options.token_file))

    def score(self, rollouts: Rollouts) -> Tensor:
        return once_per_replica(self.name, lambda: self.ask(self._rows(rollouts)))

    def _rows(self, rollouts: Rollouts) -> list[Any]:
        raise NotImplementedError

    def _request(self, rows: list[Any], deadline: float) -> Any:
        raise NotImplementedError

    def ask(self, rows: list[Any]) -> Tensor:
        """Returns the scores of rows in the form of the server, [N] fp32."""
        deadline = time.monotonic() + self.options.deadline_seconds
        size = self.options.rows_per_request
        parts = [rows[i : i + size] for i in range(0, len(rows), size)]
        with ThreadPoolExecutor(max(1, min(len(parts), self.options.connections))) as pool:
            answers = list(pool.map(lambda part: as_scores(self.name, self._request(part, deadline), len(part)), parts))
        return torch.cat(answers) if answers else torch.zeros(0)

    def _ready(self, path: str) -> None:
        # a deadline of its own: a wrong address fails early, and a server that is loading its model is waited for
        deadline = time.monotonic() + self.options.connect_seconds
        self.server.call("GET", path, deadline=deadline, key="connect_seconds")


class ServerReward(_Remote):
    """Scores by a server of ``nemo-advrm serve``. Sends messages; tokens only for rows that came as tokens."""

    def __init__(self, name: str, addresses: Sequence[str], options: RemoteConfig) -> None:
        super().__init__(name, addresses, options)
        self.fingerprint = ""
        self.takes_prompt_lengths = False  # servers of earlier versions refuse the field

    def wait_until_ready(self) -> Tensor:
        self._ready("/health/ready")
        info = self.server.call("GET", "/v1/info")
        if not isinstance(info, dict) or "tokenizer" not in info:
            raise RewardSourceError(f"reward source {self.name}: the server is not one of nemo-advrm serve")
        self.fingerprint = str(info["tokenizer"] or "")
        self.takes_prompt_lengths = bool(info.get("prompt_lengths"))
        return torch.zeros(0)

    def _rows(self, rollouts: Rollouts) -> list[dict[str, Any]]:
        if rollouts.rendered:
            return [{"text": text} for text in rollouts.responses]
        if rollouts.tokens_only:
            if rollouts.fingerprint != self.fingerprint:
                raise RewardSourceError(f"reward source {self.name}: the server takes no tokens of this tokenizer")
            parts = zip(rollouts.prompt_tokens, rollouts.response_tokens, strict=True)
            if not self.takes_prompt_lengths:
                return [{"tokens": p + r} for p, r in parts]
            return [{"tokens": p + r, "prompt_length": len(p) if r else 0} for p, r in parts]
        # with the server's own tokenizer the rollouts fit, but their text may encode to a few more tokens
        same = {"truncate_prompt": True} if self.fingerprint and rollouts.fingerprint == self.fingerprint else {}
        return [
            {"messages": list(prompt), "response": response, "ended": ended, **same}
            for prompt, response, ended in zip(rollouts.prompts, rollouts.responses, rollouts.ended, strict=True)
        ]

    def _request(self, rows: list[Any], deadline: float) -> Any:
        answer = self.server.call("POST", "/v1/score", {"samples": rows}, deadline)
        return answer["scores"] if isinstance(answer, dict) and "scores" in answer else answer


class TritonReward(_Remote):
    """A reward model behind KServe v2, as NeMo-Aligner serves it: ``sentences`` or ``tokens`` in, ``rewards`` out.

    Without ``?tokenizer=`` in the address the text is sent: the messages and the response concatenated, as in
    NeMo-Aligner's data files.
    """

    def __init__(self, name: str, addresses: Sequence[str], options: RemoteConfig) -> None:
        urls = [urlsplit(address.removeprefix("triton+")) for address in addresses]
        super().__init__(name, [f"{url.scheme}://{url.netloc}" for url in urls], options)
        models, queries = {url.path.strip("/") for url in urls}, {url.query for url in urls}
        if len(models) > 1 or len(queries) > 1:
            raise RewardSourceError(f"reward source {name}: its addresses name different models")
        self.model = quote(models.pop(), safe="")
        named = parse_qs(queries.pop()).get("tokenizer")
        self.tokenizer: Tokenizer | None = build_tokenizer(named[0]) if named else None

    def wait_until_ready(self) -> Tensor:
        self._ready(f"/v2/models/{self.model}/ready")
        return torch.zeros(0)

    def _rows(self, rollouts: Rollouts) -> list[Any]:
        if self.tokenizer is not None:
            return token_sequences(rollouts, self.tokenizer)
        return written_out(rollouts).responses

    def _request(self, rows: list[Any], deadline: float) -> Any:
        body = {"inputs": _text_inputs(rows) if self.tokenizer is None else _token_inputs(rows, self.tokenizer.pad_id)}
        answer = self.server.call("POST", f"/v2/models/{self.model}/infer", body, deadline)
        outputs = answer.get("outputs") if isinstance(answer, dict) else None
        for output in outputs if isinstance(outputs, list) else []:
            if isinstance(output, dict) and output.get("name") == "rewards":
                return _column(output.get("data"))
        raise RewardSourceError(f"reward source {self.name}: the answer has no output rewards")


def _column(data: Any) -> Any:
    """Flattens an output [N, 1] to N values: KServe allows both the flat and the nested form."""
    while isinstance(data, list) and data and all(isinstance(row, list) and len(row) == 1 for row in data):
        data = [row[0] for row in data]
    return data


def _text_inputs(texts: list[str]) -> list[dict[str, Any]]:
    return [{"name": "sentences", "shape": [len(texts), 1], "datatype": "BYTES", "data": texts}]


def _token_inputs(rows: list[list[int]], pad_id: int) -> list[dict[str, Any]]:
    width = max(map(len, rows))
    padded = [row + [pad_id] * (width - len(row)) for row in rows]
    lengths = [len(row) for row in rows]
    return [
        {"name": "tokens", "shape": [len(rows), width], "datatype": "INT64", "data": padded},
        {"name": "sequence_lengths", "shape": [len(rows), 1], "datatype": "INT64", "data": lengths},
    ]


def trl_reward(url: str, options: RemoteConfig | None = None) -> Callable[..., list[float]]:
    """Returns a reward function for TRL's trainers (``reward_funcs=``) that queries a server of ``nemo-advrm serve``.

    The function takes TRL's ``prompts`` and ``completions``, texts or lists of chat messages, and returns one float per
    completion.
    """
    source = ServerReward(url, url.split("|"), options or RemoteConfig())

    def reward(prompts: list[Any], completions: list[Any], **_: Any) -> list[float]:
        rows = [
            {"messages": _as_messages(prompt), "response": _as_response(completion)}
            for prompt, completion in zip(prompts, completions, strict=True)
        ]
        return source.ask(rows).tolist()

    reward.__name__ = "nemo_advrm_reward"
    return reward


def text_reward(url: str, options: RemoteConfig | None = None) -> Callable[[list[str]], list[float]]:
    """Returns a function that scores whole conversations by a server of ``nemo-advrm serve``.

    Each conversation is one text, rendered by a chat template that the reward model's tokenizer can parse.
    """
    source = ServerReward(url, url.split("|"), options or RemoteConfig())

    def reward(texts: list[str]) -> list[float]:
        return source.ask([{"text": text} for text in texts]).tolist()

    return reward


def _as_messages(prompt: Any) -> list[Message]:
    if isinstance(prompt, str):
        return [Message(role="user", content=prompt)]
    return [Message(role=m["role"], content=m["content"]) for m in prompt]


def _as_response(completion: Any) -> str:
    return completion if isinstance(completion, str) else "".join(m["content"] for m in completion)


__getattr__ = old_names(__name__)
