"""Heartbeats reach the monitor of NVIDIA's launcher; without the package or the launcher nothing is sent."""

from __future__ import annotations

import logging
import multiprocessing
from pathlib import Path

import pytest

from nemo_advrm.megatron import resiliency


def test_without_the_launcher_there_is_no_monitor(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("FT_RANK_MONITOR_IPC_SOCKET", raising=False)
    assert resiliency.monitor() is None
    assert resiliency.straggler_callback(0.0) is None


def test_a_monitor_takes_heartbeats_and_is_left_alone_when_it_is_gone(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    pytest.importorskip("nvidia_resiliency_ext", reason="nvidia-resiliency-ext is not installed")
    from nvidia_resiliency_ext.fault_tolerance import FaultToleranceConfig, RankMonitorServer

    socket = tmp_path / "monitor.sock"
    settings = FaultToleranceConfig(initial_rank_heartbeat_timeout=60.0, rank_heartbeat_timeout=60.0)
    server = RankMonitorServer.run_in_subprocess(settings, str(socket), mp_ctx=multiprocessing.get_context("spawn"))
    try:
        monkeypatch.setenv("FT_RANK_MONITOR_IPC_SOCKET", str(socket))
        monkeypatch.setenv("RANK", "0")
        send = resiliency.monitor()
        assert send is not None
        with caplog.at_level(logging.WARNING):
            send()
            assert not caplog.records
            server.kill()
            server.join(timeout=10)
            send()
            send()
        assert [record.getMessage()[:47] for record in caplog.records] == [
            "ft_launcher's monitor takes no more heartbeats:"
        ]
    finally:
        server.kill()
        server.join(timeout=10)
    monkeypatch.setenv("FT_RANK_MONITOR_IPC_SOCKET", str(tmp_path / "nobody.sock"))
    assert resiliency.monitor() is None
