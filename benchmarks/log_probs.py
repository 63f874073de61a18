"""Measures the peak memory of log-probabilities and their gradient with logits made at once and made in chunks.

Each side has a process of its own: a language model's output layer on random hidden states, forward and backward. The
result is the peak (of resident memory on a CPU, of allocated memory on a GPU) above that before the pass. The gradients
of the two sides are compared. ``gpu/log_probs_memory.py`` does this at the sizes of real vocabularies.
"""

from __future__ import annotations

import argparse
import multiprocessing
import queue
import resource
import time
from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True)
class Options:
    tokens: int
    hidden: int
    vocabulary: int  # this rank's part
    accelerator: str = "cpu"

    @property
    def logits_bytes(self) -> int:
        """Size of one fp32 tensor of all logits."""
        return self.tokens * self.vocabulary * 4


@dataclass(frozen=True)
class Found:
    """``taken`` is the peak in bytes above that before the first pass, ``seconds`` the time of the second one."""

    taken: int
    norm: float
    seconds: float


def measure(options: Options, rows: int, results: Any) -> None:
    """Put what was Found, or the error as text, into the queue; ``rows`` tokens per chunk, 0: all."""
    try:
        results.put(_measured(options, rows))
    except Exception as error:
        results.put(f"{type(error).__name__}: {error}")


def _measured(options: Options, rows: int) -> Found:
    from nemo_advrm.engine import runtime
    from nemo_advrm.engine.log_probs import DeferredLogits, log_probs

    runtime.start(runtime.Layout(), options.accelerator)
    on_gpu = options.accelerator == "gpu"
    device, dtype = ("cuda", torch.bfloat16) if on_gpu else ("cpu", torch.float32)
    torch.manual_seed(0)
    hidden_NH = torch.randn(options.tokens, options.hidden, device=device, dtype=dtype, requires_grad=True)
    weight = torch.randn(options.vocabulary, options.hidden, device=device, dtype=dtype).mul_(0.02).requires_grad_()
    targets_N = torch.randint(options.vocabulary, (options.tokens,), device=device)

    def logits_of(chunk_NH: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.linear(chunk_NH, weight)

    def peak() -> int:
        if on_gpu:
            torch.cuda.synchronize()
            return torch.cuda.max_memory_allocated()
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

    def one_pass() -> float:
        hidden_NH.grad = weight.grad = None
        started = time.perf_counter()
        logits = DeferredLogits(hidden_NH, logits_of, rows) if rows else logits_of(hidden_NH)
        log_probs(logits, targets_N).sum().backward()
        if on_gpu:
            torch.cuda.synchronize()
        return time.perf_counter() - started

    before = peak()
    one_pass()
    taken = peak() - before
    seconds = one_pass()
    assert hidden_NH.grad is not None
    return Found(taken, hidden_NH.grad.float().norm().item(), seconds)


def in_process(options: Options, rows: int, timeout: float) -> Found | str:
    """What :func:`measure` finds in a process of its own, or the error as text."""
    context = multiprocessing.get_context("spawn")
    results = context.Queue()
    process = context.Process(target=measure, args=(options, rows, results), daemon=True)
    process.start()
    try:
        return results.get(timeout=timeout)
    except queue.Empty:
        return "no answer in time"
    finally:
        process.kill()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--hidden", type=int, default=128)
    parser.add_argument("--vocabulary", type=int, default=32000, help="this rank's part")
    parser.add_argument("--chunk", type=int, default=512, help="tokens per chunk")
    arguments = parser.parse_args()
    accelerator = "gpu" if torch.cuda.is_available() else "cpu"
    options = Options(arguments.tokens, arguments.hidden, arguments.vocabulary, accelerator)
    norms = []
    for name, rows in (("at once", 0), (f"chunks of {arguments.chunk}", arguments.chunk)):
        found = in_process(options, rows, timeout=600)
        if isinstance(found, str):
            raise SystemExit(f"{name}: {found}")
        norms.append(found.norm)
        taken, one = found.taken / 2**20, options.logits_bytes / 2**20
        print(f"{name}: {taken:.0f} MiB, {taken / one:.2f} times the fp32 logits of {one:.0f} MiB")
    print(f"norm of the hidden states' gradient: {norms[0]:.6g} and {norms[1]:.6g}")


if __name__ == "__main__":
    main()
