"""An audit of a Hugging Face reward model from a Hugging Face policy, which is converted once or sampled as it is."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hf_models import tiny_hf
from hf_tokenizers import CHATML, save_hf
from reward_members import save_hf_reward

from nemo_advrm import cli
from nemo_advrm.convert import partial
from nemo_advrm.engine.runtime import Runtime


def _policy(directory: Path, family: str) -> Path:
    tiny_hf(family, vocab_size=280).save_pretrained(directory)
    return save_hf(directory, template=CHATML, eos_token="<|im_end|>", pad_token="<|endoftext|>")


def _audit(home: Path, policy: Path, attacks: str) -> dict[str, Any]:
    prompts = home / "prompts.jsonl"
    prompts.write_text("".join(json.dumps({"prompt": f"question {i}?"}) + "\n" for i in range(6)))
    target = home / "rm"
    if not target.exists():
        save_hf_reward(target)
    words = [f"target=hf:{target}", f"policy=hf:{policy}", f"prompts={prompts}", f"run_dir={home / 'run'}"]
    sizes = ["budget=8", "num_prompts=4", "num_held_out=2", "samples_per_prompt=3", "max_new_tokens=8"]
    judge = "judge=python:audit_toys:prefers_short"
    assert cli.main(["audit", *words, *sizes, judge, f"attacks={attacks}", "accelerator=cpu"]) == 0
    found: dict[str, Any] = json.loads((home / "run" / "summary.json").read_text())
    return found


def test_a_policy_is_converted_once(single: Runtime, tmp_path: Path) -> None:
    policy = _policy(tmp_path / "lm", "llama3")
    summary = _audit(tmp_path, policy, "[over_optimisation]")
    assert summary["detector"] == "mahalanobis"
    assert summary["attacks"][0]["cells"]["rm"]["training"]["standard"]["trials"] <= 4
    meta = tmp_path / "run" / "policy" / "meta.json"
    converted = meta.stat().st_mtime_ns
    again = _audit(tmp_path, policy, "[over_optimisation]")
    assert meta.stat().st_mtime_ns == converted
    assert again["attacks"] == summary["attacks"]


def test_a_full_disk_is_one_error_and_not_another_engine(
    single: Runtime, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(partial.shutil, "disk_usage", lambda _: SimpleNamespace(free=1000))
    policy = _policy(tmp_path / "lm", "llama3")
    capsys.readouterr()  # the progress of saving
    words = [f"policy=hf:{policy}", "prompts=synthetic", "target=python:audit_toys:honest", "accelerator=cpu"]
    assert cli.main(["audit", *words, f"run_dir={tmp_path / 'run'}"]) == 2
    told = capsys.readouterr()
    assert "is converted for the attacks by RL" in told.err and "the disk has only 0.00 GB free" in told.err
    assert "transformers samples it" not in told.out
    assert len(told.err.strip().splitlines()) == 1
