"""Reference features are fitted for the members that are used with them, also when an arm is added later."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from reward_members import one_step_pipeline

from nemo_advrm import cli, locks
from nemo_advrm.commands import stages
from nemo_advrm.config import load_config
from nemo_advrm.engine.feature_file import FILE
from nemo_advrm.engine.runtime import Runtime
from nemo_advrm.errors import ConfigError
from nemo_advrm.pipeline import rounds
from nemo_advrm.pipeline.dag import order
from nemo_advrm.pipeline.hybrids import check_fitted, hybrid_members

PLAIN = "pipeline.rlhf.plain={reward: r1, standardise: true, reference_features: false}"
HYBRID = "pipeline.rlhf.hybrid={reward: r1, standardise: true}"
BRANCH = "pipeline.branches.other={plain_members: [1]}"

FEATURES = ["reward_model.reference_features=[log_prob]", "pipeline.plain_members=[1,2]", "pipeline.rounds=1"]


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ([PLAIN], []),
        ([HYBRID], ["round_0/rm_1"]),
        ([HYBRID, "reward_model.reference_features=[]"], []),
        ([HYBRID, "pipeline.room=hybrid"], ["round_0/rm_1", "round_0/rm_2"]),
        # a branch may end before its last round, and then the arm takes the members that it has
        (["pipeline.rlhf.a={reward: hardened}"], ["round_0/rm_1", "round_1/rm_1"]),
        (["pipeline.rlhf.a={reward: ensemble}"], ["round_0/rm_1", "round_0/rm_2"]),
        ([PLAIN, "pipeline.plain_members=[2]"], ["round_0/rm_1", "round_1/rm_1"]),  # attacked in both rounds
        ([PLAIN, BRANCH], ["round_0/rm_2"]),
        ([PLAIN, "pipeline.branches.other={pairs: none}"], []),  # attacks nothing
        ([PLAIN, "pipeline.branches.other={pairs: random}"], ["round_0/rm_1", "round_0/rm_2"]),
        ([HYBRID, "detector.monitors=[ensemble_disagreement]"], ["round_0/rm_1", "round_0/rm_2"]),
    ],
)
def test_a_member_is_hybrid_where_something_reads_its_features(settings: list[str], expected: list[str]) -> None:
    cfg = load_config([*FEATURES, *settings], "pipeline")
    assert sorted(hybrid_members(cfg)) == expected


@pytest.mark.parametrize(
    ("experiment", "expected"),
    [
        ("synthetic", ["round_0/rm_1"]),
        ("study", ["round_0/rm_1"]),
        ("study_kl", ["round_0/rm_1"]),
        ("study_arms", ["branches/hybrid/round_1/rm_1", "round_0/rm_1", "round_0/rm_2"]),
    ],
)
def test_the_hybrids_of_the_experiments(experiment: str, expected: list[str]) -> None:
    cfg = load_config([f"experiment={experiment}"], "pipeline")
    assert sorted(hybrid_members(cfg)) == expected
    assert hybrid_members(cfg) <= {step.name for step in order(cfg) if step.kind == "train_rm"}


def test_the_study_fits_its_features_as_it_did_when_it_was_frozen() -> None:
    pairs = {
        name: load_config([f"experiment={name}"]).reward_model.feature_pairs
        for name in ("study", "study_kl", "study_arms", "study_rrm", "synthetic")
    }
    assert pairs == {"study": 0, "study_kl": 0, "study_arms": 0, "study_rrm": 0, "synthetic": 1000}


def test_a_member_without_features_is_not_taken_for_a_hybrid(tmp_path: Path) -> None:
    model = tmp_path / "round_0" / "rm_2" / "model"
    with pytest.raises(ConfigError, match=r"round_0/rm_2/model was .* or first with pipeline.only=round_0/rm_2, which"):
        check_fitted(tmp_path, [model])
    model.mkdir(parents=True)
    (model / FILE).touch()
    check_fitted(tmp_path, [model])


# ---- a run


@pytest.fixture(autouse=True)
def nothing_is_held() -> Iterator[None]:
    yield
    locks.release_all()


def _settings(home: Path) -> list[str]:
    """A pipeline of two tiny members that is attacked for one step and retrained for one."""
    return [
        *one_step_pipeline(home),
        *FEATURES,
        "pipeline.rounds=0",
        "reward_model.feature_prompts=2",
        "reward_model.feature_share=0.5",
        "pipeline.jobs=1",
        "ensemble.size=2",
        "adversarial.target_members=[1]",
        "model.global_batch_size=2",
        "stage.train_rm.trainer.max_steps=1",
        "rl.group_size=2",
    ]


def _pipeline(settings: list[str], run: Path, *arms: str) -> int:
    return cli.main(["pipeline", *settings, f"run_dir={run}", *arms])


def _bytes(run: Path, *homes: str) -> dict[str, bytes]:
    """Content of what trainings and RLHF leave that has no times or paths in it."""
    found = [path for home in homes for path in (run / home).rglob("*") if path.suffix == ".distcp"]
    found += [path for home in homes for path in (run / home).rglob("samples.jsonl")]
    return {path.relative_to(run).as_posix(): path.read_bytes() for path in found}


def _weights(run: Path, member: int) -> dict[str, float]:
    found: dict[str, float] = json.loads((run / "round_0" / f"rm_{member}" / "model" / FILE).read_text())["weights"]
    return found


@pytest.mark.long
@pytest.mark.timeout(900)
def test_features_that_an_added_arm_uses_are_fitted_then_and_nothing_else_changes(
    single: Runtime, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = _settings(tmp_path)
    later, everywhere = tmp_path / "later", tmp_path / "everywhere"
    assert _pipeline(settings, later, PLAIN) == 0
    assert not list(later.rglob(FILE))
    stages_before = json.loads((later / "state.json").read_text())["stages"]
    before = _bytes(later, "round_0", "rlhf/plain")
    assert {"round_0/rm_1", "rlhf/plain"} <= {name.partition("/model")[0] for name in before}

    assert stages.main(load_config([*settings, f"run_dir={later}", HYBRID, PLAIN], "pipeline")) == 0
    listed = dict(line.split("\t")[::2][:2] for line in capsys.readouterr().out.splitlines() if "\t" in line)
    assert (listed["round_0/rm_1"], listed["round_0/rm_2"], listed["rlhf/hybrid"]) == ("todo", "complete", "todo")
    assert _pipeline(settings, later, PLAIN, HYBRID, "pipeline.only=rlhf/hybrid") == 2
    assert "or first with pipeline.only=round_0/rm_1, which fits them" in capsys.readouterr().err
    assert _pipeline(settings, later, PLAIN, HYBRID) == 0
    out = capsys.readouterr().out
    assert "round_0/rm_1 was trained before its reference features were used: they are fitted" in out
    begun = [line.removeprefix("== ") for line in out.splitlines() if line.startswith("== ")]
    assert begun == ["round_0/rm_1", "rlhf/hybrid"]
    assert [path.parts[-3] for path in later.rglob(FILE)] == ["rm_1"]
    assert _bytes(later, "round_0", "rlhf/plain") == before
    stages_after = json.loads((later / "state.json").read_text())["stages"]
    trained = [one["round_0/rm_1"] for one in (stages_before, stages_after)]
    assert trained[1]["cpu_seconds"] > trained[0]["cpu_seconds"] and trained[1]["flops"] > trained[0]["flops"]
    assert trained[1]["flops"] - trained[1]["features_flops"] == trained[0]["flops"]
    assert stages_before["round_0/rm_2"] == stages_after["round_0/rm_2"]

    # the same as when both arms are there from the start and the features of all members are fitted
    monkeypatch.setattr(rounds, "hybrid_members", lambda cfg: {f"round_0/rm_{k}" for k in (1, 2)})
    assert _pipeline(settings, everywhere, PLAIN, HYBRID) == 0
    assert len(list(everywhere.rglob(FILE))) == 2
    assert _weights(later, 1) == _weights(everywhere, 1)
    results = [json.loads((run / "round_0" / "rm_1" / "result.json").read_text()) for run in (later, everywhere)]
    assert results[0] == results[1] and "val/hybrid_accuracy" in results[0]
    assert _bytes(later, "round_0", "rlhf") == _bytes(everywhere, "round_0", "rlhf")
