"""What detectors read: the same at every layout, once, and refused by name where a member does not have it."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import detector_jobs
import pytest
import torch
from distributed import Worlds
from reward_members import one_step_of_rl, rollouts, save_hf_reward, save_megatron
from tiny import TOKENIZER, tiny_config
from transformers import AutoModelForSequenceClassification, BertConfig, BertForSequenceClassification

from nemo_advrm import cli
from nemo_advrm.config.schema import AdversarialConfig
from nemo_advrm.data import sft_scores
from nemo_advrm.data.hidden_states import beside, read_hidden_states, write_hidden_states
from nemo_advrm.data.jsonl import read_jsonl
from nemo_advrm.data.sft_scores import SFTScores
from nemo_advrm.detectors.base import features_of
from nemo_advrm.engine.feature_file import FeatureWeights, policy_fingerprint
from nemo_advrm.engine.microbatches import EncodedResponse
from nemo_advrm.engine.runtime import Layout, Runtime
from nemo_advrm.errors import ConfigError, DataError, RewardSourceError
from nemo_advrm.models import policy as policy_module
from nemo_advrm.models.rollout_batch import RolloutBatch, response_log_probs
from nemo_advrm.rewards import hybrid
from nemo_advrm.rewards.base import checked_scores_with_hidden_states
from nemo_advrm.rewards.detector_features import FeatureReader, FoundFeatures
from nemo_advrm.rewards.ensemble import AdversarialReward
from nemo_advrm.rewards.features import HybridReward
from nemo_advrm.rewards.hf import HFReward, _inputs_of, _output_layer
from nemo_advrm.rewards.local import FunctionReward
from nemo_advrm.rewards.sft_responses import write_sft_scores
from nemo_advrm.rewards.sources import load_members
from nemo_advrm.rollouts import base as rollout_engines
from nemo_advrm.rollouts.types import Rollouts


@pytest.fixture(scope="module")
def home(single: Runtime, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A policy, a Megatron member, one with learned positions, and a Hugging Face member."""
    home = tmp_path_factory.mktemp("read")
    save_megatron(home / "policy", seed=5, head="lm")
    save_megatron(home / "megatron")
    save_hf_reward(home / "hf")
    return home


@pytest.mark.parametrize(
    ("layout", "processes", "model"),
    [
        (Layout(tensor=2), 2, {"sequence_parallel": True}),
        (Layout(pipeline=2), 2, {}),
        (Layout(context=2), 2, {}),
        (Layout(), 2, {}),
        pytest.param(Layout(tensor=2, pipeline=2), 4, {}, marks=pytest.mark.slow),
    ],
    ids=["sequence parallel", "pipeline", "context", "data", "tensor and pipeline"],
)
def test_every_layout_reads_the_features_of_one_process(
    home: Path, worlds: Worlds, layout: Layout, processes: int, model: dict[str, bool]
) -> None:
    kwargs: dict[str, Any] = {
        "members": [str(home / "megatron"), f"hf:{home / 'hf'}"],
        "policy": str(home / "policy"),
    }
    here = detector_jobs.read(model={}, **kwargs)
    assert here[0].shape == (4, 2) and here[1][0].shape == (4, 32) and here[1][1].shape == (4, 48)
    assert here[2].max() < -1 and here[3].min() > 1
    for there in worlds.run(layout, "detector_jobs", "read", processes, model=model, **kwargs):
        torch.testing.assert_close(there, here, rtol=1e-4, atol=1e-4)


def test_hidden_states_of_a_hugging_face_member_are_what_its_head_reads(home: Path) -> None:
    (member,) = load_members(tiny_config(), [f"hf:{home / 'hf'}"], TOKENIZER)
    assert isinstance(member, HFReward)
    made = rollouts()
    scores_N, hidden_ND = member.score_with_hidden_states(made)
    assert torch.equal(scores_N, member.score(made))
    own = AutoModelForSequenceClassification.from_pretrained(home / "hf").eval()
    torch.testing.assert_close(hidden_ND @ own.score.weight[0], scores_N)
    row = member.tokenizer.encode_conversation(made.prompts[1], made.responses[1], made.ended[1])
    last = own.model(torch.tensor([row])).last_hidden_state[0, -1]
    torch.testing.assert_close(hidden_ND[1], last, rtol=1e-4, atol=1e-4)
    assert member.score_with_hidden_states(made.select([]))[1].shape == (0, 48)


