"""The command ``select``: selects adversarial samples of an attack and writes them as preference pairs."""

from __future__ import annotations

from pathlib import Path

from nemo_advrm import locks
from nemo_advrm.attacks.attack_summary import check_samples, has_summary
from nemo_advrm.attacks.pair_selection import dropped, found_lines, select_round
from nemo_advrm.config.schema import Config
from nemo_advrm.errors import ConfigError


def main(cfg: Config) -> int:
    """Selects from the attack in ``run_dir`` (``attack/samples.jsonl`` and ``reference.jsonl``)."""
    directory = Path(cfg.run_dir)
    samples = directory / "attack" / "samples.jsonl"
    if not samples.exists():
        raise ConfigError(f"run_dir={cfg.run_dir}: no attack/samples.jsonl there; run nemo-advrm attack first")
    locks.acquire(directory)
    if has_summary(directory / "attack"):
        check_samples(directory / "attack")
    counts = select_round(cfg, directory, 0, cfg.seed)
    print(f"{counts['selected']} pairs: {directory / 'pairs.jsonl'}  ({dropped(counts)})")
    print(*found_lines(counts), sep="\n")
    return 0
