"""Megatron-Core's optimizer, and the learning-rate schedule as a function of the step."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from typing import Any

import torch
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

from nemo_advrm.config.schema import OptimConfig
from nemo_advrm.engine import offload, runtime
from nemo_advrm.engine.cpu import types_of_cuda_tensors
from nemo_advrm.engine.model import MegatronModel
from nemo_advrm.engine.optimizer_parts import in_parts
from nemo_advrm.errors import TrainingDiverged

# saves the distributed optimizer's state in the form that any other layout can read
_ANY_LAYOUT = {"distrib_optim_sharding_type": "fully_reshardable", "chained_optim_avoid_prefix": True}


def learning_rate(step: int, optim: OptimConfig, max_steps: int) -> float:
    """Learning rate of step ``step``, counted from 0: linear warm-up, then constant, or cosine to ``min_lr``.

    The cosine ends at ``max_steps``. There is no scheduler state to save.
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
    """Megatron-Core's optimizer of all chunks of a model, with clipping by the global gradient norm."""

    def __init__(self, model: MegatronModel, optim: OptimConfig, clip: float) -> None:
        self.model = model
        self.optim = optim
        self._buffers = offload.HostBuffers()
        self._coming: offload.Coming | None = None
        config = OptimizerConfig(
            optimizer=optim.name,
            lr=optim.lr,
            min_lr=optim.sched.min_lr,
            weight_decay=optim.weight_decay,
            adam_beta1=optim.betas[0],
            adam_beta2=optim.betas[1],
            adam_eps=optim.eps,
            clip_grad=clip if clip > 0 else math.inf,  # the norm is logged even if nothing is clipped
            bf16=model.config.bf16,
            params_dtype=model.config.params_dtype,
            fp8_recipe=model.config.fp8_recipe if model.config.fp8 else None,
            use_distributed_optimizer=model.model_config.use_distributed_optimizer,
            overlap_param_gather=model.model_config.overlap_param_gather,
        )
        on_gpu = runtime.current().on_gpu
        with contextlib.nullcontext() if on_gpu else types_of_cuda_tensors():
            self.core = get_megatron_optimizer(config, model.chunks, use_gloo_process_groups=on_gpu)
        for part in self._distributed:
            _number_parameters(part)

    def zero_grad(self) -> None:
        """Clear gradients; call it before every accumulation.

        Both the buffer and ``param.grad``, which the optimizer points at it: what is left in one is counted twice.
        """
        for chunk in self.model.chunks:
            chunk.zero_grad_buffer()
        self.core.zero_grad()

    def step(self, learning_rate: float, step: int) -> float:
        """Clip and update; returns the gradient norm before clipping.

        Raises TrainingDiverged with the step if the norm is NaN or infinite.
        """
        self._wait()
        for group in self.core.param_groups:
            group["lr"] = learning_rate * group.get("lr_mult", 1.0)
            group["weight_decay"] = self.optim.weight_decay * group.get("wd_mult", 1.0)
        _, norm, _ = self.core.step()
        self.model.gathered = not self.model.model_config.overlap_param_gather
        norm = float(norm)
        if not math.isfinite(norm):
            raise TrainingDiverged(f"the gradient norm is {norm} at step {step}; the last checkpoint is untouched")
        return norm

    @property
    def _inner(self) -> list[torch.optim.Optimizer]:
        """PyTorch's optimizers inside Megatron's; several if parameters are split into groups."""
        parts = getattr(self.core, "chained_optimizers", [self.core])
        return [part.optimizer for part in parts if part.optimizer is not None]

    @property
    def started(self) -> bool:
        """False before the first step, when there is no state yet (a policy during its critic's warm-up)."""
        return any(optimizer.state for optimizer in self._inner)

    def reset(self) -> None:
        """Forget all state, as before the first step; to be called after the weights have changed."""
        self._wait()
        for optimizer in self._inner:
            optimizer.state.clear()
        self.core.reload_model_params()

    def sharded_state_dict(self, model_state: dict[str, Any], is_loading: bool = False) -> dict[str, Any]:
        self._wait()
        if is_loading:
            for part in self._split_adams:
                _start_adam(part.optimizer)
        return self.core.sharded_state_dict(model_state, is_loading=is_loading, metadata=_ANY_LAYOUT)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._wait()
        own = in_parts(state, [optimizer.param_groups for optimizer in self._inner])
        with contextlib.ExitStack() as stack:
            for part in self._split_adams:
                stack.enter_context(_keeping_steps(part))
            self.core.load_state_dict(own)

    @property
    def _distributed(self) -> list[DistributedOptimizer]:
        parts = getattr(self.core, "chained_optimizers", [self.core])
        return [part for part in parts if isinstance(part, DistributedOptimizer)]

    @property
    def _split_adams(self) -> list[Any]:
        """Distributed optimizers on PyTorch's Adam, which is used if no fused one is installed."""
        return [part for part in self._distributed if isinstance(part.optimizer, torch.optim.Adam)]

    @contextlib.contextmanager
    def offloaded(self) -> Iterator[None]:
        """Move the state, and the fp32 copies of 16-bit weights, to CPU memory inside, if the configuration says so.

        They are copied back while the next passes run, and are there when the optimizer is used. A CPU has no other
        memory to move them to.
        """
        device = runtime.current().device
        if not self.model.model_config.offload_optimizer_while_generating or device.type == "cpu":
            yield
            return
        self._wait()
        main = [
            shard
            for part in self._distributed
            for group in part.shard_fp32_from_float16_groups
            for shard in group
            if shard is not None
        ]
        states = [state for optimizer in self._inner for state in optimizer.state.values()]
        away = [(state, key) for state in states for key, value in state.items() if _is_on(value, device)]

        def put(tensors: list[torch.Tensor]) -> None:
            for shard, tensor in zip(main, tensors, strict=False):
                shard.data = tensor
            for (state, key), tensor in zip(away, tensors[len(main) :], strict=True):
                state[key] = tensor

        tensors = [*(shard.data for shard in main), *(state[key] for state, key in away)]
        buffers = [self._buffers.of(place, tensor) for place, tensor in enumerate(tensors)]
        offload.to_host(tensors, buffers)
        del tensors
        put(buffers)
        try:
            yield
        finally:
            self._coming = offload.to_device(buffers, device)
            put(self._coming.tensors)

    def _wait(self) -> None:
        """Let what is started from now on see a state that comes back from CPU memory."""
        if self._coming is not None:
            self._coming.arrived()
            self._coming = None


