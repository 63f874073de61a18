"""``save_to`` and ``restore_from`` of this package's models: ``.nemo`` files of any architecture, opened at any layout.

NeMo's own ``restore_from`` is not used: it imports any class that a file names, from its own packages only. Here a file
can name only the classes of a table, and its weights are read without unpickling
(see :mod:`nemo_advrm.engine.weights_metadata`).
"""

from __future__ import annotations

import importlib
import json
import shutil
import tarfile
import tempfile
import uuid
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from nemo_advrm import __version__
from nemo_advrm.config.layout import at_layout
from nemo_advrm.config.schema import Config, ModelConfig, RewardModelConfig
from nemo_advrm.convert.differences import check_tensors, head_outputs
from nemo_advrm.convert.dist_weights import StackedWriter
from nemo_advrm.convert.megatron_checkpoint import TOKENIZER, read_model
from nemo_advrm.convert.nemo_archive import NemoArchive
from nemo_advrm.convert.nemo_file import CONFIG, WEIGHTS, archived_weights, read_config
from nemo_advrm.convert.partial import lock_output, unlock_output
from nemo_advrm.convert.tokenizer_files import copy_tokenizer
from nemo_advrm.data.tokenizers import build_tokenizer
from nemo_advrm.engine import checkpoint, runtime
from nemo_advrm.engine.checkpoint_meta import read_meta
from nemo_advrm.engine.collectives import run_on_rank_zero
from nemo_advrm.engine.description import check_description, check_section, check_texts
from nemo_advrm.engine.dimensions import Head
from nemo_advrm.errors import CheckpointError, ConfigError, one_line
from nemo_advrm.files import atomic_replace
from nemo_advrm.registry import PREFERENCE_LOSSES

if TYPE_CHECKING:
    from nemo_advrm.models.trainable import TrainableModel

FORMAT = 1
_PACKED = "hf"  # value of `tokenizer` when its files are in the archive
# class that a file may name -> (head, constructor arguments for data that only training needs)
_CLASSES: dict[str, tuple[Head, dict[str, Any]]] = {
    "nemo_advrm.models.reward_model.RewardModel": ("reward", {"train_rows": [], "validation_rows": []}),
    "nemo_advrm.models.policy.PolicyModel": ("lm", {"prompts": [], "reward": None}),
    "nemo_advrm.models.language_model.SupervisedModel": ("lm", {"rows": []}),
}


def _name(cls: type) -> str:
    return f"{cls.__module__}.{cls.__qualname__}"


def save_model(model: TrainableModel, path: Path) -> None:
    """Write a trained model's main network and tokenizer to ``path``, replacing an existing file; all ranks call it.

    Raises CheckpointError when the file cannot be written, and ConfigError, with the process, when another process is
    writing it; ``path`` is then unchanged.
    """
    if _name(type(model)) not in _CLASSES:
        raise CheckpointError(f"{path}: {_name(type(model))} cannot be saved as a .nemo file")
    rt = runtime.current()
    partial = path.with_name(path.name + ".partial")
    network, _ = next(iter(model.trained().values()))
    if network.base is not None:
        raise CheckpointError(
            f"{path}: save_to writes whole models, not those of model.peft=lora: convert the trained checkpoint "
            "(nemo-advrm convert from=megatron to=nemo)"
        )
    run_on_rank_zero(lock_output, path)
    try:
        checkpoint.write_on_rank_zero(path, lambda: checkpoint.make_empty(partial, partial))
        checkpoint.save(partial / "checkpoint", network)
        checkpoint.write_on_rank_zero(path, lambda: _pack(model, partial, path))
    finally:
        if rt.is_writer:
            shutil.rmtree(partial, ignore_errors=True)
            unlock_output(path)


def _pack(model: TrainableModel, partial: Path, path: Path) -> None:
    cfg = model.config
    spec = cfg.model.tokenizer
    if spec.startswith("hf:"):
        copy_tokenizer(Path(spec.removeprefix("hf:")), partial / TOKENIZER)
    meta = read_meta(partial / "checkpoint")
    settings = {
        "target": _name(type(model)),
        "nemo_advrm_version": __version__,
        "format": FORMAT,
        "head": meta["head"],
        "vocab_size": meta["vocab_size"],
        "tokenizer": _PACKED if spec.startswith("hf:") else spec,
        "reward_model": asdict(cfg.reward_model),
        "architecture": asdict(cfg.model),
    }
    (partial / CONFIG).write_text(yaml.safe_dump(settings, sort_keys=False), encoding="utf-8")
    with tarfile.open(partial / "archive", "w:") as tar:
        tar.add(partial / CONFIG, arcname=f"./{CONFIG}")
        if (partial / TOKENIZER).is_dir():
            tar.add(partial / TOKENIZER, arcname=f"./{TOKENIZER}")
        tar.add(partial / "checkpoint" / "weights", arcname=f"./{WEIGHTS}")
    atomic_replace(partial / "archive", path)


