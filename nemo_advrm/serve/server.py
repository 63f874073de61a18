"""Runs the application: socket, announcement in the run directory, and an end that loses no request."""

from __future__ import annotations

import contextlib
import functools
import ipaddress
import json
import os
import resource
import signal
import socket
from collections.abc import Iterator
from pathlib import Path
from types import FrameType

import uvicorn

from nemo_advrm import files, signals
from nemo_advrm.config.schema import ServeConfig
from nemo_advrm.errors import ConfigError, RewardSourceError, UserError
from nemo_advrm.serve.app import create_app
from nemo_advrm.serve.connection import LimitedConnection
from nemo_advrm.serve.metrics import Metrics
from nemo_advrm.serve.service import ScoringService

_OTHER_FILES = 512  # that a process with models, other ranks and refused connections opens besides


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches ``host``."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def bind(options: ServeConfig, token: str) -> socket.socket:
    """Open the listening socket. Raises ConfigError, also for a public address without a token."""
    if not is_loopback(options.host) and not token:
        raise ConfigError(
            f"serve.host={options.host} can be reached from other machines: set serve.token_file (or the variable "
            "NEMO_ADVRM_TOKEN) to a bearer token, or serve on 127.0.0.1"
        )
    if options.max_pending_mib < options.max_body_mib:
        raise ConfigError(
            f"serve.max_pending_mib={options.max_pending_mib:g}: must be at least serve.max_body_mib="
            f"{options.max_body_mib:g}"
        )
    _raise_file_limit(options.max_connections)
    family = socket.AF_INET6 if ":" in options.host else socket.AF_INET
    try:
        return socket.create_server((options.host, options.port), family=family, backlog=1024)
    except OSError as error:
        raise ConfigError(f"serve.host={options.host} serve.port={options.port}: {error}") from error


def _raise_file_limit(connections: int) -> None:
    """Raise this process's limit of open files to what the connections need. Raises ConfigError."""
    needed = connections + _OTHER_FILES
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY or soft >= needed:
        return
    if hard != resource.RLIM_INFINITY and hard < needed:
        raise ConfigError(
            f"serve.max_connections={connections}: this process may open {hard} files (ulimit -Hn), {needed} are needed"
        )
    resource.setrlimit(resource.RLIMIT_NOFILE, (needed, hard))


class _Server(uvicorn.Server):
    def __init__(self, config: uvicorn.Config, service: ScoringService, address: str, directory: Path) -> None:
        super().__init__(config)
        self.service = service
        self.address = address
        self.directory = directory
        self.failure: UserError | None = None

    def fail(self, reason: UserError) -> None:
        """Stop serving, and let :func:`run` raise ``reason``."""
        self.failure, self.should_exit = reason, True

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        name = self.service.options.name
        about = {"address": self.address, "pid": os.getpid(), "model": name}
        try:
            files.write_text(self.directory / "server.json", json.dumps(about))
        except UserError as error:
            self.fail(error)
        except OSError as error:
            self.fail(ConfigError(f"run_dir={self.directory}: {error}"))
        else:
            print(f"serving {name} at {self.address}  (documentation: {self.address}/docs)", flush=True)

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        # uvicorn's own raises the signal again at the end, and the process would end as if it had been killed
        ours = (*signals.SIGNALS, signal.SIGINT)
        before = {number: signal.signal(number, self.handle_exit) for number in ours}
        try:
            if signals.received():  # while the models were loaded
                self.handle_exit(signal.SIGTERM, None)
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        self.service.draining = True  # new requests over connections that are kept alive are refused
        super().handle_exit(sig, frame)


def configure(service: ScoringService, metrics: Metrics, token: str) -> uvicorn.Config:
    """uvicorn's settings, with the limits of ``service.options`` for every connection."""
    options = service.options
    return uvicorn.Config(
        create_app(service, metrics, token),
        http=functools.partial(LimitedConnection, limits=options),  # type: ignore[arg-type]
        ws="none",
        proxy_headers=False,
        log_level="warning",
        access_log=False,
        server_header=False,
        timeout_graceful_shutdown=max(1, round(options.drain_seconds)),
        timeout_keep_alive=options.idle_seconds,  # type: ignore[arg-type]
    )


def run(service: ScoringService, metrics: Metrics, token: str, sock: socket.socket, directory: Path) -> None:
    """Serve until TERM, USR1 or INT, then finish the running requests.

    ``directory/server.json`` holds the address and process id while the server is ready.

    Raises:
        ConfigError: ``directory`` cannot be written.
        RewardSourceError: scoring failed for good.
    """
    host, port = sock.getsockname()[:2]
    address = f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
    server = _Server(configure(service, metrics, token), service, address, directory)

    def stop(error: Exception) -> None:
        reason = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
        server.fail(RewardSourceError(f"the server stopped because scoring failed ({reason}); its log says why"))

    service.batcher.on_failure = stop
    try:
        server.run(sockets=[sock])
    finally:
        with contextlib.suppress(OSError):
            (directory / "server.json").unlink()
    if server.failure is not None:
        raise server.failure
