"""Policy training: every algorithm learns, moves all its weights, logs its diagnostics, and does not see the layout."""

from __future__ import annotations

import math
from typing import Any

import pytest
import rl
import torch
from distributed import WorkerError, Worlds
from tiny import TOKENIZER

from nemo_advrm.errors import ConfigError, DataError, TrainingDiverged
from nemo_advrm.megatron.runtime import Layout, Runtime
from nemo_advrm.models.policy import PolicyModel, encode_prompts

ALGORITHMS = ("rloo", "reinforce", "grpo", "ppo")
ALWAYS = {"loss", "policy_loss", "grad_norm", "learning_rate", "approx_kl", "clipfrac", "entropy", "kl", "proxy"}
ALWAYS |= {"proxy_std", "response_length", "ended", "samples", "samples_per_second", "scores/1"}
OF_THE_CRITIC = {"value_loss", "critic_grad_norm", "explained_variance", "return_mean"}


@pytest.fixture(scope="session")
def initial(single: Runtime, tmp_path_factory: pytest.TempPathFactory) -> str:
    return rl.save_policy(tmp_path_factory.mktemp("policy") / "initial")


def _learner(algorithm: str, initial: str, kl: float = 0.0, **options: Any) -> PolicyModel:
    cfg = rl.policy_config(algorithm, **options)
    cfg.model.optim.lr = 2e-2
    cfg.rl.kl.coefficient = kl
    return rl.policy(cfg, initial)


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_the_policy_learns_to_repeat_the_word_that_is_rewarded(initial: str, algorithm: str) -> None:
    metrics = rl.train(_learner(algorithm, initial, updates_per_rollout=2), 18)
    assert metrics[0]["proxy"] < 0.6
    assert sum(m["proxy"] for m in metrics[-3:]) / 3 > metrics[0]["proxy"] + 1.5


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


def test_before_the_first_update_the_policy_is_its_reference(initial: str) -> None:
    first = rl.train(_learner("ppo", initial), 1)[0]
    assert first["kl"] == first["approx_kl"] == first["clipfrac"] == 0.0


def test_a_second_pass_over_the_same_rollouts_is_off_policy_and_is_clipped(initial: str) -> None:
    first = rl.train(_learner("ppo", initial, updates_per_rollout=4), 1)[0]
    assert first["approx_kl"] > 0 and first["clipfrac"] > 0


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
    data = module._prepare(rollouts, module.reward.judge(rollouts))
    assert [data.advantages_BT[i, 0].item() for i in range(4)] == [3.0, -7.0, 3.0, -7.0]
    assert all((data.advantages_BT[i][~data.mask_BT[i]] == 0).all() for i in range(len(rollouts)))


def test_the_policy_learns_to_end_when_unended_responses_are_penalised(initial: str) -> None:
    module = _learner("rloo", initial, apply_unended_penalty=True, unended_penalty=-5.0)
    metrics = rl.train(module, 18)
    assert metrics[-1]["ended"] > metrics[0]["ended"] + 0.3


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


def test_waiting_in_cpu_memory_changes_nothing_that_is_computed(initial: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a CPU nothing moves, but every move is asked for: the optimizer's there and back, the reference's there."""
    runs = []
    for away in (False, True):
        cfg = rl.policy_config("ppo")
        cfg.model.offload_reference = cfg.model.offload_optimizer_while_generating = away
        model = rl.policy(cfg, initial)
        moved: list[int] = []
        own = torch.Tensor.to

        def to(tensor: torch.Tensor, *args: Any, own: Any = own, moved: list[int] = moved, **kwargs: Any) -> Any:
            moved.append(id(tensor))
            return own(tensor, *args, **kwargs)

        runs.append(rl.train(model, 2))
        monkeypatch.setattr(torch.Tensor, "to", to)
        with model.optimizer.offloaded(), model.reference.resident():
            pass
        monkeypatch.undo()
        states = {id(tensor) for tensor in model.optimizer.state_tensors()}
        weights = len(list(model.reference.parts[0].parameters()))
        assert states and len(moved) == (2 * len(states) + weights if away else 0)
    for kept, moved_run in zip(*runs, strict=True):
        assert {**kept, "samples_per_second": 0} == {**moved_run, "samples_per_second": 0}


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
    kwargs: dict[str, Any] = {"path": initial, "algorithm": algorithm, "steps": 2}
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
    with pytest.raises(DataError, match=r"prompt 1 has 57 tokens.*leaves 56"):
        encode_prompts([prompt], TOKENIZER, cfg)
    assert len(encode_prompts([({"role": "user", "content": " ".join(["river"] * 55)},)], TOKENIZER, cfg)) == 1
