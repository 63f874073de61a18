"""The pipeline as jobs, and each other stage's script on two nodes: the same numbers as the pipeline's one process."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
from slurm_site import SCRIPTS, SMALL, PipelineRun, Site, job_numbers, metrics

from nemo_advrm.synthetic.tokenizer import SyntheticTokenizer

pytestmark = pytest.mark.timeout(1800)
STAGES = [
    *("sft", "preferences", "round_0/rm_1", "round_0/rm_2", "round_0/reference"),
    *("round_0/attack/direction_1_policy_1", "round_0/attack", "rlhf/r1"),
]


def test_a_wrong_setting_submits_nothing(site: Site) -> None:
    run_dir = site.home / "wrong"
    wrong = site.cluster.call(
        str(SCRIPTS / "submit_pipeline.sh"), f"run_dir={run_dir}", "pipeline.round=1", timeout=120
    )
    assert wrong.returncode == 2 and "did you mean pipeline.rounds?" in wrong.stderr
    assert not (run_dir / "slurm" / "jobs.tsv").exists()


def test_the_pipeline_is_one_job_a_stage_and_submitting_again_doubles_nothing(pipeline: PipelineRun) -> None:
    first, second, third, last = pipeline.said
    jobs = job_numbers(first)
    assert list(first) == [*STAGES, "report"] and set(jobs) == set(first)
    assert all("submitted" in text for text in first.values())
    assert job_numbers(second) == jobs and not any("submitted" in text for text in second.values())
    assert pipeline.waiting == len(STAGES) + 1

    # one stage was cancelled, and what waited for it went too: submitting again brought back these two only
    assert {name for name, text in third.items() if text == "complete"} == set(STAGES[:-1])
    assert {name for name, text in third.items() if "submitted" in text} == {"rlhf/r1", "report"}
    assert set(last.values()) == {"complete"}
    recorded = [line.split("\t")[:2] for line in (pipeline.directory / "slurm" / "jobs.tsv").read_text().splitlines()]
    assert recorded == [*map(list, jobs.items()), *map(list, job_numbers(third).items())]

    assert (pipeline.directory / "report" / "index.html").exists()
    state = json.loads((pipeline.directory / "state.json").read_text())["stages"]
    assert set(state) == set(STAGES) and all(stage["status"] == "complete" for stage in state.values())


@pytest.fixture(scope="module")
def jobs(site: Site, pipeline: PipelineRun) -> dict[str, str]:
    """One job of each other script, from the pipeline's models; they wait for each other only where nodes lack."""
    home, run = site.home, pipeline.directory
    model, policy = run / "round_0" / "rm_1" / "model", run / "sft" / "model"
    held_out = f"data.validation_path={run}/preferences/validation.jsonl"
    starts = f"pretrained_checkpoint.restore_from_path={policy}", f"ensemble.members=[{model}]"
    return {
        "convert": site.sbatch(
            "convert.sbatch",
            *("from=megatron", f"path={model}", "to=hf", f"out={home}/hf"),
            options=("--partition=spare",),
        ),
        "sft": site.sbatch("sft.sbatch", *SMALL, "parallel=tp2", f"run_dir={home}/sft"),
        "rlhf": site.sbatch(
            "rlhf.sbatch",
            *(*SMALL, *starts, "rl.max_steps=2", f"run_dir={home}/rlhf"),
            "rl.kl.coefficient=0.03",  # as the arm has it
        ),
        "evaluate": site.sbatch(
            "evaluate.sbatch",
            *("trainer.accelerator=cpu", "parallel=tp2", held_out, f"ensemble.members=[{model}]"),
        ),
    }


def assert_same_curves(found: Path, expected: Path, *keys: str, abs: float) -> None:
    rows, wanted = metrics(found), metrics(expected)
    assert [row["step"] for row in rows] == [row["step"] for row in wanted] and len(rows) > 1
    for key in keys:
        assert [row[key] for row in rows] == pytest.approx([row[key] for row in wanted], abs=abs), key


def test_sft_at_tensor_parallel_two_over_two_nodes(site: Site, pipeline: PipelineRun, jobs: dict[str, str]) -> None:
    output = site.completed(jobs["sft"])
    assert f"policy: {site.home}/sft/model" in output and site.cluster.job(jobs["sft"])["NodeList"] == "n[1-2]"
    assert_same_curves(site.home / "sft", pipeline.directory / "sft", "train/loss", "grad_norm", abs=1e-4)


def test_rlhf_on_two_replicas(site: Site, pipeline: PipelineRun, jobs: dict[str, str]) -> None:
    output = site.completed(jobs["rlhf"])
    assert re.search(r"reward -?\d+\.\d+  gold -?\d+\.\d+  kl ", output)
    keys = ("proxy", "gold", "kl", "entropy", "loss")
    assert_same_curves(site.home / "rlhf", pipeline.directory / "rlhf" / "r1", *keys, abs=1e-3)


def test_evaluate_gives_the_accuracy_of_the_training(site: Site, pipeline: PipelineRun, jobs: dict[str, str]) -> None:
    found = re.search(r"accuracy (\S+)  margin (\S+)  \(20 pairs\)", site.completed(jobs["evaluate"]))
    trained = json.loads((pipeline.directory / "round_0" / "rm_1" / "result.json").read_text())
    assert found is not None
    assert float(found[1]) == pytest.approx(trained["val/accuracy"], abs=1e-4)
    assert float(found[2]) == pytest.approx(trained["val/margin"], abs=2e-4)


def test_a_converted_model_scores_as_the_attack_recorded(
    site: Site, pipeline: PipelineRun, jobs: dict[str, str]
) -> None:
    from transformers import AutoModelForSequenceClassification

    site.completed(jobs["convert"])
    model, tokenizer = AutoModelForSequenceClassification.from_pretrained(site.home / "hf"), SyntheticTokenizer()
    lines = (pipeline.directory / "round_0" / "reference.jsonl").read_text().splitlines()
    for row in map(json.loads, lines[:4]):
        tokens = torch.tensor([tokenizer.encode_prompt(tuple(row["messages"])) + row["tokens"]])
        with torch.no_grad():
            assert float(model.eval()(tokens).logits) == pytest.approx(row["scores"][0], abs=1e-4)
