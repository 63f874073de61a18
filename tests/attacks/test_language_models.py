"""Language models that attacks ask: next tokens, log-probabilities and samples agree, whoever computes them."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import attack_jobs
import pytest
import torch
from hf_models import tiny_hf
from hf_policies import save_policy
from reward_members import save_megatron
from tiny import TOKENIZER, responses, tiny_config

from nemo_advrm.attacks.language_models import LanguageModels
from nemo_advrm.config.schema import Config
from nemo_advrm.engine.builders import build_policy
from nemo_advrm.engine.generation import uniforms
from nemo_advrm.engine.microbatches import EncodedResponse
from nemo_advrm.engine.runtime import Layout, Runtime
from nemo_advrm.engine.sampling import Sampling, pick
from nemo_advrm.errors import CheckpointError, ConfigError
from nemo_advrm.rollouts.language_model import LanguageModel
from nemo_advrm.rollouts.megatron_language_model import MegatronLanguageModel
from nemo_advrm.rollouts.transformers_language_model import TransformersLanguageModel

if TYPE_CHECKING:
    from distributed import Worlds

ROWS = [[10, 11, 12], [20], [30, 31, 32, 33, 34, 35, 36], [40, 41]]


@pytest.fixture(scope="module")
def hf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_policy(tmp_path_factory.mktemp("hf") / "policy")


@pytest.fixture(params=["megatron", "transformers", "softcapped"])
def lm(request: pytest.FixtureRequest, single: Runtime, hf: Path) -> LanguageModel:
    cfg = tiny_config()
    if request.param == "megatron":
        return MegatronLanguageModel("tiny", build_policy(cfg, TOKENIZER, "", 3, trainable=False), TOKENIZER, cfg.rl)
    if request.param == "softcapped":  # the final softcap is no part of the trunk
        model = tiny_hf("gemma2", 0, vocab_size=TOKENIZER.vocab_size + 6)
        return TransformersLanguageModel("gemma2", model, TOKENIZER, 64, 24, 3)
    cfg.precision.name = "fp32"
    return TransformersLanguageModel.load(hf, cfg)


def test_what_a_model_says_of_next_tokens_responses_and_samples_agrees(lm: LanguageModel) -> None:
    ids_NK, log_probs_NK = lm.next_tokens(ROWS, 5)
    assert ids_NK.shape == log_probs_NK.shape == (len(ROWS), 5)
    assert (log_probs_NK.diff(dim=1) <= 0).all()
    one_by_one = torch.cat([lm.next_tokens([row], 5)[1] for row in ROWS])
    assert torch.allclose(log_probs_NK, one_by_one, atol=1e-4), "padding changes nothing"
    rows = [EncodedResponse([*row, int(ids[2])], len(row)) for row, ids in zip(ROWS, ids_NK, strict=True)]
    assert torch.allclose(lm.log_probs(rows), log_probs_NK[:, 2], atol=1e-4)
    two = [EncodedResponse([*row, 15, 16], len(row)) for row in ROWS]
    steps = [[EncodedResponse([*row, 15], len(row)) for row in ROWS]]
    steps.append([EncodedResponse([*row, 15, 16], len(row) + 1) for row in ROWS])
    assert torch.allclose(lm.log_probs(two), sum(map(lm.log_probs, steps)), atol=1e-4)  # type: ignore[arg-type]
    greedy = lm.generate(ROWS, Sampling(3, (lm.tokenizer.eos_id,), temperature=0), torch.zeros(len(ROWS), 3))
    assert [row[0] for row in greedy.responses] == ids_NK[:, 0].tolist()
    every_id, every_log_prob = lm.next_tokens(ROWS[:1], lm.tokenizer.vocab_size)
    allowed = set(range(lm.tokenizer.vocab_size)) - set(lm.tokenizer.control_ids)
    assert {int(i) for i in every_id[0, every_log_prob[0].isfinite()]} == allowed
    assert every_log_prob.exp().sum() == pytest.approx(1, abs=1e-4)
    assert [part.shape for part in lm.next_tokens([], 5)] == [(0, 5), (0, 5)] and lm.log_probs([]).shape == (0,)
    assert lm.generate([], Sampling(3, (1,)), torch.zeros(0, 3)).responses == []
    with pytest.raises(ConfigError, match="row 0 has 200 tokens"):
        lm.next_tokens([[5] * 200], 2)


@pytest.mark.parametrize("layout", [Layout(tensor=2), Layout(pipeline=2), Layout(context=2)], ids=str)
def test_next_tokens_are_the_same_at_every_layout(
    worlds: Worlds, single: Runtime, tmp_path: Path, layout: Layout
) -> None:
    policy = str(save_megatron(tmp_path / "policy", head="lm"))
    here = attack_jobs.next_tokens(policy, ROWS)
    for ids, log_probs in worlds.run(layout, "attack_jobs", "next_tokens", policy=policy, rows=ROWS):
        assert ids == here[0] and torch.allclose(torch.tensor(log_probs), torch.tensor(here[1]), atol=1e-4)


def test_samples_of_transformers_are_those_of_their_uniform_numbers(hf: Path, single: Runtime) -> None:
    cfg = tiny_config()
    cfg.precision.name = "fp32"
    lm = TransformersLanguageModel.load(hf, cfg)
    sampling = Sampling(12, (lm.tokenizer.eos_id,), temperature=0.9, top_k=20)
    numbers = uniforms(1, len(ROWS), 12)
    made = lm.generate(ROWS, sampling, numbers)
    assert lm.model is not None
    for row, response, ended, own in zip(ROWS, made.responses, made.ended, numbers, strict=True):
        tokens: list[int] = []
        while len(tokens) < 12 and (not tokens or tokens[-1] != lm.tokenizer.eos_id):
            with torch.no_grad():
                logits = lm.model(torch.tensor([row + tokens])).logits[:, -1].float()
            logits[:, list(lm.tokenizer.control_ids)] = -torch.inf
            logits[:, lm.tokenizer.vocab_size :] = -torch.inf
            tokens.append(int(pick(logits, own[None, len(tokens)], sampling)))
        assert (response, ended) == (tokens, tokens[-1] == lm.tokenizer.eos_id)
    assert lm.generate(ROWS[2:], sampling, numbers[2:]).responses == made.responses[2:]


def test_the_helper_is_the_policy_or_the_named_model(hf: Path, single: Runtime, tmp_path: Path) -> None:
    cfg: Config = tiny_config()
    own = save_megatron(tmp_path / "own", head="lm")
    models = LanguageModels(cfg, TOKENIZER, str(own))
    assert models.helper is models.policy and isinstance(models.policy, MegatronLanguageModel)
    cfg.adversarial.lm = f"hf:{hf}"
    other = LanguageModels(cfg, TOKENIZER, str(own)).helper
    assert isinstance(other, TransformersLanguageModel) and getattr(other.tokenizer, "has_template", False)
    cfg.adversarial.lm = str(save_megatron(tmp_path / "named", seed=9, head="lm"))
    named = LanguageModels(cfg, TOKENIZER, str(own)).helper
    rows = responses(2)
    assert not torch.allclose(named.log_probs(rows), models.policy.log_probs(rows))
    cfg.adversarial.lm = "nowhere"
    with pytest.raises(ConfigError, match=r"adversarial\.lm=nowhere: there is no such directory"):
        _ = LanguageModels(cfg, TOKENIZER, str(own)).helper
    cfg.adversarial.lm = f"hf:{tmp_path / 'named'}"
    with pytest.raises(CheckpointError, match="not a transformers model"):
        _ = LanguageModels(cfg, TOKENIZER, str(own)).helper
