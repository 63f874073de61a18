"""Compares loss curves in BF16 and FP8 on one GPU, and measures the speed of training, scoring and generation.

    python benchmarks/gpu/train_fp8.py --size 1b --precision bf16 fp8_current --out fp8.json

Every precision starts from the same random weights and trains on the same pairs, whose chosen responses contain one
token more often. The curves agree when the mean losses of every ten steps differ by at most ``--bound``. In the same
way ``--fusion-steps`` steps with and without Megatron's fused operations must agree within ``--fusion-bound``. The
script writes JSON with the results and errors. It exits with 1 after an error or when curves differ. Size 8b is only
scored and sampled, because its training does not fit on one GPU. ``--device cpu --size tiny --precision fp32`` runs
everything on a CPU.

Every measurement is written to the file at once. The same command continues with those that are missing or failed; it
refuses a file of other options or of another machine.

The machine needs the CUDA toolkit (nvcc) and cuDNN 9.3 or later, as Transformer Engine's guide requires. The following
lines are based on that guide and Apex's; they are untested (core_cu12 if torch.version.cuda begins with 12):

    make setup
    .venv/bin/pip install setuptools wheel ninja pybind11
    .venv/bin/pip install --no-build-isolation 'transformer-engine[pytorch,core_cu13]>=2.9,<2.12'
    git clone https://github.com/NVIDIA/apex /tmp/apex    # optional
    APEX_CPP_EXT=1 APEX_CUDA_EXT=1 .venv/bin/pip install --no-build-isolation /tmp/apex
    .venv/bin/nemo-advrm doctor
"""

from __future__ import annotations

import argparse
import gc
import importlib.metadata
import json
import platform
import random
import sys
import time
import traceback
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from nemo_advrm import files
from nemo_advrm.config.schema import Config
from nemo_advrm.data.encoding import EncodedPair
from nemo_advrm.engine import runtime
from nemo_advrm.engine.flops import Microbatch, layer_flops
from nemo_advrm.engine.fusions import settings
from nemo_advrm.engine.generation import generate, uniforms
from nemo_advrm.engine.model import build_model
from nemo_advrm.engine.sampling import Sampling
from nemo_advrm.engine.scoring import score_sequences
from nemo_advrm.engine.throughput import gpu_peak
from nemo_advrm.logging_setup import quiet_libraries
from nemo_advrm.models.reward_model import RewardModel
from nemo_advrm.synthetic.tokenizer import SyntheticTokenizer

TOKENIZER = SyntheticTokenizer()
LIKED, FIRST, WINDOW = 5, 8, 10
NEVER = (2,)  # a token that is never drawn, so every response has its full length

# layers, hidden, ffn, heads, groups, vocabulary; Llama 3.2 1B and 3B and Llama 3.1 8B, untied
SIZES = {
    "tiny": (2, 64, 128, 4, 2, 256),
    "1b": (16, 2048, 8192, 32, 8, 128256),
    "3b": (28, 3072, 8192, 24, 8, 128256),
    "8b": (32, 4096, 14336, 32, 8, 128256),  # its training state (18 bytes per parameter) does not fit on one GPU
}
TRAINED = ("tiny", "1b", "3b")


def configuration(options: argparse.Namespace, precision: str, fused: bool = True) -> Config:
    layers, hidden, ffn, heads, groups, vocabulary = SIZES[options.size]
    cfg = Config()
    cfg.precision.name = precision
    model = cfg.model
    model.num_layers, model.hidden_size, model.ffn_hidden_size = layers, hidden, ffn
    model.num_attention_heads, model.num_query_groups, model.vocab_size = heads, groups, vocabulary
    model.tokenizer, model.encoder_seq_length = "synthetic", options.length
    model.share_embeddings_and_output_weights = False
    model.use_distributed_optimizer = True
    model.recompute, model.fused_kernels = options.recompute, fused
    model.global_batch_size = options.batch
    model.micro_batch_size, model.micro_batch_tokens = options.micro_batch, 2 * options.micro_batch * options.length
    model.optim.lr, model.optim.sched.name = options.lr, "constant"
    cfg.trainer.max_steps = options.steps
    return cfg


