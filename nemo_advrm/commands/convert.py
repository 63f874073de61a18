"""Stage ``convert``: Hugging Face <-> Megatron <-> .nemo."""

from __future__ import annotations

import shlex

from nemo_advrm.config.schema import ConvertConfig
from nemo_advrm.convert.conversion import convert


def main(settings: ConvertConfig) -> int:
    """Convert one checkpoint in this process; prints its size and where it was written."""
    convert(settings)
    if settings.to == "megatron" and not settings.dry_run:
        words = (
            f"hydra.searchpath=[{settings.out}/conf]",
            "model=imported",
            f"pretrained_checkpoint.restore_from_path={settings.out}",
        )
        print(f"train with: {shlex.join(words)}")
    return 0
