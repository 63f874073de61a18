"""The configuration schema: every key that exists, its type, its default and what it does.

The YAML files under ``conf/`` only give values to these keys. A key that is not here is an error
that names the nearest one (see :mod:`nemo_advrm.config`). Keys that NeMo and NeMo-Aligner users
know keep their names (``trainer.devices``, ``model.tensor_model_parallel_size``, ``model.optim``).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass
class TrainerConfig:
    """How long to train and on what; the NeMo / Lightning names."""

    devices: int = 1  # processes per node
    num_nodes: int = 1  # above 1 the command is started on every node, with torchrun or srun
    accelerator: str = "auto"  # auto | cpu | gpu
    cpu_threads: int = 0  # threads of a process on a CPU; 0 leaves it to PyTorch (all cores)
    max_steps: int = -1  # optimizer steps; -1 leaves it to max_epochs
    max_epochs: int = 1  # passes over the training rows (ignored by RL stages)
    val_check_interval: int = 0  # steps between validations; 0 validates at the end only
    limit_val_batches: int = 0  # global batches per validation; 0 takes all
    log_every_n_steps: int = 10  # steps between lines on the console (metrics.jsonl has every step)
    gradient_clip_val: float = 1.0  # global gradient norm; 0 turns clipping off
    checkpoint_every_n_steps: int = 0  # 0 saves at the end only
    keep_checkpoints: int = 2  # newest checkpoints kept while training
    async_checkpoint: bool = False  # train on while a copy in host memory is written; docs/checkpoints.md
    verify_checkpoints: bool = True  # compare all files with their hashes before training goes on; false: sizes only
    timeout_minutes: float = 30.0  # longest wait for another process; then the job ends and names it
    memory_snapshot: bool = False  # record allocations on a GPU, for a snapshot of them when its memory runs out


@dataclass
class ScheduleConfig:
    """Learning-rate schedule: linear warm-up, then constant or cosine to ``min_lr``."""

    name: str = "CosineAnnealing"  # CosineAnnealing | constant
    warmup_steps: int = 0
    min_lr: float = 0.0


@dataclass
class OptimConfig:
    """Megatron-Core optimizer."""

    name: str = "adam"  # adam (decoupled weight decay) | sgd
    lr: float = 1.0e-5
    weight_decay: float = 0.01
    betas: list[float] = field(default_factory=lambda: [0.9, 0.98])
    eps: float = 1.0e-8
    sched: ScheduleConfig = field(default_factory=ScheduleConfig)


@dataclass
class ModelConfig:
    """Transformer architecture, parallel layout and batch shape."""

    # architecture
    num_layers: int = 2
    hidden_size: int = 64
    ffn_hidden_size: int = 0  # 0 means 4 * hidden_size
    num_attention_heads: int = 4
    num_query_groups: int = 0  # 0 means num_attention_heads (no grouped-query attention)
    kv_channels: int = 0  # 0 means hidden_size / num_attention_heads
    normalization: str = "RMSNorm"  # RMSNorm | LayerNorm | rmsnorm1p | layernorm1p (1p: weights are stored minus one)
    layernorm_epsilon: float = 1.0e-5
    activation: str = "swiglu"  # swiglu | geglu | geglu_tanh | gelu | relu | squared_relu
    position_embedding_type: str = "rope"  # rope | learned_absolute
    rotary_base: float = 10000.0
    rotary_percent: float = 1.0
    rope_scaling: str = ""  # "" | llama3 (Llama 3.1: low frequencies are slowed down for longer contexts)
    rope_scaling_factor: float = 8.0  # how much the lowest frequencies are slowed down
    rope_scaling_low_freq_factor: float = 1.0  # wavelengths above original_context / this are fully slowed down
    rope_scaling_high_freq_factor: float = 4.0  # wavelengths below original_context / this stay
    rope_scaling_original_context: int = 8192  # tokens of context before the scaling
    sliding_window: int = 0  # keys that a query sees, itself included; 0 means all
    sliding_window_every: int = 1  # 1: the window is in every layer; 2: in layers 0, 2, 4, ... (Gemma 2)
    attention_softcap: float = 0.0  # bounds attention scores by c * tanh(score / c); 0 does not
    logit_softcap: float = 0.0  # bounds next-token logits in the same way
    query_scale: float = 0.0  # attention scores are multiplied by this ** -0.5; 0 means the size of a head
    embedding_scale: float = 1.0  # token embeddings are multiplied by it (Gemma: the root of hidden_size)
    post_norms: bool = False  # norms after attention and after the MLP too (Gemma 2)
    bias: bool = False  # biases in all linear layers
    qkv_bias: bool = False  # biases in the query/key/value projection only (Qwen2)
    qk_layernorm: bool = False  # normalise queries and keys (Qwen3)
    share_embeddings_and_output_weights: bool = True
    head_bias: bool = False  # the reward or value head has a bias (NeMo-Aligner's reward models have one)
    init_method_std: float = 0.02
    hidden_dropout: float = 0.0
    attention_dropout: float = 0.0
    encoder_seq_length: int = 2048  # longest sequence (prompt + response) in tokens
    tokenizer: str = "byte"  # byte | synthetic | hf:DIR
    vocab_size: int = 0  # 0 takes the tokenizer's
    make_vocab_size_divisible_by: int = 8  # the vocabulary is padded to this times the tensor parallel size
    # parallel layout
    tensor_model_parallel_size: int = 1
    pipeline_model_parallel_size: int = 1
    virtual_pipeline_model_parallel_size: int = 1  # model chunks per pipeline stage (interleaved schedule)
    num_layers_in_first_pipeline_stage: int = 0  # 0: as many as the others
    num_layers_in_last_pipeline_stage: int = 0  # 0: as many as the others
    context_parallel_size: int = 1  # ranks that share one sequence (docs/scale.md)
    sequence_parallel: bool = False
    use_distributed_optimizer: bool = False  # optimizer state split over data-parallel ranks
    overlap_grad_reduce: bool = False  # reduce gradients while the backward pass runs
    overlap_param_gather: bool = False  # gather updated weights while the forward pass runs
    # kernels and memory
    fused_kernels: bool = True  # Megatron's fused operations where this machine has them; nemo-advrm doctor lists them
    recompute: str = "none"  # none | selective | full | block
    recompute_num_layers: int = 1  # full: layers per recomputed unit; block: layers per stage that are recomputed
    offload_reference: bool = False  # frozen models wait in CPU memory between uses
    offload_optimizer_while_generating: bool = False  # optimizer state waits in CPU memory while responses are made
    # batches
    micro_batch_size: int = 8  # most rows (pairs, responses) per microbatch
    micro_batch_tokens: int = 8192  # most padded tokens per microbatch; one longer row is its own microbatch
    global_batch_size: int = 64  # rows per optimizer step over all data-parallel ranks
    optim: OptimConfig = field(default_factory=OptimConfig)


@dataclass
class PrecisionConfig:
    """Number formats; FP8 recipes need Transformer Engine."""

    name: str = "fp32"  # fp32 | bf16 | fp8_delayed | fp8_current | fp8_blockwise | mxfp8
    fp8_params: bool = False  # keep the weights of linear layers in FP8 instead of casting them at each use
    bf16_first_last_layers: int = 0  # layers at each end of an FP8 model that stay in bf16


@dataclass
class PretrainedConfig:
    restore_from_path: str = ""  # checkpoint directory the weights come from


@dataclass
class DataConfig:
    train_path: str = ""  # preference file (train_rm), text file (sft) or prompt file (attack, rlhf)
    validation_path: str = ""  # empty: a held-out part of train_path
    validation_fraction: float = 0.05
    prompts_path: str = ""  # prompts of attack and rlhf; empty: those of train_path
    held_out_prompts_path: str = ""  # prompts that are only evaluated on; of them those that training has are left out
    train_split: str = ""  # split of a train_path that has several; empty: train (docs/data.md)
    validation_split: str = ""  # split of validation_path, or of train_path if that is empty; empty: validation or test
    prompts_split: str = ""  # split of prompts_path; empty: train
    # auto | messages | transcript | prompt | text | nemo_aligner | best_of_n | two_responses | ranked | rated_list |
    # rated (docs/data.md)
    format: str = "auto"
    ignore_columns: list[str] = field(default_factory=list)  # content that is left out knowingly: columns, message keys
    on_bad_row: str = "error"  # error | skip (skips are counted and reported); also rows that a chat template refuses
    on_overlong: str = "error"  # error | skip | truncate_prompt (of pairs, SFT rows and prompts)
    limit_train_rows: int = 0  # 0 takes all


@dataclass
class RewardModelConfig:
    """Objective of reward-model training."""

    loss: str = "bt"  # bt | margin_bt | scaled_bt | regression
    centering_coefficient: float = 0.0  # c * (r_chosen + r_rejected)^2
    score_l2_coefficient: float = 0.0  # c * (r_chosen^2 + r_rejected^2) / 2
    head_init_std: float = 0.02
    num_attributes: int = 1  # outputs of the head (regression trains more than one)
    # of a frozen policy, weighed against the score and stored with the model: log_prob, prompt_gain; docs/hybrid.md
    reference_features: list[str] = field(default_factory=list)
    feature_policy: str = ""  # the frozen policy's directory; empty: pretrained_checkpoint.restore_from_path
    feature_prompts: int = 4  # fixed other prompts over which prompt_gain is averaged
    feature_share: float = 0.1  # share of the training pairs that fits the weights instead, without a bootstrap


@dataclass
class EnsembleConfig:
    """K reward models that differ by seed, data order and head initialisation."""

    size: int = 2
    bootstrap: bool = False  # each member trains on its own bootstrap sample
    own_trunk: bool = False  # with pipeline.sft: each member starts from an SFT policy of its own, RLHF from R_1's
    # reward sources, R_1 first: DIR, hf:DIR, nemo:FILE, DIR?attributes=W1,W2, DIR?reference_features=off,
    # http://HOST:PORT, triton+http://HOST:PORT/MODEL
    members: list[str] = field(default_factory=list)
    aggregate: str = "mean"  # mean | min | lcb | uwo | gap
    coefficient: float = 1.0  # of lcb (std) and uwo (variance)
    standardise: bool = True  # bring several members to one scale before they are combined (rlhf, serve, evaluate)
    reference_path: str = ""  # reference.jsonl of the same members, to standardise by; empty: rlhf samples its own


@dataclass
class RemoteConfig:
    """Requests to reward servers."""

    timeout_seconds: float = 60.0  # of one request
    deadline_seconds: float = 300.0  # of one scoring with all its retries; less than trainer.timeout_minutes
    connect_seconds: float = 30.0  # that a server may take to become ready when a stage starts
    connections: int = 8  # requests under way at once
    rows_per_request: int = 64
    token_file: str = ""  # file of the bearer token; empty: the environment variable NEMO_ADVRM_TOKEN


@dataclass
class SFTStatisticsConfig:
    """SFT samples behind T_k(x), s_k and Z(U)."""

    num_prompts: int = 512
    samples_per_prompt: int = 6


@dataclass
class AdversarialConfig:
    """Adversarial reward."""

    preset: str = "paper"  # paper (z-scored, per prompt) | raw (constants on raw scores)
    coefficient: float = 1.5  # lambda of the paper preset; 0: the adversary maximises the target alone
    penalty: float = -4.0  # reward of the paper preset where R_1 <= T_1(x)
    raw_penalty: float = -25.0  # added by the raw preset where R_1 < min_target_score
    target_weight: float = 1.0  # of the target's score in the raw preset
    others_weight: float = 1.0  # of the other members' mean score in the raw preset
    min_target_score: float = -3.0  # raw preset: the others count above this score of the target only
    target_members: list[int] = field(default_factory=lambda: [1])  # members attacked in turn, 1 is R_1
    num_adversaries: int = 1  # adversaries per target member, which differ by seed and so in what they find
    enough: int = 0  # different finds of a direction in selection.last_fraction at which its attack ends; 0: never
    held_out_prompts: int = 0  # prompts beside the attack's own, on which finished adversaries are measured; 0: none


@dataclass
class KLConfig:
    coefficient: float = 0.01
    estimator: str = "abs"  # abs | k1 | k2 | k3


@dataclass
class RLConfig:
    """Policy optimisation."""

    algorithm: str = "rloo"  # rloo | reinforce | grpo | ppo
    rollout_engine: str = "megatron"  # what writes the responses: megatron | python:MODULE:CLASS
    max_steps: int = 100
    prompts_per_step: int = 32
    group_size: int = 4  # rollouts per prompt
    max_new_tokens: int = 256
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    kl: KLConfig = field(default_factory=KLConfig)
    entropy_coefficient: float = 0.0
    # reward of a response that does not end within max_new_tokens; null: just below the batch's lowest of ended ones
    unended_penalty: float | None = None  # in the reward's own units (paper: z, raw: scores); null suits all of them
    apply_unended_penalty: bool = True
    scale_advantages: bool = True  # divide advantages by their batch standard deviation (ppo: whiten; not grpo)
    baseline: str = "batch_mean"  # of reinforce: none | batch_mean
    updates_per_rollout: int = 1  # optimizer steps on one batch of rollouts; the loss of more than one is clipped
    clip_low: float = 0.2  # of ppo and grpo, and of all others with more than one update per rollout
    clip_high: float = 0.2
    gamma: float = 1.0
    gae_lambda: float = 0.95
    value_clip: float = 0.2
    critic_lr: float = 1.0e-5
    critic_warmup_steps: int = 0  # steps that train the critic alone
    evaluation_every: int = 1  # steps between evaluations of gold and of the samples that are kept
    held_out_prompts: int = 0  # fixed prompts, and random numbers, on which rlhf evaluates the policy; 0: none
    held_out_every: int = 10  # steps between these evaluations
    log_samples: int = 4  # samples kept per step in samples.jsonl


@dataclass
class SelectionConfig:
    """Which adversarial samples become rejected responses."""

    last_fraction: float = 1.0  # share of the attack's steps, counted from the end, whose samples are looked at
    threshold_z: float = 1.96  # of Z(U); of the target's z where the adversary maximises the target alone
    require_others_negative: bool = False  # also z_k < 0 for the other members
    require_ended: bool = True  # drop adversarial responses that rl.max_new_tokens cut off (SFT ones are never chosen)
    top_fraction: float = 1.0  # part with the largest Z(U) from which pairs are drawn
    random_within_top: bool = False  # draw at random within that part instead of by rank
    per_prompt: int = 4
    per_signature: int = 1  # near duplicates kept per signature
    max_pairs: int = 1000  # per round and direction
    # SFT response to the same prompt: the one that all members like best, any, or the one that the others like best
    chosen: str = "best"  # best (largest mean of z) | random | other (largest mean of z without the target's)
    null_ratio: float = 0.0  # a direction with fewer finds than this times the null count gives no pairs; 0: any does
    min_pairs: int = 1  # a round with fewer pairs ends the pipeline


@dataclass
class AugmentationConfig:
    """How adversarial pairs join the preference data."""

    mode: str = "append"  # append (one pass over both) | mix (a set share of every batch) | on_top (beside the batch)
    ratio: float = 0.2  # share of adversarial pairs in a batch (mix)
    pairs_per_step: int = 16  # adversarial pairs that join every batch, which stays as it is (on_top)
    weight: float = 1.0  # loss weight of adversarial pairs
    pairs_path: str = ""  # pair store(s), comma separated
    warm_steps: int = 0  # steps of retraining from the member of the round before; 0: anew from the policy's trunk
    warm_lr: float = 0.0  # learning rate of these steps; 0 takes model.optim.lr


@dataclass
class BranchConfig:
    """A variant of the hardening: the same members of round 0, attacked and retrained in another way."""

    pairs: str = "attack"  # that retraining adds: attack | none | random (as many as the main rounds selected)
    rounds: int = 1
    coefficient: float | None = None  # lambda of its attacks; null: adversarial.coefficient
    plain_members: list[int] = field(default_factory=list)  # as pipeline.plain_members
    own_trunk: bool = False  # members after the first start from SFT policies of their own


@dataclass
class RLHFRunConfig:
    """One arm of the pipeline: RLHF on one reward."""

    reward: str = "r1"  # r1 | ensemble (uses aggregate) | hardened
    aggregate: str = "mean"
    coefficient: float = 1.0
    branch: str = ""  # whose members are the reward: a name of pipeline.branches; empty: the main rounds
    round: int | None = None  # of the members; null: the last one for hardened, 0 for the others
    kl: float | None = None  # coefficient of the KL penalty; null: rl.kl.coefficient
    reference_features: bool = True  # use the members' reference features, where they have them
    standardise: bool = False  # also bring one member alone to z-scores: one scale for the KL penalty of all arms
    seeds: int = 0  # RLHF runs of this arm; 0: pipeline.rlhf_seeds


@dataclass
class PipelineConfig:
    rounds: int = 2
    sft: bool = False  # train the SFT policy first
    jobs: str = "auto"  # processes that take steps side by side: a number, or auto (cores / trainer.cpu_threads, GPUs)
    only: str = ""  # run this one stage (a name that nemo-advrm stages prints) when those before it are complete
    stop_success_rate: float = 0.0  # stop when attack success falls below this
    gold: str = ""  # gold reward used to label and evaluate: synthetic
    stable_window: int = 5  # evaluations in the smoothing window of gold
    stable_tolerance: float = 0.1
    plain_members: list[int] = field(default_factory=list)  # members that attacks see without their reference features
    branches: dict[str, BranchConfig] = field(default_factory=dict)
    rlhf: dict[str, RLHFRunConfig] = field(default_factory=dict)
    rlhf_seeds: int = 1  # RLHF runs of each arm; run i meets the same prompts and random numbers in all arms
    best_of_n: bool = False  # also judge best-of-n by the reward of every arm, on shared samples
    # arm of whose final responses, where R_1 likes them, the share is measured that the other members do not like
    room: str = ""  # a name of pipeline.rlhf; empty: none


@dataclass
class EvaluateConfig:
    """The stage ``evaluate``."""

    mismatch: bool = True  # also score the good answers of other prompts: does the model read the prompt?


@dataclass
class BestOfNConfig:
    """Best-of-n: responses of the policy to fixed held-out prompts, the best of n by a reward."""

    prompts: int = 64
    samples: int = 256  # responses to each prompt, and the largest n
    name: str = "reward"  # of the reward, in best_of_n/NAME.json
    samples_path: str = ""  # samples.jsonl of an earlier run, judged again by other members; empty: sample


@dataclass
class ReportConfig:
    """The report of runs."""

    kl: float = 10.0  # nats per response at which the gold of RLHF runs is compared
    study_path: str = ""  # results of a study (JSON lines), shown beside the figures of the run
    runs: list[str] = field(default_factory=list)  # run directories that one report joins: nemo-advrm report RUN RUN


@dataclass
class ServeConfig:
    """The reward server."""

    reward: str = "ensemble"  # ensemble (ensemble.aggregate of the members) | adversarial (needs a reference)
    reference_path: str = ""  # reference.jsonl of an attack on the same members; empty: ensemble.reference_path
    host: str = "127.0.0.1"  # a public address needs a token
    port: int = 8000  # 0 takes a free one; the address is written to run_dir/server.json
    triton_port: int = 0  # of NVIDIA's Triton beside it, by PyTriton (5555: where NeMo-Aligner looks); 0: none
    triton_python: str = ""  # Python of the environment that has nvidia-pytriton; empty: this one
    name: str = "reward_model"  # of the model, in KServe's addresses
    token_file: str = ""  # file of the bearer token; empty: the environment variable NEMO_ADVRM_TOKEN, if set
    batch_tokens: int = 16384  # most tokens scored at once, over all requests
    batch_wait_ms: float = 2.0  # that a request waits for others to join its batch
    queue_tokens: int = 1048576  # waiting tokens above which requests are answered 429
    max_samples: int = 1024  # per request
    max_sample_tokens: int = 0  # longest sample; 0 takes what the models allow (model.encoder_seq_length)
    max_sample_chars: int = 1048576  # of a sample's texts together
    max_body_mib: float = 8.0  # of one request
    max_pending_mib: float = 256.0  # bodies of all requests under way, above which larger ones are answered 429
    max_connections: int = 1024  # at once; more are answered 429
    header_seconds: float = 10.0  # that the headers of a request may take to arrive
    body_seconds: float = 30.0  # that its body may take, and a client to take its answer
    idle_seconds: float = 60.0  # that a connection may wait for its next request
    timeout_seconds: float = 120.0  # that a request may wait for its scores
    drain_seconds: float = 30.0  # that running requests get to finish after TERM


@dataclass
class SyntheticConfig:
    """The embedded language's data: what its writers and its annotators do (nemo_advrm/synthetic)."""

    sft_rows: int = 20000
    preference_pairs: int = 40000  # of each member of the ensemble
    validation_pairs: int = 1000  # labelled by gold
    prompts: int = 4096
    flip_probability: float = 0.03  # of a label
    min_margin: float = 1.5  # gold units; annotators leave out pairs that are nearer to each other
    other_prompt: float = 0.3  # share of the pairs whose second response answers another prompt
    other_topic: float = 0.25  # share of the pairs whose second response is the first one with a topic replaced
    gross_faults: float = 0.2  # share of the responses with repetitions or random words
    flourished: float = 0.16  # share of the responses with a flourish or two
    sft_flourished: float = 0.5  # of the SFT corpus, with one
    taste: float = 3.5  # gold units that a favourite flourish of theirs is worth to a member's annotators


