"""People as judges: the blind sheet, its form, the answers that are read back, and what is told by its line."""

from __future__ import annotations

import csv
import io
import json
import re
from pathlib import Path
from typing import Any

import pytest
from fake_judge import chats

from nemo_advrm import cli
from nemo_advrm.config.schema import Config, JudgeConfig
from nemo_advrm.errors import EXIT_WAITING, ConfigError, DataError, RewardSourceError, WaitingForPeople
from nemo_advrm.rewards.judges.pairwise import pairwise
from nemo_advrm.rewards.judges.people import PeopleReward
from nemo_advrm.rewards.sources import build, parse

# the second where Megatron-Core is running, as in a process in which other tests have started it
BAD_SHEET = (DataError, RewardSourceError)

TEXTS = [f"response {i}" for i in range(8)]


def people(*paths: Path, **options: Any) -> PeopleReward:
    spec = parse("human:" + "|".join(map(str, paths)), "audit.judge")
    source = build(spec, "people", Config(judge=JudgeConfig(**options)))
    assert isinstance(source, PeopleReward)
    return source


def rows_of(path: Path) -> list[dict[str, str]]:
    return list(csv.DictReader(io.StringIO(path.read_text(encoding="utf-8-sig"), newline="")))


def fill(path: Path, answer: Any, column: str = "score") -> None:
    """Writes ``answer(row)`` into every row, as a spreadsheet program saves it."""
    rows = rows_of(path)
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, rows[0].keys())
        writer.writeheader()
        writer.writerows({**row, column: answer(row)} for row in rows)


def waits(source: PeopleReward, texts: list[str], words: str) -> None:
    with pytest.raises(WaitingForPeople, match=words):
        source.score(chats(texts))


def test_a_sheet_is_written_filled_in_and_read_back(tmp_path: Path) -> None:
    sheet = tmp_path / "deep" / "sheet.csv"
    waits(people(sheet), [*TEXTS, TEXTS[0]], r"sheet\.csv has 8 new rows to judge: fill in its column score \(a number")
    rows = rows_of(sheet)
    assert list(rows[0]) == ["id", "prompt", "response", "score"] and {row["prompt"] for row in rows} == {"Why?"}
    order = [row["response"] for row in rows]
    assert sorted(order) == TEXTS and order != TEXTS  # each once, in an order that says nothing
    waits(people(sheet), TEXTS, "none of its 8 rows is filled in")
    fill(sheet, lambda row: int(row["response"][-1]) + 1)
    source = people(sheet)
    assert source.score(chats([*TEXTS, TEXTS[0]])).tolist() == [1, 2, 3, 4, 5, 6, 7, 8, 1]
    assert source.score(chats([TEXTS[3]])).tolist() == [4.0]
    assert source.cost_line() == "people: 1 responses, 1 sheets"


def test_nothing_on_a_sheet_tells_where_a_response_came_from(tmp_path: Path) -> None:
    """The same texts from other sources, in another order, make the same sheet."""
    texts = {}
    for name, order in (("one", TEXTS), ("two", TEXTS[::-1])):
        sheet = tmp_path / name / "sheet.csv"
        waits(people(sheet), order, "8 new rows")
        texts[name] = (sheet.read_bytes(), sheet.with_suffix(".html").read_bytes())
    assert texts["one"] == texts["two"]


def test_a_missing_answer_names_its_line(tmp_path: Path) -> None:
    sheet = tmp_path / "sheet.csv"
    waits(people(sheet), ["one\nresponse\nof three lines", "b", "c"], "3 new rows")
    missing = rows_of(sheet)[1]["response"]
    fill(sheet, lambda row: "" if row["response"] == missing else 5)
    text = sheet.read_text()
    line = text[: text.index(rows_of(sheet)[1]["id"])].count("\n") + 1
    waits(people(sheet), ["one\nresponse\nof three lines", "b", "c"], rf"sheet\.csv:{line}: score is missing .*1 of 3")


