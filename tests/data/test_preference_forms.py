"""Every published form of preferences gives the pairs that its rule says, with hand-computed margins and labels."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from nemo_advrm.config.schema import Config
from nemo_advrm.config.schema_data import PREFERENCE_FORMATS
from nemo_advrm.data.preference_forms import FORMATS
from nemo_advrm.data.preference_rows import PreferencePair
from nemo_advrm.data.preferences import load_preferences
from nemo_advrm.data.prompts import load_prompts, split_train_validation
from nemo_advrm.data.sft_rows import load_sft
from nemo_advrm.data.tokenizers import ByteTokenizer
from nemo_advrm.errors import DataError
from nemo_advrm.training.sft_training import encode_responses

USER = {"role": "user", "content": "Hi"}


def says(text: str) -> list[dict]:
    return [{"role": "assistant", "content": text}]


def write(path: Path, *rows: object) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def ultrafeedback(text: str, score: float | None, fine: float | None = None) -> dict:
    return {
        "model": "a-model",
        "principle": "honesty",
        "custom_system_prompt": "Be honest.",
        "response": text,
        "critique": "Well written.",
        "annotations": {"helpfulness": {"Rating": "4", "Rationale": "It helps."}},
        "overall_score": score,
        "fine-grained_score": fine,
    }


# form, row, (chosen, rejected, margin) of each pair
FORMS = [
    (
        "best_of_n",  # RewardBench 2
        {"id": "1", "prompt": "Hi", "chosen": ["a"], "rejected": ["b", "c"], "num_correct": 1, "models": ["m"] * 3},
        [("a", "b", None), ("a", "c", None)],
    ),
    (
        "best_of_n",
        {"chosen": [[USER, *says("a")], [USER, *says("b")]], "rejected": [[USER, *says("c")]]},
        [("a", "c", None), ("b", "c", None)],
    ),
    ("best_of_n", {"prompt": "Hi", "chosen": "a", "rejected": ["b", "a"]}, [("a", "b", None)]),
    (
        "ranked",  # NeMo-RL
        {
            "context": [USER],
            "completions": [
                {"rank": 1, "completion": says("b")},
                {"rank": 0, "completion": says("a")},
                {"rank": 2, "completion": says("c")},
            ],
        },
        [("a", "b", None), ("b", "c", None), ("a", "c", None)],
    ),
    (
        "ranked",  # Nectar
        {
            "prompt": "\n\nHuman: Hi\n\nAssistant: ",
            "answers": [{"answer": "a", "model": "m", "rank": 1.0}, {"answer": "b", "model": "n", "rank": 2.0}],
            "turns": 1,
            "good_natured": True,
        },
        [("a", "b", None)],
    ),
    ("ranked", {"prompt": "Hi", "responses": ["a", "b"], "ranks": [2, 1]}, [("b", "a", None)]),
    (
        "rated_list",  # UltraFeedback
        {
            "source": "web",
            "instruction": "Hi",
            "models": ["m", "n", "o"],
            "completions": [ultrafeedback("a", 3.0), ultrafeedback("b", 7.5), ultrafeedback("c", 3.0)],
            "correct_answers": ["None"],
            "incorrect_answers": ["None"],
        },
        [("b", "a", 4.5), ("b", "c", 4.5)],
    ),
    (
        "rated_list",
        {"instruction": "Hi", "completions": [ultrafeedback("a", None, 2.5), ultrafeedback("b", None, 4.0)]},
        [("b", "a", 1.5)],
    ),
    ("rated_list", {"prompt": "Hi", "generations": ["a", "b"], "ratings": [5, 2]}, [("a", "b", 3.0)]),
    (
        "two_responses",  # HelpSteer3
        {
            "domain": "general",
            "language": "english",
            "context": [USER],
            "response1": "a",
            "response2": "b",
            "overall_preference": -2,
            "individual_preference": [{"score": -2, "reasoning": "a is better", "feedback1": "", "feedback2": ""}],
        },
        [("a", "b", 2.0)],
    ),
    (
        "two_responses",  # HelpSteer2-Preference
        {"prompt": "Hi", "response_1": "a", "response_2": "b", "preference_strength": 3},
        [("b", "a", 3.0)],
    ),
]


@pytest.mark.parametrize(("form", "row", "pairs"), FORMS)
def test_every_form_makes_its_pairs(tmp_path: Path, form: str, row: dict, pairs: list) -> None:
    path = write(tmp_path / "a.jsonl", row)
    for format in ("auto", form):
        found = load_preferences(path, format=format).rows
        assert [(pair.chosen, pair.rejected, pair.margin) for pair in found] == pairs
        assert all(pair.prompt == (USER,) for pair in found) and {pair.source for pair in found} == {f"{path}:1"}
    assert load_prompts(path).rows == [(USER,)]
    assert load_sft(path).rows[0][:2] == ((USER,), pairs[0][0])


def helpsteer(prompt: str, response: str, *ratings: int) -> dict:
    names = ("helpfulness", "correctness", "coherence", "complexity", "verbosity")
    return {"prompt": prompt, "response": response, **dict(zip(names, ratings, strict=True))}


def test_rated_answers_are_compared_over_all_rows_of_their_prompt(tmp_path: Path) -> None:
    path = write(
        tmp_path / "a.jsonl",
        helpsteer("Hi", "a", 1, 2, 3, 1, 0),
        helpsteer("Bye", "x", 4, 4, 4, 2, 2),
        helpsteer("Hi", "b", 4, 3, 4, 2, 1),
        helpsteer("Alone", "y", 4, 4, 4, 2, 2),
        helpsteer("Hi", "c", 1, 4, 4, 4, 4),
        helpsteer("Bye", "z", 2, 0, 1, 2, 2),
    )
    report = load_preferences(path)
    assert [(row.chosen, row.rejected, row.margin) for row in report.rows] == [
        ("b", "a", 3.0),
        ("b", "c", 3.0),
        ("x", "z", 2.0),
    ]
    assert report.rows[0].chosen_labels == (4, 3, 4, 2, 1) and report.rows[0].rejected_labels == (1, 2, 3, 1, 0)
    assert report.rows[0].source == f"{path}:3"
    assert report.summary() == f"{path}: 3 rows; 1 ties made no pair; 1 prompts with one answer made no pair"
    assert len(load_sft(path).rows) == 6 and len(load_prompts(path).rows) == 3


def test_pairs_keep_the_place_of_their_row_or_of_the_first_answer_to_their_prompt(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    pair = {"prompt": "p", "chosen": "good", "rejected": "bad"}
    rated = [{"prompt": "q", "response": f"answer {i}", "score": i} for i in range(2)]
    rows = [{**pair, "prompt": "1"}, {**pair, "prompt": "2"}, rated[0], {**pair, "prompt": "3"}, rated[1], pair]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    kept: list[str] = []

    def keep(pairs: Iterator[PreferencePair]) -> list[PreferencePair]:
        found = [next(pairs)]
        kept.extend(row.prompt[0]["content"] for row in found)
        return [*found, *pairs]

    for options in ({}, {"keep": keep}):
        found = load_preferences(path, **options).rows
        assert [row.prompt[0]["content"] for row in found] == ["1", "2", "q", "3", "p"]
    assert kept == ["1"]


def test_rated_answers_of_prompts_that_differ_in_a_dropped_column_are_not_compared(tmp_path: Path) -> None:
    tools = ("search", "search", "draw")
    rows = [{"prompt": "Hi", "response": f"a{i}", "score": i, "tools": [tool]} for i, tool in enumerate(tools)]
    report = load_preferences(write(tmp_path / "a.jsonl", *rows), ignore_columns=["tools"])
    assert [(row.chosen, row.rejected) for row in report.rows] == [("a1", "a0")]
    assert "1 prompts with one answer made no pair" in report.summary()


def test_a_preference_of_zero_and_equal_ratings_are_ties(tmp_path: Path) -> None:
    tie = {"context": [USER], "response1": "a", "response2": "b", "overall_preference": 0}
    path = write(tmp_path / "a.jsonl", tie, {**tie, "overall_preference": 1})
    report = load_preferences(path)
    assert [(row.chosen, row.margin) for row in report.rows] == [("b", 1.0)]
    assert report.skipped == {} and "1 ties made no pair" in report.summary()
    with pytest.raises(DataError, match=r"a\.jsonl: none of the 1 rows makes a pair \(1 ties made no pair\)"):
        load_preferences(write(tmp_path / "a.jsonl", tie))


BAD = [
    ({"prompt": "Hi", "completions": [{"completion": "a", "rank": 1}, {"completion": "b"}]}, "completions[1].rank"),
    ({"prompt": "Hi", "completions": [{"completion": "a", "rank": 1}, {"rank": 2}]}, "completions[1]` holds no answer"),
    ({"prompt": "Hi", "responses": ["a", "b"], "scores": [1]}, "`scores` has 1 numbers for 2 answers in `responses`"),
    ({"prompt": "Hi", "responses": ["a", "b"], "scores": [1, "x"]}, "`scores[1]` is a string"),
    ({"completions": [{"completion": "a", "rank": 1}, {"completion": "b", "rank": 2}]}, "`prompt` is missing"),
    ({"prompt": "Hi", "chosen": [], "rejected": ["b"]}, "`chosen` is empty"),
    ({"prompt": "Hi", "chosen": {"text": "a"}, "rejected": ["b"]}, "`chosen` is an object"),
    ({"prompt": "Hi", "chosen": ["a"], "rejected": 5}, "`rejected` is a number"),
    ({"prompt": "Hi", "completions": ["a", {"completion": "b", "rank": 1}]}, "`completions[0].rank` is missing"),
    ({"prompt": "Hi", "chosen": ["a"], "rejected": [""]}, "`rejected[0]` is empty"),
    ({"chosen": [[USER, *says("a")]], "rejected": [[{**USER, "content": "Bye"}, *says("b")]]}, "differ in turn 1"),
    ({"prompt": "Hi", "response": "a", "helpfulness": "high"}, "known forms"),
    ({"context": [USER], "response1": "a", "response2": "b", "overall_preference": "first"}, "`overall_preference`"),
    (
        {"prompt": "Hi", "completions": [{"completion": "a", "rank": 1, "tool_calls": ["x"]}] * 2},
        "`completions[0].tool_calls` holds content",
    ),
]


@pytest.mark.parametrize(("row", "words"), BAD)
def test_a_bad_row_of_these_forms_is_named(tmp_path: Path, row: dict, words: str) -> None:
    path = write(tmp_path / "a.jsonl", {"prompt": "Hi", "chosen": "a", "rejected": "b"}, row)
    with pytest.raises(DataError) as error:
        load_preferences(path)
    assert str(error.value).startswith(f"{path}:2: ") and words in str(error.value)
    assert len(load_preferences(path, on_bad_row="skip").rows) == 1


def test_all_pairs_of_a_prompt_are_on_one_side_of_the_split(tmp_path: Path) -> None:
    rows = [{"prompt": f"question {i}", "chosen": ["a"], "rejected": ["b", "c", "d"]} for i in range(20)]
    train, validation = split_train_validation(load_preferences(write(tmp_path / "a.jsonl", *rows)).rows, 0.2, 0)
    assert len(train) + len(validation) == 60 and len(validation) == 12
    assert not {row.prompt[0]["content"] for row in train} & {row.prompt[0]["content"] for row in validation}


SFT = [
    {"messages": [USER, *says("a")]},
    {"messages": [USER, *says("a")], "prompt": "Hi", "prompt_id": "1"},
    {"prompt": "Hi", "completion": "a"},
    {"prompt": [USER], "completion": says("a")},
    {"prompt": "Hi", "response": "a"},
    {"instruction": "Hi", "input": "", "output": "a"},
    {"question": "Hi", "answer": "a"},
    {"chosen": [USER, *says("a")], "rejected": [USER, *says("b")]},
]


@pytest.mark.parametrize("row", SFT)
def test_every_form_of_sft_rows(tmp_path: Path, row: dict) -> None:
    path = write(tmp_path / "a.jsonl", row)
    assert load_sft(path).rows == [((USER,), "a", f"{path}:1", True)]


def test_the_end_of_a_cut_off_answer_is_not_learned(tmp_path: Path) -> None:
    row = {"prompt": "Hi", "chosen": "good", "rejected": "bad"}
    cut, whole = load_sft(write(tmp_path / "a.jsonl", {**row, "chosen_ended": False}, row)).rows
    tokenizer = ByteTokenizer()
    first, second = encode_responses(Config(), tokenizer, [cut, whole])
    assert second.tokens[-1] == tokenizer.eos_id and first.tokens == second.tokens[:-1]


def test_earlier_answers_of_an_sft_conversation_stay_in_its_prompt(tmp_path: Path) -> None:
    turns = [USER, *says("a"), USER, *says("b")]
    assert load_sft(write(tmp_path / "a.jsonl", {"messages": turns})).rows[0][:2] == (tuple(turns[:3]), "b")


BAD_SFT = [
    ({"messages": [USER]}, "`messages` ends with a user turn"),
    ({"messages": says("a")}, "`messages` holds an answer without a prompt"),
    ({"instruction": "Summarise", "input": "a text", "output": "a"}, "`input` holds content"),
    ({"prompt": "Hi", "completion": "a", "response": "b"}, "holds content"),
    ({"prompt": "Hi", "completion": " "}, "none of `messages`"),
    ({"response": "a"}, "`prompt` is missing"),
    ({"prompt": "Hi", "tools": ["x"], "completion": "a"}, "`tools` holds content"),
]


@pytest.mark.parametrize(("row", "words"), BAD_SFT)
def test_a_bad_sft_row_is_named(tmp_path: Path, row: dict, words: str) -> None:
    path = write(tmp_path / "a.jsonl", SFT[0], row)
    with pytest.raises(DataError) as error:
        load_sft(path)
    assert str(error.value).startswith(f"{path}:2: ") and words in str(error.value)
    assert load_sft(path, on_bad_row="skip").skipped.keys()


def test_the_schema_offers_the_forms_that_exist() -> None:
    assert FORMATS == PREFERENCE_FORMATS


@pytest.mark.parametrize("format", ["two_responses", "ranked", "rated_list", "rated", "best_of_n"])
@pytest.mark.parametrize("load", [load_preferences, load_sft])
def test_a_row_of_another_form_than_the_chosen_one_is_a_bad_row(tmp_path: Path, format: str, load: Any) -> None:
    path = write(tmp_path / "a.jsonl", {"prompt": "Hi", "completions": []})
    with pytest.raises(DataError, match=r"a\.jsonl:1: .*(missing|none of|empty)"):
        load(path, format=format)
