"""Features of a frozen policy: their values, which depend on the sample alone and not on its batch or its form."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import feature_jobs
import pytest
import torch
from distributed import Worlds
from hf_tokenizers import CHATML, save_hf
from reward_members import FEATURES, OTHER_PROMPTS, rollouts, save_hybrid, save_megatron
from tiny import TOKENIZER, rollout_batch, tiny_config
from torch import Tensor

from nemo_advrm.data.answers import answer_start_tokens, split_at_answer
from nemo_advrm.data.messages import Message
from nemo_advrm.data.reading import KEY
from nemo_advrm.data.tokenizers import ByteTokenizer, HFTokenizer
from nemo_advrm.engine.builders import build_policy
from nemo_advrm.engine.feature_file import FILE, FeatureWeights, policy_fingerprint
from nemo_advrm.engine.microbatches import EncodedResponse
from nemo_advrm.engine.runtime import Layout, Runtime
from nemo_advrm.errors import CheckpointError, ConfigError, DataError
from nemo_advrm.models.rollout_batch import response_log_probs
from nemo_advrm.rewards import features as features_module
from nemo_advrm.rewards.features import HybridReward, ReferenceFeatures
from nemo_advrm.rewards.local import MegatronReward
from nemo_advrm.rewards.sources import build, check, load_members, parse


@pytest.fixture(scope="module")
def home(single: Runtime, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A policy, a plain reward model and a hybrid one."""
    home = tmp_path_factory.mktemp("hybrid")
    save_megatron(home / "policy", seed=5, head="lm")
    save_megatron(home / "plain")
    save_hybrid(home / "rm", home / "policy")
    return home


@pytest.fixture(scope="module")
def features(home: Path) -> ReferenceFeatures:
    (member,) = load_members(tiny_config(), [str(home / "rm")], TOKENIZER)
    assert isinstance(member, HybridReward)
    return member.features


def log_probs_by_rl(home: Path, prompts: list[list[int]], answers: list[list[int]]) -> Tensor:
    """What RL computes for the same rows."""
    cfg = tiny_config()
    model = build_policy(cfg, TOKENIZER, str(home / "policy"), 0, trainable=False)
    batch = rollout_batch([EncodedResponse(p + a, len(p)) for p, a in zip(prompts, answers, strict=True)])
    return response_log_probs(model, batch, TOKENIZER.pad_id)[0].sum(-1)


def test_log_prob_is_the_sum_over_the_response_and_its_end(home: Path, features: ReferenceFeatures) -> None:
    made = rollouts()
    expected_N = log_probs_by_rl(home, made.prompt_tokens, made.response_tokens)
    torch.testing.assert_close(features.values(made, ("log_prob",))[:, 0], expected_N)
    assert (expected_N < -1).all()


def test_prompt_gain_is_over_the_mean_of_the_other_prompts_without_the_own_one(
    home: Path, features: ReferenceFeatures
) -> None:
    made = rollouts()  # their prompts are "this river" and "these clouds", of which the second is a fixed one
    table_NP = torch.stack(
        [
            log_probs_by_rl(home, [TOKENIZER.encode_prompt(other)] * len(made), made.response_tokens)
            for other in OTHER_PROMPTS
        ],
        -1,
    )
    own_N = log_probs_by_rl(home, made.prompt_tokens, made.response_tokens)
    means_N = torch.where(torch.tensor([False, True, False, True]), table_NP[:, 1:].mean(-1), table_NP.mean(-1))
    values_NF = features.values(made, ("prompt_gain", "log_prob"))
    torch.testing.assert_close(values_NF, torch.stack([own_N - means_N, own_N], -1))
    assert values_NF[:, 0].abs().min() > 1e-3


