"""One process of a :class:`distributed.World`: waits for jobs on a connection and answers each with its result."""

from __future__ import annotations

import importlib
import os
import pickle
import sys
import traceback
from multiprocessing.connection import Client


def main() -> None:
    host, port = os.environ["TEST_WORLD_ADDRESS"].split(":")
    connection = Client((host, int(port)), authkey=bytes.fromhex(os.environ["TEST_WORLD_KEY"]))
    connection.send((int(os.environ["RANK"]), os.getpid()))

    import torch

    from nemo_advrm.megatron import runtime

    torch.set_num_threads(1)
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
