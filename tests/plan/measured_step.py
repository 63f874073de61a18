"""Runs real training steps on a CPU and prints, as JSON, what PyTorch's allocator held: a child process of the tests.

The profiler reports every allocation and release of CPU memory with the running total, so that memory inside operators
counts too. Argument: a JSON list of objects with keys of ``cfg.model``, and under ``rows``, ``length``, ``head`` the
microbatch, ``fused`` for Megatron's fused activation, ``vocabulary`` its size, and ``outputs`` the heads of a trunk.
That activation and recompute are switched on in Megatron's configuration after the model is built.
"""

from __future__ import annotations

import gc
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile, record_function

from nemo_advrm.config.schema import ModelConfig, OptimConfig, PrecisionConfig
from nemo_advrm.engine import runtime
from nemo_advrm.engine.log_probs import log_probs_and_entropy
from nemo_advrm.engine.microbatches import Microbatch
from nemo_advrm.engine.model import MegatronModel, build_model
from nemo_advrm.engine.optim import MegatronOptimizer
from nemo_advrm.engine.schedule import Sums, forward_backward
from nemo_advrm.logging_setup import quiet_libraries

VOCABULARY = 512


def _microbatch(rows: int, length: int, head: str, vocabulary: int) -> Microbatch:
    tokens_BS = torch.randint(vocabulary, (rows, length))
    lengths_B = torch.full((rows,), length)
    if head == "lm":
        predict_BS = torch.ones(rows, length, dtype=torch.bool)
        return Microbatch(tokens_BS, lengths_B, {"predict_BS": predict_BS}, {"targets": tokens_BS.flatten()})
    return Microbatch(tokens_BS, lengths_B, {"read_at_B": lengths_B - 1})


def _loss(output: torch.Tensor, microbatch: Microbatch) -> tuple[torch.Tensor, int, Sums]:
    if "targets" in microbatch.extra:
        output = log_probs_and_entropy(output, microbatch.extra["targets"])[0]
    return output.square().sum(), output.size(0), {}


def _recompute(model: MegatronModel, granularity: str, layers: int) -> None:
    config = model.config
    config.recompute_granularity = "full"
    config.recompute_method = "uniform" if granularity == "full" else "block"
    config.recompute_num_layers = layers


def steps(settings: dict[str, Any]) -> None:
    rows, length, head = settings.pop("rows"), settings.pop("length"), settings.pop("head", "reward")
    fused, vocabulary = settings.pop("fused", False), settings.pop("vocabulary", VOCABULARY)
    outputs = settings.pop("outputs", 1)
    recompute, layers = settings.pop("recompute", "none"), settings.pop("recompute_num_layers", 1)
    marker = torch.empty(1)  # an event before all others: the total counts what earlier measurements left
    with record_function("build"):
        model = build_model(ModelConfig(**settings), PrecisionConfig(), head, vocabulary, seed=0, head_outputs=outputs)
        optimizer = MegatronOptimizer(model, OptimConfig(), 1.0)
    if recompute != "none":
        _recompute(model, recompute, layers)
    model.config.bias_activation_fusion = fused  # as PyTorch's own operations: see main
    for step in range(2):
        with record_function(f"step {step}"):
            optimizer.zero_grad()
            forward_backward(model, [_microbatch(rows, length, head, vocabulary)] * 2, _loss)
        with record_function(f"update {step}"):
            optimizer.step(1e-4, step)
    del marker


def _totals(trace: Path) -> dict[str, int]:
    """Bytes held before and, at most, during the second step."""
    events = json.loads(trace.read_text())["traceEvents"]
    spans = {e["name"]: (e["ts"], e["ts"] + e["dur"]) for e in events if e.get("cat") == "user_annotation"}
    held = sorted((e["ts"], e["args"]["Total Allocated"]) for e in events if e.get("name") == "[memory]")
    (start, end), (built, _) = spans["step 1"], spans["build"]
    foreign = next((total for time, total in reversed(held) if time < built), 0)
    before = [total for time, total in held if time < start][-1]
    during = max(total for time, total in held if start <= time <= end)
    return {"static": before - foreign, "peak": during - foreign}


def measure(settings: dict[str, Any]) -> dict[str, int]:
    gc.collect()  # what earlier work left would be let go in the middle
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        steps(settings)
    gc.collect()
    with tempfile.TemporaryDirectory() as directory:
        trace = Path(directory) / "trace.json"
        profiler.export_chrome_trace(str(trace))
        return _totals(trace)


def main() -> None:
    quiet_libraries()
    runtime.start(runtime.Layout(), "cpu")
    with torch.compiler.set_stance("force_eager"):
        print(json.dumps([measure(settings) for settings in json.loads(sys.argv[1])]))


if __name__ == "__main__":
    main()
