"""Silences what libraries say about absent accelerators and their own set-up; our own lines would drown in it."""

from __future__ import annotations

import logging
import warnings

_LOGGERS = (
    "lightning",
    "lightning.pytorch",
    "lightning.fabric",
    "megatron",
    "nemo_logger",
    "nv_one_logger",
    "root_logger",
    "torch.distributed",
)


def quiet_libraries() -> None:
    """Called by the command line before a stage is imported; a program that imports the package is left alone."""
    warnings.filterwarnings("ignore")
    for name in _LOGGERS:
        logging.getLogger(name).setLevel(logging.ERROR)
