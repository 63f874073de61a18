"""The base class of trained models: a NeMo ModelPT whose steps run on Megatron's schedules."""

from __future__ import annotations

import gc
import math
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any, TypeVar

import torch
from nemo.core.classes import ModelPT
from omegaconf import OmegaConf

from nemo_advrm.config.schema import Config
from nemo_advrm.data.batching import BatchSchedule, shard
from nemo_advrm.data.tokenizers import Tokenizer
from nemo_advrm.engine import runtime, throughput
from nemo_advrm.engine.model import MegatronModel
from nemo_advrm.engine.optim import MegatronOptimizer, learning_rate
from nemo_advrm.errors import TrainingDiverged
from nemo_advrm.seeds import derive_seed

Row = TypeVar("Row")


def _switch_off_telemetry() -> None:
    """Disables OneLogger, which NeMo starts: it writes into the working directory and raises at a second training."""
    with suppress(ImportError):  # not in every version of NeMo
        from nv_one_logger.api.one_logger_provider import OneLoggerProvider

        provider = OneLoggerProvider.instance()
        if provider.one_logger_ready:
            provider.config.enable_for_current_rank = False
            provider.config.logger_config.log_level = "CRITICAL"  # else every skipped hook logs a line


_switch_off_telemetry()


def total_steps(cfg: Config, rows: int) -> int:
    """Returns the optimizer steps of a run: ``trainer.max_steps``, else ``trainer.max_epochs`` passes over the rows."""
    if cfg.trainer.max_steps > 0:
        return cfg.trainer.max_steps
    return BatchSchedule(rows, cfg.model.global_batch_size, 0).steps_for_epochs(cfg.trainer.max_epochs)


def shard_rows(rows: list[Row], lengths: list[int], dp_rank: int, dp_size: int) -> list[Row]:
    """Returns the rows of a global batch that belong to one data-parallel rank."""
    return [rows[i] for i in shard(range(len(rows)), dp_rank, dp_size, lengths)]


