"""Schema of the model, its optimizer, number format and training job."""

from __future__ import annotations

from dataclasses import dataclass

from nemo_advrm.config.fields import BELOW_ONE, COUNT, NOT_NEGATIVE, POSITIVE, Range, Restart, Role, key, section


@dataclass
class TrainerConfig:
    """How long to train and on what; the NeMo / Lightning names."""

    devices: int = key(1, "processes per node", COUNT, restart=Restart.FREE)
    num_nodes: int = key(
        1, "nodes; above 1 start the command on every node, with torchrun or srun", COUNT, restart=Restart.FREE
    )
    accelerator: str = key("auto", "what it runs on", choices=("auto", "cpu", "gpu"), restart=Restart.FREE)
    cpu_threads: int = key(0, "threads of a process on a CPU; 0 leaves it to PyTorch (all cores)", NOT_NEGATIVE)
    max_steps: int = key(-1, "optimizer steps; -1 leaves it to max_epochs", Range(at_least=-1))
    max_epochs: int = key(1, "passes over the training rows (ignored by RL stages)", COUNT)
    val_check_interval: int = key(
        0, "steps between validations; 0 validates at the end only", NOT_NEGATIVE, restart=Restart.FREE
    )
    limit_val_batches: int = key(0, "global batches per validation; 0 takes all", NOT_NEGATIVE)
    log_every_n_steps: int = key(
        10, "steps between lines on the console (metrics.jsonl has every step)", COUNT, restart=Restart.FREE
    )
    gradient_clip_val: float = key(
        1.0, "largest global gradient norm; 0 turns clipping off", NOT_NEGATIVE, role=Role.OPTIMIZER
    )
    checkpoint_every_n_steps: int = key(
        0, "steps between checkpoints; 0 saves at the end only", NOT_NEGATIVE, restart=Restart.FREE
    )
    keep_checkpoints: int = key(2, "newest checkpoints kept while training", COUNT, restart=Restart.FREE)
    async_checkpoint: bool = key(
        False, "train on while a copy in host memory is written; docs/checkpoints.md", restart=Restart.FREE
    )
    verify_checkpoints: bool = key(
        False,
        "hash weights when they are saved and before training continues; false: only small files, and sizes",
        restart=Restart.FREE,
    )
    timeout_minutes: float = key(
        30.0, "longest wait for another process; then the job ends and names it", POSITIVE, restart=Restart.FREE
    )
    memory_snapshot: bool = key(
        False, "record allocations on a GPU, for a snapshot of them when its memory runs out", restart=Restart.FREE
    )


@dataclass
class ScheduleConfig:
    """Learning-rate schedule: linear warm-up, then constant or cosine to ``min_lr``."""

    name: str = key(
        "CosineAnnealing",
        "learning rate after the warm-up",
        choices=("CosineAnnealing", "constant"),
        role=Role.OPTIMIZER,
    )
    warmup_steps: int = key(0, "steps of linear warm-up", NOT_NEGATIVE, role=Role.OPTIMIZER)
    min_lr: float = key(0.0, "learning rate at the end of the cosine", NOT_NEGATIVE, role=Role.OPTIMIZER)


@dataclass
class OptimConfig:
    """Megatron-Core optimizer."""

    name: str = key("adam", "optimizer", choices={"adam": "decoupled weight decay", "sgd": ""}, role=Role.OPTIMIZER)
    lr: float = key(1.0e-5, "peak learning rate", POSITIVE, role=Role.OPTIMIZER)
    weight_decay: float = key(0.01, "decoupled weight decay", NOT_NEGATIVE, role=Role.OPTIMIZER)
    betas: list[float] = key([0.9, 0.98], "Adam's two averaging factors", BELOW_ONE, role=Role.OPTIMIZER)
    eps: float = key(1.0e-8, "Adam's epsilon", POSITIVE, role=Role.OPTIMIZER)
    sched: ScheduleConfig = section(ScheduleConfig)


