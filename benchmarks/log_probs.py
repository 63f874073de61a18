"""Measures the peak memory of log-probabilities and their gradient with logits made at once and made in chunks.

Each side has a process of its own: a language model's output layer on random hidden states, forward and backward. The
result is the peak (of resident memory on a CPU, of allocated memory on a GPU) above that before the pass. The gradients
of the two sides are compared.
"""

from __future__ import annotations

import argparse
import multiprocessing
import resource
from typing import Any

import torch


def measure(options: argparse.Namespace, rows: int, results: Any) -> None:
    """Put (bytes above the start, sum and norm of the gradient) into the queue; ``rows`` tokens per chunk, 0: all."""
    from nemo_advrm.engine import runtime
    from nemo_advrm.engine.log_probs import DeferredLogits, log_probs

    on_gpu = torch.cuda.is_available()
    runtime.start(runtime.Layout(), "gpu" if on_gpu else "cpu")
    device, dtype = ("cuda", torch.bfloat16) if on_gpu else ("cpu", torch.float32)
    torch.manual_seed(0)
    hidden_NH = torch.randn(options.tokens, options.hidden, device=device, dtype=dtype, requires_grad=True)
    weight = torch.randn(options.vocabulary, options.hidden, device=device, dtype=dtype).mul_(0.02).requires_grad_()
    targets_N = torch.randint(options.vocabulary, (options.tokens,), device=device)

    def logits_of(chunk_NH: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.linear(chunk_NH, weight)

    def peak() -> int:
        if on_gpu:
            return torch.cuda.max_memory_allocated()
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

    before = peak()
    logits = DeferredLogits(hidden_NH, logits_of, rows) if rows else logits_of(hidden_NH)
    log_probs(logits, targets_N).sum().backward()
    taken = peak() - before
    assert hidden_NH.grad is not None
    results.put((taken, hidden_NH.grad.float().norm().item()))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--hidden", type=int, default=128)
    parser.add_argument("--vocabulary", type=int, default=32000, help="this rank's part")
    parser.add_argument("--chunk", type=int, default=512, help="tokens per chunk")
    options = parser.parse_args()
    context = multiprocessing.get_context("spawn")
    norms = []
    for name, rows in (("at once", 0), (f"chunks of {options.chunk}", options.chunk)):
        results = context.Queue()
        process = context.Process(target=measure, args=(options, rows, results))
        process.start()
        taken, norm = results.get(timeout=600)
        process.join()
        norms.append(norm)
        one = options.tokens * options.vocabulary * 4
        print(f"{name}: {taken / 2**20:.0f} MiB, {taken / one:.2f} times the fp32 logits of {one / 2**20:.0f} MiB")
    print(f"norm of the hidden states' gradient: {norms[0]:.6g} and {norms[1]:.6g}")


if __name__ == "__main__":
    main()
