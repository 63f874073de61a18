"""Compares the CPU time of a training step of the synthetic experiment: ours under Lightning and a plain PyTorch loop.

The model is ``conf/model/synthetic.yaml`` (3 layers of width 64) on the data of ``experiment=synthetic``. Both sides
run in this process in turn on the same rows. CPU time is measured because it excludes other work on the machine. The
plain loop is minimal: one module, one padded batch, AdamW.

    OMP_NUM_THREADS=1 python benchmarks/step_cost.py
    OMP_NUM_THREADS=1 python benchmarks/step_cost.py --profile rlhf     # where the time goes
"""

from __future__ import annotations

import argparse
import copy
import cProfile
import itertools
import pstats
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import plain_transformer as plain
import torch
from common import describe_machine
from lightning.pytorch import Callback

from nemo_advrm.config import for_stage, load_config
from nemo_advrm.config.schema import Config
from nemo_advrm.data.encoding import EncodedPair
from nemo_advrm.data.tokenizers import build_tokenizer
from nemo_advrm.engine import checkpoint, runtime
from nemo_advrm.logging_setup import quiet_libraries
from nemo_advrm.models.language_model import SupervisedModel
from nemo_advrm.models.policy import PolicyModel
from nemo_advrm.models.reward_model import RewardModel
from nemo_advrm.rewards.ensemble import UncertaintyReward
from nemo_advrm.rewards.sources import build_gold, load_members
from nemo_advrm.rollouts.run_prompts import encode_prompts, rlhf_prompts
from nemo_advrm.rollouts.types import Prompt
from nemo_advrm.training.callbacks.rollout_records import OveroptimizationTracker
from nemo_advrm.training.run_training import fit
from nemo_advrm.training.sft_training import encode_responses, sft_rows

KINDS = ("sft", "train_rm", "rlhf")
_SFT_STEPS = 100  # SFT steps of the initial RL policy, after which it ends its responses
_FIRST = 3  # warm-up steps that are not counted


class Clock(Callback):
    """Measures CPU seconds of each step, including everything between two steps."""

    def __init__(self) -> None:
        self.stamps: list[float] = []

    def on_train_batch_start(self, *_: Any) -> None:
        self.stamps.append(time.process_time())

    def seconds(self) -> float:
        """Return the median seconds of a step without the warm-up steps."""
        steps = [b - a for a, b in itertools.pairwise(self.stamps)]
        return statistics.median(steps[_FIRST:])


