"""Schema of preference data, reward models and the rewards made of them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from nemo_advrm.config.fields import COUNT, FINITE, FRACTION, NOT_NEGATIVE, POSITIVE, Range, free, key

AGGREGATES = ("mean", "min", "lcb", "uwo", "entropic", "gap")
REFERENCE_FEATURES = ("log_prob", "prompt_gain")

# the forms of nemo_advrm.data.preference_forms, of which a test checks that it has one of each name
PREFERENCE_FORMATS = (
    "auto",
    "best_of_n",
    "messages",
    "transcript",
    "prompt",
    "text",
    "two_responses",
    "ranked",
    "rated_list",
    "rated",
    "nemo_aligner",
)


@dataclass
class DataConfig:
    """Where rows and prompts come from, and which of them are used."""

    train_path: str = key("", "preference file (train_rm), text file (sft) or prompt file (attack, rlhf)")
    validation_path: str = key("", "empty: a held-out part of train_path")
    validation_fraction: float = key(
        0.05, "share of train_path that is held out where there is no validation data", Range(above=0, below=1)
    )
    prompts_path: str = key("", "prompts of attack and rlhf; empty: those of train_path")
    held_out_prompts_path: str = key(
        "", "prompts that are only evaluated on; of them those that training has are left out"
    )
    train_split: str = key("", "split of a train_path that has several; empty: train (docs/data.md)")
    validation_split: str = key(
        "", "split of validation_path, or of train_path if that is empty; empty: validation or test"
    )
    prompts_split: str = key("", "split of prompts_path; empty: train")
    format: str = key("auto", "form of the preference rows (docs/data.md)", choices=PREFERENCE_FORMATS)
    ignore_columns: list[str] = key([], "content that is left out knowingly: columns, message keys")
    on_bad_row: str = key(
        "error",
        "what happens at a row that cannot be used, or that a chat template refuses",
        choices={"error": "", "skip": "skips are counted and reported"},
    )
    on_overlong: str = key(
        "error",
        "what happens at a row longer than model.encoder_seq_length",
        choices={"error": "", "skip": "", "truncate_prompt": "of pairs, SFT rows and prompts"},
    )
    limit_train_rows: int = key(0, "training rows; 0 takes all", NOT_NEGATIVE)
    cache_dir: str | None = free(
        "",
        "directory of tokenised rows of large files, which runs may share (docs/data.md); empty: nemo_advrm/tokens in "
        "$XDG_CACHE_HOME or ~/.cache; null: every process keeps them in memory",
    )
    num_workers: int = free(
        0, "processes of a node that tokenise large files; 0: one for each processor, at most 16", NOT_NEGATIVE
    )


@dataclass
class RewardModelConfig:
    """Objective of reward-model training."""

    loss: str = key("bt", "bt, margin_bt, scaled_bt, regression (docs/method.md) or python:MODULE:NAME")
    centering_coefficient: float = key(0.0, "c of c * (r_chosen + r_rejected)^2", NOT_NEGATIVE)
    score_l2_coefficient: float = key(0.0, "c of c * (r_chosen^2 + r_rejected^2) / 2", NOT_NEGATIVE)
    head_init_std: float = key(0.02, "std of the head's initial weights", NOT_NEGATIVE)
    num_attributes: int = key(1, "outputs of the head (regression trains more than one)", COUNT)
    reference_features: list[str] = key(
        [],
        "features of a frozen policy, weighed against the score and stored with the model (docs/hybrid.md)",
        choices=REFERENCE_FEATURES,
    )
    feature_policy: str = key("", "the frozen policy's directory; empty: pretrained_checkpoint.restore_from_path")
    feature_prompts: int = key(4, "fixed other prompts over which prompt_gain is averaged", Range(at_least=2))
    feature_share: float = key(
        0.1, "share of the training pairs that fits the weights instead, without a bootstrap", Range(above=0, below=1)
    )
    feature_pairs: int = key(0, "of these pairs, how many fit the weights, evenly spread; 0: all", NOT_NEGATIVE)


@dataclass
class EnsembleConfig:
    """K reward models that differ by seed, data order and head initialisation."""

    size: int = key(2, "reward models", COUNT)
    share: str = key(
        "none",
        "what the members share (docs/scale.md)",
        choices={
            "none": "each is a model of its own",
            "lora": "each is adapters (model.lora) and a head on one base, trained in turn",
            "trunk": "size heads on one trunk, trained together",
        },
    )
    bootstrap: bool = key(False, "each member trains on its own bootstrap sample")
    own_trunk: bool = key(False, "with pipeline.sft: each member starts from an SFT policy of its own, RLHF from R_1's")
    members: list[str] = key(
        [],
        "reward sources, R_1 first: DIR, hf:DIR, nemo:FILE, DIR?attributes=W1,W2, DIR?head=2, "
        "DIR?reference_features=off, "
        "http://HOST:PORT, triton+http://HOST:PORT/MODEL, python:MODULE:FUNCTION, openai:URL#MODEL, human:FILE.csv",
    )
    aggregate: str = key("mean", "how members' rewards become one", choices=AGGREGATES)
    coefficient: float = key(1.0, "weight of the spread in lcb (std), uwo (variance); b of entropic", NOT_NEGATIVE)
    standardise: bool = key(True, "bring several members to one scale before they are combined (rlhf, serve, evaluate)")
    reference_path: str = key("", "reference.jsonl of the same members, to standardise by; empty: rlhf samples its own")


@dataclass
class RemoteConfig:
    """Requests to reward servers."""

    timeout_seconds: float = key(60.0, "limit of one request", POSITIVE)
    deadline_seconds: float = key(
        300.0, "limit of one scoring with all its retries; less than trainer.timeout_minutes", POSITIVE
    )
    connect_seconds: float = key(30.0, "limit of a server's start", POSITIVE)
    connections: int = key(8, "requests under way at once", COUNT)
    rows_per_request: int = key(64, "responses in one request", COUNT)
    token_file: str = key("", "file of the bearer token; empty: the environment variable NEMO_ADVRM_TOKEN")


@dataclass
class JudgeConfig:
    """Judges that read: a language model behind an OpenAI-compatible endpoint, or people (docs/judges.md)."""

    rubric: str = key("", "text file that says what a good response is; empty: one for helpful, true and clear answers")
    lowest: int = key(1, "lowest score of the scale", FINITE)
    highest: int = key(10, "highest score of the scale", FINITE)
    temperature: float = key(0.0, "temperature of the judge's answers", NOT_NEGATIVE)
    max_tokens: int = key(512, "longest answer of the judge, in tokens", COUNT)
    body: dict[str, Any] = key({}, "further fields of each request; null leaves a field out")
    tries: int = key(2, "times that a question is asked until its answer has a readable verdict", COUNT)
    on_no_answer: str = free(  # a run that stopped at such a response goes on with another value
        "error",
        "what happens to a response that the judge refused, or whose verdict cannot be read",
        choices={"error": "", "lowest": "it gets the lowest score, and is counted"},
    )
    key_variable: str = free("NEMO_ADVRM_JUDGE_KEY", "name of the environment variable that holds the endpoint's key")
    cache: str = free("", "file of the answers, which runs may share; empty: run_dir/judge/answers.jsonl")
    timeout_seconds: float = free(120.0, "limit of one request", POSITIVE)
    deadline_seconds: float = free(
        600.0, "limit of one judgement with its retries; less than trainer.timeout_minutes", POSITIVE
    )
    connect_seconds: float = free(30.0, "limit of the endpoint's start", POSITIVE)
    connections: int = free(8, "requests under way at once", COUNT)
    max_requests: int = free(0, "requests of one judge in one process, after which it stops; 0: no limit", NOT_NEGATIVE)


@dataclass
class PolicyServerConfig:
    """Requests to a policy behind an OpenAI-compatible endpoint (rl.rollout_engine=openai, docs/attacks.md)."""

    key_variable: str = free("NEMO_ADVRM_POLICY_KEY", "name of the environment variable that holds the endpoint's key")
    body: dict[str, Any] = key({}, "further fields of each request; null leaves a field out")
    policy: str = key(
        "",
        "the served policy openai:URL#MODEL from whose responses a local copy of it learns by RL, which "
        "pretrained_checkpoint.restore_from_path names; empty: no RL",
    )
    log_probs: str = key(
        "auto",
        "log-probabilities of what it sampled that the endpoint tells, where its tokens are ours; of others the start "
        "policy's stand in",
        choices={
            "auto": "asked for where rl.temperature=1, rl.top_p=1 and rl.top_k=0",
            "always": "the endpoint tells those of the distribution that it samples from",
            "never": "",
        },
    )
    importance: str = key(
        "token",
        "what the ratio of the trained and the served policy is of",
        choices={"token": "each token by its own", "response": "each token by that of its whole response"},
    )
    importance_cap: float = key(2.0, "largest such ratio that the loss is weighted by", Range(at_least=1))
    min_ess: float = key(
        0.1,
        "least effective sample size, as a share of what was sampled (times the mean ratio where that is below 1)",
        FRACTION,
    )
    below_min_ess: str = key(
        "end", "what happens to a training below it", choices={"end": "what was learned is kept", "warn": ""}
    )
    timeout_seconds: float = free(120.0, "limit of one request", POSITIVE)
    deadline_seconds: float = free(
        900.0, "limit of one response with its retries; less than trainer.timeout_minutes", POSITIVE
    )
    connect_seconds: float = free(30.0, "limit of the endpoint's start", POSITIVE)
    connections: int = free(16, "requests under way at once", COUNT)


@dataclass
class SyntheticConfig:
    """The embedded language's data: what its writers and its annotators do (nemo_advrm/synthetic)."""

    sft_rows: int = key(20000, "rows of the SFT corpus", COUNT)
    preference_pairs: int = key(40000, "pairs of each member of the ensemble", COUNT)
    validation_pairs: int = key(1000, "validation pairs, labelled by gold", COUNT)
    prompts: int = key(4096, "prompts of RLHF", COUNT)
    flip_probability: float = key(0.03, "share of the labels that are flipped", FRACTION)
    min_margin: float = key(1.5, "least gold difference of a pair; annotators leave out closer ones", NOT_NEGATIVE)
    other_prompt: float = key(0.3, "share of the pairs whose second response answers another prompt", FRACTION)
    other_topic: float = key(
        0.25, "share of the pairs whose second response is the first one with a topic replaced", FRACTION
    )
    gross_faults: float = key(0.2, "share of the responses with repetitions or random words", FRACTION)
    flourished: float = key(0.16, "share of the responses with a flourish or two", FRACTION)
    sft_flourished: float = key(0.5, "share of the SFT corpus with a flourish", FRACTION)
    shared_flourishes: int = key(
        0, "favourite flourishes that the annotators of all members share: a flaw of the whole ensemble", NOT_NEGATIVE
    )
    taste: float = key(
        3.5, "gold units that a favourite flourish of theirs is worth to a member's annotators", NOT_NEGATIVE
    )
