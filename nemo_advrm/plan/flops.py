"""FLOPs of a forward pass and the time of a step: arithmetic, communication between ranks and the pipeline's bubble."""

from __future__ import annotations

from dataclasses import dataclass

from nemo_advrm.config.layout import layers_per_stage
from nemo_advrm.config.schema import ModelConfig
from nemo_advrm.engine.flops import Microbatch, head_flops, layer_flops
from nemo_advrm.engine.gpus import GPU, GPUS, GPUS_PER_NODE
from nemo_advrm.engine.parameters import Sizes, stage_parameters
from nemo_advrm.plan.activations import boundary_bytes
from nemo_advrm.plan.jobs import Held, Job
from nemo_advrm.plan.memory import cache_bytes, element_bytes, rank_memory, weight_bytes


def _recomputed_share(model: ModelConfig, layers: int) -> tuple[float, float]:
    """Shares of the layers' (matrices, attention) that are computed a second time."""
    if model.recompute == "full":
        return 1.0, 1.0
    if model.recompute == "block":
        share = min(1.0, model.recompute_num_layers * model.virtual_pipeline_model_parallel_size / layers)
        return share, share
    return 0.0, 1.0 if model.recompute == "selective" else 0.0


@dataclass(frozen=True)
class StepTime:
    """Seconds of one step and the FLOPs it is for.

    Attributes:
        flops: of the model over the whole job: what a step needs, without recomputation.
        compute: matrix products of the slowest stage.
        tensor, pipeline, data: communication of tensor-parallel ranks, between stages, of data-parallel ranks.
        bubble: idle time of the pipeline.
        generate, score: making and scoring the responses (RL).
        offload: moving what waits in CPU memory there and back.
        context: communication of context-parallel ranks.
    """

    flops: float
    compute: float
    tensor: float
    pipeline: float
    data: float
    bubble: float
    generate: float = 0.0
    score: float = 0.0
    offload: float = 0.0
    context: float = 0.0

    @property
    def seconds(self) -> float:
        training = self.compute + self.tensor + self.context + self.pipeline + self.data + self.bubble
        return training + self.generate + self.score + self.offload

    def utilization(self, job: Job) -> float:
        """Model FLOPs utilization: FLOPs that the step needs over what the GPUs could do in its time."""
        peak = GPUS[job.cfg.plan.gpu].peak(job.cfg.precision.name)
        return self.flops / (self.seconds * job.gpus * peak)


