"""The server follows the rule of data files: content that it does not read is refused by name, never dropped."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import BaseModel, ValidationError

from nemo_advrm.serve.schemas import OpenRLHFRequest, PoolingRequest, ScoreRequest

TURN = {"role": "user", "content": "Hi"}


def chat(**more: Any) -> dict:
    return {"samples": [{"messages": [{**TURN, **more}], "response": "a"}]}


@pytest.mark.parametrize("key", ["tool_calls", "reasoning_content", "name"])
def test_content_in_a_message_is_refused_by_name(key: str) -> None:
    assert ScoreRequest.model_validate(chat())
    with pytest.raises(ValidationError, match=key):
        ScoreRequest.model_validate(chat(**{key: "text"}))


@pytest.mark.parametrize(
    ("form", "body"),
    [(OpenRLHFRequest, {"query": ["a"], "prompts": ["p"]}), (PoolingRequest, {"input": "a", "user": "someone"})],
)
@pytest.mark.parametrize("key", ["system", "instruction", "messages", "tools", "documents"])
def test_content_beside_the_text_of_other_clients_is_refused(form: type[BaseModel], body: dict, key: str) -> None:
    assert form.model_validate({**body, "encoding_format": "float", "request_id": "7", key: None})
    with pytest.raises(ValidationError, match=f"`{key}` holds content"):
        form.model_validate({**body, key: ["text"]})
