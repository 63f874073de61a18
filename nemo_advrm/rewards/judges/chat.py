"""A language model behind an OpenAI-compatible endpoint: asks questions, reads verdicts, counts what they cost."""

from __future__ import annotations

import dataclasses
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

from nemo_advrm.answer_cache import AnswerCache, digest
from nemo_advrm.config.schema import JudgeConfig
from nemo_advrm.endpoints import endpoint_key, key_hint
from nemo_advrm.engine.replica import in_threads, turn_seconds
from nemo_advrm.errors import RewardSourceError, one_line
from nemo_advrm.http_client import FILTERED, TOO_LONG, NoJSON, ReplicatedServer, RequestRefused
from nemo_advrm.rewards.judges.counts import Counts, record
from nemo_advrm.rewards.judges.questions import is_refusal

T = TypeVar("T")
ANSWERED, REFUSED, UNREADABLE = "answered", "refused", "unreadable"
# answers that are no chat completions are asked for again this often: proxies and overloaded servers send such
_GARBLED_TRIES = 3
_LONGEST_ANSWER = 1 << 16  # characters


@dataclass(frozen=True)
class Verdict(Generic[T]):
    """The answer to one question.

    Attributes:
        value: what was read of it; None without a verdict.
        reason: answered, refused, unreadable or too_long.
        text: the judge's own words, for messages.
    """

    value: T | None
    reason: str
    text: str


