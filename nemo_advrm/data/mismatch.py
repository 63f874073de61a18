"""Mismatched pairs: does a reward model read the prompt?

The rejected answer of such a pair is a good one, to another prompt. A reward model that looks at the answer alone is
right in half of them, however high its accuracy on ordinary pairs is: there both answers belong to the prompt.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from nemo_advrm.data.messages import prompt_key
from nemo_advrm.data.preference_rows import PreferencePair

# below this accuracy on mismatched pairs users are warned; chance is .5
LOW_MISMATCH_ACCURACY = 0.7


def mismatched_pairs(rows: Sequence[PreferencePair]) -> tuple[list[PreferencePair], str]:
    """(pairs, "") or ([], why there are none): the rows with the chosen answer of another prompt as rejected one.

    Rows are grouped by prompt. The rejected answer of a group's i-th row is the chosen one of the i-th row of the next
    group (cyclically, counted modulo its size), so every pair is made of two prompts; a group whose answer is equal to
    the row's own is passed over. The row keeps its prompt with the system turn, and so its template. Margin, weight and
    labels of the rows say nothing about these pairs and are left out. Rows of raw text have no prompt and are left out.
    """
    groups: dict[str, list[PreferencePair]] = {}
    for row in rows:
        if row.prompt:
            groups.setdefault(prompt_key(row.prompt), []).append(row)
    if not groups:
        return [], "the rows are raw texts without a prompt"
    if len(groups) < 2:
        return [], "all rows have the same prompt"
    order = list(groups.values())
    place = {key: number for number, key in enumerate(groups)}
    seen = dict.fromkeys(groups, 0)
    pairs = []
    for row in rows:
        if not row.prompt:
            continue
        key = prompt_key(row.prompt)
        number, seen[key] = seen[key], seen[key] + 1
        for step in range(1, len(order)):
            group = order[(place[key] + step) % len(order)]
            other = group[number % len(group)]
            if other.chosen != row.chosen:
                pairs.append(
                    replace(
                        row,
                        rejected=other.chosen,
                        rejected_ended=other.chosen_ended,
                        margin=None,
                        weight=1.0,
                        chosen_labels=None,
                        rejected_labels=None,
                    )
                )
                break
    return (pairs, "") if pairs else ([], "all chosen answers are equal")


def mismatch_line(accuracy: float | None, pairs: int, reason: str) -> str:
    """What is printed of the accuracy on `pairs` mismatched pairs, with a warning where it is low."""
    if accuracy is None:
        return f"mismatched prompts: not measured: {reason}"
    line = f"mismatched prompts: accuracy {accuracy:.3f}  ({pairs} pairs; .5 is chance)"
    if accuracy < LOW_MISMATCH_ACCURACY:
        line += "\nwarning: the reward model hardly reads the prompt: it likes a good answer under any of them"
    return line
