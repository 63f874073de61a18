"""The job that a stage is on its GPUs: its models, microbatches and data-parallel replicas."""

from __future__ import annotations

from dataclasses import dataclass

from nemo_advrm.config.layout import data_parallel_size
from nemo_advrm.config.schema import Config
from nemo_advrm.engine.dimensions import Head, head_outputs, padded_vocab_size, trunk_heads
from nemo_advrm.engine.flops import Microbatch


@dataclass(frozen=True)
class Held:
    """Models of one kind that a stage holds.

    ``shared``: it computes with the trained policy's weights, without the adapters, and has none of its own.
    """

    title: str
    head: Head
    trained: bool
    count: int = 1
    shared: bool = False


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
        generated: most responses that a rank generates at once; context-parallel ranks divide the rollouts. The
            automatic number, which fills the memory that is left, is counted as 4 x micro_batch_size.
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


def models_of(cfg: Config) -> tuple[Held, ...]:
    """The models that the stage ``cfg.plan.stage`` holds, without ensemble members on servers."""
    stage = cfg.plan.stage
    if stage == "sft":
        return (Held("policy", "lm", True),)
    if stage == "train_rm":
        return (Held("reward model", "reward", True),)
    members = 1 if cfg.ensemble.share == "trunk" else cfg.ensemble.size
    if cfg.ensemble.members:  # heads of one trunk are one model
        members = len({_model_of(k, name) for k, name in enumerate(cfg.ensemble.members) if "://" not in name})
    held = [Held("policy", "lm", True)]
    if cfg.rl.algorithm == "ppo":
        held.append(Held("critic", "value", True))
    held.append(Held("reference policy", "lm", False, shared=cfg.model.peft == "lora"))
    return (*held, Held("reward model", "reward", False, members)) if members else tuple(held)


def _model_of(number: int, member: str) -> str:
    """Names the model that an entry of ``ensemble.members`` loads; another entry's only if both are its heads."""
    directory, _, option = member.rpartition("?")
    return directory if option.startswith("head=") else f"{number} {member}"


def _rows_at_once(cfg: Config, most: int, sequences: int = 1) -> int:
    """Rows of a microbatch if every row has ``sequences`` sequences of full length."""
    model = cfg.model
    return max(1, min(most, model.micro_batch_tokens // (sequences * model.encoder_seq_length)))


def job_of(cfg: Config, gpus: int, tokenizer_size: int) -> Job:
    """The job of ``cfg.plan.stage`` on ``gpus`` GPUs; raises LayoutError if the layout does not divide them."""
    replicas = data_parallel_size(cfg, gpus)
    model = cfg.model
    length = model.encoder_seq_length
    single = _rows_at_once(cfg, model.micro_batch_size)
    scoring = Microbatch(_rows_at_once(cfg, 4 * model.micro_batch_size), length)
    share = max(1, model.global_batch_size // replicas)
    rollouts = 0
    if cfg.plan.stage == "train_rm":  # a row is a pair
        pairs = min(share, _rows_at_once(cfg, model.micro_batch_size, 2))
        training = Microbatch(2 * pairs, length)
        steps = -(-share // pairs)
    elif cfg.plan.stage == "sft":
        training = Microbatch(min(share, single), length)
        steps = -(-share // training.rows)
    else:
        rollouts = max(1, cfg.rl.prompts_per_step * cfg.rl.group_size // replicas)
        training = Microbatch(min(single, rollouts), length)
        steps = -(-rollouts // training.rows)
    return Job(
        cfg,
        gpus,
        replicas,
        padded_vocab_size(model, tokenizer_size),
        models_of(cfg),
        training,
        steps,
        scoring,
        rollouts,
        min(-(-rollouts // model.context_parallel_size), cfg.rl.generation_batch_size or 4 * model.micro_batch_size),
    )
