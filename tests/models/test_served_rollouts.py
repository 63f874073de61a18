"""RL on what a served policy writes: the ordinary update where it is the same policy, weighted where it is another."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import rl
import served_jobs
import torch
from distributed import Worlds
from fake_policy import FakePolicy, completion
from served_jobs import Written

from nemo_advrm.config.schema import PolicyServerConfig
from nemo_advrm.engine.runtime import Layout, Runtime
from nemo_advrm.models.off_policy import off_policy_metrics
from nemo_advrm.models.rollout_batch import RolloutBatch
from nemo_advrm.rollouts.types import Rollouts

STEPS = 2
Serve = Callable[..., FakePolicy]


@pytest.fixture(scope="module")
def initial(single: Runtime, tmp_path_factory: pytest.TempPathFactory) -> str:
    return rl.save_policy(tmp_path_factory.mktemp("policy") / "initial")


@pytest.fixture(scope="module")
def written(initial: str) -> Written:
    return served_jobs.written_by(initial, STEPS)


@pytest.fixture
def serve(written: Written) -> Iterator[Serve]:
    servers: list[FakePolicy] = []

    def start(told: Callable) -> FakePolicy:
        servers.append(written.serve(told))
        return servers[-1]

    yield start
    for server in servers:
        server.close()


@pytest.mark.parametrize("is_told", [True, False], ids=["told", "not told"])
@pytest.mark.parametrize("unit", ["token", "response"])
def test_the_start_policy_behind_an_endpoint_trains_as_the_policy_itself_does(
    initial: str, serve: Serve, tmp_path: Path, unit: str, is_told: bool
) -> None:
    server = serve(lambda key, ours: ours if is_told else None)
    own = served_jobs.learner(initial, rl.policy_config("rloo"))
    cfg = served_jobs.config(server.policy, str(tmp_path), server={"importance": unit})
    module = served_jobs.learner(initial, cfg)
    here, there = (each.train_on(served_jobs.batch_of(each), 0) for each in (own, module))
    assert own.last_rollouts is not None and module.last_rollouts is not None
    assert own.last_rollouts.response_tokens == module.last_rollouts.response_tokens
    assert here["grad_norm"] > 0.1
    for name, weight in served_jobs.parameters(own).items():
        torch.testing.assert_close(served_jobs.parameters(module)[name], weight, rtol=0, atol=1e-6)
    for name in ("policy_loss", "grad_norm", "proxy", "kl", "entropy"):
        assert there[name] == pytest.approx(here[name], abs=1e-5), name
    assert there["off_policy/ess"] == pytest.approx(1, abs=1e-6) == there["off_policy/response_ess"]
    assert there["off_policy/told"] == (1 if is_told else 0)
    assert there["off_policy/gap"] == pytest.approx(0, abs=1e-6) and there["off_policy/truncated"] == 0
    assert there["off_policy/proxy"] == pytest.approx(here["proxy"], abs=1e-6)


@pytest.mark.parametrize("unit", ["token", "response"])
def test_the_responses_of_another_policy_are_weighted_by_the_truncated_ratio(
    initial: str, serve: Serve, written: Written, tmp_path: Path, unit: str
) -> None:
    server = serve(served_jobs.shifted)
    cfg = served_jobs.config(server.policy, str(tmp_path), server={"importance": unit, "importance_cap": 1.5})
    module, own = served_jobs.learner(initial, cfg), served_jobs.learner(initial, rl.policy_config("rloo"))
    rollouts = module._roll_out(served_jobs.batch_of(module), 0)
    output = module.reward.compute_rewards(rollouts)
    plain, weighted = own._prepare(rollouts, output), module._prepare(rollouts, output)
    ratios, of_responses = [], []
    for i, key in enumerate(served_jobs.keys_of(rollouts, 0, module)):
        logs = [
            a - b for a, b in zip(written.log_probs[key], served_jobs.shifted(key, written.log_probs[key]), strict=True)
        ]
        of_responses.append(math.exp(sum(logs)))
        own_ratios = [math.exp(x) for x in logs] if unit == "token" else [of_responses[-1]] * len(logs)
        weights = [min(ratio, 1.5) for ratio in own_ratios]
        expected = plain.advantages_BT[i, : len(logs)] * torch.tensor(weights)
        torch.testing.assert_close(weighted.advantages_BT[i, : len(logs)], expected, rtol=1e-4, atol=1e-5)
        ratios += own_ratios
    assert plain.advantages_BT.abs().max() > 0.1 and 0.1 < sum(r > 1.5 for r in ratios) / len(ratios) < 0.9
    metrics = module._describe(rollouts, output, weighted)
    used = ratios if unit == "token" else of_responses
    for name, of in (("ess", used), ("response_ess", of_responses)):
        share = sum(of) ** 2 / (len(of) * sum(w * w for w in of))
        assert metrics[f"off_policy/{name}"] == pytest.approx(share, rel=1e-3) and share < 0.95
    assert metrics["off_policy/truncated"] == pytest.approx(sum(r > 1.5 for r in ratios) / len(ratios), abs=1e-6)
    proxies = [rl.count_of_word(text) for text in rollouts.responses]
    by_hand = sum(w * p for w, p in zip(of_responses, proxies, strict=True)) / sum(of_responses)
    assert metrics["off_policy/proxy"] == pytest.approx(by_hand, rel=1e-3)
    assert metrics["off_policy/gap"] > 0.3 and metrics["off_policy/told"] == 1


def test_what_is_not_told_of_an_answer_is_taken_from_the_start_policy(
    initial: str, serve: Serve, written: Written, tmp_path: Path
) -> None:
    """Every second answer tells its own log-probabilities, those of the others are unknown."""
    server = serve(lambda key, ours: served_jobs.shifted(key, ours) if key[1] >> 10 & 1 else None)
    module = served_jobs.learner(initial, served_jobs.config(server.policy, str(tmp_path)))
    rollouts = module._roll_out(served_jobs.batch_of(module), 0)
    data = module._prepare(rollouts, module.reward.compute_rewards(rollouts))
    for i, key in enumerate(served_jobs.keys_of(rollouts, 0, module)):
        ours = written.log_probs[key]
        expected = served_jobs.shifted(key, ours) if key[1] >> 10 & 1 else ours
        assert data.behaviour_log_probs_BT[i, : len(ours)].tolist() == pytest.approx(expected, abs=1e-5)
    told = data.is_told_BT.sum() / data.mask_BT.sum()
    assert 0.2 < told < 0.8


def test_the_more_the_policy_has_learned_the_fewer_of_the_responses_count(
    initial: str, serve: Serve, tmp_path: Path
) -> None:
    server = serve(lambda key, ours: None)
    cfg = served_jobs.config(server.policy, str(tmp_path), updates_per_rollout=4)
    first, second = rl.train(served_jobs.learner(initial, cfg), STEPS)
    assert first["off_policy/ess"] == pytest.approx(1, abs=1e-6)
    assert second["off_policy/response_ess"] < second["off_policy/ess"] < 0.99
    # of the trained policy from the start policy, and the mean of its logarithm over what the start policy wrote
    assert second["off_policy/kl"] > second["kl"]


def test_an_answer_that_is_refused_is_empty_and_trains_nothing(initial: str, written: Written, tmp_path: Path) -> None:
    refused = next(iter(written.tokens))  # a request of the first step

    def answer(body: dict) -> tuple:
        if (tuple(body["prompt"]), body["seed"]) == refused:
            return 400, {}, b'{"error": {"code": "content_filter"}}'
        return completion(" ".join(["river"] * (1 + body["seed"] % 3)))

    server = FakePolicy(answer)
    cfg = served_jobs.config(server.policy, str(tmp_path))
    module, without = served_jobs.learner(initial, cfg), served_jobs.learner(initial, cfg)
    try:
        rollouts = module._roll_out(served_jobs.batch_of(module), 0)
    finally:
        server.close()
    place = served_jobs.keys_of(rollouts, 0, module).index(refused)
    assert rollouts.response_tokens[place] == [] and sum(not tokens for tokens in rollouts.response_tokens) == 1
    output = module.reward.compute_rewards(rollouts)
    data = module._prepare(rollouts, output)
    kept = [i for i in range(len(rollouts)) if i != place]
    tensors = {f.name: getattr(data, f.name)[kept] for f in dataclasses.fields(data) if f.name != "rows"}
    others = dataclasses.replace(data, rows=[data.rows[i] for i in kept], **tensors)
    here, there = module._update(data, 0), without._update(others, 0)
    assert here["grad_norm"] == pytest.approx(there["grad_norm"], rel=1e-5) and here["grad_norm"] > 0.1
    for name, weight in served_jobs.parameters(without).items():
        torch.testing.assert_close(served_jobs.parameters(module)[name], weight, rtol=0, atol=1e-6)
    metrics = module._describe(rollouts, output, data)
    assert metrics["off_policy/empty"] == pytest.approx(1 / 32) and metrics["ended"] == 31 / 32
    assert all(math.isfinite(value) for value in (metrics | here).values())


def test_what_was_not_written_is_left_out_of_the_figures_of_the_served_policy(single: Runtime) -> None:
    """Ratios 3 x 1/2, 2 and, of an answer without tokens, none."""
    tokens = [[4, 5], [6], []]
    rollouts = Rollouts([()] * 3, [""] * 3, [False] * 3, [[1]] * 3, tokens, [0, 1, 2], "")
    data = RolloutBatch.of(rollouts)
    assert data.is_told_BT.dtype == torch.bool and data.behaviour_log_probs_BT.dtype == torch.float32
    data.old_log_probs_BT = torch.tensor([[3.0, 0.5], [2.0, 1.0], [1.0, 1.0]]).log()
    options = PolicyServerConfig(importance="response")
    found = off_policy_metrics(data, torch.tensor([7.0, 14.0, 100.0]), options)
    assert found["off_policy/ess"] == pytest.approx(3.5**2 / (2 * (1.5**2 + 2**2))) == found["off_policy/response_ess"]
    assert found["off_policy/mean_ratio"] == pytest.approx(1.75)
    assert found["off_policy/proxy"] == pytest.approx((1.5 * 7 + 2 * 14) / 3.5)
    assert found["off_policy/empty"] == pytest.approx(1 / 3)
    by_token = off_policy_metrics(data, torch.zeros(3), PolicyServerConfig())
    assert by_token["off_policy/mean_ratio"] == pytest.approx((3 + 0.5 + 2) / 3)


def test_a_trained_policy_writes_where_it_is_measured_and_the_served_one_what_it_learns_from(
    initial: str, serve: Serve, tmp_path: Path
) -> None:
    server = serve(lambda key, ours: None)
    module = served_jobs.learner(initial, served_jobs.config(server.policy, str(tmp_path)))
    prompts, numbers = module.prompts[:4], torch.rand(4, 8)
    found = module.engine.roll_out(module.model, prompts, numbers)
    assert not server.bodies and found.log_probs is None
    own = served_jobs.learner(initial, rl.policy_config("rloo"))
    assert own.engine.roll_out(own.model, prompts, numbers).response_tokens == found.response_tokens
    module._roll_out(served_jobs.batch_of(module), 0)
    assert len(server.bodies) == 32


@pytest.mark.parametrize("layout", [Layout(), Layout(tensor=2), Layout(pipeline=2), Layout(context=2)], ids=str)
def test_what_is_learned_does_not_depend_on_how_ranks_share_the_work(
    worlds: Worlds, initial: str, serve: Serve, tmp_path: Path, layout: Layout
) -> None:
    server = serve(served_jobs.shifted)
    rows, metrics = served_jobs.learned(initial, server.policy, str(tmp_path / "one"), STEPS)
    kwargs = {"path": initial, "served": server.policy, "run_dir": str(tmp_path / "two"), "steps": STEPS}
    ranks = worlds.run(layout, "served_jobs", "learned", 2, **kwargs)
    for step in range(STEPS):
        together = [row for rank in ranks[: 2 // layout.model_parallel] for row in rank[0][step]]
        assert [tokens for tokens, _ in together] == [tokens for tokens, _ in rows[step]]
        for (_, there), (_, here) in zip(together, rows[step], strict=True):
            assert there == pytest.approx(here, abs=2e-3 if step else 1e-5)
        for _, there in ranks:
            for name in metrics[step]:
                if name.startswith("off_policy/"):
                    assert there[step][name] == pytest.approx(metrics[step][name], rel=1e-3, abs=1e-4), name
    assert metrics[0]["off_policy/ess"] < 0.95
