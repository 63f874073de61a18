"""Policy training: every algorithm learns, moves all its weights, logs its diagnostics, and does not see the layout."""

from __future__ import annotations

import gc
import math
import random
import statistics
from types import SimpleNamespace
from typing import Any

import pytest
import rl
import torch
from distributed import WorkerError, Worlds
from tiny import TOKENIZER, VOCABULARY, optimizer_state
from torch.multiprocessing.reductions import StorageWeakRef

from nemo_advrm.engine import offload, optim
from nemo_advrm.engine import precision as engine_precision
from nemo_advrm.engine.microbatches import EncodedResponse
from nemo_advrm.engine.model import MegatronModel
from nemo_advrm.engine.precision import cpu_has_bf16
from nemo_advrm.engine.runtime import Layout, Runtime
from nemo_advrm.engine.schedule import forward_backward
from nemo_advrm.errors import ConfigError, DataError, TrainingDiverged
from nemo_advrm.models.policy import PolicyModel
from nemo_advrm.models.rollout_batch import RolloutBatch
from nemo_advrm.rollouts.run_prompts import encode_prompts

ALGORITHMS = ("rloo", "reinforce", "grpo", "ppo")
ALWAYS = {"loss", "policy_loss", "grad_norm", "learning_rate", "approx_kl", "clipfrac", "entropy", "kl", "proxy"}
ALWAYS |= {"proxy_std", "response_length", "ended", "samples", "samples_per_second", "scores/1", "reward"}
OF_THE_CRITIC = {"value_loss", "critic_grad_norm", "explained_variance", "return_mean"}


@pytest.fixture(scope="session")
def initial(single: Runtime, tmp_path_factory: pytest.TempPathFactory) -> str:
    return rl.save_policy(tmp_path_factory.mktemp("policy") / "initial")


def _learner(algorithm: str, initial: str, kl: float = 0.0, **options: Any) -> PolicyModel:
    cfg = rl.policy_config(algorithm, **options)
    cfg.model.optim.lr = 2e-2
    cfg.rl.kl.coefficient = kl
    return rl.policy(cfg, initial)


@pytest.mark.long
@pytest.mark.platform
@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_the_policy_learns_to_repeat_the_word_that_is_rewarded(initial: str, algorithm: str) -> None:
    metrics = rl.train(_learner(algorithm, initial, updates_per_rollout=2), 18)
    assert metrics[0]["proxy"] < 0.6
    assert sum(m["proxy"] for m in metrics[-3:]) / 3 > metrics[0]["proxy"] + 1.5


@pytest.mark.platform
@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_every_weight_moves_in_one_step_and_the_reference_does_not(initial: str, algorithm: str) -> None:
    cfg = rl.policy_config(algorithm)
    module = rl.policy(cfg, initial)
    before, reference = rl.weights(module.model.parts[0]), rl.weights(module.reference.parts[0])
    critic = rl.weights(module.critic.model.parts[0]) if module.critic else {}
    rl.train(module, 1)
    after = rl.weights(module.model.parts[0])
    assert len(before) > 20 and [k for k in before if torch.equal(before[k], after[k])] == []
    assert all(torch.equal(v, reference[k]) for k, v in module.reference.parts[0].named_parameters())
    assert bool(critic) == (algorithm == "ppo")
    if module.critic:
        moved = rl.weights(module.critic.model.parts[0])
        assert "head.weight" in critic and [k for k in critic if torch.equal(critic[k], moved[k])] == []


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_the_diagnostics_are_there_and_finite_at_every_step(initial: str, algorithm: str) -> None:
    wanted = ALWAYS | (OF_THE_CRITIC if algorithm == "ppo" else set())
    for metrics in rl.train(_learner(algorithm, initial), 2):
        assert wanted <= metrics.keys()
        assert all(math.isfinite(value) for value in metrics.values())
        assert metrics["samples"] == 32 and 1 <= metrics["response_length"] <= 8 and 0 <= metrics["ended"] <= 1


def _shaken(module: PolicyModel, share: float) -> PolicyModel:
    """The module with every weight of its reference off by ``share`` of itself, up or down."""
    draw = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for weight in module.reference.parts[0].parameters():
            weight.mul_(1 + share * (2 * torch.randint(2, weight.shape, generator=draw) - 1))
    return module