def test_a_sample_has_the_same_score_alone_and_in_any_batch(home: Path) -> None:
    (member,) = load_members(tiny_config(), [str(home / "rm")], TOKENIZER)
    made = rollouts()
    together_N = member.score(made)
    alone_N = torch.cat([member.score(made.select([i])) for i in range(len(made))])
    backwards_N = member.score(made.select([3, 2, 1, 0]))
    torch.testing.assert_close(alone_N, together_N, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(backwards_N.flip(0), together_N, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("layout", "processes"),
    [
        (Layout(tensor=2), 2),
        (Layout(pipeline=2), 2),
        (Layout(context=2), 2),
        (Layout(), 2),
        pytest.param(Layout(tensor=2, pipeline=2), 4, marks=pytest.mark.slow),
    ],
    ids=["tensor", "pipeline", "context", "data", "tensor and pipeline"],
)
def test_every_layout_gives_the_scores_and_weights_of_one_process(
    home: Path, worlds: Worlds, layout: Layout, processes: int
) -> None:
    scores, weights = feature_jobs.score_and_fit(str(home / "rm"))
    for found_scores, found_weights in worlds.run(
        layout, "feature_jobs", "score_and_fit", processes, model=str(home / "rm")
    ):
        assert found_scores == pytest.approx(scores, rel=1e-4, abs=1e-4)
        assert found_weights == pytest.approx(weights, rel=1e-3, abs=1e-3)


def test_the_hybrid_is_the_weighed_sum_and_off_the_plain_member(home: Path, features: ReferenceFeatures) -> None:
    cfg, made = tiny_config(), rollouts()
    hybrid, off = load_members(cfg, [str(home / "rm"), f"{home / 'rm'}?reference_features=off"], TOKENIZER)
    (plain,) = load_members(cfg, [str(home / "plain")], TOKENIZER)
    assert isinstance(off, MegatronReward)
    torch.testing.assert_close(off.score(made), plain.score(made))
    values_NF = features.values(made, FEATURES)
    expected_N = 0.5 * plain.score(made) + 0.25 * values_NF[:, 0] - 2.0 * values_NF[:, 1]
    torch.testing.assert_close(hybrid.score(made), expected_N)


@pytest.mark.parametrize("form", ["messages", "tokens", "conversation in tokens", "written out"])
def test_every_form_of_a_sample_has_the_same_features(features: ReferenceFeatures, form: str) -> None:
    made = rollouts()
    whole = [p + r for p, r in zip(made.prompt_tokens, made.response_tokens, strict=True)]
    none: list[list[int]] = [[] for _ in whole]
    forms = {
        "messages": dataclasses.replace(made, prompt_tokens=none, response_tokens=none, fingerprint=""),
        "tokens": dataclasses.replace(made, prompts=[()] * 4, responses=[""] * 4, tokens_only=True),
        "conversation in tokens": dataclasses.replace(
            made, prompts=[()] * 4, responses=[""] * 4, prompt_tokens=none, response_tokens=whole, tokens_only=True
        ),
        # a written-out conversation is a finished one
        "written out": dataclasses.replace(
            made, prompts=[()] * 4, responses=[TOKENIZER.decode(t, skip_special=False) for t in whole], rendered=True
        ),
    }
    if form == "written out":
        made = dataclasses.replace(made, ended=[True] * 4)
    torch.testing.assert_close(features.values(forms[form], FEATURES), features.values(made, FEATURES))


def test_a_row_whose_prompt_is_not_known_is_refused(features: ReferenceFeatures) -> None:
    made = rollouts()
    with pytest.raises(DataError, match="response 1 has no prompt"):
        features.values(dataclasses.replace(made, prompts=[()] * 4), FEATURES)
    tokens = dataclasses.replace(made, prompts=[()] * 4, prompt_tokens=[[]] * 4, tokens_only=True)
    with pytest.raises(DataError, match="the start of the answer cannot be found"):
        features.values(tokens, FEATURES)
    with pytest.raises(DataError, match="another tokenizer"):
        features.values(dataclasses.replace(tokens, fingerprint="other"), FEATURES)


def test_members_of_one_policy_have_the_features_of_a_batch_computed_once(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = save_hybrid(tmp_path / "rm", home / "policy", (1.0, 1.0, 1.0))
    first, second = load_members(tiny_config(), [str(home / "rm"), str(other)], TOKENIZER)
    assert isinstance(first, HybridReward) and isinstance(second, HybridReward)
    calls: list[int] = []
    computed = features_module.summed_log_probs_and_entropies
    monkeypatch.setattr(
        features_module,
        "summed_log_probs_and_entropies",
        lambda model, rows, pad_id: calls.append(len(rows)) or computed(model, rows, pad_id),
    )
    made = rollouts()
    scores = [member.score(made) for member in (first, second)]
    assert calls == [4 + 2 * 3 + 2 * 2]
    (alone,) = load_members(tiny_config(), [str(other)], TOKENIZER)
    torch.testing.assert_close(alone.score(made), scores[1])


def test_where_an_answer_begins_is_told_by_special_tokens_alone() -> None:
    tokenizer = ByteTokenizer()
    prompts = [tokenizer.encode_prompt([Message(role="user", content=text)]) for text in ("Hi?", "Why?")]
    opening = answer_start_tokens(tokenizer, prompts)
    assert tokenizer.decode(opening, skip_special=False) == "<end_of_turn><assistant>"
    turns = [Message(role=role, content=text) for role, text in (("user", "a"), ("assistant", "b"), ("user", "c"))]
    tokens = tokenizer.encode_conversation(turns, "<assistant>d")
    prompt, answer = split_at_answer([*tokens, 9], opening, tokenizer.eos_id)
    assert prompt == tokenizer.encode_prompt(turns) and answer == tokenizer.encode_response("<assistant>d")
    assert answer_start_tokens(tokenizer, [tokenizer.encode("a: "), tokenizer.encode("b: ")]) == []
    with pytest.raises(DataError, match="send messages"):
        split_at_answer(tokens, [], tokenizer.eos_id)


def test_a_policy_that_was_moved_or_changed_is_an_error_that_names_it(home: Path, tmp_path: Path) -> None:
    policy = save_megatron(tmp_path / "policy", seed=5, head="lm")
    spec = parse(str(save_hybrid(tmp_path / "rm", policy)), "ensemble.members[0]")
    cfg = tiny_config()
    check(spec, cfg, 1)
    away = policy.rename(tmp_path / "elsewhere")
    for action in (lambda: check(spec, cfg, 1), lambda: build(spec, "R_1", cfg, TOKENIZER)):
        with pytest.raises(CheckpointError, match=r"policy .*/policy .*is not there"):
            action()
    save_megatron(policy, seed=6, head="lm")
    for action in (lambda: check(spec, cfg, 1), lambda: build(spec, "R_1", cfg, TOKENIZER)):
        with pytest.raises(CheckpointError, match=r"policy .*/policy has changed"):
            action()
    assert away.exists()
    plain = parse(f"{tmp_path / 'rm'}?reference_features=off", "ensemble.members[0]")
    check(plain, cfg, 1)
    assert isinstance(build(plain, "R_1", cfg, TOKENIZER), MegatronReward)


def test_weights_whose_content_changed_without_their_list_are_found(home: Path, tmp_path: Path) -> None:
    policy = save_megatron(tmp_path / "policy", seed=5, head="lm", hashed=True)
    spec = parse(str(save_hybrid(tmp_path / "rm", policy)), "m")
    cfg = tiny_config()
    cfg.trainer.verify_checkpoints = True
    weights = next((policy / "weights").glob("*.distcp"))
    content = bytearray(weights.read_bytes())
    content[len(content) // 2] ^= 255
    weights.write_bytes(content)
    with pytest.raises(CheckpointError, match=r"frozen policy .* is damaged"):
        build(spec, "R_1", cfg, TOKENIZER)


def test_weights_that_count_against_the_prompt_or_the_reward_model_are_warned_of() -> None:
    def told(*weights: float) -> list[str]:
        return FeatureWeights(FEATURES, weights, "policy", "", OTHER_PROMPTS, 80).warnings()

    assert told(0.5, -0.1, 2.0) == []  # a negative log_prob is a matter of taste
    (line,) = told(0.5, 0.1, -0.02)
    assert line.startswith("warning: the fitted weight of prompt_gain is -0.02: in the 80 pairs")
    assert [line.split(" is ")[0] for line in told(-1.0, 0.1, -2.0)] == [
        "warning: the fitted weight of reward",
        "warning: the fitted weight of prompt_gain",
    ]


def test_a_run_that_is_moved_as_a_whole_keeps_its_policy(single: Runtime, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    policy = save_megatron(tmp_path / "run" / "sft" / "model", seed=5, head="lm")
    save_hybrid(tmp_path / "run" / "rm" / "model", policy)
    moved = (tmp_path / "run").rename(tmp_path / "moved")
    weights = FeatureWeights.read(moved / "rm" / "model")
    assert weights is not None and Path(weights.policy) == (moved / "sft" / "model").resolve()
    check(parse(str(moved / "rm" / "model"), "m"), tiny_config(), 1)


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        ('"format": 9', "format 9"),
        ('"features": ["length"]', "known are log_prob, prompt_gain"),
        ('"prompts": []', "at least 2"),
        ('"weights": {"reward": 1}', "lacks 'log_prob'"),
        ('"weights": {"reward": 1, "log_prob": NaN, "prompt_gain": 0}', "weights"),
    ],
)
def test_a_file_of_features_that_cannot_be_used_is_named(home: Path, tmp_path: Path, spoil: str, words: str) -> None:
    text = (home / "rm" / FILE).read_text()
    assert text.startswith("{")
    key = spoil.split(":")[0]
    kept = text.replace(key, '"was"', 1).removesuffix("}\n")
    (tmp_path / FILE).write_text(f"{kept}, {spoil}}}")
    with pytest.raises(CheckpointError, match=FILE) as caught:
        FeatureWeights.read(tmp_path)
    assert words in str(caught.value)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("rm?reference_features=no", "must be on or off"),
        ("hf:rm?reference_features=off", "only .attributes="),
        ("rm?reference_feature=off", "only .attributes="),
    ],
)
def test_a_wrong_option_of_a_source_is_refused(text: str, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        parse(text, "ensemble.members[0]")


def test_options_of_a_source_can_be_joined() -> None:
    spec = parse("rm?attributes=1,2&reference_features=off", "m")
    assert (spec.location, spec.attributes, spec.features) == ("rm", (1.0, 2.0), False)


def test_a_chat_template_tells_where_the_answer_begins_in_tokens(single: Runtime, tmp_path: Path) -> None:
    """The policy is a converted one, which says nothing of how its template is read."""
    tokenizer = HFTokenizer(save_hf(tmp_path / "hf", template=CHATML, eos_token="<|endoftext|>"))
    policy = save_megatron(tmp_path / "policy", head="lm", meta={}, vocab_size=280)
    known = {"tokenizer": tokenizer.fingerprint, KEY: tokenizer.rule.meta()}
    rm = save_megatron(tmp_path / "rm", meta=known, vocab_size=280)
    FeatureWeights(FEATURES, (1.0, 1.0, 1.0), str(policy), policy_fingerprint(policy), OTHER_PROMPTS, 7).write(rm)
    (member,) = load_members(tiny_config(), [str(rm)], tokenizer)
    assert isinstance(member, HybridReward)
    made = rollouts(tokenizer).select([0, 2])
    whole = [tokenizer.encode_conversation(p, r) for p, r in zip(made.prompts, made.responses, strict=True)]
    none: list[list[int]] = [[], []]
    tokens = dataclasses.replace(
        made, prompts=[(), ()], responses=["", ""], prompt_tokens=none, response_tokens=whole, tokens_only=True
    )
    torch.testing.assert_close(member.score(tokens), member.score(made))
