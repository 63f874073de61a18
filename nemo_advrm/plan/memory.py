"""Memory of one rank of every pipeline stage: permanent tensors, and the phase that needs most."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from nemo_advrm.config.layout import expert_tensor_parallel_size, layers_per_stage
from nemo_advrm.config.schema import Config, ModelConfig
from nemo_advrm.engine.flops import Microbatch
from nemo_advrm.engine.generation_memory import cache_bytes_per_token, logits_bytes_per_row, rows_that_fit
from nemo_advrm.engine.gpus import GPUS
from nemo_advrm.engine.parameters import Parameters, Sizes, stage_parameters, with_adapters
from nemo_advrm.plan.activations import head_bytes, layer_terms, log_prob_bytes, on_gpu, peak_bytes, tied_bytes
from nemo_advrm.plan.job_types import Held, Job

GIB = 2**30
_GRADIENT = 4  # bytes: gradients are accumulated in fp32


@dataclass
class RankMemory:
    """Bytes on one rank of a pipeline stage.

    Attributes:
        stage: pipeline stage.
        parameters: number of parameters that are trained.
        weights, gradients, optimizer: those of the trained models.
        frozen: weights of all models that are not trained.
        parked: those of them that can wait in CPU memory: all but adapters beside a frozen base.
        largest_parked: those of the largest of these models.
        activations: peak of training, without the head's.
        head: activations of head and logits on the last stage.
        cache: keys and values of the responses that are generated at once.
        phases: name -> total of that phase.
    """

    stage: int
    parameters: int = 0
    weights: float = 0.0
    gradients: float = 0.0
    optimizer: float = 0.0
    frozen: float = 0.0
    parked: float = 0.0
    largest_parked: float = 0.0
    activations: float = 0.0
    head: float = 0.0
    cache: float = 0.0
    phases: dict[str, float] = field(default_factory=dict)

    @property
    def trained(self) -> float:
        """Bytes of the trained models."""
        return self.weights + self.gradients + self.optimizer

    def while_generating(self, model: ModelConfig, frozen: float) -> float:
        """Bytes while no model is trained, ``frozen`` of them those of frozen models."""
        asleep = self.optimizer if model.offload_optimizer_while_generating else 0.0
        return self.trained - asleep + frozen

    @property
    def total(self) -> float:
        return max(self.phases.values())

    @property
    def phase(self) -> str:
        """The phase that needs most memory."""
        return max(self.phases, key=lambda name: self.phases[name])


def budget(cfg: Config) -> float:
    """Bytes of one GPU that a job may use."""
    return (GPUS[cfg.plan.gpu].memory - cfg.plan.reserve_gib) * GIB


def distinct_stages(model: ModelConfig) -> set[int]:
    """Stages of which one is the fullest: those between the second and the last need no more than the second."""
    last = model.pipeline_model_parallel_size - 1
    return {0, min(1, last), last}


def element_bytes(cfg: Config) -> int:
    """Bytes of an element of activations and of weights that are not in FP8."""
    return 4 if cfg.precision.name == "fp32" else 2


def weight_bytes(cfg: Config, counts: Parameters) -> float:
    """Bytes of a model's weights. FP8 matrices: copy and transpose, and the bf16 original unless fp8_params is set."""
    element = element_bytes(cfg)
    inner = float(element * (counts.linear + counts.experts + counts.other))
    if cfg.precision.name.startswith(("fp8", "mxfp8")):
        layers = cfg.model.num_layers
        share = max(0, layers - 2 * cfg.precision.bf16_first_last_layers) / layers
        extra = 0 if cfg.precision.fp8_params else 2  # 1 byte + 1 byte instead of, or in addition to, 2
        inner += extra * (counts.linear + counts.experts) * share
    return inner + element * (counts.embedding + counts.output + counts.adapters) + 4 * counts.head


def _adapter_set_bytes(cfg: Config, counts: Parameters, stage: int) -> float:
    """Bytes of one reward model's adapters and head beside a frozen base of ``counts``."""
    adapters = with_adapters(counts, replace(cfg.model, peft="lora"), stage).adapters
    return element_bytes(cfg) * adapters + 4 * counts.head


