"""Measures what offloading costs on one GPU: frozen models that wait in CPU memory, and the optimizer's state.

Three frozen reward models of Llama 3.2 1B's shape score the same sequences, with ``model.offload_reference`` and
without: sequences/s, peak memory, and their scores must be equal. Then the optimizer's state of one trained model goes
to CPU memory and back, as ``model.offload_optimizer_while_generating`` does around the responses of a step.

    python benchmarks/gpu/offload.py --out offload.jsonl
"""

from __future__ import annotations

import functools
import statistics
import sys
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import numpy as np
from common import (
    EOS_ID,
    PAD_ID,
    Llama,
    our_config,
    our_facts,
    ragged_lengths,
    ragged_sequences,
    start_runtime,
)
from measure import Run, Task, parser
from shapes import ONE_B, TINY
from sides import Side


@dataclass(frozen=True)
class Options:
    work: str  # score or optimizer
    shape: Llama
    members: int
    sequences: int
    accelerator: str


def data(options: Options) -> list[list[int]]:
    rng = np.random.default_rng(0)
    lengths = ragged_lengths(options.sequences, rng, options.shape.context)[:, 0]
    return ragged_sequences(lengths, rng, options.shape.vocab)


def side(options: Options, offloaded: bool) -> Side:
    start_runtime(options.accelerator)
    return (_members if options.work == "score" else _optimizer)(options, offloaded)


def _members(options: Options, offloaded: bool) -> Side:
    import torch

    from nemo_advrm.engine.model import build_model
    from nemo_advrm.engine.scoring import score_sequences
    from nemo_advrm.rewards.base import in_turn

    cfg = our_config(options.shape, options.accelerator)
    cfg.model.offload_reference = offloaded
    models = [
        build_model(cfg.model, cfg.precision, "reward", options.shape.vocab, seed=seed, trainable=False)
        for seed in range(options.members)
    ]
    sequences = data(options)

    def scores() -> np.ndarray:
        # as members of an ensemble: the weights of the next one come while this one scores
        return torch.stack([score_sequences(model, sequences, PAD_ID) for model in in_turn(models)]).numpy()

    def work() -> float:
        return float(scores().size)

    return Side(scores, work, facts=our_facts(cfg))


def _optimizer(options: Options, offloaded: bool) -> Side:
    """A repeat takes the state away and back; units are GB of parameters' fp32 copies and moments, both ways."""
    from nemo_advrm.data.encoding import EncodedPair
    from nemo_advrm.models.reward_model import RewardModel

    cfg = our_config(options.shape, options.accelerator)
    cfg.model.use_distributed_optimizer = True
    cfg.model.offload_optimizer_while_generating = offloaded
    cfg.model.global_batch_size, cfg.trainer.max_steps = 1, 1000
    tokens = data(options)[0]
    tokenizer = SimpleNamespace(vocab_size=options.shape.vocab, pad_id=PAD_ID, eos_id=EOS_ID)
    pair = EncodedPair(tokens, tokens[::-1], 0, None, 1.0, "")
    module = RewardModel(cfg, tokenizer, [pair], [])
    steps = enumerate(module.steps(0))
    count = sum(p.numel() for part in module.model.parts for p in part.parameters())
    state = (12 if cfg.precision.name != "fp32" else 8) * count

    def train() -> float:
        step, batch = next(steps)
        return module.train_on(batch, step)["train/loss"]

    def check() -> np.ndarray:
        """Losses of steps between which the state went away and came back."""
        losses = [train()]
        with module.optimizer.offloaded():
            pass
        return np.array([*losses, train()])

    def work() -> float:
        with module.optimizer.offloaded():
            pass
        return 2 * state / 1e9 if offloaded else 0.0

    return Side(check, work, end=module.release, facts=our_facts(cfg))


def main() -> int:
    made = parser(__doc__, seconds=100, repeats=4)
    made.add_argument("--members", type=int, default=3)
    made.add_argument("--sequences", type=int, default=256)
    chosen = made.parse_args()
    run = Run(__file__, chosen)
    shape = TINY if run.rehearsal else ONE_B
    sequences = 4 if run.rehearsal else chosen.sequences
    score = Options("score", shape, chosen.members, sequences, run.accelerator)
    optimizer = Options("optimizer", shape, chosen.members, sequences, run.accelerator)
    tasks = [
        Task("offload_score", score, "sequences", bound=1e-6 if run.rehearsal else 1e-2),
        Task("offload_optimizer", optimizer, "GB", bound=1e-6 if run.rehearsal else 1e-2),
    ]
    sides = {"kept": functools.partial(side, offloaded=False), "offloaded": functools.partial(side, offloaded=True)}
    results = run.take_turns(sides, tasks)
    run.ratio("offload_score_ratio", results, "offload_score", "offloaded", "kept")
    moved = results.get("offload_optimizer", {}).get("offloaded")
    if moved:
        run.figure("offload_gb_per_second", statistics.median(moved.rates), of="optimizer state, both ways")
    return run.end()


if __name__ == "__main__":
    sys.exit(main())
