"""The job that a stage is on its GPUs: which models it holds, and how its batches are cut."""

from __future__ import annotations

from dataclasses import replace

from nemo_advrm.config.layout import data_parallel_size
from nemo_advrm.config.schema import Config
from nemo_advrm.engine.dimensions import member_model, padded_vocab_size
from nemo_advrm.engine.flops import Microbatch
from nemo_advrm.plan.job_types import Held, Job
from nemo_advrm.plan.memory import rows_that_fit_all_stages


def models_of(cfg: Config) -> tuple[Held, ...]:
    """The models that the stage ``cfg.plan.stage`` holds, without ensemble members on servers."""
    stage = cfg.plan.stage
    if stage == "sft":
        return (Held("policy", "lm", True),)
    if stage == "train_rm":
        return (Held("reward model", "reward", True),)
    held = [Held("policy", "lm", True)]
    if cfg.rl.algorithm == "ppo":
        held.append(Held("critic", "value", True))
    held.append(Held("reference policy", "lm", False, shared=cfg.model.peft == "lora"))
    return (*held, *_members_of(cfg))


def _members_of(cfg: Config) -> list[Held]:
    """The ensemble without members on servers.

    With ``ensemble.share=lora`` several checkpoints of this package are taken for adapters on one base: ``plan`` reads
    none of them.
    """
    options = cfg.ensemble
    local = [(k, name) for k, name in enumerate(options.members) if "://" not in name]
    count = 1 if options.share == "trunk" else options.size
    adapted = count if options.share == "lora" else 0
    if options.members:  # heads of one trunk are one model
        count = len({_model_of(k, name) for k, name in local})
        adapted = sum(_may_be_adapters(name) for _, name in local) if options.share == "lora" else 0
    if adapted < 2:  # a single one is merged into its base
        return [Held("reward model", "reward", False, count)] if count else []
    base = Held("base of reward models", "reward", False, adapter_sets=adapted)
    return [base, Held("reward model", "reward", False, count - adapted)] if count > adapted else [base]


def _may_be_adapters(member: str) -> bool:
    return ":" not in member.removeprefix("megatron:") and "?head=" not in member


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
    if cfg.plan.stage == "train_rm":
        cfg = replace(cfg, model=member_model(cfg.model, cfg.ensemble))
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
    job = Job(
        cfg,
        gpus,
        replicas,
        padded_vocab_size(model, tokenizer_size),
        models_of(cfg),
        training,
        steps,
        scoring,
        rollouts,
    )
    return replace(job, generated=_generated(job)) if rollouts else job


def _generated(job: Job) -> int:
    """Responses that a rank generates at once: those asked for, or what the memory that is left has room for."""
    asked, most = job.cfg.rl.generation_batch_size, -(-job.rollouts // job.cfg.model.context_parallel_size)
    return min(most, asked or rows_that_fit_all_stages(job))
