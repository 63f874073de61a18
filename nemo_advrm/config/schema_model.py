"""Schema of the model, its optimizer, number format and training job."""

from __future__ import annotations

from dataclasses import dataclass

from nemo_advrm.config.fields import (
    BELOW_ONE,
    COUNT,
    NOT_NEGATIVE,
    POSITIVE,
    Range,
    Restart,
    Role,
    architecture,
    free,
    key,
    layout,
    optimizer,
    section,
)


@dataclass
class TrainerConfig:
    """How long to train and on what; the NeMo / Lightning names."""

    devices: int = free(1, "processes per node", COUNT)
    num_nodes: int = free(1, "nodes; above 1 start the command on every node, with torchrun or srun", COUNT)
    accelerator: str = free("auto", "what it runs on", choices=("auto", "cpu", "gpu"))
    cpu_threads: int = key(0, "threads of a process on a CPU; 0 leaves it to PyTorch (all cores)", NOT_NEGATIVE)
    max_steps: int = key(-1, "optimizer steps; -1 leaves it to max_epochs", Range(at_least=-1))
    max_epochs: int = key(1, "passes over the training rows (ignored by RL stages)", COUNT)
    val_check_interval: int = free(0, "steps between validations; 0 validates at the end only", NOT_NEGATIVE)
    limit_val_batches: int = key(0, "global batches per validation; 0 takes all", NOT_NEGATIVE)
    log_every_n_steps: int = free(10, "steps between lines on the console (metrics.jsonl has every step)", COUNT)
    gradient_clip_val: float = optimizer(1.0, "largest global gradient norm; 0 turns clipping off", NOT_NEGATIVE)
    checkpoint_every_n_steps: int = free(0, "steps between checkpoints; 0 saves at the end only", NOT_NEGATIVE)
    keep_checkpoints: int = free(2, "newest checkpoints kept while training", COUNT)
    async_checkpoint: bool = free(False, "train on while a copy in host memory is written; docs/checkpoints.md")
    verify_checkpoints: bool = free(
        False, "hash weights when they are saved and before training continues; false: only small files, and sizes"
    )
    timeout_minutes: float = free(30.0, "longest wait for another process; then the job ends and names it", POSITIVE)
    memory_snapshot: bool = free(False, "record allocations on a GPU, for a snapshot of them when its memory runs out")


@dataclass
class ScheduleConfig:
    """Learning-rate schedule: linear warm-up, then constant or cosine to ``min_lr``."""

    name: str = optimizer("CosineAnnealing", "learning rate after the warm-up", choices=("CosineAnnealing", "constant"))
    warmup_steps: int = optimizer(0, "steps of linear warm-up", NOT_NEGATIVE)
    min_lr: float = optimizer(0.0, "learning rate at the end of the cosine", NOT_NEGATIVE)


@dataclass
class OptimConfig:
    """Megatron-Core optimizer."""

    name: str = optimizer("adam", "optimizer", choices={"adam": "decoupled weight decay", "sgd": ""})
    lr: float = optimizer(1.0e-5, "peak learning rate", POSITIVE)
    weight_decay: float = optimizer(0.01, "decoupled weight decay", NOT_NEGATIVE)
    betas: list[float] = optimizer([0.9, 0.98], "Adam's two averaging factors", BELOW_ONE)
    eps: float = optimizer(1.0e-8, "Adam's epsilon", POSITIVE)
    sched: ScheduleConfig = section(ScheduleConfig)


@dataclass
class LoraConfig:
    """Low-rank adapters of ``model.peft=lora``."""

    rank: int = key(16, "rows of an adapter's first matrix, columns of its second", COUNT)
    alpha: float = key(32.0, "what an adapter adds is multiplied by alpha / rank", POSITIVE)
    dropout: float = key(0.0, "dropout of what an adapter reads, while it is trained", BELOW_ONE)
    targets: list[str] = key(
        ["linear_qkv", "linear_proj", "linear_fc1", "linear_fc2"],
        "linear layers that have an adapter",
        choices={
            "linear_qkv": "queries, keys and values",
            "linear_proj": "output of attention",
            "linear_fc1": "first matrix of the MLP",
            "linear_fc2": "second one",
        },
    )


