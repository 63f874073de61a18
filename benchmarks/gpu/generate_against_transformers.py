"""Compares greedy generation with transformers' generate on one GPU, in tokens/s, with and without CUDA graphs.

Llama 3.2 1B's shape, bf16, 64 prompts of 16 to 192 tokens, 128 new tokens, none of which ends a response. The sides are
those of ``benchmarks/generate.py``. Each must write tokens that a pass of its own without a cache finds nearly the
likeliest, at five places of every response.

    python benchmarks/gpu/generate_against_transformers.py --out generate.jsonl
"""

from __future__ import annotations

import statistics
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from generate import FAR, Options, ours, ours_without_graphs, peer
from measure import Run, Task, parser
from shapes import ONE_B, TINY

SIDES = {"ours": ours, "ours without graphs": ours_without_graphs, "transformers": peer}


def main() -> int:
    made = parser(__doc__, seconds=120, repeats=3)
    made.add_argument("--batch", type=int, default=64, help="prompts")
    made.add_argument("--new-tokens", type=int, default=128)
    chosen = made.parse_args()
    run = Run(__file__, chosen)
    batch, new_tokens, shape = (3, 8, TINY) if run.rehearsal else (chosen.batch, chosen.new_tokens, ONE_B)
    never = (shape.vocab,)  # no id ends a response
    options = Options(batch, new_tokens, never, shape, run.accelerator, exact=False)
    # random weights give 128k nearly equal logits, whose bf16 errors are some hundredths
    task = Task("generate", options, "tokens", bound=1e-3 if run.rehearsal else 0.25)
    results = run.take_turns(SIDES, [task])
    run.ratio("generate_against_transformers", results, "generate", "ours", "transformers")
    run.ratio("generate_graphs_gain", results, "generate", "ours", "ours without graphs")
    for side, result in results["generate"].items():
        ready = result.ready
        seconds = statistics.median(repeat.seconds for repeat in result.repeats)
        step = (seconds - ready.facts["first_token_seconds"]) / (options.new_tokens - 1)
        run.figure("generate_step_ms", 1e3 * step, side=side)
        worst = float(ready.numbers.max())
        run.ok &= worst <= task.bound
        run.figure("generate_behind_the_likeliest", worst, side=side, bound=task.bound, far=worst >= FAR)
        if ready.facts.get("capture_failure"):
            run.error(f"its step could not be captured: {ready.facts['capture_failure']}", side=side)
    return run.end()


if __name__ == "__main__":
    sys.exit(main())