@pytest.mark.parametrize("wrong", ["good", "0", "11", "nan", "7,5", "7 or 8"])
def test_a_malformed_answer_names_its_line(tmp_path: Path, wrong: str) -> None:
    sheet = tmp_path / "sheet.csv"
    waits(people(sheet), TEXTS, "8 new")
    second = rows_of(sheet)[1]["id"]
    fill(sheet, lambda row: wrong if row["id"] == second else 5)
    with pytest.raises(BAD_SHEET, match=rf"sheet\.csv:3: score is '{wrong}': a number from 1 \(worst\) to 10 \(best\)"):
        people(sheet).score(chats(TEXTS))


def test_a_damaged_sheet_is_told_by_its_line(tmp_path: Path) -> None:
    sheet = tmp_path / "sheet.csv"
    waits(people(sheet), TEXTS[:2], "2 new")
    fill(sheet, lambda row: 5)
    good = sheet.read_text()
    one = rows_of(sheet)[0]
    for text, words in (
        (
            good.replace("score", "points"),
            r":1: the sheet has no column score \(it has: id, prompt, response, points\)",
        ),
        (good.replace(one["id"], ""), ":2: the cell of the column id is empty"),
        (good + f"{one['id']},Why?,x,6\n", r":4: the row r\w+ stands twice, with different answers \(line 2\)"),
        (good.replace("Why?", "Wh\xff?"), ":2: is not UTF-8 text"),
    ):
        sheet.write_text(text, encoding="latin-1")
        with pytest.raises(BAD_SHEET, match=r"sheet\.csv" + words):
            people(sheet).score(chats(TEXTS[:2]))


def test_what_spreadsheet_programs_make_of_a_sheet_is_read(tmp_path: Path) -> None:
    sheet = tmp_path / "sheet.csv"
    waits(people(sheet), TEXTS[:2], "2 new")
    ids = {row["response"]: row["id"] for row in rows_of(sheet)}
    # semicolons, other line ends, a header in capitals, empty rows, other columns
    sheet.write_bytes(
        f"\ufeffID;Score;note\r\n{ids[TEXTS[1]]};7;x\r\n;;\r\n{ids[TEXTS[0]]}; 2.0 ;\r\nr000000000000;9;\r\n".encode()
    )
    assert people(sheet).score(chats(TEXTS[:2])).tolist() == [2.0, 7.0]


def test_new_responses_are_added_below_and_answers_stay(tmp_path: Path) -> None:
    sheet = tmp_path / "sheet.csv"
    waits(people(sheet), TEXTS[:2], "2 new")
    fill(sheet, lambda row: 5)
    before = rows_of(sheet)
    waits(people(sheet), TEXTS[1:4], "2 new rows")
    assert rows_of(sheet)[:2] == before and [row["score"] for row in rows_of(sheet)[2:]] == ["", ""]
    fill(sheet, lambda row: row["score"] or 8)
    assert people(sheet).score(chats(TEXTS[:4])).tolist() == [5, 5, 8, 8]


def test_two_people_see_other_orders_and_their_scores_are_averaged(tmp_path: Path) -> None:
    one, two = tmp_path / "one.csv", tmp_path / "two.csv"
    waits(people(one, two), TEXTS, r"one\.csv has 8 new.*; and .*two\.csv has 8 new")
    assert [row["id"] for row in rows_of(one)] != [row["id"] for row in rows_of(two)]
    fill(one, lambda row: 4)
    waits(people(one, two), TEXTS, r"^.*two\.csv: none of its 8")
    fill(two, lambda row: 4 if row["response"] == TEXTS[0] else 6)
    source = people(one, two)
    assert source.score(chats(TEXTS[:2])).tolist() == [4.0, 5.0]
    assert source.cost_line() == "people: 2 responses, 2 sheets; their scores differ by 1.00 on average, 2 at most"


