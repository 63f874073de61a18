"""Implementations of an interface by the name in a setting: preference losses, detectors, attacks, rollout engines.

An entry-point mechanism such as ``importlib.metadata`` was rejected: it needs an installed package for every trial.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from typing import Any, Generic, TypeVar

from nemo_advrm.errors import ConfigError
from nemo_advrm.nearest_name import nearest_name

T = TypeVar("T")
PYTHON = "python:"


class Registry(Generic[T]):
    """Maps names to implementations, which are imported at their first use.

    A name is a built-in one or ``python:MODULE:NAME``.

    Args:
        key: the configuration key that holds the name, for error messages.
        builtin: name -> ``"module:attribute"``.
    """

    def __init__(self, key: str, builtin: dict[str, str]) -> None:
        self.key = key
        self._places = builtin

    def __contains__(self, name: str) -> bool:
        """Whether ``name`` is a built-in one. Others import code, which a file from elsewhere must not do."""
        return name in self._places

    def __iter__(self) -> Iterator[str]:
        return iter(sorted(self._places))

    def check(self, name: str, key: str = "") -> None:
        """Raise ConfigError that names ``key`` for a name that is not known, without importing anything."""
        if name in self or name.startswith(PYTHON):
            return
        near = nearest_name(name, self)
        known = ", ".join(self)
        raise ConfigError(f"{key or self.key}={name}: did you mean {near!r}? (known: {known}, python:MODULE:NAME)")

    def __getitem__(self, name: str) -> T:
        """The implementation called ``name``. Raises ConfigError for an unknown one and one that cannot be imported."""
        self.check(name)
        place = self._places.get(name, name.removeprefix(PYTHON))
        implementation: T = imported(place, f"{self.key}={name}")
        return implementation


def imported(place: str, setting: str) -> Any:
    """What ``MODULE:NAME`` names. Raises ConfigError that names ``setting`` when it cannot be imported."""
    module, _, attribute = place.partition(":")
    if not module or not attribute:
        raise ConfigError(f"{setting}: must be python:MODULE:NAME")
    try:
        return getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        raise ConfigError(f"{setting}: cannot be imported: {error}") from error


# All registries, so that a new built-in is its own file and a line here. Nothing is imported before it is asked for.
PREFERENCE_LOSSES: Registry[Any] = Registry(  # of nemo_advrm.objectives.losses.PreferenceLoss
    "reward_model.loss",
    {
        "bt": "nemo_advrm.objectives.losses:BT",
        "margin_bt": "nemo_advrm.objectives.losses:MARGIN_BT",
        "scaled_bt": "nemo_advrm.objectives.losses:SCALED_BT",
        "regression": "nemo_advrm.objectives.losses:REGRESSION",
    },
)
DETECTORS: Registry[Any] = Registry(  # of subclasses of nemo_advrm.detectors.base.Detector
    "adversarial.detector",
    {
        "ensemble_disagreement": "nemo_advrm.detectors.disagreement:EnsembleDisagreement",
        "laplace": "nemo_advrm.detectors.laplace:LaplaceDeviation",
        "mahalanobis": "nemo_advrm.detectors.mahalanobis:MahalanobisDistance",
        "nearest_neighbours": "nemo_advrm.detectors.nearest_neighbours:NearestNeighbours",
        "sft_entropy": "nemo_advrm.detectors.sft_entropy:SFTEntropy",
        "sft_log_prob": "nemo_advrm.detectors.sft_log_prob:SFTLogProb",
    },
)
ATTACKS: Registry[Any] = Registry(  # of subclasses of nemo_advrm.attacks.base.Attack
    "adversarial.attack",
    {
        "adv_rm": "nemo_advrm.attacks.adv_rm:AdvRM",
        "over_optimisation": "nemo_advrm.attacks.over_optimisation:OverOptimisation",
        "word_substitution": "nemo_advrm.attacks.word_substitution:WordSubstitution",
        "style": "nemo_advrm.attacks.style:Style",
        "decoding": "nemo_advrm.attacks.decoding:Decoding",
        "probes": "nemo_advrm.attacks.probes:Probes",
        "inverted": "nemo_advrm.attacks.inverted:Inverted",
    },
)
ROLLOUT_ENGINES: Registry[Any] = Registry(  # of subclasses of nemo_advrm.rollouts.base.RolloutEngine
    "rl.rollout_engine",
    {
        "megatron": "nemo_advrm.rollouts.megatron_engine:MegatronEngine",
        "openai": "nemo_advrm.rollouts.openai_engine:OpenAIEngine",
        "transformers": "nemo_advrm.rollouts.transformers_engine:TransformersEngine",
    },
)
TOKENIZERS: Registry[Any] = Registry(  # of nemo_advrm.data.tokenizers.Tokenizer, those that need no files
    "model.tokenizer",
    {
        "byte": "nemo_advrm.data.tokenizers:ByteTokenizer",
        "synthetic": "nemo_advrm.synthetic.tokenizer:SyntheticTokenizer",
    },
)
