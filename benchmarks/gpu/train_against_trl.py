"""Compares reward-model training with TRL's RewardTrainer on one GPU: ragged rows, and rows that fill the context.

Llama 3.2 1B's shape, bf16 (TRL: bf16 autocast over fp32 weights, its default), the same weights, batches and order.
Figures: tokens/s of both, their ratio, MFU, and peak memory. The sides are those of ``benchmarks/train_rm.py``.

    python benchmarks/gpu/train_against_trl.py --out train.jsonl
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from measure import Run, Task, parser
from shapes import ONE_B, TINY, flops_per_token
from train_rm import Options, batches, ours, peer


def options(run: Run, full_rows: bool, pairs: int, steps: int, micro_tokens: int) -> Options:
    small = run.rehearsal
    repeats = run.repeats
    batch = 4 if small else pairs
    return Options(
        pairs=batch * 8,
        global_batch=batch,
        steps=1 if small else steps,
        repeats=repeats,
        peer_batch=2 if small else 8,
        peer_checkpointing=False,
        shape=TINY if small else ONE_B,
        full_rows=full_rows,
        unit="tokens",
        accelerator=run.accelerator,
        learning_rate=1e-5,
        micro_tokens=micro_tokens,
        untimed=0 if small else 1,  # the allocator asks for memory again after the other side had it
    )


def task(name: str, chosen: Options) -> Task:
    lengths = [len(row) for batch in batches(chosen) for pair in batch for row in pair]
    bound = 1e-3 if chosen.accelerator == "cpu" else 0.02  # of the losses of the first two steps
    return Task(name, chosen, "tokens", flops_per_token(chosen.shape, lengths, passes=3), bound)


def main() -> int:
    made = parser(__doc__, seconds=270, repeats=4)
    made.add_argument("--pairs", type=int, default=32, help="pairs a step of ragged rows (full rows: half as many)")
    made.add_argument("--steps", type=int, default=4, help="steps of a repeat")
    made.add_argument("--micro-tokens", type=int, default=16384, help="our model.micro_batch_tokens")
    chosen = made.parse_args()
    run = Run(__file__, chosen)
    ragged, full = (
        task(name, options(run, name == "train_full", pairs, chosen.steps, chosen.micro_tokens))
        for name, pairs in (("train_ragged", chosen.pairs), ("train_full", chosen.pairs // 2))
    )
    results = run.take_turns({"ours": ours, "TRL": peer}, [ragged, full], needs={"TRL": "trl"})
    for each in (ragged, full):
        run.ratio(f"{each.name}_against_trl", results, each.name, "ours", "TRL")
        run.utilization(f"{each.name}_mfu", results, each, "ours")
    return run.end()


if __name__ == "__main__":
    sys.exit(main())
