"""A process of its own that runs PyTriton and passes what Triton is asked to the reward server, over two pipes.

It runs as a file (``python triton_bridge.py SETTINGS``), in whatever environment has ``nvidia-pytriton``: that package
needs another NumPy than this one does, and nothing else of this one is imported. Its parent is
:class:`nemo_advrm.serve.triton.TritonBridge`. To the parent go READY once, then a KServe v2 request with binary tensors
for each of Triton's; back come rewards, or the message of an error. The end of the pipe means that the parent is gone.
"""

from __future__ import annotations

import json
import os
import signal
import struct
import subprocess
import sys
import sysconfig
import threading
from concurrent.futures import Future
from pathlib import Path
from typing import Any, BinaryIO

REQUEST = struct.Struct("<QII")  # number (0: READY), bytes of the JSON head, bytes of all
ANSWER = struct.Struct("<QII")  # number (0: stop), HTTP status, bytes of content: rewards FP32, else the error's text
_TYPES: dict[str, Any] = {"INT64": "<i8", "BOOL": "|b1"}


def encode(tensors: dict[str, Any], datatypes: dict[str, str]) -> tuple[int, bytes]:
    """(bytes of the head, body) of the KServe v2 request for arrays by input name."""
    inputs: list[dict[str, Any]] = []
    parts: list[bytes] = []
    for name, array in tensors.items():
        if datatypes[name] == "BYTES":
            texts = [text.encode() if isinstance(text, str) else bytes(text) for text in array.flatten()]
            raw = b"".join(struct.pack("<I", len(text)) + text for text in texts)
        else:
            raw = array.astype(_TYPES[datatypes[name]]).tobytes()
        parts.append(raw)
        form = {"name": name, "datatype": datatypes[name], "shape": list(array.shape)}
        inputs.append({**form, "parameters": {"binary_data_size": len(raw)}})
    head = json.dumps({"inputs": inputs}).encode()
    return len(head), head + b"".join(parts)


class Refused(Exception):
    """The reward server's error, for the client."""


class Link:
    """The pipes to the parent; any thread may ask, one thread reads the answers."""

    def __init__(self, answers: BinaryIO, requests: BinaryIO) -> None:
        self._answers = answers
        self._requests = requests
        self._lock = threading.Lock()
        self._waiting: dict[int, Future[bytes]] = {}
        self._number = 0
        self.ended = threading.Event()  # asked to stop, or the parent is gone
        threading.Thread(target=self._read, name="answers", daemon=True).start()

    def ready(self) -> None:
        self._write(REQUEST.pack(0, 0, 0))

    def ask(self, head_length: int, body: bytes) -> Future[bytes]:
        """The rewards, little-endian FP32. The parent answers every request before its own limit of time."""
        future: Future[bytes] = Future()
        with self._lock:
            self._number += 1
            number = self._number
            self._waiting[number] = future
        self._write(REQUEST.pack(number, head_length, len(body)) + body)
        return future

    def _write(self, data: bytes) -> None:
        with self._lock:
            self._requests.write(data)
            self._requests.flush()

    def _read(self) -> None:
        while True:
            head = self._answers.read(ANSWER.size)
            if len(head) < ANSWER.size:
                break
            number, status, length = ANSWER.unpack(head)
            if number == 0:  # what is under way is still answered
                self.ended.set()
                continue
            content = self._answers.read(length)
            with self._lock:
                future = self._waiting.pop(number)
            if status == 200:
                future.set_result(content)
            else:
                future.set_exception(Refused(content.decode()))
        with self._lock:
            lost, self._waiting = list(self._waiting.values()), {}
        for future in lost:
            future.set_exception(Refused("the reward server is gone"))
        self.ended.set()


