"""Ports for servers that tests start."""

from __future__ import annotations

import contextlib
import fcntl
import os
import random
import socket
import tempfile
from collections.abc import Callable
from pathlib import Path

_taken: list[int] = []
_random_choice = random.SystemRandom().choice


def free_port(draw: Callable[[range], int] = _random_choice) -> int:
    """A port that no other call of this user gives while this process or a child that it has forked lives.

    It is below those that the system gives to outgoing connections: it is still free when a server gets to it.
    """
    first = int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()[0])
    locks = Path(tempfile.gettempdir()) / f"nemo_advrm_test_ports_{os.getuid()}"  # another user's cannot be opened
    locks.mkdir(exist_ok=True)
    while True:
        port = draw(range(first // 2, first))
        lock = os.open(locks / str(port), os.O_RDWR | os.O_CREAT, 0o666)
        with socket.socket() as sock, contextlib.suppress(OSError):
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            sock.bind(("", port))
            _taken.append(lock)
            return port
        os.close(lock)
