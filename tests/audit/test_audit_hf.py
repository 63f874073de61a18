"""An audit of a Hugging Face reward model from a Hugging Face policy, which is converted once or sampled as it is."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hf_models import tiny_hf
from hf_policies import save_policy
from hf_tokenizers import CHATML, save_hf
from reward_members import save_hf_reward

from nemo_advrm import cli
from nemo_advrm.convert import partial
from nemo_advrm.engine.runtime import Runtime


def _policy(directory: Path, family: str) -> Path:
    tiny_hf(family, vocab_size=280).save_pretrained(directory)
    return save_hf(directory, template=CHATML, eos_token="<|im_end|>", pad_token="<|endoftext|>")


def _audit(home: Path, policy: Path, attacks: str, *also: str) -> dict[str, Any]:
    prompts = home / "prompts.jsonl"
    prompts.write_text("".join(json.dumps({"prompt": f"question {i}?"}) + "\n" for i in range(6)))
    target = home / "rm"
    if not target.exists():
        save_hf_reward(target)
    words = [f"target=hf:{target}", f"policy=hf:{policy}", f"prompts={prompts}", f"run_dir={home / 'run'}"]
    sizes = ["budget=8", "num_prompts=4", "num_held_out=2", "samples_per_prompt=3", "max_new_tokens=8"]
    judge = "judge=python:audit_toys:prefers_short"
    assert cli.main(["audit", *words, *sizes, judge, f"attacks={attacks}", "accelerator=cpu", *also]) == 0
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


def test_a_policy_without_a_conversion_table_is_sampled_by_transformers(
    single: Runtime, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Attacks without RL run; one by RL is refused when it is named, and before anything is sampled."""
    policy = save_policy(tmp_path / "lm")
    summary = _audit(tmp_path, policy, "[probes,decoding]", "also=[model.encoder_seq_length=96]")
    told = capsys.readouterr().out
    assert "policy: transformers samples it, attacks by RL are left out" in told and "GPTNeoX" in told
    assert not (tmp_path / "run" / "policy").exists()
    assert [one["attack"] for one in summary["attacks"]] == ["probes", "decoding"]
    samples = (tmp_path / "run" / "attacks" / "decoding" / "rm" / "samples.jsonl").read_text().splitlines()
    assert samples and all(json.loads(line)["response"].isascii() for line in samples)
    assert summary["attacks"][0]["cells"]["rm"]["held_out"]["standard"]["trials"] == 2
    words = [f"target=hf:{tmp_path / 'rm'}", f"policy=hf:{policy}", f"prompts={tmp_path / 'prompts.jsonl'}"]
    words += ["attacks=[over_optimisation]", "accelerator=cpu", f"run_dir={tmp_path / 'rl'}", "max_new_tokens=8"]
    assert cli.main(["audit", *words, "also=[model.encoder_seq_length=96]"]) == 2
    assert "attacks: over_optimisation trains the policy, which has no conversion table" in capsys.readouterr().err
