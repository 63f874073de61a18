"""The Lightning strategy by which ``lightning.pytorch.Trainer.fit`` trains Megatron-Core models.

Megatron owns devices, process groups, gradients, optimizers and checkpoints; Lightning owns the loop, callbacks and
loggers. To Lightning the model is on one device, because the metrics of a step are already reduced over all ranks.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from lightning.pytorch.strategies import SingleDeviceStrategy

from nemo_advrm.engine import runtime
from nemo_advrm.errors import CheckpointError
from nemo_advrm.training.loop_state import check_loop_state
from nemo_advrm.training.training_state import TRAINER_STATE, TrainingSave, load_training_state
from nemo_advrm.untrusted_files import read_json_object

if TYPE_CHECKING:
    from nemo_advrm.models.trainable import TrainableModel

IN_BACKGROUND = "in background"  # passed as storage_options to Trainer.save_checkpoint
# the keys of a checkpoint that Lightning needs to continue its loops; Megatron saves weights and optimizers
_KEPT = ("epoch", "global_step", "pytorch-lightning_version", "loops", "callbacks")


class MegatronStrategy(SingleDeviceStrategy):
    """Runs a :class:`~nemo_advrm.models.trainable.TrainableModel` on the current Megatron layout.

    Attributes:
        limit_minutes: limit of the wait for a checkpoint's files.
        saving: the background save in progress, None without one.
    """

    def __init__(self, limit_minutes: float = 30.0, hash_weights: bool = False) -> None:
        self.runtime = runtime.current()
        super().__init__(self.runtime.device)
        self.global_rank, self.world_size = self.runtime.rank, self.runtime.world_size
        self.local_rank = self.runtime.device.index or 0
        self.limit_minutes = limit_minutes
        self.hash_weights = hash_weights
        self.saving: TrainingSave | None = None

    @property
    def is_global_zero(self) -> bool:
        return self.runtime.is_writer

    @property
    def lightning_restore_optimizer(self) -> bool:
        return False

    def model_to_device(self) -> None:
        """Does nothing: Megatron models are built on their device."""

    def barrier(self, name: str | None = None) -> None:
        self.runtime.barrier()

    def broadcast(self, obj: Any, src: int = 0) -> Any:
        if self.runtime.world_size == 1:
            return obj
        box = [obj]
        dist.broadcast_object_list(box, src)
        return box[0]

    # checkpoints

    def lightning_module_state_dict(self) -> dict[str, Any]:
        return {}

    def optimizer_state(self, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
        return {}

    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: str | Path, storage_options: Any = None) -> None:
        """Saves, or with ``storage_options`` IN_BACKGROUND starts a save that :meth:`end_saving` completes."""
        assert self.saving is None
        module: TrainableModel = self.lightning_module  # type: ignore[assignment]
        state = {k: checkpoint[k] for k in _KEPT if k in checkpoint}
        background = storage_options == IN_BACKGROUND
        saving = TrainingSave(
            Path(filepath),
            module,
            state,
            in_background=background,
            limit_minutes=self.limit_minutes,
            hash_weights=self.hash_weights,
        )
        if background:
            self.saving = saving
        else:
            saving.finish()

    def end_saving(self, wait: bool) -> bool:
        """Completes the background save if all ranks have written their files, or with ``wait`` waits for them.

        All ranks call. Returns whether a checkpoint was completed. Raises CheckpointError if it could not be written.
        """
        if self.saving is None or not (wait or self.saving.written_everywhere()):
            return False
        saving, self.saving = self.saving, None
        saving.finish()
        return True

    def drop_saving(self) -> None:
        """Abandons a background save and removes its files and threads; a rank may call it alone."""
        saving, self.saving = self.saving, None
        if saving is not None:
            saving.drop()

    def load_checkpoint(self, checkpoint_path: str | Path) -> dict[str, Any]:
        path = Path(checkpoint_path)
        try:
            state = read_json_object(path / TRAINER_STATE)
        except CheckpointError as error:
            raise CheckpointError(f"{path}: not a complete training checkpoint ({error})") from None
        if self.lightning_module is not None:
            check_loop_state(state, self.lightning_module.trainer, path)
        return {**state, "state_dict": {}, "optimizer_states": [], "lr_schedulers": [], "path": str(path)}

    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        module: TrainableModel = self.lightning_module  # type: ignore[assignment]
        load_training_state(Path(checkpoint["path"]), module)

    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        """Does nothing: optimizers are loaded with the weights."""

    def remove_checkpoint(self, filepath: str | Path) -> None:
        if self.is_global_zero:
            shutil.rmtree(filepath, ignore_errors=True)