def test_the_state_of_an_encoder_is_what_it_has_pooled() -> None:
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = BertForSequenceClassification(BertConfig(vocab_size=30, num_labels=1, **sizes)).eval()
    with torch.no_grad(), _inputs_of(_output_layer("bert", model)) as seen:
        logits = model(torch.tensor([[3, 4, 5]])).logits
        torch.testing.assert_close(model.classifier(seen[0]), logits)


def test_a_hybrid_member_gives_the_states_of_its_model(home: Path, tmp_path: Path) -> None:
    policy, rm = home / "policy", save_megatron(tmp_path / "rm")
    prompts = tuple(({"role": "user", "content": text},) for text in ("birds", "clouds"))
    FeatureWeights(("log_prob",), (1.0, 0.5), str(policy), policy_fingerprint(policy), prompts, 4).write(rm)
    opened: hybrid.Opened = {}
    mixed, plain = load_members(tiny_config(), [str(rm), f"{rm}?reference_features=off"], TOKENIZER, opened)
    assert isinstance(mixed, HybridReward)
    made = rollouts()
    scores_N, hidden_ND = mixed.score_with_hidden_states(made)
    torch.testing.assert_close(scores_N, mixed.score(made))
    assert torch.equal(hidden_ND, plain.score_with_hidden_states(made)[1])  # type: ignore[attr-defined]
    # the policy is not loaded again for a detector
    cfg = tiny_config()
    cfg.adversarial.detector = "sft_log_prob"
    assert hybrid.open_sft_policy(cfg, TOKENIZER, str(policy), opened) is mixed.features
    # unless it would have another number format or batch shape than the attack's policy
    other = tiny_config(micro_batch_size=cfg.model.micro_batch_size + 1)
    other.adversarial.detector = "sft_log_prob"
    apart = hybrid.open_sft_policy(other, TOKENIZER, str(policy), opened)
    assert apart is not None and apart is not mixed.features
    assert apart.model.model_config.micro_batch_size == other.model.micro_batch_size
    assert hybrid.open_sft_policy(other, TOKENIZER, str(policy), opened) is apart
    cfg.adversarial.detector = "mahalanobis"
    assert hybrid.open_sft_policy(cfg, TOKENIZER, str(policy), opened) is None


def test_a_length_counts_the_tokens_that_the_log_prob_sums_over(home: Path, tmp_path: Path) -> None:
    """A response that was sampled in more tokens than its text is encoded in is no likelier per token."""
    cfg = tiny_config()
    cfg.adversarial.detector = "sft_log_prob"
    (member,) = load_members(cfg, [str(home / "megatron")], TOKENIZER)
    policy = hybrid.open_sft_policy(cfg, TOKENIZER, str(home / "policy"))
    reader, made, split = FeatureReader([member], ["sft_log_prob"], [0], policy), rollouts(), rollouts()
    lengths = [len(tokens) for tokens in made.response_tokens]
    split.response_tokens[0] = [token for token in made.response_tokens[0] for _ in range(3)]
    for each in (made, split):
        found = reader.read(each)
        assert found.lengths_N is not None and found.lengths_N.tolist() == lengths
    both = FeatureReader([member], ["sft_log_prob", "sft_entropy"], [0], policy).read(made)
    assert both.log_probs_N is not None and both.entropies_N is not None
    for i, (prompt, answer) in enumerate(zip(made.prompt_tokens, made.response_tokens, strict=True)):
        log_prob, entropy = under(home / "policy", prompt, answer)
        assert both.log_probs_N[i].item() == pytest.approx(log_prob, rel=1e-4)
        assert both.entropies_N[i].item() == pytest.approx(entropy, rel=1e-4)
    order = [0, 2, 1, 3]  # those to one prompt are adjacent
    write_sft_scores(tmp_path / "reference.jsonl", split.select(order), 2, reader, None)
    stored_N = SFTScores.read(tmp_path / "reference.jsonl", features_of("sft_log_prob")).features(0).lengths_N
    assert stored_N is not None and stored_N.tolist() == [lengths[i] for i in order]


