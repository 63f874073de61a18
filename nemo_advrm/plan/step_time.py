"""Estimates the time of a step: arithmetic, communication between ranks and the pipeline bubble."""

from __future__ import annotations

import math
import operator
from dataclasses import astuple, dataclass, replace

from nemo_advrm.config.layout import layers_per_stage
from nemo_advrm.config.schema import ModelConfig
from nemo_advrm.engine.flops import Microbatch, head_flops, layer_flops, training_passes
from nemo_advrm.engine.gpus import GPU, GPUS, GPUS_PER_NODE
from nemo_advrm.engine.parameters import Parameters, Sizes, stage_parameters, with_adapters
from nemo_advrm.plan.activations import boundary_bytes
from nemo_advrm.plan.efficiency import measured_share
from nemo_advrm.plan.job_types import Held, Job
from nemo_advrm.plan.memory import cache_bytes, element_bytes, expert_replicas, rank_memory, weight_bytes


def _recomputed_share(model: ModelConfig, layers: int) -> tuple[float, float]:
    """Shares of the layers' (matrices, attention) that are recomputed."""
    if model.recompute == "full":
        return 1.0, 1.0
    if model.recompute == "block":
        share = min(1.0, model.recompute_num_layers * model.virtual_pipeline_model_parallel_size / layers)
        return share, share
    return 0.0, 1.0 if model.recompute == "selective" else 0.0


@dataclass(frozen=True)
class StepTime:
    """Seconds and FLOPs of one step.

    Attributes:
        flops: model FLOPs of the step over the whole job, without recomputation.
        compute: matrix products of the slowest stage.
        tensor, pipeline, data: communication of tensor-parallel ranks, pipeline stages and data-parallel ranks.
        bubble: idle time of the pipeline.
        generate, score: generating and scoring responses (RL).
        offload: transfers to and from CPU memory.
        context: communication of context-parallel ranks.
    """

    flops: float = 0.0
    compute: float = 0.0
    tensor: float = 0.0
    pipeline: float = 0.0
    data: float = 0.0
    bubble: float = 0.0
    generate: float = 0.0
    score: float = 0.0
    offload: float = 0.0
    context: float = 0.0

    def __add__(self, other: StepTime) -> StepTime:
        return StepTime(*map(operator.add, astuple(self), astuple(other)))

    @property
    def seconds(self) -> float:
        training = self.compute + self.tensor + self.context + self.pipeline + self.data + self.bubble
        return training + self.generate + self.score + self.offload

    def utilization(self, job: Job) -> float:
        """Model FLOPs utilization: FLOPs of the step over the peak FLOPs of the GPUs in its time."""
        peak = GPUS[job.cfg.plan.gpu].peak(job.cfg.precision.name)
        return self.flops / (self.seconds * job.gpus * peak)


def efficiency(job: Job, precision: str) -> float:
    """Share of the peak in this format: ``plan.efficiency``, or the measured one if that is 0."""
    return job.cfg.plan.efficiency or measured_share(precision, job.cfg.model.hidden_size)


