"""Reward models for evaluations: an answer's score is the number at its end."""

from __future__ import annotations

from typing import Any


def number(prompts: list[Any], responses: list[str], ended: list[bool]) -> list[float]:
    return [float(text.split()[-1]) for text in responses]


def opposite(prompts: list[Any], responses: list[str], ended: list[bool]) -> list[float]:
    return [-value for value in number(prompts, responses, ended)]


def length(prompts: list[Any], responses: list[str], ended: list[bool]) -> list[float]:
    return [float(len(text)) for text in responses]
