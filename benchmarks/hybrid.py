"""Measures accuracy, mismatched prompts and length bias of plain and hybrid rewards on real preference pairs.

One reward model per seed is trained from the policy on the same pairs. The features of the policy do not depend on the
seed and are computed once. Results are stored in ``--out``, so an interrupted run can be continued.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from scipy.stats import pearsonr
from torch import Tensor

from nemo_advrm.config import load_config
from nemo_advrm.config.schema import Config
from nemo_advrm.config.schema_data import REFERENCE_FEATURES
from nemo_advrm.data.encoding import EncodedPair, encode_pairs
from nemo_advrm.data.mismatch import mismatched_pairs
from nemo_advrm.data.preference_rows import PreferencePair
from nemo_advrm.data.preferences import load_preferences
from nemo_advrm.data.prompts import split_train_validation
from nemo_advrm.data.tokenizers import Tokenizer, build_tokenizer
from nemo_advrm.engine import runtime
from nemo_advrm.engine.builders import build_policy
from nemo_advrm.models.reward_model import RewardModel
from nemo_advrm.objectives.accuracy import accuracy
from nemo_advrm.objectives.bradley_terry import fit_weights
from nemo_advrm.rewards.features import ReferenceFeatures, hybrid_scores
from nemo_advrm.rewards.hybrid import fixed_prompts
from nemo_advrm.rewards.local import MegatronReward
from nemo_advrm.rewards.token_sequences import rollouts_of
from nemo_advrm.training.run_training import fit

SCORED = ("fit", "test", "mismatched")
ARMS: dict[str, tuple[int, ...]] = {"plain": (), "+ log_prob": (0,), "+ prompt_gain": (1,), "+ both": (0, 1)}


@dataclass(frozen=True)
class Parts:
    """Encoded pairs for training, for fitting the weights and for testing, and mismatched test pairs."""

    train: list[EncodedPair]
    fit: list[EncodedPair]
    test: list[EncodedPair]
    mismatched: list[EncodedPair]


def read_parts(options: argparse.Namespace, tokenizer: Tokenizer) -> tuple[Parts, list[PreferencePair]]:
    """Split the pairs into parts without a common prompt; every side has at most ``--max-tokens`` tokens."""
    rows = [row for path in options.data for row in load_preferences(path, on_bad_row="skip").rows if row.prompt]

    def short(rows: Sequence[PreferencePair]) -> list[EncodedPair]:
        return encode_pairs(rows, tokenizer, options.max_tokens, "skip", "skip")[0]

    rows = [pair.row for pair in short(rows) if pair.row is not None]
    total = options.train + options.fit + options.test
    rows = split_train_validation(rows, min(0.99, total / len(rows)), seed=1)[1] if total < len(rows) else rows
    rest, test = split_train_validation(rows, options.test / len(rows), seed=2)
    train, held = split_train_validation(rest, options.fit / len(rest), seed=3)
    mismatched = short(mismatched_pairs(test)[0])
    return Parts(short(train), short(held), short(test), mismatched), rows


def features_of(
    cfg: Config, tokenizer: Tokenizer, policy: str, parts: Parts, prompts: list[list[int]], out: Path
) -> dict[str, Tensor]:
    """Return the features [2 N, 2] of each part, chosen responses first."""
    path = out / "features.pt"
    if not path.exists():
        model = build_policy(cfg, tokenizer, policy, 0, trainable=False)
        features = ReferenceFeatures(policy, model, tokenizer, prompts)
        found = {}
        for name in SCORED:
            started = time.process_time()
            rollouts = rollouts_of(getattr(parts, name), tokenizer)
            found[name] = features.values(rollouts, REFERENCE_FEATURES)
            spent = time.process_time() - started
            print(f"features of {len(rollouts)} {name} responses: {spent:.0f} s CPU", flush=True)
        torch.save(found, path)
    return torch.load(path)


def plain_scores(
    cfg: Config, tokenizer: Tokenizer, policy: str, parts: Parts, seed: int, out: Path
) -> dict[str, Tensor]:
    """Return the scores [2 N] of each part by a reward model of this seed."""
    path = out / f"scores_{seed}.pt"
    if not path.exists():
        started = time.process_time()
        module = RewardModel(cfg, tokenizer, parts.train, [], policy, seed)
        fit(module, cfg, out / f"seed_{seed}", f"seed {seed}")
        trained = time.process_time() - started
        member = MegatronReward("rm", module.model, tokenizer)
        found = {name: member.score(rollouts_of(getattr(parts, name), tokenizer)) for name in SCORED}
        spent = time.process_time() - started
        print(f"seed {seed}: training {trained:.0f} s CPU, scoring {spent - trained:.0f} s CPU", flush=True)
        torch.save(found, path)
        module.release()
    return torch.load(path)


def rows_of(seed: int, scores: dict[str, Tensor], features: dict[str, Tensor], lengths: list[int]) -> list[dict]:
    """Return one row per arm: weights, accuracies, and the correlation of scores with response lengths."""
    lines = []
    for arm, columns in ARMS.items():
        picked = {name: values[:, list(columns)] for name, values in features.items()}
        chosen_NF, rejected_NF = torch.cat([scores["fit"][:, None], picked["fit"]], -1).chunk(2)
        weights = fit_weights(chosen_NF - rejected_NF).tolist() if columns else [1.0]
        found = {name: hybrid_scores(scores[name], picked[name], tuple(weights)) for name in scores}
        lines.append(
            {
                "seed": seed,
                "arm": arm,
                "accuracy": accuracy(found["test"]),
                "mismatch": accuracy(found["mismatched"]),
                "length_correlation": float(pearsonr(found["test"].numpy(), lengths).statistic),
                "weights": weights,
            }
        )
    return lines


def rounded(line: dict) -> dict:
    return {key: round(value, 4) if isinstance(value, float) else value for key, value in line.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--policy", required=True, help="checkpoint of SmolLM2, see docs/smollm2.md")
    parser.add_argument("--data", nargs="+", required=True, help="preference files")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seeds", type=int, nargs="*", default=[0, 1], help="none: the features alone")
    parser.add_argument("--max-tokens", type=int, default=96)
    for name, default in (("train", 64), ("fit", 100), ("test", 100), ("prompts", 2)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--lr", type=float, default=2e-5)
    options = parser.parse_args()
    cfg = load_config(
        [
            "experiment=smollm2",
            f"pretrained_checkpoint.restore_from_path={options.policy}",
            f"run_dir={options.out}",
            f"trainer.max_steps={options.train // 8}",
            f"model.optim.lr={options.lr}",
            "trainer.cpu_threads=1",
        ],
        "train_rm",
    )
    runtime.start(runtime.Layout(), "cpu")
    tokenizer = build_tokenizer(cfg.model.tokenizer)
    options.out.mkdir(parents=True, exist_ok=True)
    parts, rows = read_parts(options, tokenizer)
    print({name: len(getattr(parts, name)) for name in ("train", "fit", "test", "mismatched")}, flush=True)
    prompts = [tokenizer.encode_prompt(prompt) for prompt in fixed_prompts(rows, tokenizer, options.prompts)]
    features = features_of(cfg, tokenizer, options.policy, parts, prompts, options.out)
    tested = rollouts_of(parts.test, tokenizer).responses
    lengths = [len(tokenizer.encode(text)) for text in tested]
    longer = torch.tensor([float(n) for n in lengths])
    print(f"the longer response is the chosen one: {accuracy(longer):.3f}", flush=True)
    nothing = {name: torch.zeros(len(values)) for name, values in features.items()}
    for line in rows_of(-1, nothing, features, lengths)[1:]:
        print(json.dumps(rounded({**line, "seed": None, "arm": line["arm"].removeprefix("+ ") + " alone"})), flush=True)
    for seed in options.seeds:
        scores = plain_scores(replace(cfg, seed=seed), tokenizer, options.policy, parts, seed, options.out)
        for line in rows_of(seed, scores, features, lengths):
            print(json.dumps(rounded(line)), flush=True)


if __name__ == "__main__":
    main()
