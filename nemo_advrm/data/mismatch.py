"""Builds mismatched pairs, which test whether a reward model reads the prompt.

The rejected answer of a mismatched pair is a good answer to another prompt. A reward model that ignores the prompt is
right on half of these pairs, however high its accuracy on ordinary pairs: there both answers belong to the prompt.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from nemo_advrm.data.messages import prompt_key
from nemo_advrm.data.preference_rows import PreferencePair

# An accuracy on mismatched pairs below this prints a warning; chance is 0.5.
LOW_MISMATCH_ACCURACY = 0.7


def mismatched_pairs(rows: Sequence[PreferencePair]) -> tuple[list[PreferencePair], str]:
    """Replace the rejected answer of each row by the chosen answer to another prompt.

    Rows are grouped by prompt. The rejected answer of the i-th row of a group is the chosen answer of the i-th row
    (modulo the group's size) of the next group; a group whose answer equals the row's own is skipped. The row keeps its
    prompt with the system turn, and so its template. Margin, weight and labels do not apply to these pairs and are
    reset. Rows of raw text have no prompt and are skipped.

    Returns:
        (pairs, ""), or ([], reason) when there are none.
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
    """Return the line that reports the accuracy on `pairs` mismatched pairs, with a warning when it is low."""
    if accuracy is None:
        return f"mismatched prompts: not measured: {reason}"
    line = f"mismatched prompts: accuracy {accuracy:.3f}  ({pairs} pairs; .5 is chance)"
    if accuracy < LOW_MISMATCH_ACCURACY:
        line += "\nwarning: the reward model hardly reads the prompt: it prefers a good answer whatever the prompt"
    return line
