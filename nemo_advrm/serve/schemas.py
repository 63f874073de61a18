"""Requests and responses of the JSON interfaces: our own, OpenRLHF's, slime's, and those of vLLM and SGLang."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Discriminator, Field, Tag, model_validator

from nemo_advrm.data.columns import unread_content
from nemo_advrm.data.messages import Message
from nemo_advrm.serve.samples import Sample

Text = Annotated[str, Field(min_length=1)]
# lists fail at their first wrong entry: a million wrong entries would be a million errors
Tokens = Annotated[list[Annotated[int, Field(ge=0, lt=2**31)]], Field(min_length=1, fail_fast=True)]


class Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)


class ChatMessage(Strict):
    role: Literal["system", "user", "assistant"]
    content: str


class ChatSample(Strict):
    """A response to chat messages; each member renders the conversation with its own chat template."""

    messages: list[ChatMessage] = Field(max_length=1024, fail_fast=True)
    response: str
    ended: bool = Field(True, description="false if a length limit cut the response off; it gets no end token")
    truncate_prompt: bool = Field(
        False, description="drop the first tokens of a conversation that is too long, instead of refusing it"
    )

    def sample(self) -> Sample:
        messages = tuple(Message(role=m.role, content=m.content) for m in self.messages)
        return Sample("chat", messages, self.response, self.ended, truncate_prompt=self.truncate_prompt)


class TextSample(Strict):
    """A conversation as text with its special tokens; a missing end is added."""

    text: Text

    def sample(self) -> Sample:
        return Sample("text", response=self.text)


class TokenSample(Strict):
    """Token ids of the server's tokenizer (see `/v1/info`), scored unchanged."""

    tokens: Tokens
    prompt_length: int = Field(
        0, ge=0, lt=2**31, description="tokens before the response, 0 if unknown; only hybrid rewards need it"
    )

    def sample(self) -> Sample:
        return Sample("tokens", tokens=tuple(self.tokens), prompt_length=self.prompt_length)


def _form_of(sample: Any) -> str:
    """The form that a sample probably has: its errors are reported for that form only."""
    return next((form for form in ("text", "tokens") if isinstance(sample, dict) and form in sample), "messages")


AnySample = Annotated[
    Annotated[ChatSample, Tag("messages")] | Annotated[TextSample, Tag("text")] | Annotated[TokenSample, Tag("tokens")],
    Discriminator(_form_of),
]


def first_error(errors: Sequence[Any]) -> str:
    """The first of Pydantic's errors in one line."""
    location = ".".join(str(part) for part in errors[0]["loc"])
    return f"{location}: {errors[0]['msg']}" if location else str(errors[0]["msg"])


class ScoreRequest(Strict):
    samples: list[AnySample] = Field(min_length=1, fail_fast=True)
    members: bool = Field(False, description="also return the raw scores of the ensemble's members")


class DetectorScores(BaseModel):
    z: list[float] = Field(description="per sample, in standard deviations of SFT responses; larger is less usual")
    beyond: list[bool] = Field(description="per sample: whether z is beyond the detector's threshold")


class ScoreResponse(BaseModel):
    model: str
    scores: list[float] = Field(description="one reward per sample, higher is better")
    members: list[list[float]] | None = Field(None, description="[samples][members] raw scores, if requested")
    detectors: dict[str, DetectorScores] | None = Field(
        None, description="what each detector of `detector.monitors` says, if the server has any"
    )


class Info(BaseModel):
    model: str
    reward: str = Field(description="how the members' scores are combined")
    members: list[str]
    tokenizer: str | None = Field(description="fingerprint of the tokenizer whose tokens are accepted, if any")
    prompt_lengths: bool = Field(description="samples of tokens may have a prompt_length")
    max_samples: int
    version: str


class Status(BaseModel):
    status: str


class ErrorResponse(BaseModel):
    error: str


class OtherClientRequest(BaseModel):
    """A request of another project's client. Unknown keys are ignored, unless they hold content to be scored."""

    @model_validator(mode="before")
    @classmethod
    def _refuse_unread_content(cls, data: Any) -> Any:
        name = unread_content(data, cls.model_fields)
        if name is not None:
            raise ValueError(f"`{name}` holds content that the server does not read: put it into the scored text")
        return data


class OpenRLHFRequest(OtherClientRequest):
    """What OpenRLHF posts to `--reward.remote_url`: texts of prompt and response with their special tokens."""

    query: list[Text] = Field(min_length=1, fail_fast=True)
    prompts: list[Any] | None = None
    labels: list[Any] | None = None


class OpenRLHFResponse(BaseModel):
    rewards: list[float]
    scores: list[float]
    extra_logs: dict[str, list[float]] = {}


class SlimeRequest(OtherClientRequest):
    """What slime posts to `--rm-url` for one sample (`remote_rm` in slime/rollout/rm_hub/__init__.py)."""

    prompt: Annotated[
        Annotated[Text, Tag("text")]
        | Annotated[list[ChatMessage], Field(max_length=1024, fail_fast=True), Tag("messages")],
        Discriminator(lambda prompt: "messages" if isinstance(prompt, list) else "text"),
    ] = Field(description="the text that the policy continued, or chat messages, if slime applies no chat template")
    response: str
    label: Any = Field(None, description="for rule-based rewards; not read")

    def sample(self) -> Sample:
        if isinstance(self.prompt, str):
            return Sample("text", response=self.prompt + self.response)
        messages = tuple(Message(role=m.role, content=m.content) for m in self.prompt)
        return Sample("chat", messages, self.response)


class PoolingRequest(OtherClientRequest):
    """What verl posts to vLLM's `/classify` and SGLang's `/v1/embeddings`. Scores are raw, without an activation."""

    input: (
        Text
        | Annotated[list[Text], Field(min_length=1, fail_fast=True)]
        | Tokens
        | Annotated[list[Tokens], Field(min_length=1, fail_fast=True)]
    )
    model: str | None = None
    user: str | None = None  # name of the caller
    activation: Literal[False] | None = None
    use_activation: Literal[False] | None = None
    softmax: Literal[False] | None = None  # the activation in older versions of vLLM
    normalize: Literal[False] | None = None
    truncate_prompt_tokens: None = Field(None, description="texts and tokens are not truncated")

    def samples(self) -> list[Sample]:
        one = isinstance(self.input, str) or isinstance(self.input[0], int)
        items: list[Any] = [self.input] if one else list(self.input)
        return [
            Sample("text", response=item) if isinstance(item, str) else Sample("tokens", tokens=tuple(item))
            for item in items
        ]


class Usage(BaseModel):
    prompt_tokens: int
    total_tokens: int
    completion_tokens: int = 0

    @classmethod
    def of(cls, samples: Sequence[Sample]) -> Usage:
        """An estimate: the size of texts in tokens is about a quarter of their characters."""
        tokens = sum(len(sample.tokens) or 1 + len(sample.response) // 4 for sample in samples)
        return cls(prompt_tokens=tokens, total_tokens=tokens)


class Classification(BaseModel):
    index: int
    label: str = "LABEL_0"
    probs: list[float]
    num_classes: int = 1


class ClassifyResponse(BaseModel):
    id: str
    object: Literal["list"] = "list"
    created: int
    model: str
    data: list[Classification]
    usage: Usage


class Embedding(BaseModel):
    object: Literal["embedding"] = "embedding"
    index: int
    embedding: list[float]


class EmbeddingResponse(BaseModel):
    object: Literal["list"] = "list"
    model: str
    data: list[Embedding]
    usage: Usage
