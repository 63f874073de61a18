"""Measures the time that training loses to a checkpoint, with a blocking save and with a save in the background.

Both save the same RewardModel with Adam's state to the same disk, in turn. The cost of a background save is the copy,
the completion, and the slowdown of the steps in between.
"""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from nemo_advrm.models.reward_model import RewardModel

MOST_STEPS = 10_000


@dataclass(frozen=True)
class Stall:
    """Cost of one save in the background.

    Attributes:
        copy: seconds until training continues.
        slower: additional seconds of the steps during the write.
        complete: seconds of completion, at the step that completes the save.
        steps: number of steps during the write.
    """

    copy: float
    slower: float
    complete: float
    steps: int

    @property
    def total(self) -> float:
        return self.copy + self.slower + self.complete


class Training:
    """Trains a reward model on random pairs."""

    def __init__(self, layers: int, hidden: int, rows: int) -> None:
        import numpy as np
        from common import EOS_ID, PAD_ID, Llama, our_config, ragged_lengths, ragged_sequences, start_runtime

        from nemo_advrm.data.encoding import EncodedPair
        from nemo_advrm.models.reward_model import RewardModel

        start_runtime()
        shape = Llama(layers=layers, hidden=hidden, ffn=3 * hidden, vocab=8192)
        cfg = our_config(shape)
        cfg.trainer.max_steps, cfg.model.global_batch_size = MOST_STEPS, rows
        rng = np.random.default_rng(0)
        lengths = ragged_lengths(8 * rows, rng, shape.context)
        sides = [ragged_sequences(lengths[:, side], rng, shape.vocab) for side in (0, 1)]
        pairs = [EncodedPair(c, r, 0, None, 1.0, "") for c, r in zip(*sides, strict=True)]
        tokenizer: Any = SimpleNamespace(
            vocab_size=shape.vocab, pad_id=PAD_ID, eos_id=EOS_ID, fingerprint="random tokens"
        )
        self.module: RewardModel = RewardModel(cfg, tokenizer, pairs, [])
        self._batch = next(self.module.steps(0))
        self._step = 0

    def step(self) -> float:
        """Run one step, always on the same rows, and return its seconds."""
        started = time.perf_counter()
        self.module.train_on(self._batch, self._step)
        self._step += 1
        return time.perf_counter() - started


def wait_for(training: Training, path: Path) -> float:
    from nemo_advrm.training.training_state import TrainingSave

    started = time.perf_counter()
    TrainingSave(path, training.module, {}, in_background=False).finish()
    return time.perf_counter() - started


def in_background(training: Training, path: Path, step_seconds: float) -> Stall:
    from nemo_advrm.training.training_state import TrainingSave

    started = time.perf_counter()
    saving = TrainingSave(path, training.module, {}, in_background=True)
    copy = time.perf_counter() - started
    during = []
    while not saving.written_everywhere():
        during.append(training.step())
    started = time.perf_counter()
    saving.finish()
    slower = sum(during) - len(during) * step_seconds
    return Stall(copy, slower, time.perf_counter() - started, len(during))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--rows", type=int, default=4, help="pairs per step")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--directory", type=Path, default=None, help="where to save (default: the temporary directory)")
    args = parser.parse_args()
    os.environ.update(OMP_NUM_THREADS="1", MKL_NUM_THREADS="1")
    import torch
    from common import describe_machine

    torch.set_num_threads(1)
    describe_machine()
    training = Training(args.layers, args.hidden, args.rows)
    home = Path(tempfile.mkdtemp(prefix="bench_save_", dir=args.directory))
    waited, stalls = [], []
    try:
        training.step()
        for repeat in range(args.repeats + 1):
            step_seconds = statistics.median(training.step() for _ in range(5))
            waiting = wait_for(training, home / "waiting")
            background = in_background(training, home / "background", step_seconds)
            if repeat:  # the first save also creates directories and allocates memory
                waited.append(waiting)
                stalls.append(background)
        size = sum(p.stat().st_size for p in (home / "waiting").rglob("*") if p.is_file())
    finally:
        shutil.rmtree(home, ignore_errors=True)
    print(f"{size / 1e6:.0f} MB a checkpoint, {step_seconds:.2f} s a step, {args.repeats} repeats; medians (range):")
    _row("waiting", waited)
    _row("in the background", [stall.total for stall in stalls])
    for name in ("copy", "slower", "complete"):
        _row(f"  {name}", [getattr(stall, name) for stall in stalls])
    print(f"  steps during a write: {statistics.median(stall.steps for stall in stalls):.0f}")


def _row(name: str, seconds: list[float]) -> None:
    print(f"  {name:20} {statistics.median(seconds):8.3f} s  ({min(seconds):.3f} to {max(seconds):.3f})")


if __name__ == "__main__":
    main()
