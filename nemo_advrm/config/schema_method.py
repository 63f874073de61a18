"""Schema of the method: attacks, policy optimisation, selection, retraining and the pipeline."""

from __future__ import annotations

from dataclasses import dataclass

from nemo_advrm.config.fields import (
    BELOW_ONE,
    COUNT,
    FINITE,
    FRACTION,
    NOT_NEGATIVE,
    POSITIVE,
    Range,
    free,
    key,
    section,
)
from nemo_advrm.config.schema_data import AGGREGATES


@dataclass
class SFTStatisticsConfig:
    """SFT samples behind T_k(x), s_k and Z(U)."""

    num_prompts: int = key(512, "prompts that the SFT policy answers", COUNT)
    samples_per_prompt: int = key(6, "responses to each", COUNT)


@dataclass
class SearchConfig:
    """Attacks that train nothing (docs/attacks.md)."""

    candidates: int = key(
        8, "texts that are scored for each change: next tokens of decoding, substitutes of a word", Range(at_least=2)
    )
    edit_share: float = key(0.2, "largest share of the words that word_substitution changes", Range(above=0, at_most=1))
    naturalness: float = key(0.3, "weight of the log-probability of a token in decoding, in units of z", NOT_NEGATIVE)
    tokens_per_choice: int = key(1, "tokens that decoding writes between two choices by the reward", COUNT)
    styles: list[str] = key(
        ["the Bible", "a poem", "a lyric", "a tweet", "Shakespeare", "a contract", "a small child", "a sales letter"],
        "what style rewrites responses as",
    )
    style_instruction: str = key(
        "Rewrite the answer in the style of {style}. Keep its meaning. Write the rewritten answer only.",
        "what style asks of adversarial.lm; {style} is the style",
    )
    inverted_instruction: str = key(
        "Rewrite the answer in other words. Keep its meaning and every fact. Write the rewritten answer only.",
        "what inverted asks of adversarial.lm; empty: it uses the rewrites that need no language model alone",
    )
    probes_path: str = key("", "text file with further strings for probes, one a line")


@dataclass
class AdversarialConfig:
    """The attack and its reward."""

    attack: str = key("adv_rm", "how bad responses are found (docs/attacks.md) or python:MODULE:CLASS")
    lm: str = key("", "language model that proposes substitutes and paraphrases: DIR or hf:DIR; empty: the SFT policy")
    detector: str = key(
        "ensemble_disagreement",
        "what marks a response as unknown to the target (docs/method.md) or python:MODULE:CLASS",
    )
    preset: str = key(
        "paper",
        "form of the adversarial reward",
        choices={"paper": "z-scored, per prompt", "raw": "constants on raw scores"},
    )
    coefficient: float = key(
        1.5, "lambda of the paper preset; 0: the adversary maximises the target's score alone", NOT_NEGATIVE
    )
    penalty: float = key(-4.0, "reward of the paper preset where R_1 <= T_1(x)", FINITE)
    raw_penalty: float = key(-25.0, "added by the raw preset where R_1 < min_target_score", FINITE)
    target_weight: float = key(1.0, "of the target's score in the raw preset", FINITE)
    others_weight: float = key(1.0, "of the other members' mean score in the raw preset", FINITE)
    min_target_score: float = key(-3.0, "raw preset: the others count above this score of the target only", FINITE)
    target_members: list[int] = key([1], "members attacked in turn, 1 is R_1", COUNT)
    num_adversaries: int = key(1, "adversaries per target member, which differ by seed and so in what they find", COUNT)
    enough: int = key(
        0,
        "different finds per target member, in selection.last_fraction, at which its attack ends; 0: never",
        NOT_NEGATIVE,
    )
    search: SearchConfig = section(SearchConfig)
    held_out_prompts: int = key(
        0, "prompts beside the attack's own, on which finished adversaries are measured; 0: none", NOT_NEGATIVE
    )


@dataclass
class DetectorConfig:
    """Detectors that watch RLHF and the server (docs/detectors.md)."""

    monitors: list[str] = free(
        ["auto"],
        "detectors that watch the responses; auto: ensemble_disagreement where several members are standardised; "
        "[]: none",
    )
    false_alarm_rate: float = free(
        0.01, "share of SFT responses that may be beyond a detector's threshold", Range(above=0, below=1)
    )
    alarm_share: float = free(
        0.1, "share of the responses beyond the threshold, over five steps, that is an alarm", Range(above=0, at_most=1)
    )


