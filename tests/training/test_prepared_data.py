"""A training gets the same rows and batches from the cache as from memory, and a node reads the text once."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import prepared_data_jobs
import pytest
from distributed import Worlds

from nemo_advrm.config import load_config
from nemo_advrm.data import token_cache
from nemo_advrm.data.tokenizers import build_tokenizer
from nemo_advrm.engine.runtime import Layout, Runtime
from nemo_advrm.training import prepared_data
from nemo_advrm.training.prepared_data import sft_data
from nemo_advrm.training.reward_model_training import bootstrap, keep_back


def settings(home: Path, *more: str) -> list[str]:
    path = home / "pairs.jsonl"
    if not path.exists():
        rows: list[dict[str, Any]] = [
            {"prompt": f"q {i % 20}", "chosen": f"good {i} " * (i % 3 + 1), "rejected": f"bad {i}"} for i in range(40)
        ]
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    common = ["trainer.max_epochs=2", "model.global_batch_size=8", "data.validation_fraction=0.2"]
    return [f"data.train_path={path}", f"data.cache_dir={home / 'cache'}", *common, *more]


def test_rows_batches_and_lines_are_those_without_a_cache(
    single: Runtime, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    features = "reward_model.reference_features=[prompt_gain]", "reward_model.feature_prompts=3"
    found, lines = [], []
    for cache in (["data.cache_dir=null"], [], []):
        found.append(prepared_data_jobs.prepare([*settings(tmp_path, *features), *cache]))
        lines.append(capsys.readouterr().out)
    assert [one["read"] for one in found] == [True, True, False]
    assert [one["kind"] for one in found] == ["list", "StoredRows", "StoredRows"]
    assert found[0]["rows"] == found[1]["rows"] == found[2]["rows"]
    assert "40 rows" in lines[0] and lines[0] == lines[1] == lines[2]


def test_bad_rows_are_named_as_without_a_cache(single: Runtime, tmp_path: Path) -> None:
    for more in (["model.encoder_seq_length=16"], ["data.format=ranked"]):
        found = [
            prepared_data_jobs.prepare([*settings(tmp_path, *more), *cache])["error"]
            for cache in (["data.cache_dir=null"], [])
        ]
        assert found[0] == found[1] and "pairs.jsonl:" in found[0]
    assert not [path for path in (tmp_path / "cache").iterdir() if path.name != "hashes"]


def test_one_process_of_a_node_reads_the_text_and_all_get_its_rows_or_its_error(
    single: Runtime, worlds: Worlds, tmp_path: Path
) -> None:
    alone = prepared_data_jobs.prepare(settings(tmp_path, "data.cache_dir=null"))["rows"]
    for reads in ([True, False], [False, False]):
        found = worlds.run(Layout(), "prepared_data_jobs", "prepare", 2, settings=settings(tmp_path))
        assert [one["read"] for one in found] == reads
        for one in found:
            assert one["rows"][:2] == alone[:2]
    steps = [[one["rows"][2][step] for one in found] for step in range(len(alone[2]))]
    for own, whole in zip(steps, alone[2], strict=True):
        assert sorted(row.source for part in own for row in part) == sorted(row.source for row in whole)
    bad = worlds.run(
        Layout(), "prepared_data_jobs", "prepare", 2, settings=settings(tmp_path, "model.encoder_seq_length=16")
    )
    assert bad[0] == bad[1] and "pairs.jsonl:" in bad[0]["error"]


def test_parts_of_stored_pairs_are_those_of_pairs_in_memory(
    single: Runtime, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(token_cache, "LEAST_BYTES", 1)
    parts = []
    for cache in ([], ["data.cache_dir=null"]):
        cfg = load_config(["model=tiny", *settings(tmp_path), *cache], "train_rm")
        cfg.reward_model.reference_features = ["log_prob"]
        cfg.reward_model.feature_share = 0.3
        data = prepared_data.preference_data(cfg, build_tokenizer(cfg.model.tokenizer))
        made = keep_back(cfg, data), bootstrap(data, 5)
        parts.append([(list(one.train), list(one.held_out)) for one in made])
    assert parts[0] == parts[1] and all(part for one in parts[0] for part in one)


def test_sft_rows_come_from_the_cache_too(
    single: Runtime, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(token_cache, "LEAST_BYTES", 1)
    found, lines = [], []
    for cache in (["data.cache_dir=null"], [], []):
        cfg = load_config(["model=tiny", *settings(tmp_path), *cache], "sft")
        found.append(list(sft_data(cfg, build_tokenizer(cfg.model.tokenizer))))
        lines.append(capsys.readouterr().out)
        monkeypatch.setattr(prepared_data, "sft_rows", prepared_data.sft_rows if len(found) < 2 else None)
    assert found[0] == found[1] == found[2] and lines[0] == lines[1] == lines[2]
