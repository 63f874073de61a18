"""NVIDIA's resiliency extension, where it is installed: heartbeats for its launcher, its detector of slow GPUs."""

from __future__ import annotations

import importlib.util
import logging
import os
from collections.abc import Callable
from typing import Any

_log = logging.getLogger(__name__)
_PACKAGE = "nvidia_resiliency_ext"
# set by ft_launcher in the processes that it starts
_SOCKET = "FT_RANK_MONITOR_IPC_SOCKET"


def monitor() -> Callable[[], None] | None:
    """What sends a heartbeat to ft_launcher's monitor of this process; None where there is no such launcher.

    The launcher restarts the job when heartbeats stay away for the time that its own settings say. A monitor that is
    gone is told once and then left alone.
    """
    if _SOCKET not in os.environ or importlib.util.find_spec(_PACKAGE) is None:
        return None
    from nvidia_resiliency_ext.fault_tolerance import RankMonitorClient

    client = RankMonitorClient()
    try:
        client.init_workload_monitoring()
    except Exception as error:  # the package raises plain exceptions and those of sockets
        _log.warning("ft_launcher's monitor cannot be reached, no heartbeats go there: %s", error)
        return None
    lost = False

    def send() -> None:
        nonlocal lost
        if lost:
            return
        try:
            client.send_heartbeat()
        except Exception as error:
            lost = True
            _log.warning("ft_launcher's monitor takes no more heartbeats: %s", error)

    return send


def straggler_callback(ratio: float) -> Any | None:
    """The extension's Lightning callback that compares the GPUs' kernels every minute; None where it is not installed.

    A GPU whose kernels take ``ratio`` times as long as the fastest one's is logged. Not yet run: it needs a GPU.
    """
    if not ratio or importlib.util.find_spec(_PACKAGE) is None:
        return None
    from nvidia_resiliency_ext.ptl_resiliency import StragglerDetectionCallback

    return StragglerDetectionCallback(
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
