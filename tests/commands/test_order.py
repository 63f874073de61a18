"""The order of a pipeline's stages and what the stage ``stages`` says of a run directory."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from nemo_advrm.commands import stages
from nemo_advrm.config import load_config
from nemo_advrm.config.schema import BranchConfig
from nemo_advrm.errors import ConfigError
from nemo_advrm.pipeline import branches, dag
from nemo_advrm.pipeline.dag import find

RUNS = "pipeline.rlhf={plain:{reward:r1},hard:{reward:hardened}}"
TWO_ROUNDS = ["pipeline.sft=true", "data.train_path=pairs.jsonl", "pipeline.rounds=1", RUNS]


def printed(run_dir: Path, capsys: pytest.CaptureFixture[str]) -> dict[str, str]:
    """Stage name to state."""
    assert stages.main(load_config([*TWO_ROUNDS, f"run_dir={run_dir}"])) == 0
    rows = [line.split("\t") for line in capsys.readouterr().out.splitlines()]
    return {name: status for name, _, status, _ in rows}


def test_until_names_stages_and_those_that_they_wait_for(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    runs = [*TWO_ROUNDS, "pipeline.rlhf_seeds=3", f"run_dir={tmp_path / 'run'}"]
    whole = dag.of_run(load_config(runs, "pipeline"))[1]

    def names(pattern: str) -> list[str]:
        return [step.name for step in dag.until(whole, pattern)]

    assert names("round_0/rm_*") == ["sft", "round_0/rm_1", "round_0/rm_2"]
    third = names("rlhf/*/seed_3")
    assert [name for name in third if name.startswith("rlhf/")] == ["rlhf/plain/seed_3", "rlhf/hard/seed_3"]
    needed = {"sft", "round_0/select", "round_1/rm_1"}
    assert needed < set(third) and "round_1/attack" not in third and "report" not in third
    assert names("report") == [step.name for step in whole]

    assert stages.main(load_config([*runs, "pipeline.until=round_0/rm_2"], "pipeline")) == 0
    assert [line.split("\t")[0] for line in capsys.readouterr().out.splitlines()] == ["sft", "round_0/rm_2"]
    with pytest.raises(ConfigError, match=r"pipeline.until=round_0/rm_9: did you mean round_0/rm_1\?"):
        dag.of_run(load_config([*runs, "pipeline.until=round_0/rm_9"], "pipeline"))


def test_every_stage_comes_after_those_it_needs() -> None:
    steps = dag.order(load_config(TWO_ROUNDS))
    needs = {step.name: step.after for step in steps}
    names = [step.name for step in steps]
    assert all(names.index(before) < names.index(name) for name, after in needs.items() for before in after)
    assert needs["round_0/rm_1"] == needs["round_0/rm_2"] == ("sft",)  # side by side
    assert needs["round_0/reference"] == ("round_0/rm_1", "round_0/rm_2")
    assert needs["round_1/rm_2"] == ("round_0/select",)
    assert needs["round_0/attack/direction_1_policy_1"] == ("round_0/reference",)
    assert needs["round_0/attack"] == ("round_0/attack/direction_1_policy_1",)
    assert needs["rlhf/plain"] == ("round_0/rm_1",)
    assert needs["rlhf/hard"] == ("round_1/rm_1",)
    assert needs["report"] == ("round_1/attack", "rlhf/plain", "rlhf/hard")
    assert "preferences" not in needs


def test_rlhf_on_an_ensemble_waits_for_the_reference_that_standardises_it() -> None:
    run = "pipeline.rlhf={low:{reward:ensemble,aggregate:lcb}}"
    for standardise, needed in (("true", ("round_0/rm_1", "round_0/rm_2", "round_0/reference")),
                                ("false", ("round_0/rm_1", "round_0/rm_2"))):  # fmt: skip
        cfg = load_config(["data.train_path=pairs.jsonl", run, f"ensemble.standardise={standardise}"])
        assert find(dag.order(cfg), "rlhf/low").after == needed


def test_stages_are_complete_or_left_out_as_the_state_says(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert set(printed(tmp_path, capsys).values()) == {"todo"}
    attack = ["round_0/attack/direction_1_policy_1", "round_0/attack"]
    complete = ["sft", "round_0/rm_1", "round_0/rm_2", "round_0/reference", *attack, "round_0/select"]
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
        "round_1/attack/direction_1_policy_1",
        "round_1/attack",
    }
    assert {name for name, state in states.items() if state == "todo"} == {"rlhf/plain", "rlhf/hard", "report"}


def test_a_misspelt_stage_names_the_nearest() -> None:
    with pytest.raises(ConfigError, match="did you mean round_0/rm_2"):
        find(dag.order(load_config(TWO_ROUNDS)), "round_0/rm2")


BRANCHES = "pipeline.branches={steps:{pairs:none},any:{pairs:random},over:{coefficient:0},mixed:{plain_members:[1]},"
BRANCHES += "other:{own_trunk:true}}"
ARMS = "pipeline.rlhf={plain:{reward:r1},kl:{reward:r1,kl:0.1,seeds:3},hard:{reward:hardened},"
NAMES = ("steps", "any", "over", "mixed", "other")
ARMS += ",".join(f"{name}:{{reward:hardened,branch:{name}}}" for name in NAMES) + "}"
STUDY = ["pipeline.sft=true", "data.train_path=pairs.jsonl", "pipeline.rounds=1", BRANCHES, ARMS]


def test_a_branch_shares_what_it_does_not_change_and_makes_the_rest_itself() -> None:
    steps = dag.order(load_config(STUDY))
    needs = {step.name: step.after for step in steps}
    own = {
        branch: {name.removeprefix(f"branches/{branch}/") for name in needs if name.startswith(f"branches/{branch}/")}
        for branch in NAMES
    }
    attack = {"round_0/reference", "round_0/attack/direction_1_policy_1", "round_0/attack", "round_0/select"}
    # of the last round R_1 alone: no arm combines the members
    assert own["steps"] == own["any"] - {"round_0/reference", "round_0/select"} == {"round_1/rm_1"}
    assert own["over"] == own["mixed"] == {*attack, "round_1/rm_1"}
    assert own["other"] == {*attack, "round_0/rm_2", "round_1/rm_1"}
    assert needs["branches/steps/round_1/rm_1"] == ("round_0/rm_1",)  # the same steps, from the same member
    assert needs["branches/any/round_0/select"] == ("branches/any/round_0/reference", "round_0/select")  # as many
    assert needs["branches/other/round_0/rm_2"] == ("sft_2",)
    members = ("round_0/rm_1", "branches/other/round_0/rm_2")
    assert needs["branches/other/round_0/reference"] == (*members, "round_0/reference")  # whose responses they score
    assert needs["rlhf/other"] == ("branches/other/round_1/rm_1",)


def test_runs_of_an_arm_have_directories_of_their_own_where_there_are_several() -> None:
    steps = [step for step in dag.order(load_config(STUDY)) if step.kind == "rlhf"]
    assert [(step.name, step.seed) for step in steps if step.arm in ("plain", "kl")] == [
        ("rlhf/plain", 1),
        *((f"rlhf/kl/seed_{i}", i) for i in (1, 2, 3)),
    ]
    names = [step.name for step in dag.order(load_config([*STUDY, "pipeline.rlhf_seeds=2"])) if step.arm == "hard"]
    assert names == ["rlhf/hard/seed_1", "rlhf/hard/seed_2"]


def test_each_member_starts_from_a_policy_of_its_own_where_that_is_asked_for() -> None:
    cfg = load_config([*TWO_ROUNDS, "ensemble.own_trunk=true"])
    needs = {step.name: step.after for step in dag.order(cfg)}
    assert needs["round_0/rm_1"] == ("sft",) and needs["round_0/rm_2"] == ("sft_2",)


@pytest.mark.parametrize(
    ("setting", "told"),
    [
        ("pipeline.rlhf={a:{branch:stepz}}", r"pipeline.rlhf.a.branch=stepz: is not among .* \(steps, any, "),
        ("pipeline.rlhf={a:{round:2}}", "pipeline.rlhf.a.round=2: there are 1 rounds"),
        ("pipeline.branches={a:{pairs:random,rounds:2}}", "pipeline.branches.a.rounds=2: random pairs are as many as"),
        ("pipeline.branches={a:{plain_members:[3]}}", r"pipeline.branches.a.plain_members=\[3\]: there is no member 3"),
    ],
)
def test_branches_and_arms_that_cannot_be_are_refused(setting: str, told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        branches.check(load_config([*STUDY, setting]))
    odd = load_config(STUDY)
    odd.pipeline.branches["../a"] = BranchConfig()
    with pytest.raises(ConfigError, match="the name of a branch may have letters, digits"):
        branches.check(odd)
    with pytest.raises(ConfigError, match=r"own_trunk=true: needs pipeline\.sft=true"):
        branches.check(load_config(["pipeline.sft=false", "ensemble.own_trunk=true"]))


def test_rounds_of_a_branch_end_for_themselves() -> None:
    cfg = load_config(STUDY)
    ended = {("branches/over/round_0/select", "stop"): "0 pairs"}
    names = {s.name for s in dag.order(cfg) if dag.is_skipped(cfg, s, lambda *key: ended.get(key))}
    assert names == {"branches/over/round_1/rm_1"}  # RLHF then takes the members of round 0
