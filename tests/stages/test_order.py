"""The order of a pipeline's stages and what the stage ``stages`` says of a run directory."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from nemo_advrm.config import load_config
from nemo_advrm.errors import ConfigError
from nemo_advrm.stages import order
from nemo_advrm.stages.order import find

RUNS = "pipeline.rlhf={plain:{reward:r1},hard:{reward:hardened}}"
TWO_ROUNDS = ["pipeline.sft=true", "data.train_path=pairs.jsonl", "pipeline.rounds=1", RUNS]


def printed(run_dir: Path, capsys: pytest.CaptureFixture[str]) -> dict[str, str]:
    """Stage name to state."""
    assert order.main(load_config([*TWO_ROUNDS, f"run_dir={run_dir}"])) == 0
    rows = [line.split("\t") for line in capsys.readouterr().out.splitlines()]
    return {name: status for name, _, status, _ in rows}


def test_every_stage_comes_after_those_it_needs() -> None:
    steps = order.order(load_config(TWO_ROUNDS))
    needs = {step.name: step.after for step in steps}
    names = [step.name for step in steps]
    assert all(names.index(before) < names.index(name) for name, after in needs.items() for before in after)
    assert needs["round_0/rm_1"] == needs["round_0/rm_2"] == ("sft",)  # side by side
    assert needs["round_0/reference"] == ("round_0/rm_1", "round_0/rm_2")
    assert needs["round_1/rm_2"] == ("round_0/select",)
    assert needs["rlhf/plain"] == ("round_0/rm_1", "round_0/rm_2")
    assert needs["rlhf/hard"] == ("round_1/rm_1", "round_1/rm_2")
    assert needs["report"] == ("round_1/attack", "rlhf/plain", "rlhf/hard")
    assert "preferences" not in needs


def test_rlhf_on_an_ensemble_waits_for_the_reference_that_standardises_it() -> None:
    run = "pipeline.rlhf={low:{reward:ensemble,aggregate:lcb}}"
    for standardise, needed in (("true", ("round_0/rm_1", "round_0/rm_2", "round_0/reference")),
                                ("false", ("round_0/rm_1", "round_0/rm_2"))):  # fmt: skip
        cfg = load_config(["data.train_path=pairs.jsonl", run, f"ensemble.standardise={standardise}"])
        assert find(cfg, "rlhf/low").after == needed


def test_stages_are_complete_or_left_out_as_the_state_says(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert set(printed(tmp_path, capsys).values()) == {"todo"}
    complete = ["sft", "round_0/rm_1", "round_0/rm_2", "round_0/reference", "round_0/attack", "round_0/select"]
    stages = {name: {"status": "complete"} for name in complete}
    stages["round_0/select"]["stop"] = "0 pairs were selected"
    stages["rlhf/plain"] = {"status": "running"}
    (tmp_path / "state.json").write_text(json.dumps({"stages": stages}))
    states = printed(tmp_path, capsys)
    assert {name for name, state in states.items() if state == "complete"} == set(complete)
    assert {name for name, state in states.items() if state == "skipped"} == {
        "round_1/rm_1",
        "round_1/rm_2",
        "round_1/reference",
        "round_1/attack",
    }
    assert {name for name, state in states.items() if state == "todo"} == {"rlhf/plain", "rlhf/hard", "report"}


def test_a_misspelt_stage_names_the_nearest() -> None:
    with pytest.raises(ConfigError, match="did you mean round_0/rm_2"):
        find(load_config(TWO_ROUNDS), "round_0/rm2")