@dataclass
class ModelConfig:
    """Transformer architecture, parallel layout and batch shape."""

    # architecture
    num_layers: int = architecture(2, "transformer layers", COUNT)
    hidden_size: int = architecture(64, "width of the residual stream", COUNT)
    ffn_hidden_size: int = architecture(0, "width of the MLP; 0 takes 4 * hidden_size", NOT_NEGATIVE)
    num_attention_heads: int = architecture(4, "query heads", COUNT)
    num_query_groups: int = architecture(
        0, "key and value heads; 0 takes num_attention_heads (no grouped-query attention)", NOT_NEGATIVE
    )
    kv_channels: int = architecture(0, "size of a head; 0 takes hidden_size / num_attention_heads", NOT_NEGATIVE)
    normalization: str = architecture(
        "RMSNorm",
        "kind of norm",
        choices={"RMSNorm": "", "LayerNorm": "", "rmsnorm1p": "", "layernorm1p": "1p: weights are stored minus one"},
    )
    layernorm_epsilon: float = architecture(1.0e-5, "added to the variance in norms", POSITIVE)
    activation: str = architecture(
        "swiglu", "of the MLP", choices=("swiglu", "geglu", "geglu_tanh", "gelu", "relu", "squared_relu")
    )
    position_embedding_type: str = architecture("rope", "how positions enter", choices=("rope", "learned_absolute"))
    rotary_base: float = architecture(10000.0, "base of the rotary frequencies", POSITIVE)
    rotary_percent: float = architecture(1.0, "share of a head's channels that is rotated", Range(above=0, at_most=1))
    rope_scaling: str = architecture(
        "",
        "how rotary frequencies are scaled for longer contexts",
        choices={"": "", "llama3": "Llama 3.1: low frequencies are slowed down for longer contexts"},
    )
    rope_scaling_factor: float = architecture(8.0, "how much the lowest frequencies are slowed down", COUNT)
    rope_scaling_low_freq_factor: float = architecture(
        1.0, "wavelengths above rope_scaling_original_context / this are fully slowed down", POSITIVE
    )
    rope_scaling_high_freq_factor: float = architecture(
        4.0, "wavelengths below rope_scaling_original_context / this stay", POSITIVE
    )
    rope_scaling_original_context: int = architecture(8192, "tokens of context before the scaling", COUNT)
    sliding_window: int = architecture(0, "keys that a query sees, itself included; 0 means all", NOT_NEGATIVE)
    sliding_window_every: int = architecture(
        1, "1: the window is in every layer; 2: in layers 0, 2, 4, ... (Gemma 2)", COUNT
    )
    attention_softcap: float = architecture(
        0.0, "bounds attention scores by c * tanh(score / c); 0 turns it off", NOT_NEGATIVE
    )
    logit_softcap: float = architecture(
        0.0, "bounds next-token logits by c * tanh(logit / c); 0 turns it off", NOT_NEGATIVE
    )
    query_scale: float = architecture(
        0.0, "attention scores are multiplied by this ** -0.5; 0 takes the size of a head", NOT_NEGATIVE
    )
    embedding_scale: float = architecture(
        1.0, "token embeddings are multiplied by it (Gemma: the root of hidden_size)", POSITIVE
    )
    post_norms: bool = architecture(False, "norms after attention and after the MLP too (Gemma 2)")
    bias: bool = architecture(False, "biases in all linear layers")
    qkv_bias: bool = architecture(False, "biases in the query/key/value projection only (Qwen2)")
    qk_layernorm: bool = architecture(False, "normalise queries and keys (Qwen3)")
    num_moe_experts: int = architecture(
        0, "experts of every layer's MLP, each of width ffn_hidden_size; 0: no mixture of experts", NOT_NEGATIVE
    )
    moe_router_topk: int = architecture(2, "experts that each token goes to", COUNT)
    moe_norm_topk_prob: bool = architecture(
        True, "weights of a token's experts sum to 1; false: they keep their shares of the softmax over all experts"
    )
    share_embeddings_and_output_weights: bool = architecture(True, "the output layer uses the embedding's weights")
    head_bias: bool = architecture(False, "the reward or value head has a bias (NeMo-Aligner's reward models have one)")
    init_method_std: float = key(0.02, "std of the initial weights", NOT_NEGATIVE)
    hidden_dropout: float = key(0.0, "dropout after attention and after the MLP", BELOW_ONE)
    attention_dropout: float = key(0.0, "dropout of attention weights", BELOW_ONE)
    encoder_seq_length: int = architecture(2048, "longest sequence (prompt + response) in tokens", COUNT)
    tokenizer: str = key("byte", "byte | synthetic | hf:DIR")
    vocab_size: int = key(0, "tokens; 0 takes the tokenizer's", NOT_NEGATIVE)
    make_vocab_size_divisible_by: int = key(
        8, "the vocabulary is padded to this times the tensor parallel size", COUNT, role=Role.PARALLELISM
    )
    # what is trained
    peft: str = key(
        "none",
        "which weights are trained",
        choices={"none": "all", "lora": "low-rank adapters, and a reward or value head; docs/scale.md"},
    )
    lora: LoraConfig = section(LoraConfig)
    # parallel layout
    tensor_model_parallel_size: int = layout(1, "ranks that share every layer", COUNT)
    pipeline_model_parallel_size: int = layout(1, "pipeline stages", COUNT)
    virtual_pipeline_model_parallel_size: int = layout(
        1, "model chunks per pipeline stage (interleaved schedule)", COUNT
    )
    num_layers_in_first_pipeline_stage: int = layout(
        0, "layers of the first pipeline stage; 0: as many as the others", NOT_NEGATIVE
    )
    num_layers_in_last_pipeline_stage: int = layout(
        0, "layers of the last pipeline stage; 0: as many as the others", NOT_NEGATIVE
    )
    context_parallel_size: int = layout(1, "ranks that share one sequence (docs/scale.md)", COUNT)
    expert_model_parallel_size: int = layout(
        1, "ranks that share the experts of a layer, out of tensor, context and data parallelism", COUNT
    )
    sequence_parallel: bool = layout(False, "tensor-parallel ranks also share the tokens of norms and dropout")
    use_distributed_optimizer: bool = key(
        False, "optimizer state split over data-parallel ranks", role=Role.PARALLELISM
    )
    overlap_grad_reduce: bool = layout(False, "reduce gradients while the backward pass runs")
    overlap_param_gather: bool = layout(False, "gather updated weights while the forward pass runs")
    # kernels and memory
    fused_kernels: bool = layout(
        True, "Megatron's fused operations where this machine has them; nemo-advrm doctor lists them"
    )
    recompute: str = layout(
        "none",
        "activations that are computed again in the backward pass",
        choices=("none", "selective", "full", "block"),
    )
    recompute_num_layers: int = layout(
        1, "full: layers per recomputed unit; block: layers per stage that are recomputed", COUNT
    )
    logits_chunk_size: int = layout(
        2**26,
        "most next-token logits (tokens x vocabulary / TP) at once for log-probabilities; more are made in "
        "chunks of tokens, and again in the backward pass",
        COUNT,
    )
    offload_reference: bool = layout(False, "frozen models wait in CPU memory between uses")
    offload_optimizer_while_generating: bool = layout(
        False, "optimizer state waits in CPU memory while responses are made"
    )
    # batches
    micro_batch_size: int = key(
        8,
        "most rows (pairs, responses) per microbatch; if they are packed, as many tokens as these have at full length",
        COUNT,
        role=Role.BATCHING,
        restart=Restart.RECORDED,
    )
    micro_batch_tokens: int = key(
        8192,
        "most tokens per microbatch, padding included; one longer row is its own microbatch",
        COUNT,
        role=Role.BATCHING,
        restart=Restart.RECORDED,
    )
    sequence_packing: str = layout(
        "auto",
        "sequences of a microbatch one after another in one row, instead of padded rows",
        choices={"auto": "on a GPU, where attention has a kernel for it; docs/scale.md", "always": "", "never": ""},
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
