"""A judge that is a Python function: the longer, the better."""

from __future__ import annotations

from nemo_advrm.data.messages import Message


def by_length(prompts: list[tuple[Message, ...]], responses: list[str], ended: list[bool]) -> list[float]:
    return [float(len(response)) for response in responses]
