"""A hybrid reward behind the server: one score in every form, and a sample that tells no prompt is refused alone."""

from __future__ import annotations

import pytest
from reward_members import rollouts, save_megatron
from tiny import TOKENIZER, tiny_config

from nemo_advrm.engine.feature_file import FeatureWeights, policy_fingerprint
from nemo_advrm.engine.runtime import Runtime
from nemo_advrm.rewards.ensemble import UncertaintyReward
from nemo_advrm.rewards.sources import load_members

pytest.importorskip("fastapi", reason="needs the extra serve")

from nemo_advrm.config.schema import RemoteConfig
from nemo_advrm.rewards.remote import ServerReward
from nemo_advrm.serve.samples import InvalidSample, Preparer, Sample
from nemo_advrm.serve.schemas import ScoreRequest
from nemo_advrm.serve.scorer import Scorer


@pytest.fixture(scope="module")
def members(single: Runtime, tmp_path_factory: pytest.TempPathFactory) -> list:
    home = tmp_path_factory.mktemp("hybrid_samples")
    policy = save_megatron(home / "policy", seed=5, head="lm")
    save_megatron(home / "rm")
    prompts = tuple(({"role": "user", "content": text},) for text in ("this old garden", "this baker"))
    names = ("log_prob", "prompt_gain")
    FeatureWeights(names, (1.0, 0.5, -1.0), str(policy), policy_fingerprint(policy), prompts, 4).write(home / "rm")
    return load_members(tiny_config(), [str(home / "rm")], TOKENIZER)


def scores_of(members: list, samples: list[Sample]) -> list[float]:
    preparer = Preparer(members)
    prepared = preparer.prepare(samples)
    return [scored.reward for scored in Scorer(UncertaintyReward(members), preparer.fingerprint).score(prepared)]


def test_every_form_has_the_score_of_the_rollout(members: list) -> None:
    made = rollouts().select([0, 2])  # finished ones
    expected = pytest.approx(members[0].score(made).tolist(), rel=1e-4, abs=1e-4)
    rows = list(zip(made.prompts, made.responses, made.prompt_tokens, made.response_tokens, strict=True))
    assert scores_of(members, [Sample("chat", p, r) for p, r, _, _ in rows]) == expected
    assert scores_of(members, [Sample("tokens", tokens=(*p, *r)) for _, _, p, r in rows]) == expected
    told = [Sample("tokens", tokens=(*p, *r), prompt_length=len(p)) for _, _, p, r in rows]
    assert scores_of(members, told) == expected
    texts = [TOKENIZER.decode([*p, *r], skip_special=False) for _, _, p, r in rows]
    assert scores_of(members, [Sample("text", response=text) for text in texts]) == expected


def test_a_sample_without_a_known_prompt_is_refused_by_its_place(members: list) -> None:
    good = Sample("chat", rollouts().prompts[0], "birds sing .")
    for bad, words in (
        (Sample("text", response="birds sing ."), "the start of the answer cannot be found"),
        (Sample("tokens", tokens=tuple(TOKENIZER.encode("birds sing ."))), "the start of the answer cannot be found"),
        (Sample("tokens", tokens=(3, 4), prompt_length=2), "leaves no response"),
    ):
        with pytest.raises(InvalidSample, match="sample 1: ") as caught:
            Preparer(members).prepare([good, bad])
        assert words in str(caught.value)


def test_a_client_tells_where_the_prompt_ends_to_servers_that_know_the_key() -> None:
    made = rollouts()
    made.tokens_only = True
    source = ServerReward("R_1", ["http://127.0.0.1:1"], RemoteConfig())
    source.fingerprint = TOKENIZER.fingerprint
    assert all(row.keys() == {"tokens"} for row in source._rows(made))
    source.takes_prompt_lengths = True
    rows = source._rows(made)
    assert [row["prompt_length"] for row in rows] == list(map(len, made.prompt_tokens))
    samples = [sample.sample() for sample in ScoreRequest(samples=rows).samples]
    assert [sample.prompt_length for sample in samples] == list(map(len, made.prompt_tokens))