@dataclass
class StageConfig:
    """Settings of one stage, laid over the root: any root key may stand here."""

    sft: dict[str, Any] = field(default_factory=dict)
    train_rm: dict[str, Any] = field(default_factory=dict)
    attack: dict[str, Any] = field(default_factory=dict)
    rlhf: dict[str, Any] = field(default_factory=dict)


@dataclass
class PlanConfig:
    """What ``nemo-advrm plan`` assumes of the machine and the job."""

    stage: str = "train_rm"  # sft | train_rm | attack | rlhf
    gpu: str = "h100"  # a100_40 | a100_80 | h100 | h200 | b200 | rtx4090
    gpus: int = 0  # GPUs of the job; 0 takes trainer.devices * trainer.num_nodes
    efficiency: float = 0.5  # share of the GPU's peak that its matrix products reach
    reserve_gib: float = 4.0  # memory per GPU kept for CUDA, NCCL and fragmentation
    search: bool = False  # look for the fastest layout that fits


@dataclass
class ExpManagerConfig:
    """Loggers of NeMo's exp_manager; files go to the stage's directory."""

    create_tensorboard_logger: bool = True
    create_wandb_logger: bool = False
    wandb_logger_kwargs: dict[str, Any] = field(default_factory=dict)
    create_mlflow_logger: bool = False
    mlflow_logger_kwargs: dict[str, Any] = field(default_factory=dict)