def restore_model(
    cls: type[TrainableModel], path: Path, override_config: Config | None, arguments: dict[str, Any]
) -> TrainableModel:
    """Load a model written by :func:`save_model` at the current layout; all ranks call it.

    Args:
        cls: the class that the file must name, or a base of it.
        override_config: configuration that replaces the saved one, for instance to continue training; its architecture
            must be the saved one.
        arguments: further arguments of the class's constructor.

    Raises:
        CheckpointError: the file is damaged, not written by ``save_to``, or of another class or architecture.
    """
    rt = runtime.current()
    with NemoArchive(path) as archive:
        settings = read_config(archive)
        found, defaults = _class_of(cls, settings, path)
        _check_settings(settings, f"{path}: {CONFIG}")
        architecture = read_model({"model": settings["architecture"]}, path)
        # kept as long as the model: saving the model again copies the tokenizer files
        files = tempfile.TemporaryDirectory(prefix="nemo_advrm_")
        spec = _tokenizer(archive, settings, Path(files.name))
        # a name for this job only: another job may restore the same file
        job = run_on_rank_zero(lambda: uuid.uuid4().hex[:8])
        weights = path.with_name(f"{path.name}.restoring-{job}")
        try:
            run_on_rank_zero(_unpack_weights, archive, settings, architecture, weights)
            cfg = override_config or _config(settings, architecture, path)
            if cfg.model.peft != "none":
                raise ConfigError(f"model.peft={cfg.model.peft}: adapters need a checkpoint below them, not {path}")
            cfg = replace(cfg, model=replace(cfg.model, tokenizer=spec))
            tokenizer = build_tokenizer(spec)
            model = found(cfg, tokenizer, **{**defaults, **arguments}, restore_from=str(weights))
            rt.barrier()
        finally:
            if rt.is_writer:
                shutil.rmtree(weights, ignore_errors=True)
    model.restored_files = files
    return model


def _check_settings(settings: dict[str, Any], source: str) -> None:
    """Raise CheckpointError for settings that ``save_model`` does not write and that would enter the configuration."""
    for key, kind in {"tokenizer": str, "reward_model": dict, "architecture": dict}.items():
        if not isinstance(settings.get(key), kind):
            raise CheckpointError(f"{source}: {key} is not {'a string' if kind is str else 'an object'}")
    if settings["tokenizer"].startswith("hf:"):
        raise CheckpointError(f"{source}: its tokenizer is {settings['tokenizer']!r}, outside the archive")
    check_texts(settings, source)
    check_section(RewardModelConfig, settings["reward_model"], "reward_model", source)
    loss = settings["reward_model"].get("loss", "bt")
    if loss not in PREFERENCE_LOSSES:  # python:MODULE:NAME would import what a stranger's file names
        raise CheckpointError(f"{source}: reward_model.loss={loss!r} is not a loss of this package")


def _class_of(cls: type, settings: dict[str, Any], path: Path) -> tuple[Any, dict[str, Any]]:
    target = str(settings.get("target", ""))
    if target not in _CLASSES:
        hint = ": use nemo-advrm convert from=nemo" if target.startswith(("nemo.", "nemo_aligner.")) else ""
        raise CheckpointError(f"{path}: names the class {target!r}, which this package does not have{hint}")
    if not isinstance(settings.get("format"), int) or settings["format"] > FORMAT:
        raise CheckpointError(f"{path}: written by a newer version (format {settings.get('format')})")
    module, _, name = target.rpartition(".")
    found = getattr(importlib.import_module(module), name)
    if not issubclass(found, cls):
        raise CheckpointError(f"{path}: contains a {name}, but a {cls.__name__} was expected")
    head, defaults = _CLASSES[target]
    if settings.get("head") != head:
        raise CheckpointError(f"{path}: a {name} with the head {settings.get('head')!r} does not exist")
    return found, defaults


def _config(settings: dict[str, Any], architecture: ModelConfig, path: Path) -> Config:
    layout = runtime.current().layout
    try:
        reward = RewardModelConfig(**settings["reward_model"])
    except TypeError as error:
        raise CheckpointError(f"{path}: {CONFIG} is damaged ({error})") from None
    model = at_layout(architecture, layout.tensor, layout.pipeline, layout.context, layout.expert)
    cfg = Config(model=model, reward_model=reward)
    # without data the number of steps cannot be derived
    cfg.trainer.max_steps = 1
    return cfg


def _tokenizer(archive: NemoArchive, settings: dict[str, Any], directory: Path) -> str:
    spec: str = settings["tokenizer"]
    if spec != _PACKED:
        return spec
    for name in archive.names:
        if name.startswith(f"{TOKENIZER}/"):
            file = directory / name
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(archive.read(name))
    return f"hf:{directory / TOKENIZER}"


def _unpack_weights(archive: NemoArchive, settings: dict[str, Any], model: ModelConfig, target: Path) -> None:
    """Write a checkpoint directory from the archive's tensors, with a new meta.json."""
    path, head = archive.path, settings["head"]
    meta = {
        "format": checkpoint.FORMAT,
        "model": asdict(model),
        "head": head,
        "vocab_size": settings.get("vocab_size"),
        "has_optimizer": False,
    }
    check_description(meta, f"{path}: {CONFIG}")
    reader = archived_weights(archive)
    check_tensors(path, reader.specs, model, head, meta["vocab_size"])
    meta["head_outputs"] = head_outputs(reader.specs)
    shutil.rmtree(target, ignore_errors=True)
    try:
        (target / "weights").mkdir(parents=True)
        writer = StackedWriter(target / "weights", model.num_layers, reader.specs, sync=False)
        for name in reader.specs:
            writer.write(name, reader.read(name))
        writer.close()
        (target / "meta.json").write_text(json.dumps(meta), encoding="utf-8")
    except CheckpointError:
        raise
    except Exception as error:  # torch raises many types for damaged data
        reason = f"{type(error).__name__}: {one_line(error, 200)}"
        raise CheckpointError(f"{path}: the weights cannot be read ({reason})") from None
