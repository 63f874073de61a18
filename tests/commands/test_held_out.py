"""RLHF is evaluated on fixed held-out prompts, and its training is the same to the last bit with and without that."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
from reward_members import one_step_of_rl, save_megatron

from nemo_advrm import cli
from nemo_advrm.commands import rlhf
from nemo_advrm.config import load_config
from nemo_advrm.data.messages import Message, prompt_key
from nemo_advrm.engine.runtime import Runtime
from nemo_advrm.errors import ConfigError, DataError
from nemo_advrm.report.measures import measured_curve, measures_of
from nemo_advrm.rollouts.run_prompts import held_out_prompts
from nemo_advrm.training.callbacks.held_out import HeldOutEvaluation

NAMES = ("held_out/gold", "held_out/kl", "held_out/proxy")


def _rows(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def _weights(run: Path) -> dict[str, Any]:
    """Hashes of the files of the trained model's weights."""
    files = (run / "model" / "weights").glob("*.distcp")
    hashes = {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in files}
    assert hashes
    return hashes


@pytest.fixture(scope="module")
def settings(single: Runtime, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    home = tmp_path_factory.mktemp("held_out")
    prompts = home / "held_out.jsonl"
    prompts.write_text("".join(json.dumps({"prompt": p}) + "\n" for p in ("this river", "birds", "these clouds sing")))
    return [
        *one_step_of_rl(home, [save_megatron(home / "one", seed=3)]),
        f"data.held_out_prompts_path={prompts}",
        "pipeline.gold=synthetic",
        "rl.max_steps=4",
        "model.optim.lr=0.01",
        "trainer.checkpoint_every_n_steps=2",
        "rl.held_out_every=2",
    ]


@pytest.fixture(scope="module")
def evaluated(settings: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("evaluated") / "run"
    assert cli.main(["rlhf", *settings, f"run_dir={run}", "rl.held_out_prompts=8"]) == 0
    return run


def test_the_training_is_the_same_with_and_without_the_evaluation(
    settings: list[str], evaluated: Path, tmp_path: Path
) -> None:
    plain = tmp_path / "plain"
    assert cli.main(["rlhf", *settings, f"run_dir={plain}"]) == 0
    assert _weights(plain) == _weights(evaluated)
    times = ("step_seconds", "samples_per_second")
    for without, with_it in zip(_rows(plain), _rows(evaluated), strict=True):
        kept = {key: value for key, value in with_it.items() if key not in (*NAMES, *times)}
        assert kept == {key: value for key, value in without.items() if key not in times}


def test_evaluations_are_those_of_the_policy_before_the_steps_update(evaluated: Path) -> None:
    rows = _rows(evaluated)
    assert [row["step"] for row in rows if "held_out/kl" in row] == [0, 2, 3]  # every second, and the last
    assert all(name in rows[0] for name in NAMES)
    assert rows[0]["held_out/kl"] == pytest.approx(0, abs=1e-6)  # the policy that RLHF starts from
    assert abs(rows[3]["held_out/kl"]) > 1e-4
    curve = measured_curve(rows)
    assert curve is not None
    found = measures_of(curve)
    assert found["source"] == "held_out" and found["start"] == pytest.approx(rows[0]["held_out/gold"])


def test_a_training_that_goes_on_has_the_same_evaluations(
    settings: list[str], evaluated: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, evaluate = tmp_path / "run", HeldOutEvaluation._evaluate
    arguments = ["rlhf", *settings, f"run_dir={run}", "rl.held_out_prompts=8"]

    def dies_at_the_end(self: HeldOutEvaluation, policy: Any) -> dict[str, float]:
        if policy.global_step == 3:
            raise RuntimeError("killed")
        return evaluate(self, policy)

    monkeypatch.setattr(HeldOutEvaluation, "_evaluate", dies_at_the_end)
    with pytest.raises(RuntimeError, match="killed"):
        cli.main(arguments)
    assert not (run / "result.json").exists()
    monkeypatch.undo()
    assert cli.main(arguments) == 0
    assert _weights(run) == _weights(evaluated)
    for ours, theirs in zip(_rows(run), _rows(evaluated), strict=True):
        assert [ours.get(name) for name in NAMES] == [theirs.get(name) for name in NAMES]


def _prompt(text: str) -> tuple[Message, ...]:
    return (Message(role="user", content=text),)


def test_prompts_that_training_has_are_left_out(settings: list[str]) -> None:
    cfg = load_config(settings, "rlhf")
    kept = held_out_prompts(cfg, 8, [_prompt("birds"), _prompt("this garden")])
    assert [prompt[0]["content"] for prompt in kept] == ["this river", "these clouds sing"]
    assert held_out_prompts(cfg, 1, []) == [_prompt("this river")]
    with pytest.raises(DataError, match="all of its 3 prompts are training prompts"):
        held_out_prompts(cfg, 8, [*kept, _prompt("birds")])


def test_prompts_of_the_embedded_language_are_fixed_by_the_seed_and_unlike_those_of_training() -> None:
    cfg = load_config(["experiment=synthetic", "seed=3"])
    kept = held_out_prompts(cfg, 32, [])
    assert len(set(map(prompt_key, kept))) == 32
    again = held_out_prompts(cfg, 32, kept[:5])
    assert again[:27] == kept[5:] and not set(map(prompt_key, again)) & set(map(prompt_key, kept[:5]))
    cfg.seed = 4
    assert held_out_prompts(cfg, 32, []) != kept


def test_held_out_prompts_of_files_need_a_file_of_their_own() -> None:
    with pytest.raises(ConfigError, match=r"rl\.held_out_prompts=4: needs data\.held_out_prompts_path"):
        rlhf.main(
            load_config(
                [
                    *("rl.held_out_prompts=4", "data.prompts_path=prompts.jsonl", "pipeline.gold=synthetic"),
                    *("ensemble.members=[a]", "pretrained_checkpoint.restore_from_path=policy"),
                ]
            )
        )
