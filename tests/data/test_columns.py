"""Nothing that carries content is dropped unseen: it is read by a rule, or refused by name with file and line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from nemo_advrm.data.columns import holds_content
from nemo_advrm.data.messages import prompt_key
from nemo_advrm.data.pair_store import PairStore
from nemo_advrm.data.preferences import load_preferences
from nemo_advrm.data.prompts import load_prompts, split_train_validation
from nemo_advrm.data.sft_rows import load_sft
from nemo_advrm.errors import DataError

USER = {"role": "user", "content": "Hi"}
RHYME = {"role": "system", "content": "Rhyme."}
GOOD = {"prompt": "Hi", "chosen": "good", "rejected": "bad"}


def says(text: str, **more: object) -> dict:
    return {"role": "assistant", "content": text, **more}


def write(path: Path, *rows: object) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_names_of_content() -> None:
    names = (
        "system systemPrompt question instructions context chat_history input tools toolCalls functions documents "
        "thinking reasoning_content response1 images Persona previous_turns few_shot_demonstrations "
        "examples options choices hint facts rationale hypothesis ctx developer problem title"
    )
    for name in names.split():
        assert holds_content(name) and holds_content(name, message=True), name


def test_names_about_content() -> None:
    names = (
        "id prompt_id input_ids chosen_score score_chosen chosen_model num_turns response_length source margin "
        "provenance instruction_id_list is_prompt_safe total_completions language additional_metadata correct_answers"
    )
    for name in names.split():
        assert not holds_content(name), name


WHOLE = {"chosen": [USER, says("good")], "rejected": [USER, says("bad")]}
TALK = {"chosen": "\n\nHuman: Hi\n\nAssistant: good", "rejected": "\n\nHuman: Hi\n\nAssistant: bad"}


@pytest.mark.parametrize("row", [GOOD, {**GOOD, "prompt": [USER]}, WHOLE, TALK])
@pytest.mark.parametrize("name", ["system", "system_prompt", "system_message"])
@pytest.mark.parametrize("value", ["Rhyme.", [RHYME]])
def test_a_system_column_is_the_system_turn(tmp_path: Path, row: dict, name: str, value: object) -> None:
    path = write(tmp_path / "a.jsonl", {name: value, **row})
    (pair,) = load_preferences(path).rows
    assert (pair.prompt, pair.chosen, pair.rejected) == ((RHYME, USER), "good", "bad")
    assert load_prompts(path).rows == [(RHYME, USER)]
    assert load_sft(path).rows[0][:2] == ((RHYME, USER), "good")


def test_a_system_column_may_repeat_the_system_turn_but_not_contradict_it(tmp_path: Path) -> None:
    row = {"chosen": [RHYME, USER, says("good")], "rejected": [RHYME, USER, says("bad")]}
    (pair,) = load_preferences(write(tmp_path / "a.jsonl", {**row, "system": "Rhyme."})).rows
    assert pair.prompt == (RHYME, USER)
    for system, words in (("Be brief.", "differs from the system turn"), ([USER], "`system` holds a user turn")):
        with pytest.raises(DataError, match=rf"a\.jsonl:1: .*{words}"):
            load_preferences(write(tmp_path / "a.jsonl", {**row, "system": system}))


@pytest.mark.parametrize("name", ["question", "instruction", "query", "input", "context", "history"])
def test_the_only_column_with_a_prompt_is_the_prompt(tmp_path: Path, name: str) -> None:
    rows = ({name: value, "chosen": "good", "rejected": "bad", "prompt": None} for value in ("Hi", [USER]))
    path = write(tmp_path / "a.jsonl", *rows)
    assert [pair.prompt for pair in load_preferences(path).rows] == [(USER,), (USER,)]
    assert load_prompts(path).rows == [(USER,)]


UNREAD = [
    {**GOOD, "tools": [{"name": "search"}]},
    {**GOOD, "input": "a text to summarise"},
    {**GOOD, "context": "Paris is a city."},
    {**GOOD, "chosen_reasoning": "first I think"},
    {**GOOD, "messages": [{"role": "user", "content": "another"}]},
    {"chosen": "a whole text", "rejected": "another", "system": "Rhyme."},
    {**WHOLE, "documents": ["one", "two"]},
    {"text": "\n\nHuman: Hi\n\nAssistant: good", "tools": ["search"]},
]


@pytest.mark.parametrize("row", UNREAD)
def test_content_that_no_rule_reads_is_refused_by_name(tmp_path: Path, row: dict) -> None:
    name = next(key for key in row if key not in ("prompt", "chosen", "rejected", "text"))
    second = {**row, "text": f"{row['text']} not"} if "text" in row else row
    path = write(tmp_path / "a.jsonl", row, second)
    with pytest.raises(DataError, match=rf"a\.jsonl:1: `{name}` holds content .*data\.ignore_columns=\[{name}\]"):
        load_preferences(path)
    report = load_preferences(path, ignore_columns=[name])
    assert report.rows and name in report.summary().partition("not read: ")[2]


KEYS = {
    "tool_calls": [{"function": {"name": "search", "arguments": "{}"}}],
    "reasoning_content": "first I think",
    "name": "Bob",
    "function_call": {"name": "search"},
}


@pytest.mark.parametrize("key", KEYS)
def test_content_in_keys_of_messages_is_refused_everywhere(tmp_path: Path, key: str) -> None:
    turn = says("good", **{key: KEYS[key]})
    cases = (
        (load_preferences, {"chosen": [USER, turn], "rejected": [USER, says("bad")]}, "chosen[1]"),
        (load_prompts, {"messages": [USER, turn, USER]}, "messages[1]"),
        (load_sft, {"prompt": [{**USER, key: KEYS[key]}], "completion": "good"}, "prompt[0]"),
    )
    for load, row, place in cases:
        path = write(tmp_path / "a.jsonl", row)
        with pytest.raises(DataError) as error:
            load(path)  # type: ignore[operator]
        assert f"a.jsonl:1: `{place}.{key}` holds content" in str(error.value)
        assert key in load(path, ignore_columns=[key]).summary()  # type: ignore[operator]


def test_gaps_of_tables_numbers_and_other_columns_are_let_go_and_listed_once(tmp_path: Path) -> None:
    gaps = {"system": None, "tools": [], "context": "", "history": [{"content": None}], "input": float("nan")}
    turn = says("good", tool_calls=None, reasoning_content="", uuid="x")
    row = {"chosen": [USER, turn], "rejected": [USER, says("bad", uuid="y")], **gaps, "prompt_id": "1", "source": "web"}
    report = load_preferences(write(tmp_path / "a.jsonl", row, row))
    assert [pair.prompt for pair in report.rows] == [(USER,), (USER,)]
    notes = report.summary().partition("not read: ")[2].split(", ")
    assert {"prompt_id", "source", "chosen[].uuid", "rejected[].uuid"} <= set(notes) and len(set(notes)) == len(notes)


@pytest.mark.parametrize("row", [{**GOOD, "input": 5}, {"question": 5, "chosen": "a whole text", "rejected": "more"}])
def test_a_number_in_a_column_of_the_prompt_is_refused(tmp_path: Path, row: dict) -> None:
    name = "input" if "input" in row else "question"
    with pytest.raises(DataError, match=rf"a\.jsonl:1: `{name}` is a number, a text was expected"):
        load_preferences(write(tmp_path / "a.jsonl", row))
    gap = write(tmp_path / "b.jsonl", {**GOOD, "input": float("nan")})
    assert len(load_preferences(gap).rows) == 1


def test_columns_that_repeat_what_was_read_are_no_loss(tmp_path: Path) -> None:
    # the columns of binarized UltraFeedback, and those of rm-static
    row = {**WHOLE, "prompt": "Hi", "prompt_id": "f00d", "messages": WHOLE["chosen"], "score_chosen": 8.0}
    (pair,) = load_preferences(write(tmp_path / "a.jsonl", row)).rows
    assert (pair.prompt, pair.chosen, pair.rejected) == ((USER,), "good", "bad")
    (pair,) = load_preferences(write(tmp_path / "a.jsonl", {**GOOD, "response": "good", "question": "Hi"})).rows
    assert pair.prompt == (USER,)


def test_rows_that_differ_in_such_a_column_only_are_different(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", *({**GOOD, "system": f"Rhyme on {i}."} for i in range(20)))
    rows = load_preferences(path).rows
    assert len({prompt_key(row.prompt) for row in rows}) == len(load_prompts(path).rows) == 20
    train, validation = split_train_validation(rows, 0.5, 0)
    assert len(train) == len(validation) == 10
    # also where the column is left out knowingly
    path = write(tmp_path / "a.jsonl", *({"prompt": "Hi", "tools": [f"tool {i}"]} for i in (1, 2, 2)))
    assert len(load_prompts(path, ignore_columns=["tools"]).rows) == 2
    assert prompt_key([{**USER, "name": "A"}]) != prompt_key([{**USER, "name": "B"}])


def test_exported_turns_with_from_and_value(tmp_path: Path) -> None:
    turns = [{"from": "system", "value": "Rhyme."}, {"from": "human", "value": "Hi"}, {"from": "gpt", "value": "good"}]
    assert load_sft(write(tmp_path / "a.jsonl", {"conversations": turns})).rows[0][:2] == ((RHYME, USER), "good")


def test_an_exported_turn_of_a_wrong_type_is_a_bad_row(tmp_path: Path) -> None:
    wrong = {**GOOD, "prompt": [{"from": ["human"], "value": "Hi"}]}
    report = load_preferences(write(tmp_path / "a.jsonl", wrong, GOOD), on_bad_row="skip")
    assert report.skipped == {"wrong_type": 1}
    assert "`prompt[0].role` is a list, not a string" in report.examples["wrong_type"]


def test_a_pair_store_with_foreign_content_is_refused(tmp_path: Path) -> None:
    row = {**GOOD, "prompt": [USER], "provenance": {}, "system": "Rhyme."}
    with pytest.raises(DataError, match=r"pairs\.jsonl:1: `system` holds content"):
        PairStore(write(tmp_path / "pairs.jsonl", row)).load()


SYSTEM_ONLY = {"prompt": [RHYME], **WHOLE}
JOINED = [
    (SYSTEM_ONLY, [RHYME, USER]),
    ({"prompt": [RHYME, USER], **WHOLE}, [RHYME, USER]),
    ({"prompt": "Hi ", **WHOLE}, [USER]),
    ({"prompt": [USER], "chosen": [RHYME, USER, says("good")], "rejected": [RHYME, USER, says("bad")]}, [RHYME, USER]),
    ({"prompt": "\n\nHuman: Hi\n\nAssistant:", "system": "Rhyme.", **TALK}, [RHYME, USER]),
    ({"prompt": [USER, says("Yes?")], **WHOLE}, [USER, says("Yes?"), USER]),
    ({"prompt": "", **WHOLE}, [USER]),
]


@pytest.mark.parametrize(("row", "prompt"), JOINED)
def test_a_prompt_beside_whole_conversations_is_joined(tmp_path: Path, row: dict, prompt: list) -> None:
    path = write(tmp_path / "a.jsonl", row)
    (pair,) = load_preferences(path).rows
    assert (list(pair.prompt), pair.chosen, pair.rejected) == (prompt, "good", "bad")
    assert load_prompts(path).rows == [tuple(prompt)]


@pytest.mark.parametrize("row", [WHOLE, TALK, {"chosen": [[USER, says("good")]], "rejected": [[USER, says("bad")]]}])
@pytest.mark.parametrize("prompt", ["Something else", [RHYME, {**USER, "content": "Bye"}]])
def test_a_prompt_that_contradicts_the_conversations_is_an_error(tmp_path: Path, row: dict, prompt: object) -> None:
    path = write(tmp_path / "a.jsonl", {"prompt": prompt, **row}, row)
    with pytest.raises(DataError, match=r"a\.jsonl:1: `prompt` differs from the turns before the answer"):
        load_preferences(path)
    assert load_preferences(path, on_bad_row="skip").skipped == {"different_prompts": 1}
    assert len(load_preferences(path, ignore_columns=["prompt"]).rows) == 2


def test_answers_that_may_hold_the_prompt_already_are_refused(tmp_path: Path) -> None:
    start = "Tell me about the moon."
    path = write(tmp_path / "a.jsonl", {"prompt": start, "chosen": f"{start} It is old.", "rejected": f"{start} No."})
    with pytest.raises(DataError, match="both begin with the whole `prompt`"):
        load_preferences(path)
    assert load_preferences(path, format="prompt").rows[0].prompt[0]["content"] == start
    assert load_preferences(path, format="text").rows[0].prompt == ()


def test_an_answer_without_a_prompt_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", {"chosen": [says("good")], "rejected": [says("bad")]})
    with pytest.raises(DataError, match="`chosen` holds an answer without a prompt"):
        load_preferences(path)
