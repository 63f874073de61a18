"""Reads and encodes the pairs of a directory with little memory to take: a child process of the tests.

Arguments: megabytes that the process may take beside those that it has after a small training's data; the directory;
where tokens are stored ("null": nowhere). Prints the number of pairs, or that memory was short.
"""

from __future__ import annotations

import resource
import sys
import tempfile
from pathlib import Path

from nemo_advrm.config import load_config
from nemo_advrm.data import token_cache
from nemo_advrm.data.tokenizers import build_tokenizer
from nemo_advrm.training.prepared_data import preference_data


def pairs(directory: str, cache: str) -> int:
    settings = [f"data.train_path={directory}", f"data.cache_dir={cache}", "data.num_workers=1"]
    common = ["model=tiny", "model.tokenizer=byte", "model.encoder_seq_length=4096", "data.validation_fraction=0.01"]
    cfg = load_config([*common, *settings], "train_rm")
    return len(preference_data(cfg, build_tokenizer(cfg.model.tokenizer)).train)


def main() -> None:
    more, directory, cache = sys.argv[1:]
    with tempfile.TemporaryDirectory() as home:  # so that all modules are loaded and all threads started
        small = Path(home) / "small"
        small.mkdir()
        first = next(iter(sorted(Path(directory).iterdir()))).read_text().splitlines()[:200]
        (small / "pairs.jsonl").write_text("\n".join(first) + "\n")
        least, token_cache.LEAST_BYTES = token_cache.LEAST_BYTES, 1
        pairs(str(small), f"{home}/cache")
        token_cache.LEAST_BYTES = least
    status = Path("/proc/self/status").read_text()
    held = next(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmData:")) * 1024
    limit = held + int(more) * 2**20
    resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
    try:
        print(pairs(directory, cache))
    except MemoryError:
        print("memory was short")


if __name__ == "__main__":
    main()