def expert_replicas(model: ModelConfig, replicas: int) -> int:
    """Ranks with the same experts, where ``replicas`` data- and context-parallel ranks have the same other weights."""
    ranks = model.expert_model_parallel_size
    tensor = model.tensor_model_parallel_size
    return replicas * tensor // (ranks * expert_tensor_parallel_size(tensor, ranks))


def optimizer_bytes(cfg: Config, counts: Parameters, replicas: int) -> float:
    """Bytes of Adam's moments and of fp32 copies of 16-bit weights; sharded by the distributed optimizer.

    ``counts``: what is trained.
    """
    moments = 8 if cfg.model.optim.name == "adam" else 4
    master = 0 if cfg.precision.name == "fp32" else 4
    split = replicas * cfg.model.context_parallel_size if cfg.model.use_distributed_optimizer else 1
    of_experts = expert_replicas(cfg.model, split) if cfg.model.use_distributed_optimizer else 1
    rest = (moments + master) * (counts.total - counts.head - counts.experts) + moments * counts.head
    return rest / split + (moments + master) * counts.experts / of_experts


def in_flight(model: ModelConfig, stage: int, microbatches: int) -> int:
    """Largest number of forward passes of a model chunk that wait for their backward pass.

    1F1B: the number of stages from this one on. Interleaved: the warm-up of Megatron's schedule,
    2 (p - 1 - stage) + (v - 1) p chunks, plus one.
    """
    stages, chunks = model.pipeline_model_parallel_size, model.virtual_pipeline_model_parallel_size
    if chunks == 1:
        return min(microbatches, stages - stage)
    return min(microbatches * chunks, 2 * (stages - 1 - stage) + (chunks - 1) * stages + 1)


def _training(job: Job, held: Held, stage: int) -> tuple[float, float]:
    """(peak activations of training this model on the stage, the head's part of it)."""
    model, element = job.cfg.model, element_bytes(job.cfg)
    layers = layers_per_stage(model)
    last = stage == len(layers) - 1
    head = head_bytes(model, held.head, job.training, job.vocab_size, element, on_gpu(model)) if last else 0.0
    chunk = layers[stage] // model.virtual_pipeline_model_parallel_size
    waiting = in_flight(model, stage, job.microbatches)
    tied = tied_bytes(model, held.head, job.vocab_size, element)
    return peak_bytes(model, chunk, waiting, head, job.training, element, on_gpu(model), tied), head


def _cache_bytes_per_row(job: Job, stage: int) -> float:
    model = job.cfg.model
    keys = Sizes.of(model).key // model.tensor_model_parallel_size
    per_token = cache_bytes_per_token(layers_per_stage(model)[stage], keys, element_bytes(job.cfg))
    return model.encoder_seq_length * per_token


def cache_bytes(job: Job, stage: int) -> float:
    """Bytes of keys and values of one stage's layers for all responses generated at once, at full length."""
    return job.generated * _cache_bytes_per_row(job, stage)


def _logits_bytes_per_row(job: Job, stage: int) -> int:
    last = stage == job.cfg.model.pipeline_model_parallel_size - 1
    return logits_bytes_per_row(job.vocab_size) if last else 0


