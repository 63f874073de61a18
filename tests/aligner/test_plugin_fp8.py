"""Our reward model for FP8, as far as a machine without FP8 can show it: it computes nothing in FP8 here."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import plugin
import pytest

TEXTS = ["the cat", "why the red house good answer with big blue tree and dog", "no"]


@pytest.fixture(scope="module")
def found(
    aligner: Callable[..., list[Any]], files: plugin.Files, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Any]:
    out = tmp_path_factory.mktemp("fp8") / "saved.nemo"
    job = {"path": str(files.reward_models[0]), "out": str(out), "texts": TEXTS}
    (answer,) = aligner(("fp8_jobs.compare", job))
    return answer


def test_with_fp8_off_it_is_the_stock_class(found: dict[str, Any]) -> None:
    assert found["ours"] == found["stock"] and len(set(found["stock"])) == len(TEXTS)
    assert found["ours_names"] == found["stock_names"] and "model.rm_head.weight" in found["stock_names"]


def test_only_the_refusal_of_fp8_is_lifted(found: dict[str, Any]) -> None:
    assert found["refused_by_stock"] == "AssertionError: fp8 is not supported for the reward model"
    assert found["fp8_names"] == found["stock_names"]
    assert found["config"] == ["hybrid", 16, "max"] and found["head"] == "torch.float32"
    # what it saves opens in the stock class, by its name and with equal scores
    assert found["saved"] == found["stock"]
    assert found["target"].endswith(".megatron_gpt_reward_model.MegatronGPTRewardModel")


def test_tokens_are_padded_to_a_multiple_of_16_without_a_change_of_the_rewards(found: dict[str, Any]) -> None:
    assert any(length % 16 for length, _ in found["rewards"])
    for (before, reward), (after, padded) in zip(found["rewards"], found["padded"], strict=True):
        assert after % 16 == 0 and 0 <= after - before < 16
        assert padded == pytest.approx(reward, abs=1e-5)


def test_what_is_missing_is_told(found: dict[str, Any]) -> None:
    needs = "ConfigError: model.fp8=True needs Transformer Engine, which"
    assert found["refused_without_engine"] == f"{needs} is off (model.transformer_engine)"
    assert found["refused_without_its_package"] == f"{needs} is not installed (pip install 'nemo_advrm[gpu]')"
    told = ("model.fp8=True needs a format", "model.force_head_dtype=bf16", "model.encoder_seq_length=40 leaves 40")
    assert all(start in message for start, message in zip(told, found["refused"], strict=True))
