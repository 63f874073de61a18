"""Saves and loads model and optimizer as Megatron distributed checkpoints, which open at any parallel layout.

A checkpoint is a directory ``{meta.json, manifest.json, weights/}``. That of a model with adapters holds only what is
trained, and names the checkpoint below (``base`` in ``meta.json``). It is written as ``NAME.partial`` and renamed when
every rank has written its files, so that a directory with its final name is complete. Damage that came later is found
by the manifest.
"""

from __future__ import annotations

import contextlib
import copy
import json
import logging
import re
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any, TypeVar

from megatron.core.dist_checkpointing.state_dict_utils import save_preprocess
from torch.distributed.checkpoint.api import CheckpointException  # not an Exception, but a BaseException

from nemo_advrm import files
from nemo_advrm.config.schema import ModelConfig
from nemo_advrm.data.tokenizers import Tokenizer, check_vocabulary
from nemo_advrm.engine import lora, manifest, runtime
from nemo_advrm.engine.adapter_base import chain, lora_of
from nemo_advrm.engine.architecture import first_difference
from nemo_advrm.engine.checkpoint_meta import FORMAT, WEIGHTS, read_meta
from nemo_advrm.engine.collectives import all_reduce_max, run_on_rank_zero
from nemo_advrm.engine.dimensions import padded_vocab_size
from nemo_advrm.engine.file_readers import load_weights
from nemo_advrm.engine.file_writers import FileWriters, RankFiles, write_common
from nemo_advrm.engine.fp8_states import check_fp8_states
from nemo_advrm.engine.model import Base, MegatronModel
from nemo_advrm.engine.optim import MegatronOptimizer
from nemo_advrm.errors import CheckpointError, one_line

# how often the ranks ask each other whether all have written, while a save is waited for
LOOK_SECONDS = 1.0
# how long the threads of a save that is given up may take to finish the tensor they write
DROP_SECONDS = 60.0
# how torch.save reports a full disk
_WRITE_FAILED = re.compile("inline_container|iostream error")

_log = logging.getLogger(__name__)
T = TypeVar("T")
Wanted = Callable[[str], bool]
"""Whether a tensor is saved or loaded, by its name."""


def _meta(model: MegatronModel, extra: dict[str, Any]) -> dict[str, Any]:
    own: dict[str, Any] = {"head": model.head, "head_outputs": model.head_outputs, "vocab_size": model.vocab_size}
    if model.base is not None:
        own["base"] = asdict(model.base)
    if model.heads > 1:
        own["heads"] = model.heads
    return {"format": FORMAT, **own, "model": asdict(model.model_config), **extra}


def _optimizer_meta(optimizer: MegatronOptimizer | None) -> dict[str, bool]:
    if optimizer is None:
        return {"has_optimizer": False}
    return {"has_optimizer": True, "optimizer_started": optimizer.started}


