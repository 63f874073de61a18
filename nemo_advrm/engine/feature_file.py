"""Reads and writes ``reference_features.json`` of a hybrid reward model: feature weights and their frozen policy."""

from __future__ import annotations

import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nemo_advrm.config.schema_data import REFERENCE_FEATURES
from nemo_advrm.data.jsonl import BadRow
from nemo_advrm.data.messages import Message, check_messages
from nemo_advrm.engine import manifest
from nemo_advrm.errors import CheckpointError, ConfigError
from nemo_advrm.untrusted_files import read_json_object

FILE = "reference_features.json"
FORMAT = 1


@dataclass(frozen=True)
class FeatureWeights:
    """A hybrid score: ``weights[0] * R + weights[1] * feature_1 + ...``.

    Attributes:
        names: features, in the order of their weights.
        weights: weight of the plain score, then of each feature (of its unscaled value, in nats).
        policy: directory of the frozen policy.
        fingerprint: hash of that directory's content.
        prompts: the other prompts of ``prompt_gain``.
        pairs: number of pairs that the weights were fitted on.
    """

    names: tuple[str, ...]
    weights: tuple[float, ...]
    policy: str
    fingerprint: str
    prompts: tuple[tuple[Message, ...], ...]
    pairs: int

    def warnings(self) -> list[str]:
        """Warnings about weights with the wrong sign."""
        counts = {"prompt_gain": "responses that fit other prompts as well", "reward": "what the reward model dislikes"}
        return [
            f"warning: the fitted weight of {name} is {weight:.3g}: in the {self.pairs} pairs it was fitted on, people "
            f"rather preferred {counts[name]}, and so does the hybrid reward"
            for name, weight in zip(("reward", *self.names), self.weights, strict=True)
            if name in counts and weight < 0
        ]

    def write(self, model: Path) -> None:
        """Write the file into a reward model's directory and add it to its manifest; call on one rank."""
        policy = Path(self.policy).absolute()
        manifest.add(
            model,
            FILE,
            {
                "format": FORMAT,
                "features": list(self.names),
                "weights": dict(zip(("reward", *self.names), self.weights, strict=True)),
                "pairs": self.pairs,
                "policy": str(policy),
                "policy_from_here": os.path.relpath(policy, model.absolute()),  # for runs that are moved as a whole
                "policy_fingerprint": self.fingerprint,
                "prompts": [list(prompt) for prompt in self.prompts],
            },
        )

    @classmethod
    def read(cls, model: Path) -> FeatureWeights | None:
        """Read the file of a reward model's directory; None if it has none.

        Raises CheckpointError, naming the file, if it cannot be used.
        """
        path = model / FILE
        if not path.exists():
            return None
        found = read_json_object(path)
        try:
            return cls._parse(found, model)
        except (KeyError, TypeError, ValueError, AttributeError, BadRow) as error:
            reason = f"it lacks {error}" if isinstance(error, KeyError) else str(error)
            raise CheckpointError(f"{path}: no features of a reward model ({reason}); restore the file") from error

    @classmethod
    def _parse(cls, found: dict[str, Any], model: Path) -> FeatureWeights:
        if found["format"] != FORMAT:
            raise ValueError(f"format {found['format']}, this version knows {FORMAT}")
        names = tuple(found["features"])
        if not names or len(set(names)) < len(names) or set(names) - set(REFERENCE_FEATURES):
            raise ValueError(f"features {found['features']}, known are {', '.join(REFERENCE_FEATURES)}")
        weights = tuple(found["weights"][name] for name in ("reward", *names))
        if any(type(weight) not in (int, float) or not math.isfinite(weight) for weight in weights):
            raise ValueError(f"weights {found['weights']}")
        prompts = tuple(check_messages(prompt, "prompts", FILE) for prompt in found["prompts"])
        if "prompt_gain" in names and len(prompts) < 2:
            raise ValueError(f"{len(prompts)} prompts, at least 2 are needed")
        policy, beside, fingerprint = found["policy"], found["policy_from_here"], found["policy_fingerprint"]
        if not all(isinstance(text, str) for text in (policy, beside, fingerprint)):
            raise ValueError("the policy's directory or fingerprint is no text")
        policy = _find(Path(policy), model / beside, fingerprint)
        return cls(names, weights, str(policy), fingerprint, prompts, int(found["pairs"]))

    def check_policy(self, place: str) -> None:
        """Raise CheckpointError, naming ``place`` and the policy's directory, if the policy was moved or changed."""
        if not Path(self.policy).exists():
            raise CheckpointError(
                f"{place}: the frozen policy {self.policy} of its {FILE} is not there: move it back, or score without "
                "it (?reference_features=off)"
            )
        if policy_fingerprint(Path(self.policy)) != self.fingerprint:
            raise CheckpointError(
                f"{place}: the frozen policy {self.policy} has changed since the weights of {FILE} were fitted: "
                "restore it, or score without it (?reference_features=off)"
            )


def refuse_features(model: Path, drop: bool) -> None:
    """Raise ConfigError if a reward model that is to be converted is hybrid, unless its features may be dropped."""
    if (model / FILE).exists() and not drop:
        raise ConfigError(
            f"{model} is a hybrid reward model: its score is made of its weights and of {FILE}, which no other format "
            "holds. Set drop_reference_features=true to convert the plain model, whose scores are others"
        )


def policy_fingerprint(policy: Path) -> str:
    return manifest.digest(policy)


def _find(named: Path, beside: Path, fingerprint: str) -> Path:
    """The policy's directory: the recorded one, else the one at the same path relative to the model, if unchanged."""
    if not named.exists() and beside.exists() and policy_fingerprint(beside) == fingerprint:
        return beside.resolve()
    return named
