"""Runs one training with Lightning's Trainer on the Megatron strategy: loggers, checkpoints, exact restart."""

from __future__ import annotations

import contextlib
import io
import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, Trainer
from nemo.utils.exp_manager import exp_manager

from nemo_advrm import signals
from nemo_advrm.config.schema import Config
from nemo_advrm.data.reading import KEY, ReadingRule
from nemo_advrm.engine import checkpoint, runtime
from nemo_advrm.engine.collectives import run_on_rank_zero
from nemo_advrm.engine.feature_file import FeatureWeights
from nemo_advrm.models.trainable import TrainableModel
from nemo_advrm.run_directory import results, run_files
from nemo_advrm.training import out_of_memory
from nemo_advrm.training.callbacks.metrics_writer import MetricsWriter
from nemo_advrm.training.callbacks.periodic_checkpoints import PeriodicCheckpoint, newest_usable
from nemo_advrm.training.callbacks.progress import StepProgress
from nemo_advrm.training.strategy import MegatronStrategy

# files of rows that a training may write
RECORDS = ("metrics.jsonl", "samples.jsonl", "held_out.jsonl")


def fit(
    module: TrainableModel,
    cfg: Config,
    directory: Path,
    title: str,
    callbacks: list[Callback] | None = None,
    first_step: int = 1,
    validate: bool = False,
) -> None:
    """Trains ``module`` to its last step, resuming from the newest undamaged checkpoint in ``directory`` if any.

    Writes ``metrics.jsonl``, ``checkpoints/`` and the loggers' files below ``directory``. Raises Preempted on every
    rank when any rank received SIGUSR1 or SIGTERM; the next call resumes from there.

    Args:
        title: name of the training in progress lines.
        first_step: number of the first step's row in ``metrics.jsonl``.
        validate: run the module's validation during and after training.
    """
    checkpoints = directory / "checkpoints"
    run_on_rank_zero(run_files.check_writable, directory)
    strategy = MegatronStrategy(cfg.trainer.timeout_minutes, cfg.trainer.verify_checkpoints)
    trainer = Trainer(
        accelerator="gpu" if runtime.current().on_gpu else "cpu",
        devices=1,  # processes are Megatron's, see MegatronStrategy
        strategy=strategy,
        max_steps=module.max_steps,
        max_epochs=-1,
        logger=False,
        callbacks=[
            *(callbacks or []),
            MetricsWriter(directory / "metrics.jsonl", first_step),
            StepProgress(title, cfg.trainer.log_every_n_steps),
            PeriodicCheckpoint(
                checkpoints,
                cfg.trainer.checkpoint_every_n_steps,
                cfg.trainer.keep_checkpoints,
                cfg.trainer.async_checkpoint,
            ),
        ],
        enable_checkpointing=True,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
        num_sanity_val_steps=0,
        limit_val_batches=1.0 if validate else 0,
        val_check_interval=cfg.trainer.val_check_interval or None,
        check_val_every_n_epoch=None if cfg.trainer.val_check_interval else 10**9,
        log_every_n_steps=cfg.trainer.log_every_n_steps,
        inference_mode=False,
        default_root_dir=str(directory),
    )
    with contextlib.redirect_stdout(io.StringIO()):
        exp_manager(trainer, _exp_manager_options(cfg, directory / "logs"))
    newest = newest_usable(checkpoints, cfg.trainer.verify_checkpoints)
    _keep_signals(trainer)
    with signals.owned(), out_of_memory.explained(directory, cfg, module.stage, module.model.vocab_size):
        try:
            trainer.fit(module, ckpt_path=str(newest) if newest else None)
        finally:
            strategy.drop_saving()  # no background save may continue after an error
    if validate:
        trainer.validate(module, verbose=False)


def _keep_signals(trainer: Trainer) -> None:
    """Disables Lightning's handler of SIGTERM, which would end the training at any point, with status 0."""
    trainer._signal_connector.register_signal_handlers = lambda: None  # type: ignore[method-assign]


def drop_training_checkpoints(directory: Path) -> None:
    """Removes the checkpoints of a finished training."""
    run_on_rank_zero(lambda: shutil.rmtree(directory / "checkpoints", ignore_errors=True))


def read_result(directory: Path, *keys: str) -> dict[str, float] | None:
    """Returns the metrics of a finished training, None when it is not finished.

    Raises DataError when the result is damaged or lacks one of ``keys`` as a finite number, see ``results.finished``.
    """
    found = results.finished(
        directory, "result.json", keys, lambda metrics: results.wrong_metrics(metrics, finite=keys)
    )
    if found is not None:
        drop_training_checkpoints(directory)  # in case the process was killed before it removed them
    return found


def write_result(
    directory: Path,
    module: TrainableModel,
    metrics: dict[str, float],
    features: FeatureWeights | None = None,
    **meta: float,
) -> None:
    """Saves the trained weights in ``directory/model``, marks the training finished and releases the module's models.

    ``features``, the weights of a hybrid reward model, are stored with it.
    """
    save_model(directory, module, **meta)
    if features is not None:
        _write_features(directory, features)
    results.mark(directory, "result.json", metrics, records(directory))
    drop_training_checkpoints(directory)
    module.release()


def add_features(directory: Path, metrics: dict[str, float], features: FeatureWeights) -> None:
    """Stores the weights of a hybrid reward model with a training that is finished, and its metrics with them.

    A kill in between leaves an unfinished training, which is done again.
    """
    run_on_rank_zero((directory / "result.json").unlink)
    _write_features(directory, features)
    results.mark(directory, "result.json", metrics, records(directory))


def _write_features(directory: Path, features: FeatureWeights) -> None:
    checkpoint.write_on_rank_zero(directory / "model", lambda: features.write(directory / "model"))


def save_model(directory: Path, module: TrainableModel, **meta: float) -> None:
    """Save the trained weights in ``directory/model``; all ranks call."""
    options = module.config.trainer
    checkpoint.save(
        directory / "model",
        module.model,
        meta={**tokenizer_meta(module), **meta},
        limit_minutes=options.timeout_minutes,
        hash_weights=options.verify_checkpoints,
    )


def records(directory: Path) -> list[str]:
    """Returns the relative names of the files that a training wrote besides its result."""
    return [name for name in ("model/manifest.json", *RECORDS) if (directory / name).exists()]


def tokenizer_meta(module: TrainableModel) -> dict[str, Any]:
    """Returns a checkpoint's metadata about its tokenizer: fingerprint, specification (absolute path), reading rule."""
    spec = module.config.model.tokenizer
    if spec.startswith("hf:"):
        spec = f"hf:{Path(spec.removeprefix('hf:')).resolve()}"
    rule = getattr(module.tokenizer, "rule", None) or ReadingRule()
    return {"tokenizer": module.tokenizer.fingerprint, "tokenizer_spec": spec, KEY: rule.meta()}


def _exp_manager_options(cfg: Config, directory: Path) -> dict[str, object]:
    return {
        **asdict(cfg.exp_manager),
        "explicit_log_dir": str(directory),
        "create_checkpoint_callback": False,  # PeriodicCheckpoint and the strategy save checkpoints
        "disable_validation_on_resume": False,
        "log_step_timing": False,
        "log_tflops_per_sec_per_gpu": False,
        "seconds_to_sleep": 0,
    }
