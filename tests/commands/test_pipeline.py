"""The whole pipeline in small: it is killed, goes on where it stood, and is not redone when finished.

It is begun by one process and goes on by two workers.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from nemo_advrm import cli

# the whole method twice in processes of their own: a minute on an idle machine, several on a slow or busy one
pytestmark = [pytest.mark.long, pytest.mark.timeout(1800)]

SMALL = [
    "experiment=synthetic",
    "stage.sft.trainer.max_steps=30",
    "stage.train_rm.trainer.max_steps=8",
    "rl.max_steps=3",
    "synthetic.sft_rows=1000",
    "synthetic.preference_pairs=100",
    "synthetic.validation_pairs=40",
    "sft_statistics.num_prompts=32",
    "sft_statistics.samples_per_prompt=3",
    "selection.threshold_z=0.5",
    "selection.null_ratio=0",
    "selection.last_fraction=1",
    "augmentation.warm_steps=4",
    "adversarial.held_out_prompts=8",
    "rl.held_out_prompts=8",
    "best_of_n.prompts=8",
    "best_of_n.samples=8",
]


LIMIT = 800  # seconds of one command, on a slow machine that others use too
FIRST_ATTACK = "round_0/attack/direction_1_policy_1"


def start(run_dir: Path, *extra: str) -> subprocess.Popen:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "nemo_advrm.cli", "pipeline", *SMALL, f"run_dir={run_dir}", *extra]
    process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    started.append(process)
    return process


started: list[subprocess.Popen] = []


@pytest.fixture(scope="module", autouse=True)
def nothing_is_left() -> Iterator[None]:
    """End what a failed test has left; the workers of a killed command end by themselves."""
    yield
    for process in started:
        process.kill()
        process.wait()


def stages(run_dir: Path) -> dict[str, dict]:
    try:
        return json.loads((run_dir / "state.json").read_text())["stages"]
    except (OSError, ValueError):
        return {}


def wait_for(process: subprocess.Popen, run_dir: Path, stage: str) -> None:
    """Until a stage of a run is under way."""
    deadline = time.monotonic() + LIMIT
    while stages(run_dir).get(stage, {}).get("status") != "running":
        assert process.poll() is None, process.communicate()[1][-3000:]
        assert time.monotonic() < deadline, f"{stage} did not start in time"
        time.sleep(0.02)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, dict], str]:
    """A run directory, the stages as they stood at the kill, and what the restarted run printed."""
    run_dir = tmp_path_factory.mktemp("pipeline") / "run"
    process = start(run_dir, "pipeline.jobs=1")
    wait_for(process, run_dir, FIRST_ATTACK)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    at_kill = stages(run_dir)
    out, err = start(run_dir, "pipeline.jobs=2").communicate(timeout=LIMIT)
    assert stages(run_dir).get("rlhf/adv_rm", {}).get("status") == "complete", err[-3000:]
    return run_dir, at_kill, out


def test_the_restart_begins_at_the_first_incomplete_stage(finished) -> None:
    run_dir, at_kill, out = finished
    assert f"{run_dir / FIRST_ATTACK}: took over the lock of process " in out
    now = stages(run_dir)
    begun = [line.removeprefix("== ") for line in out.splitlines() if line.startswith("== ")]
    assert sorted(begun) == sorted(now.keys() - {n for n, s in at_kill.items() if s["status"] == "complete"})
    assert begun[:1] == [FIRST_ATTACK] or begun[1] == FIRST_ATTACK  # the workers take the first two that are ready
    complete = {name for name, stage in at_kill.items() if stage["status"] == "complete"}
    assert {"sft", "sft_2", "preferences", "round_0/rm_1", "round_0/rm_2", "round_0/reference"} == complete
    assert all(now[name] == at_kill[name] for name in complete)
    assert all(stage["status"] == "complete" for stage in now.values())


def test_every_stage_left_its_files(finished) -> None:
    run_dir, _, _ = finished
    for number in (0, 1):
        home = run_dir / f"round_{number}"
        for path in ("rm_1/model/meta.json", "rm_2/metrics.jsonl", "reference.jsonl", "attack/samples.jsonl"):
            assert (home / path).exists(), f"{home.name}/{path}"
        assert set(json.loads((home / "attack" / "summary.json").read_text())["directions"]) == {"1", "2"}
    pairs = [json.loads(line) for line in (run_dir / "round_0" / "pairs.jsonl").read_text().splitlines()]
    assert pairs and {"round", "step", "scores", "z", "policy_checkpoint"} <= set(pairs[0]["provenance"])
    for name in ("r1", "r1_kl", "adv_rm", "hybrid"):
        rows = [json.loads(line) for line in (run_dir / "rlhf" / name / "metrics.jsonl").read_text().splitlines()]
        assert [row["step"] for row in rows] == [0, 1, 2]
        needed = {"proxy", "gold", "kl", "entropy", "approx_kl", "clipfrac", "samples_per_second", "grad_norm"}
        assert all(needed <= set(row) for row in rows)


def test_one_reward_model_alone_is_optimised_on_the_scale_of_sft_responses(finished) -> None:
    """`standardise` of an arm: the proxy is the z of R_1's score, by SFT responses of the first round."""
    run_dir, _, _ = finished
    for name in ("r1", "adv_rm", "hybrid"):
        (one,) = [json.loads(line) for line in (run_dir / "rlhf" / name / "standardisation.jsonl").open()]
        for line in (run_dir / "rlhf" / name / "metrics.jsonl").read_text().splitlines():
            row = json.loads(line)
            assert row["proxy"] == pytest.approx((row["scores/1"] - one["mean"]) / one["std"], abs=1e-4), name