class Saving:
    """A checkpoint that is being written; all ranks create it, and end it with :meth:`finish` or :meth:`drop`.

    Args:
        path: the final name.
        model, optimizer: their present state is saved.
        meta: further JSON values for ``meta.json`` (step, tokenizer, history).
        in_background: copy the state to host memory, so that training can continue while threads write the copy.
            Without it nothing may change the state before :meth:`finish` has returned.
        hash_weights: list the hashes of all files in the manifest, which reads every file again.

    Raises:
        CheckpointError: it cannot be written; no file of it is left.
    """

    def __init__(
        self,
        path: Path,
        model: MegatronModel,
        optimizer: MegatronOptimizer | None = None,
        meta: dict[str, Any] | None = None,
        *,
        in_background: bool,
        hash_weights: bool = False,
    ) -> None:
        self.path = path
        self._hash_weights = hash_weights
        self._partial = path.with_name(path.name + ".partial")
        self._writers: FileWriters | None = None
        described = _meta(model, {**(meta or {}), **_optimizer_meta(optimizer)})
        with self._failing():
            # no variable for the whole state here: it would keep the tensors alive beside their copies
            sharded, common = save_preprocess(_state(model, optimizer))
            write_on_rank_zero(path, lambda: self._begin(described, common))
            self._writers = FileWriters(sharded, self._partial / WEIGHTS, in_background, hash_weights)

    @property
    def written(self) -> bool:
        """Whether this rank has written its files, or failed to; :meth:`finish` then waits for other ranks only."""
        return self._writers is not None and self._writers.ended

    def finish(self, limit_minutes: float) -> None:
        """Wait until all ranks have written their files, then give the checkpoint its final name; all ranks call.

        An existing checkpoint of that name is replaced only once the new one is complete.

        Raises CheckpointError on every rank when one cannot write, or takes longer than ``limit_minutes``.
        """
        assert self._writers is not None
        with self._failing():
            self._wait(self._writers, limit_minutes)
            gathered = self._writers.gather()
            write_on_rank_zero(self.path, lambda: self._complete(gathered))

    def drop(self) -> None:
        """Stop writing and remove what was written; without collectives, since other ranks may have ended."""
        if self._writers is not None and not self._writers.stop(DROP_SECONDS):
            _log.warning("%s: the save is given up, but the file system does not finish the last write", self.path)
        if runtime.current().is_writer:
            shutil.rmtree(self._partial, ignore_errors=True)  # free the space on a full disk

    def _begin(self, described: dict[str, Any], common: dict[str, Any]) -> None:
        make_empty(self._partial / WEIGHTS, self._partial)
        files.write_text(self._partial / "meta.json", json.dumps(described, indent=1))
        write_common(self._partial / WEIGHTS, common)

    def _complete(self, gathered: list[RankFiles | str]) -> None:
        assert self._writers is not None
        entries = self._writers.write_metadata(gathered)
        small = [name for name in manifest.names_in(self._partial) if name not in entries]
        entries |= manifest.describe(self._partial, small)
        manifest.write(self._partial, dict(sorted(entries.items())))
        files.atomic_replace(self._partial, self.path, manifest.WEIGHTS_SUFFIX)

    def _wait(self, writers: FileWriters, limit_minutes: float) -> None:
        """Poll all ranks every ``LOOK_SECONDS``: a collective that waits for a slow disk would look like a hang."""
        rank = runtime.current().rank
        deadline = time.monotonic() + 60 * limit_minutes
        while True:
            ended = writers.wait(LOOK_SECONDS)
            slowest = all_reduce_max(0 if ended else rank + 1)
            if not slowest:
                return
            if all_reduce_max(int(time.monotonic() > deadline)):
                overdue = TimeoutError(f"rank {slowest - 1} is still writing after {limit_minutes:g} minutes")
                raise could_not_write(self.path, overdue, everywhere=True)

    @contextlib.contextmanager
    def _failing(self) -> Iterator[None]:
        """Remove the files when the block fails; turn errors of the disk and of Megatron into CheckpointError."""
        try:
            yield
        except (OSError, RuntimeError, CheckpointException) as error:
            self.drop()
            if isinstance(error, RuntimeError) and not _WRITE_FAILED.search(str(error)):
                raise
            raise could_not_write(self.path, error) from error
        except BaseException:
            self.drop()
            raise


def save(
    path: Path,
    model: MegatronModel,
    optimizer: MegatronOptimizer | None = None,
    meta: dict[str, Any] | None = None,
    limit_minutes: float = 30.0,
    hash_weights: bool = False,
) -> None:
    """Write a checkpoint and wait for it; see :class:`Saving`."""
    saving = Saving(Path(path), model, optimizer, meta, in_background=False, hash_weights=hash_weights)
    saving.finish(limit_minutes)


def make_empty(directory: Path, top: Path) -> None:
    """Remove ``top`` and create the empty ``directory`` below it."""
    shutil.rmtree(top, ignore_errors=True)
    directory.mkdir(parents=True)


def write_on_rank_zero(path: Path, work: Callable[[], T]) -> T:
    """Run ``work`` on the writing rank; an OSError becomes a CheckpointError that names ``path``, on every rank."""

    def checked() -> T:
        try:
            return work()
        except OSError as error:
            raise could_not_write(path, error) from error

    return run_on_rank_zero(checked)


def could_not_write(path: Path, error: BaseException, everywhere: bool = False) -> CheckpointError:
    """The error for a failed save; ``everywhere``: every rank raises it."""
    reason = _reason(error, path.parent)
    failed = CheckpointError(f"{path}: could not be written ({reason}); the checkpoint before it is untouched")
    failed.everywhere = everywhere
    return failed


