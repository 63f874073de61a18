"""Pairs whose rejected answer belongs to another prompt."""

from __future__ import annotations

from nemo_advrm.data.mismatch import mismatched_pairs
from nemo_advrm.data.preference_rows import PreferencePair


def row(prompt: str, chosen: str, **more: object) -> PreferencePair:
    messages = ({"role": "user", "content": prompt},) if prompt else ()
    return PreferencePair(messages, chosen, f"bad {chosen}", **more)  # type: ignore[arg-type]


def texts(rows: list[PreferencePair]) -> list[tuple[str, str, str]]:
    pairs, reason = mismatched_pairs(rows)
    assert not reason
    return [(pair.prompt[0]["content"], pair.chosen, pair.rejected) for pair in pairs]


def test_the_rejected_answer_is_the_chosen_one_of_the_next_prompt() -> None:
    rows = [row("a", "A1"), row("b", "B1"), row("a", "A2"), row("c", "C1")]
    assert texts(rows) == [("a", "A1", "B1"), ("b", "B1", "C1"), ("a", "A2", "B1"), ("c", "C1", "A1")]


def test_rows_of_one_prompt_are_never_each_other_s_rejected_answer() -> None:
    rows = [row("a", f"A{i}") for i in range(5)] + [row("b", "B1")]
    assert all(rejected == "B1" for prompt, _, rejected in texts(rows) if prompt == "a")
    assert [rejected for prompt, _, rejected in texts(rows) if prompt == "b"] == ["A0"]


def test_an_equal_answer_to_another_prompt_is_passed_over() -> None:
    rows = [row("a", "same"), row("b", "same"), row("c", "C1")]
    assert texts(rows) == [("a", "same", "C1"), ("b", "same", "C1"), ("c", "C1", "same")]


def test_margins_weights_and_labels_of_the_rows_are_left_out_and_ends_are_kept() -> None:
    rows = [row("a", "A1", margin=3.0, weight=2.0, chosen_labels=(1.0,)), row("b", "B1", chosen_ended=False)]
    (first, second), _ = mismatched_pairs(rows)
    assert (first.margin, first.weight, first.chosen_labels) == (None, 1.0, None)
    assert (first.chosen_ended, first.rejected_ended) == (True, False)
    assert (second.chosen_ended, second.rejected_ended) == (False, True)


def test_one_prompt_no_prompt_and_equal_answers_give_a_reason() -> None:
    assert mismatched_pairs([row("a", "A1"), row("a", "A2")]) == ([], "all rows have the same prompt")
    assert mismatched_pairs([row("", "text 1"), row("", "text 2")]) == ([], "the rows are raw texts without a prompt")
    assert mismatched_pairs([row("a", "same"), row("b", "same")]) == ([], "all chosen answers are equal")
