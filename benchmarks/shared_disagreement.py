"""Do heads on one trunk disagree enough to find hacks? Compares them with full members on the embedded experiment.

    python benchmarks/shared_disagreement.py [--seeds 10 11 12] [SETTING...]

For each seed it runs ``nemo-advrm pipeline experiment=shared_trunk`` three times on the same data: five heads on one
trunk, five models from one SFT policy, and five models from SFT policies of their own. Run directories are in
runs/shared_trunk; finished ones are not repeated. SETTING is a setting of ``nemo-advrm pipeline``.

For the attack on R_1 before hardening (round 0) and after it (round 1) a line says: the correlation of R_1's scores
with those of the other members on SFT responses, the share of the adversary's responses that are finds (R_1 likes
them, the others do not), the share that gold judges worse than SFT responses, and that of the pairs that were selected.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np

from nemo_advrm.data.sft_scores import SFTScores
from nemo_advrm.report.collect import collect

KINDS = {
    "heads on one trunk": ["ensemble.share=trunk"],
    "models, one SFT policy": ["ensemble.share=none"],
    "models, own SFT policies": ["ensemble.share=none", "ensemble.own_trunk=true"],
}
COLUMNS = ("correlation", "found", "standard", "selected_success")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[10, 11, 12])
    options, settings = parser.parse_known_args()
    found: dict[tuple[str, int], list[dict[str, Any]]] = {}
    for seed in options.seeds:
        for number, (kind, own) in enumerate(KINDS.items()):
            home = Path("runs/shared_trunk") / f"seed_{seed}_{number}"
            words = ["experiment=shared_trunk", "~pipeline.rlhf.hybrid", f"seed={seed}", f"run_dir={home}", *own]
            command = [sys.executable, "-m", "nemo_advrm.cli", "pipeline", *words, *settings]
            if status := subprocess.run(command, stdout=subprocess.DEVNULL, check=False).returncode:
                print(f"seed {seed}, {kind}: the pipeline ended with status {status}", file=sys.stderr)
                return status
            for entry in figures(home):
                found.setdefault((kind, entry["round"]), []).append(entry)
                print(f"seed {seed}  {kind:26} round {entry['round']}  {shown(entry)}", flush=True)
    for (kind, number), entries in found.items():
        means = {name: mean([entry.get(name) for entry in entries]) for name in COLUMNS}
        print(f"mean of {len(entries)}  {kind:26} round {number}  {shown(means)}")
    return 0


def figures(home: Path) -> list[dict[str, Any]]:
    """The figures of each round's attack on R_1."""
    entries = []
    for one in collect(home).rounds:
        scores_PNK = SFTScores.read(home / f"round_{one.number}" / "reference.jsonl").scores_PNK
        scores_NK = (scores_PNK - scores_PNK.mean(1, keepdim=True)).flatten(0, 1).double().numpy()
        rates = next((attack.rates for attack in one.attacks if attack.target == 1), {})
        correlation = float(np.corrcoef(scores_NK.T)[0, 1:].mean())
        found, samples = rates.get("found"), rates.get("samples")
        share = found / samples if found is not None and samples else None  # the last round selects nothing
        entries.append({"round": one.number, "correlation": correlation, **rates, "found": share})
    return entries


def mean(values: list[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None


def shown(entry: dict[str, Any]) -> str:
    values = (entry.get(name) for name in COLUMNS)
    texts = ("-" if value is None else f"{value:.3f}" for value in values)
    return "  ".join(f"{name} {text}" for name, text in zip(COLUMNS, texts, strict=True))


if __name__ == "__main__":
    sys.exit(main())
