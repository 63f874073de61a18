"""The written report: self-contained, escaped, and complete about what a run lacks."""

from __future__ import annotations

import base64
import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
from fake_run import HOSTILE, pair, write_lines, write_rlhf, write_round

from nemo_advrm.errors import DataError
from nemo_advrm.report import write_report
from nemo_advrm.report.collect import collect
from nemo_advrm.report.figures.style import STYLE
from nemo_advrm.report.summary import summarise

RLHF_FIGURES = {"overoptimization_steps", "overoptimization_kl", "differences"}
FIGURES = {*RLHF_FIGURES, "scatter", "attack_success", "accuracy", "cost"}


@pytest.fixture(autouse=True)
def small_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fewer pixels, for speed: nothing here looks at them."""
    monkeypatch.setitem(STYLE, "savefig.dpi", 30)


def summary_of(run_dir: Path) -> dict:
    return json.loads((run_dir / "report" / "summary.json").read_text())


def drawn(run_dir: Path) -> set[str]:
    return {path.stem for path in (run_dir / "report").glob("*.png")}


def test_the_page_holds_every_figure_and_loads_nothing(run_dir: Path) -> None:
    index = write_report(run_dir).page
    assert index == run_dir / "report" / "index.html"
    page = index.read_text(encoding="utf-8")
    sources = re.findall(r'<img[^>]* src="([^"]*)"', page)
    assert drawn(run_dir) == FIGURES
    assert len(sources) == len(FIGURES)
    for source in sources:
        kind, data = source.split(",", 1)
        assert kind == "data:image/png;base64"
        assert base64.b64decode(data).startswith(b"\x89PNG")
    for forbidden in ("http:", "https:", "<script", "<link", "@import", "url("):
        assert forbidden not in page
    assert page.count("<img") == page.count('alt="')


def test_text_of_the_run_is_escaped(run_dir: Path) -> None:
    page = write_report(run_dir).page.read_text(encoding="utf-8")
    assert HOSTILE not in page
    assert "&lt;script&gt;alert(&#39;x&#39;)&lt;/script&gt; &amp; &#34;quoted&#34;" in page
    assert "What is &lt;b&gt;bold&lt;/b&gt;?" in page


def test_the_ten_worst_examples_stand_beside_their_counterparts(run_dir: Path) -> None:
    page = write_report(run_dir).page.read_text(encoding="utf-8")
    assert page.count("<article>") == 10
    assert [int(found) for found in re.findall(r"number (\d+)\.", page)] == [11, 10, 9, 8, 7, 6, 5, 4, 3, 2]
    assert "R1 3.25 (z 2.50)" in page
    assert "R2 -1.50 (z -1.25)" in page
    assert "gold -11.00" in page
    # z of the chosen response is looked up among the SFT samples: response "sft 0" has z = -1 for both models.
    assert "R2 0.75 (z -1.00)" in page


def test_a_second_report_replaces_the_first(run_dir: Path) -> None:
    write_report(run_dir)
    shutil.rmtree(run_dir / "rlhf")
    write_report(run_dir)
    assert drawn(run_dir) == FIGURES - RLHF_FIGURES
    assert not list((run_dir / "report").glob("*.partial"))


def test_a_directory_that_does_not_exist_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no such run directory"):
        write_report(tmp_path / "nowhere")


# ---- what may be missing


def test_an_empty_directory_gives_a_page_that_says_so(tmp_path: Path) -> None:
    page = write_report(tmp_path).page.read_text(encoding="utf-8")
    assert "No adversarial rounds" in page
    assert "No RLHF runs" in page
    assert "state.json is absent" in page
    assert drawn(tmp_path) == set()


def test_real_data_has_no_gold(run_dir: Path) -> None:
    for name in ("r1", "adv_rm"):
        write_rlhf(run_dir, name, [None] * 10)
    rates = {"samples": 10, "success_standard": None, "success_strict": None, "selected": 2, "selected_success": None}
    for number in (0, 1):
        path = run_dir / f"round_{number}" / "attack" / "summary.json"
        path.write_text(json.dumps({"directions": {"1": rates}, "threshold_z": 1.96}))
        samples = path.with_name("samples.jsonl")
        write_lines(samples, [json.loads(line) | {"gold": None} for line in samples.read_text().splitlines()])
    page = write_report(run_dir).page.read_text(encoding="utf-8")
    summary = summary_of(run_dir)
    assert "no gold reward" in summary["headline"]
    assert summary["rlhf"]["r1"]["area"] is None
    assert summary["rlhf"]["r1"]["start"] is None
    assert summary["verdict"] == "open"
    assert "attack success is not measured" in page
    assert drawn(run_dir) == FIGURES - {"attack_success", "differences"}


def test_one_clean_round_alone(run_dir: Path) -> None:
    shutil.rmtree(run_dir / "rlhf")
    shutil.rmtree(run_dir / "round_1")
    (run_dir / "round_0" / "pairs.jsonl").write_text("")
    page = write_report(run_dir).page.read_text(encoding="utf-8")
    assert "No adversarial pairs in this run." in page
    assert summary_of(run_dir)["cost_ratio"] is None
    assert summary_of(run_dir)["rlhf"] == {}


def test_three_members(run_dir: Path) -> None:
    write_round(run_dir, 0, accuracy=(0.7, 0.7, 0.7), pairs=3, members=3)
    write_report(run_dir)
    summary = summary_of(run_dir)
    assert summary["ensemble_size"] == 3
    assert set(summary["rounds"][0]["attack"]["directions"]) == {"1", "2", "3"}
    assert "scatter" in drawn(run_dir)


def test_values_that_are_not_finite_become_null(run_dir: Path) -> None:
    path = run_dir / "rlhf" / "r1" / "metrics.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    rows[1] |= {"gold": float("nan"), "proxy": float("inf"), "kl": float("-inf")}
    write_lines(path, rows)
    broken = pair(0)
    broken["provenance"] |= {"scores": [float("nan"), 1.0], "disagreement_z": float("inf")}
    write_lines(run_dir / "round_0" / "pairs.jsonl", [broken])
    write_report(run_dir)
    text = (run_dir / "report" / "summary.json").read_text()
    notes = json.loads(text, parse_constant=pytest.fail)["notes"]  # called for NaN and the infinities
    assert sum("NaN" in note or "Infinity" in note for note in notes) == 2
    # without step 1, between whose neighbours gold is interpolated: 1, 1.5, 2, 0, ...
    assert summary_of(run_dir)["rlhf"]["r1"]["area"] == pytest.approx((1 + 1.5 + 2 + 0 - 1 - 1 - 2 - 2 - 3 - 3) / 10)


def test_a_truncated_last_line_is_ignored_with_a_note(run_dir: Path) -> None:
    for name in ("round_0/pairs.jsonl", "rlhf/r1/metrics.jsonl", "round_0/attack/samples.jsonl"):
        with (run_dir / name).open("a") as file:
            file.write('{"step": 10, "gol')
    summary = summarise(collect(run_dir))
    assert summary["rounds"][0]["pairs"] == 12
    assert summary["rlhf"]["r1"]["steps"] == 9
    assert "rlhf/r1/metrics.jsonl: the last line is truncated and was ignored." in summary["notes"]


def test_a_broken_line_in_the_middle_is_named(run_dir: Path) -> None:
    path = run_dir / "rlhf" / "r1" / "metrics.jsonl"
    path.write_text("{oops\n" + path.read_text())
    notes = summarise(collect(run_dir))["notes"]
    assert "rlhf/r1/metrics.jsonl: 1 unreadable line(s) left out, the first is line 1." in notes


@pytest.mark.parametrize("value", ["text", True, None, [], {}, [[]], [None], 10**400, -(2**63), 1e300])
def test_values_of_another_type_leave_a_report(run_dir: Path, value: Any) -> None:
    for name in ("round_0/pairs.jsonl", "rlhf/r1/metrics.jsonl", "round_0/attack/samples.jsonl"):
        path = run_dir / name
        rows = [json.loads(line) for line in path.read_text().splitlines()]
        for i, key in enumerate(rows[0]):
            rows[i % len(rows)][key] = value
        path.write_text("".join(json.dumps(row) + "\n" for row in [*rows, value]))
    directions = {"directions": {"\u00b2": value, "1": value}}
    (run_dir / "round_0" / "attack" / "summary.json").write_text(json.dumps(directions))
    report = write_report(run_dir)
    assert any(note.startswith("rlhf/r1/metrics.jsonl: ") for note in report.summary["notes"]) or value is None
    assert report.text(terminal=False)


def test_numbers_and_brackets_without_end_are_unreadable_lines(run_dir: Path) -> None:
    path = run_dir / "round_0" / "attack" / "samples.jsonl"
    path.write_text('{"step": ' + "9" * 5000 + "}\n" + "[" * 100_000 + "\n" + path.read_text())
    (run_dir / "round_0" / "attack" / "summary.json").write_text("[" * 100_000)
    notes = summarise(collect(run_dir))["notes"]
    assert "round_0/attack/samples.jsonl: 2 unreadable line(s) left out, the first is line 1." in notes


def test_a_stage_that_did_not_finish_is_named(run_dir: Path) -> None:
    path = run_dir / "state.json"
    state = json.loads(path.read_text())
    state["stages"]["rlhf/lcb"] = {"status": "running"}
    path.write_text(json.dumps(state))
    assert "Stage rlhf/lcb is not complete (status: running)." in summarise(collect(run_dir))["notes"]


# ---- the console


def test_piped_output_is_plain_and_aligned(run_dir: Path) -> None:
    text = write_report(run_dir).text(terminal=False)
    assert "\x1b" not in text
    assert text.startswith("With Hardened reward model (Adv-RM), mean gold over RLHF was 3.40 higher")
    rows = {line.split("  ")[0]: line.split() for line in text.splitlines()}
    assert rows["Plain reward model"][3:] == ["1.00", "-0.70", "-2.20", "-3.00", "2.00", "–", "2.2"]
    assert rows["Hardened reward model (Adv-RM)"][4:6] == ["1.00", "2.70"]
    assert rows["Round 0, model 1 attacked"][5:] == ["–", "–", "10", "10.0%", "90.0%", "–"]
    assert rows["Reward model 1"][3:] == ["75.0%", "72.0%", "-3.0", "points"]
    assert rows["Adv-RM, then RLHF"][3:] == ["60.0", "s", "–", "2.4x"]
    assert max(len(line) for line in text.splitlines()[1:]) <= 100


def test_a_terminal_gets_colour_and_the_same_numbers(run_dir: Path) -> None:
    text = write_report(run_dir).text(terminal=True)
    assert "\x1b[" in text
    assert "2.4x" in text
