"""``DIR?head=2``: members that share a trunk are scored in one pass, and each is the model it would be alone."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from reward_members import rollouts, save_megatron
from safetensors.torch import load_file
from tiny import TOKENIZER, VOCABULARY, tiny_config

from nemo_advrm.config.schema import Config, ConvertConfig
from nemo_advrm.convert.conversion import convert
from nemo_advrm.engine import checkpoint
from nemo_advrm.engine.model import build_model
from nemo_advrm.engine.runtime import Runtime
from nemo_advrm.errors import CheckpointError, ConfigError
from nemo_advrm.plan.jobs import job_of
from nemo_advrm.rewards.detector_features import FeatureReader
from nemo_advrm.rewards.shared_trunk import HeadReward
from nemo_advrm.rewards.sources import check, load_members, parse
from nemo_advrm.rollouts.types import Rollouts
from nemo_advrm.training.hardening_target import describe_target

HEADS = 3


@pytest.fixture(scope="module")
def trunk(single: Runtime, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of three members on one trunk."""
    path = tmp_path_factory.mktemp("trunk") / "model"
    cfg = tiny_config()
    model = build_model(
        cfg.model, cfg.precision, "reward", VOCABULARY, seed=3, trainable=False, head_outputs=HEADS, heads=HEADS
    )
    checkpoint.save(path, model, meta={"tokenizer": TOKENIZER.fingerprint, "tokenizer_spec": "synthetic"})
    return path


def _all(trunk: Path) -> list[str]:
    return [f"{trunk}?head={k}" for k in range(1, HEADS + 1)]


def _others() -> Rollouts:
    """The same rows but for the first response."""
    rows = rollouts()
    rows.response_tokens[0], rows.responses[0] = rows.response_tokens[2], rows.responses[2]
    return rows


def _convert(path: str, to: str, out: Path) -> Path:
    convert(ConvertConfig(from_="megatron", path=path, to=to, out=str(out)), report=lambda _: None)
    return out


def _passes(member: Any) -> int:
    assert isinstance(member, HeadReward)
    return member.trunk.passes


def test_all_heads_are_scored_in_one_pass_as_the_models_that_they_are_alone(trunk: Path, tmp_path: Path) -> None:
    cfg = tiny_config()
    members = load_members(cfg, _all(trunk), TOKENIZER)
    alone = [str(_convert(name, "megatron", tmp_path / f"head_{k}")) for k, name in enumerate(_all(trunk))]
    assert json.loads(Path(alone[0], "meta.json").read_text())["head_outputs"] == 1
    expected = torch.stack([member.score(rollouts()) for member in load_members(cfg, alone, TOKENIZER)], -1)
    found = FeatureReader(members).read(rollouts()).scores_NK
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)
    assert len({tuple(column) for column in found.T.tolist()}) == HEADS
    assert [_passes(member) for member in members] == [1] * HEADS


def test_other_rows_are_scored_anew_and_the_same_rows_are_not(trunk: Path) -> None:
    first, second, _ = load_members(tiny_config(), _all(trunk), TOKENIZER)
    before = first.score(rollouts())
    assert first.score(_others())[0] != before[0] and _passes(first) == 2
    second.score(rollouts())
    assert torch.equal(first.score(rollouts()), before) and _passes(first) == 3


def test_hidden_states_come_from_the_pass_that_scores(trunk: Path) -> None:
    members = load_members(tiny_config(), _all(trunk), TOKENIZER)
    reader = FeatureReader(members, ["mahalanobis"], [1])
    reader.read(rollouts())
    passes = _passes(members[0])
    found = reader.read(_others())
    assert _passes(members[0]) == passes + 1, "once they were asked for they are read for all"
    weight_KH = members[0].trunk.model.parts[0].head.weight  # type: ignore[attr-defined]
    torch.testing.assert_close(found.hidden_states[1] @ weight_KH.T, found.scores_NK, rtol=1e-4, atol=1e-5)


def test_a_head_is_exported_to_hugging_face(trunk: Path, tmp_path: Path) -> None:
    out = _convert(f"{trunk}?head=2", "hf", tmp_path / "hf")
    member = load_members(tiny_config(), [f"{trunk}?head=2"], TOKENIZER)[0]
    weight = member.trunk.model.parts[0].head.weight[1:2]  # type: ignore[attr-defined]
    assert torch.equal(load_file(out / "model.safetensors")["score.weight"], weight)
    assert f"Converted from: megatron:{trunk}?head=2" in (out / "README.md").read_text()


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("", "holds 3 members on one trunk: name"),
        ("?head=4", "there is no head 4, the checkpoint holds 3"),
    ],
)
def test_a_member_that_is_not_named_or_not_there_is_refused(
    trunk: Path, tmp_path: Path, option: str, message: str
) -> None:
    for refused in (
        lambda: check(parse(f"{trunk}{option}", "member"), tiny_config(), 1),
        lambda: load_members(tiny_config(), [f"{trunk}{option}"], TOKENIZER),
        lambda: _convert(f"{trunk}{option}", "hf", tmp_path / "out"),
    ):
        with pytest.raises(CheckpointError, match=message):
            refused()


@pytest.mark.parametrize("text", ["DIR?head=0", "DIR?head=x", "DIR?head=1&attributes=2", "hf:DIR?head=1"])
def test_a_head_that_cannot_be_meant_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="head"):
        parse(text, "member")


def test_a_single_model_is_its_own_first_head(single: Runtime, tmp_path: Path) -> None:
    path = save_megatron(tmp_path / "one")
    one, named = load_members(tiny_config(), [str(path), f"{path}?head=1"], TOKENIZER)
    assert torch.equal(one.score(rollouts()), named.score(rollouts()))
    with pytest.raises(CheckpointError, match="there is no head 2, the checkpoint holds 1"):
        check(parse(f"{path}?head=2", "member"), tiny_config(), 1)


def test_a_head_is_not_hardened_alone(trunk: Path) -> None:
    cfg = tiny_config()
    cfg.harden.target = f"{trunk}?head=2"
    with pytest.raises(CheckpointError, match="convert it to a model of its own first"):
        describe_target(cfg)


def test_the_plan_counts_one_trunk(trunk: Path) -> None:
    def models(stage: str, members: list[str], share: str = "none") -> list[tuple[str, int]]:
        cfg: Config = tiny_config()
        cfg.plan.stage, cfg.ensemble.share, cfg.ensemble.size, cfg.ensemble.members = stage, share, 5, members
        job = job_of(cfg, 1, VOCABULARY)
        return [(held.title, held.count) for held in job.models] + [("outputs", job.head_outputs)]

    assert models("train_rm", [], "trunk") == [("reward model", 1), ("outputs", 5)]
    assert models("attack", [], "trunk")[-2:] == [("reward model", 1), ("outputs", 5)]
    assert models("attack", [])[-2:] == [("reward model", 5), ("outputs", 1)]
    assert models("attack", [*_all(trunk), "other", "other", "http://a:1"])[-2:] == [
        ("reward model", 3),
        ("outputs", 1),
    ]
