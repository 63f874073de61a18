"""Log levels: hides library messages about absent accelerators and their own set-up, which would bury ours."""

from __future__ import annotations

import logging
import warnings

_LOGGERS = (
    "lightning",
    "lightning.pytorch",
    "lightning.fabric",
    # 0.19 warns for every model that GPTModel is deprecated; why it is kept: nemo_advrm/engine/compat.py
    "megatron",
    "nemo_logger",
    "nv_one_logger",
    "root_logger",
    "torch.distributed",
)


def quiet_libraries() -> None:
    """Set the log level of noisy libraries to ERROR. Called by the command line only, never on import."""
    warnings.filterwarnings("ignore")
    for name in _LOGGERS:
        logging.getLogger(name).setLevel(logging.ERROR)
