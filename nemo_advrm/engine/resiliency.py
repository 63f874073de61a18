"""NVIDIA's resiliency extension, where it is installed: heartbeats for its launcher, its detector of slow GPUs."""

from __future__ import annotations

import importlib
import logging
import os
import threading
from collections.abc import Callable
from typing import Any

_log = logging.getLogger(__name__)
# set by ft_launcher in the processes that it starts
_SOCKET = "FT_RANK_MONITOR_IPC_SOCKET"


def monitor() -> Callable[[], None] | None:
    """What sends a heartbeat to ft_launcher's monitor of this process; None where there is no such launcher.

    It never blocks: a thread of its own speaks to the monitor, whose socket has no time limit. The launcher restarts
    the job when heartbeats stay away for the time that its own settings say. A monitor that cannot be reached or is
    gone is told once and then left alone.
    """
    if _SOCKET not in os.environ:
        return None
    try:
        client = importlib.import_module("nvidia_resiliency_ext.fault_tolerance").RankMonitorClient()
    except Exception as error:
        _log.warning("no heartbeats go to ft_launcher's monitor, nvidia-resiliency-ext cannot be used: %s", error)
        return None
    asked = threading.Event()

    def speak() -> None:
        try:
            client.init_workload_monitoring()
            while asked.wait():
                asked.clear()
                client.send_heartbeat()
        except Exception as error:  # the package raises plain exceptions and those of sockets
            _log.warning("ft_launcher's monitor takes no heartbeats: %s", error)

    threading.Thread(target=speak, name="ft_launcher", daemon=True).start()
    return asked.set


def detector() -> type:
    """The extension's Lightning callback that compares the GPUs' kernels; raises whatever its import does."""
    importlib.import_module("nvrx_cupti_module")  # the extension does it in the midst of a training's start
    return importlib.import_module("nvidia_resiliency_ext.ptl_resiliency").StragglerDetectionCallback


def straggler_callback(ratio: float) -> Any | None:
    """The callback of :func:`detector`, with a report every minute; None, and a warning, where it cannot be used.

    A GPU whose kernels take ``ratio`` times as long as the fastest one's is logged. Not yet run: it needs a GPU.
    """
    try:
        callback = detector()
    except Exception as error:
        _log.warning("the GPUs' kernels are not compared, nvidia-resiliency-ext cannot be used: %s", error)
        return None
    return callback(
        report_time_interval=60.0,
        calc_relative_gpu_perf=True,
        calc_individual_gpu_perf=False,
        num_gpu_perf_scores_to_print=0,
        gpu_relative_perf_threshold=1 / ratio,
        gpu_individual_perf_threshold=1 / ratio,
        stop_if_detected=False,
        enable_ptl_logging=False,
        logger_name=__name__,
    )
