"""Compares reward-model training in pairs/s: our RewardModel under Lightning against TRL's RewardTrainer.

Both train the same Llama on the same global batches in the same order with their own training loops. A callback pauses
the loop after every few steps to switch to the other side. The losses of the first steps must agree.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from queue import SimpleQueue
from types import SimpleNamespace

import numpy as np
from common import (
    EOS_ID,
    PAD_ID,
    Llama,
    Side,
    compare,
    copy_weights,
    describe_machine,
    our_config,
    peer_model,
    ragged_lengths,
    ragged_sequences,
    random_weights,
    start_runtime,
)

LEARNING_RATE = 1e-4
CHECKED_STEPS = 2


@dataclass(frozen=True)
class Options:
    pairs: int
    global_batch: int
    steps: int
    repeats: int
    peer_batch: int
    peer_checkpointing: bool
    shape: Llama


@dataclass
class Pacer:
    """Runs a training loop a few steps at a time; the loop calls ``step_done``, another thread calls ``go``."""

    losses: list[float] = field(default_factory=list)
    orders: SimpleQueue[int] = field(default_factory=SimpleQueue)
    done: SimpleQueue[None] = field(default_factory=SimpleQueue)
    left: int = CHECKED_STEPS

    def step_done(self) -> None:
        self.left -= 1
        if self.left == 0:
            self.done.put(None)
            self.left = self.orders.get()

    def go(self, steps: int) -> None:
        self.orders.put(steps)
        self.done.get()

    def first_losses(self) -> np.ndarray:
        self.done.get()
        return np.array(self.losses[:CHECKED_STEPS])


def batches(options: Options) -> list[list[tuple[list[int], list[int]]]]:
    """Return the global batch of every step."""
    rng = np.random.default_rng(0)
    lengths = ragged_lengths(options.pairs, rng, options.shape.context)
    chosen = ragged_sequences(lengths[:, 0], rng, options.shape.vocab)
    rejected = ragged_sequences(lengths[:, 1], rng, options.shape.vocab)
    pairs = list(zip(chosen, rejected, strict=True))
    size = options.global_batch
    return [[pairs[i % len(pairs)] for i in range(k * size, (k + 1) * size)] for k in range(total_steps(options))]


def total_steps(options: Options) -> int:
    return CHECKED_STEPS + options.steps * (options.repeats + 1) + 1


def side_of(pacer: Pacer, options: Options, train: Callable[[], object]) -> Side:
    def work() -> float:
        pacer.go(options.steps)
        return options.steps * options.global_batch

    return Side(pacer.first_losses, work, train)


def ours(options: Options) -> Side:
    from lightning.pytorch import Callback, Trainer

    from nemo_advrm.data.encoding import EncodedPair
    from nemo_advrm.models.reward_model import RewardModel
    from nemo_advrm.training.strategy import MegatronStrategy

    start_runtime()
    cfg = our_config(options.shape)
    cfg.trainer.max_steps = total_steps(options)
    cfg.model.global_batch_size = options.global_batch
    cfg.model.optim.lr, cfg.model.optim.betas, cfg.model.optim.weight_decay = LEARNING_RATE, [0.9, 0.999], 0.0
    cfg.model.optim.sched.name = "constant"
    steps = [[EncodedPair(c, r, 0, None, 1.0, "") for c, r in batch] for batch in batches(options)]
    tokenizer = SimpleNamespace(vocab_size=options.shape.vocab, pad_id=PAD_ID, eos_id=EOS_ID)
    module = RewardModel(cfg, tokenizer, [pair for batch in steps for pair in batch], [])
    module.mix = lambda step, _: steps[step]  # use the peer's order
    copy_weights(module.model, random_weights(options.shape, "reward"))
    pacer = Pacer()

    class Pause(Callback):
        def on_train_batch_end(self, trainer, module, *_) -> None:  # type: ignore[no-untyped-def]
            pacer.losses.append(module.step_metrics["train/loss"])
            pacer.step_done()

    trainer = Trainer(
        accelerator="cpu",
        devices=1,
        strategy=MegatronStrategy(),
        max_steps=module.max_steps,
        max_epochs=-1,
        logger=False,
        callbacks=[Pause()],
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
        limit_val_batches=0,
    )
    return side_of(pacer, options, lambda: trainer.fit(module))


def peer(options: Options) -> Side:
    from datasets import Dataset, disable_progress_bars
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast, TrainerCallback
    from trl import RewardConfig, RewardTrainer

    disable_progress_bars()
    pacer = Pacer()
    per_step = options.global_batch // options.peer_batch
    pairs = [pair for batch in batches(options) for pair in batch]
    vocabulary = {f"t{i}": i for i in range(options.shape.vocab)}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel(vocabulary, unk_token="t2")), pad_token="t0", eos_token="t1"
    )
    model = peer_model(options.shape, "reward", random_weights(options.shape, "reward"))

    micro_losses: list[float] = []

    class Pause(TrainerCallback):
        def on_step_end(self, *_, **__) -> None:  # type: ignore[no-untyped-def]
            pacer.losses.append(float(np.mean(micro_losses[-per_step:])))
            pacer.step_done()

    class Trainer(RewardTrainer):
        def compute_loss(self, *args, **kwargs):  # type: ignore[no-untyped-def]
            loss = super().compute_loss(*args, **kwargs)
            micro_losses.append(float(loss))
            return loss

    config = RewardConfig(
        output_dir=tempfile.mkdtemp(prefix="bench_trl_"),
        per_device_train_batch_size=options.peer_batch,
        gradient_accumulation_steps=per_step,
        max_steps=total_steps(options),
        learning_rate=LEARNING_RATE,
        lr_scheduler_type="constant",
        train_sampling_strategy="sequential",  # use our order
        bf16=False,
        use_cpu=True,
        gradient_checkpointing=options.peer_checkpointing,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )
    trainer = Trainer(
        model=model,
        args=config,
        train_dataset=Dataset.from_dict({"chosen_ids": [c for c, _ in pairs], "rejected_ids": [r for _, r in pairs]}),
        processing_class=tokenizer,
        callbacks=[Pause()],
    )
    return side_of(pacer, options, trainer.train)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pairs", type=int, default=512)
    parser.add_argument("--global-batch", type=int, default=32)
    parser.add_argument("--steps", type=int, default=1, help="optimizer steps per repeat")
    parser.add_argument("--repeats", type=int, default=4)
    parser.add_argument("--peer-batch", type=int, default=8, help="TRL's per_device_train_batch_size (default 8)")
    parser.add_argument("--peer-checkpointing", action="store_true", help="TRL's default; off is faster")
    args = parser.parse_args()
    describe_machine()
    options = Options(
        args.pairs, args.global_batch, args.steps, args.repeats, args.peer_batch, args.peer_checkpointing, Llama()
    )
    compare("reward-model training", "pairs", {"ours": ours, "TRL": peer}, options, args.repeats)


if __name__ == "__main__":
    main()