@torch.no_grad()
def _log_probs(model: MegatronModel, rows: list[EncodedResponse]) -> list[torch.Tensor]:
    """Of the response tokens of each row, from a pass of its own without padding."""
    found = []
    for row in rows:
        tokens = torch.tensor([row.tokens])
        everywhere = torch.ones_like(tokens, dtype=torch.bool)
        logits = model.parts[0](tokens, torch.arange(tokens.size(1))[None], predict_BS=everywhere)
        picked = logits.float().log_softmax(-1)[:-1].gather(1, tokens[0, 1:, None]).squeeze(1)
        found.append(picked[row.prompt_length - 1 :])
    return found


def test_kl_is_that_of_the_reference_and_the_ratio_that_of_the_rollouts_own_policy(initial: str) -> None:
    module = _shaken(_learner("ppo", initial), 0.3)
    batch = next(module.steps(0))
    rollouts = module._roll_out(batch, 0)
    rows = RolloutBatch.of(rollouts).rows
    ours, theirs = (_log_probs(model, rows) for model in (module.model, module.reference))
    kl = torch.stack([(a - b).sum() for a, b in zip(ours, theirs, strict=True)]).mean().item()
    metrics = module.train_on(batch, 0)
    assert abs(kl) > 0.1 and metrics["kl"] == pytest.approx(kl, rel=1e-3)
    # another policy than the reference, and still the one that wrote the rollouts
    assert metrics["approx_kl"] == pytest.approx(0, abs=1e-6) and metrics["clipfrac"] == 0
    assert _learner("ppo", initial).train_on(batch, 0)["kl"] == pytest.approx(0, abs=1e-4)


