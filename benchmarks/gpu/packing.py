"""Compares packed and padded rows on one GPU: agreement, and speed of training and scoring on ragged data.

    python benchmarks/gpu/packing.py --out packing.json

Both start from the same random weights and read the same pairs and sequences, whose lengths are drawn as in HH-RLHF
(mean 180 tokens, at most ``--length``). They agree when the mean losses of every ten steps differ by at most
``--bound``, and scores by at most ``--score-bound``. Padded microbatches are cut by their measured cost. The script
writes JSON and exits with 1 when they differ. ``--device cpu --size tiny --precision fp32`` runs it on a CPU.
"""

from __future__ import annotations

import argparse
import gc
import json
import random
import sys
import time
from pathlib import Path
from typing import Any

import torch
from train_fp8 import FIRST, SIZES, TOKENIZER, TRAINED, machine, utilization, windows

from nemo_advrm import files
from nemo_advrm.config.schema import Config
from nemo_advrm.data.encoding import EncodedPair
from nemo_advrm.engine import runtime
from nemo_advrm.engine.builders import build_reward_model
from nemo_advrm.engine.scoring import score_sequences
from nemo_advrm.engine.throughput import gpu_peak, training_flops_per_token
from nemo_advrm.logging_setup import quiet_libraries
from nemo_advrm.models.reward_model import RewardModel

LAYOUTS = ("never", "always")


def configuration(options: argparse.Namespace, packing: str) -> Config:
    layers, hidden, ffn, heads, groups, vocabulary = SIZES[options.size]
    cfg = Config()
    cfg.trainer.max_steps, cfg.trainer.accelerator = options.steps, options.device
    cfg.precision.name = options.precision
    model = cfg.model
    model.num_layers, model.hidden_size, model.ffn_hidden_size = layers, hidden, ffn
    model.num_attention_heads, model.num_query_groups, model.vocab_size = heads, groups, vocabulary
    model.share_embeddings_and_output_weights = False
    model.encoder_seq_length, model.global_batch_size = options.length, options.batch
    model.micro_batch_size, model.micro_batch_tokens = options.batch, options.tokens
    model.sequence_packing = packing
    model.use_distributed_optimizer = True
    model.optim.lr = 1e-5
    model.optim.sched.name = "constant"
    return cfg


def lengths(options: argparse.Namespace, draw: random.Random) -> tuple[int, int]:
    """Tokens of two answers to one prompt, log-correlated by .85."""
    shared = draw.gauss(0, 0.85**0.5)
    sides = (4.924 + 0.734 * (shared + draw.gauss(0, 0.15**0.5)) for _ in range(2))
    first, second = (min(options.length, max(8, int(2.718281828**side))) for side in sides)
    return first, second


def pairs(options: argparse.Namespace) -> list[EncodedPair]:
    draw = random.Random(0)
    rows = []
    for i in range(options.batch * options.steps):
        chosen, rejected = (
            [*(draw.randrange(FIRST, 60) for _ in range(length - 1)), TOKENIZER.eos_id]
            for length in lengths(options, draw)
        )
        rows.append(EncodedPair(chosen, rejected, 1, None, 1.0, f"row {i}"))
    return rows


def clock() -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def train(options: argparse.Namespace, packing: str) -> dict[str, Any]:
    cfg = configuration(options, packing)
    module = RewardModel(cfg, TOKENIZER, pairs(options), [])
    losses, rates, microbatches = [], [], []
    for step, batch in enumerate(module.steps(0)):
        microbatches.append(len(module._microbatches(batch)))
        started = clock()
        metrics = module.train_on(batch, step)
        rates.append(metrics["tokens"] / (clock() - started))
        losses.append(metrics["train/loss"])
    cost = module.model.microbatch_cost
    module.release()
    rate = sorted(rates)[len(rates) // 2]  # the median leaves out the first steps, which choose kernels
    return {
        "losses": losses,
        "tokens_per_second": rate,
        "mfu": utilization(rate * training_flops_per_token(cfg.model), 1.0, gpu_peak(options.precision)),
        "microbatches_per_step": sum(microbatches) / len(microbatches),
        "microbatch_cost": cost,
        "peak_gib": torch.cuda.max_memory_allocated() / 2**30 if options.device == "gpu" else None,
    }


def score(options: argparse.Namespace, packing: str) -> dict[str, Any]:
    model = build_reward_model(configuration(options, packing), TOKENIZER, "", 0, trainable=False)
    rows = [side for pair in pairs(options)[: options.scored // 2] for side in (pair.chosen, pair.rejected)]
    seconds = []
    for _ in range(3):
        started = clock()
        scores = score_sequences(model, rows, TOKENIZER.pad_id)
        seconds.append(clock() - started)
    return {"scores": scores.tolist(), "sequences_per_second": len(rows) / min(seconds)}


def largest(one: list[float], other: list[float]) -> float:
    return max(abs(a - b) for a, b in zip(one, other, strict=True))


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("gpu", "cpu"), default="gpu")
    parser.add_argument("--size", choices=TRAINED, default="1b")
    parser.add_argument("--precision", default="bf16")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--batch", type=int, default=32, help="pairs per step")
    parser.add_argument("--tokens", type=int, default=16384, help="model.micro_batch_tokens")
    parser.add_argument("--length", type=int, default=1024, help="longest sequence")
    parser.add_argument("--scored", type=int, default=256, help="sequences to score")
    parser.add_argument("--bound", type=float, default=0.02)
    parser.add_argument("--score-bound", type=float, default=0.05)
    parser.add_argument("--out", type=Path, default=Path("packing.json"))
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    quiet_libraries()
    runtime.start(runtime.Layout(), options.device)
    content: dict[str, Any] = {
        "machine": machine(options.device),
        "options": {k: str(v) if isinstance(v, Path) else v for k, v in vars(options).items()},
        "results": {},
    }
    for packing in LAYOUTS:
        if options.device == "gpu":
            torch.cuda.reset_peak_memory_stats()
        found = content["results"][packing] = {"train": train(options, packing), "score": score(options, packing)}
        gc.collect()
        torch.cuda.empty_cache()
        files.write_text(options.out, json.dumps(content, indent=1) + "\n")
        speed = found["train"]["tokens_per_second"], found["score"]["sequences_per_second"]
        print(f"{packing}: {speed[0]:,.0f} tokens/s trained, {speed[1]:,.0f} sequences/s scored", flush=True)
    padded, packed = (content["results"][packing] for packing in LAYOUTS)
    gaps = {
        "losses": largest(windows(padded["train"]["losses"]), windows(packed["train"]["losses"])),
        "scores": largest(padded["score"]["scores"], packed["score"]["scores"]),
    }
    agrees = gaps["losses"] <= options.bound and gaps["scores"] <= options.score_bound
    content["agreement"] = {**gaps, "agrees": agrees}
    files.write_text(options.out, json.dumps(content, indent=1) + "\n")
    print("agreement:", content["agreement"])
    return 0 if agrees else 1


if __name__ == "__main__":
    sys.exit(main())