def _is_on(value: Any, device: torch.device) -> bool:
    return isinstance(value, torch.Tensor) and value.device.type == device.type


def _number_parameters(part: DistributedOptimizer) -> None:
    """Correct the optimizer's table of each parameter's index in its group.

    Megatron puts fp32 parameters (our scalar heads) before 16-bit ones, but numbers them in their original order.
    """
    for index, group in enumerate(part.opt_group_ranges):
        order = sorted(group["params"], key=lambda parameter: parameter.dtype != torch.float32)
        part.model_param_group_index_map.update({parameter: (index, i) for i, parameter in enumerate(order)})


def _start_adam(adam: torch.optim.Optimizer) -> None:
    """Make Adam's initial state: Megatron's distributed optimizer reads a step count before it loads one."""
    for group in adam.param_groups:
        for parameter in group["params"]:
            if not adam.state[parameter]:
                adam.state[parameter] = {
                    "step": torch.tensor(0.0),
                    "exp_avg": torch.zeros_like(parameter),
                    "exp_avg_sq": torch.zeros_like(parameter),
                }


@contextlib.contextmanager
def _keeping_steps(part: Any) -> Iterator[None]:
    """Make a distributed optimizer load the state of PyTorch's Adam, which has a step count tensor per parameter.

    Megatron gives all parameters the same tensor, which each of them would then increment, and expects a step among the
    tensors that a checkpoint holds for a parameter.
    """
    fill = part._set_main_param_and_optimizer_states

    def fill_all_but_step(model_param: torch.Tensor, tensors: dict[str, torch.Tensor]) -> None:
        group, place = part.model_param_group_index_map[model_param]
        state = part.optimizer.state[part.optimizer.param_groups[group]["params"][place]]
        state["step"] = state["step"].clone()
        fill(model_param, {**tensors, "step": state["step"]})

    part._set_main_param_and_optimizer_states = fill_all_but_step
    try:
        yield
    finally:
        del part._set_main_param_and_optimizer_states
