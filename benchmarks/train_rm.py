"""Compares reward-model training in pairs/s: our RewardModel under Lightning against TRL's RewardTrainer.

Both train the same Llama on the same global batches in the same order with their own training loops. A callback pauses
the loop after every few steps to switch to the other side. The losses of the first steps must agree.
``gpu/train_against_trl.py`` runs the same sides on a GPU.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from queue import SimpleQueue
from types import SimpleNamespace
from typing import Any

import numpy as np
from common import (
    EOS_ID,
    PAD_ID,
    Llama,
    compare,
    copy_weights,
    describe_machine,
    our_config,
    our_facts,
    peer_model,
    ragged_lengths,
    ragged_sequences,
    random_weights,
    start_runtime,
)
from sides import Side, give_back_memory

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
    full_rows: bool = False  # every sequence fills the context
    unit: str = "pairs"  # or tokens
    accelerator: str = "cpu"
    learning_rate: float = 1e-4
    micro_tokens: int = 0  # 0: our default
    untimed: int = 0  # steps before each repeat


@dataclass
class Pacer:
    """Runs a training loop a few steps at a time; the loop calls ``step_done``, another thread calls ``go``."""

    losses: list[float] = field(default_factory=list)
    orders: SimpleQueue[int] = field(default_factory=SimpleQueue)
    done: SimpleQueue[None] = field(default_factory=SimpleQueue)
    left: int = CHECKED_STEPS

    def step_done(self) -> bool:
        """Wait for the next order after the steps of the last one; returns whether to go on."""
        self.left -= 1
        if self.left == 0:
            self.done.put(None)
            self.left = self.orders.get()
        return self.left > 0

    def go(self, steps: int) -> None:
        self.orders.put(steps)
        self.done.get()

    def end(self) -> None:
        self.orders.put(0)

    def first_losses(self) -> np.ndarray:
        self.done.get()
        return np.array(self.losses[:CHECKED_STEPS])


Batch = list[tuple[list[int], list[int]]]


def batches(options: Options) -> list[Batch]:
    """Return the global batch of every step."""
    rng, context, vocab = np.random.default_rng(0), options.shape.context, options.shape.vocab
    lengths = ragged_lengths(options.pairs, rng, context)
    if options.full_rows:
        lengths = np.full_like(lengths, context)
    pairs = list(
        zip(ragged_sequences(lengths[:, 0], rng, vocab), ragged_sequences(lengths[:, 1], rng, vocab), strict=True)
    )
    size = options.global_batch
    return [[pairs[i % len(pairs)] for i in range(k * size, (k + 1) * size)] for k in range(total_steps(options))]


def total_steps(options: Options) -> int:
    return CHECKED_STEPS + (options.untimed + options.steps) * (options.repeats + 1) + 1


def side_of(pacer: Pacer, options: Options, train: Callable[[], object], facts: dict[str, Any]) -> Side:
    sizes = [sum(len(c) + len(r) for c, r in batch) for batch in batches(options)]
    losses = pacer.losses

    def work() -> float:
        first = len(losses)
        pacer.go(options.steps)
        return sum(sizes[first : len(losses)] if options.unit == "tokens" else [options.global_batch] * options.steps)

    before = (lambda: pacer.go(options.untimed)) if options.untimed else None
    return Side(pacer.first_losses, work, train, before, give_back_memory, pacer.end, facts)


def ours(options: Options) -> Side:
    from lightning.pytorch import Callback, Trainer

    from nemo_advrm.data.encoding import EncodedPair
    from nemo_advrm.models.reward_model import RewardModel
    from nemo_advrm.training.strategy import MegatronStrategy

    start_runtime(options.accelerator)
    cfg = our_config(options.shape, options.accelerator)
    if options.micro_tokens:
        cfg.model.micro_batch_size, cfg.model.micro_batch_tokens = options.global_batch, options.micro_tokens
    if options.accelerator == "gpu":
        cfg.model.use_distributed_optimizer = True
    cfg.trainer.max_steps = total_steps(options)
    cfg.model.global_batch_size = options.global_batch
    cfg.model.optim.lr, cfg.model.optim.betas, cfg.model.optim.weight_decay = options.learning_rate, [0.9, 0.999], 0.0
    cfg.model.optim.sched.name = "constant"
    steps = [[EncodedPair(c, r, 0, None, 1.0, "") for c, r in batch] for batch in batches(options)]
    tokenizer = SimpleNamespace(vocab_size=options.shape.vocab, pad_id=PAD_ID, eos_id=EOS_ID)
    module = RewardModel(cfg, tokenizer, [pair for batch in steps for pair in batch], [])
    module.mix = lambda step, _: steps[step]  # use the peer's order
    copy_weights(module.model, random_weights(options.shape, "reward"))
    if options.accelerator == "gpu":
        module.optimizer.reset()  # its fp32 weights are those of the copy
    pacer = Pacer()

    class Pause(Callback):
        def on_train_batch_end(self, trainer, module, *_) -> None:  # type: ignore[no-untyped-def]
            pacer.losses.append(module.step_metrics["train/loss"])
            trainer.should_stop = not pacer.step_done()

    trainer = Trainer(
        accelerator=options.accelerator,
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

    def train() -> None:
        trainer.fit(module)
        module.release()

    return side_of(pacer, options, train, our_facts(cfg))


def peer(options: Options) -> Side:
    import torch
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
    on_gpu = options.accelerator == "gpu"
    device = "cuda" if on_gpu else "cpu"
    model = peer_model(options.shape, "reward", random_weights(options.shape, "reward"), device)
    micro_losses: list[torch.Tensor] = []

    class Pause(TrainerCallback):
        def on_step_end(self, args, state, control, **_) -> None:  # type: ignore[no-untyped-def]
            pacer.losses.append(float(torch.stack(micro_losses[-per_step:]).mean()))
            control.should_training_stop = not pacer.step_done()

    class Trainer(RewardTrainer):
        def compute_loss(self, *args, **kwargs):  # type: ignore[no-untyped-def]
            loss = super().compute_loss(*args, **kwargs)
            micro_losses.append(loss.detach().float())
            return loss

    config = RewardConfig(
        output_dir=tempfile.mkdtemp(prefix="bench_trl_"),
        per_device_train_batch_size=options.peer_batch,
        gradient_accumulation_steps=per_step,
        max_steps=total_steps(options),
        learning_rate=options.learning_rate,
        lr_scheduler_type="constant",
        train_sampling_strategy="sequential",  # use our order
        max_length=options.shape.context,
        bf16=on_gpu,
        use_cpu=not on_gpu,
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
    return side_of(pacer, options, trainer.train, {})


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