def pairs(options: argparse.Namespace, vocabulary: int) -> list[EncodedPair]:
    """Draw random tokens; a tenth of the tokens of a chosen response are ``LIKED``."""
    draw = random.Random(0)

    def row(liked: bool) -> list[int]:
        tokens = [draw.randrange(FIRST, vocabulary) for _ in range(options.length)]
        for place in draw.sample(range(options.length), options.length // 10 if liked else 0):
            tokens[place] = LIKED
        return tokens

    return [EncodedPair(row(True), row(False), 1, None, 1.0, "", None, None) for _ in range(4 * options.batch)]


def forward_flops(cfg: Config, rows: int, length: int) -> float:
    return cfg.model.num_layers * layer_flops(cfg.model, Microbatch(rows, length)).total


def clock() -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def utilization(flops: float, seconds: float, peak: float | None) -> float | None:
    return flops / seconds / peak if peak else None


def train(options: argparse.Namespace, precision: str, fused: bool = True) -> dict[str, Any]:
    cfg = configuration(options, precision, fused)
    module = RewardModel(cfg, TOKENIZER, pairs(options, cfg.model.vocab_size), [])
    losses, seconds, norms = [], [], []
    if options.device == "gpu":
        torch.cuda.reset_peak_memory_stats()
    for step, batch in enumerate(module.steps(0)):
        started = clock()
        metrics = module.train_on(batch, step)
        seconds.append(clock() - started)
        losses.append(metrics["train/loss"])
        norms.append(metrics["grad_norm"])
    module.release()  # NeMo keeps a reference to the last module, and two do not fit on one GPU
    each = sorted(seconds)[len(seconds) // 2]  # the median excludes the first steps, which select kernels
    tokens = 2 * options.batch * options.length
    flops = 3 * forward_flops(cfg, 2 * options.batch, options.length)
    return {
        "losses": losses,
        "grad_norms": norms,
        "seconds_per_step": each,
        "tokens_per_second": tokens / each,
        "model_flops_per_step": flops,
        "mfu": utilization(flops, each, gpu_peak(precision)),
        "peak_gib": torch.cuda.max_memory_allocated() / 2**30 if options.device == "gpu" else None,
    }


def score(options: argparse.Namespace, precision: str) -> dict[str, Any]:
    cfg = configuration(options, precision)
    model = build_model(cfg.model, cfg.precision, "reward", TOKENIZER.vocab_size, seed=0, trainable=False)
    rows = [tokens for pair in pairs(options, cfg.model.vocab_size)[: options.batch] for tokens in (pair.chosen,)]
    score_sequences(model, rows, TOKENIZER.pad_id)
    started = clock()
    scores = score_sequences(model, rows, TOKENIZER.pad_id)
    seconds = clock() - started
    flops = forward_flops(cfg, len(rows), options.length)
    return {
        "scores": scores.tolist(),
        "tokens_per_second": len(rows) * options.length / seconds,
        "mfu": utilization(flops, seconds, gpu_peak(precision)),
    }


def write_responses(options: argparse.Namespace, precision: str) -> dict[str, Any]:
    cfg = configuration(options, precision)
    model = build_model(cfg.model, cfg.precision, "lm", TOKENIZER.vocab_size, seed=0, trainable=False)
    prompt = max(1, options.length // 4)
    sampling = Sampling(options.length - prompt, NEVER, temperature=1.0)
    draw = random.Random(1)
    prompts = [[draw.randrange(FIRST, 60) for _ in range(prompt)] for _ in range(options.batch)]
    numbers = uniforms(0, len(prompts), sampling.max_new_tokens)
    generate(model, prompts[:1], Sampling(2, NEVER), numbers[:1, :2])
    started = clock()
    made = generate(model, prompts, sampling, numbers)
    seconds = clock() - started
    return {"tokens_per_second": sum(map(len, made.responses)) / seconds, "rows": len(prompts)}


def fusions_agree(options: argparse.Namespace, precision: str) -> dict[str, Any]:
    """Compare the losses of some steps with and without Megatron's fused operations."""
    shorter = argparse.Namespace(**{**vars(options), "steps": options.fusion_steps})
    losses = {fused: train(shorter, precision, fused)["losses"] for fused in (False, True)}
    gap = max(abs(a - b) for a, b in zip(windows(losses[True]), windows(losses[False]), strict=True))
    active = settings(configuration(options, precision).model, options.device == "gpu")
    return {
        "active": sorted(name for name, is_on in active.items() if is_on),
        "losses": {"fused": losses[True], "plain": losses[False]},
        "bound": options.fusion_bound,
        "largest_gap": gap,
        "agrees": gap <= options.fusion_bound,
    }


def windows(losses: list[float]) -> list[float]:
    cuts = [losses[i : i + WINDOW] for i in range(0, len(losses), WINDOW)]
    return [sum(cut) / len(cut) for cut in cuts]


def agreement(results: dict[str, Any], bound: float) -> dict[str, Any] | None:
    """Return the largest difference of the mean losses of ten steps from those of the first precision."""
    names = [name for name, result in results.items() if "losses" in result.get("train", {})]
    if len(names) < 2:
        return None
    base = windows(results[names[0]]["train"]["losses"])
    gaps = {
        name: max(abs(a - b) for a, b in zip(windows(results[name]["train"]["losses"]), base, strict=True))
        for name in names[1:]
    }
    return {"against": names[0], "bound": bound, "largest_gap": gaps, "agrees": max(gaps.values()) <= bound}


def machine(device: str) -> dict[str, Any]:
    named = ("torch", "megatron-core", "triton", "transformer-engine", "apex")
    packages = [name for name in named if any(importlib.metadata.distributions(name=name))]
    name = torch.cuda.get_device_name() if device == "gpu" else platform.processor() or platform.machine()
    return {"device": name, "python": platform.python_version(), **{p: version(p) for p in packages}}


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("gpu", "cpu"), default="gpu")
    parser.add_argument("--size", choices=tuple(SIZES), default="1b")
    parser.add_argument("--precision", nargs="+", default=["bf16", "fp8_current"], help="the first is the reference")
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--batch", type=int, default=16, help="pairs per step")
    parser.add_argument("--micro-batch", type=int, default=4)
    parser.add_argument("--length", type=int, default=1024, help="tokens of a sequence")
    parser.add_argument("--lr", type=float, default=1e-5)
    parser.add_argument("--recompute", default="none", choices=("none", "selective", "full", "block"))
    parser.add_argument(
        "--bound", type=float, default=0.02, help="largest allowed difference of the mean losses of ten steps"
    )
    parser.add_argument("--fusion-steps", type=int, default=20, help="steps with and without fused operations")
    parser.add_argument("--fusion-bound", type=float, default=0.01, help="the same bound for --fusion-steps")
    parser.add_argument("--out", type=Path, default=Path("train_fp8.json"))
    return parser.parse_args(arguments)


class Report:
    """The file of results; each measurement is written atomically at once.

    Raises SystemExit for a file with results of other options or of another machine.
    """

    def __init__(self, options: argparse.Namespace) -> None:
        self.path: Path = options.out
        self.content: dict[str, Any] = {
            "machine": machine(options.device),
            "options": {k: str(v) if isinstance(v, Path) else v for k, v in vars(options).items()},
            "results": {},
            "fusions": None,
        }
        if self.path.exists():
            self._take_up(self.path)
        self.write()

    def _take_up(self, path: Path) -> None:
        try:
            before = json.loads(path.read_text())
            same = all(before[key] == self.content[key] for key in ("machine", "options"))
        except (ValueError, KeyError, TypeError):
            sys.exit(f"{path}: not a report of this script; choose another file with --out")
        if not same:
            sys.exit(f"{path}: contains results of other options or of another machine; choose another file with --out")
        self.content |= {key: before[key] for key in ("results", "fusions")}

    def write(self) -> None:
        files.write_text(self.path, json.dumps(self.content, indent=1) + "\n")

    def measure(
        self, precision: str, name: str, measure: Callable[..., dict[str, Any]], options: argparse.Namespace
    ) -> dict[str, Any]:
        """Return the result of an earlier run in the file, or measure it now; ``fusions`` belong to no precision."""
        held = self.content if name == "fusions" else self.content["results"].setdefault(precision, {})
        found: dict[str, Any] | None = held.get(name)
        if found is None or "error" in found:
            found = held[name] = attempt(name, measure, options, precision)
            self.write()
        return found


def attempt(
    name: str, measure: Callable[..., dict[str, Any]], options: argparse.Namespace, precision: str
) -> dict[str, Any]:
    """Return the measurement or its error, so that one failure does not lose the other measurements."""
    try:
        found = measure(options, precision)
    except Exception as error:
        traceback.print_exc()
        found = {"error": f"{type(error).__name__}: {error}"}
    gc.collect()
    torch.cuda.empty_cache()
    speed = found.get("tokens_per_second")
    print(precision, name, f"{speed:,.0f} tokens/s" if speed else found.get("error", "done"), flush=True)
    return found


def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    quiet_libraries()
    runtime.start(runtime.Layout(), options.device)
    report = Report(options)
    work: dict[str, Callable[..., dict[str, Any]]] = {"score": score, "generate": write_responses}
    if options.size in TRAINED:
        work = {"train": train, **work}
    results = {
        precision: {name: report.measure(precision, name, measure, options) for name, measure in work.items()}
        for precision in options.precision
    }
    trained = options.size in TRAINED
    fused = report.measure(options.precision[0], "fusions", fusions_agree, options) if trained else None
    agreed = agreement(results, options.bound)
    report.content["agreement"] = agreed
    report.write()
    print("agreement:", agreed)
    if fused is not None:
        print("fusions:", {k: v for k, v in fused.items() if k != "losses"})
    failed = any("error" in found for result in results.values() for found in result.values())
    judged = [verdict.get("agrees", False) for verdict in (agreed, fused) if verdict is not None]
    return 1 if failed or not all(judged) else 0


if __name__ == "__main__":
    sys.exit(main())
