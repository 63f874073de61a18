"""Heartbeats reach the monitor of NVIDIA's launcher and never wait for it; what is broken or not asked for is left out.

The tests of heartbeats and of the detector have stand-ins for NVIDIA's package where they need one that fails.
"""

from __future__ import annotations

import multiprocessing
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from nemo_advrm.commands import doctor
from nemo_advrm.config.schema import Config
from nemo_advrm.engine import resiliency, runtime
from nemo_advrm.training import run_training


def wait_for(condition: Callable[[], Any]) -> None:
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def install(monkeypatch: pytest.MonkeyPatch, name: str, **content: Any) -> None:
    """A module in place of one of NVIDIA's."""
    module = ModuleType(name)
    for key, value in content.items():
        setattr(module, key, value)
    monkeypatch.setitem(sys.modules, name, module)


def test_without_the_launcher_there_is_no_monitor(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("FT_RANK_MONITOR_IPC_SOCKET", raising=False)
    assert resiliency.monitor() is None


@pytest.mark.parametrize("blocks_in", ["init_workload_monitoring", "send_heartbeat"])
def test_a_monitor_that_does_not_answer_keeps_nobody_waiting(monkeypatch: pytest.MonkeyPatch, blocks_in: str) -> None:
    released, calls = threading.Event(), []

    class Client:
        def init_workload_monitoring(self) -> None:
            self.call("init_workload_monitoring")

        def send_heartbeat(self) -> None:
            self.call("send_heartbeat")

        def call(self, name: str) -> None:
            calls.append(name)
            if name == blocks_in:
                assert released.wait(30)

    install(monkeypatch, "nvidia_resiliency_ext", __path__=[])
    install(monkeypatch, "nvidia_resiliency_ext.fault_tolerance", RankMonitorClient=Client)
    monkeypatch.setenv("FT_RANK_MONITOR_IPC_SOCKET", "somewhere")
    started = time.monotonic()
    send = resiliency.monitor()
    assert send is not None
    send()
    wait_for(lambda: blocks_in in calls)
    send()
    assert time.monotonic() - started < 20
    released.set()
    wait_for(lambda: "send_heartbeat" in calls)


def test_an_extension_that_cannot_be_imported_is_told_and_left_alone(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setitem(sys.modules, "nvidia_resiliency_ext.fault_tolerance", None)
    monkeypatch.setenv("FT_RANK_MONITOR_IPC_SOCKET", "somewhere")
    assert resiliency.monitor() is None
    assert "no heartbeats go to ft_launcher's monitor" in caplog.text


def test_a_monitor_takes_heartbeats_and_is_left_alone_when_it_is_gone(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    pytest.importorskip("nvidia_resiliency_ext", reason="nvidia-resiliency-ext is not installed")
    from nvidia_resiliency_ext.fault_tolerance import FaultToleranceConfig, RankMonitorServer

    socket = tmp_path / "monitor.sock"
    settings = FaultToleranceConfig(initial_rank_heartbeat_timeout=60.0, rank_heartbeat_timeout=60.0)
    server = RankMonitorServer.run_in_subprocess(settings, str(socket), mp_ctx=multiprocessing.get_context("spawn"))

    def send_until_told() -> bool:
        send()
        return "ft_launcher's monitor takes no heartbeats:" in caplog.text

    try:
        monkeypatch.setenv("FT_RANK_MONITOR_IPC_SOCKET", str(socket))
        monkeypatch.setenv("RANK", "0")
        send = resiliency.monitor()
        assert send is not None
        send()
        time.sleep(0.5)
        assert not caplog.records
        server.kill()
        server.join(timeout=10)
        wait_for(send_until_told)
        send()
    finally:
        server.kill()
        server.join(timeout=10)
    monkeypatch.setenv("FT_RANK_MONITOR_IPC_SOCKET", str(tmp_path / "nobody.sock"))
    caplog.clear()
    assert resiliency.monitor() is not None
    wait_for(lambda: "ft_launcher's monitor takes no heartbeats:" in caplog.text)


def on_two_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runtime, "current", lambda: SimpleNamespace(on_gpu=True, world_size=2))


def test_kernels_are_compared_when_asked_for_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    on_two_gpus(monkeypatch)
    install(monkeypatch, "nvrx_cupti_module")
    install(monkeypatch, "nvidia_resiliency_ext", __path__=[], __spec__=SimpleNamespace())
    install(monkeypatch, "nvidia_resiliency_ext.ptl_resiliency", StragglerDetectionCallback=lambda **options: options)
    cfg = Config()
    assert run_training._installed(cfg) == []
    cfg.trainer.compare_gpu_kernels = True
    [options] = run_training._installed(cfg)
    assert options["gpu_relative_perf_threshold"] == pytest.approx(1 / 1.5)  # type: ignore[index]
    cfg.trainer.straggler_ratio = 0.0
    assert run_training._installed(cfg) == []


def test_a_detector_that_cannot_be_imported_does_not_keep_a_training_from_starting(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The real package imports, and fails in the start of the training, where CUDA's profiling library is another."""
    on_two_gpus(monkeypatch)
    monkeypatch.setitem(sys.modules, "nvrx_cupti_module", None)
    install(monkeypatch, "nvidia_resiliency_ext", __path__=[], __spec__=SimpleNamespace())
    install(monkeypatch, "nvidia_resiliency_ext.ptl_resiliency", StragglerDetectionCallback=dict)
    cfg = Config()
    cfg.trainer.compare_gpu_kernels = True
    assert run_training._installed(cfg) == []
    assert [record.getMessage()[:35] for record in caplog.records] == ["the GPUs' kernels are not compared,"]
    monkeypatch.setattr(doctor, "_version", lambda package: "0.4.1")
    assert "trainer.compare_gpu_kernels does nothing: import of nvrx_cupti_module" in doctor._resiliency().meaning
