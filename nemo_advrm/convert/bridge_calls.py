"""Hands conversions to Megatron-Bridge: between Hugging Face and its checkpoints, for architectures without a table.

Bridge is part of NVIDIA's NeMo containers and imports Transformer Engine; it is not a requirement of this package. It
was not run here: its calls are those of version 0.7 and are tested against a module with the same signatures.
"""

from __future__ import annotations

import importlib.util
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from nemo_advrm.config.schema import ConvertConfig
from nemo_advrm.convert.bridge_checkpoint import hf_origin, is_known, iteration
from nemo_advrm.convert.conversion import DTYPES
from nemo_advrm.errors import CheckpointError, ConfigError, one_line

MODULE = "megatron.bridge"
# settings that its calls do not have
_NOT_BRIDGES = (
    "architecture",
    "card",
    "drop_head_bias",
    "drop_reference_features",
    "max_shard_size",
    "tensor_model_parallel_size",
    "pipeline_model_parallel_size",
)


def installed() -> bool:
    """Whether Megatron-Bridge can be imported; does not import it."""
    try:
        return importlib.util.find_spec(MODULE) is not None
    except ModuleNotFoundError:  # there is no package megatron at all
        return False


def is_bridges_work(cfg: ConvertConfig) -> bool:
    """Whether Bridge itself must do a conversion: to its format, or to hf from an architecture without a table.

    Raises ConfigError for a conversion that neither can do, and when only the checkpoint itself names the model whose
    architecture decides: Bridge unpickles, so the user chooses it, not the file.
    """
    if cfg.to == "bridge":
        if cfg.from_ != "hf":
            raise ConfigError(f"from={cfg.from_} to=bridge: convert to=hf first, then from=hf to=bridge")
        return True
    if cfg.from_ != "bridge":
        return False
    origin = Path(cfg.tokenizer) if cfg.tokenizer else hf_origin(Path(cfg.path))
    if is_known(origin):
        return False
    if cfg.to != "hf":
        raise ConfigError(
            f"from=bridge to={cfg.to}: {origin} has an architecture that this package does not train; only to=hf, by "
            "Megatron-Bridge, is possible"
        )
    if not cfg.tokenizer:
        raise ConfigError(
            f"tokenizer is not set: {origin} has an architecture that only Megatron-Bridge converts, which unpickles "
            f"checkpoints: if you trust {cfg.path}, set tokenizer={origin}"
        )
    return True


def hand_over(cfg: ConvertConfig, report: Callable[[str], Any]) -> None:
    """Lets Bridge convert ``path`` to ``out``, on the CPU in this process; with ``dry_run`` only says how.

    Bridge loads checkpoints by unpickling, so :func:`is_bridges_work` asks first. What it left behind is removed after
    an error.

    Raises:
        ConfigError: Bridge is not installed, or a setting has no meaning for it.
        CheckpointError: Bridge does not know the architecture, or fails.
    """
    path, out = Path(cfg.path), Path(cfg.out)
    ignored = [key for key in _NOT_BRIDGES if getattr(cfg, key) != getattr(ConvertConfig(), key)]
    if cfg.to == "hf" and cfg.dtype:
        ignored.append("dtype")
    if cfg.to == "bridge" and cfg.tokenizer:
        ignored.append("tokenizer")
    if ignored:
        raise ConfigError(f"{ignored[0]} is not possible when Megatron-Bridge converts (docs/bridge.md)")
    if not installed():
        raise ConfigError(
            f"from={cfg.from_} to={cfg.to} needs Megatron-Bridge ({MODULE}), which is not installed: it is part of "
            "NVIDIA's NeMo containers (docs/bridge.md)"
        )
    if cfg.to == "bridge":
        origin, source = path, path
    else:
        origin, source = Path(cfg.tokenizer), iteration(path)
    if not (origin / "config.json").exists():
        raise CheckpointError(f"{origin}: no directory with config.json (nothing is downloaded)")
    if cfg.out and out.exists():
        raise CheckpointError(f"{out}: exists already; choose another out, or remove it")
    call = "import_ckpt" if cfg.to == "bridge" else "export_ckpt"
    report(f"Megatron-Bridge converts: AutoBridge.{call}, {source} -> {cfg.out or '(out)'}")
    if cfg.dry_run:
        return
    _convert(cfg, origin, source, out)
    report(f"written: {out}")


def _convert(cfg: ConvertConfig, origin: Path, source: Path, out: Path) -> None:
    try:
        from megatron.bridge import AutoBridge
    except Exception as error:  # its CUDA libraries raise OSError and others where they are not complete
        raise ConfigError(f"Megatron-Bridge cannot be imported: {one_line(error, 300)}") from error
    if not AutoBridge.can_handle(str(origin)):
        raise CheckpointError(f"{origin}: neither this package nor Megatron-Bridge has a table for its architecture")
    try:
        if cfg.to == "bridge":
            options = {"torch_dtype": DTYPES[cfg.dtype]} if cfg.dtype else {}
            AutoBridge.import_ckpt(str(source), str(out), **options)
        else:
            bridge = AutoBridge.from_hf_pretrained(str(origin))
            bridge.export_ckpt(str(source), str(out), show_progress=False, strict=True)
    except BaseException as error:
        shutil.rmtree(out, ignore_errors=True)
        if not isinstance(error, Exception):
            raise
        raise CheckpointError(f"{source}: Megatron-Bridge failed: {one_line(error, 300)}") from error