@dataclass
class KLConfig:
    """Penalty for the divergence from the policy that RL starts from."""

    coefficient: float = key(0.01, "weight of the KL penalty", NOT_NEGATIVE)
    estimator: str = key("abs", "estimator of the KL divergence (docs/method.md)", choices=("abs", "k1", "k2", "k3"))


@dataclass
class RLConfig:
    """Policy optimisation."""

    algorithm: str = key("rloo", "policy gradient", choices=("rloo", "reinforce", "grpo", "ppo"))
    rollout_engine: str = key(
        "megatron",
        "what writes the responses: megatron, transformers (a policy hf:DIR), openai (a policy openai:URL#MODEL; "
        "neither is trained, but see policy_server.policy) or python:MODULE:CLASS",
    )
    max_steps: int = key(100, "optimizer steps", COUNT)
    prompts_per_step: int = key(32, "prompts of one batch of rollouts", COUNT)
    group_size: int = key(4, "rollouts per prompt", COUNT)
    max_new_tokens: int = key(256, "longest response in tokens", COUNT)
    generation_batch_size: int = key(
        0,
        "responses that a rank writes at once; 0: as many as the free memory of a GPU has room for, "
        "4 x micro_batch_size on a CPU",
        NOT_NEGATIVE,
    )
    decoding_graphs: str = free(
        "auto",
        "CUDA graphs of the step that writes a token",
        choices={"auto": "on a GPU, where the step can be captured", "always": "an error where not", "never": ""},
    )
    temperature: float = key(1.0, "sampling temperature", POSITIVE)
    top_k: int = key(0, "sample from the k likeliest tokens; 0: from all", NOT_NEGATIVE)
    top_p: float = key(
        1.0, "sample from the likeliest tokens with this probability together", Range(above=0, at_most=1)
    )
    kl: KLConfig = section(KLConfig)
    detector_penalty: float = key(
        0.0, "weight of a detector's standardised score, which is subtracted from the reward of rlhf", NOT_NEGATIVE
    )
    penalty_detector: str = key("mahalanobis", "the detector of detector_penalty (docs/detectors.md)")
    entropy_coefficient: float = key(0.0, "weight of the entropy bonus", NOT_NEGATIVE)
    unended_penalty: float | None = key(
        None,
        "reward of a response that does not end within max_new_tokens, in the reward's own units (paper: z, raw: "
        "scores); null: just below the lowest of the batch's ended ones",
        FINITE,
    )
    apply_unended_penalty: bool = key(True, "responses that do not end get unended_penalty instead of their reward")
    scale_advantages: bool = key(True, "divide advantages by their batch standard deviation (ppo: whiten; not grpo)")
    baseline: str = key("batch_mean", "baseline of reinforce", choices=("none", "batch_mean"))
    updates_per_rollout: int = key(
        1, "optimizer steps on one batch of rollouts; the loss of more than one is clipped", COUNT
    )
    clip_low: float = key(
        0.2,
        "lower clip of the probability ratio: ppo, grpo, and all others with more than one update per rollout",
        BELOW_ONE,
    )
    clip_high: float = key(0.2, "upper clip of the probability ratio", NOT_NEGATIVE)
    gamma: float = key(1.0, "discount of later rewards", FRACTION)
    gae_lambda: float = key(0.95, "lambda of generalised advantage estimation", FRACTION)
    value_clip: float = key(0.2, "clip of the critic's change", NOT_NEGATIVE)
    critic_lr: float = key(1.0e-5, "learning rate of the critic", POSITIVE)
    critic_warmup_steps: int = key(0, "first steps, which train the critic alone", NOT_NEGATIVE)
    evaluation_every: int = key(1, "steps between evaluations of gold and of the samples that are kept", COUNT)
    held_out_prompts: int = key(
        0, "fixed prompts, and random numbers, on which rlhf evaluates the policy; 0: none", NOT_NEGATIVE
    )
    held_out_every: int = key(10, "steps between these evaluations", COUNT)
    log_samples: int = key(4, "samples kept per step in samples.jsonl", NOT_NEGATIVE)


