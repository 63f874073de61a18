"""Runs Megatron-Core on CPU: the only module that redirects its CUDA calls.

Megatron-Core requests ``device="cuda"`` by name in many places. In its modules, and nowhere else in the process, the
name ``torch`` is replaced by a stand-in: its factory functions take a CUDA device as the CPU, and its ``cuda`` answers
for the CPU. The runtime calls :func:`redirect_megatron_to_cpu` if no GPU is used; importing this changes nothing.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import inspect
import sys
import types
from collections.abc import Callable, Iterator
from typing import Any

import torch
from megatron.core.tensor_parallel.random import CudaRNGStatesTracker

from nemo_advrm.engine import compat

_CPU = torch.device("cpu")
_FACTORIES = [
    "tensor",
    "as_tensor",
    "zeros",
    "ones",
    "empty",
    "full",
    "rand",
    "randn",
    "randint",
    "arange",
    "eye",
    "linspace",
    "zeros_like",
    "ones_like",
    "empty_like",
    "full_like",
]

# all modules that this package calls: one that is imported later would not be redirected
_USED_MODULES = (
    "megatron.core.distributed",
    "megatron.core.dist_checkpointing.strategies.filesystem_async",
    "megatron.core.dist_checkpointing.strategies.fully_parallel",
    "megatron.core.dist_checkpointing.strategies.torch",
    "megatron.core.inference.contexts",
    "megatron.core.models.gpt.gpt_model",
    "megatron.core.optimizer",
    "megatron.core.pipeline_parallel",
    "megatron.core.transformer.moe.moe_layer",
)


def _is_cuda(device: Any) -> bool:
    if isinstance(device, torch.device):
        return device.type == "cuda"
    return isinstance(device, str) and device.startswith("cuda")


def _on_cpu(factory: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(factory)
    def call(*args: Any, **kwargs: Any) -> Any:
        if _is_cuda(kwargs.get("device")):
            kwargs["device"] = _CPU
        return factory(*args, **kwargs)

    return call


class _NoStream:
    """Replaces a CUDA stream and its events; every method does nothing and returns this."""

    def __getattr__(self, name: str) -> Callable[..., Any]:
        return lambda *args, **kwargs: self


def _cuda_stand_in() -> types.ModuleType:
    cuda = types.ModuleType("torch.cuda")
    cuda.__dict__.update(torch.cuda.__dict__)

    def nothing(*args: Any, **kwargs: Any) -> None:
        return None

    def zero(*args: Any, **kwargs: Any) -> int:
        return 0

    cuda.__dict__.update(
        current_device=lambda: _CPU,
        device_count=lambda: 1,
        synchronize=nothing,
        set_device=nothing,
        empty_cache=nothing,
        manual_seed=torch.manual_seed,
        get_rng_state=lambda *args, **kwargs: torch.get_rng_state(),
        set_rng_state=lambda state, *args, **kwargs: torch.set_rng_state(state),
        memory_allocated=zero,
        max_memory_allocated=zero,
        memory_reserved=zero,
        max_memory_reserved=zero,
        Stream=lambda *args, **kwargs: _NoStream(),
        current_stream=lambda *args, **kwargs: _NoStream(),
        default_stream=lambda *args, **kwargs: _NoStream(),
        stream=lambda *args, **kwargs: contextlib.nullcontext(),
    )
    return cuda


def _torch_stand_in() -> types.ModuleType:
    stand_in = types.ModuleType("torch")
    stand_in.__dict__.update(torch.__dict__)
    for name in _FACTORIES:
        stand_in.__dict__[name] = _on_cpu(getattr(torch, name))
    stand_in.__dict__["cuda"] = _cuda_stand_in()
    # names that torch resolves lazily come from the real module
    stand_in.__dict__["__getattr__"] = lambda name: getattr(torch, name)
    return stand_in


class CpuRNGStatesTracker(CudaRNGStatesTracker):
    """Megatron's named random streams; its :meth:`fork` would log a warning if the CPU's generator is used inside."""

    @contextlib.contextmanager
    def fork(self, name: str = "model-parallel-rng") -> Iterator[None]:
        before = torch.get_rng_state()
        torch.set_rng_state(self.states_[name])
        try:
            yield
        finally:
            self.states_[name] = torch.get_rng_state()
            torch.set_rng_state(before)


def _clip_grad_by_total_norm(
    parameters: Any, max_norm: float, total_norm: float, use_decoupled_grad: bool = False
) -> None:
    """Megatron's gradient clipping without its assertion that gradients are CUDA tensors."""
    name = "decoupled_grad" if use_decoupled_grad else "grad"
    grads = [g for p in parameters if (g := getattr(p, name, None)) is not None]
    coefficient = max_norm / (total_norm + 1.0e-6)
    if coefficient < 1.0 and grads:
        torch._foreach_mul_([g.detach() for g in grads], coefficient)


