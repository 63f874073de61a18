"""The command ``convert``: Hugging Face <-> Megatron <-> .nemo."""

from __future__ import annotations

import shlex

from nemo_advrm.config.schema import ConvertConfig
from nemo_advrm.convert.conversion import convert


def main(cfg: ConvertConfig) -> int:
    """Converts one checkpoint in this process; prints its size and where it was written."""
    convert(cfg)
    if cfg.to == "megatron" and not cfg.dry_run:
        words = (
            f"hydra.searchpath=[{cfg.out}/conf]",
            "model=imported",
            f"pretrained_checkpoint.restore_from_path={cfg.out}",
        )
        print(f"train with: {shlex.join(words)}")
    return 0
