"""Measures the start of a training on a large file of pairs: without a cache, with an empty one, and with a filled one.

Each start is a process of its own, as a rank is one. It prints the seconds until the pairs are ready to train on
(reading, checking and tokenising, or opening what is stored), without imports; the peak of its resident memory, and how
much of that is its own: pages of a mapped file are shared by all ranks of a node, and given back when memory is short.
The pairs are random words, as long as asked for, in a file that this script writes, and so is a tokenizer with a token
for each word. The batches of a few steps have to be the same in all three.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import multiprocessing
import random
import resource
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

GIB = 2**30
_DRAW = random.Random(1)
WORDS = ["".join(_DRAW.choices("abcdefghijklmnopqrstuvwxyz", k=_DRAW.randint(2, 8))) for _ in range(5000)]


def write_pairs(path: Path, count: int, words: int) -> None:
    """Pairs of about ``words`` words: a prompt and two answers."""
    draw, vocabulary = random.Random(0), WORDS

    def text(least: int) -> str:
        return " ".join(draw.choices(vocabulary, k=draw.randint(least, 2 * least)))

    part = max(1, words // 5)
    with open(path, "w") as file:
        for i in range(count):
            row = {"prompt": f"{text(part)} {i}", "chosen": text(part), "rejected": text(part)}
            file.write(json.dumps(row) + "\n")


def write_tokenizer(directory: Path) -> None:
    """A Hugging Face tokenizer with a token for each word and each number of one digit."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    names = dict.fromkeys(["<unk>", "</s>", *map(str, range(10)), *WORDS])
    tokenizer = Tokenizer(models.WordLevel({name: i for i, name in enumerate(names)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Whitespace(), pre_tokenizers.Digits(individual_digits=True)]
    )
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", eos_token="</s>").save_pretrained(directory)


def memory(field: str) -> int:
    """Bytes of a field of /proc/self/status."""
    status = Path("/proc/self/status").read_text()
    return next(int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith(f"{field}:"))


def start(settings: list[str], results: Any) -> None:
    """Put (seconds, bytes before, peak, own bytes at the end, tokens, digest of batches) of one start."""
    from nemo_advrm.config import load_config
    from nemo_advrm.data.batching import BatchSchedule
    from nemo_advrm.data.stored_rows import rows_at
    from nemo_advrm.data.tokenizers import build_tokenizer
    from nemo_advrm.training.prepared_data import preference_data

    cfg = load_config(settings, "train_rm")
    tokenizer = build_tokenizer(cfg.model.tokenizer)
    before, started = memory("VmRSS"), time.perf_counter()
    data = preference_data(cfg, tokenizer)
    seconds = time.perf_counter() - started
    order = BatchSchedule(len(data.train), 64, 0)
    batches = [rows_at(data.train, order.rows_for_step(step)) for step in range(20)]
    tokens = sum(pair.token_count for batch in batches for pair in batch) / (20 * 64) * len(data.train)
    digest = hashlib.sha256(repr([(p.source, p.chosen, p.rejected) for b in batches for p in b]).encode()).hexdigest()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    results.put((seconds, before, peak, memory("RssAnon"), tokens, digest))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pairs", type=int, default=1_000_000)
    parser.add_argument("--words", type=int, default=40, help="words of a row, about")
    parser.add_argument("--tokenizer", default="", help="as model.tokenizer; empty: one of words")
    parser.add_argument("--workers", type=int, default=0, help="as data.num_workers")
    parser.add_argument("--directory", default="", help="of the file and the cache; empty: a temporary one")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.directory or None) as home:
        path = Path(home) / "pairs.jsonl"
        write_pairs(path, options.pairs, options.words)
        tokenizer = options.tokenizer
        if not tokenizer:
            write_tokenizer(Path(home) / "tokenizer")
            tokenizer = f"hf:{home}/tokenizer"
        print(f"{options.pairs} pairs, {path.stat().st_size / GIB:.3f} GiB of text", flush=True)
        common = ["model=tiny", f"model.tokenizer={tokenizer}", "model.encoder_seq_length=4096"]
        common += [f"data.train_path={path}", "data.validation_fraction=0.001", f"data.num_workers={options.workers}"]
        starts = (
            ("no cache", ["data.cache_dir=null"]),
            ("first start", [f"data.cache_dir={home}/cache"]),
            ("second start", [f"data.cache_dir={home}/cache"]),
        )
        context = multiprocessing.get_context("spawn")
        digests = set()
        for name, own in starts:
            results = context.Queue()
            process = context.Process(target=start, args=([*common, *own], results))
            process.start()
            seconds, before, peak, anonymous, tokens, digest = results.get(timeout=7200)
            process.join()
            digests.add(digest)
            print(
                f"{name}: {seconds:.1f} s; memory {before / GIB:.2f} GiB before, peak {peak / GIB:.2f}, own at the end "
                f"{anonymous / GIB:.2f} ({tokens / 1e6:.0f} M tokens)",
                flush=True,
            )
        stored = sum(file.stat().st_size for file in (Path(home) / "cache").rglob("*.arrow"))
        print(f"cache: {stored / GIB:.2f} GiB; the batches are {'the same' if len(digests) == 1 else 'DIFFERENT'}")
    return len(digests) != 1


if __name__ == "__main__":
    sys.exit(main())