def _state(model: MegatronModel, optimizer: MegatronOptimizer | None) -> dict[str, Any]:
    model_state = _tensors(model, lora.is_trained if model.base is not None else _all)
    if optimizer is None or not optimizer.started:
        return {"model": model_state}
    return {"model": model_state, "optimizer": optimizer.sharded_state_dict(model_state)}


def _reason(error: BaseException, directory: Path) -> str:
    """The reason in one line; that of the first rank when several failed."""
    failures: dict[int, Any] = getattr(error, "failures", {})
    first = next((f"rank {rank}: {one_line(failure)}" for rank, (failure, _) in sorted(failures.items())), None)
    reason = first or one_line(error)
    if _WRITE_FAILED.search(reason):
        usage = shutil.disk_usage(directory)
        return f"is the disk full? {usage.free / 1e6:.1f} of {usage.total / 1e6:.1f} MB are free; {reason}"
    return reason


def check_tokenizer(tokenizer: Tokenizer, model: ModelConfig, path: str = "") -> None:
    """Raise CheckpointError when a tokenizer has ids beyond the embedding of the checkpoint ``path``, or of ``model``.

    ``path`` is empty for random weights.
    """
    if path and (rows := read_meta(Path(path)).get("vocab_size")) is not None:
        check_vocabulary(tokenizer, int(rows), path)
    check_vocabulary(tokenizer, padded_vocab_size(model, tokenizer.vocab_size), f"model.vocab_size={model.vocab_size}")


def check_architecture(path: Path, meta: dict[str, Any], model: MegatronModel) -> None:
    """Raise CheckpointError with the first key in which the checkpoint ``path`` differs from the configuration."""
    difference = first_difference(meta["model"], asdict(model.model_config), meta["head"], model.head)
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
    """Load weights (and optimizer state) into ``model`` at its own layout; returns the content of ``meta.json``.

    Args:
        new_head: load the trunk only and keep the model's own head. Without it the checkpoint must have the model's
            head: a head is never initialised silently.

    Raises:
        CheckpointError: the checkpoint is missing, incomplete or damaged, or has another architecture or head.
    """
    path = Path(path)
    meta = _checked_meta(path, model)
    if meta["head"] != model.head and not new_head:
        raise CheckpointError(
            f"{path}: holds a model with the head {meta['head']!r}, but one with {model.head!r} is wanted"
        )
    if not new_head and meta.get("heads", 1) != model.heads:
        raise CheckpointError(
            f"{path}: holds {meta.get('heads', 1)} members on its trunk, but {model.heads} are wanted (ensemble.share, "
            "ensemble.size)"
        )
    if optimizer is not None:
        _check_continues(path, meta, model)
    if model.base is not None:
        _fill(path, meta, model, lora.is_trained, optimizer)
        return meta
    for top, described in _from_below(path, meta, model):
        wanted = _without_head if new_head or described["head"] != model.head else _all
        if "base" not in described:
            _fill(top, described, model, wanted, optimizer)
            continue
        with lora.to_merge(model.parts, model.model_config, lora_of(described)):
            _fill(top, described, model, _both(lora.is_trained, wanted), None)
    return meta


def load_beside(path: Path, frozen: MegatronModel) -> lora.AdapterSet:
    """The adapters and the head of a checkpoint of adapters, to be applied to the frozen model at the end of its chain.

    Adapters of that chain are not merged. All ranks call.

    Raises CheckpointError as :func:`load` does.
    """
    path = Path(path)
    meta = _checked_meta(path, frozen)
    adapters: list[Any] = []
    for top, described in _from_below(path, meta, frozen)[1:]:
        wanted = _without_head if described["head"] != frozen.head else _all
        with lora.to_fill(frozen.parts, frozen.model_config, lora_of(described)) as filled:
            _fill(top, described, frozen, _both(lora.is_trained, wanted), None)
        adapters += filled
    device = runtime.current().device  # not in CPU memory, where the frozen model's own may wait
    heads = [(part, copy.deepcopy(part.head).to(device)) for part in frozen.parts if part.post_process]
    return lora.AdapterSet(adapters, heads)


def base_of(path: Path) -> Base:
    """What a model with adapters says of the checkpoint below them; all ranks call."""
    return Base(str(path.resolve()), run_on_rank_zero(manifest.digest, path))


