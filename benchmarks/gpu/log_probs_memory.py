"""Measures the peak memory of log-probabilities of large vocabularies on one GPU, all logits at once and in chunks.

The sizes are those of the recipe of 8B at TP 2 (128,256 tokens of vocabulary, half of them on a rank), and of a
vocabulary of 256,000 on one rank. A forward and backward pass of the output layer in bf16; the chunks are those of
``model.logits_chunk_size``. The measurement is that of ``benchmarks/log_probs.py``.

    python benchmarks/gpu/log_probs_memory.py --out log_probs.jsonl
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from log_probs import Found, Options, in_process
from measure import Run, parser


def main() -> int:
    chosen = parser(__doc__, seconds=90, repeats=1).parse_args()
    run = Run(__file__, chosen)
    from nemo_advrm.config.schema import ModelConfig

    most = 2**17 if run.rehearsal else ModelConfig().logits_chunk_size
    sizes = {
        "log_probs_128k_tp2": Options(16384, 4096, 128256 // 2, run.accelerator),
        "log_probs_256k": Options(8192, 4096, 256000, run.accelerator),
    }
    if run.rehearsal:
        sizes = {"log_probs_128k_tp2": Options(512, 32, 4096, run.accelerator)}
    for name, options in sizes.items():
        norms = []
        for way, rows in (("at once", 0), ("in chunks", most // options.vocabulary)):
            found = in_process(options, rows, max(1.0, run.left))
            if isinstance(found, Found):
                norms.append(found.norm)
                of_logits = found.taken / options.logits_bytes
                run.figure(f"{name}_{way.replace(' ', '_')}", of_logits, of="fp32 logits", chunk=rows, **vars(found))
            else:  # at once may need more than there is
                run.error(found, task=name, side=way)
        if len(norms) == 2:
            relative = abs(norms[0] - norms[1]) / norms[0]
            agrees = relative <= (1e-4 if run.rehearsal else 1e-2)
            run.ok &= agrees
            run.figure(f"{name}_difference", relative, of="norm of the gradient", agrees=agrees)
    return run.end()


if __name__ == "__main__":
    sys.exit(main())
