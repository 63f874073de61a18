"""The optimizer against PyTorch's AdamW, gradient accumulation, clipping, and the learning-rate schedule by hand."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tiny import ARCHITECTURES, TOKENIZER, pairs, tiny_config

from nemo_advrm.config.schema import OptimConfig, ScheduleConfig
from nemo_advrm.data.encoding import EncodedPair
from nemo_advrm.engine import checkpoint
from nemo_advrm.engine.optim import learning_rate
from nemo_advrm.engine.runtime import Runtime
from nemo_advrm.engine.schedule import forward_backward
from nemo_advrm.errors import TrainingDiverged
from nemo_advrm.models.reward_model import RewardModel


def _plain_loss(module: torch.nn.Module, rows: list[EncodedPair]) -> torch.Tensor:
    """Bradley-Terry loss of weighted pairs, one unpadded sequence at a time, by autograd alone."""
    losses = []
    for row in rows:
        scores = []
        for tokens in (row.chosen, row.rejected):
            ids = torch.tensor([tokens])
            last = torch.tensor([len(tokens) - 1])
            scores.append(module(ids, torch.arange(len(tokens))[None], read_at_B=last)[0, 0])
        losses.append(-row.weight * torch.nn.functional.logsigmoid(scores[0] - scores[1]))
    return torch.stack(losses).mean()


@pytest.mark.platform
@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("clip", [0.0, 0.05])
def test_three_steps_are_those_of_plain_adamw(single: Runtime, architecture: str, clip: float) -> None:
    cfg = tiny_config(architecture)
    cfg.trainer.gradient_clip_val = clip
    optim = cfg.model.optim
    optim.weight_decay = 0.1
    ours, plain = (RewardModel(cfg, TOKENIZER, pairs(24), []) for _ in range(2))
    parameters = dict(plain.model.parts[0].named_parameters())
    # Megatron decays matrices only
    groups = [
        {"params": [p for p in parameters.values() if p.ndim > 1], "weight_decay": 0.1},
        {"params": [p for p in parameters.values() if p.ndim == 1], "weight_decay": 0.0},
    ]
    adam = torch.optim.AdamW(groups, lr=optim.lr, betas=tuple(optim.betas), eps=optim.eps)  # type: ignore[arg-type]
    steps = ours.steps(0)
    for step in range(3):
        batch = next(steps)
        loss = _plain_loss(plain.model.parts[0], batch)
        grads = torch.autograd.grad(loss, list(parameters.values()))
        for parameter, grad in zip(parameters.values(), grads, strict=True):
            parameter.grad = grad
        norm = torch.cat([g.flatten() for g in grads]).norm()
        if clip:
            torch.nn.utils.clip_grad_norm_(parameters.values(), clip)
        adam.step()
        metrics = ours.train_on(batch, step)
        assert metrics["train/loss"] == pytest.approx(loss.item(), rel=1e-5)
        assert metrics["grad_norm"] == pytest.approx(norm.item(), rel=1e-4)
        assert norm > 2 * clip
    for name, parameter in ours.model.parts[0].named_parameters():
        torch.testing.assert_close(parameter, parameters[name], rtol=1e-4, atol=2e-6, msg=name)


@pytest.mark.platform
def test_gradients_are_counted_once_after_zero_grad_and_added_up_without_it(single: Runtime) -> None:
    module = RewardModel(tiny_config(), TOKENIZER, pairs(8), [])
    batch = module._microbatches(pairs(8))
    norms = []
    for clear in (True, True, False):
        if clear:
            module.optimizer.zero_grad()
        forward_backward(module.model, batch, module._loss)
        grads = [p.main_grad for p in module.model.parts[0].parameters()]
        norms.append(torch.cat([g.flatten() for g in grads]).norm().item())
    assert norms[0] == pytest.approx(norms[1], rel=1e-6)
    assert norms[2] > norms[0]


def test_a_step_after_a_step_does_not_see_the_first_ones_gradient(single: Runtime) -> None:
    cfg = tiny_config()
    cfg.model.optim.lr = 0.0
    module = RewardModel(cfg, TOKENIZER, pairs(8), [])
    first, second = (module.train_on(pairs(8), step)["grad_norm"] for step in range(2))
    assert first == pytest.approx(second, rel=1e-6)


def _optim(name: str = "CosineAnnealing", warmup: int = 0, minimum: float = 0.0) -> OptimConfig:
    return OptimConfig(lr=1.0, sched=ScheduleConfig(name, warmup, minimum))


@pytest.mark.parametrize(
    ("step", "optim", "expected"),
    [
        (0, _optim("constant"), 1.0),
        (500, _optim("constant"), 1.0),
        (0, _optim("constant", warmup=4), 0.25),
        (3, _optim("constant", warmup=4), 1.0),
        (0, _optim(), 1.0),
        (50, _optim(), 0.5),
        (25, _optim(), 0.5 + 2**0.5 / 4),  # (1 + cos 45 degrees) / 2
        (100, _optim(), 0.0),
        (1000, _optim(), 0.0),
        (100, _optim(minimum=0.2), 0.2),
        (50, _optim(minimum=0.2), 0.6),
        (9, _optim(warmup=20), 0.5),
        (20, _optim(warmup=20), 1.0),
        (60, _optim(warmup=20), 0.5),
        (5, _optim(warmup=200), 0.03),
    ],
)
def test_the_learning_rate_is_the_one_computed_by_hand(step: int, optim: OptimConfig, expected: float) -> None:
    assert learning_rate(step, optim, 100) == pytest.approx(expected)


@pytest.mark.platform
def test_the_learning_rate_of_the_schedule_is_the_one_applied(single: Runtime) -> None:
    cfg = tiny_config()
    cfg.model.optim.sched.warmup_steps = 2
    module = RewardModel(cfg, TOKENIZER, pairs(8), [])
    rates = [module.train_on(pairs(8), step)["learning_rate"] for step in range(3)]
    assert rates == pytest.approx([5e-4, 1e-3, 1e-3])
    assert {group["lr"] for group in module.optimizer.core.param_groups} == {1e-3}


def test_a_nan_weight_stops_training_at_its_step_and_the_last_checkpoint_stays_good(
    single: Runtime, tmp_path: Path
) -> None:
    module = RewardModel(tiny_config(), TOKENIZER, pairs(8), [])
    checkpoint.save(tmp_path / "good", module.model, module.optimizer)
    weights = {k: v.clone() for k, v in module.model.state_dict().items() if torch.is_tensor(v)}
    with torch.no_grad():
        next(module.model.parts[0].parameters()).fill_(float("nan"))
    with pytest.raises(TrainingDiverged, match=r"step 17.*the last checkpoint is untouched"):
        module.train_on(pairs(8), 17)
    checkpoint.load(tmp_path / "good", module.model, module.optimizer)
    assert all(torch.equal(module.model.state_dict()[k], v) for k, v in weights.items())
    assert module.train_on(pairs(8), 17)["grad_norm"] > 0
