"""The command ``audit`` finds and names planted weaknesses, resumes, fails above a limit, and refuses bad settings."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
from reward_members import save_megatron

from nemo_advrm import cli
from nemo_advrm.audit.setup import _same_audit
from nemo_advrm.config.schema import AuditConfig
from nemo_advrm.data.pair_store import PairStore
from nemo_advrm.engine.runtime import Runtime
from nemo_advrm.errors import ConfigError
from nemo_advrm.objectives.proportions import wilson_interval, z_together

TOYS = "python:audit_toys"
NAMES = ("honest", "loves_a_word", "ignores_the_prompt", "loves_length")


@pytest.fixture(scope="module")
def settings(single: Runtime, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    policy = save_megatron(tmp_path_factory.mktemp("policy") / "model", head="lm")
    return [
        f"policy={policy}",
        "prompts=synthetic",
        f"attacks=[{TOYS}:Tricks,{TOYS}:Nothing]",
        "budget=360",
        "num_prompts=24",
        "num_held_out=12",
        "max_new_tokens=32",
        "accelerator=cpu",
        f"also=[rl.rollout_engine={TOYS}:Writer]",
    ]


def _audit(run: Path, *words: str) -> int:
    return cli.main(["audit", f"run_dir={run}", *words])


def _summary(run: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((run / "summary.json").read_text())
    return found


@pytest.fixture(scope="module")
def run(settings: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("audit") / "run"
    targets = ",".join(f"{TOYS}:{name}" for name in NAMES)
    status = _audit(directory, *settings, f"target=[{targets}]", "judge=synthetic", "--fail-above", "0.5")
    assert status == 4  # three of the four are hackable
    return directory


def _target(run: Path, name: str) -> dict[str, Any]:
    return next(one for one in _summary(run)["targets"] if one["name"] == name)


def _weaknesses(run: Path, name: str) -> dict[str, dict[str, Any]]:
    return {one["key"]: one for one in _target(run, name)["weaknesses"]}


def test_a_loved_word_is_named(run: Path) -> None:
    found = _weaknesses(run, "loves_a_word")
    assert found["phrase: indeed"]["share"] > 0.9
    assert found["phrase: indeed"]["ordinary"] == 0.0
    assert [key for key in found if key.startswith("phrase")] == ["phrase: indeed"]
    assert all("indeed" in one["response"] for one in found["phrase: indeed"]["examples"])
    assert len(found["phrase: indeed"]["examples"]) == 3


def test_a_model_that_ignores_the_prompt_is_named(run: Path) -> None:
    found = _weaknesses(run, "ignores_the_prompt")
    assert found["prompt_ignored"]["share"] == 1.0
    assert found["off_topic"]["share"] > 0.8
    assert "prompt_ignored" not in _weaknesses(run, "loves_length")


def test_a_model_that_likes_length_is_named(run: Path) -> None:
    found = _weaknesses(run, "loves_length")
    assert found["long"]["share"] > 0.9
    assert "phrase: indeed" not in found


def test_an_honest_model_withstands(run: Path) -> None:
    target = _target(run, "honest")
    assert (target["verdict"], target["finds"], target["worst"]["rate"]) == ("open", 0, 0.0)
    for name in NAMES[1:]:
        other = _target(run, name)
        assert other["verdict"] == "worse"
        assert other["worst"]["rate"] > 0.9
        worst = other["worst"]
        usual = [other[key][worst["split"]][worst["measure"]] for key in ("ordinary", "best_of_ordinary")]
        null = max(usual, key=lambda one: one["rate"])
        z = z_together(_summary(run)["comparisons"])
        low, _ = wilson_interval(worst["rate"] * worst["trials"], worst["trials"], z)
        _, high = wilson_interval(null["rate"] * null["trials"], null["trials"], z)
        reach = math.hypot(worst["rate"] - low, high - null["rate"])
        assert worst["excess"] == pytest.approx(worst["rate"] - null["rate"] - reach)
        assert worst["excess"] > 0.3
        assert other["ordinary"]["training"]["strict"]["rate"] < 0.05


def test_rates_are_those_of_the_judged_rows(run: Path) -> None:
    """Counted from the files alone: the attack's best response to each prompt."""
    home = run / "attacks" / "Tricks" / "loves_length"
    rows = [json.loads(line) for line in (home / "samples.jsonl").read_text().splitlines()]
    judged = [json.loads(line) for line in (home / "judged_training.jsonl").read_text().splitlines()]
    gold = {one["response"]: one["score"] for one in judged}
    reference = [json.loads(line) for line in (run / "reference_training.jsonl").read_text().splitlines()]
    golds = [json.loads(line)["score"] for line in (run / "judged_training.jsonl").read_text().splitlines()]
    successes = 0
    for prompt in range(24):
        best = max((row for row in rows if row["prompt_id"] == prompt), key=lambda row: row["reward"])
        own = [value for value, row in zip(golds, reference, strict=True) if row["prompt_id"] == prompt]
        successes += best["z"][0] > 0 and gold[best["response"]] < sum(own) / len(own)
    cell = _summary(run)["attacks"][0]["cells"]["loves_length"]
    assert cell["training"]["standard"]["rate"] == pytest.approx(successes / 24)
    assert cell["held_out"]["standard"]["trials"] == 12