def test_a_response_cannot_become_a_formula_or_a_part_of_the_form(tmp_path: Path) -> None:
    sheet = tmp_path / "sheet.csv"
    texts = ['=HYPERLINK("http://x")', "+1", "@SUM(1)", "</script><script>alert(1)</script>", "lone \ud800 half"]
    waits(people(sheet), texts, "5 new")
    assert {row["response"][0] for row in rows_of(sheet)} == {"'", "<", "l"}
    fill(sheet, lambda row: 3)
    assert people(sheet).score(chats(texts)).tolist() == [3.0] * 5  # an answer belongs to its id, not to the text
    page = sheet.with_suffix(".html").read_text()
    assert page.count("<script") == 2 and page.count("</script>") == 2
    assert "http" not in re.sub(r"http-equiv", "", page.partition('id="data"')[0])  # it loads nothing
    (data,) = re.findall(r'<script type="application/json" id="data">(.*?)</script>', page, re.S)
    content = json.loads(data)
    assert content["choices"] == [str(i) for i in range(1, 11)] and len(content["rows"]) == 5
    assert "source" not in content and list(content) == ["file", "about", "rule", "column", "titles", "choices", "rows"]


def test_a_long_scale_has_few_buttons_with_both_ends() -> None:
    from nemo_advrm.rewards.judges.people import score_column

    assert score_column(0, 100).choices[:2] == ("0", "5") and score_column(0, 100).choices[-1] == "100"
    assert score_column(0, 101).choices[-1] == "101" and len(score_column(0, 101).choices) < 22
    assert score_column(0, 100).read("33.5") == 33.5


def test_comparisons_are_blind_too(tmp_path: Path) -> None:
    """Which of two answers stands first depends on neither the side nor the order of the pairs."""
    first, second = [f"good {i}" for i in range(12)], [f"bad {i}" for i in range(12)]
    judge = pairwise(people(tmp_path / "sheet.csv"))
    with pytest.raises(WaitingForPeople, match=r"sheet_pairs\.csv has 12 new rows.*1 \(the first response is better\)"):
        judge.compare(chats(first), chats(second))
    sheet = tmp_path / "sheet_pairs.csv"
    rows = rows_of(sheet)
    assert list(rows[0]) == ["id", "prompt", "response_1", "response_2", "better"]
    assert 0 < sum(row["response_1"].startswith("good") for row in rows) < 12
    written = sheet.read_bytes()
    sheet.unlink()
    with pytest.raises(WaitingForPeople):
        judge.compare(chats(second[::-1]), chats(first[::-1]))
    assert sheet.read_bytes() == written

    fill(sheet, lambda row: 1 if row["response_1"].startswith("good") else "2", "better")
    found = judge.compare(chats(first), chats(second))
    assert found.verdicts_N.tolist() == [1.0] * 12 and judge.compare(chats(second), chats(first)).losses == 12
    assert found.bias is not None and found.bias.choices == 12
    shown_first = sum(row["response_1"].startswith("good") for row in rows)
    assert found.bias.first == pytest.approx(shown_first / 12) and "in the other order" not in found.line()

    fill(sheet, lambda row: "Tie", "better")
    assert judge.compare(chats(first), chats(second)).ties == 12
    fill(sheet, lambda row: "both", "better")
    with pytest.raises(BAD_SHEET, match=r"sheet_pairs\.csv:2: better is 'both': 1 \(the first"):
        judge.compare(chats(first), chats(second))


def test_a_command_stops_for_people_and_goes_on(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pairs, sheet = tmp_path / "pairs.jsonl", tmp_path / "run" / "judge" / "people.csv"
    pairs.write_text(json.dumps({"prompt": "Why?", "chosen": "Because.", "rejected": "So"}) + "\n")
    words = [f"data.validation_path={pairs}", "evaluate.mismatch=false", "trainer.accelerator=cpu"]
    command = ["evaluate", f"run_dir={tmp_path / 'run'}", "ensemble.members=[human]", *words]
    assert cli.main(command) == EXIT_WAITING == 76
    assert f"waiting for people: {sheet} has 2 new rows to judge" in capsys.readouterr().err
    assert cli.main(command) == EXIT_WAITING
    fill(sheet, lambda row: 9 if row["response"] == "Because." else 2)
    assert cli.main(command) == 0
    out = capsys.readouterr().out
    assert "accuracy 1.0000  margin 7.0000  (1 pairs)" in out and "people: 2 responses, 1 sheets" in out


def test_a_sheet_that_is_no_csv_file_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"audit\.judge=human:sheet\.xlsx: names sheets"):
        parse("human:sheet.xlsx", "audit.judge")
