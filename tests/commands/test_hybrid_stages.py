"""The hybrid reward from training to scoring: train_rm fits and stores it, other stages take it by its directory."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from reward_members import PROMPTS, one_step_of_rl, save_megatron
from tiny import tiny_config

from nemo_advrm import cli
from nemo_advrm.data.encoding import encode_pairs
from nemo_advrm.data.preference_rows import PreferencePair
from nemo_advrm.data.sft_scores import SFTScores
from nemo_advrm.data.tokenizers import ByteTokenizer
from nemo_advrm.engine import manifest
from nemo_advrm.engine.feature_file import FILE, FeatureWeights, policy_fingerprint
from nemo_advrm.engine.runtime import Runtime
from nemo_advrm.errors import ConfigError
from nemo_advrm.rewards.hybrid import fixed_prompts, frozen_policy
from nemo_advrm.rewards.sources import load_members
from nemo_advrm.rollouts.types import Rollouts
from nemo_advrm.synthetic.tokenizer import SyntheticTokenizer
from nemo_advrm.training import reward_model_training
from nemo_advrm.training.reward_model_training import EncodedPreferences, bootstrap, evenly_spread, keep_back

TOKENIZER = ByteTokenizer()
BYTES = {"meta": {"tokenizer": TOKENIZER.fingerprint, "tokenizer_spec": "byte"}, "vocab_size": 264, "num_layers": 1}
NOUNS = ("river", "garden", "baker", "sailor", "cloud", "teacher")
KEYS = ("num_layers", "hidden_size", "num_attention_heads", "num_query_groups", "ffn_hidden_size")


def preference_rows(count: int) -> list[PreferencePair]:
    """Two rows to a prompt."""
    texts = [f"{first} {noun}" for noun in NOUNS for first in ("this", "this old", "this small")]
    prompts = [({"role": "user", "content": texts[i // 2 % len(texts)]},) for i in range(count)]
    return [
        PreferencePair(p, f"{p[0]['content']} sleeps .", "birds sing .", source=f"row {i}")
        for i, p in enumerate(prompts)
    ]


@pytest.fixture(scope="module")
def trained(single: Runtime, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[str], str]:
    """A finished train_rm with features, the arguments that name its data, and what it printed."""
    import contextlib
    import io

    home = tmp_path_factory.mktemp("hybrid_stages")
    save_megatron(home / "policy", seed=5, head="lm", **BYTES)
    data = home / "pairs.jsonl"
    rows = [{"prompt": r.prompt[0]["content"], "chosen": r.chosen, "rejected": r.rejected} for r in preference_rows(36)]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    cfg = tiny_config(num_layers=1)
    arguments = [
        *(f"model.{key}={getattr(cfg.model, key)}" for key in KEYS),
        "model.tokenizer=byte",
        "model.encoder_seq_length=64",
        "model.global_batch_size=8",
        "trainer.max_steps=2",
        "trainer.accelerator=cpu",
        "exp_manager.create_tensorboard_logger=false",
        f"data.train_path={data}",
        f"data.validation_path={data}",
        f"pretrained_checkpoint.restore_from_path={home / 'policy'}",
        "reward_model.reference_features=[log_prob,prompt_gain]",
        "reward_model.feature_prompts=3",
        "reward_model.feature_share=0.25",
    ]
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        assert cli.main(["train_rm", *arguments, f"run_dir={home / 'rm'}"]) == 0
    return home, arguments, printed.getvalue()


def test_training_stores_the_weights_with_the_model(trained: tuple[Path, list[str], str]) -> None:
    home, _, _ = trained
    weights = FeatureWeights.read(home / "rm" / "model")
    assert weights is not None
    assert weights.names == ("log_prob", "prompt_gain") and len(weights.weights) == 3
    assert weights.pairs == 10 and len(weights.prompts) == 3  # 9 of 36 rows, whole prompts of 2
    assert Path(weights.policy) == home / "policy"
    assert FILE in json.loads((home / "rm" / "model" / manifest.NAME).read_text())["files"]
    assert manifest.wrong_size(home / "rm") is None


def test_the_weights_may_be_fitted_on_a_part_of_the_held_out_pairs(trained: tuple[Path, list[str], str]) -> None:
    home, arguments, _ = trained
    fewer = ["reward_model.feature_pairs=4", f"run_dir={home / 'fewer'}"]
    assert cli.main(["train_rm", *arguments, *fewer]) == 0
    all_pairs, four = (FeatureWeights.read(home / name / "model") for name in ("rm", "fewer"))
    assert all_pairs is not None and four is not None
    assert four.pairs == 4 and four.weights != all_pairs.weights and four.prompts == all_pairs.prompts
    # the same pairs are kept from the training
    saved, same = (sorted((home / name / "model").rglob("*.distcp")) for name in ("rm", "fewer"))
    assert saved and [path.read_bytes() for path in saved] == [path.read_bytes() for path in same]


def test_a_part_is_evenly_spread() -> None:
    assert evenly_spread(10, 4) == [0, 2, 5, 7]
    assert evenly_spread(3, 3) == evenly_spread(3, 0) == evenly_spread(3, 9) == [0, 1, 2]
    assert evenly_spread(0, 4) == []


def test_the_pairs_of_the_fit_are_chosen_among_those_with_prompts(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [row if i % 4 == 1 else replace(row, prompt=()) for i, row in enumerate(preference_rows(16))]
    held_out = encode_pairs(rows, TOKENIZER, 64)[0]
    fitted: list[list[str]] = []

    def fit(cfg: Any, member: Any, pairs: Any, *_: Any) -> Any:
        fitted.append([pair.source for pair in pairs])
        return SimpleNamespace(weights=SimpleNamespace(warnings=list))

    monkeypatch.setattr(reward_model_training, "fit_features", fit)
    cfg = tiny_config()
    cfg.reward_model.feature_pairs = 4
    data = EncodedPreferences([], [], [], held_out=held_out)
    reward_model_training._fit_features(cfg, cast(Any, None), data, "")
    assert fitted == [["row 1", "row 5", "row 9", "row 13"]]


def test_training_and_evaluate_report_the_same_for_plain_and_hybrid(
    trained: tuple[Path, list[str], str], capsys: pytest.CaptureFixture[str]
) -> None:
    home, _, out = trained
    result = json.loads((home / "rm" / "result.json").read_text())
    found = re.search(r"with reference features: accuracy ([\d.]+)  mismatched prompts ([\d.]+)\n", out)
    assert found is not None
    assert float(found[1]) == round(result["val/hybrid_accuracy"], 3)
    assert float(found[2]) == round(result["val/hybrid_mismatch_accuracy"], 3)
    for suffix, prefix in (("", "val/hybrid_"), ("?reference_features=off", "val/")):
        source = f"ensemble.members=['{home / 'rm' / 'model'}{suffix}']"
        assert cli.main(["evaluate", source, f"data.validation_path={home / 'pairs.jsonl'}"]) == 0
        told = capsys.readouterr().out
        accuracy, mismatch = re.findall(r"accuracy ([\d.]+)", told)
        assert float(accuracy) == pytest.approx(result[f"{prefix}accuracy"], abs=1e-4)
        assert float(mismatch) == pytest.approx(result[f"{prefix}mismatch_accuracy"], abs=1e-3)


def test_conversion_does_not_drop_the_features_silently(
    trained: tuple[Path, list[str], str], capsys: pytest.CaptureFixture[str]
) -> None:
    home, _, _ = trained
    arguments = ["convert", "from=megatron", "to=megatron", f"path={home / 'rm' / 'model'}", f"out={home / 'out'}"]
    assert cli.main(arguments) == 2
    assert "drop_reference_features=true" in capsys.readouterr().err
    assert not (home / "out").exists()
    assert cli.main([*arguments, "drop_reference_features=true"]) == 0
    assert f"{FILE} is left out" in capsys.readouterr().out
    assert FeatureWeights.read(home / "out") is None


def encoded(count: int) -> EncodedPreferences:
    return EncodedPreferences(encode_pairs(preference_rows(count), TOKENIZER, 64)[0], [], [])


def test_without_a_bootstrap_whole_prompts_are_kept_back_the_same_for_every_member() -> None:
    cfg = tiny_config()
    cfg.reward_model.reference_features, cfg.reward_model.feature_share = ["log_prob"], 0.25
    data = keep_back(cfg, encoded(36))
    prompts = [{pair.row.prompt[0]["content"] for pair in part if pair.row} for part in (data.train, data.held_out)]
    assert not prompts[0] & prompts[1] and len(data.train) + len(data.held_out) == 36
    assert 9 <= len(data.held_out) <= 10
    assert [pair.source for pair in keep_back(cfg, encoded(36)).held_out] == [pair.source for pair in data.held_out]
    cfg.reward_model.reference_features = []
    assert len(keep_back(cfg, encoded(36)).train) == 36


def test_a_bootstrap_holds_out_what_it_did_not_draw_in_any_copy() -> None:
    data = bootstrap(encoded(36), seed=3)  # every row is there twice
    drawn = {(*pair.chosen, -1, *pair.rejected) for pair in data.train}
    held = {(*pair.chosen, -1, *pair.rejected) for pair in data.held_out}
    assert len(data.train) == 36 and held and not drawn & held
    assert drawn | held == {(*pair.chosen, -1, *pair.rejected) for pair in encoded(36).train}
    assert torch.equal(*(torch.tensor([p.chosen[0] for p in bootstrap(encoded(36), 3).train]) for _ in range(2)))


def test_the_fixed_prompts_are_different_and_the_same_in_any_order_of_the_rows() -> None:
    rows = preference_rows(36)
    found = fixed_prompts(rows, TOKENIZER, 4)
    assert len({prompt[0]["content"] for prompt in found}) == 4
    assert fixed_prompts(rows[::-1], TOKENIZER, 4) == found


def test_a_policy_must_be_named_and_a_language_model(trained: tuple[Path, list[str], str]) -> None:
    home, arguments, _ = trained
    cfg = tiny_config()
    assert frozen_policy(cfg, "") == ""
    cfg.reward_model.reference_features = ["log_prob"]
    with pytest.raises(ConfigError, match=r"reward_model\.feature_policy"):
        frozen_policy(cfg, "")
    # trained on from a hybrid model: its policy
    assert frozen_policy(cfg, str(home / "rm" / "model")) == str(home / "policy")
    plain = save_megatron(home / "plain_rm", **BYTES)
    run = [*arguments[:-4], f"pretrained_checkpoint.restore_from_path={plain}", f"run_dir={home / 'rm2'}"]
    assert cli.main(["train_rm", *run, "reward_model.reference_features=[log_prob]"]) == 2


@pytest.mark.parametrize("stage", ["attack", "rlhf"])
def test_an_attack_and_rlhf_score_by_the_hybrids(single: Runtime, tmp_path: Path, stage: str) -> None:
    members = [save_megatron(tmp_path / f"rm_{seed}", seed=seed) for seed in (3, 4)]
    arguments = one_step_of_rl(tmp_path, members)
    policy, prompts = tmp_path / "policy", tuple(({"role": "user", "content": text},) for text in PROMPTS)
    names = ("log_prob", "prompt_gain")
    for member, weight in zip(members, (0.5, -0.25), strict=True):
        fingerprint = policy_fingerprint(policy)
        FeatureWeights(names, (1.0, weight, 2.0), str(policy), fingerprint, prompts, 4).write(member)
    assert cli.main([stage, *arguments, f"run_dir={tmp_path / 'run'}"]) == 0
    reference = SFTScores.read(tmp_path / "run" / "reference.jsonl")
    count = len(reference.responses_PN[0])
    made = Rollouts(
        prompts=[prompt for prompt in reference.prompts_P for _ in range(count)],
        responses=[text for texts in reference.responses_PN for text in texts],
        ended=[ended for flags in reference.ended_PN or () for ended in flags],
        prompt_tokens=[[] for _ in range(2 * count)],
        response_tokens=[[] for _ in range(2 * count)],
        prompt_index=[0] * 2 * count,
        fingerprint="",
    )
    for k, member in enumerate(load_members(tiny_config(), list(map(str, members)), SyntheticTokenizer())):
        expected_N = reference.scores_PNK[:, :, k].flatten()
        torch.testing.assert_close(member.score(made), expected_N, rtol=1e-4, atol=1e-4)
        (plain,) = load_members(tiny_config(), [f"{members[k]}?reference_features=off"], SyntheticTokenizer())
        assert (plain.score(made) - expected_N).abs().min() > 1e-2
