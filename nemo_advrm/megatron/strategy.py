"""Lightning strategy over Megatron-Core: lets ``lightning.pytorch.Trainer.fit`` drive the engine.

Megatron owns devices, process groups, gradients, optimizers and checkpoints; Lightning owns the
loop, the callbacks and the loggers. A checkpoint is a directory with one Megatron checkpoint per
trained model and ``trainer.json`` with Lightning's own state.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from lightning.pytorch.strategies import Strategy
from torch import Tensor

from nemo_advrm.errors import CheckpointError
from nemo_advrm.megatron import checkpoint, manifest, runtime

if TYPE_CHECKING:
    from nemo_advrm.models.trainable import TrainableModel

_TRAINER_STATE = "trainer.json"
# what Lightning needs back to continue its loops; weights and optimizers are Megatron's
_KEPT = ("epoch", "global_step", "pytorch-lightning_version", "loops", "callbacks")


class StepCounter(torch.optim.Optimizer):
    """Stands for the Megatron optimizers in Lightning, which counts training steps by ``step()``.

    One training step may hold several Megatron updates (PPO epochs, a critic), so the model calls
    those itself and this once.
    """

    def __init__(self) -> None:
        super().__init__([torch.nn.Parameter(torch.zeros(1))], {"lr": 0.0})

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        return None


class MegatronStrategy(Strategy):
    """Runs a :class:`~nemo_advrm.models.trainable.TrainableModel` on the running Megatron layout."""

    def __init__(self) -> None:
        super().__init__()
        self.runtime = runtime.current()

    @property
    def global_rank(self) -> int:
        return self.runtime.rank

    @property
    def local_rank(self) -> int:
        return self.runtime.device.index or 0

    @property
    def node_rank(self) -> int:
        return 0

    @property
    def world_size(self) -> int:
        return self.runtime.world_size

    @property
    def root_device(self) -> torch.device:
        return self.runtime.device

    @property
    def is_global_zero(self) -> bool:
        return self.runtime.is_writer

    @property
    def lightning_restore_optimizer(self) -> bool:
        return False

    def model_to_device(self) -> None:
        """Megatron models are built where they live."""

    def barrier(self, name: str | None = None) -> None:
        self.runtime.barrier()

    def broadcast(self, obj: Any, src: int = 0) -> Any:
        if self.runtime.world_size == 1:
            return obj
        box = [obj]
        dist.broadcast_object_list(box, src)
        return box[0]

    def reduce(self, tensor: Any, group: Any = None, reduce_op: Any = "mean") -> Any:
        """Metrics arrive reduced (:func:`nemo_advrm.megatron.schedule.reduce_metrics`)."""
        return tensor

    def reduce_boolean_decision(self, decision: bool, all: bool = True) -> bool:
        if self.runtime.world_size == 1:
            return decision
        flag = torch.tensor(int(decision), device=self.runtime.device)
        dist.all_reduce(flag, op=dist.ReduceOp.MIN if all else dist.ReduceOp.MAX)
        return bool(flag)

    def all_gather(self, tensor: Tensor, group: Any = None, sync_grads: bool = False) -> Tensor:
        return tensor

    # checkpoints

    def lightning_module_state_dict(self) -> dict[str, Any]:
        return {}

    def optimizer_state(self, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
        return {}

    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: str | Path, storage_options: Any = None) -> None:
        module: TrainableModel = self.lightning_module  # type: ignore[assignment]
        save_training_state(Path(filepath), module, {k: checkpoint[k] for k in _KEPT if k in checkpoint})

    def load_checkpoint(self, checkpoint_path: str | Path) -> dict[str, Any]:
        path = Path(checkpoint_path)
        try:
            state: dict[str, Any] = json.loads((path / _TRAINER_STATE).read_text())
        except (OSError, ValueError) as error:
            raise CheckpointError(f"{path}: not a complete training checkpoint ({error})") from error
        return {**state, "state_dict": {}, "optimizer_states": [], "lr_schedulers": [], "path": str(path)}

    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        module: TrainableModel = self.lightning_module  # type: ignore[assignment]
        load_training_state(Path(checkpoint["path"]), module)

    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        """Loaded with the weights."""

    def remove_checkpoint(self, filepath: str | Path) -> None:
        if self.is_global_zero:
            shutil.rmtree(filepath, ignore_errors=True)


def save_training_state(path: Path, module: TrainableModel, trainer_state: dict[str, Any]) -> None:
    """Write weights, optimizers and loop state of every trained model; complete once it bears its name.

    Raises CheckpointError when it cannot be written; nothing is left of it then.
    """
    partial = path.with_name(path.name + ".partial")

    def complete() -> None:
        manifest.write_json(partial / _TRAINER_STATE, trainer_state)
        files = [_TRAINER_STATE, *(f"{name}/{manifest.NAME}" for name in module.trained())]
        manifest.write(partial, manifest.describe(partial, files))
        checkpoint.put_in_place(partial, path)

    try:
        runtime.on_writer(lambda: checkpoint.make_empty(partial, partial))
        for name, (model, optimizer) in module.trained().items():
            checkpoint.save(partial / name, model, optimizer, {"tokenizer": module.tokenizer.fingerprint})
        runtime.on_writer(complete)
    except (OSError, CheckpointError) as error:
        if runtime.current().is_writer:
            shutil.rmtree(partial, ignore_errors=True)
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(
            f"{path}: could not be written ({error}); the checkpoint before it is untouched"
        ) from error


def load_training_state(path: Path, module: TrainableModel) -> None:
    """Read what :func:`save_training_state` wrote, at the present layout."""
    for name, (model, optimizer) in module.trained().items():
        checkpoint.load(path / name, model, optimizer)