def serve(settings: dict[str, Any], link: Link) -> int:
    """Run Triton until the parent asks for the end or is gone; 1 when Triton ended by itself."""
    import numpy as np
    from pytriton.model_config import ModelConfig, Tensor
    from pytriton.triton import Triton, TritonConfig

    types: dict[str, Any] = {"BYTES": bytes, "INT64": np.int64, "BOOL": np.bool_}
    datatypes: dict[str, str] = settings["inputs"]
    output: str = settings["output"]

    def infer(requests: list[Any]) -> list[dict[str, Any]]:
        asked = [link.ask(*encode(dict(request.items()), datatypes)) for request in requests]
        return [{output: np.frombuffer(future.result(), "<f4")[:, None]} for future in asked]

    started = False

    class Watched(Triton):  # type: ignore[misc]
        def stop(self) -> bool:
            if not started:  # Triton has ended, and PyTriton would still wait minutes for it to be ready
                os._exit(1)
            return bool(super().stop())

    triton = Watched(
        config=TritonConfig(
            http_address=settings["host"],
            http_port=settings["port"],
            allow_grpc=False,
            allow_metrics=False,
            exit_timeout_secs=settings["drain_seconds"],
        ),
        workspace=settings["workspace"],
    )
    # One instance of the model: PyTriton gives those after the first too little time to start on a busy machine. And no
    # batcher of Triton's, which would answer all requests of a batch with the error of one: each request comes alone.
    triton.bind(
        model_name=settings["name"],
        infer_func=infer,
        inputs=[
            Tensor(name=name, shape=(1 if name == "add_EOS" else -1,), dtype=types[datatype], optional=True)
            for name, datatype in datatypes.items()
        ],
        outputs=[Tensor(name=output, shape=(1,), dtype=np.float32)],
        config=ModelConfig(max_batch_size=settings["max_samples"], batcher=None),  # type: ignore[arg-type]
    )
    triton.run()
    started = True
    link.ready()
    while not link.ended.wait(0.5):
        if not triton.is_alive():
            return 1
    triton.stop()  # Triton answers what it has begun, and takes nothing more
    return 0


def check() -> str:
    """What keeps PyTriton from running here, in one sentence; "" when nothing does."""
    try:
        import pytriton
        from pytriton.utils.distribution import get_libs_path, get_stub_path
    except ImportError as error:
        return f"{sys.executable} cannot import PyTriton ({error}): pip install nvidia-pytriton"
    version = f"{sys.version_info[0]}.{sys.version_info[1]}"
    stub = get_stub_path(version)
    if not stub.exists():
        return f"this PyTriton has no Triton backend for Python {version}"
    binary = Path(str(pytriton.__file__)).parent / "tritonserver" / "bin" / "tritonserver"
    environment = {**os.environ, "LD_LIBRARY_PATH": f"{os.environ['LD_LIBRARY_PATH']}:{get_libs_path()}"}
    for program in (binary, stub):
        try:
            linked = subprocess.run(
                ["ldd", str(program)], env=environment, capture_output=True, text=True, timeout=30, check=False
            )
        except (OSError, subprocess.TimeoutExpired):
            return ""  # no ldd here: the start itself will tell
        for line in (linked.stdout + linked.stderr).splitlines():
            if "not found" in line:
                return f"PyTriton's {program.name} cannot run on this machine: {line.strip()}"
    return ""


def main() -> int:
    # the backend of a Python outside the system's directories does not find its libpython by itself
    libraries = [os.environ.get("LD_LIBRARY_PATH", ""), str(sysconfig.get_config_var("LIBDIR") or "")]
    os.environ["LD_LIBRARY_PATH"] = ":".join(filter(None, libraries))
    if sys.argv[1] == "--check":
        problem = check()
        print(problem)
        return 1 if problem else 0
    # the pipes are kept from Triton, which writes its log to the standard streams
    answers, requests = os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(1), "wb")
    with open(os.devnull, "rb") as nothing:
        os.dup2(nothing.fileno(), 0)
    os.dup2(2, 1)
    for number in (signal.SIGTERM, signal.SIGINT):  # a batch system sends them to all processes: the parent decides
        signal.signal(number, lambda *_: None)
    return serve(json.loads(sys.argv[1]), Link(answers, requests))  # noqa: TID251 (of the parent process)


if __name__ == "__main__":
    sys.path.pop(0)  # the directory of this file: its modules are not top-level ones
    sys.exit(main())