def _generation(job: Job, stage: int) -> float:
    """Bytes of the cache, one layer's activations in prefill (whole rows on every rank), and one token's logits."""
    model, element = job.cfg.model, element_bytes(job.cfg)
    whole = replace(model, sequence_parallel=False, context_parallel_size=1)
    length = model.encoder_seq_length
    prompts = Microbatch(max(1, min(job.generated, model.micro_batch_tokens // length)), length)
    working = layer_terms(whole, prompts, element, on_gpu(whole)).total
    return cache_bytes(job, stage) + working + job.generated * _logits_bytes_per_row(job, stage)


def _scoring(job: Job, stage: int) -> float:
    """Bytes of one layer's activations, and of the logits for log-probabilities of the policies."""
    model, element = job.cfg.model, element_bytes(job.cfg)
    working = layer_terms(model, job.scoring, element, on_gpu(model)).total
    if stage < model.pipeline_model_parallel_size - 1:
        return working
    rows = Microbatch(min(job.scoring.rows, job.training.rows), job.scoring.length)
    hidden = head_bytes(model, "value", rows, job.vocab_size, element, on_gpu(model))
    tokens = rows.tokens / model.context_parallel_size
    return working + hidden + log_prob_bytes(model, tokens, job.vocab_size, element)


def _standing(job: Job, stage: int) -> RankMemory:
    """The memory of a stage's models on one rank, whatever it does with them."""
    cfg, found = job.cfg, RankMemory(stage)
    for held in job.models:
        if held.shared:
            continue
        counts = stage_parameters(cfg.model, held.head, job.vocab_size, stage, job.head_outputs)
        if not held.trained:
            weights = weight_bytes(cfg, counts)
            found.parked += held.count * weights
            found.frozen += held.count * weights + held.adapter_sets * _adapter_set_bytes(cfg, counts, stage)
            found.largest_parked = max(found.largest_parked, weights)
            continue
        counts = with_adapters(counts, cfg.model, stage)
        found.parameters += counts.trained.total
        found.weights += weight_bytes(cfg, counts)
        found.gradients += _GRADIENT * counts.trained.total
        found.optimizer += optimizer_bytes(cfg, counts.trained, job.replicas)
    return found


def _waiting(job: Job, standing: RankMemory) -> float:
    """Bytes of frozen models while none of them computes."""
    return standing.frozen - (standing.parked if job.cfg.model.offload_reference else 0.0)


def rows_that_fit_all_stages(job: Job) -> int:
    """Responses that the fullest stage has room for beside its models, as the engine counts them on a GPU."""
    return min(_rows_that_fit(job, stage) for stage in distinct_stages(job.cfg.model))


def _rows_that_fit(job: Job, stage: int) -> int:
    standing = _standing(job, stage)
    free = budget(job.cfg) - standing.while_generating(job.cfg.model, _waiting(job, standing))
    return rows_that_fit(_cache_bytes_per_row(job, stage) + _logits_bytes_per_row(job, stage), max(0.0, free))


def rank_memory(job: Job, stage: int) -> RankMemory:
    """Memory of each rank of pipeline stage ``stage``; its tensor- and data-parallel ranks have equal parts."""
    model, memory = job.cfg.model, _standing(job, stage)
    training = 0.0
    for held in job.models:
        if not held.trained:
            continue
        kept, head = _training(job, held, stage)
        if kept > training:
            training, memory.head = kept, head
    memory.activations = training - memory.head
    waiting = _waiting(job, memory)
    memory.phases["train"] = memory.trained + waiting + training
    if job.rollouts:
        memory.cache = cache_bytes(job, stage)
        memory.phases["generate"] = memory.while_generating(model, waiting) + _generation(job, stage)
        used = waiting + memory.largest_parked if model.offload_reference else memory.frozen
        memory.phases["score"] = memory.while_generating(model, used) + _scoring(job, stage)
    return memory


def all_stages(job: Job) -> list[RankMemory]:
    return [rank_memory(job, stage) for stage in range(job.cfg.model.pipeline_model_parallel_size)]


def host_bytes(job: Job, memory: RankMemory) -> float:
    """Bytes of CPU memory that offloading needs per rank."""
    model = job.cfg.model
    parked = memory.parked if model.offload_reference else 0.0
    return parked + (memory.optimizer if model.offload_optimizer_while_generating and job.rollouts else 0.0)


def checkpoint_copy_bytes(job: Job, stage: int) -> float:
    """Bytes of CPU memory that a rank of the first replica needs for a background save: a copy of all that it writes.

    That replica gathers the distributed optimizer's shards, with another fp32 copy of the weights.
    """
    cfg = job.cfg
    if not cfg.trainer.async_checkpoint:
        return 0.0
    total = 0.0
    for held in job.models:
        if held.trained:
            whole = stage_parameters(cfg.model, held.head, job.vocab_size, stage, job.head_outputs)
            counts = with_adapters(whole, cfg.model, stage).trained
            total += element_bytes(cfg) * (counts.total - counts.head) + 4 * counts.head
            if cfg.model.use_distributed_optimizer:
                total += (12 if cfg.model.optim.name == "adam" else 8) * counts.total
            else:
                total += optimizer_bytes(cfg, counts, 1)
    return total
