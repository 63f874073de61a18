"""Compares reward-model scoring with transformers' LlamaForSequenceClassification on one GPU, in sequences/s.

Llama 3.2 1B's shape, bf16, 256 sequences of HH-RLHF's lengths; transformers in batches of 32, in file order and sorted
by length. The sides are those of ``benchmarks/score.py``.

    python benchmarks/gpu/score_against_transformers.py --out score.jsonl
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from measure import Run, Task, parser
from score import Options, data, ours, peer_by_length, peer_in_file_order
from shapes import ONE_B, TINY, flops_per_token

SIDES = {"ours": ours, "transformers by length": peer_by_length, "transformers in file order": peer_in_file_order}


def main() -> int:
    made = parser(__doc__, seconds=120, repeats=5)
    made.add_argument("--sequences", type=int, default=256)
    made.add_argument("--batch", type=int, default=32, help="rows per batch in transformers")
    chosen = made.parse_args()
    run = Run(__file__, chosen)
    shape = TINY if run.rehearsal else ONE_B
    options = Options(8 if run.rehearsal else chosen.sequences, chosen.batch, shape, run.accelerator)
    lengths = [len(sequence) for sequence in data(options)]
    per_sequence = flops_per_token(shape, lengths, passes=1) * sum(lengths) / len(lengths)
    # random heads give scores of about 1; in bf16 those of two implementations differ in the third digit
    task = Task("score", options, "sequences", per_sequence, 1e-3 if run.rehearsal else 0.05)
    results = run.take_turns(SIDES, [task])
    run.ratio("score_against_by_length", results, "score", "ours", "transformers by length")
    run.ratio("score_against_file_order", results, "score", "ours", "transformers in file order")
    run.utilization("score_mfu", results, task, "ours")
    return run.end()


if __name__ == "__main__":
    sys.exit(main())
