"""Compares FP8 with BF16 at the shape of Llama 3.1 8B's layers on one GPU: training and scoring of full rows.

Every format is a side of its own, with the same random weights and data. FP8 needs Transformer Engine; without it only
BF16 is measured, whose MFU is a figure of its own. ``train_fp8.py`` compares whole loss curves.

    python benchmarks/gpu/fp8.py --out fp8.jsonl
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import numpy as np
from common import EOS_ID, PAD_ID, Llama, our_config, our_facts, ragged_sequences, start_runtime
from measure import Results, Run, Task, parser
from shapes import EIGHT_B, TINY, flops_per_token
from sides import Side, give_back_memory

if TYPE_CHECKING:
    from nemo_advrm.config.schema import Config

CHECKED_STEPS = 2
FORMATS = ("bf16", "fp8_delayed", "fp8_current", "fp8_blockwise")


@dataclass(frozen=True)
class Options:
    work: str  # train or score
    shape: Llama
    rows: int  # pairs a step, or sequences a repeat
    micro_rows: int
    steps: int
    accelerator: str


def configuration(options: Options, precision: str) -> Config:
    cfg = our_config(options.shape, options.accelerator)
    cfg.precision.name = precision
    cfg.model.use_distributed_optimizer = options.accelerator == "gpu"
    cfg.model.global_batch_size, cfg.model.micro_batch_size = options.rows, options.micro_rows
    cfg.model.micro_batch_tokens = 2 * options.micro_rows * options.shape.context
    cfg.model.optim.lr, cfg.model.optim.sched.name = 1e-5, "constant"
    cfg.trainer.max_steps = 10_000
    return cfg


def rows(options: Options, count: int, seed: int) -> list[list[int]]:
    lengths = np.full(count, options.shape.context)
    return ragged_sequences(lengths, np.random.default_rng(seed), options.shape.vocab)


def side(options: Options, precision: str) -> Side:
    start_runtime(options.accelerator)
    return (_training if options.work == "train" else _scoring)(options, configuration(options, precision))


def _training(options: Options, cfg: Config) -> Side:
    from nemo_advrm.data.encoding import EncodedPair
    from nemo_advrm.models.reward_model import RewardModel

    both = zip(rows(options, options.rows, 0), rows(options, options.rows, 1), strict=True)
    pairs = [EncodedPair(chosen, rejected, 0, None, 1.0, "") for chosen, rejected in both]
    tokenizer = SimpleNamespace(vocab_size=options.shape.vocab, pad_id=PAD_ID, eos_id=EOS_ID)
    module = RewardModel(cfg, tokenizer, pairs, [])
    losses: Iterator[float] = (module.train_on(batch, step)["train/loss"] for step, batch in enumerate(module.steps(0)))

    def work() -> float:
        for _ in range(options.steps):
            next(losses)
        return 2.0 * options.steps * options.rows * options.shape.context

    def check() -> np.ndarray:
        return np.array([next(losses) for _ in range(CHECKED_STEPS)])

    # the untimed step asks the allocator for memory again, which the other formats had meanwhile
    return Side(check, work, None, lambda: next(losses), give_back_memory, module.release, our_facts(cfg))


def _scoring(options: Options, cfg: Config) -> Side:
    from nemo_advrm.engine.model import build_model
    from nemo_advrm.engine.scoring import score_sequences

    model = build_model(cfg.model, cfg.precision, "reward", options.shape.vocab, seed=0, trainable=False)
    sequences = rows(options, options.rows, 0)

    def work() -> float:
        score_sequences(model, sequences, PAD_ID)
        return float(options.rows * options.shape.context)

    return Side(lambda: score_sequences(model, sequences, PAD_ID).numpy(), work, facts=our_facts(cfg))


def best(run: Run, name: str, results: Results, task: str, base: str) -> None:
    """The figures of every other format over ``base``, and the best of them under ``name``."""
    for precision in results.get(task, {}):
        if precision != base:
            run.ratio(f"{name}_{precision}", results, task, precision, base)
    rates: dict[str, Any] = {side: np.median(found.rates) for side, found in results.get(task, {}).items()}
    others = [precision for precision in rates if precision != base]
    if base in rates and others:
        run.ratio(name, results, task, max(others, key=rates.__getitem__), base)


def main() -> int:
    made = parser(__doc__, seconds=150, repeats=3)
    made.add_argument("--formats", nargs="+", default=list(FORMATS), help="the first is the base; 80 GB hold two")
    made.add_argument("--steps", type=int, default=4, help="steps of a repeat of training")
    chosen = made.parse_args()
    run = Run(__file__, chosen)
    # many CPUs have no bf16: the rehearsal compares fp32 with itself
    formats = {"fp32": "fp32", "fp32 again": "fp32"} if run.rehearsal else {name: name for name in chosen.formats}
    base = next(iter(formats))
    shape = TINY if run.rehearsal else EIGHT_B
    sizes = {"train": (4, 2) if run.rehearsal else (16, 8), "score": (4, 4) if run.rehearsal else (64, 16)}
    tasks = [
        Task(
            f"fp8_{work}",
            Options(work, shape, *sizes[work], 1 if run.rehearsal else chosen.steps, run.accelerator),
            "tokens",
            flops_per_token(shape, [shape.context], passes=3 if work == "train" else 1),
            0.02 if work == "train" else None,  # of the losses of the first two steps
        )
        for work in sizes
    ]
    sides = {name: functools.partial(side, precision=precision) for name, precision in formats.items()}
    needs = {name: "transformer_engine" for name in formats if name.startswith("fp8")}
    results = run.take_turns(sides, tasks, needs)
    for task in tasks:
        best(run, f"{task.name}_ratio", results, task.name, base)
        run.utilization(f"{task.name}_mfu", results, task, base)
    return run.end()


if __name__ == "__main__":
    sys.exit(main())