def _from_below(path: Path, meta: dict[str, Any], model: MegatronModel) -> list[tuple[Path, dict[str, Any]]]:
    """The checkpoint ``path`` and those below its adapters, the whole model first; all are checked."""
    found = chain(path, meta, lambda base: run_on_rank_zero(manifest.digest, base))
    for below, _ in found[1:]:
        _checked_meta(below, model)
    return found[::-1]


def _checked_meta(path: Path, model: MegatronModel) -> dict[str, Any]:
    """``meta.json`` of a checkpoint with the architecture of ``model``, whose small files are undamaged."""
    meta = read_meta(path)
    check_architecture(path, meta, model)
    if run_on_rank_zero((path / manifest.NAME).exists):  # converted checkpoints have none
        problem = manifest.damage(path, verify_weights=False, except_for="meta.json")  # which was just read
        if problem is not None:
            raise CheckpointError(f"{path}: could not be read ({problem})")
    return meta


def _check_continues(path: Path, meta: dict[str, Any], model: MegatronModel) -> None:
    """Raise CheckpointError unless training can continue: the same weights are trained, on the same base."""
    if not meta.get("has_optimizer"):
        raise CheckpointError(f"{path}: has no optimizer state, so training cannot continue from it")
    base = meta.get("base")
    if (base is None) != (model.base is None):
        written, running = ("none", "lora") if base is None else ("lora", "none")
        raise CheckpointError(
            f"{path}: was written with model.peft={written}, so model.peft={running} cannot continue from it"
        )
    if base is None or model.base is None:
        return
    if base["digest"] != model.base.digest:
        raise CheckpointError(
            f"{path}: holds adapters of {base['path']} as it was then; the base that is loaded is {model.base.path}"
        )
    theirs, mine = meta["model"]["lora"], asdict(model.model_config.lora)
    for key in ("rank", "alpha", "targets"):
        if theirs.get(key) != mine[key]:
            raise CheckpointError(
                f"{path}: model.lora.{key} is {theirs.get(key)!r} in the checkpoint and {mine[key]!r} in the "
                "configuration"
            )


def _fill(
    path: Path, meta: dict[str, Any], model: MegatronModel, wanted: Wanted, optimizer: MegatronOptimizer | None
) -> None:
    """Load the model's tensors that are ``wanted``, and the optimizer's state if there is one."""
    model_state = _tensors(model, wanted)
    state: dict[str, Any] = {"model": model_state}
    started = bool(meta.get("optimizer_started", True))
    if optimizer is not None and started:
        state["optimizer"] = optimizer.sharded_state_dict(model_state, is_loading=True)
    try:
        loaded = load_weights(state, path / WEIGHTS)
        check_fp8_states(loaded["model"], str(path / WEIGHTS))
    except (Exception, CheckpointException) as error:  # a damaged directory raises many types
        raise _could_not_read(path, error) from error
    missing, unexpected = model.load_state_dict(loaded["model"])
    lost = [name for name in missing if "_extra_state" not in name and wanted(name)]
    if lost or unexpected:
        raise CheckpointError(f"tensors do not match: missing {lost}, unexpected {list(unexpected)}")
    if optimizer is not None and started:
        optimizer.load_state_dict(loaded["optimizer"])
    elif optimizer is not None:
        optimizer.reset()


def _tensors(model: MegatronModel, wanted: Wanted) -> dict[str, Any]:
    return {name: tensor for name, tensor in model.sharded_state_dict().items() if wanted(name)}


def _all(_: str) -> bool:
    return True


def _both(one: Wanted, other: Wanted) -> Wanted:
    return lambda name: one(name) and other(name)


def _without_head(name: str) -> bool:
    return not (".head." in f".{name}" or "output_layer." in name)


def _could_not_read(path: Path, error: BaseException) -> CheckpointError:
    """The error in one line; that of the first rank when several failed."""
    failures: dict[int, Any] = getattr(error, "failures", {})
    first = next((failure for _, (failure, _) in sorted(failures.items())), error)
    kind = "" if isinstance(first, CheckpointError) else f"{type(first).__name__}: "
    return CheckpointError(f"{path}: could not be read ({kind}{one_line(first, 400)})")