@contextlib.contextmanager
def types_of_cuda_tensors() -> Iterator[None]:
    """Make ``Tensor.type()`` of a CPU tensor return the CUDA name inside.

    Megatron's distributed optimizer sorts parameters by these names when it is constructed.
    """
    own = torch.Tensor.type

    def type_of(self: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        answer = own(self, *args, **kwargs)
        return answer.replace("torch.", "torch.cuda.", 1) if isinstance(answer, str) and not self.is_cuda else answer

    torch.Tensor.type = type_of  # type: ignore[method-assign,assignment]
    try:
        yield
    finally:
        del torch.Tensor.type  # uncovers the method of PyTorch's base class


def _counts_on_cpu(tensor: Any, as_numpy: bool = False, record_stream: bool = False) -> Any:
    """Megatron's ``maybe_move_tensor_to_cpu``, which leaves what is there as it is, and not as numbers."""
    return tensor.numpy() if as_numpy and isinstance(tensor, torch.Tensor) else tensor


def _take_torch_optimizers() -> None:
    """Make Megatron's optimizer use PyTorch's Adam and SGD and plain loops over tensors.

    It chooses at import: Transformer Engine's or Apex's if installed, which work only on GPUs.
    """
    import megatron.core.optimizer as optimizers
    from megatron.core import utils
    from megatron.core.optimizer import clip_grads, distrib_optimizer, optimizer

    optimizers.Adam, optimizers.SGD = torch.optim.AdamW, torch.optim.SGD
    optimizers.USING_PYTORCH_OPTIMIZER = True
    distrib_optimizer.Adam = torch.optim.Adam
    for flag in ("HAVE_APEX_OR_TE", "USING_TE_OPTIMIZER", "USING_APEX_OPTIMIZER"):
        setattr(distrib_optimizer, flag, False)
    for module in (optimizer, clip_grads):
        module.multi_tensor_applier = utils.local_multi_tensor_applier
        module.multi_tensor_scale_impl = utils.local_multi_tensor_scale
    clip_grads.l2_norm_impl = utils.local_multi_tensor_l2_norm
    compat.measure_gradients_on_the_host()


_stand_in: types.ModuleType | None = None


def redirect_megatron_to_cpu() -> None:
    """Redirect Megatron-Core's modules to the CPU. Calling it again has no effect."""
    global _stand_in
    for name in _USED_MODULES:
        importlib.import_module(name)
    if _stand_in is None:
        _stand_in = _torch_stand_in()
        # the only call that no module's name reaches: LanguageModule moves the weight of a pipeline's tied
        # embeddings with Tensor.cuda()
        torch.Tensor.cuda = lambda self, *args, **kwargs: self  # type: ignore[method-assign,assignment]
    for name, module in list(sys.modules.items()):
        if name.startswith("megatron.core") and getattr(module, "torch", None) is torch:
            module.__dict__["torch"] = _stand_in

    from megatron.core.optimizer import clip_grads, optimizer
    from megatron.core.tensor_parallel import random
    from megatron.core.transformer.moe import token_dispatcher
    from megatron.core.transformer.moe.router import TopKRouter

    _take_torch_optimizers()

    clip_grads.clip_grad_by_total_norm_fp32 = _clip_grad_by_total_norm
    optimizer.clip_grad_by_total_norm_fp32 = _clip_grad_by_total_norm
    random._get_cuda_rng_state = lambda *args, **kwargs: torch.get_rng_state()
    random._set_cuda_rng_state = lambda state, *args, **kwargs: torch.set_rng_state(state)
    token_dispatcher.maybe_move_tensor_to_cpu = _counts_on_cpu
    # compiled by torch.compile, for a bias that no model here has
    TopKRouter._apply_expert_bias = inspect.unwrap(TopKRouter._apply_expert_bias)
    if not isinstance(random._CUDA_RNG_STATE_TRACKER, CpuRNGStatesTracker):
        random._CUDA_RNG_STATE_TRACKER = CpuRNGStatesTracker()
        random._CUDA_RNG_STATE_TRACKER_INITIALIZED = True
