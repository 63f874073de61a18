"""Ensemble members by name: parsed, refused before work, built with their own architecture and tokenizer."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from reward_members import rollouts, save_hf_reward, save_megatron
from tiny import TOKENIZER, VOCABULARY, tiny_config

from nemo_advrm.data.tokenizers import ByteTokenizer
from nemo_advrm.engine import checkpoint
from nemo_advrm.engine.model import build_model
from nemo_advrm.engine.runtime import Runtime
from nemo_advrm.errors import CheckpointError, ConfigError, LayoutError
from nemo_advrm.rewards.sources import build, check, for_scoring, load_members, parse, parse_members


@pytest.mark.parametrize(
    ("text", "kind", "location"),
    [
        ("runs/rm/model", "megatron", "runs/rm/model"),
        ("/data/rm", "megatron", "/data/rm"),
        ("megatron:runs/rm", "megatron", "runs/rm"),
        ("hf:models/rm", "hf", "models/rm"),
        ("nemo:rm.nemo", "nemo", "rm.nemo"),
        ("http://a:8000", "http", "http://a:8000"),
        ("https://a.example/rm|http://b:1", "http", "https://a.example/rm|http://b:1"),
        ("triton+http://a:5555/reward_model", "triton", "triton+http://a:5555/reward_model"),
        ("http://[::1]:8000", "http", "http://[::1]:8000"),
    ],
)
def test_a_member_is_named_by_a_path_or_a_scheme(text: str, kind: str, location: str) -> None:
    spec = parse(text, "ensemble.members[0]")
    assert (spec.kind, spec.location) == (kind, location)
    assert spec.is_remote == (kind in ("http", "triton"))


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "is empty"),
        ("hf:", "a path is missing after hf:"),
        ("huggingface:x", "did you mean"),
        ("htp://a:1", "did you mean http:"),
        ("http://", "names no host"),
        ("http://a:99999", "names no host and port"),
        ("http://a:1|b:2", "'b:2' is not the address"),
        ("http://a:1|triton+http://b:2/m", "same protocol"),
        ("triton+http://a:1", "names no model"),
    ],
)
def test_a_member_that_cannot_be_meant_is_refused_by_its_place(text: str, words: str) -> None:
    with pytest.raises(ConfigError, match=r"ensemble\.members\[1\]") as caught:
        parse_members(["runs/rm", text])
    assert words in str(caught.value)


def test_a_directory_with_a_colon_in_its_name_is_a_checkpoint(tmp_path: Path) -> None:
    (tmp_path / "a:b").mkdir()
    assert parse(f"{tmp_path}/a:b", "x").kind == "megatron"


@pytest.fixture(scope="module")
def checkpoints(single: Runtime, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    home = tmp_path_factory.mktemp("members")
    return {
        "rm": save_megatron(home / "rm"),
        "gpt": save_megatron(home / "gpt", seed=4, architecture="gpt", num_layers=2, hidden_size=16),
        "lm": save_megatron(home / "lm", head="lm"),
        "silent": save_megatron(home / "silent", meta={"tokenizer": TOKENIZER.fingerprint}),
        "hf": save_hf_reward(home / "hf"),
    }


def test_members_have_their_own_architecture_whatever_the_run_has(checkpoints: dict[str, Path]) -> None:
    cfg = tiny_config(num_layers=1, hidden_size=64, tokenizer="byte")
    members = load_members(cfg, [str(checkpoints["rm"]), f"megatron:{checkpoints['gpt']}"])
    own = load_members(tiny_config(), [str(checkpoints["rm"])], TOKENIZER)
    scores = [member.score(rollouts()) for member in members]
    torch.testing.assert_close(scores[0], own[0].score(rollouts()))
    assert members[1].model.model_config.hidden_size == 16  # type: ignore[attr-defined]
    assert (scores[0] - scores[1]).abs().min() > 1e-3


def test_a_policy_with_another_tokenizer_is_scored_by_its_text(checkpoints: dict[str, Path]) -> None:
    (member,) = load_members(tiny_config(tokenizer="byte"), [str(checkpoints["rm"])], ByteTokenizer())
    torch.testing.assert_close(member.score(rollouts(ByteTokenizer())), member.score(rollouts()))


def _spoil(source: Path, target: Path, **changes: object) -> Path:
    """A copy of a Hugging Face directory with other values in its config.json; None removes a key."""
    shutil.copytree(source, target)
    config = json.loads((target / "config.json").read_text()) | changes
    (target / "config.json").write_text(json.dumps({k: v for k, v in config.items() if v is not None}))
    return target


def test_what_is_no_reward_model_is_refused_before_work(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    hf, cfg = checkpoints["hf"], tiny_config()
    bad: list[tuple[str, str]] = [
        (str(tmp_path / "absent"), "no such checkpoint"),
        (str(checkpoints["lm"]), "head 'lm', not a reward model"),
        (str(hf), "not a complete checkpoint"),
        (f"hf:{tmp_path / 'absent'}", "no such directory"),
        (f"hf:{tmp_path}", "config.json"),
        (f"hf:{_spoil(hf, tmp_path / 'causal', architectures=['LlamaForCausalLM'])}", "not a reward model"),
        (f"hf:{_spoil(hf, tmp_path / 'two', id2label={'0': 'a', '1': 'b'})}", "2 outputs (labels)"),
        (f"hf:{_spoil(hf, tmp_path / 'default', id2label=None)}", "2 outputs (labels)"),
        (f"nemo:{tmp_path / 'x.nemo'}", "x.nemo"),
    ]
    pickled = _spoil(hf, tmp_path / "pickled")
    (pickled / "model.safetensors").rename(pickled / "pytorch_model.bin")
    bad.append((f"hf:{pickled}", "no .safetensors"))
    for text, words in bad:
        with pytest.raises(CheckpointError, match=r"ensemble\.members\[2\]") as caught:
            check(parse(text, "ensemble.members[2]"), cfg, 1)
        assert words in str(caught.value), text
    check(parse(f"hf:{hf}", "m"), cfg, 1)
    check(parse(str(checkpoints["gpt"]), "m"), cfg, 1)


def test_a_layout_that_does_not_fit_a_member_is_refused(checkpoints: dict[str, Path]) -> None:
    cfg = tiny_config(tensor_model_parallel_size=8)
    with pytest.raises(LayoutError, match=r"ensemble\.members\[0\].*num_attention_heads=4"):
        check(parse(str(checkpoints["rm"]), "ensemble.members[0]"), cfg, 8)


def test_a_checkpoint_that_does_not_name_its_tokenizer_needs_the_runs(checkpoints: dict[str, Path]) -> None:
    spec = parse(str(checkpoints["silent"]), "ensemble.members[0]")
    with pytest.raises(CheckpointError, match="does not name the tokenizer"):
        build(spec, "R_1", tiny_config(), ByteTokenizer())
    assert build(spec, "R_1", tiny_config(), TOKENIZER).score(rollouts()).shape == (4,)


def test_a_tokenizer_that_changed_since_training_is_refused(single: Runtime, tmp_path: Path) -> None:
    path = save_megatron(tmp_path / "rm", meta={"tokenizer": "0123", "tokenizer_spec": "byte"}, num_layers=1)
    with pytest.raises(CheckpointError, match="has changed since training"):
        build(parse(str(path), "m"), "R_1", tiny_config(), TOKENIZER)


def test_tokenizer_files_inside_a_checkpoint_are_its_tokenizer(single: Runtime, tmp_path: Path) -> None:
    path = save_megatron(tmp_path / "rm", meta={}, vocab_size=280)
    shutil.copytree(save_hf_reward(tmp_path / "hf"), path / "tokenizer")
    member = build(parse(str(path), "m"), "R_1", tiny_config())
    assert member.tokenizer.name == "hf:tokenizer"  # type: ignore[attr-defined]
    assert member.score(rollouts()).shape == (4,)


def test_scoring_stages_take_the_first_checkpoints_architecture(checkpoints: dict[str, Path]) -> None:
    cfg = for_scoring(tiny_config(num_layers=3), [f"hf:{checkpoints['hf']}", str(checkpoints["gpt"])])
    assert (cfg.model.num_layers, cfg.model.hidden_size) == (2, 16)


def test_a_regression_models_outputs_are_weighed(single: Runtime, tmp_path: Path) -> None:
    cfg = tiny_config(num_layers=1)
    built = build_model(
        cfg.model, cfg.precision, "reward", VOCABULARY, seed=3, trainable=False, head_outputs=2, head_init_std=0.3
    )
    path = tmp_path / "rm"
    checkpoint.save(path, built, meta={"tokenizer": TOKENIZER.fingerprint, "tokenizer_spec": "synthetic"})
    parts = load_members(cfg, [f"{path}?attributes={weights}" for weights in ("1,0", "0,1", "2,-0.5")], TOKENIZER)
    first, second, both = (member.score(rollouts()) for member in parts)
    assert (first - second).abs().min() > 1e-3
    torch.testing.assert_close(both, 2 * first - 0.5 * second)
    for text, words in ((str(path), "attributes=1,1"), (f"{path}?attributes=1", "1 weights, the head has 2 outputs")):
        spec = parse(text, "ensemble.members[1]")
        with pytest.raises(CheckpointError, match=r"ensemble\.members\[1\]") as caught:
            check(spec, cfg, 1)
        assert words in str(caught.value)
        with pytest.raises(CheckpointError):
            build(spec, "R_2", cfg, TOKENIZER)
