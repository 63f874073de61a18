"""Files of a run directory: checks that they can be written, removes rests of killed processes, hashes the inputs."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from nemo_advrm import files
from nemo_advrm.config import for_stage
from nemo_advrm.config.keys import stages_with_settings
from nemo_advrm.config.schema import Config
from nemo_advrm.engine import manifest
from nemo_advrm.errors import ConfigError
from nemo_advrm.rewards import sources
from nemo_advrm.untrusted_files import decode_yaml, read_bytes

_DIRECTORIES = (
    *("checkpoints", "model", "logs", "attack", "report", "sft", "preferences", "rlhf", "best_of_n"),
    *("locks", "branches", "attacks", "policy"),
)
_FILES = (
    *("config.yaml", "versions.yaml", "state.json", "metrics.jsonl", "samples.jsonl", "reference.jsonl", "pairs.jsonl"),
    *("result.json", "summary.json", "manifest.json", "finds.jsonl", "audit.json"),
)
# what a run writes only after config.yaml
_PRODUCTS = re.compile(
    r"checkpoints|model|metrics\.jsonl|result\.json|sft(_\d+)?|rm_\d+|preferences|attacks?|rlhf|best_of_n|round_\d+|branches"
    r"|finds\.jsonl"
)
_DATA_KEYS = ("train_path", "validation_path", "prompts_path", "held_out_prompts_path")


def check_writable(directory: Path) -> None:
    """Raise ConfigError when a name of a run's file or directory is taken by the other kind, or by a dangling link."""
    for names, is_directory in ((_DIRECTORIES, True), (_FILES, False)):
        for path in (directory / name for name in names):
            if path.is_symlink() and not path.exists():
                raise ConfigError(f"{path} is in the way: it is a link to {os.readlink(path)}, which does not exist")
            if path.exists() and path.is_dir() != is_directory:
                there, wanted = ("a directory", "a file") if path.is_dir() else ("a file", "a directory")
                raise ConfigError(f"{path} is in the way: it is {there}, where {wanted} is to be written; move it away")


def products(directory: Path) -> list[str]:
    """Names in ``directory`` that a run has written after its ``config.yaml``."""
    if not directory.is_dir():
        return []
    return sorted(path.name for path in directory.iterdir() if _PRODUCTS.fullmatch(path.name))


def clean(directory: Path) -> None:
    """Remove half-written files of killed processes below ``directory``, into which no other process writes."""
    for folder, names, _ in os.walk(directory):
        home = Path(folder)
        for path in files.temporary_files(home):
            path.unlink(missing_ok=True)
        files.finish_interrupted_replace(home / "model")
        for name in ("model.partial", "model.new", "model.old"):
            shutil.rmtree(home / name, ignore_errors=True)
        names[:] = [name for name in names if name not in ("checkpoints", "model", "logs") and (home / name).is_dir()]


def read_yaml(path: Path) -> dict[str, Any]:
    """The mapping in a YAML file; raises ValueError, in one line, for anything else."""
    try:
        found = decode_yaml(read_bytes(path))
    except (OSError, ValueError) as error:
        raise ValueError(" ".join(str(error).split())) from error
    if not isinstance(found, dict) or not found:
        raise ValueError("it is empty" if not found else f"it holds a {type(found).__name__}, not keys")
    level: list[Any] = [found]
    while level:
        if not all(isinstance(key, str) for item in level if isinstance(item, dict) for key in item):
            raise ValueError("its keys are no names")
        inner = (item.values() if isinstance(item, dict) else item for item in level if isinstance(item, dict | list))
        level = [value for values in inner for value in values]
    return found


def inputs(cfg: Config) -> dict[str, str]:
    """SHA-256 of what a run reads, by path: of data files, and of the manifests of checkpoints.

    A store of adversarial pairs is left out: it may grow during a run, and has its own check. So is what is not on this
    machine (an address, a missing file): its reader reports it.
    """
    paths = {path for each in _with_stages(cfg) for path in _paths(each) if path}
    found = {}
    for path in sorted(paths):
        with contextlib.suppress(OSError):
            digest = manifest.digest(Path(path))
            if digest:
                found[path] = digest
    return found


def _with_stages(cfg: Config) -> Iterator[Config]:
    yield cfg
    for name in stages_with_settings():
        if getattr(cfg.stage, name):
            yield for_stage(cfg, name)


def _paths(cfg: Config) -> list[str]:
    data = [getattr(cfg.data, key) for key in _DATA_KEYS]
    named = sources.parse_members(cfg.ensemble.members)
    if cfg.augmentation.rrm_filter:
        named.append(sources.parse(cfg.augmentation.rrm_filter, "augmentation.rrm_filter"))
    members = [spec.location for spec in named if not spec.is_remote]
    policies = [cfg.pretrained_checkpoint.restore_from_path, cfg.reward_model.feature_policy, cfg.adversarial.lm]
    data += [cfg.adversarial.search.probes_path, cfg.judge.rubric]
    return [*data, *(path.removeprefix("hf:") for path in policies), *members, *_of_hardening(cfg)]


def _of_hardening(cfg: Config) -> list[str]:
    """Files of ``nemo-advrm harden``. Its finds do not grow while it runs, unlike those of a pipeline's rounds."""
    options = cfg.harden
    target = sources.parse(options.target, "harden.target") if options.target else None
    model = [] if target is None or target.is_remote else [target.location]
    finds = [path.strip() for path in options.finds.split(",")]
    others = [options.held_out_finds, options.prompts, options.pairs, options.policy.removeprefix("hf:")]
    return [*model, *finds, *others]
