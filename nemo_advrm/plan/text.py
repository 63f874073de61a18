"""Formats a plan as text: the job, memory per rank, time of a step, and layouts that fit."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby

from nemo_advrm.config.schema import ModelConfig
from nemo_advrm.engine.gpus import GPUS, GPUS_PER_NODE
from nemo_advrm.plan.job_types import Job
from nemo_advrm.plan.memory import GIB, RankMemory, budget, checkpoint_copy_bytes, host_bytes
from nemo_advrm.plan.search import Candidate
from nemo_advrm.plan.step_time import StepTime, efficiency, step_tokens

_COLUMNS = ("weights", "gradients", "optimizer", "frozen", "activations", "head", "cache", "total")


def nodes_of(gpus: int) -> int:
    return -(-gpus // GPUS_PER_NODE)


def layout_words(model: ModelConfig) -> str:
    parts = [f"TP {model.tensor_model_parallel_size}", f"PP {model.pipeline_model_parallel_size}"]
    if model.virtual_pipeline_model_parallel_size > 1:
        parts[-1] += f" of {model.virtual_pipeline_model_parallel_size} chunks"
    if model.context_parallel_size > 1:
        parts.append(f"CP {model.context_parallel_size}")
    if model.num_moe_experts:
        parts[-1] += f" (EP {model.expert_model_parallel_size})"
    return " x ".join(parts)


def recompute_words(model: ModelConfig) -> str:
    count = _count(model.recompute_num_layers, "layer")
    detail = {"block": f" of {count} a {'chunk' if model.virtual_pipeline_model_parallel_size > 1 else 'stage'}"}
    if model.recompute_num_layers > 1:
        detail["full"] = f" in units of {count}"
    return f"recompute {model.recompute}{detail.get(model.recompute, '')}"


def describe_job(job: Job, models: Sequence[tuple[str, int]]) -> list[str]:
    """Lines about the models and their parameters, the layout and the microbatch."""
    cfg, model = job.cfg, job.cfg.model
    gpu = GPUS[cfg.plan.gpu]
    switches = [
        "sequence parallel" if model.sequence_parallel else "",
        "distributed optimizer" if model.use_distributed_optimizer else "",
        recompute_words(model),
        f"precision {cfg.precision.name}",
    ]
    waves = f", {job.rollouts} responses a step, {job.generated} at once" if job.rollouts else ""
    return [
        f"stage {cfg.plan.stage} on {job.gpus} x {gpu.title} ({_count(nodes_of(job.gpus), 'node')})",
        *(f"  {title}: {count:,} parameters" for title, count in models),
        f"  layout: {layout_words(model)} x DP {job.replicas}; {', '.join(filter(None, switches))}",
        f"  microbatch: {_count(job.training.rows, 'sequence')} of {job.training.length} tokens; "
        f"{job.microbatches} microbatches a step on each of {_count(job.replicas, 'replica')}{waves}",
    ]


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"


def memory_table(job: Job, stages: Sequence[RankMemory]) -> list[str]:
    """Lines of the memory table in GiB, one per group of equal ranks."""
    limit = budget(job.cfg)
    per_stage = job.gpus // len(stages)
    shown = [name for name in _COLUMNS if name in ("total", "weights") or any(getattr(s, name) for s in stages)]
    header = f"{'stage':>7} {'ranks':>11} {'parameters':>15} " + " ".join(f"{name:>11}" for name in shown)
    lines = [
        f"memory of one rank in GiB; {limit / GIB:.1f} can be used "
        f"({GPUS[job.cfg.plan.gpu].memory:.1f} less plan.reserve_gib={job.cfg.plan.reserve_gib:g})",
        header + "  most in",
    ]
    for _, equal in groupby(stages, key=lambda s: (s.parameters, *(getattr(s, n) for n in _COLUMNS))):
        group = list(equal)
        first, last = group[0].stage, group[-1].stage
        name = f"{first}" if first == last else f"{first}-{last}"
        ranks = f"{first * per_stage}-{(last + 1) * per_stage - 1}"
        values = " ".join(f"{getattr(group[0], column) / GIB:>11.2f}" for column in shown)
        verdict = "" if group[0].total <= limit else f"  DOES NOT FIT by {(group[0].total - limit) / GIB:.1f}"
        lines.append(f"{name:>7} {ranks:>11} {group[0].parameters:>15,} {values}  {group[0].phase}{verdict}")
    host = max(host_bytes(job, stage) for stage in stages)
    if host:
        lines.append(f"offloaded to CPU memory: {host / GIB:.1f} GiB per rank")
    copy = max(checkpoint_copy_bytes(job, stage.stage) for stage in stages)
    if copy:
        lines.append(f"copied to CPU memory while a checkpoint is written: {copy / GIB:.1f} GiB per rank of a replica")
    return lines


def time_lines(job: Job, time: StepTime) -> list[str]:
    parts = [
        ("generation", time.generate),
        ("scoring", time.score),
        ("matrix products", time.compute),
        ("tensor and expert parallel" if job.cfg.model.num_moe_experts else "tensor parallel", time.tensor),
        ("context parallel", time.context),
        ("pipeline", time.pipeline),
        ("bubble", time.bubble),
        ("data parallel", time.data),
        ("offload", time.offload),
    ]
    shown = ", ".join(f"{name} {seconds:.2f}" for name, seconds in parts if seconds >= 0.005)
    tokens = step_tokens(job)
    return [
        f"step: {time.flops:.3e} FLOPs of the model, {tokens:,} tokens; {time.seconds:.2f} s, "
        f"{tokens / time.seconds:,.0f} tokens/s, MFU {100 * time.utilization(job):.1f} %",
        f"  seconds: {shown}",
        f"  at {_efficiency(job)} of {GPUS[job.cfg.plan.gpu].title}'s peak, every sequence of full length",
    ]


def _efficiency(job: Job) -> str:
    if job.cfg.plan.efficiency:
        return f"plan.efficiency={job.cfg.plan.efficiency:g}"
    return f"{efficiency(job, job.cfg.precision.name):.2f} (measured on one H200 at this width and format)"


def _outcome(option: Candidate) -> str:
    time = option.time
    return f"{option.memory / GIB:6.1f} GiB {time.seconds:9.2f} s  MFU {100 * time.utilization(option.job):4.1f} %"


def change_line(option: Candidate) -> str:
    """Line with memory, time and the changed settings."""
    return f"{_outcome(option)}  {' '.join(option.overrides())}"


def layout_line(option: Candidate) -> str:
    """Line with memory, time and the whole layout."""
    job, model = option.job, option.job.cfg.model
    words = [
        f"{layout_words(model)} x DP {job.replicas}",
        f"{_count(job.training.rows, 'sequence')} a microbatch",
        recompute_words(model),
        "offloaded reference" if model.offload_reference else "",
        "offloaded optimizer" if model.offload_optimizer_while_generating else "",
    ]
    return f"{_outcome(option)}  {', '.join(filter(None, words))}"