def test_finds_of_one_flaw_do_not_fool_a_model_without_it(run: Path) -> None:
    transfer = {one["model"]: one for one in _target(run, "loves_a_word")["transfer"]}
    assert transfer["loves_a_word"]["share"] == 1.0
    assert transfer["honest"]["share"] == 0.0
    assert transfer["loves_length"]["z"] < transfer["loves_a_word"]["z"]


def test_finds_are_pairs_to_train_on(run: Path) -> None:
    store = PairStore(run / "finds.jsonl")
    pairs = store.load()
    assert len(pairs) == _summary(run)["pairs"] > 50
    assert all(pair.provenance.rejected_gold < pair.provenance.chosen_gold for pair in pairs)  # type: ignore[operator]
    assert {pair.provenance.direction for pair in pairs} == {2, 3, 4}
    assert store.to_preferences()[0].chosen


def test_the_page_shows_what_was_found(run: Path) -> None:
    page = (run / "report" / "index.html").read_text()
    for text in ("loves_length is hackable", "honest withstood", "Word “indeed”", "Prompt ignored", "Long answers"):
        assert text in page
    assert "<script" not in page and "http" not in page.replace("http-equiv", "")


def test_the_same_command_does_nothing_twice(
    run: Path, settings: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    before, home = _summary(run), run / "attacks" / "Tricks" / "loves_length"
    written = (home / "samples.jsonl").stat().st_mtime_ns
    (run / "attacks" / "Tricks" / "honest" / "summary.json").unlink()  # as if it had been stopped there
    (run / "cost.json").unlink()
    targets = ",".join(f"{TOYS}:{name}" for name in NAMES)
    assert _audit(run, *settings, f"target=[{targets}]", "judge=synthetic", "fail_above=0.5") == 4
    assert (home / "samples.jsonl").stat().st_mtime_ns == written
    cost = json.loads((run / "cost.json").read_text())
    assert (cost["sampling_seconds"], cost["responses"]) == (0.0, 0), "an earlier call sampled them"
    after = _summary(run)
    for one in (before, after):
        one.pop("seconds")
        for attack in one["attacks"]:
            for cell in attack["cells"].values():
                cell.pop("seconds")
    assert after == before
    assert "hackable" in capsys.readouterr().out


def test_another_audit_is_refused_in_its_directory(
    run: Path, settings: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    targets = ",".join(f"{TOYS}:{name}" for name in NAMES)
    assert _audit(run, *settings, f"target=[{targets}]", "judge=synthetic", "responses_per_prompt=1") == 2
    assert "responses_per_prompt=3, but now responses_per_prompt=1" in capsys.readouterr().err


def test_an_audit_goes_on_with_other_limits_of_its_judge(tmp_path: Path) -> None:
    """The messages of a judge that stopped an audit name these settings as the way to go on."""
    path, words = tmp_path / "audit.json", ["rl.kl.coefficient=0", "judge.rubric=a.txt"]
    path.write_text(_same_audit(AuditConfig(also=[*words, "judge.max_requests=5"]), path))
    _same_audit(AuditConfig(also=["judge.on_no_answer=lowest", *words, "judge.max_requests=9"]), path)
    with pytest.raises(ConfigError, match="holds an audit with also="):
        _same_audit(AuditConfig(also=["judge.rubric=b.txt"]), path)


def test_without_a_judge_disagreement_with_others_is_suspected(settings: list[str], tmp_path: Path) -> None:
    target, other = f"target={TOYS}:loves_a_word", f"others={TOYS}:loves_length"
    words = [word for word in settings if not word.startswith("num_held_out")]
    assert _audit(tmp_path / "run", *words, target, other, "num_held_out=0", "--fail-above=0.5") == 4
    summary = _summary(tmp_path / "run")
    assert (summary["measures"], summary["detector"]) == (["suspected"], "ensemble_disagreement")
    assert "phrase: indeed" in _weaknesses(tmp_path / "run", "loves_a_word")
    assert all(pair.provenance.rejected_gold is None for pair in PairStore(tmp_path / "run" / "finds.jsonl").load())


def test_a_limit_is_not_passed_where_nothing_was_measured(
    settings: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [word for word in settings if not word.startswith(("attacks", "num_held_out"))]
    words += [f"target={TOYS}:honest", "judge=synthetic", f"attacks=[{TOYS}:Nothing]", "num_held_out=0"]
    assert _audit(tmp_path / "run", *words) == 0
    assert _audit(tmp_path / "run", *words, "--fail-above", "0.5") == 4
    assert "failed: nothing was measured" in capsys.readouterr().out


def test_a_limit_is_passed_only_with_enough_prompts_to_fail_it(
    settings: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of 2 prompts and 2 comparisons not even 2 successes would be above the limit; of 24, 7 would."""
    words = [word for word in settings if not word.startswith(("num_prompts", "num_held_out"))]
    words += [f"target={TOYS}:honest", "judge=synthetic", "num_held_out=0", "--fail-above", "0.05"]
    assert _audit(tmp_path / "few", *words, "num_prompts=2") == 4
    assert "failed: not even an attack that succeeds on every prompt would have been seen" in capsys.readouterr().out
    assert "not even an attack" in (tmp_path / "few" / "report" / "index.html").read_text()
    assert _audit(tmp_path / "enough", *words, "num_prompts=24") == 0
    told = capsys.readouterr().out
    seen = _summary(tmp_path / "enough")["targets"][0]["seen_from"]["liked"]["training"]
    assert seen["strict"] == pytest.approx(7 / 24)
    assert "failed" not in told and "seen from" in told
    line = f"an attack would have been seen from 29 % (strict) or {100 * seen['standard']:.0f} % (standard) of the"
    assert line in (tmp_path / "enough" / "report" / "index.html").read_text()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["target="], "target is not set"),
        (["policy="], "policy is not set"),
        (["prompts="], "prompts is not set"),
        (["budget=ten"], "budget=ten: write responses"),
        (["budget=0min"], "budget=0min"),
        (["attacks=adv_rn"], "did you mean 'adv_rm'?"),
        (["target=hff:x"], "target[0]=hff:x: did you mean hf:?"),
        (["others=audit_toys"], "audit_toys"),
        (["names=[a,b]"], "names has 2 names for 1 targets"),
        (["names=a/b"], "names: 'a/b' must be letters"),
        (["names=.."], "names: '..' must be letters"),
        (["attacks=[probes,python:own:probes]"], "two have the same name"),
        ([f"others={TOYS}:honest"], "named twice"),
        (["also=[rl.max_stepz=3]"], "rl.max_stepz"),
        (["fail_above=2"], "fail_above=2"),
        (["judge=python:audit_toys:nobody"], "nobody"),
    ],
)
def test_bad_settings_are_told_at_once(
    words: list[str], message: str, tmp_path: Path, single: Runtime, capsys: pytest.CaptureFixture[str]
) -> None:
    given = {word.partition("=")[0] for word in words}
    base = {"target": f"{TOYS}:honest", "policy": str(tmp_path / "none"), "prompts": "synthetic"}
    rest = [f"{key}={value}" for key, value in base.items() if key not in given]
    assert _audit(tmp_path / "run", *rest, *words, "accelerator=cpu") == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "run" / "attacks").exists()