@dataclass
class SelectionConfig:
    """Which adversarial samples become rejected responses."""

    last_fraction: float = key(
        1.0, "share of the attack's steps, counted from the end, whose samples are looked at", Range(above=0, at_most=1)
    )
    threshold_z: float = key(
        1.96, "least Z(U); of the target's z where the adversary maximises the target alone", FINITE
    )
    require_others_negative: bool = key(False, "also require z_k < 0 of the other members")
    require_ended: bool = key(
        True, "drop adversarial responses that rl.max_new_tokens cut off (SFT ones are never chosen)"
    )
    top_fraction: float = key(1.0, "part with the largest Z(U) from which pairs are drawn", Range(above=0, at_most=1))
    random_within_top: bool = key(False, "draw at random within that part instead of by rank")
    per_prompt: int = key(4, "pairs of one prompt", COUNT)
    per_signature: int = key(1, "near duplicates kept per signature", COUNT)
    max_pairs: int = key(1000, "pairs per round and target member", COUNT)
    chosen: str = key(
        "best",
        "which SFT response to the same prompt is the chosen one",
        choices={"best": "largest mean of z", "random": "", "other": "largest mean of z without the target's"},
    )
    null_ratio: float = key(
        0.0, "a target member with fewer finds than this times the null count gives no pairs; 0: any does", NOT_NEGATIVE
    )
    min_pairs: int = key(1, "a round with fewer pairs ends the pipeline", NOT_NEGATIVE)


@dataclass
class AugmentationConfig:
    """How adversarial pairs join the preference data."""

    method: str = key(
        "pairs",
        "what is added to the training rows",
        choices={
            "pairs": "those of pairs_path",
            "rrm": "also pairs made of the responses to other prompts (docs/method.md)",
        },
    )
    mode: str = key(
        "append",
        "how pairs join the training rows",
        choices={"append": "one pass over both", "mix": "a set share of every batch", "on_top": "beside the batch"},
    )
    ratio: float = key(0.2, "share of adversarial pairs in a batch (mix)", BELOW_ONE)
    pairs_per_step: int = key(16, "adversarial pairs that join every batch, which stays as it is (on_top)", COUNT)
    weight: float = key(1.0, "loss weight of adversarial pairs", NOT_NEGATIVE)
    pairs_path: str = key("", "pair store(s), comma separated")
    warm_steps: int = key(
        0, "steps of retraining from the member of the round before; 0: anew from the policy's trunk", NOT_NEGATIVE
    )
    warm_lr: float = key(0.0, "learning rate of these steps; 0 takes model.optim.lr", NOT_NEGATIVE)
    rrm_share: float = key(0.5, "share that is used of the 14 pairs that RRM makes of a row", Range(above=0, at_most=1))
    rrm_filter: str = key(
        "", "reward model (a kind of ensemble.members) that leaves out the RRM pairs it judges like their labels"
    )
    rrm_threshold: float = key(
        0.2, "difference of its winning probability from the label below which a pair is left out", FRACTION
    )


@dataclass
class BranchConfig:
    """A variant of the hardening: the same members of round 0, attacked and retrained in another way."""

    pairs: str = key(
        "attack",
        "pairs that retraining adds",
        choices={
            "attack": "",
            "none": "",
            "random": "as many as the main rounds selected",
            "rrm": "those of augmentation.method=rrm",
        },
    )
    rounds: int = key(1, "rounds of the branch", COUNT)
    coefficient: float | None = key(None, "lambda of its attacks; null: adversarial.coefficient", NOT_NEGATIVE)
    plain_members: list[int] = key([], "members that attacks see without their reference features", COUNT)
    own_trunk: bool = key(False, "members after the first start from SFT policies of their own")
    rrm_share: float | None = key(
        None, "share of RRM's pairs that pairs=rrm uses; null: augmentation.rrm_share", Range(above=0, at_most=1)
    )


