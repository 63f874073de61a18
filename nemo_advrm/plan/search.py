"""Searches layouts: single changes that make a job fit, and the fastest layouts of a number of GPUs."""

from __future__ import annotations

import copy
import dataclasses
import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from nemo_advrm.config.layout import layers_per_stage, validate_layout
from nemo_advrm.config.schema import Config, ModelConfig
from nemo_advrm.engine.gpus import GPUS_PER_NODE
from nemo_advrm.errors import LayoutError
from nemo_advrm.plan.job_types import Job
from nemo_advrm.plan.jobs import job_of
from nemo_advrm.plan.memory import budget, distinct_stages, rank_memory
from nemo_advrm.plan.step_time import Clock, StepTime

_MICRO_BATCHES = (1, 2, 4, 8)
_CHUNKS = (1, 2, 3, 4, 5, 6, 8, 10, 12)
_EVEN = {"num_layers_in_first_pipeline_stage": 0, "num_layers_in_last_pipeline_stage": 0}
# fewest tokens of a sequence per context-parallel rank: with fewer, communication dominates
_LEAST_TOKENS = 4096


@dataclass(frozen=True)
class Candidate:
    """A layout: the dotted keys that differ from the configuration, with the resulting job, memory and time."""

    changes: dict[str, Any]
    job: Job
    memory: float
    time: StepTime

    @property
    def fits(self) -> bool:
        return self.memory <= budget(self.job.cfg)

    def overrides(self) -> list[str]:
        """The changes as command-line settings."""
        return [f"{key}={str(value).lower()}" for key, value in self.changes.items()]


def peak_memory(job: Job) -> float:
    """Bytes of the fullest rank."""
    return max(rank_memory(job, stage).total for stage in distinct_stages(job.cfg.model))


def candidate(cfg: Config, gpus: int, tokenizer_size: int, settings: dict[str, Any]) -> Candidate | None:
    """``cfg`` with changed model settings; None if the layout is impossible."""
    changed = copy.copy(cfg)
    changed.model = dataclasses.replace(cfg.model, **settings)
    try:
        validate_layout(changed, gpus)
    except LayoutError:
        return None
    job = job_of(changed, gpus, tokenizer_size)
    model = changed.model
    chunks = model.virtual_pipeline_model_parallel_size
    if chunks > 1 and job.microbatches % model.pipeline_model_parallel_size:
        return None  # Megatron's interleaved schedule needs a multiple of the number of stages
    changes = {f"model.{key}": value for key, value in settings.items() if getattr(cfg.model, key) != value}
    return Candidate(changes, job, peak_memory(job), Clock(job).step())


def _rows(cfg: Config, rows: int) -> dict[str, Any]:
    """Settings for microbatches of ``rows`` rows of full length."""
    sequences = 2 if cfg.plan.stage == "train_rm" else 1
    return {"micro_batch_size": rows, "micro_batch_tokens": rows * sequences * cfg.model.encoder_seq_length}


def _divisors(number: int) -> list[int]:
    return [n for n in range(1, number + 1) if number % n == 0]


def _powers_of_2(most: int) -> Iterator[int]:
    return itertools.takewhile(lambda n: n <= most, (2**i for i in itertools.count()))


