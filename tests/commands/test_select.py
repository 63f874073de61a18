"""What selection takes from a recorded attack, and what it counts as dropped: truncated responses and broken text."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from nemo_advrm.attacks.pair_selection import select_round
from nemo_advrm.config import load_config
from nemo_advrm.data.encoding import encode_pairs
from nemo_advrm.data.jsonl import write_jsonl_atomic
from nemo_advrm.data.pair_store import PairStore
from nemo_advrm.data.tokenizers import ByteTokenizer
from nemo_advrm.errors import DataError

TOKENIZER = ByteTokenizer()


def _sft(prompt_id: int, response: str, scores: list[float], **more: Any) -> dict[str, Any]:
    messages = [{"role": "user", "content": f"p{prompt_id}"}]
    return {"prompt_id": prompt_id, "messages": messages, "response": response, "scores": scores, **more}


def _found(response: str, prompt_id: int = 0, z: float = 5.0, **more: Any) -> dict[str, Any]:
    return {
        "direction": 1, "policy": "direction_1_policy_1", "step": 3, "prompt_id": prompt_id, "response": response,
        "scores": [9.0, 0.0], "z": [5.0, -5.0], "disagreement_z": z, "gold": None, **more,
    }  # fmt: skip


# prompt 0: the best SFT answer was cut off; prompt 1: both were; prompt 2: the best holds a broken character
REFERENCE = [
    _sft(0, "cut off but best", [3.0, 3.0], ended=False),
    _sft(0, "good", [1.0, 1.0], ended=True),
    _sft(0, "bad", [0.0, 0.5], ended=True),
    _sft(1, "one", [1.0, 2.0], ended=False),
    _sft(1, "two", [2.0, 1.0], ended=False),
    _sft(1, "three", [0.0, 1.0], ended=False),
    _sft(2, "best \ufffd", [4.0, 4.0]),
    _sft(2, "plain", [1.0, 3.0]),
    _sft(2, "poor", [0.0, 0.0]),
]


def _select(tmp_path: Path, samples: list[dict[str, Any]], *settings: str) -> tuple[list[Any], dict[str, Any]]:
    write_jsonl_atomic(tmp_path / "reference.jsonl", REFERENCE)
    write_jsonl_atomic(tmp_path / "attack" / "samples.jsonl", samples)
    counts = select_round(load_config(["model=tiny", *settings]), tmp_path, 0, 0)
    del counts["directions"]
    assert sum(counts.values()) == len(samples), "every sample is selected or dropped for one reason"
    return PairStore(tmp_path / "pairs.jsonl").load(), {k: v for k, v in counts.items() if v}


@pytest.mark.parametrize("chosen", ["best", "random"])
def test_both_sides_of_a_pair_have_ended_and_what_is_dropped_is_counted(tmp_path: Path, chosen: str) -> None:
    samples = [
        _found("hack", ended=True),
        _found("endless", ended=False),
        _found("no answer ended to this prompt", 1, ended=True),
        _found("dull", z=0.0, ended=False),
    ]
    pairs, counts = _select(tmp_path, samples, f"selection.chosen={chosen}")
    (pair,) = pairs
    assert pair.rejected == "hack" and pair.chosen in ({"good"} if chosen == "best" else {"good", "bad"})
    assert (pair.chosen_ended, pair.rejected_ended) == (True, True)
    assert counts == {"selected": 1, "unended": 1, "no_usable_sft": 1, "not_qualified": 1}


def test_an_unended_response_is_rejected_and_trained_as_it_was_scored_where_that_is_allowed(tmp_path: Path) -> None:
    pairs, counts = _select(tmp_path, [_found("endless", ended=False)], "selection.require_ended=false")
    assert counts == {"selected": 1}
    assert (pairs[0].chosen, pairs[0].chosen_ended, pairs[0].rejected_ended) == ("good", True, False)
    ((encoded,), _) = encode_pairs(PairStore(tmp_path / "pairs.jsonl").to_preferences(), TOKENIZER, 64)
    assert encoded.chosen[-1] == TOKENIZER.eos_id
    assert encoded.rejected[encoded.prompt_length :] == TOKENIZER.encode("endless")


def test_what_is_no_text_is_no_pair_on_either_side(tmp_path: Path) -> None:
    broken = TOKENIZER.decode([7 + 0xE2, 7 + 0x82])  # the first two bytes of a character of three
    samples = [_found(f"cut {broken}"), _found("half \ud83d", z=4.0), _found("hack", 2, z=3.0)]
    pairs, counts = _select(tmp_path, samples)
    assert [(pair.chosen, pair.rejected) for pair in pairs] == [("plain", "hack")]
    assert counts == {"selected": 1, "not_text": 2}


def test_the_best_sft_response_is_not_that_of_the_member_with_the_largest_scale(tmp_path: Path) -> None:
    # s is 1.94 and 184, so z of "liked" is 1.34 and -.05, that of "spurned" the opposite; their raw means are 1.5 and 5
    reference = [
        _sft(0, "liked", [3.0, 0.0]), _sft(0, "spurned", [0.0, 10.0]),
        _sft(1, "low", [0.0, 0.0]), _sft(1, "high", [1.0, 300.0]),
    ]  # fmt: skip
    write_jsonl_atomic(tmp_path / "reference.jsonl", reference)
    write_jsonl_atomic(tmp_path / "attack" / "samples.jsonl", [_found("hack")])
    select_round(load_config(["model=tiny"]), tmp_path, 0, 0)
    assert [pair.chosen for pair in PairStore(tmp_path / "pairs.jsonl").load()] == ["liked"]


@pytest.mark.parametrize(
    ("row", "words"),
    [
        (_found("hack", 3), "prompt_id=3, reference.jsonl has 3 prompts"),
        (_found("hack", -1), "not a row of an attack .prompt_id=-1: "),
        ({**_found("hack"), "scores": [9.0, 0.0, 1.0]}, "scores=.*, reference.jsonl has 2 members"),
        ({**_found("hack"), "z": [9.0]}, "z=.*, reference.jsonl has 2 members"),
    ],
)
def test_samples_of_another_reference_are_refused(tmp_path: Path, row: dict[str, Any], words: str) -> None:
    with pytest.raises(DataError, match=f"samples.jsonl:2: {words}"):
        _select(tmp_path, [_found("fine"), row])


def test_text_that_the_policys_tokenizer_does_not_give_back_is_no_pair(tmp_path: Path) -> None:
    reference = [_sft(0, "birds sing .", [0.0, 1.0]), _sft(0, "birds rest .", [1.0, 0.5])]
    write_jsonl_atomic(tmp_path / "reference.jsonl", reference)
    samples = [_found("this river", z=4.0), _found("this  river", z=5.0), _found("this stranger", z=6.0)]
    write_jsonl_atomic(tmp_path / "attack" / "samples.jsonl", samples)
    counts = select_round(load_config(["model=tiny", "model.tokenizer=synthetic"]), tmp_path, 0, 0)
    assert (counts["selected"], counts["not_text"]) == (1, 2)
    assert [pair.rejected for pair in PairStore(tmp_path / "pairs.jsonl").load()] == ["this river"]


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("direction", "1"),
        ("direction", 3),
        ("direction", True),
        ("prompt_id", 99),
        ("prompt_id", -1),
        ("step", None),
        ("policy", 1),
        ("response", None),
        ("scores", None),
        ("scores", [1.0]),
        ("scores", [1.0, "2"]),
        ("z", [None, 1.0]),
        ("disagreement_z", None),
        ("gold", "high"),
        ("gold", 1.0),  # the first row has none
    ],
)
def test_a_sample_of_another_type_is_named(tmp_path: Path, key: str, value: Any) -> None:
    wanted = rf"samples\.jsonl:2: .*{key}[.0-9]*=.*: restore "
    with pytest.raises(DataError, match=wanted):
        _select(tmp_path, [_found("a b"), {**_found("b a"), key: value}])
