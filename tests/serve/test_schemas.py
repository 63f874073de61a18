"""The server follows the rule of data files: content that it does not read is refused by name, never dropped."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import BaseModel, ValidationError

from nemo_advrm.serve.schemas import OpenRLHFRequest, PoolingRequest, ScoreRequest, SlimeRequest

TURN = {"role": "user", "content": "Hi"}


def chat(**more: Any) -> dict:
    return {"samples": [{"messages": [{**TURN, **more}], "response": "a"}]}


@pytest.mark.parametrize(
    ("key", "value"),
    [("truncate_prompt_tokens", value) for value in (16, -1, 0, False, "16")]
    + [(key, True) for key in ("activation", "use_activation", "softmax", "normalize")],
)
def test_what_would_change_the_score_in_other_servers_is_refused_by_name(key: str, value: Any) -> None:
    assert PoolingRequest.model_validate({"input": "a", key: None})
    with pytest.raises(ValidationError) as caught:
        PoolingRequest.model_validate({"input": "a", key: value})
    assert caught.value.errors()[0]["loc"][0] == key


@pytest.mark.parametrize("key", ["tool_calls", "reasoning_content", "name"])
def test_content_in_a_message_is_refused_by_name(key: str) -> None:
    assert ScoreRequest.model_validate(chat())
    with pytest.raises(ValidationError, match=key):
        ScoreRequest.model_validate(chat(**{key: "text"}))


@pytest.mark.parametrize(
    ("form", "body"),
    [
        (OpenRLHFRequest, {"query": ["a"], "prompts": ["p"]}),
        (PoolingRequest, {"input": "a", "user": "someone"}),
        (SlimeRequest, {"prompt": "a", "response": "b", "label": {"answer": "c"}}),
    ],
)
@pytest.mark.parametrize("key", ["system", "instruction", "messages", "tools", "documents"])
def test_content_beside_the_text_of_other_clients_is_refused(form: type[BaseModel], body: dict, key: str) -> None:
    assert form.model_validate({**body, "encoding_format": "float", "request_id": "7", key: None})
    with pytest.raises(ValidationError, match=f"`{key}` holds content"):
        form.model_validate({**body, key: ["text"]})
