"""Requests and answers of the JSON interfaces: our own, OpenRLHF's, and those of vLLM and SGLang that verl asks."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Discriminator, Field, Tag, model_validator

from nemo_advrm.data.columns import unread_content
from nemo_advrm.data.messages import Message
from nemo_advrm.serve.samples import Sample

Text = Annotated[str, Field(min_length=1)]
# a list ends at its first wrong entry: a million of them would be a million errors
Tokens = Annotated[list[Annotated[int, Field(ge=0, lt=2**31)]], Field(min_length=1, fail_fast=True)]


class Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)


class ChatMessage(Strict):
    role: Literal["system", "user", "assistant"]
    content: str


class ChatSample(Strict):
    """A response to chat messages; each member writes the finished conversation with its own chat template."""

    messages: list[ChatMessage] = Field(max_length=1024, fail_fast=True)
    response: str
    ended: bool = Field(True, description="false where a length limit cut the response off: it gets no end token")
    truncate_prompt: bool = Field(
        False, description="leave out the first tokens of a conversation that is too long; else it is refused"
    )

    def sample(self) -> Sample:
        messages = tuple(Message(role=m.role, content=m.content) for m in self.messages)
        return Sample("chat", messages, self.response, self.ended, truncate_prompt=self.truncate_prompt)


class TextSample(Strict):
    """A finished conversation as text, special tokens written out; what is missing of its end is added."""

    text: Text

    def sample(self) -> Sample:
        return Sample("text", response=self.text)


class TokenSample(Strict):
    """Token ids of the server's tokenizer (see `/v1/info`), scored as they are."""

    tokens: Tokens
    prompt_length: int = Field(
        0, ge=0, lt=2**31, description="tokens before the response, where they may not tell; hybrid rewards alone look"
    )

    def sample(self) -> Sample:
        return Sample("tokens", tokens=tuple(self.tokens), prompt_length=self.prompt_length)


def _form(sample: Any) -> str:
    """Which of the forms a sample is meant to have, so that an error is told of that one alone."""
    return next((form for form in ("text", "tokens") if isinstance(sample, dict) and form in sample), "messages")


AnySample = Annotated[
    Annotated[ChatSample, Tag("messages")] | Annotated[TextSample, Tag("text")] | Annotated[TokenSample, Tag("tokens")],
    Discriminator(_form),
]


class ScoreRequest(Strict):
    samples: list[AnySample] = Field(min_length=1, fail_fast=True)
    members: bool = Field(False, description="also answer the raw scores of the ensemble's members")


class ScoreAnswer(BaseModel):
    model: str
    scores: list[float] = Field(description="one reward per sample, higher is better")
    members: list[list[float]] | None = Field(None, description="[samples][members] raw scores, when asked for")


class Info(BaseModel):
    model: str
    reward: str = Field(description="how members become the reward")
    members: list[str]
    tokenizer: str | None = Field(description="fingerprint of the tokenizer whose tokens are taken, if any are")
    prompt_lengths: bool = Field(description="a sample of tokens may have a prompt_length")
    max_samples: int
    version: str


class Status(BaseModel):
    status: str


class ErrorAnswer(BaseModel):
    error: str


class Foreign(BaseModel):
    """A request of another project's clients: keys that we do not know are let go, but for those that hold content."""

    @model_validator(mode="before")
    @classmethod
    def _no_content_is_dropped(cls, data: Any) -> Any:
        name = unread_content(data, cls.model_fields)
        if name is not None:
            raise ValueError(f"`{name}` holds content that is not read here: write it into the text that is scored")
        return data


class OpenRLHFRequest(Foreign):
    """What OpenRLHF posts to `--remote_rm_url`: prompt and response together, special tokens written out."""

    query: list[Text] = Field(min_length=1, fail_fast=True)
    prompts: list[Any] | None = None
    labels: list[Any] | None = None


class OpenRLHFAnswer(BaseModel):
    rewards: list[float]
    scores: list[float]
    extra_logs: dict[str, list[float]] = {}


class PoolingRequest(Foreign):
    """What verl posts to vLLM's `/classify` and SGLang's `/v1/embeddings`. Scores are raw: no activation is applied."""

    input: (
        Text
        | Annotated[list[Text], Field(min_length=1, fail_fast=True)]
        | Tokens
        | Annotated[list[Tokens], Field(min_length=1, fail_fast=True)]
    )
    model: str | None = None
    user: str | None = None  # who asks, in these interfaces
    activation: Literal[False] | None = None
    use_activation: Literal[False] | None = None
    softmax: Literal[False] | None = None  # as older vLLM calls the activation
    normalize: Literal[False] | None = None
    truncate_prompt_tokens: None = Field(None, description="texts and tokens are scored whole")

    def samples(self) -> list[Sample]:
        if isinstance(self.input, str):
            return [Sample("text", response=self.input)]
        if isinstance(self.input[0], int):
            return [Sample("tokens", tokens=tuple(self.input))]  # type: ignore[arg-type]
        return [
            Sample("text", response=item) if isinstance(item, str) else Sample("tokens", tokens=tuple(item))  # type: ignore[arg-type]
            for item in self.input
        ]


class Usage(BaseModel):
    prompt_tokens: int
    total_tokens: int
    completion_tokens: int = 0


class Classification(BaseModel):
    index: int
    label: str = "LABEL_0"
    probs: list[float]
    num_classes: int = 1


class ClassifyAnswer(BaseModel):
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


class EmbeddingAnswer(BaseModel):
    object: Literal["list"] = "list"
    model: str
    data: list[Embedding]
    usage: Usage
