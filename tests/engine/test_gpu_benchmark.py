"""The GPU benchmark runs end to end on a CPU, and judges loss curves by the mean of every ten steps."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from types import ModuleType

import pytest
from distributed import World, WorldLost

from nemo_advrm.engine.runtime import Layout, Runtime

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "gpu" / "train_fp8.py"


@pytest.fixture(scope="module")
def benchmark() -> ModuleType:
    spec = importlib.util.spec_from_file_location("train_fp8", SCRIPT)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


SMALL = "--device cpu --size tiny --precision fp32 --steps 2 --batch 2 --micro-batch 1 --length 16 --fusion-steps 1"


def test_a_killed_run_keeps_what_it_measured_and_the_next_one_measures_the_rest(
    single: Runtime, benchmark: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out.json"
    arguments = [*SMALL.split(), "--out", str(out)]
    with pytest.raises(WorldLost, match="a process died"):
        World(1).run("gpu_benchmark_jobs", "killed_at_score", Layout(), script=str(SCRIPT), arguments=arguments)
    kept = json.loads(out.read_text())["results"]["fp32"]
    assert kept.keys() == {"train"} and len(kept["train"]["losses"]) == 2
    measured = []
    for name in ("train", "score", "write_responses"):
        monkeypatch.setattr(benchmark, name, lambda options, precision, n=name: measured.append(n) or {"made": n})
    monkeypatch.setattr(benchmark, "fusions_agree", lambda options, precision: {"agrees": True})
    assert benchmark.main(arguments) == 0
    report = json.loads(out.read_text())
    assert measured == ["score", "write_responses"] and report["results"]["fp32"]["train"] == kept["train"]
    assert report["fusions"] == {"agrees": True} and report["agreement"] is None
    assert benchmark.main(arguments) == 0 and len(measured) == 2  # nothing is left to do


def test_what_failed_is_measured_again(
    single: Runtime, benchmark: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fates = iter([MemoryError("no room"), {"losses": [0.5]}])

    def train(options: object, precision: str) -> dict:
        fate = next(fates)
        if isinstance(fate, Exception):
            raise fate
        return fate

    monkeypatch.setattr(benchmark, "train", train)
    for name in ("score", "write_responses", "fusions_agree"):
        monkeypatch.setattr(benchmark, name, lambda options, precision: {"agrees": True})
    arguments = [*SMALL.split(), "--out", str(tmp_path / "out.json")]
    assert [benchmark.main(arguments), benchmark.main(arguments)] == [1, 0]


@pytest.mark.parametrize(
    ("content", "words"), [("{}", "not a report"), ('{"machine": {}, "options": {}}', "of other options")]
)
def test_a_file_of_something_else_is_not_overwritten(
    single: Runtime, benchmark: ModuleType, tmp_path: Path, content: str, words: str
) -> None:
    out = tmp_path / "out.json"
    out.write_text(content)
    with pytest.raises(SystemExit, match=words):
        benchmark.main([*SMALL.split(), "--out", str(out)])
    assert out.read_text() == content


def test_it_measures_training_scoring_and_generation(single: Runtime, benchmark: ModuleType, tmp_path: Path) -> None:
    out = tmp_path / "out.json"
    options = "--device cpu --size tiny --precision fp32 --steps 12 --batch 2 --micro-batch 1 --length 16 --lr 1e-3"
    assert benchmark.main([*options.split(), "--fusion-steps", "3", "--out", str(out)]) == 0
    report = json.loads(out.read_text())
    found = report["results"]["fp32"]
    training = found["train"]
    assert len(training["losses"]) == 12 and all(norm > 0 for norm in training["grad_norms"])
    # 2 layers; a token takes 2 * 64 * (64 + 64 for queries and output, 2 * 32 for keys and values, 3 * 128), and
    # 2 * 16 * 64 for the attention to half of 16 tokens; 2 pairs of two rows of 16 tokens; backward counts twice
    assert training["model_flops_per_step"] == 3 * 2 * (2 * 64 * (128 + 64 + 384) + 2 * 16 * 64) * 64
    assert training["mfu"] is None and report["agreement"] is None
    assert len(found["score"]["scores"]) == 2 and found["score"]["tokens_per_second"] > 0
    assert found["generate"]["tokens_per_second"] > 0
    fusions = report["fusions"]
    assert fusions["active"] == [] and fusions["agrees"]  # nothing is fused on a CPU: the same steps twice
    assert fusions["losses"]["fused"] == fusions["losses"]["plain"] and len(fusions["losses"]["plain"]) == 3


def test_an_error_takes_nothing_away_from_the_other_measurements(
    single: Runtime, benchmark: ModuleType, tmp_path: Path
) -> None:
    out = tmp_path / "out.json"
    options = "--device cpu --size tiny --precision fp32 fp8_current --steps 2 --batch 1 --micro-batch 1 --length 16"
    assert benchmark.main([*options.split(), "--fusion-steps", "1", "--out", str(out)]) == 1
    results = json.loads(out.read_text())["results"]
    assert results["fp8_current"]["train"]["error"].startswith("ConfigError: ")
    assert len(results["fp32"]["train"]["losses"]) == 2 and results["fp32"]["generate"]["tokens_per_second"] > 0


def test_curves_agree_within_the_bound_on_every_window(benchmark: ModuleType) -> None:
    base = [1.0] * 20
    noisy = [1.0] * 10 + [1.1, 0.9] * 5  # the noise of single steps is not a difference
    off = [1.0] * 10 + [1.03] * 10
    results = {name: {"train": {"losses": losses}} for name, losses in (("bf16", base), ("a", noisy), ("b", off))}
    found = benchmark.agreement(results, 0.02)
    assert found["largest_gap"] == pytest.approx({"a": 0.0, "b": 0.03}) and not found["agrees"]
    assert benchmark.agreement({k: results[k] for k in ("bf16", "a")}, 0.02)["agrees"]