def test_stored_entropies_are_read_where_a_detector_asks_for_them(single: Runtime, tmp_path: Path) -> None:
    made, path = rollouts().select([0, 2, 1, 3]), tmp_path / "reference.jsonl"
    entropies_N, lengths_N = torch.tensor([1.0, 2, 3, 4]), torch.ones(4, dtype=torch.int64)
    found = FoundFeatures(torch.arange(8.0).reshape(4, 2), {}, None, entropies_N, lengths_N)
    reader = SimpleNamespace(read=lambda _: found, members=[None, None])
    in_memory = write_sft_scores(path, made, 2, cast(FeatureReader, reader), None)
    assert SFTScores.read(path).entropies_PN is None
    stored = SFTScores.read(path, features_of("sft_entropy"))
    for one in (in_memory, stored):
        assert one.log_probs_PN is None and one.entropies_PN is not None
        assert one.entropies_PN.tolist() == [[1, 2], [3, 4]]
    with pytest.raises(ConfigError, match=r"sft_log_prob reads log_probs of member 1, which reference\.jsonl"):
        stored.detector("sft_log_prob", 0)
    fitted = stored.detector("sft_entropy", 0)
    assert fitted.mean == 2.5 and stored.detector("sft_entropy", 0) is fitted
    assert stored.detector("sft_entropy", 0, new_prompts=True) is not fitted


def scored_by(name: str) -> FunctionReward:
    return FunctionReward(name, lambda prompts, responses, ended: [float(len(text)) for text in responses])


def test_a_member_without_hidden_states_is_refused_by_name_with_the_detector(home: Path) -> None:
    (megatron,) = load_members(tiny_config(), [str(home / "megatron")], TOKENIZER)
    members = [megatron, scored_by("R_2 (python:a:b)")]
    FeatureReader(members, ["mahalanobis"], [0])  # what is not attacked needs none
    with pytest.raises(ConfigError, match=r"detector=mahalanobis reads hidden_states .* R_2 \(python:a:b\) gives"):
        FeatureReader(members, ["mahalanobis"], [0, 1])
    with pytest.raises(ConfigError, match=r"detector=sft_log_prob reads log_probs, and there is no SFT policy"):
        FeatureReader(members, ["sft_log_prob"], [0])
    plain = SFTScores([(), ()], [["a", "b"]] * 2, torch.randn(2, 2, 2), None)
    options = AdversarialConfig(detector="mahalanobis")
    with pytest.raises(ConfigError, match=r"mahalanobis reads hidden_states of member 1, which ref.* not have"):
        AdversarialReward(members, options, plain)
    AdversarialReward(members[::-1], options, plain, detect=False)  # as a server, which reads no detector