class Clock:
    """Times of the parts of a job's step, at ``plan.efficiency`` of the GPU's peak, or at the measured share of it."""

    def __init__(self, job: Job) -> None:
        self.job = job
        self.model = job.cfg.model
        self.gpu: GPU = GPUS[job.cfg.plan.gpu]
        precision = job.cfg.precision.name
        # FP8 applies only to the matrices of layers
        other = precision if precision == "fp32" else "bf16"
        self.efficiency = efficiency(job, precision)
        self.rate = self.gpu.peak(precision) * self.efficiency
        self.other_rate = self.gpu.peak(other) * efficiency(job, other)
        self.layers = layers_per_stage(self.model)
        self.ranks = self.model.tensor_model_parallel_size * self.model.context_parallel_size

    def _stage_flops(self, stage: int, batch: Microbatch, head: str) -> float:
        flops = layer_flops(self.model, batch).total * self.layers[stage]
        if stage == len(self.layers) - 1:
            flops += head_flops(self.model, head, batch.tokens, self.job.vocab_size)
        return flops

    def _compute_seconds(
        self, stage: int, batch: Microbatch, head: str, matrices: float = 1, attention: float = 1, output: float = 1
    ) -> float:
        """Compute time of one rank; ``matrices``, ``attention`` and ``output`` count forward-pass equivalents."""
        layer, layers = layer_flops(self.model, batch), self.layers[stage]
        flops = self._stage_flops(stage, batch, head) - layers * layer.total  # the head
        seconds = layers * matrices * layer.matrices / self.rate
        seconds += (layers * attention * layer.attention + output * flops) / self.other_rate
        return seconds / self.ranks

    def _tensor_seconds(self, stage: int, batch: Microbatch, passes: float) -> float:
        """All-gathers and reduce-scatters (or all-reduces) of the layers: four per layer and pass."""
        tensor = self.model.tensor_model_parallel_size
        experts = self._expert_seconds(stage, batch, passes)
        if tensor == 1:
            return experts
        whole = element_bytes(self.job.cfg) * batch.tokens / self.model.context_parallel_size * self.model.hidden_size
        link = self.gpu.link if tensor <= GPUS_PER_NODE else self.gpu.network
        collectives = 2 if self.model.expert_model_parallel_size > 1 else 4  # whole experts need none for the MLP
        return experts + passes * self.layers[stage] * collectives * whole * (tensor - 1) / tensor / (link * 1e9)

    def _expert_seconds(self, stage: int, batch: Microbatch, passes: float) -> float:
        """Exchange of tokens with the ranks that have their experts: there and back, per layer and pass.

        These ranks have consecutive numbers.
        """
        ranks, model = self.model.expert_model_parallel_size, self.model
        copies = boundary_bytes(model, batch, element_bytes(self.job.cfg)) * model.moe_router_topk
        link = self.gpu.link if ranks <= GPUS_PER_NODE else self.gpu.network
        return passes * self.layers[stage] * 2 * copies * (ranks - 1) / ranks / (link * 1e9)

    def _context_seconds(self, stage: int, batch: Microbatch, passes: float) -> float:
        """Transfer of the other ranks' keys and values, per layer and pass, not overlapped with computation.

        Tensor-parallel ranks have consecutive numbers, so context-parallel groups are the first to span nodes.
        """
        ranks, tensor = self.model.context_parallel_size, self.model.tensor_model_parallel_size
        whole = element_bytes(self.job.cfg) * batch.tokens * 2 * Sizes.of(self.model).key / tensor
        link = self.gpu.link if self.ranks <= GPUS_PER_NODE else self.gpu.network
        return passes * self.layers[stage] * whole * (ranks - 1) / ranks / (link * 1e9)

    def _exchange_seconds(self, batch: Microbatch) -> float:
        """Transfer of a hidden state between stages over the network; tensor-parallel ranks send their parts."""
        if len(self.layers) == 1:
            return 0.0
        part = boundary_bytes(self.model, batch, element_bytes(self.job.cfg))
        return part / (self.gpu.network * 1e9)

    def _training(self, held: Held) -> StepTime:
        """A training step of one model: forward, backward (see :func:`training_passes`), and recomputation."""
        model, batch, microbatches = self.model, self.job.training, self.job.microbatches
        stages, chunks = len(self.layers), model.virtual_pipeline_model_parallel_size
        slowest = tensor = context = model_flops = 0.0
        passes = training_passes(model)
        for stage in range(stages):
            forward = self._stage_flops(stage, batch, held.head)
            attention = layer_flops(model, batch).attention * self.layers[stage]
            model_flops += passes * (forward - attention) + 3 * attention
            again_m, again_a = _recomputed_share(model, self.layers[stage])
            seconds = self._compute_seconds(stage, batch, held.head, passes + again_m, 3 + again_a, passes)
            # the backward pass gathers the inputs of the matrices again: 1 + 1.5 passes
            wire = self._tensor_seconds(stage, batch, 2.5 + again_m)
            # forward, and backward with the gradients too (Transformer Engine's ring)
            ring = self._context_seconds(stage, batch, 3 + again_a)
            if seconds + wire + ring > slowest + tensor + context:
                slowest, tensor, context = seconds, wire, ring
        exchange = 2 * chunks * self._exchange_seconds(batch)
        bubble = (stages - 1) / (microbatches * chunks)
        busy = microbatches * (slowest + tensor + context + exchange)
        flops = model_flops * microbatches * self.job.replicas
        data = self._data_seconds(held, busy)
        return StepTime(
            flops=flops,
            compute=microbatches * slowest,
            tensor=microbatches * tensor,
            pipeline=microbatches * exchange,
            data=data,
            bubble=busy * bubble,
            context=microbatches * context,
        )

    def _data_seconds(self, held: Held, busy: float) -> float:
        """Reduction of fp32 gradients and, with a distributed optimizer, all-gather of weights, less what overlaps."""
        model, replicas = self.model, self.job.replicas * self.model.context_parallel_size
        if replicas == 1:
            return 0.0
        whole = stage_parameters(model, held.head, self.job.vocab_size, 0, self.job.head_outputs)
        counts = with_adapters(whole, model, 0).trained
        split = model.use_distributed_optimizer
        reduce = gather = 0.0
        alike = expert_replicas(model, replicas)
        for part, ranks in ((replace(counts, experts=0), replicas), (Parameters(experts=counts.experts), alike)):
            share = (ranks - 1) / ranks / (self.gpu.network * 1e9)
            reduce += 4 * part.total * share * (1 if split else 2)
            gather += weight_bytes(self.job.cfg, part) * share if split else 0.0
        if model.overlap_grad_reduce:
            reduce = max(0.0, reduce - busy / 2)
        if model.overlap_param_gather:
            gather = max(0.0, gather - busy / 4)
        return reduce + gather

    def _forward(self, head: str, rows: int, batch: Microbatch, sliced: bool = True) -> tuple[float, float]:
        """(seconds, FLOPs of one replica) of forward passes over ``rows`` rows.

        ``sliced``: context-parallel ranks hold slices of every row; otherwise they hold different rows.
        """
        microbatches = -(-rows // batch.rows)
        stages = range(len(self.layers))
        flops = [self._stage_flops(stage, batch, head) for stage in stages]
        times = [
            self._compute_seconds(stage, batch, head)
            + self._tensor_seconds(stage, batch, 1.0)
            + (self._context_seconds(stage, batch, 1.0) if sliced else 0.0)
            for stage in stages
        ]
        slowest = max(times) + self._exchange_seconds(batch)
        return (microbatches + len(self.layers) - 1) * slowest, microbatches * sum(flops)

    def _generation(self) -> tuple[float, float]:
        """(seconds, FLOPs of one replica) of generating a step's responses, all of full length.

        A token passes the stages one after another, and as many groups of rows are on the way as there are stages. For
        each group a stage reads its weights and the group's cache, which usually takes longer than its arithmetic.
        Prompts are read once. Context-parallel ranks hold different rows.
        """
        job, model, cfg = self.job, self.model, self.job.cfg
        new = min(cfg.rl.max_new_tokens, model.encoder_seq_length)
        ranks = model.context_parallel_size
        batches = -(-job.rollouts // (job.generated * ranks))
        bandwidth = self.gpu.bandwidth * 1e12 * efficiency(job, "bf16")
        groups = min(len(self.layers), job.generated)
        rows = job.generated * ranks / groups
        turns: list[float] = []  # seconds of a stage for one group
        for stage in range(len(self.layers)):
            counts = stage_parameters(model, "lm", job.vocab_size, stage)
            # the experts that at least one row's token goes to, at most
            chosen = min(1.0, rows * model.moe_router_topk / max(1, model.num_moe_experts))
            weights = weight_bytes(cfg, replace(counts, experts=int(chosen * counts.experts)))
            read = weights + cache_bytes(job, stage) / groups
            token = self._compute_seconds(stage, Microbatch(math.ceil(rows), 1), "lm")
            turns.append(max(read / bandwidth, token))
        per_token = max(groups * max(turns), sum(turns))
        prompt = Microbatch(1, max(1, model.encoder_seq_length - new))
        reading, flops = self._forward("reward", job.rollouts, prompt, sliced=False)
        flops += sum(self._stage_flops(s, Microbatch(1, 1), "lm") for s in range(len(self.layers))) * new * job.rollouts
        return reading + batches * new * per_token, flops

    def step(self) -> StepTime:
        """Time of one step of the job."""
        job = self.job
        step = StepTime()
        for held in job.models:
            if held.trained:
                for _ in range(job.cfg.rl.updates_per_rollout if job.rollouts else 1):
                    step += self._training(held)
        if not job.rollouts:
            return step
        generate, flops = self._generation()
        score = 0.0
        # log-probabilities of policy and reference, values of the critic, scores of the reward models
        for held in job.models:
            seconds, more = self._forward(held.head, job.rollouts, job.scoring)
            score += held.passes * seconds
            flops += held.passes * more
        offload = self._offload_seconds()
        return step + StepTime(flops=flops * job.replicas, generate=generate, score=score, offload=offload)

    def _offload_seconds(self) -> float:
        """Frozen weights are copied for each pass over a step's responses (never back), optimizer state in both
        directions."""
        moved = 2 * rank_memory(self.job, 0).optimizer if self.model.offload_optimizer_while_generating else 0.0
        for held in self.job.models if self.model.offload_reference else ():
            if not (held.trained or held.shared):
                counts = stage_parameters(self.model, held.head, self.job.vocab_size, 0, self.job.head_outputs)
                moved += held.passes * weight_bytes(self.job.cfg, counts)
        return moved / (self.gpu.host * 1e9)


def step_tokens(job: Job) -> int:
    """Number of tokens that one step of the whole job trains on."""
    return job.training.tokens * job.microbatches * job.replicas
