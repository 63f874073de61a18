"""train_rm and evaluate always say whether the reward model reads the prompt."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor

from nemo_advrm import cli
from nemo_advrm.data.tokenizers import ByteTokenizer
from nemo_advrm.training import reward_model_training

TINY = ["model=tiny", "model.num_layers=1", "model.hidden_size=32", "model.ffn_hidden_size=64"]
SMALL = [*TINY, "model.global_batch_size=4", "trainer.max_steps=1", "exp_manager.create_tensorboard_logger=false"]
WORDS = ["river", "garden", "castle", "violin"]


def trained(tmp_path: Path, capsys: pytest.CaptureFixture[str], prompts: list[str]) -> tuple[str, dict[str, float]]:
    """What a training on answers that begin with their prompt's word printed, and its result."""
    rows = [{"prompt": p, "chosen": f"{p} and {i}", "rejected": f"no {i}"} for i, p in enumerate(prompts)]
    data = tmp_path / "pairs.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    paths = [f"data.train_path={data}", f"data.validation_path={data}", f"run_dir={tmp_path / 'run'}"]
    assert cli.main(["train_rm", *SMALL, *paths]) == 0
    return capsys.readouterr().out, json.loads((tmp_path / "run" / "result.json").read_text())


def reads(sequences: list[list[int]]) -> list[float]:
    """1 where the answer begins with the word of the prompt."""
    tokenizer = ByteTokenizer()
    texts = [tokenizer.decode(tokens, skip_special=False) for tokens in sequences]
    parts = [text.partition("<assistant>") for text in texts]
    return [float(answer.startswith(prompt.split("<user>")[1].split("<")[0])) for prompt, _, answer in parts]


def plant(monkeypatch: pytest.MonkeyPatch, scores: list[float] | None = None) -> None:
    """Score with a reward model that reads the prompt, or give `scores`."""

    def score(model: object, sequences: list[list[int]], pad_id: int) -> Tensor:
        return torch.tensor(reads(sequences) if scores is None else scores)

    monkeypatch.setattr(reward_model_training, "score_sequences", score)


def test_a_reward_model_that_reads_the_prompt_is_right_in_all_mismatched_pairs(tmp_path, capsys, monkeypatch) -> None:
    plant(monkeypatch)
    out, result = trained(tmp_path, capsys, WORDS)
    assert "mismatched prompts: accuracy 1.000  (4 pairs; .5 is chance)\nreward model:" in out
    assert result["val/mismatch_accuracy"] == 1.0


def test_a_low_accuracy_on_mismatched_pairs_is_warned_of(tmp_path, capsys, monkeypatch) -> None:
    plant(monkeypatch, [1.0, 0.0, 2.0, 0.0, 0.0, 0.0, 2.0, 1.0])  # right, tied, tied, wrong
    out, result = trained(tmp_path, capsys, WORDS)
    assert result["val/mismatch_accuracy"] == 0.5
    assert "warning: the reward model hardly reads the prompt" in out


def test_one_prompt_cannot_be_mismatched_and_the_reason_is_told(tmp_path, capsys) -> None:
    out, result = trained(tmp_path, capsys, ["river"] * 4)
    assert "mismatched prompts: not measured: all rows have the same prompt" in out
    assert "val/mismatch_accuracy" not in result


def test_evaluate_measures_the_same_as_training_and_can_leave_it_out(tmp_path, capsys) -> None:
    out, _ = trained(tmp_path, capsys, WORDS)
    line = next(line for line in out.splitlines() if line.startswith("mismatched prompts: accuracy"))
    data, elsewhere = f"data.validation_path={tmp_path / 'pairs.jsonl'}", f"run_dir={tmp_path / 'evaluation'}"
    model = f"pretrained_checkpoint.restore_from_path={tmp_path / 'run' / 'model'}"
    assert cli.main(["evaluate", model, data, elsewhere]) == 0
    assert line in capsys.readouterr().out.splitlines()
    assert cli.main(["evaluate", model, data, elsewhere, "evaluate.mismatch=false"]) == 0
    assert "mismatched prompts: not measured: evaluate.mismatch=false" in capsys.readouterr().out
