"""What a job is: its models, microbatches and data-parallel replicas."""

from __future__ import annotations

from dataclasses import dataclass

from nemo_advrm.config.schema import Config
from nemo_advrm.engine.dimensions import Head, head_outputs, trunk_heads
from nemo_advrm.engine.flops import Microbatch


@dataclass(frozen=True)
class Held:
    """Models of one kind that a stage holds.

    ``shared``: it computes with the trained policy's weights, without the adapters, and has none of its own.
    ``adapter_sets``: reward models that are adapters on one copy of these weights; 0: there are none.
    """

    title: str
    head: Head
    trained: bool
    count: int = 1
    shared: bool = False
    adapter_sets: int = 0

    @property
    def passes(self) -> int:
        """Forward passes that score the same rows by all of them."""
        return self.count * max(1, self.adapter_sets)


@dataclass(frozen=True)
class Job:
    """One stage on a number of GPUs, every sequence at ``model.encoder_seq_length``.

    Attributes:
        cfg: configuration of the stage.
        gpus: number of GPUs of the job.
        replicas: data-parallel size.
        vocab_size: padded vocabulary size.
        models: models that the stage holds.
        training: a training microbatch.
        microbatches: number of training microbatches per step and replica.
        scoring: a microbatch of forward passes without gradients (RL).
        rollouts: responses per step and replica; 0 in stages without RL.
        generated: most responses that a rank generates at once; context-parallel ranks divide the rollouts.
    """

    cfg: Config
    gpus: int
    replicas: int
    vocab_size: int
    models: tuple[Held, ...]
    training: Microbatch
    microbatches: int
    scoring: Microbatch
    rollouts: int = 0
    generated: int = 0

    @property
    def head_outputs(self) -> int:
        heads = trunk_heads(self.cfg.ensemble)
        return heads if heads > 1 else head_outputs(self.cfg.reward_model)