class TrainableModel(ModelPT):
    """Base class: seeding, learning rate, divergence check and logging of one training step.

    A subclass builds its models, yields the data of each step from :meth:`steps` (a pure function of the step number,
    so that a restarted run is exact) and implements :meth:`train_on`.
    """

    model: MegatronModel
    """The model that is trained and saved; the subclass builds it."""
    stage: str
    """The stage's name in the planner."""

    def __init__(self, cfg: Config, tokenizer: Tokenizer, max_steps: int, seed: int) -> None:
        # stored as "architecture", because NeMo reserves the key "model"
        settings = dict(asdict(cfg.model).items())
        super().__init__(cfg=OmegaConf.create({"architecture": settings, "seed": seed}))
        self.config = cfg  # "cfg" is a property of ModelPT that holds its own DictConfig
        self.tokenizer = tokenizer
        self.max_steps = max_steps
        self.seed = seed
        self.automatic_optimization = False
        self.restored_files: Any = None  # temporary files of a restored model, kept while the model lives
        self.step_metrics: dict[str, float] = {}
        self.validation_metrics: dict[str, float] = {}

    # subclasses implement these

    def trained(self) -> dict[str, tuple[MegatronModel, MegatronOptimizer]]:
        """Returns the trained models by name, with their optimizers; a checkpoint holds their states."""
        raise NotImplementedError

    def steps(self, start: int) -> Iterator[Any]:
        """Yields the data of training steps ``start``, ``start + 1``, ... up to ``max_steps``."""
        raise NotImplementedError

    def train_on(self, batch: Any, step: int) -> dict[str, float]:
        """Updates the models with the data of one step; returns its metrics."""
        raise NotImplementedError

    # the interface of Lightning

    def training_step(self, batch: Any, batch_idx: int) -> None:
        step = self.global_step
        runtime.current().seed_step(derive_seed(self.seed, "step", step))
        started = time.perf_counter()
        metrics = self.train_on(batch, step)
        seconds = time.perf_counter() - started
        metrics |= throughput.of_step(self.config.model, self.config.precision.name, metrics.get("tokens"), seconds)
        for name in ("train/loss", "loss"):
            if name in metrics and not math.isfinite(metrics[name]):
                raise TrainingDiverged(f"the loss is {metrics[name]} at step {step}; the last checkpoint is untouched")
        self.optimizers().step()  # type: ignore[union-attr]
        self.step_metrics = metrics
        self.log_dict({k: v for k, v in metrics.items() if v is not None}, rank_zero_only=True, batch_size=1)

    def learning_rate(self, step: int) -> float:
        return learning_rate(step, self.config.model.optim, self.max_steps)

    def configure_optimizers(self) -> StepCounter:
        return StepCounter()

    def train_dataloader(self) -> Any:
        return _Steps(self)

    def transfer_batch_to_device(self, batch: Any, device: Any, dataloader_idx: int) -> Any:
        """Returns ``batch`` unchanged: it holds rows, and their tensors are made on the device per microbatch."""
        return batch

    def release(self) -> None:
        """Frees models and optimizer states after they are saved; the module cannot be used afterwards.

        Deleting the module would not free them: NeMo's process-wide callbacks keep the last module they saw, and DDP's
        hooks hold their model in reference cycles.
        """
        for name in ("model", "optimizer", "reference", "critic"):
            if hasattr(self, name):
                setattr(self, name, None)
        gc.collect()

    # the interface of NeMo

    def setup_training_data(self, train_data_config: Any) -> None:
        """Does nothing: data comes from :meth:`steps`."""

    def setup_validation_data(self, val_data_config: Any) -> None:
        """Does nothing: data comes from the subclass's ``val_dataloader``."""

    def save_to(self, save_path: str) -> None:
        """Writes the trained model with its tokenizer as a ``.nemo``; all ranks call (see :meth:`restore_from`)."""
        # imported here: convert is a layer above models, but NeMo's interface wants the method on the model
        from nemo_advrm.convert.nemo_models import save_model

        save_model(self, Path(save_path))

    @classmethod
    def restore_from(cls, restore_path: str, override_config: Config | None = None, **arguments: Any) -> Any:
        """Opens a ``.nemo`` written by :meth:`save_to`, at the running layout; all ranks call.

        Args:
            override_config: configuration to use instead of the saved architecture and loss.
            arguments: arguments of the class's constructor; without rows or prompts the model cannot be trained.

        Raises:
            CheckpointError: the file is damaged or of another kind, its class is no subclass of this one, or the
                architecture differs.
        """
        from nemo_advrm.convert.nemo_models import restore_model

        return restore_model(cls, Path(restore_path), override_config, arguments)

    @classmethod
    def list_available_models(cls) -> list[Any]:
        return []

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """Returns an empty dict: Megatron models are not submodules, and the strategy saves them."""
        return {}


class StepCounter(torch.optim.Optimizer):
    """Takes the place of the Megatron optimizers in Lightning, which counts training steps by calls of ``step()``.

    One training step may make several Megatron updates (PPO epochs, a critic), so the model calls the Megatron
    optimizers itself and this one once per step.
    """

    def __init__(self) -> None:
        super().__init__([torch.nn.Parameter(torch.zeros(1))], {"lr": 0.0})

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        return None


class _Steps:
    """An iterable over the data of steps that starts at the trainer's current step, also after a restart."""

    def __init__(self, model: TrainableModel) -> None:
        self.model = model

    def __iter__(self) -> Iterator[Any]:
        return self.model.steps(self.model.global_step)


class Batches:
    """``count`` batches, made when they are wanted, as a data loader."""

    def __init__(self, count: int, batch: Callable[[int], Any]) -> None:
        self.count = count
        self.batch = batch

    def __len__(self) -> int:
        return self.count

    def __iter__(self) -> Iterator[Any]:
        return map(self.batch, range(self.count))
