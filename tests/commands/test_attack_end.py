"""An attack ends when it has found enough, also after a restart, and is measured on prompts that it has not seen."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from reward_members import PROMPTS, one_step_of_rl, save_megatron
from tiny import TOKENIZER

from nemo_advrm import cli
from nemo_advrm.attacks.attack_summary import line, success_rates
from nemo_advrm.attacks.held_out_success import HeldOut
from nemo_advrm.attacks.summary_file import RATES
from nemo_advrm.commands import attack as attack_stage
from nemo_advrm.config import load_config
from nemo_advrm.data.jsonl import read_jsonl
from nemo_advrm.data.pair_store import PairStore
from nemo_advrm.data.sft_scores import SFTScores
from nemo_advrm.engine.runtime import Runtime
from nemo_advrm.errors import ConfigError
from nemo_advrm.objectives.selection import first_step
from nemo_advrm.rewards.find_rule import FindRule
from nemo_advrm.training.callbacks.metrics_writer import MetricsWriter

Row = dict[str, Any]
STEPS, SFT, LAST = 8, 8, 0.7


@pytest.fixture(scope="module")
def settings(single: Runtime, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    home = tmp_path_factory.mktemp("attack")
    held_out = home / "held_out.jsonl"
    held_out.write_text("".join(json.dumps({"prompt": p}) + "\n" for p in ("birds", PROMPTS[0], "these clouds sing")))
    return [
        *one_step_of_rl(home, [save_megatron(home / name, seed=seed) for name, seed in (("one", 3), ("two", 4))]),
        f"data.held_out_prompts_path={held_out}",
        "pipeline.gold=synthetic",
        f"rl.max_steps={STEPS}",
        "rl.max_new_tokens=16",
        f"sft_statistics.samples_per_prompt={SFT}",  # of which some end, and can be chosen
        "rl.apply_unended_penalty=false",
        "trainer.checkpoint_every_n_steps=3",
        "model.optim.lr=0.001",
        "selection.require_ended=false",
        "selection.threshold_z=-100",
        f"selection.last_fraction={LAST}",
    ]


def attack(settings: list[str], run: Path, *more: str) -> Row:
    assert cli.main(["attack", *settings, f"run_dir={run}", *more]) == 0
    summary: Row = json.loads((run / "attack" / "summary.json").read_text())
    return summary


def rows_of(run: Path, name: str = "attack/samples.jsonl") -> list[Row]:
    return [row for _, row in read_jsonl(run / name)]


@pytest.fixture(scope="module")
def whole(settings: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run whose attack makes all its steps and is measured on held-out prompts."""
    run = tmp_path_factory.mktemp("whole") / "run"
    summary = attack(settings, run, "adversarial.held_out_prompts=5")
    assert summary["directions"]["1"]["steps"] == STEPS
    return run


def finds_after(run: Path, settings: list[str]) -> list[int]:
    """Different finds in the last part of the steps, had the attack ended after each."""
    cfg = load_config(settings, "attack")
    rule = FindRule(cfg, SFTScores.read(run / "reference.jsonl"), 1, TOKENIZER)
    rows = rows_of(run)
    counts = []
    for steps in range(1, STEPS + 1):
        last = [row for row in rows if first_step(steps, LAST) <= row["step"] < steps]
        counts.append(len(rule.finds(last)))
    return counts


