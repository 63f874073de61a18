"""The command ``attack`` with attacks that are not Adv-RM: what it writes, and what it refuses."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hf_policies import save_policy
from reward_members import one_step_of_rl, save_megatron

from nemo_advrm import cli
from nemo_advrm.data.jsonl import read_jsonl
from nemo_advrm.data.pair_store import PairStore
from nemo_advrm.engine.runtime import Runtime

Row = dict[str, Any]


def rows_of(path: Path) -> list[Row]:
    return [row for _, row in read_jsonl(path)]


@pytest.fixture(scope="module")
def of_transformers(single: Runtime, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Settings of an attack on functions, with a Hugging Face policy that cannot be converted."""
    home = tmp_path_factory.mktemp("transformers")
    policy = save_policy(home / "policy")
    for name, prompts in (("prompts", ("the", "a question")), ("held_out", ("is it", "an answer"))):
        (home / f"{name}.jsonl").write_text("".join(json.dumps({"prompt": p}) + "\n" for p in prompts))
    return [
        "ensemble.members=[python:planted_scores:likes_e,python:planted_scores:plain]",
        "pipeline.gold=python:planted_scores:dislikes_e",
        f"pretrained_checkpoint.restore_from_path=hf:{policy}",
        "rl.rollout_engine=transformers",
        f"model.tokenizer=hf:{policy}",
        f"data.prompts_path={home / 'prompts.jsonl'}",
        f"data.held_out_prompts_path={home / 'held_out.jsonl'}",
        "model.encoder_seq_length=96",
        "precision.name=fp32",
        "rl.max_steps=2",
        "rl.prompts_per_step=2",
        "rl.group_size=2",
        "rl.max_new_tokens=10",
        "sft_statistics.samples_per_prompt=4",
        "adversarial.held_out_prompts=2",
        "adversarial.search.candidates=280",
        "adversarial.search.naturalness=0",
        "adversarial.coefficient=0.01",
        "selection.require_ended=false",
        "trainer.accelerator=cpu",
    ]


def test_decoding_works_for_a_policy_without_a_conversion_table(of_transformers: list[str], tmp_path: Path) -> None:
    run = tmp_path / "run"
    command = [*of_transformers, "adversarial.attack=decoding", f"run_dir={run}"]
    assert cli.main(["attack", *command]) == 0
    rows, home = rows_of(run / "attack" / "samples.jsonl"), run / "attack" / "direction_1_policy_1"
    assert len(rows) == 8 and all(row["response"].count("e") >= 8 for row in rows)
    summary = json.loads((run / "attack" / "summary.json").read_text())
    found = summary["directions"]["1"]
    assert (found["samples"], found["steps"], found["success_standard"], found["ended"]) == (8, 2, 1.0, 1.0)
    assert summary["underrates"] is False
    held_out = found["held_out"]
    assert (held_out["prompts"], held_out["responses"], held_out["success_standard"]) == (2, 8, 1.0)
    assert held_out["finds"] == 1.0 and held_out["null"]["finds"] < 0.5
    prompts = {row["prompt"] for row in rows_of(home / "held_out.jsonl")}
    assert prompts == {"is it", "an answer"} and not (home / "held_out").exists()
    assert [row["samples"] for row in rows_of(home / "metrics.jsonl")] == [4, 4]
    assert cli.main(["select", *command]) == 0
    for pair in PairStore(run / "pairs.jsonl").load():
        assert pair.rejected.count("e") >= 8 > pair.chosen.count("e")


def test_what_the_transformers_engine_cannot_do_is_refused(
    of_transformers: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str], single: Runtime
) -> None:
    run = f"run_dir={tmp_path / 'run'}"
    assert cli.main(["attack", *of_transformers, run]) == 2
    assert "adversarial.attack=adv_rm trains the policy; rl.rollout_engine=transformers" in capsys.readouterr().err
    own = save_megatron(tmp_path / "own", head="lm")
    elsewhere = ["adversarial.attack=probes", f"pretrained_checkpoint.restore_from_path={own}", run]
    assert cli.main(["attack", *of_transformers, *elsewhere]) == 2
    assert "rl.rollout_engine=transformers samples hf:DIR, not a checkpoint of" in capsys.readouterr().err
    missing = ["adversarial.attack=probes", "pretrained_checkpoint.restore_from_path=hf:nowhere", run]
    assert cli.main(["attack", *of_transformers, *missing]) == 2
    assert "hf:nowhere: there is no such directory" in capsys.readouterr().err
    reads_policy = ["adversarial.attack=probes", "adversarial.detector=sft_log_prob", run]
    assert cli.main(["attack", *of_transformers, *reads_policy]) == 2
    assert "choose a detector that does not read the SFT policy, or convert it" in capsys.readouterr().err
    assert not (tmp_path / "run" / "attack").exists()


def test_over_optimisation_is_paid_by_the_target_alone_and_judged_by_the_configured_rule(
    single: Runtime, tmp_path: Path
) -> None:
    members = [save_megatron(tmp_path / name, seed=seed) for name, seed in (("one", 3), ("two", 4))]
    settings = [*one_step_of_rl(tmp_path, members), "rl.apply_unended_penalty=false", f"run_dir={tmp_path / 'run'}"]
    assert cli.main(["attack", *settings, "adversarial.attack=over_optimisation"]) == 0
    rows = rows_of(tmp_path / "run" / "attack" / "samples.jsonl")
    assert len(rows) == 8
    for row in rows:
        assert row["reward"] == pytest.approx(row["z"][0] if row["z"][0] > 0 else -4.0)
    summary = json.loads((tmp_path / "run" / "attack" / "summary.json").read_text())
    assert summary["by_disagreement"] is True, "adversarial.coefficient=1.5 is that of the rule"


def test_a_single_reward_model_is_attacked_with_a_detector_that_needs_no_others(
    single: Runtime, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    member, run = save_megatron(tmp_path / "one"), tmp_path / "run"
    settings = [*one_step_of_rl(tmp_path, [member]), "adversarial.attack=probes", f"run_dir={run}"]
    assert cli.main(["attack", *settings]) == 2
    assert "or one and a detector that needs no others (adversarial.detector=mahalanobis)" in capsys.readouterr().err
    settings += ["adversarial.detector=mahalanobis", "selection.threshold_z=-100", "selection.require_ended=false"]
    assert cli.main(["attack", *settings]) == 0
    rows = rows_of(run / "attack" / "samples.jsonl")
    assert len(rows) == 8 and all(len(row["scores"]) == len(row["z"]) == 1 for row in rows)
    assert all(row["origin"] for row in rows)
    assert cli.main(["select", *settings]) == 0
