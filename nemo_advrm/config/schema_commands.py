"""Schema of single commands: evaluation, report, server, plan, conversion and export."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from nemo_advrm.config.fields import COUNT, NOT_NEGATIVE, PORT, POSITIVE, Range, free, key

FORMATS = ("", "hf", "megatron", "nemo", "bridge", "peft")  # of checkpoints; empty is refused with what is missing


@dataclass
class EvaluateConfig:
    """The stage ``evaluate``."""

    mismatch: bool = key(True, "also score the good answers of other prompts: does the model read the prompt?")
    benchmark: str = key(
        "auto",
        "benchmark whose file is evaluated, with its authors' table (docs/evaluate.md)",
        choices={
            "auto": "by its columns",
            "none": "pairs",
            "reward_bench": "",
            "reward_bench_2": "",
            "rm_bench": "",
            "judge_bench": "",
            "ppe_human": "",
            "ppe_correctness": "",
        },
    )
    compare: bool = key(False, "compare each member with the first one on the same rows: differences with intervals")
    subset_column: str = key(
        "", "column of pairs that names a row's subset; empty: subset, domain or category, if it has few values"
    )
    draws: int = key(1000, "bootstrap samples of the prompts behind an interval", Range(at_least=100))
    pairwise: bool = key(False, "judges see both answers of a pair, in both orders, instead of one (docs/judges.md)")


@dataclass
class BestOfNConfig:
    """Best-of-n: responses of the policy to fixed held-out prompts, the best of n by a reward."""

    prompts: int = key(64, "held-out prompts", COUNT)
    samples: int = key(256, "responses to each prompt, and the largest n", COUNT)
    name: str = free("reward", "name of the reward, in best_of_n/NAME.json")
    samples_path: str = key("", "samples.jsonl of an earlier run, judged again by other members; empty: sample")


@dataclass
class ReportConfig:
    """The report of runs."""

    kl: float = key(10.0, "nats per response at which the gold of RLHF runs is compared", POSITIVE)
    study_path: str = key("", "results of a study (JSON lines), shown beside the figures of the run")
    runs: list[str] = key([], "run directories that one report joins: nemo-advrm report RUN RUN")


@dataclass
class ServeConfig:
    """The reward server."""

    reward: str = key(
        "ensemble",
        "reward that is served",
        choices={"ensemble": "ensemble.aggregate of the members", "adversarial": "needs a reference"},
    )
    reference_path: str = key("", "reference.jsonl of an attack on the same members; empty: ensemble.reference_path")
    host: str = key("127.0.0.1", "address; a public one needs a token")
    port: int = key(8000, "port; 0 takes a free one, which is written to run_dir/server.json", PORT)
    name: str = key("reward_model", "name of the model in KServe's addresses")
    token_file: str = key("", "file of the bearer token; empty: the environment variable NEMO_ADVRM_TOKEN, if set")
    batch_tokens: int = key(16384, "most tokens scored at once, over all requests", COUNT)
    batch_wait_ms: float = key(2.0, "how long a request waits for others to join its batch", NOT_NEGATIVE)
    queue_tokens: int = key(1048576, "waiting tokens above which requests are answered 429", COUNT)
    max_samples: int = key(1024, "samples of one request", COUNT)
    max_sample_tokens: int = key(
        0, "longest sample; 0 takes what the models allow (model.encoder_seq_length)", NOT_NEGATIVE
    )
    max_sample_chars: int = key(1048576, "characters of a sample's texts together", COUNT)
    max_body_mib: float = key(8.0, "size of one request", POSITIVE)
    max_pending_mib: float = key(
        256.0, "bodies of all requests under way, above which larger ones are answered 429", POSITIVE
    )
    max_connections: int = key(1024, "connections at once; more are answered 429", COUNT)
    header_seconds: float = key(10.0, "limit for the headers of a request to arrive", POSITIVE)
    body_seconds: float = key(
        30.0, "limit for the body of a request to arrive, and for a client to take its answer", POSITIVE
    )
    idle_seconds: float = key(60.0, "limit for the next request of a connection", POSITIVE)
    timeout_seconds: float = key(120.0, "limit for a request to get its scores", POSITIVE)
    drain_seconds: float = key(30.0, "time that running requests get to finish after TERM", NOT_NEGATIVE)


@dataclass
class StageConfig:
    """Settings of one stage, laid over the root: any root key may stand here."""

    sft: dict[str, Any] = key({}, "settings of sft")
    train_rm: dict[str, Any] = key({}, "settings of train_rm")
    attack: dict[str, Any] = key({}, "settings of attack")
    rlhf: dict[str, Any] = key({}, "settings of rlhf")


@dataclass
class PlanConfig:
    """What ``nemo-advrm plan`` assumes of the machine and the job."""

    stage: str = key("train_rm", "command that is planned", choices=("sft", "train_rm", "attack", "rlhf"))
    gpu: str = key("h100", "kind of GPU", choices=("a100_40", "a100_80", "h100", "h200", "b200", "rtx4090"))
    gpus: int = key(0, "GPUs of the job; 0 takes trainer.devices * trainer.num_nodes", NOT_NEGATIVE)
    efficiency: float = key(
        0.0,
        "share of the GPU's peak that matrix products reach; 0: as measured on one H200 by width and number format",
        Range(at_least=0, at_most=1),
    )
    reserve_gib: float = key(4.0, "memory per GPU kept for CUDA, NCCL and fragmentation", NOT_NEGATIVE)
    search: bool = key(False, "look for the fastest layout that fits")


@dataclass
class ExpManagerConfig:
    """Loggers of NeMo's exp_manager; files go to the stage's directory."""

    create_tensorboard_logger: bool = key(True, "write TensorBoard files")
    create_wandb_logger: bool = key(False, "log to Weights & Biases")
    wandb_logger_kwargs: dict[str, Any] = key({}, "arguments of Lightning's WandbLogger")
    create_mlflow_logger: bool = key(False, "log to MLflow")
    mlflow_logger_kwargs: dict[str, Any] = key({}, "arguments of Lightning's MLFlowLogger")


@dataclass
class ConvertConfig:
    """Settings of ``nemo-advrm convert``, which reads no configuration files; the last underscore is not typed."""

    from_: str = key("", "format of the source", choices=FORMATS)
    path: str = key("", "checkpoint directory (DIR?head=2: one of its members), .gguf or .nemo file")
    base: str = key(
        "",
        "from=peft: checkpoint of this package that the adapters belong to; to=peft: the Hugging Face model that "
        "adapter_config.json names, empty takes the one that the base was converted from",
    )
    average: list[str] = key([], "instead of path: fine-tunings of one model, whose weights are averaged (WARM)")
    to: str = key("", "format to write", choices=FORMATS)
    out: str = key("", "where to write; must not exist")
    dtype: str = key("", "number format to write; empty keeps the source's", choices=("", "fp32", "bf16", "fp16"))
    tokenizer: str = key("", "directory of the tokenizer, where the source has none or another one counts")
    architecture: str = key("", "to=hf: Llama, Mistral, ...; empty takes the one it came from, or the first that fits")
    max_shard_size: str = key("5GB", "to=hf: largest file of weights")
    drop_reference_features: bool = key(False, "of a hybrid reward model convert the plain one, without its features")
    drop_head_bias: bool = key(False, "to=hf: leave out a reward head's bias (scores shift by a constant)")
    card: str = key("", "to=hf: JSON file for the model card: base_model, data, rounds, reference_mean, reference_std")
    tensor_model_parallel_size: int = key(1, "to=megatron: pads the vocabulary; checked to divide the model", COUNT)
    pipeline_model_parallel_size: int = key(1, "checked to divide the layers; a checkpoint opens at any layout", COUNT)
    dry_run: bool = key(False, "print the mapping and the sizes, write nothing")


@dataclass
class ExportPairsConfig:
    """Settings of ``nemo-advrm export_pairs``, which reads no configuration files; the last underscore is not typed."""

    pairs: str = key("", "pairs.jsonl of `nemo-advrm select`; several separated by commas")
    out: str = key("", "file to write; must not exist")
    template: str = key("", "transcript | extra_id | hf:DIR (a tokenizer's) | plain (the prompts are text already)")
    end: str = key("", "text behind every answer; empty takes the template's own, which only extra_id has")
    with_: str = key("", "NeMo-Aligner jsonl whose lines come first, as they are")
    shuffle: bool = key(False, "mix the pairs of both; chosen and rejected lines stay together")
    seed: int = key(0, "seed of shuffle", NOT_NEGATIVE)
    reward_model_type: str = key(
        "binary_ranking",
        "kind of reward model in NeMo-Aligner",
        choices={"binary_ranking": "", "regression": "lines with a label"},
    )
    chosen_label: str = key("", "regression: a number for each attribute, as in 4,4,-100")
    rejected_label: str = key("", "regression: the same of the adversarial answers")