@pytest.mark.long
def test_an_attack_ends_at_the_step_after_which_it_has_enough_also_when_it_was_killed_on_the_way(
    settings: list[str], whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    counts = finds_after(whole, settings)
    # a step after the checkpoint of step 3 at which there are more than ever before
    end = next(end for end in range(4, STEPS) if counts[end - 1] > max(counts[: end - 1]))
    enough = counts[end - 1]
    early = tmp_path / "early"
    summary = attack(settings, early, f"adversarial.enough={enough}")
    assert summary["directions"]["1"]["steps"] == end
    assert rows_of(early) == [row for row in rows_of(whole) if row["step"] < end]
    assert [row["finds"] for row in rows_of(early, "attack/metrics.jsonl")] == counts[:end]

    write, broken = MetricsWriter.on_train_batch_end, tmp_path / "broken"

    def dies(self: MetricsWriter, trainer: Any, *more: Any) -> None:
        if trainer.global_step == end:  # after the checkpoint of step 3
            raise RuntimeError("killed")
        write(self, trainer, *more)

    with monkeypatch.context() as patch:
        patch.setattr(MetricsWriter, "on_train_batch_end", dies)
        with pytest.raises(RuntimeError, match="killed"):
            attack(settings, broken, f"adversarial.enough={enough}")
    assert len(rows_of(broken, "attack/direction_1_policy_1/metrics.jsonl")) == end - 1
    again = attack(settings, broken, f"adversarial.enough={enough}")
    assert again["directions"]["1"]["steps"] == end
    assert rows_of(broken) == rows_of(early)
    assert [row["finds"] for row in rows_of(broken, "attack/metrics.jsonl")] == counts[:end]


def test_an_attack_that_finds_no_more_than_sft_responses_give_goes_on(settings: list[str], tmp_path: Path) -> None:
    summary = attack(settings, tmp_path / "run", "adversarial.enough=1", "selection.null_ratio=1000", "rl.max_steps=2")
    assert summary["directions"]["1"]["steps"] == 2


def test_each_of_two_adversaries_finds_its_half(settings: list[str], tmp_path: Path) -> None:
    run = tmp_path / "run"
    attack(settings, run, "adversarial.enough=4", "adversarial.num_adversaries=2")
    for number in (1, 2):
        rows = rows_of(run, f"attack/direction_1_policy_{number}/metrics.jsonl")
        assert rows[-1]["finds"] >= 2 and all(row["finds"] < 2 for row in rows[:-1])


def test_the_finished_adversary_is_measured_on_other_prompts_beside_sft_responses(
    settings: list[str], whole: Path
) -> None:
    summary = json.loads((whole / "attack" / "summary.json").read_text())["directions"]["1"]
    found = summary["held_out"]
    rows = rows_of(whole, "attack/direction_1_policy_1/held_out.jsonl")
    sft = rows_of(whole, "attack/held_out_reference.jsonl")
    assert {row["prompt"] for row in sft} == {"birds", "these clouds sing"}, "not the one that the attack has"
    assert (found["prompts"], found["responses"], len(sft)) == (2, 2 * SFT, 2 * SFT)
    for key in ("prompt_id", "prompt"):
        assert [row[key] for row in rows] == [row[key] for row in sft]

    def share(mine: list[Row], others: Any) -> float:
        """Standard success of ``mine`` against the mean of ``others`` of a row."""
        right = 0
        for row in mine:
            mates = others(row)
            score = sum(mate["scores"][0] for mate in mates) / len(mates)
            gold = sum(mate["gold"] for mate in mates) / len(mates)
            right += row["scores"][0] > score and row["gold"] < gold
        return right / len(mine)

    def of_prompt(row: Row) -> list[Row]:
        return [mate for mate in sft if mate["prompt_id"] == row["prompt_id"] and mate is not row]

    assert found["success_standard"] == pytest.approx(share(rows, of_prompt))
    assert found["null"]["success_standard"] == pytest.approx(share(sft, of_prompt))
    assert found["gold"] == pytest.approx(sum(row["gold"] for row in rows) / len(rows))
    strict = sum(row["z"][0] > 0 and row["gold_z"] < -1.96 for row in rows) / len(rows)
    assert found["success_strict"] == pytest.approx(strict)
    assert set(found) == {"prompts", "responses", "null", *RATES} and set(found["null"]) == set(RATES)
    assert "finished adversary on 2 held-out prompts: success" in line("1", summary)
    rates = success_rates(whole / "attack" / "summary.json", "")
    assert rates == [found["success_standard"]], "the rounds are judged by the finished adversary"


def test_measuring_leaves_the_attack_as_it_is(settings: list[str], whole: Path, tmp_path: Path) -> None:
    attack(settings, tmp_path / "run")
    assert rows_of(tmp_path / "run") == rows_of(whole)


def test_fresh_sft_responses_succeed_as_often_as_the_null_rate_says() -> None:
    """Scores and gold are unrelated here, so that a quarter of SFT responses has standard success."""
    generator = torch.Generator().manual_seed(0)
    prompts, count = 3000, 3
    hard_P1K = 3 * torch.randn(prompts, 1, 3, generator=generator)
    sft_PNK = hard_P1K + torch.randn(prompts, count, 3, generator=generator)
    fresh_PNK = hard_P1K + torch.randn(prompts, count, 3, generator=generator)
    names = [[f"sft {p} {i}" for i in range(count)] for p in range(prompts)]
    reference = SFTScores([()] * prompts, names, sft_PNK[..., :2], sft_PNK[..., 2])
    cfg = load_config(["model=tiny"])
    held_out = HeldOut(cfg, TOKENIZER, [], [], reference, None)
    null = held_out.null(FindRule(cfg, reference, 1, TOKENIZER))
    index = [p for p in range(prompts) for _ in range(count)]
    z_N = (fresh_PNK[..., 0].flatten() - reference.prompt_mean(index)[:, 0]) / reference.statistics().std_K[0]
    gold_N = fresh_PNK[..., 2].flatten()
    fresh = held_out._rates(z_N, gold_N, reference.gold_z(gold_N, index), 0.0)
    for key, expected in (("success_standard", 0.25), ("success_strict", 0.025 / 2)):
        assert null[key] == pytest.approx(expected, rel=0.2)
        assert fresh[key] == pytest.approx(expected, rel=0.2)


def test_over_optimisation_pairs_come_from_an_adversary_that_is_paid_by_the_target_alone(
    settings: list[str], tmp_path: Path
) -> None:
    run = tmp_path / "run"
    summary = attack(settings, run, "adversarial.coefficient=0", "rl.max_steps=3", "adversarial.penalty=-4")
    assert summary["by_disagreement"] is False
    rows = rows_of(run)
    assert {row["z"][0] > 0 for row in rows} == {True, False}
    for row in rows:
        assert row["reward"] == pytest.approx(row["z"][0] if row["z"][0] > 0 else -4.0)
    keys = ["model.tokenizer=synthetic", "selection.require_ended=false", "selection.threshold_z=0.5"]
    select = ["select", f"run_dir={run}", *keys]
    assert cli.main([*select, "adversarial.coefficient=0"]) == 0
    pairs = PairStore(run / "pairs.jsonl").load()
    assert pairs
    z = [pair.provenance.z[0] for pair in pairs]
    assert z == sorted(z, reverse=True) and min(z) > 0.5, "the rule and the ranking are those of the target's z"
    assert cli.main(select) == 2, "the rule of another attack"


def test_held_out_prompts_of_files_need_a_file_of_their_own() -> None:
    with pytest.raises(ConfigError, match=r"adversarial\.held_out_prompts=4: needs data\.held_out_prompts_path"):
        attack_stage.main(
            load_config(
                [
                    *("adversarial.held_out_prompts=4", "data.prompts_path=prompts.jsonl", "ensemble.members=[a,b]"),
                    "pretrained_checkpoint.restore_from_path=policy",
                ]
            )
        )