@dataclass
class ModelConfig:
    """Transformer architecture, parallel layout and batch shape."""

    # architecture
    num_layers: int = key(2, "transformer layers", COUNT, role=Role.ARCHITECTURE)
    hidden_size: int = key(64, "width of the residual stream", COUNT, role=Role.ARCHITECTURE)
    ffn_hidden_size: int = key(0, "width of the MLP; 0 takes 4 * hidden_size", NOT_NEGATIVE, role=Role.ARCHITECTURE)
    num_attention_heads: int = key(4, "query heads", COUNT, role=Role.ARCHITECTURE)
    num_query_groups: int = key(
        0,
        "key and value heads; 0 takes num_attention_heads (no grouped-query attention)",
        NOT_NEGATIVE,
        role=Role.ARCHITECTURE,
    )
    kv_channels: int = key(
        0, "size of a head; 0 takes hidden_size / num_attention_heads", NOT_NEGATIVE, role=Role.ARCHITECTURE
    )
    normalization: str = key(
        "RMSNorm",
        "kind of norm",
        choices={"RMSNorm": "", "LayerNorm": "", "rmsnorm1p": "", "layernorm1p": "1p: weights are stored minus one"},
        role=Role.ARCHITECTURE,
    )
    layernorm_epsilon: float = key(1.0e-5, "added to the variance in norms", POSITIVE, role=Role.ARCHITECTURE)
    activation: str = key(
        "swiglu",
        "of the MLP",
        choices=("swiglu", "geglu", "geglu_tanh", "gelu", "relu", "squared_relu"),
        role=Role.ARCHITECTURE,
    )
    position_embedding_type: str = key(
        "rope", "how positions enter", choices=("rope", "learned_absolute"), role=Role.ARCHITECTURE
    )
    rotary_base: float = key(10000.0, "base of the rotary frequencies", POSITIVE, role=Role.ARCHITECTURE)
    rotary_percent: float = key(
        1.0, "share of a head's channels that is rotated", Range(above=0, at_most=1), role=Role.ARCHITECTURE
    )
    rope_scaling: str = key(
        "",
        "how rotary frequencies are scaled for longer contexts",
        choices={"": "", "llama3": "Llama 3.1: low frequencies are slowed down for longer contexts"},
        role=Role.ARCHITECTURE,
    )
    rope_scaling_factor: float = key(
        8.0, "how much the lowest frequencies are slowed down", COUNT, role=Role.ARCHITECTURE
    )
    rope_scaling_low_freq_factor: float = key(
        1.0,
        "wavelengths above rope_scaling_original_context / this are fully slowed down",
        POSITIVE,
        role=Role.ARCHITECTURE,
    )
    rope_scaling_high_freq_factor: float = key(
        4.0, "wavelengths below rope_scaling_original_context / this stay", POSITIVE, role=Role.ARCHITECTURE
    )
    rope_scaling_original_context: int = key(
        8192, "tokens of context before the scaling", COUNT, role=Role.ARCHITECTURE
    )
    sliding_window: int = key(
        0, "keys that a query sees, itself included; 0 means all", NOT_NEGATIVE, role=Role.ARCHITECTURE
    )
    sliding_window_every: int = key(
        1, "1: the window is in every layer; 2: in layers 0, 2, 4, ... (Gemma 2)", COUNT, role=Role.ARCHITECTURE
    )
    attention_softcap: float = key(
        0.0, "bounds attention scores by c * tanh(score / c); 0 turns it off", NOT_NEGATIVE, role=Role.ARCHITECTURE
    )
    logit_softcap: float = key(
        0.0, "bounds next-token logits by c * tanh(logit / c); 0 turns it off", NOT_NEGATIVE, role=Role.ARCHITECTURE
    )
    query_scale: float = key(
        0.0,
        "attention scores are multiplied by this ** -0.5; 0 takes the size of a head",
        NOT_NEGATIVE,
        role=Role.ARCHITECTURE,
    )
    embedding_scale: float = key(
        1.0, "token embeddings are multiplied by it (Gemma: the root of hidden_size)", POSITIVE, role=Role.ARCHITECTURE
    )
    post_norms: bool = key(False, "norms after attention and after the MLP too (Gemma 2)", role=Role.ARCHITECTURE)
    bias: bool = key(False, "biases in all linear layers", role=Role.ARCHITECTURE)
    qkv_bias: bool = key(False, "biases in the query/key/value projection only (Qwen2)", role=Role.ARCHITECTURE)
    qk_layernorm: bool = key(False, "normalise queries and keys (Qwen3)", role=Role.ARCHITECTURE)
    share_embeddings_and_output_weights: bool = key(
        True, "the output layer uses the embedding's weights", role=Role.ARCHITECTURE
    )
    head_bias: bool = key(
        False, "the reward or value head has a bias (NeMo-Aligner's reward models have one)", role=Role.ARCHITECTURE
    )
    init_method_std: float = key(0.02, "std of the initial weights", NOT_NEGATIVE)
    hidden_dropout: float = key(0.0, "dropout after attention and after the MLP", BELOW_ONE)
    attention_dropout: float = key(0.0, "dropout of attention weights", BELOW_ONE)
    encoder_seq_length: int = key(2048, "longest sequence (prompt + response) in tokens", COUNT, role=Role.ARCHITECTURE)
    tokenizer: str = key("byte", "byte | synthetic | hf:DIR")
    vocab_size: int = key(0, "tokens; 0 takes the tokenizer's", NOT_NEGATIVE)
    make_vocab_size_divisible_by: int = key(
        8, "the vocabulary is padded to this times the tensor parallel size", COUNT, role=Role.PARALLELISM
    )
    # parallel layout
    tensor_model_parallel_size: int = key(
        1, "ranks that share every layer", COUNT, role=Role.PARALLELISM, restart=Restart.RECORDED
    )
    pipeline_model_parallel_size: int = key(
        1, "pipeline stages", COUNT, role=Role.PARALLELISM, restart=Restart.RECORDED
    )
    virtual_pipeline_model_parallel_size: int = key(
        1,
        "model chunks per pipeline stage (interleaved schedule)",
        COUNT,
        role=Role.PARALLELISM,
        restart=Restart.RECORDED,
    )
    num_layers_in_first_pipeline_stage: int = key(
        0,
        "layers of the first pipeline stage; 0: as many as the others",
        NOT_NEGATIVE,
        role=Role.PARALLELISM,
        restart=Restart.RECORDED,
    )
    num_layers_in_last_pipeline_stage: int = key(
        0,
        "layers of the last pipeline stage; 0: as many as the others",
        NOT_NEGATIVE,
        role=Role.PARALLELISM,
        restart=Restart.RECORDED,
    )
    context_parallel_size: int = key(
        1, "ranks that share one sequence (docs/scale.md)", COUNT, role=Role.PARALLELISM, restart=Restart.RECORDED
    )
    sequence_parallel: bool = key(
        False,
        "tensor-parallel ranks also share the tokens of norms and dropout",
        role=Role.PARALLELISM,
        restart=Restart.RECORDED,
    )
    use_distributed_optimizer: bool = key(
        False, "optimizer state split over data-parallel ranks", role=Role.PARALLELISM
    )
    overlap_grad_reduce: bool = key(
        False, "reduce gradients while the backward pass runs", role=Role.PARALLELISM, restart=Restart.RECORDED
    )
    overlap_param_gather: bool = key(
        False, "gather updated weights while the forward pass runs", role=Role.PARALLELISM, restart=Restart.RECORDED
    )
    # kernels and memory
    fused_kernels: bool = key(
        True,
        "Megatron's fused operations where this machine has them; nemo-advrm doctor lists them",
        role=Role.PARALLELISM,
        restart=Restart.RECORDED,
    )
    recompute: str = key(
        "none",
        "activations that are computed again in the backward pass",
        choices=("none", "selective", "full", "block"),
        role=Role.PARALLELISM,
        restart=Restart.RECORDED,
    )
    recompute_num_layers: int = key(
        1,
        "full: layers per recomputed unit; block: layers per stage that are recomputed",
        COUNT,
        role=Role.PARALLELISM,
        restart=Restart.RECORDED,
    )
    offload_reference: bool = key(
        False, "frozen models wait in CPU memory between uses", role=Role.PARALLELISM, restart=Restart.RECORDED
    )
    offload_optimizer_while_generating: bool = key(
        False,
        "optimizer state waits in CPU memory while responses are made",
        role=Role.PARALLELISM,
        restart=Restart.RECORDED,
    )
    # batches
    micro_batch_size: int = key(
        8, "most rows (pairs, responses) per microbatch", COUNT, role=Role.BATCHING, restart=Restart.RECORDED
    )
    micro_batch_tokens: int = key(
        8192,
        "most padded tokens per microbatch; one longer row is its own microbatch",
        COUNT,
        role=Role.BATCHING,
        restart=Restart.RECORDED,
    )
    global_batch_size: int = key(64, "rows per optimizer step over all data-parallel ranks", COUNT, role=Role.BATCHING)
    optim: OptimConfig = section(OptimConfig)


@dataclass
class PrecisionConfig:
    """Number formats; FP8 recipes need Transformer Engine."""

    name: str = key(
        "fp32",
        "number format of weights and matrix products",
        choices=("fp32", "bf16", "fp8_delayed", "fp8_current", "fp8_blockwise", "mxfp8"),
    )
    fp8_params: bool = key(False, "keep the weights of linear layers in FP8 instead of casting them at each use")
    bf16_first_last_layers: int = key(0, "layers at each end of an FP8 model that stay in bf16", NOT_NEGATIVE)


@dataclass
class PretrainedConfig:
    """What training starts from."""

    restore_from_path: str = key("", "checkpoint directory the weights come from")