class Clock:
    """Times of one job's parts at ``plan.efficiency`` of its GPU's peak."""

    def __init__(self, job: Job) -> None:
        self.job = job
        self.model = job.cfg.model
        self.gpu: GPU = GPUS[job.cfg.plan.gpu]
        self.efficiency = job.cfg.plan.efficiency
        precision = job.cfg.precision.name
        self.rate = self.gpu.peak(precision) * self.efficiency
        # FP8 is for the matrices of the layers alone
        self.other_rate = self.gpu.peak(precision if precision == "fp32" else "bf16") * self.efficiency
        self.layers = layers_per_stage(self.model)
        self.ranks = self.model.tensor_model_parallel_size * self.model.context_parallel_size

    def _stage_flops(self, stage: int, batch: Microbatch, head: str) -> float:
        flops = layer_flops(self.model, batch).total * self.layers[stage]
        if stage == len(self.layers) - 1:
            flops += head_flops(self.model, head, batch.tokens, self.job.vocab_size)
        return flops

    def _compute_seconds(self, stage: int, batch: Microbatch, head: str, matrices: float, attention: float) -> float:
        """Of one rank; ``matrices`` and ``attention`` say how often each is computed in units of a forward pass."""
        layer, layers = layer_flops(self.model, batch), self.layers[stage]
        flops = self._stage_flops(stage, batch, head) - layers * layer.total  # the head
        passes = 3 if matrices >= 3 else 1
        seconds = layers * matrices * layer.matrices / self.rate
        seconds += (layers * attention * layer.attention + passes * flops) / self.other_rate
        return seconds / self.ranks

    def _tensor_seconds(self, stage: int, batch: Microbatch, passes: float) -> float:
        """All-gathers and reduce-scatters (or all-reduces) of a layer: four per pass over it."""
        tensor = self.model.tensor_model_parallel_size
        if tensor == 1:
            return 0.0
        whole = element_bytes(self.job.cfg) * batch.tokens / self.model.context_parallel_size * self.model.hidden_size
        link = self.gpu.link if tensor <= GPUS_PER_NODE else self.gpu.network
        return passes * self.layers[stage] * 4 * whole * (tensor - 1) / tensor / (link * 1e9)

    def _context_seconds(self, stage: int, batch: Microbatch, passes: float) -> float:
        """Keys and values of the other ranks, for every layer and pass, behind no computation.

        Tensor-parallel ranks stand next to each other, so that context-parallel ones leave the node first.
        """
        ranks, tensor = self.model.context_parallel_size, self.model.tensor_model_parallel_size
        whole = element_bytes(self.job.cfg) * batch.tokens * 2 * Sizes.of(self.model).key / tensor
        link = self.gpu.link if self.ranks <= GPUS_PER_NODE else self.gpu.network
        return passes * self.layers[stage] * whole * (ranks - 1) / ranks / (link * 1e9)

    def _exchange_seconds(self, batch: Microbatch) -> float:
        """One hidden state from a stage to the next over the network; tensor ranks send their parts."""
        if len(self.layers) == 1:
            return 0.0
        part = boundary_bytes(self.model, batch, element_bytes(self.job.cfg))
        return part / (self.gpu.network * 1e9)

    def _training(self, held: Held, microbatches: int) -> StepTime:
        """A step of one trained model: forward, twice that backward, and what is recomputed."""
        model, batch, replicas = self.model, self.job.training, self.job.replicas
        stages, chunks = len(self.layers), model.virtual_pipeline_model_parallel_size
        slowest = tensor = context = model_flops = 0.0
        for stage in range(stages):
            forward = self._stage_flops(stage, batch, held.head)
            model_flops += 3 * forward
            again_m, again_a = _recomputed_share(model, self.layers[stage])
            seconds = self._compute_seconds(stage, batch, held.head, 3 + again_m, 3 + again_a)
            # the backward pass gathers the inputs of its matrices again: 1 + 1.5 passes
            wire = self._tensor_seconds(stage, batch, 2.5 + again_m)
            # forward, and backward once more with the gradients (Transformer Engine's ring)
            shared = self._context_seconds(stage, batch, 3 + again_a)
            if seconds + wire + shared > slowest + tensor + context:
                slowest, tensor, context = seconds, wire, shared
        exchange = 2 * chunks * self._exchange_seconds(batch)
        bubble = (stages - 1) / (microbatches * chunks)
        busy = microbatches * (slowest + tensor + context + exchange)
        flops = model_flops * microbatches * replicas
        data = self._data_seconds(held, busy)
        return StepTime(
            flops,
            microbatches * slowest,
            microbatches * tensor,
            microbatches * exchange,
            data,
            busy * bubble,
            context=microbatches * context,
        )

    def _data_seconds(self, held: Held, busy: float) -> float:
        """Reduction of fp32 gradients and, split optimizer, gathering of new weights; hidden as far as overlapped."""
        model, replicas = self.model, self.job.replicas * self.model.context_parallel_size
        if replicas == 1:
            return 0.0
        counts = stage_parameters(model, held.head, self.job.vocab_size, 0, self.job.head_outputs)
        share = (replicas - 1) / replicas / (self.gpu.network * 1e9)
        split = model.use_distributed_optimizer
        reduce = 4 * counts.total * share * (1 if split else 2)
        gather = weight_bytes(self.job.cfg, counts) * share if split else 0.0
        if model.overlap_grad_reduce:
            reduce = max(0.0, reduce - busy / 2)
        if model.overlap_param_gather:
            gather = max(0.0, gather - busy / 4)
        return reduce + gather

    def _forward(self, head: str, rows: int, batch: Microbatch, shared: bool = True) -> tuple[float, float]:
        """(seconds, FLOPs of one replica) of forward passes over ``rows`` rows.

        ``shared``: context-parallel ranks share every row; else they share out the rows.
        """
        microbatches = -(-rows // batch.rows)
        stages = range(len(self.layers))
        flops = [self._stage_flops(stage, batch, head) for stage in stages]
        times = [
            self._compute_seconds(stage, batch, head, 1, 1)
            + self._tensor_seconds(stage, batch, 1.0)
            + (self._context_seconds(stage, batch, 1.0) if shared else 0.0)
            for stage in stages
        ]
        slowest = max(times) + self._exchange_seconds(batch)
        return (microbatches + len(self.layers) - 1) * slowest, microbatches * sum(flops)

    def _generation(self) -> tuple[float, float]:
        """(seconds, FLOPs of one replica) of a step's responses, all of full length.

        A token of one batch passes the stages in turn; each reads its weights and cache, which takes longer than its
        arithmetic. The prompts are read once. Context-parallel ranks share out the rows.
        """
        job, model, cfg = self.job, self.model, self.job.cfg
        new = min(cfg.rl.max_new_tokens, model.encoder_seq_length)
        ranks = model.context_parallel_size
        batches = -(-job.rollouts // (job.generated * ranks))
        bandwidth = self.gpu.bandwidth * 1e12 * self.efficiency
        per_token = 0.0
        for stage in range(len(self.layers)):
            counts = stage_parameters(model, "lm", job.vocab_size, stage)
            read = weight_bytes(cfg, counts) + cache_bytes(job, stage)
            token = self._compute_seconds(stage, Microbatch(job.generated * ranks, 1), "lm", 1, 1)
            per_token += max(read / bandwidth, token)
        prompt = Microbatch(1, max(1, model.encoder_seq_length - new))
        reading, flops = self._forward("reward", job.rollouts, prompt, shared=False)
        flops += sum(self._stage_flops(s, Microbatch(1, 1), "lm") for s in range(len(self.layers))) * new * job.rollouts
        return reading + batches * new * per_token, flops

    def step(self) -> StepTime:
        """One step of the job."""
        job = self.job
        parts: list[StepTime] = []
        for held in job.models:
            if held.trained:
                passes = job.cfg.rl.updates_per_rollout if job.rollouts else 1
                parts += [self._training(held, job.microbatches)] * passes
        generate = score = flops = 0.0
        if job.rollouts:
            generate, flops = self._generation()
            # log-probabilities of the policy and of its reference, values of a critic, scores of the reward models
            for held in job.models:
                seconds, more = self._forward(held.head, job.rollouts, job.scoring)
                score += held.count * seconds
                flops += held.count * more
        return StepTime(
            sum(p.flops for p in parts) + flops * job.replicas,
            sum(p.compute for p in parts),
            sum(p.tensor for p in parts),
            sum(p.pipeline for p in parts),
            sum(p.data for p in parts),
            sum(p.bubble for p in parts),
            generate,
            score,
            self._offload_seconds(),
            sum(p.context for p in parts),
        )

    def _offload_seconds(self) -> float:
        """Frozen weights come once a step (they need not be written back), optimizer state goes and comes."""
        if not self.job.rollouts:
            return 0.0
        memory = rank_memory(self.job, 0)
        moved = memory.frozen if self.model.offload_reference else 0.0
        moved += 2 * memory.optimizer if self.model.offload_optimizer_while_generating else 0.0
        return moved / (self.gpu.host * 1e9)


def step_tokens(job: Job) -> int:
    """Tokens that are trained on in one step of the whole job."""
    return job.training.tokens * job.microbatches * job.replicas
