"""Runs the application: the socket, the token, the announcement, and the end without lost requests."""

from __future__ import annotations

import contextlib
import ipaddress
import json
import os
import signal
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import uvicorn

from nemo_advrm.errors import ConfigError
from nemo_advrm.schema import ServeConfig
from nemo_advrm.serve.app import Service, create_app
from nemo_advrm.serve.metrics import Metrics


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches ``host``."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def bind(options: ServeConfig, token: str) -> socket.socket:
    """The listening socket; raises ConfigError for a public address without a token, and one that cannot be had."""
    if not is_loopback(options.host) and not token:
        raise ConfigError(
            f"serve.host={options.host} can be reached from other machines: set serve.token_file (or the variable "
            "NEMO_ADVRM_TOKEN) to a bearer token, or serve on 127.0.0.1"
        )
    family = socket.AF_INET6 if ":" in options.host else socket.AF_INET
    try:
        return socket.create_server((options.host, options.port), family=family, backlog=1024)
    except OSError as error:
        raise ConfigError(f"serve.host={options.host} serve.port={options.port}: {error}") from error


class _Server(uvicorn.Server):
    def __init__(self, config: uvicorn.Config, service: Service, announce: Callable[[], None]) -> None:
        super().__init__(config)
        self.service = service
        self.announce = announce

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self.announce()

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        # uvicorn's own raises the signal once more at the end, and the process would end as if it had been killed
        before = {number: signal.signal(number, self.handle_exit) for number in (signal.SIGTERM, signal.SIGINT)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        self.service.draining = True  # connections that are kept alive are told, too
        super().handle_exit(sig, frame)


def run(service: Service, metrics: Metrics, token: str, sock: socket.socket, directory: Path) -> bool:
    """Serve until TERM or INT, then finish the running requests; whether it ended because it was asked to.

    ``directory/server.json`` holds address and process while the server is ready.
    """
    options = service.options
    host, port = sock.getsockname()[:2]
    address = f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
    announced = directory / "server.json"

    def announce() -> None:
        directory.mkdir(parents=True, exist_ok=True)
        partial = announced.with_suffix(".partial")
        partial.write_text(json.dumps({"address": address, "pid": os.getpid(), "model": options.name}))
        partial.rename(announced)
        print(f"serving {options.name} at {address}  (documentation: {address}/docs)", flush=True)

    config = uvicorn.Config(
        create_app(service, metrics, token),
        log_level="warning",
        access_log=False,
        server_header=False,
        timeout_graceful_shutdown=max(1, round(options.drain_seconds)),
        timeout_keep_alive=60,
    )
    server = _Server(config, service, announce)
    failed = False

    def stop(*_: Any) -> None:
        nonlocal failed
        failed, server.should_exit = True, True

    service.batcher.on_failure = stop
    try:
        server.run(sockets=[sock])
    finally:
        announced.unlink(missing_ok=True)
    return not failed
