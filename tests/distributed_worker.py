"""The processes of a :class:`distributed.World`: one that has imported everything, and its forks.

Started once by the tests; every line on its input, a JSON object, asks for the processes of one world. Each of them
waits for jobs on a connection and answers each with its result.
"""

from __future__ import annotations

import gc
import importlib
import json
import os
import pickle
import signal
import sys
import traceback
from multiprocessing.connection import Client
from typing import Any


def main() -> None:
    import torch

    from nemo_advrm.engine import cpu, runtime  # noqa: F401 (imported once for all worlds)
    from nemo_advrm.logging_setup import quiet_libraries
    from nemo_advrm.training import reward_model_training  # noqa: F401 (with NeMo, which takes seconds)

    quiet_libraries()
    torch.set_num_threads(1)
    cpu.redirect_megatron_to_cpu()  # imports all of Megatron-Core that is used
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # ended processes leave nothing behind
    gc.freeze()  # the forks need not look through all modules again and again
    for line in sys.stdin:
        world = json.loads(line)
        for rank in range(world["size"]):
            if os.fork() == 0:
                _become(rank, world)
                _work(*world["address"], bytes.fromhex(world["key"]))


def _become(rank: int, world: dict[str, Any]) -> None:
    """Make this process the one that a launcher would have started for ``rank``."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    os.setsid()
    log = os.open(world["log"], os.O_WRONLY | os.O_APPEND)
    for stream in (1, 2):
        os.dup2(log, stream)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world["size"], "LOCAL_WORLD_SIZE": world["size"]}
    rendezvous = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": world["port"]}
    os.environ.update({name: str(value) for name, value in (place | rendezvous).items()})


def _work(host: str, port: int, key: bytes) -> None:
    from nemo_advrm.engine import runtime

    connection = Client((host, port), authkey=key)
    connection.send((int(os.environ["RANK"]), os.getpid()))
    while True:
        try:
            module, function, kwargs, layout = pickle.loads(connection.recv_bytes())
        except (EOFError, OSError):
            break  # the tests are over
        try:
            if layout is not None:
                runtime.start(layout, "cpu", timeout_minutes=2)
            answer = (True, getattr(importlib.import_module(module), function)(**kwargs))
        except Exception:
            answer = (False, traceback.format_exc())
        # plain bytes: a connection's own send would share tensors' memory, and with it their life
        connection.send_bytes(pickle.dumps(answer))
    sys.stdout.flush()
    os._exit(0)  # other ranks may be gone already: no group is left in order


if __name__ == "__main__":
    main()