def _context_sizes(model: ModelConfig) -> Iterator[int]:
    return _powers_of_2(max(1, model.encoder_seq_length // _LEAST_TOKENS))


def _expert_sizes(model: ModelConfig, ranks: int) -> list[int]:
    """Expert-parallel sizes for the ``ranks`` ranks of a stage of the pipeline."""
    experts = model.num_moe_experts
    return [n for n in _powers_of_2(experts or 1) if experts % n == 0 and ranks % n == 0]


def _splits(layers: int, stages: int) -> tuple[int, dict[str, int]] | None:
    """(most layers per stage, keys) for ``stages`` stages; the first and last stage get the remaining layers."""
    if layers % stages == 0:
        return layers // stages, _EVEN
    each = -(-layers // stages)
    left = layers - each * (stages - 2)
    if left < 2:
        return None
    first, last = left // 2, left - left // 2  # fewer, as they also hold embedding and head
    return each, {"num_layers_in_first_pipeline_stage": first, "num_layers_in_last_pipeline_stage": last}


def _single_settings(cfg: Config, gpus: int, rows_at_once: int) -> Iterator[list[dict[str, Any]]]:
    """Kinds of single changes, each with its settings in order, least drastic first."""
    model = cfg.model
    yield [{"use_distributed_optimizer": True}]
    if model.tensor_model_parallel_size > 1:
        yield [{"sequence_parallel": True}]
    if cfg.plan.stage in ("attack", "rlhf"):
        yield [{"offload_reference": True}]
        yield [{"offload_optimizer_while_generating": True}]
    yield [_rows(cfg, rows) for rows in reversed(_MICRO_BATCHES) if rows < rows_at_once]
    if model.recompute in ("none", "selective"):
        yield [{"recompute": "selective"}]
        chunk = max(layers_per_stage(model)) // model.virtual_pipeline_model_parallel_size
        yield [{"recompute": "block", "recompute_num_layers": layers} for layers in range(1, chunk)]
    yield [{"recompute": "full", "recompute_num_layers": 1}]
    if not model.num_moe_experts:  # experts have no adapters
        yield [{"peft": "lora"}]
    yield [{"virtual_pipeline_model_parallel_size": 1}]
    more_stages = [n for n in _divisors(model.num_layers) if n > model.pipeline_model_parallel_size]
    yield [{"pipeline_model_parallel_size": stages, **_EVEN} for stages in more_stages]
    sizes = [n for n in _powers_of_2(GPUS_PER_NODE) if n > model.tensor_model_parallel_size]
    yield [{"tensor_model_parallel_size": tensor, "sequence_parallel": True} for tensor in sizes]
    if model.num_moe_experts:
        sizes = _expert_sizes(model, gpus // model.pipeline_model_parallel_size)
        yield [{"expert_model_parallel_size": n} for n in sizes if n > model.expert_model_parallel_size]
    yield [{"context_parallel_size": ranks} for ranks in _context_sizes(model) if ranks > model.context_parallel_size]


def single_changes(cfg: Config, gpus: int, tokenizer_size: int) -> list[Candidate]:
    """Layouts that fit and differ from ``cfg`` in one respect: the least drastic change of each kind."""
    sequences = 2 if cfg.plan.stage == "train_rm" else 1
    rows_at_once = job_of(cfg, gpus, tokenizer_size).training.rows // sequences
    found = []
    for kind in _single_settings(cfg, gpus, rows_at_once):
        options = (candidate(cfg, gpus, tokenizer_size, settings) for settings in kind)
        fitting = next((c for c in options if c is not None and c.changes and c.fits), None)
        if fitting is not None:
            found.append(fitting)
    for factor in (2, 4, 8, 16):  # more replicas, which shard the optimizer state further
        option = candidate(cfg, factor * gpus, tokenizer_size, {})
        if option is not None and option.fits:
            return [*found, dataclasses.replace(option, changes={"plan.gpus": factor * gpus})]
    return found


def _offloads(cfg: Config) -> list[dict[str, Any]]:
    """Options of offloading to CPU memory, which only RL stages have."""
    names = ("offload_reference", "offload_optimizer_while_generating")
    choices = (False, True) if cfg.plan.stage in ("attack", "rlhf") else (False,)
    return [dict(zip(names, values, strict=True)) for values in itertools.product(choices, repeat=2)]


def _candidates(cfg: Config, gpus: int) -> Iterator[dict[str, Any]]:
    model = cfg.model
    node = min(GPUS_PER_NODE, gpus)
    layouts = itertools.product(_powers_of_2(node), _divisors(gpus), _context_sizes(model))
    for tensor, stages, ranks in layouts:
        split = _splits(model.num_layers, stages) if stages <= model.num_layers else None
        if split is None or gpus % (tensor * stages * ranks):
            continue
        layers, ends = split
        replicas = gpus // (tensor * stages * ranks)
        supervised = cfg.plan.stage in ("sft", "train_rm")
        batch = model.global_batch_size if supervised else cfg.rl.prompts_per_step * cfg.rl.group_size
        most = max(1, batch // replicas)  # rows per replica and step: larger microbatches give the same job
        for chunks, rows in itertools.product(_CHUNKS if stages > 1 else (1,), _MICRO_BATCHES):
            if layers % chunks or rows > most:
                continue
            parts = layers // chunks
            again = sorted({parts // 4, parts // 2, 3 * parts // 4} - {0, parts})
            recomputes = [("none", 1), ("full", 1), *(("block", n) for n in again)]
            experts = _expert_sizes(model, gpus // stages)
            for (recompute, count), offload, expert in itertools.product(recomputes, _offloads(cfg), experts):
                yield {
                    **offload,
                    "tensor_model_parallel_size": tensor,
                    "pipeline_model_parallel_size": stages,
                    "virtual_pipeline_model_parallel_size": chunks,
                    "context_parallel_size": ranks,
                    "expert_model_parallel_size": expert,
                    **ends,
                    "sequence_parallel": tensor > 1,
                    "use_distributed_optimizer": True,
                    **_rows(cfg, rows),
                    "recompute": recompute,
                    "recompute_num_layers": count,
                }


def search(cfg: Config, gpus: int, tokenizer_size: int, best: int = 5) -> list[Candidate]:
    """The ``best`` fastest layouts of ``gpus`` GPUs that fit, fastest first; empty if none fits."""
    found = (candidate(cfg, gpus, tokenizer_size, settings) for settings in _candidates(cfg, gpus))
    fitting = [c for c in found if c is not None and c.fits]
    return sorted(fitting, key=lambda c: (c.time.seconds, c.memory))[:best]