@dataclass
class Config:
    """Root of the configuration."""

    name: str = "advrm"
    seed: int = 0
    run_dir: str = "runs/${name}"
    trainer: TrainerConfig = field(default_factory=TrainerConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    precision: PrecisionConfig = field(default_factory=PrecisionConfig)
    pretrained_checkpoint: PretrainedConfig = field(default_factory=PretrainedConfig)
    data: DataConfig = field(default_factory=DataConfig)
    reward_model: RewardModelConfig = field(default_factory=RewardModelConfig)
    ensemble: EnsembleConfig = field(default_factory=EnsembleConfig)
    remote: RemoteConfig = field(default_factory=RemoteConfig)
    sft_statistics: SFTStatisticsConfig = field(default_factory=SFTStatisticsConfig)
    adversarial: AdversarialConfig = field(default_factory=AdversarialConfig)
    rl: RLConfig = field(default_factory=RLConfig)
    selection: SelectionConfig = field(default_factory=SelectionConfig)
    augmentation: AugmentationConfig = field(default_factory=AugmentationConfig)
    pipeline: PipelineConfig = field(default_factory=PipelineConfig)
    synthetic: SyntheticConfig = field(default_factory=SyntheticConfig)
    evaluate: EvaluateConfig = field(default_factory=EvaluateConfig)
    best_of_n: BestOfNConfig = field(default_factory=BestOfNConfig)
    report: ReportConfig = field(default_factory=ReportConfig)
    serve: ServeConfig = field(default_factory=ServeConfig)
    plan: PlanConfig = field(default_factory=PlanConfig)
    stage: StageConfig = field(default_factory=StageConfig)
    exp_manager: ExpManagerConfig = field(default_factory=ExpManagerConfig)


@dataclass
class ConvertConfig:
    """Settings of ``nemo-advrm convert``, which reads no configuration files; the last underscore is not typed."""

    from_: str = ""  # format of the source: hf | megatron | nemo
    path: str = ""  # checkpoint directory, .gguf file or .nemo file to convert
    to: str = ""  # format to write: megatron | hf | nemo
    out: str = ""  # where to write; must not exist
    dtype: str = ""  # fp32 | bf16 | fp16; empty keeps the source's
    tokenizer: str = ""  # directory of the tokenizer, where the source has none or another one counts
    architecture: str = ""  # to=hf: Llama, Mistral, ...; empty takes the one it came from, or the first that fits
    max_shard_size: str = "5GB"  # to=hf: largest file of weights
    drop_reference_features: bool = False  # of a hybrid reward model convert the plain one, without its features
    drop_head_bias: bool = False  # to=hf: leave out a reward head's bias (scores shift by a constant)
    card: str = ""  # to=hf: JSON file for the model card: base_model, data, rounds, reference_mean, reference_std
    tensor_model_parallel_size: int = 1  # to=megatron: pads the vocabulary; checked to divide the model
    pipeline_model_parallel_size: int = 1  # checked to divide the layers; a checkpoint opens at any layout
    dry_run: bool = False  # print the mapping and the sizes, write nothing (also --dry-run)


@dataclass
class ExportPairsConfig:
    """Settings of ``nemo-advrm export_pairs``, which reads no configuration files; the last underscore is not typed."""

    pairs: str = ""  # pairs.jsonl of `nemo-advrm select`; several separated by commas
    out: str = ""  # file to write; must not exist
    template: str = ""  # transcript | extra_id | hf:DIR (a tokenizer's) | plain (the prompts are text already)
    end: str = ""  # text behind every answer; empty takes the template's own, which only extra_id has
    with_: str = ""  # NeMo-Aligner jsonl whose lines come first, as they are
    shuffle: bool = False  # mix the pairs of both; chosen and rejected lines stay together
    seed: int = 0  # of shuffle
    reward_model_type: str = "binary_ranking"  # of NeMo-Aligner: binary_ranking | regression (lines with a label)
    chosen_label: str = ""  # regression: a number for each attribute, as in 4,4,-100
    rejected_label: str = ""  # regression: the same of the adversarial answers