def test_ppo_pays_kl_by_the_token_and_the_reward_at_the_last_one(initial: str) -> None:
    """With gamma 1, lambda 1 and a critic that says 0, A_t is the sum of the token rewards from t on."""
    module = _shaken(_learner("ppo", initial, kl=0.5, gamma=1.0, gae_lambda=1.0, scale_advantages=False), 0.3)
    assert module.critic is not None
    with torch.no_grad():
        module.critic.model.parts[0].head.weight.zero_()
    rollouts = module._roll_out(next(module.steps(0)), 0)
    reward_output = module.reward.compute_rewards(rollouts)
    data = module._prepare(rollouts, reward_output)
    ours, theirs = (_log_probs(model, data.rows) for model in (module.model, module.reference))
    assert reward_output.rewards_N.std() > 0.1 and len({len(row) for row in ours}) > 1
    for i, (own, reference) in enumerate(zip(ours, theirs, strict=True)):
        rewards = -0.5 * (own - reference).abs()
        rewards[-1] += reward_output.rewards_N[i]
        expected = rewards.flip(0).cumsum(0).flip(0)
        torch.testing.assert_close(data.advantages_BT[i, : len(own)], expected, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(data.returns_BT[i, : len(own)], expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("value", [0.0, 0.1, 1e4])
@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_a_constant_reward_trains_nothing_whatever_rounding_makes_of_it(
    initial: str, algorithm: str, value: float, precision: str
) -> None:
    """Rewards differ in their last digit, and by the KL from a reference whose weights are the policy's but for one."""
    if precision == "bf16" and not cpu_has_bf16():
        pytest.skip("this processor has no bf16")
    # a critic that says 0 and lambda 1: PPO's advantages are the constant itself
    cfg = rl.policy_config(algorithm, gamma=1.0, gae_lambda=1.0)
    cfg.rl.kl.coefficient = 0.01
    cfg.precision.name, cfg.model.use_distributed_optimizer = precision, True
    draw = random.Random(0)
    module = rl.policy(cfg, initial, score=lambda text: value * (1 + draw.choice((-1, 0, 1)) * 2**-23))
    _shaken(module, torch.finfo(getattr(torch, {"fp32": "float32", "bf16": "bfloat16"}[precision])).eps)
    if module.critic is not None:
        with torch.no_grad():
            module.critic.model.parts[0].head.weight.zero_()
    metrics = rl.train(module, 1)[0]
    assert metrics["kl"] != 0 and (value == 0 or metrics["proxy_std"] > 0)
    assert metrics["grad_norm"] == 0


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_a_small_difference_of_rewards_trains_as_a_large_one_does(initial: str, algorithm: str) -> None:
    norms = []
    for scale in (1.0, 1e-6):
        module = _learner(algorithm, initial)
        module.reward = rl.policy(module.config, initial, score=lambda text, s=scale: s * rl.count_of_word(text)).reward
        if module.critic is not None:
            with torch.no_grad():
                module.critic.model.parts[0].head.weight.zero_()
        norms.append(rl.train(module, 1)[0]["grad_norm"])
    assert norms[0] > 0.1 and norms[1] == pytest.approx(norms[0], rel=1e-3)


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_a_later_update_on_the_same_rollouts_is_off_policy_and_is_clipped(initial: str, algorithm: str) -> None:
    first = rl.train(_learner(algorithm, initial, updates_per_rollout=4), 1)[0]
    assert first["approx_kl"] > 0 and first["clipfrac"] > 0


@pytest.mark.parametrize("algorithm", ["rloo", "reinforce"])
def test_the_first_of_several_updates_has_the_gradient_of_a_single_one(initial: str, algorithm: str) -> None:
    gradients = []
    for updates in (1, 2):
        module = _learner(algorithm, initial, updates_per_rollout=updates)
        rollouts = module._roll_out(next(module.steps(0)), 0)
        data = module._prepare(rollouts, module.reward.compute_rewards(rollouts))
        everything = [data.microbatch(module.model, list(range(len(rollouts))), TOKENIZER.pad_id)]
        module.optimizer.zero_grad()
        forward_backward(module.model, everything, module._loss)
        gradients.append([p.main_grad.clone() for p in module.model.parts[0].parameters()])
    assert max(g.abs().max() for g in gradients[0]) > 1e-2
    for single, first in zip(*gradients, strict=True):
        torch.testing.assert_close(first, single, rtol=1e-5, atol=1e-7)


def test_a_token_that_has_left_the_bounds_in_the_direction_of_its_advantage_is_not_pushed_further(initial: str) -> None:
    """Of rloo with two updates: by hand, q = 1.5 with A = 1 has no gradient, and with A = -1 that of -A q."""
    module = _learner("rloo", initial, updates_per_rollout=2)
    logits = torch.zeros(2, VOCABULARY, requires_grad=True)
    extra = {
        "targets_N": torch.tensor([5, 5]),
        "old_log_probs_N": torch.full((2,), -math.log(VOCABULARY * 1.5)),
        "advantages_N": torch.tensor([1.0, -1.0]),
    }
    loss, count, sums = module._loss(logits, SimpleNamespace(extra=extra))
    loss.backward()
    assert loss.item() == pytest.approx(-1.2 + 1.5) and count == 2 and sums["clipfrac"][0] == 2
    assert logits.grad is not None and logits.grad[0].abs().max() == 0
    assert logits.grad[1, 5].item() == pytest.approx(1.5 * (1 - 1 / VOCABULARY))


@pytest.mark.long
def test_a_kl_penalty_keeps_the_policy_nearer_to_its_start(initial: str) -> None:
    for algorithm in ("rloo", "ppo"):
        free, held = (rl.train(_learner(algorithm, initial, kl=kl), 10)[-1]["kl"] for kl in (0.0, 10.0))
        assert held < 0.5 * free, algorithm


def test_a_response_that_does_not_end_gets_the_penalty_in_place_of_its_reward(initial: str) -> None:
    cfg = rl.policy_config("reinforce", apply_unended_penalty=True, unended_penalty=-7.0, scale_advantages=False)
    cfg.rl.baseline = "none"
    module = rl.policy(cfg, initial, score=lambda text: 3.0)
    batch = next(module.steps(0))
    rollouts = module._roll_out(batch, 0)
    rollouts.ended[:4] = [True, False, True, False]
    reward_output = module._compute_rewards(rollouts)
    assert reward_output.rewards_N[:4].tolist() == [3.0, -7.0, 3.0, -7.0]
    assert reward_output.proxy_N[:4].tolist() == [3.0] * 4
    data = module._prepare(rollouts, reward_output)
    assert [data.advantages_BT[i, 0].item() for i in range(4)] == [3.0, -7.0, 3.0, -7.0]
    assert all((data.advantages_BT[i][~data.mask_BT[i]] == 0).all() for i in range(len(rollouts)))


def test_what_is_recorded_and_logged_is_the_reward_that_was_trained_on(initial: str) -> None:
    module = _learner("rloo", initial, apply_unended_penalty=True)
    (metrics,) = rl.train(module, 1)
    rollouts, reward_output = module.last_rollouts, module.last_reward_output
    assert rollouts is not None and reward_output is not None and {True, False} == set(rollouts.ended)
    counts = [rl.count_of_word(text) for text in rollouts.responses]
    penalty = min(c for c, ended in zip(counts, rollouts.ended, strict=True) if ended) - statistics.pstdev(counts)
    trained = [c if ended else penalty for c, ended in zip(counts, rollouts.ended, strict=True)]
    assert reward_output.rewards_N.tolist() == pytest.approx(trained)
    assert metrics["reward"] == pytest.approx(statistics.fmean(trained))
    assert metrics["proxy"] == pytest.approx(statistics.fmean(counts))


@pytest.mark.parametrize("penalty", [-5.0, None])
def test_the_policy_learns_to_end_when_unended_responses_are_penalised(initial: str, penalty: float | None) -> None:
    module = _learner("rloo", initial, apply_unended_penalty=True, unended_penalty=penalty)
    metrics = rl.train(module, 18)
    assert metrics[-1]["ended"] > metrics[0]["ended"] + 0.3


@pytest.mark.long
def test_an_entropy_bonus_keeps_the_entropy_higher(initial: str) -> None:
    low, high = (rl.train(_learner("rloo", initial, entropy_coefficient=c), 12)[-1]["entropy"] for c in (0.0, 1.0))
    assert high > low + 0.3


def test_rollouts_of_a_prompt_stay_together_and_end_tokens_are_part_of_the_response(initial: str) -> None:
    module = _learner("rloo", initial)
    rollouts = module._roll_out(next(module.steps(0)), 0)
    assert [rollouts.prompt_index[i : i + 4] for i in range(0, 32, 4)] == [[i] * 4 for i in rollouts.prompt_index[::4]]
    for tokens, ended, text in zip(rollouts.response_tokens, rollouts.ended, rollouts.responses, strict=True):
        assert ended == (tokens[-1] == TOKENIZER.eos_id) and TOKENIZER.eos_id not in tokens[:-1]
        assert TOKENIZER.encode(text) == tokens[: len(tokens) - ended]
        assert not set(tokens) & set(TOKENIZER.control_ids)


def test_a_step_is_reproducible_and_seeds_differ(initial: str) -> None:
    runs = [rl.train(rl.policy(rl.policy_config("rloo"), initial, seed=seed), 2) for seed in (0, 0, 1)]
    drop = {"samples_per_second"}
    plain = [[{k: v for k, v in m.items() if k not in drop} for m in run] for run in runs]
    assert plain[0] == plain[1] != plain[2]


def test_waiting_in_cpu_memory_changes_nothing_that_is_computed(initial: str) -> None:
    runs = []
    for away in (False, True):
        cfg = rl.policy_config("ppo")
        cfg.model.offload_reference = cfg.model.offload_optimizer_while_generating = away
        runs.append(rl.train(rl.policy(cfg, initial), 2))
    for kept, moved_run in zip(*runs, strict=True):
        assert {**kept, "samples_per_second": 0} == {**moved_run, "samples_per_second": 0}


class _Memories:
    """Two memories on a machine that has one: a move makes a copy, and it is known in which of them a storage lies.

    A CPU has no second memory to move to. What can be shown is that tensors get other storages and that nothing keeps
    the old ones, without which no memory would be free.
    """

    def __init__(self, single: Runtime, monkeypatch: pytest.MonkeyPatch) -> None:
        self._held: dict[int, tuple[StorageWeakRef, str]] = {}

        def on_device(like: torch.Tensor, device: torch.device) -> torch.Tensor:
            return self.put(torch.empty_like(like), device.type)

        monkeypatch.setattr(offload, "_room_on_device", on_device)
        monkeypatch.setattr(offload, "host_buffer", lambda like: self.put(torch.empty_like(like), "cpu"))
        monkeypatch.setattr(single, "device", torch.device("cuda", 0))
        monkeypatch.setattr(optim, "_is_on", lambda value, device: self.place(value) == device.type)

    def put(self, tensor: torch.Tensor, place: str) -> torch.Tensor:
        reference = StorageWeakRef(tensor.untyped_storage())
        self._held[reference.cdata] = (reference, place)
        return tensor

    def place(self, value: Any) -> str:
        """Where a tensor lies; empty for what was never put anywhere."""
        if not isinstance(value, torch.Tensor):
            return ""
        reference, place = self._held.get(StorageWeakRef(value.untyped_storage()).cdata, (None, ""))
        return place if reference is not None and not reference.expired() else ""

    def in_use(self, place: str) -> int:
        """Storages that live in a memory."""
        gc.collect()
        return sum(where == place and not reference.expired() for reference, where in self._held.values())


@pytest.mark.parametrize("wanted", [True, False])
def test_the_optimizer_leaves_the_device_while_responses_are_made_and_comes_back_as_it_was(
    initial: str, single: Runtime, monkeypatch: pytest.MonkeyPatch, wanted: bool
) -> None:
    cfg = rl.policy_config("rloo")
    monkeypatch.setattr(engine_precision, "cpu_has_bf16", lambda: True)  # slow without, but the same
    cfg.precision.name, cfg.model.use_distributed_optimizer = "bf16", True  # fp32 weights stand behind those of 16 bits
    cfg.model.offload_optimizer_while_generating = wanted
    module = rl.policy(cfg, initial)
    rl.train(module, 1)

    def tensors() -> list[torch.Tensor]:
        [part] = module.optimizer._distributed
        main = [shard for group in part.shard_fp32_from_float16_groups for shard in group if shard is not None]
        return [*main, *optimizer_state(module.optimizer)]

    memories = _Memories(single, monkeypatch)
    for tensor in tensors():
        memories.put(tensor, "cuda")
    del tensor  # nothing here may keep a storage
    count, before = memories.in_use("cuda"), [tensor.clone() for tensor in tensors()]
    assert count > 60
    buffers = []
    for _ in range(2):
        with module.optimizer.offloaded():
            assert {memories.place(tensor) for tensor in tensors()} == ({"cpu"} if wanted else {"cuda"})
            assert memories.in_use("cuda") == (0 if wanted else count)
            assert all(torch.equal(a, b) for a, b in zip(tensors(), before, strict=True))
            buffers.append([tensor.data_ptr() for tensor in tensors()])
        assert {memories.place(tensor) for tensor in tensors()} == {"cuda"}
        assert (memories.in_use("cuda"), memories.in_use("cpu")) == (count, count if wanted else 0)
        assert all(torch.equal(a, b) for a, b in zip(tensors(), before, strict=True))
    assert buffers[0] == buffers[1]  # pinned once
    monkeypatch.undo()
    module.train_on(next(module.steps(1)), 1)
    assert not all(torch.equal(a, b) for a, b in zip(tensors(), before, strict=True))  # it is these that train


def test_the_reference_is_on_the_device_while_it_is_used_and_no_longer(
    initial: str, single: Runtime, monkeypatch: pytest.MonkeyPatch
) -> None:
    reference = rl.policy(rl.policy_config("rloo"), initial).reference
    weights = list(reference.parts[0].parameters())
    before = [weight.detach().clone() for weight in weights]
    memories = _Memories(single, monkeypatch)
    reference.parked = offload.Parked(weights, single.device)
    assert {memories.place(weight) for weight in weights} == {"cpu"}
    waiting = [weight.data_ptr() for weight in weights]
    for ahead in (False, True):
        if ahead:
            reference.prefetch()
            reference.prefetch()
            assert memories.in_use("cuda") == len(weights) and {memories.place(w) for w in weights} == {"cpu"}
        with reference.resident(), reference.resident():
            reference.prefetch()  # it is there
            assert {memories.place(weight) for weight in weights} == {"cuda"}
            assert memories.in_use("cuda") == len(weights) and not {w.data_ptr() for w in weights} & set(waiting)
            assert all(torch.equal(a, b) for a, b in zip(weights, before, strict=True))
        assert [weight.data_ptr() for weight in weights] == waiting  # nothing was copied back
        assert memories.in_use("cuda") == 0
    monkeypatch.setattr(offload, "_is_free", lambda device, wanted: False)
    reference.prefetch()
    assert memories.in_use("cuda") == 0, "there is no room for it yet"


def test_the_critic_can_be_trained_alone_first(initial: str) -> None:
    module = _learner("ppo", initial, critic_warmup_steps=2)
    before = rl.weights(module.model.parts[0])
    metrics = rl.train(module, 2)
    assert all(torch.equal(v, before[k]) for k, v in module.model.parts[0].named_parameters())
    assert metrics[0].keys() >= ALWAYS | OF_THE_CRITIC and metrics[0]["critic_grad_norm"] > 0
    module.train_on(next(module.steps(2)), 2)
    assert not all(torch.equal(v, before[k]) for k, v in module.model.parts[0].named_parameters())


@pytest.mark.parametrize("layout", [Layout(), Layout(context=2)], ids=["dp2", "cp2"])
@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_advantages_and_metrics_do_not_depend_on_how_ranks_share_the_work(
    worlds: Worlds, initial: str, algorithm: str, layout: Layout
) -> None:
    # the default length penalty follows from the rewards of all ranks
    penalised = algorithm == "reinforce"
    kwargs: dict[str, Any] = {
        "path": initial, "algorithm": algorithm, "steps": 2, "apply_unended_penalty": penalised,
    }  # fmt: skip
    rows, metrics = rl.advantages_and_metrics(**kwargs)
    ranks = worlds.run(layout, "rl", "advantages_and_metrics", 2, **kwargs)
    if layout.context == 2:
        assert [ranks[0][0]] == [rank[0] for rank in ranks[1:]]  # one replica: both work on all rows
    for step in range(2):
        together = [row for rank in ranks[: 2 // layout.model_parallel] for row in rank[0][step]]
        assert [tokens for tokens, _ in together] == [tokens for tokens, _ in rows[step]]
        for (_, there), (_, here) in zip(together, rows[step], strict=True):
            assert there == pytest.approx(here, abs=2e-3 if step else 1e-5)
        for _, there in ranks:
            for key in ALWAYS - {"samples_per_second"}:
                assert there[step][key] == pytest.approx(metrics[step][key], rel=1e-3, abs=1e-4), key


def test_prompts_that_ranks_cannot_share_are_refused_by_key(worlds: Worlds, initial: str) -> None:
    with pytest.raises(WorkerError, match=f"{ConfigError.__name__}: rl.prompts_per_step=7 cannot be divided by 2"):
        worlds.run(
            Layout(), "rl", "advantages_and_metrics", 2, path=initial, algorithm="rloo", steps=1, prompts_per_step=7
        )


def test_a_poisoned_policy_stops_at_its_step(initial: str) -> None:
    module = _learner("rloo", initial)
    with torch.no_grad():
        list(module.model.parts[0].parameters())[-1].fill_(float("nan"))
    with pytest.raises(TrainingDiverged, match="step 5"):
        module.train_on(next(module.steps(5)), 5)


def test_a_prompt_that_leaves_no_room_for_the_response_is_refused(initial: str) -> None:
    cfg = rl.policy_config("rloo")
    prompt = ({"role": "user", "content": " ".join(["river"] * 56)},)
    with pytest.raises(DataError, match=r"prompt 1: the prompt has 57 tokens.*leaves 56"):
        encode_prompts([prompt], TOKENIZER, cfg)
    assert len(encode_prompts([({"role": "user", "content": " ".join(["river"] * 55)},)], TOKENIZER, cfg)) == 1
