"""Megatron distributed checkpoints of model and optimizer: atomic, checked, loadable at any layout.

A checkpoint is a directory ``{meta.json, manifest.json, weights/}``. It is written under another name and renamed
when every rank is done, so a directory of the right name is complete; the manifest tells if it was damaged since.
"""

from __future__ import annotations

import contextlib
import json
import queue
import re
import shutil
import warnings
from dataclasses import asdict
from pathlib import Path
from typing import Any

from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.strategies import filesystem_async
from megatron.core.dist_checkpointing.validation import StrictHandling
from torch.distributed.checkpoint.api import CheckpointException  # not an Exception, but a BaseException

from nemo_advrm.errors import CheckpointError
from nemo_advrm.megatron import manifest, runtime
from nemo_advrm.megatron.architecture import first_difference
from nemo_advrm.megatron.model import MegatronModel
from nemo_advrm.megatron.optim import MegatronOptimizer
from nemo_advrm.place import one_line

FORMAT = 1
# how torch.save tells of a full disk
_WRITE_FAILED = re.compile("inline_container|iostream error")


def _meta(model: MegatronModel, extra: dict[str, Any]) -> dict[str, Any]:
    own = {"head": model.head, "head_outputs": model.head_outputs, "vocab_size": model.vocab_size}
    return {"format": FORMAT, **own, "model": asdict(model.model), **extra}


def _optimizer_meta(optimizer: MegatronOptimizer | None) -> dict[str, bool]:
    if optimizer is None:
        return {"has_optimizer": False}
    return {"has_optimizer": True, "optimizer_started": optimizer.started}


def save(
    path: Path, model: MegatronModel, optimizer: MegatronOptimizer | None = None, meta: dict[str, Any] | None = None
) -> None:
    """Write a checkpoint; all ranks call. ``meta`` is anything JSON holds (step, tokenizer, history).

    An existing checkpoint at ``path`` is replaced only once the new one is complete.
    """
    path = Path(path)
    partial = path.with_name(path.name + ".partial")
    try:
        runtime.on_writer(lambda: make_empty(partial / "weights", partial))
        _write_weights(partial / "weights", model, optimizer)
        described = _meta(model, {**(meta or {}), **_optimizer_meta(optimizer)})
        runtime.on_writer(lambda: manifest.write_json(partial / "meta.json", described))
        files = manifest.measure(partial)
        runtime.on_writer(lambda: manifest.write(partial, files))
        runtime.on_writer(lambda: put_in_place(partial, path))
    except (OSError, RuntimeError, CheckpointException) as error:
        if isinstance(error, RuntimeError) and not _WRITE_FAILED.search(str(error)):
            raise
        reason = _reason(error, path.parent)
        if runtime.current().is_writer:
            shutil.rmtree(partial, ignore_errors=True)  # a full disk is not left fuller
        raise CheckpointError(
            f"{path}: could not be written ({reason}); the checkpoint before it is untouched"
        ) from error


def make_empty(directory: Path, top: Path) -> None:
    """Make ``directory`` below ``top``, of which nothing is left."""
    shutil.rmtree(top, ignore_errors=True)
    directory.mkdir(parents=True)


def _write_weights(directory: Path, model: MegatronModel, optimizer: MegatronOptimizer | None) -> None:
    model_state = model.sharded_state_dict()
    state: dict[str, Any] = {"model": model_state}
    if optimizer is not None and optimizer.started:
        state["optimizer"] = optimizer.sharded_state_dict(model_state)
    # Megatron collects the writers' results through a manager process, which a synchronous save does not
    # need and which would outlive a killed run
    if filesystem_async._results_queue is None:
        filesystem_async._results_queue = queue.Queue()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dist_checkpointing.save(state, str(directory))


def _reason(error: BaseException, directory: Path) -> str:
    """One line: of a failure on several ranks, the first one's."""
    failures: dict[int, Any] = getattr(error, "failures", {})
    said = next((f"rank {rank}: {one_line(failure)}" for rank, (failure, _) in sorted(failures.items())), None)
    reason = said or one_line(error)
    if _WRITE_FAILED.search(reason):
        usage = shutil.disk_usage(directory)
        return f"is the disk full? {usage.free / 1e6:.1f} of {usage.total / 1e6:.1f} MB are free; {reason}"
    return reason


def put_in_place(partial: Path, path: Path) -> None:
    """Give a complete directory its name; one of that name is replaced.

    A kill at any moment leaves the old one or the new one, under its name or where :func:`recover` finds it.
    """
    recover(path)
    new, old = _aside(path)
    shutil.rmtree(new, ignore_errors=True)
    shutil.rmtree(old, ignore_errors=True)
    partial.rename(new)
    if path.exists():
        path.rename(old)
    with contextlib.suppress(FileNotFoundError):  # a reader recovered it
        new.rename(path)
    shutil.rmtree(old, ignore_errors=True)


