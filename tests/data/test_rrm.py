"""RRM's pairs: the table of the paper for three rows by hand, and what holds for any rows, seeds and shares."""

from __future__ import annotations

from collections import Counter

import pytest

from nemo_advrm.data.messages import Message
from nemo_advrm.data.preference_rows import PreferencePair
from nemo_advrm.data.rrm import PAIRS_PER_ROW, augmented_pairs
from nemo_advrm.errors import DataError


def row(name: str, **more: object) -> PreferencePair:
    """Row a has the prompt "a" and the answers a+ (chosen) and a-."""
    return PreferencePair((Message(role="user", content=name),), f"{name}+", f"{name}-", 2.0, 0.5, **more)  # type: ignore[arg-type]


def of(pairs: list[PreferencePair], prompt: str) -> list[PreferencePair]:
    return [pair for pair in pairs if pair.prompt[0]["content"] == prompt]


def test_three_rows_give_the_fourteen_pairs_of_the_paper_each() -> None:
    pairs = augmented_pairs([row("a"), row("b"), row("c")], seed=3, share=1.0)
    assert PAIRS_PER_ROW == 14 and len(pairs) == 42
    mine = of(pairs, "a")
    preferred = {(pair.chosen, pair.rejected) for pair in mine if not pair.tied}
    assert preferred == {(own, other) for own in ("a+", "a-") for other in ("b+", "b-", "c+", "c-")}
    ties = {frozenset((pair.chosen, pair.rejected)) for pair in mine if pair.tied}
    names = ["b+", "b-", "c+", "c-"]
    assert ties == {frozenset((one, two)) for one in names for two in names if one != two} and len(ties) == 6


def test_the_pairs_have_their_weight_their_source_and_no_margin() -> None:
    pairs = augmented_pairs([row("a", source="f:1", rejected_ended=False), row("b", source="f:2")] * 2, 0, 1.0, 3.0)
    assert {(pair.margin, pair.weight, pair.chosen_labels) for pair in pairs} == {(None, 3.0, None)}
    assert {pair.source.partition(" ")[0] for pair in of(pairs, "a")} == {"f:1"}
    ended = {
        text: end
        for pair in pairs
        for text, end in ((pair.chosen, pair.chosen_ended), (pair.rejected, pair.rejected_ended))
    }
    assert ended == {"a+": True, "a-": False, "b+": True, "b-": True}


def test_a_share_is_drawn_by_the_seed_alone_from_all_kinds_alike() -> None:
    rows = [row(f"p{i}") for i in range(200)]
    pairs, again, other = (augmented_pairs(rows, seed, 0.5) for seed in (1, 1, 2))
    assert pairs == again != other
    assert len(pairs) == 1400
    kinds = Counter(pair.tied for pair in pairs)
    assert kinds[False] / 1400 == pytest.approx(8 / 14, abs=0.04)


def test_responses_come_from_other_prompts_although_most_rows_share_one() -> None:
    rows = [row("a")] * 12 + [row("b"), row("c")]
    for pair in augmented_pairs(rows, 0, 1.0):
        own = pair.prompt[0]["content"]
        assert pair.rejected[0] != own
        assert pair.chosen != pair.rejected
        assert (pair.chosen[0] == own) is not pair.tied


@pytest.mark.parametrize(
    ("rows", "reason"),
    [
        ([row("a"), row("a")], "all rows have the same prompt"),
        ([PreferencePair((), "x", "y")], "raw texts without a prompt"),
        ([row("a"), row("b")], "made no pair"),  # j and k cannot both be other rows than a
    ],
)
def test_rows_that_make_no_pair_are_refused(rows: list[PreferencePair], reason: str) -> None:
    with pytest.raises(DataError, match=f"augmentation.method=rrm .*{reason}"):
        augmented_pairs(rows, 0, 1.0)
