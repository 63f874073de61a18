"""Mixtures of experts at layouts of their own: going on elsewhere, first weights, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import checkpoint_jobs
import pytest
import torch
from architecture_jobs import build, config_of, descended, logits, put, tensors_of
from distributed import Worlds
from hf_models import VOCABULARY, tiny_hf

from nemo_advrm.config import load_config
from nemo_advrm.config.layout import validate_layout
from nemo_advrm.engine import checkpoint
from nemo_advrm.engine.runtime import Layout, Runtime
from nemo_advrm.errors import ConfigError, LayoutError

SHARED: dict[str, Any] = {"architecture": "experts", "use_distributed_optimizer": True}


def test_training_goes_over_three_layouts_with_the_losses_of_the_unbroken_run(
    single: Runtime, worlds: Worlds, tmp_path: Path
) -> None:
    unbroken = checkpoint_jobs.train_and_save(str(tmp_path / "unbroken"), 4, **SHARED)
    checkpoint_jobs.train_and_save(str(tmp_path / "1"), 1, **SHARED)
    losses = []
    for step, layout, size in ((1, Layout(expert=2), 2), (2, Layout(tensor=2), 2), (3, Layout(tensor=2, expert=4), 4)):
        ranks = worlds.run(
            layout,
            "checkpoint_jobs",
            "load_and_continue",
            size,
            path=str(tmp_path / str(step)),
            first=step,
            last=step + 1,
            out=str(tmp_path / str(step + 1)),
            sequence_parallel=layout.tensor > 1,
            **SHARED,
        )
        losses.append(ranks[0][0]["train/loss"])
    assert losses == pytest.approx([metrics["train/loss"] for metrics in unbroken[1:]], abs=1e-5)
    assert len({round(loss, 3) for loss in losses}) == 3


def test_no_two_experts_start_with_equal_weights(worlds: Worlds) -> None:
    experts = [tensor for rank in worlds.run(Layout(expert=2), "experts_jobs", "first_weights", 2) for tensor in rank]
    assert len(experts) == 4 * 4  # layers and experts
    for i, tensor in enumerate(experts):
        assert tensor.std() > 0.01
        assert not any(torch.equal(tensor, other) for other in experts[:i])


@pytest.mark.parametrize("shares", [[[0, 1, 2, 3, 4, 5, 6], [7]], [[], [5, 2]]], ids=["more_batches", "no_prompts"])
def test_ranks_that_share_experts_may_have_other_numbers_of_prompts(worlds: Worlds, shares: list[list[int]]) -> None:
    first, second = worlds.run(Layout(expert=2), "experts_jobs", "responses", 2, shares=shares)
    swapped, again = worlds.run(Layout(expert=2), "experts_jobs", "responses", 2, shares=shares[::-1])
    assert (first, second) == (again, swapped)
    assert [len(first), len(second)] == [len(share) for share in shares] and all(second.values())


@torch.no_grad()
@pytest.mark.parametrize("chosen", [1, 3])
def test_experts_that_keep_their_share_of_the_softmax_are_those_of_transformers(single: Runtime, chosen: int) -> None:
    hf = tiny_hf("qwen3_moe", norm_topk_prob=False, num_experts_per_tok=chosen)
    config = config_of(hf)
    assert not config.moe_norm_topk_prob
    model = build(config)
    put(model, tensors_of(hf))
    tokens_BS = torch.randint(3, VOCABULARY, (3, 20), generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(logits(model, tokens_BS), hf(tokens_BS).logits, rtol=0, atol=1e-4)


@pytest.mark.parametrize(("name", "number"), [("mixtral", {}), ("qwen3_moe", {"num_experts": 6})])
def test_experts_dealt_out_to_two_ranks_compute_and_train_as_those_of_transformers(
    single: Runtime, worlds: Worlds, tmp_path: Path, name: str, number: dict[str, int]
) -> None:
    hf = tiny_hf(name, **number)
    config, before = config_of(hf), tensors_of(hf)
    model = build(config)
    put(model, before)
    checkpoint.save(tmp_path / "lm", model)
    tokens_BS = torch.randint(3, VOCABULARY, (4, 20), generator=torch.Generator().manual_seed(0))
    prompts = [tokens_BS[0, :7].tolist(), tokens_BS[1, :2].tolist()]
    settings = {"max_new_tokens": 5, "do_sample": False, "eos_token_id": None}
    continued = [hf.generate(torch.tensor([prompt]), **settings)[0, len(prompt) :].tolist() for prompt in prompts]
    expected = hf(tokens_BS).logits.detach()
    loss, trained = descended(hf, tokens_BS, rate=0.5)

    def run(job: str, **kwargs: Any) -> list[Any]:
        kwargs |= {"config": config, "path": str(tmp_path / "lm"), "tokens_BS": tokens_BS, "sequence_parallel": False}
        return worlds.run(Layout(expert=2), "architecture_jobs", job, 2, **kwargs)

    for found, responses in run("compute", prompts=prompts, new=5):
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)
        assert responses == continued
    for found in run("descend", rate=0.5, out=str(tmp_path / "out")):
        assert found == pytest.approx(loss, abs=1e-5)
    after = dict(build(config, path=str(tmp_path / "out")).parts[0].named_parameters())
    assert after.keys() == trained.keys() and expected.std() > 0.5
    for key, tensor in trained.items():
        torch.testing.assert_close(after[key].data, tensor, rtol=0, atol=1e-4)
        assert (tensor - before[key]).abs().max() > 1e-3, key


@pytest.mark.parametrize(
    ("overrides", "named"),
    [
        (["model.moe_router_topk=5"], "model.moe_router_topk=5"),
        (["model.moe_router_topk=1"], "model.moe_norm_topk_prob=false"),
        (["model.bias=true"], "model.bias=true"),
        (["model.peft=lora"], "model.peft=lora"),
    ],
)
def test_impossible_experts_are_refused_by_key(overrides: list[str], named: str) -> None:
    with pytest.raises(ConfigError) as error:
        load_config(["model=tiny", "model.num_moe_experts=4", *overrides])
    assert named in str(error.value)


@pytest.mark.parametrize(
    ("settings", "world", "named"),
    [
        ({"num_moe_experts": 0, "expert_model_parallel_size": 2}, 2, "this model has no experts"),
        ({"expert_model_parallel_size": 3}, 3, "num_moe_experts=4 cannot be divided by .*expert_model_parallel_size=3"),
        ({"expert_model_parallel_size": 4}, 2, "2 processes of a pipeline stage cannot be divided by"),
        ({"tensor_model_parallel_size": 2}, 2, "needs model.sequence_parallel=true"),
    ],
)
def test_layouts_that_experts_do_not_fit_are_refused_by_key(settings: dict[str, Any], world: int, named: str) -> None:
    cfg = load_config(["model=tiny", "model.global_batch_size=12"])
    for key, value in {"num_moe_experts": 4, **settings}.items():
        setattr(cfg.model, key, value)
    with pytest.raises(LayoutError, match=named):
        validate_layout(cfg, world)


def test_the_experts_of_a_layout_may_be_shared_by_replicas() -> None:
    cfg = load_config(["model=tiny", "model.num_moe_experts=4", "model.expert_model_parallel_size=4"])
    validate_layout(cfg, 4)
    assert Layout(expert=4).experts_span_rows and not Layout(tensor=4, expert=2).experts_span_rows