@dataclass
class RLHFRunConfig:
    """One arm of the pipeline: RLHF on one reward."""

    reward: str = key("r1", "reward of the arm", choices={"r1": "", "ensemble": "uses aggregate", "hardened": ""})
    aggregate: str = key("mean", "how members' rewards become one", choices=AGGREGATES)
    coefficient: float = key(1.0, "weight of the spread in lcb and uwo; scale b of entropic", NOT_NEGATIVE)
    branch: str = key("", "whose members are the reward: a name of pipeline.branches; empty: the main rounds")
    round: int | None = key(
        None, "round of the members; null: the last one for hardened, 0 for the others", NOT_NEGATIVE
    )
    kl: float | None = key(None, "coefficient of the KL penalty; null: rl.kl.coefficient", NOT_NEGATIVE)
    detector_penalty: float | None = key(
        None, "weight of the detector's penalty; null: rl.detector_penalty", NOT_NEGATIVE
    )
    reference_features: bool = key(True, "use the members' reference features, where they have them")
    standardise: bool = key(False, "also bring one member alone to z-scores: one scale for the KL penalty of all arms")
    seeds: int = key(0, "RLHF runs of this arm; 0: pipeline.rlhf_seeds", NOT_NEGATIVE)


@dataclass
class PipelineConfig:
    """Rounds of attack and retraining, then RLHF on each reward."""

    rounds: int = key(2, "rounds of attack and retraining", NOT_NEGATIVE)
    sft: bool = key(False, "train the SFT policy first")
    jobs: str = free(
        "auto", "processes that take steps side by side: a number, or auto (cores / trainer.cpu_threads, GPUs)"
    )
    only: str = free("", "run this one stage (a name that nemo-advrm stages prints) when those before it are complete")
    until: str = free("", "run these stages and those they wait for: a name, or a pattern such as rlhf/*/seed_3")
    stop_success_rate: float = key(0.0, "stop when attack success falls below this", FRACTION)
    gold: str = key("", "scorer that evaluates: synthetic (which labels, too) or as in ensemble.members; empty: none")
    stable_window: int = key(5, "evaluations in the smoothing window of gold", COUNT)
    stable_tolerance: float = key(0.1, "loss of gold from its peak that still counts as stable", NOT_NEGATIVE)
    plain_members: list[int] = key([], "members that attacks see without their reference features", COUNT)
    other_member_steps: int = key(
        0, "steps that train members after the first, which attacks need; 0: as many as R_1's", NOT_NEGATIVE
    )
    branches: dict[str, BranchConfig] = key({}, "variants of the hardening, by name")
    rlhf: dict[str, RLHFRunConfig] = key({}, "RLHF runs, by name")
    rlhf_seeds: int = key(
        1, "RLHF runs of each arm; run i meets the same prompts and random numbers in all arms", COUNT
    )
    best_of_n: bool = key(False, "also judge best-of-n by the reward of every arm, on shared samples")
    room: str = key(
        "",
        "name of the arm (pipeline.rlhf) of whose final responses, where R_1 likes them, the share is measured "
        "that the other members do not like; empty: none",
    )


@dataclass
class HardenConfig:
    """Hardening of a trained reward model (docs/harden.md); the command takes ``target=`` for ``harden.target=``."""

    target: str = key("", "reward model to harden: hf:DIR, nemo:FILE, or a checkpoint directory of this package")
    finds: str = key("", "pairs.jsonl of select or finds.jsonl of audit; several separated by commas")
    held_out_finds: str = key("", "finds that are only measured; empty: held_out_fraction of finds, by prompt")
    prompts: str = key("", "clean prompts with answers (docs/data.md) or a reference.jsonl; prompts alone with policy")
    policy: str = key(
        "", "language model that answers the prompts, hf:DIR or a checkpoint; empty: the file has answers"
    )
    samples_per_prompt: int = key(2, "responses of the policy to each prompt", COUNT)
    pairs: str = key("", "held-out preference pairs, whose accuracy is measured before and after; empty: none")
    out: str = free("", "where the hardened model is written, in the target's format; empty: hardened in run_dir")
    steps: int = key(100, "optimizer steps; model.global_batch_size finds each", COUNT)
    learning_rate: float = key(1.0e-5, "peak learning rate; 0 takes model.optim.lr", NOT_NEGATIVE)
    replay_weight: float = key(1.0, "weight of the squared change of clean responses' scores", NOT_NEGATIVE)
    replay_per_step: int = key(64, "clean responses in each step", COUNT)
    held_out_fraction: float = key(
        0.2, "share of finds, and of clean responses, that is only measured", Range(above=0, below=1)
    )
    max_responses: int = key(2048, "clean responses that are used; of more a random part", Range(at_least=4))