class Work:
    """Data and models of the experiment, small enough to create in a few seconds."""

    def __init__(self, directory: Path, steps: int) -> None:
        cfg = load_config(["experiment=synthetic", "synthetic.sft_rows=2000", "synthetic.prompts=500"])
        self.cfg, self.directory, self.steps = cfg, directory, steps
        self.tokenizer = build_tokenizer(cfg.model.tokenizer)
        self.rows = encode_responses(self._stage("sft"), self.tokenizer, sft_rows(self._stage("sft")))
        # pair responses of different prompts: labels do not affect the time
        self.pairs = [
            EncodedPair(a.tokens, b.tokens, 0, None, 1.0, "") for a, b in zip(self.rows, self.rows[1:], strict=False)
        ]
        self.policy = str(directory / "policy")
        self.members = [str(directory / f"member_{i}") for i in (1, 2)]
        self.prompts: list[Prompt] = []
        self.plain_policy: plain.Transformer | None = None

    def prepare(self) -> None:
        """Train a policy on the synthetic language by SFT, and two reward models."""
        cfg = self._stage("sft", _SFT_STEPS)
        module = SupervisedModel(cfg, self.tokenizer, self.rows, seed=0)
        self._fit(module, cfg)
        checkpoint.save(Path(self.policy), module.model, meta=self._meta())
        for i, path in enumerate(self.members):
            member = RewardModel(self._stage("train_rm"), self.tokenizer, self.pairs, [], seed=i)
            checkpoint.save(Path(path), member.model, meta=self._meta())
        self.prompts = encode_prompts(rlhf_prompts(cfg), self.tokenizer, self._stage("rlhf"))

    def _meta(self) -> dict[str, Any]:
        return {"tokenizer": self.tokenizer.fingerprint, "tokenizer_spec": self.cfg.model.tokenizer}

    def _stage(self, name: str, steps: int = 0) -> Config:
        cfg = for_stage(self.cfg, name)
        cfg.trainer.max_steps = cfg.rl.max_steps = steps or self.steps + _FIRST + 1
        return cfg

    def _fit(self, module: Any, cfg: Config, callbacks: tuple[Callback, ...] = ()) -> float:
        clock = Clock()
        with tempfile.TemporaryDirectory(dir=self.directory) as home:
            fit(module, cfg, Path(home), "step cost", [clock, *callbacks])
        return clock.seconds()

    def ours(self, kind: str) -> float:
        """Return CPU seconds of one of our steps."""
        cfg = self._stage(kind)
        if kind == "sft":
            return self._fit(SupervisedModel(cfg, self.tokenizer, self.rows, self.policy), cfg)
        if kind == "train_rm":
            return self._fit(RewardModel(cfg, self.tokenizer, self.pairs, [], self.policy), cfg)
        reward = UncertaintyReward(load_members(cfg, self.members, self.tokenizer))
        module = PolicyModel(cfg, self.tokenizer, self.prompts, reward, self.policy)
        gold = build_gold(cfg)
        tracker = OveroptimizationTracker(self.directory / "samples.jsonl", gold, 1, cfg.rl.log_samples)
        return self._fit(module, cfg, (tracker,))

    def plain(self, kind: str) -> float:
        """Return CPU seconds of a step of the plain loop."""
        cfg = self._stage(kind)
        step = self._plain_step(kind, cfg)
        stamps = [time.process_time()]
        for number in range(self.steps + _FIRST):
            step(number)
            stamps.append(time.process_time())
        return statistics.median([b - a for a, b in itertools.pairwise(stamps)][_FIRST:])

    def _plain_step(self, kind: str, cfg: Config) -> Callable[[int], None]:
        size = cfg.model.global_batch_size
        vocabulary = self.tokenizer.vocab_size
        rows = [(row.tokens, row.prompt_length) for row in self.rows]
        if kind == "sft":
            sft = plain.SftLoop(plain.Transformer(cfg, vocabulary, vocabulary), cfg)
            return lambda step: sft.step(_batch(rows, size, step))
        if kind == "train_rm":
            trained = plain.RewardLoop(plain.Transformer(cfg, vocabulary, 1), cfg)
            pairs = [(pair.chosen, pair.rejected) for pair in self.pairs]
            return lambda step: trained.step(_batch(pairs, size, step))
        if self.plain_policy is None:
            first = plain.SftLoop(plain.Transformer(cfg, vocabulary, vocabulary), self._stage("sft"))
            for step in range(_SFT_STEPS):
                first.step(_batch(rows, first.cfg.model.global_batch_size, step))
            self.plain_policy = first.model
        members = [plain.Transformer(cfg, vocabulary, 1).eval() for _ in range(2)]
        prompts = [prompt.tokens for prompt in self.prompts]
        rl = plain.RlLoop(copy.deepcopy(self.plain_policy), members, cfg, self.tokenizer.eos_id)
        return lambda step: rl.step(_batch(prompts, cfg.rl.prompts_per_step, step))


def _batch(rows: list[Any], size: int, step: int) -> list[Any]:
    return [rows[(step * size + i) % len(rows)] for i in range(size)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS))
    parser.add_argument("--steps", type=int, default=20, help="counted steps per repeat")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--profile", choices=KINDS, help="profile only our side")
    args = parser.parse_args()
    quiet_libraries()
    runtime.start(accelerator="cpu")
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as directory:
        work = Work(Path(directory), args.steps)
        work.prepare()
        if args.profile:
            work.ours(args.profile)
            profile = cProfile.Profile()
            profile.runcall(work.ours, args.profile)
            pstats.Stats(profile).sort_stats("cumulative").print_stats(70)
            pstats.Stats(profile).sort_stats("tottime").print_stats(40)
            return
        describe_machine()
        for kind in args.kinds:
            times = [(work.ours(kind), work.plain(kind)) for _ in range(args.repeats)]
            ours, theirs = (statistics.median(side) * 1e3 for side in zip(*times, strict=True))
            shown = "  ".join(f"{a * 1e3:.0f}/{b * 1e3:.0f}" for a, b in times)
            print(
                f"{kind:9} ours {ours:6.1f} ms  plain {theirs:6.1f} ms  ratio {ours / theirs:.2f}  ({shown})",
                flush=True,
            )


if __name__ == "__main__":
    main()