def recover(path: Path) -> None:
    """Finish a replacement that was killed when nothing bore the name; any rank may call, also several at once."""
    for left in _aside(path):
        if not path.exists():
            with contextlib.suppress(OSError):
                left.rename(path)


def _aside(path: Path) -> tuple[Path, Path]:
    """Names of a complete checkpoint that is to replace ``path``, and of the one that it replaces."""
    return path.with_name(path.name + ".new"), path.with_name(path.name + ".old")


def read_meta(path: Path) -> dict[str, Any]:
    """The description of a checkpoint; raises CheckpointError when it is missing or incomplete."""
    path = Path(path)
    recover(path)
    if not path.exists():
        raise CheckpointError(f"{path}: there is no such checkpoint")
    try:
        with open(path / "meta.json") as file:
            meta = json.load(file)
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: not a complete checkpoint (meta.json: {error})") from error
    if not isinstance(meta, dict) or not {"format", "head", "model"} <= set(meta):
        raise CheckpointError(f"{path}: not a checkpoint of nemo_advrm (meta.json lacks format, head or model)")
    if meta["format"] > FORMAT:
        raise CheckpointError(f"{path}: written by a newer version (format {meta['format']}, this one knows {FORMAT})")
    return meta


def _check_architecture(path: Path, meta: dict[str, Any], model: MegatronModel) -> None:
    difference = first_difference(meta["model"], asdict(model.model), meta["head"], model.head)
    if difference:
        key, theirs, mine = difference
        raise CheckpointError(f"{path}: model.{key} is {theirs!r} in the checkpoint and {mine!r} in the configuration")
    if meta["vocab_size"] != model.vocab_size:
        raise CheckpointError(
            f"{path}: the vocabulary has {meta['vocab_size']} entries in the checkpoint and {model.vocab_size} in the "
            "configuration (model.tokenizer, model.make_vocab_size_divisible_by)"
        )


def load(
    path: Path, model: MegatronModel, optimizer: MegatronOptimizer | None = None, *, new_head: bool = False
) -> dict[str, Any]:
    """Read weights (and optimizer state) into ``model`` at its own layout; returns the checkpoint's description.

    Args:
        new_head: keep the model's own head and take only the trunk. Without it the head must be the
            checkpoint's: a head is never re-initialised silently.

    Raises:
        CheckpointError: missing, incomplete or damaged checkpoint, another architecture or head.
    """
    path = Path(path)
    meta = read_meta(path)
    _check_architecture(path, meta, model)
    if meta["head"] != model.head and not new_head:
        raise CheckpointError(
            f"{path}: holds a model with the head {meta['head']!r}, but one with {model.head!r} is wanted"
        )
    if optimizer is not None and not meta.get("has_optimizer"):
        raise CheckpointError(f"{path}: has no optimizer state, so training cannot continue from it")
    if runtime.on_writer((path / manifest.NAME).exists):  # converted checkpoints have none
        problem = manifest.damage(path, full=False, except_for="meta.json")  # which was just read
        if problem is not None:
            raise CheckpointError(f"{path}: could not be read ({problem})")
    model_state = model.sharded_state_dict()
    if new_head:
        model_state = {k: v for k, v in model_state.items() if not _is_head(k)}
    state: dict[str, Any] = {"model": model_state}
    started = bool(meta.get("optimizer_started", True))
    if optimizer is not None and started:
        state["optimizer"] = optimizer.sharded_state_dict(model_state, is_loading=True)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            loaded = dist_checkpointing.load(state, str(path / "weights"), strict=StrictHandling.RAISE_UNEXPECTED)
    except (Exception, CheckpointException) as error:  # many types for a damaged directory; the user needs one sentence
        raise CheckpointError(f"{path}: could not be read ({type(error).__name__}: {error})") from error
    _load_model_state(model, loaded["model"], strict=not new_head)
    if optimizer is not None and started:
        optimizer.load_state_dict(loaded["optimizer"])
    elif optimizer is not None:
        optimizer.reset()
    return meta


def _is_head(key: str) -> bool:
    return ".head." in f".{key}" or "output_layer." in key


def _load_model_state(model: MegatronModel, state: dict[str, Any], strict: bool) -> None:
    missing, unexpected = model.load_state_dict(state)
    lost = [k for k in missing if "_extra_state" not in k and (strict or not _is_head(k))]
    if lost or unexpected:
        raise CheckpointError(f"tensors do not match: missing {lost}, unexpected {list(unexpected)}")
