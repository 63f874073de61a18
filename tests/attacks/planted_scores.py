"""Reward functions for ``python:planted_scores:NAME``: what each likes is known."""

from __future__ import annotations

from nemo_advrm.data.messages import Message

Prompts = list[tuple[Message, ...]]


def _plain(text: str) -> float:
    return (sum(text.encode("utf-8", "replace")) % 11) / 5


def likes_e(prompts: Prompts, responses: list[str], ended: list[bool]) -> list[float]:
    """Every letter e is worth 100."""
    return [_plain(text) + 100 * text.count("e") for text in responses]


def plain(prompts: Prompts, responses: list[str], ended: list[bool]) -> list[float]:
    return [_plain(text) for text in responses]


def dislikes_e(prompts: Prompts, responses: list[str], ended: list[bool]) -> list[float]:
    """The truth about responses, as a judge sees it."""
    return [_plain(text) - text.count("e") for text in responses]
