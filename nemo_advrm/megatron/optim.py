"""Megatron-Core's optimizer and the learning-rate schedule as a function of the step alone."""

from __future__ import annotations

import math
from typing import Any

import torch
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer

from nemo_advrm.errors import ConfigError, TrainingDiverged
from nemo_advrm.megatron import runtime
from nemo_advrm.megatron.model import MegatronModel
from nemo_advrm.schema import OptimConfig


def learning_rate(step: int, optim: OptimConfig, max_steps: int) -> float:
    """Rate of optimizer step ``step`` (counted from 0): linear warm-up, then constant or cosine to ``min_lr``.

    ``max_steps`` is the step at which the cosine ends. A restarted run needs no scheduler state.
    """
    schedule = optim.sched
    if step < schedule.warmup_steps:
        return optim.lr * (step + 1) / schedule.warmup_steps
    if schedule.name == "constant":
        return optim.lr
    span = max(1, max_steps - schedule.warmup_steps)
    progress = min(1.0, (step - schedule.warmup_steps) / span)
    return schedule.min_lr + (optim.lr - schedule.min_lr) * 0.5 * (1.0 + math.cos(math.pi * progress))


class MegatronOptimizer:
    """Megatron-Core's optimizer over all chunks of a model, with clipping by the global norm."""

    def __init__(self, model: MegatronModel, optim: OptimConfig, clip: float) -> None:
        if model.model.use_distributed_optimizer and not runtime.current().on_gpu:
            raise ConfigError("model.use_distributed_optimizer=true needs a GPU: Megatron-Core's asks for CUDA tensors")
        self.model = model
        self.optim = optim
        config = OptimizerConfig(
            optimizer=optim.name,
            lr=optim.lr,
            min_lr=optim.sched.min_lr,
            weight_decay=optim.weight_decay,
            adam_beta1=optim.betas[0],
            adam_beta2=optim.betas[1],
            adam_eps=optim.eps,
            clip_grad=clip if clip > 0 else math.inf,  # the norm is wanted even when nothing is clipped
            bf16=model.config.bf16,
            params_dtype=model.config.params_dtype,
            use_distributed_optimizer=model.model.use_distributed_optimizer,
        )
        self.core = get_megatron_optimizer(
            config, model.chunks, use_gloo_process_groups=runtime.current().on_gpu
        )

    def zero_grad(self) -> None:
        """Clear gradients; to be called before every accumulation.

        Both are needed: the optimizer points ``param.grad`` at the buffer, and a gradient left there
        would be counted twice.
        """
        for chunk in self.model.chunks:
            chunk.zero_grad_buffer()
        self.core.zero_grad()

    def step(self, learning_rate: float, step: int) -> float:
        """Clip and update; returns the gradient norm before clipping.

        Raises TrainingDiverged, naming ``step``, when the norm is NaN or infinite.
        """
        for group in self.core.param_groups:
            group["lr"] = learning_rate * group.get("lr_mult", 1.0)
            group["weight_decay"] = self.optim.weight_decay * group.get("wd_mult", 1.0)
        _, norm, _ = self.core.step()
        norm = float(norm)
        if not math.isfinite(norm):
            raise TrainingDiverged(f"the gradient norm is {norm} at step {step}; the last checkpoint is untouched")
        return norm

    @property
    def _inner(self) -> list[torch.optim.Optimizer]:
        """PyTorch's optimizers below Megatron's: several when parameters are split into groups."""
        parts = getattr(self.core, "chained_optimizers", [self.core])
        return [part.optimizer for part in parts if part.optimizer is not None]

    @property
    def started(self) -> bool:
        """False before the first step, when there is no state yet (a policy while its critic warms up)."""
        return any(optimizer.state for optimizer in self._inner)

    def reset(self) -> None:
        """Forget all state, as before the first step; to be called after the weights have changed."""
        for optimizer in self._inner:
            optimizer.state.clear()
        self.core.reload_model_params()

    def sharded_state_dict(self, model_state: dict[str, Any], is_loading: bool = False) -> dict[str, Any]:
        return self.core.sharded_state_dict(model_state, is_loading=is_loading)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.core.load_state_dict(state)

    def state_tensors(self) -> list[torch.Tensor]:
        """All tensors of the optimizer state by parameter and name, for memory accounting and tests."""
        states = (state for optimizer in self._inner for state in optimizer.state.values())
        return [t for state in states for _, t in sorted(state.items()) if isinstance(t, torch.Tensor)]