class ChatJudge:
    """Asks one model; threads send ``judge.connections`` requests at once.

    Args:
        name: of the reward source, for messages.
        location: ``URL#MODEL``; the URL is the base address that OpenAI's clients take, such as http://HOST:PORT/v1.
        directory: where ``usage.jsonl`` goes, and the answers when ``judge.cache`` is empty.
        timeout_minutes: what other processes wait for this one, ``trainer.timeout_minutes``.

    Raises:
        ConfigError: the key has impossible characters, or the cache cannot be used.
    """

    def __init__(self, name: str, location: str, options: JudgeConfig, directory: Path, timeout_minutes: float) -> None:
        self.name = name
        self.options = options
        self.directory = directory
        self.timeout_minutes = timeout_minutes
        self.url, _, self.model = location.partition("#")
        self.url = self.url.rstrip("/")
        self.counts = Counts()
        self.cache = AnswerCache(Path(options.cache) if options.cache else directory / "answers.jsonl")
        self.server = ReplicatedServer(
            f"reward source {name}", [self.url], options, endpoint_key(options.key_variable), section="judge"
        )
        self.clock = time.monotonic
        self._verdicts: dict[str, Verdict[Any]] = {}  # by the digest of the question
        self._lock = threading.Lock()

    def connect(self) -> None:
        """Wait until the endpoint answers, up to ``judge.connect_seconds``.

        Its list of models is asked for, but not read: not every endpoint has one, and some serve more than they list.

        Raises RewardSourceError for an endpoint that does not answer, or that does not accept the key.
        """
        deadline = time.monotonic() + self.options.connect_seconds
        try:
            self.server.call("GET", "/models", deadline=deadline, key="connect_seconds")
        except NoJSON:
            pass
        except RequestRefused as error:
            if error.status in (401, 403):
                raise self._explained(error) from None

    def ask(
        self, questions: Sequence[str], read: Callable[[str, bool], T | None], reminder: str
    ) -> list[Verdict[T]] | None:
        """Asks each question and returns the verdicts in their order; a question is asked and counted once.

        Where other processes wait and there are more questions than can be asked meanwhile, it returns None, and
        another call goes on with the others.

        Args:
            read: reads an answer (its text, whether it was cut off); None when it has no verdict. The judge is then
                reminded of the form by ``reminder``, until it was asked ``judge.tries`` times.

        Raises RewardSourceError when the endpoint fails, if only for one question; the cache keeps earlier answers.
        """
        before = dataclasses.replace(self.counts)
        self.cache.refresh()
        keys = [digest(question) for question in questions]
        new = {key: question for key, question in zip(keys, questions, strict=True) if key not in self._verdicts}
        try:
            verdicts = self._in_threads(list(new.values()), read, reminder)
            self._verdicts |= {key: verdict for key, verdict in zip(new, verdicts, strict=True) if verdict is not None}
        finally:
            record(self.directory, f"{self.url}#{self.model}", self.counts.since(before))
        return [self._verdicts[key] for key in keys] if self._verdicts.keys() >= set(keys) else None

    def cost_line(self) -> str:
        """What the judge cost so far, for a command to print."""
        damaged = f"; {self.cache.damaged} damaged lines of {self.cache.path} left out" if self.cache.damaged else ""
        return f"judge {self.model}: {self.counts.line()}{damaged}"

    def _in_threads(
        self, questions: list[str], read: Callable[[str, bool], T | None], reminder: str
    ) -> list[Verdict[T] | None]:
        stop = self.clock() + turn_seconds(self.timeout_minutes, self.options.deadline_seconds)

        def work(question: str) -> Verdict[T]:
            return self._verdict(question, read, reminder)

        return in_threads(work, questions, self.options.connections, stop, self.clock)

    def _verdict(self, question: str, read: Callable[[str, bool], T | None], reminder: str) -> Verdict[T]:
        messages = [{"role": "user", "content": _encodable(question)}]
        deadline = time.monotonic() + self.options.deadline_seconds
        for _ in range(self.options.tries):
            answer = self._answer(messages, deadline)
            text = answer["text"]
            value = read(text, answer["cut"]) if answer["outcome"] == ANSWERED else None
            if value is not None or answer["outcome"] != ANSWERED:
                break
            said = {"role": "assistant", "content": _encodable(text) or "-"}
            messages = [*messages, said, {"role": "user", "content": reminder}]
        reason = answer["outcome"]
        if value is None and reason == ANSWERED:
            reason = REFUSED if is_refusal(text) else UNREADABLE
        with self._lock:
            self.counts.questions += 1
            if reason != ANSWERED:
                setattr(self.counts, reason, getattr(self.counts, reason) + 1)
        return Verdict(value, reason, text)

    def _answer(self, messages: list[dict[str, str]], deadline: float) -> dict[str, Any]:
        """The answer to a conversation, from the cache or the endpoint: {"outcome", "text", "cut"}."""
        body = {
            "model": self.model,
            "messages": messages,
            "temperature": self.options.temperature,
            "max_tokens": self.options.max_tokens,
            **self.options.body,
        }
        body = {key: value for key, value in body.items() if value is not None}
        # with the address: servers give different models the same name
        key = digest([self.url, body])
        known = self.cache.get(key)
        if known is not None and {"outcome", "text", "cut"} <= known.keys():
            with self._lock:
                self.counts.cached += 1
            return known
        answer = self._requested(body, deadline)
        self.cache.put(key, answer)
        return answer

    def _requested(self, body: dict[str, Any], deadline: float) -> dict[str, Any]:
        for left in reversed(range(_GARBLED_TRIES)):
            with self._lock:
                if self.options.max_requests and self.counts.requests >= self.options.max_requests:
                    raise RewardSourceError(
                        f"reward source {self.name}: judge.max_requests={self.options.max_requests} were sent; the "
                        "answers are kept, so that the same command with more continues"
                    )
                self.counts.requests += 1
            try:
                return self._read_completion(self.server.call("POST", "/chat/completions", body, deadline))
            except RequestRefused as error:
                if error.concerns:
                    outcome = REFUSED if error.concerns == FILTERED else TOO_LONG
                    return {"outcome": outcome, "text": error.content, "cut": False}
                raise self._explained(error) from None
            except NoJSON:
                if not left:
                    raise
            time.sleep(min(0.2 * (_GARBLED_TRIES - left), max(0.0, deadline - time.monotonic())))
        raise AssertionError("the last try returns or raises")

    def _read_completion(self, completion: Any) -> dict[str, Any]:
        """Raises NoJSON, which is asked again, for what is no chat completion."""
        try:
            choice = completion["choices"][0]
            message = choice["message"]
            content, refusal = message.get("content"), message.get("refusal")
            if isinstance(content, list):  # parts
                content = "".join(part["text"] for part in content if part.get("type") == "text")
            if not isinstance(content or "", str) or not isinstance(refusal or "", str):
                raise TypeError
        except (TypeError, KeyError, IndexError, AttributeError):
            raise NoJSON(
                f"reward source {self.name}: {self.url} sent no chat completion: {one_line(completion, 200)}"
            ) from None
        finish = choice.get("finish_reason")
        self._count_tokens(completion.get("usage"))
        refused = bool(refusal) or finish == "content_filter"
        text = (refusal or content or "") if refused else (content or "")
        return {
            "outcome": REFUSED if refused else ANSWERED,
            "text": text[:_LONGEST_ANSWER],
            "cut": finish == "length" or len(text) > _LONGEST_ANSWER,
        }

    def _count_tokens(self, usage: Any) -> None:
        usage = usage if isinstance(usage, dict) else {}
        tokens = [usage.get("prompt_tokens"), usage.get("completion_tokens")]
        with self._lock:
            if all(type(number) is int and number >= 0 for number in tokens):
                self.counts.prompt_tokens += tokens[0]
                self.counts.completion_tokens += tokens[1]
            else:
                self.counts.without_usage += 1

    def _explained(self, error: RequestRefused) -> RewardSourceError:
        hint = ""
        if error.status in (401, 403):
            hint = key_hint(self.options.key_variable, "judge.key_variable")
        elif error.status == 404:
            hint = "; openai:URL#MODEL takes the base address (http://HOST:PORT/v1) and a model that it serves"
        elif error.status in (400, 422):
            hint = "; judge.body changes the fields of a request, as in judge.body={max_tokens: null}"
        return RewardSourceError(f"{error}{hint}")


def _encodable(text: str) -> str:
    """``text`` with ? for each lone surrogate: no request can hold one, and responses of policies may."""
    return text.encode("utf-8", "replace").decode()