@pytest.mark.parametrize("member", ["http://localhost:1", "python:reward_members:rollouts"])
def test_an_attack_that_cannot_detect_ends_before_it_begins(
    home: Path, tmp_path: Path, member: str, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = one_step_of_rl(tmp_path, [home / "megatron", member])
    run = tmp_path / "run"
    own = ["adversarial.detector=mahalanobis", "adversarial.target_members=[1,2]", f"run_dir={run}"]
    assert cli.main(["attack", *arguments, *own]) == 2
    assert f"ensemble.members[1]={member} gives scores only" in capsys.readouterr().err
    assert not run.exists()


class Broken:
    name = "broken"

    def score(self, rollouts: Rollouts) -> torch.Tensor:
        return torch.zeros(len(rollouts))

    def score_with_hidden_states(self, rollouts: Rollouts) -> tuple[torch.Tensor, torch.Tensor]:
        return self.score(rollouts), torch.full((len(rollouts), 2), torch.nan)


def test_hidden_states_that_are_no_numbers_are_refused_by_the_members_name() -> None:
    with pytest.raises(RewardSourceError, match="reward source broken gave hidden states"):
        checked_scores_with_hidden_states(Broken(), rollouts())


def test_the_file_of_hidden_states_is_checked(tmp_path: Path) -> None:
    path = beside(tmp_path / "reference.jsonl")
    assert read_hidden_states(path, 3) == {}
    write_hidden_states(path, {1: torch.ones(3, 2)})
    assert torch.equal(read_hidden_states(path, 3)[1], torch.ones(3, 2))
    with pytest.raises(DataError, match=r"reference\.hidden_states\.safetensors: member 2 has .*\(3, 2\).*4 responses"):
        read_hidden_states(path, 4)
    write_hidden_states(path, {0: torch.full((3, 2), torch.inf)})
    with pytest.raises(DataError, match=r"member 1 .* not finite"):
        read_hidden_states(path, 3)
    path.write_bytes(path.read_bytes()[:-4])
    with pytest.raises(DataError, match="not a file of hidden states"):
        read_hidden_states(path, 3)
    write_hidden_states(path, {})
    assert not path.exists()


@pytest.mark.long
@pytest.mark.parametrize("detector", ["mahalanobis", "sft_log_prob"])
def test_an_attack_by_rl_is_recorded_measured_and_selected_by_a_detector(
    home: Path, tmp_path: Path, detector: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    members = [home / "megatron", save_megatron(tmp_path / "two", seed=4)]
    held_out, run = tmp_path / "held_out.jsonl", tmp_path / "run"
    held_out.write_text('{"prompt": "birds"}\n{"prompt": "these clouds sing"}\n')
    arguments = [
        *one_step_of_rl(tmp_path, members),
        f"adversarial.detector={detector}",
        "adversarial.held_out_prompts=2",
        f"data.held_out_prompts_path={held_out}",
        "sft_statistics.samples_per_prompt=8",
        "adversarial.num_adversaries=2",
        f"run_dir={run}",
    ]
    fitted_to: list[int] = []
    standardised = sft_scores.StandardisedDetector
    monkeypatch.setattr(
        sft_scores, "StandardisedDetector", lambda d, sft, *a: fitted_to.append(len(sft)) or standardised(d, sft, *a)
    )
    built: list[bool] = []
    build = policy_module.build_policy
    monkeypatch.setattr(policy_module, "build_policy", lambda *a, **k: built.append(k["trainable"]) or build(*a, **k))
    for_sampling: list[str] = []
    monkeypatch.setattr(rollout_engines, "build_policy", lambda *a, **k: for_sampling.append(a[2]) or build(*a, **k))
    assert cli.main(["attack", *arguments]) == 0
    assert len(for_sampling) == (0 if detector == "sft_log_prob" else 2)  # for the attack's prompts and held-out ones
    assert built == 2 * ([True] if detector == "sft_log_prob" else [True, False])  # the reference policy is shared
    # once to the responses to the attack's prompts and once to those to the held-out ones, for both adversaries
    assert len(fitted_to) == 2
    sft = SFTScores.read(run / "reference.jsonl", features_of(detector))
    assert set(sft.hidden_states) == ({0} if detector == "mahalanobis" else set())
    rows = [row for _, row in read_jsonl(run / "attack" / "samples.jsonl")]
    made = [row for _, row in read_jsonl(run / "attack" / "direction_1_policy_1" / "held_out.jsonl")]
    assert len(rows) == 16 and len(made) == 16
    fitted = sft.detector(detector, 0)
    for row in rows:
        assert row["disagreement_z"] == pytest.approx((row["disagreement"] - fitted.mean) / fitted.std, rel=1e-3)
    if detector == "sft_log_prob":
        assert sft.log_probs_PN is not None and sft.tokens_PN is not None
        for p, texts in enumerate(sft.responses_PN):
            prompt = TOKENIZER.encode_prompt(sft.prompts_P[p])
            for i, text in enumerate(texts):
                answer = TOKENIZER.encode_response(text) if i in sft.finished(p) else TOKENIZER.encode(text)
                expected, _ = under(tmp_path / "policy", prompt, answer)
                assert sft.log_probs_PN[p, i].item() == pytest.approx(expected, rel=1e-4)
    assert cli.main(["select", *arguments, "selection.threshold_z=-100", "selection.null_ratio=0"]) == 0
    # who asks for no detector reads none of its features, so a damaged file of them is no fault either
    beside(run / "reference.jsonl").write_bytes(b"damaged")
    plain = SFTScores.read(run / "reference.jsonl")
    assert plain.hidden_states == {} and plain.log_probs_PN is None and plain.lengths_PN is None
    assert torch.equal(plain.scores_PNK, sft.scores_PNK)


def under(policy: Path, prompt: list[int], answer: list[int]) -> tuple[float, float]:
    """Log-probability and entropy of a response, as RL computes them."""
    model = policy_module.build_policy(tiny_config(), TOKENIZER, str(policy), 0, trainable=False)
    made = Rollouts([()], [""], [True], [prompt], [answer], [0], "")
    data = RolloutBatch.of(made)
    assert data.rows == [EncodedResponse(prompt + answer, len(prompt))]
    log_probs_BT, entropies_BT = response_log_probs(model, data, TOKENIZER.pad_id)
    return log_probs_BT.sum().item(), entropies_BT.sum().item()