def test_every_rlhf_run_starts_from_the_same_policy_and_prompts(finished) -> None:
    run_dir, _, _ = finished
    texts = [(run_dir / "rlhf" / name / "metrics.jsonl").read_text().splitlines() for name in ("r1", "adv_rm")]
    (first, *_, last), (other_first, *_, other_last) = [[json.loads(line) for line in text] for text in texts]
    for key in ("gold", "entropy", "response_length"):
        assert first[key] == other_first[key] != 0, key
    assert [row["kl"] for row in (first, other_first)] == [0, 0]
    assert last["kl"] != 0 and other_last["kl"] != 0 and last["entropy"] != other_last["entropy"]


def test_the_report_is_written_and_its_table_printed(finished) -> None:
    run_dir, _, out = finished
    summary = json.loads((run_dir / "report" / "summary.json").read_text())
    assert set(summary["rlhf"]) == {"r1", "r1_kl", "adv_rm", "hybrid"}
    assert (run_dir / "report" / "index.html").stat().st_size > 10_000
    assert list((run_dir / "report").glob("*.png"))
    assert "Area" in out and "Wall-clock" in out


def test_selected_samples_are_those_of_the_pair_store(finished) -> None:
    run_dir, _, _ = finished
    samples = [json.loads(line) for line in (run_dir / "round_0" / "attack" / "samples.jsonl").read_text().splitlines()]
    pairs = [json.loads(line) for line in (run_dir / "round_0" / "pairs.jsonl").read_text().splitlines()]
    selected = {(row["prompt_id"], row["response"]) for row in samples if row["selected"]}
    assert {(pair["provenance"]["prompt_id"], pair["rejected"]) for pair in pairs} == selected


def again(run_dir: Path, *extra: str) -> int:
    """The same command in this process, which has imported everything."""
    return cli.main(["pipeline", *SMALL, f"run_dir={run_dir}", "pipeline.jobs=1", *extra])


def test_a_finished_run_is_not_redone(finished, capsys: pytest.CaptureFixture[str]) -> None:
    run_dir, _, _ = finished
    models = {p: p.stat().st_mtime_ns for p in run_dir.rglob("*.distcp")}
    assert again(run_dir) == 0
    out = capsys.readouterr().out
    assert not [line for line in out.splitlines() if line.startswith("== ")]
    assert "report: " in out
    assert {p: p.stat().st_mtime_ns for p in run_dir.rglob("*.distcp")} == models


def test_another_configuration_is_refused(finished, capsys: pytest.CaptureFixture[str]) -> None:
    run_dir, _, _ = finished
    assert again(run_dir, "selection.max_pairs=7") == 2
    assert "selection.max_pairs" in capsys.readouterr().err


def assert_same_results(one: Path, two: Path) -> None:
    """Every model, sample and pair of `one` is in `two`, byte by byte, and each training of `one` has left a model."""
    kinds = (".distcp", "samples.jsonl", "reference.jsonl", "pairs.jsonl")
    compared = [path.relative_to(one).as_posix() for path in one.rglob("*") if path.name.endswith(kinds)]
    trained = [name for name in stages(one) if any(kind in name for kind in ("sft", "rm_", "policy_", "rlhf/"))]
    assert trained and all(any(name.startswith(f"{home}/model/") for name in compared) for home in trained)
    assert [name for name in compared if (one / name).read_bytes() != (two / name).read_bytes()] == []


def test_workers_that_go_on_after_a_kill_leave_what_one_process_leaves(finished, tmp_path: Path) -> None:
    """Attacks, selection, retraining and RLHF by two workers; the slow test below has workers from the start."""
    run_dir, at_kill, _ = finished
    assert again(tmp_path / "one", "pipeline.until=rlhf/*") == 0
    by_workers = stages(tmp_path / "one").keys() - {n for n, s in at_kill.items() if s["status"] == "complete"}
    assert {FIRST_ATTACK, "round_0/select", "round_1/rm_1", "rlhf/r1", "rlhf/adv_rm", "rlhf/hybrid"} <= by_workers
    assert_same_results(tmp_path / "one", run_dir)


@pytest.mark.slow
@pytest.mark.timeout(4 * LIMIT)
def test_workers_that_were_stopped_and_went_on_leave_what_one_process_leaves(tmp_path: Path) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    out, err = start(one, "pipeline.jobs=1").communicate(timeout=LIMIT)
    assert "report: " in out, err[-3000:]
    process = start(two, "pipeline.jobs=2")
    wait_for(process, two, "round_0/attack/direction_2_policy_1")
    workers = psutil.Process(process.pid).children()
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=LIMIT)
    assert process.returncode == 75 and "stopped by SIGTERM" in err, err[-3000:]
    assert len(workers) == 2 and not any(worker.is_running() for worker in workers)
    assert not any(stage["status"] == "complete" for name, stage in stages(two).items() if "rlhf/adv" in name)
    out, err = start(two, "pipeline.jobs=2").communicate(timeout=LIMIT)
    assert out.count("report: ") == 1, err[-3000:]
    assert_same_results(one, two)


@pytest.mark.slow
@pytest.mark.timeout(3 * LIMIT)
def test_an_error_of_one_worker_ends_the_run_with_its_message(tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    process = start(run_dir, "pipeline.jobs=2")
    wait_for(process, run_dir, "round_0/rm_2")
    (run_dir / "round_0" / "reference.jsonl").mkdir()  # in the way of the next step
    _, err = process.communicate(timeout=LIMIT)
    assert process.returncode == 2 and "error: " in err and "reference.jsonl" in err, err[-3000:]
