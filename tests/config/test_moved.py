"""Renamed and removed names: keys are refused with their replacement, old imports are served."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Iterator

import pytest

from nemo_advrm.config import load_config, moved
from nemo_advrm.config.keys import expected_type
from nemo_advrm.errors import ConfigError


@pytest.fixture
def moved_names(monkeypatch: pytest.MonkeyPatch) -> Iterator[pytest.MonkeyPatch]:
    """Tables of examples; modules imported under old names are forgotten afterwards."""
    before = set(sys.modules)
    monkeypatch.setattr(
        moved,
        "MOVED_MODULES",
        {"nemo_advrm.scores": "nemo_advrm.objectives", "nemo_advrm.lost.place": "nemo_advrm.errors"},
    )
    monkeypatch.setattr(
        moved, "MOVED_KEYS", {"steps": "is now trainer.max_steps", "opt": "is now model.optim", "fast": "was removed"}
    )
    yield monkeypatch
    for name in set(sys.modules) - before:
        if name.startswith(("nemo_advrm.scores", "nemo_advrm.lost")):
            del sys.modules[name]


@pytest.mark.usefixtures("moved_names")
@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("nemo_advrm.scores", "nemo_advrm.objectives"),
        ("nemo_advrm.scores.masked", "nemo_advrm.objectives.masked"),
        ("nemo_advrm.lost.place", "nemo_advrm.errors"),
    ],
)
def test_an_old_import_is_the_same_module_with_a_warning(old: str, new: str) -> None:
    with pytest.warns(DeprecationWarning, match=f"{old} is now {new}"):
        module = importlib.import_module(old)
    assert module is importlib.import_module(new)
    assert module.__name__ == new and module.__spec__ is not None and module.__spec__.name == new


# what README, docs and examples of 0.1.0 imported
DOCUMENTED = (  # nemo_advrm.aligner.reference needs NeMo-Aligner
    "nemo_advrm.aligner.rollouts:RolloutReader",
    "nemo_advrm.aligner.members:read_reference",
    "nemo_advrm.callbacks.augmentation:AdversarialAugmentation",
    "nemo_advrm.callbacks.preemption:PreemptionCheckpoint",
    "nemo_advrm.training.callbacks.preemption:PreemptionCheckpoint",
    "nemo_advrm.cli:guarded",
    "nemo_advrm.config:from_hydra",
    "nemo_advrm.data.nemo_aligner_rows:as_transcript",
    "nemo_advrm.megatron.planner.search:Candidate",
    "nemo_advrm.models.policy:AdversarialPolicy",
    "nemo_advrm.report.lines:lines_of",
    "nemo_advrm.report.study:read",
    "nemo_advrm.report.study_tables:render_study",
    "nemo_advrm.rewards.ensemble:UncertaintyReward",
    "nemo_advrm.rewards.remote:trl_reward",
    "nemo_advrm.rewards.remote:text_reward",
    "nemo_advrm.rewards.remote:plain_text",
    *(f"nemo_advrm.stages.{name}:main" for name in ("sft", "train_rm", "attack", "rlhf", "pipeline")),
)


@pytest.mark.parametrize("path", DOCUMENTED)
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_documented_imports_of_old_versions_are_served(path: str) -> None:
    module, _, name = path.partition(":")
    assert callable(getattr(importlib.import_module(module), name))


def test_an_unknown_module_is_still_an_error() -> None:
    with pytest.raises(ModuleNotFoundError, match="No module named"):
        importlib.import_module("nemo_advrm.nothing")


@pytest.mark.usefixtures("moved_names")
@pytest.mark.parametrize(
    ("override", "told"),
    [
        ("steps=3", "steps is now trainer.max_steps"),
        ("opt.lr=3", "opt.lr is now model.optim.lr"),
        ("opt={lr: 3}", "opt is now model.optim"),
        ("stage.sft.opt.lr=3", "stage.sft.opt.lr is now stage.sft.model.optim.lr"),
        ("fast=true", "fast was removed"),
    ],
)
def test_a_moved_key_is_refused_with_what_replaces_it(override: str, told: str) -> None:
    with pytest.raises(ConfigError) as error:
        load_config([override])
    assert str(error.value) == told


@pytest.mark.usefixtures("moved_names")
def test_the_configuration_of_an_old_run_gets_the_present_keys(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(moved.MOVED_KEYS, "rl.size", "is now rl.group_size")
    old = {"rl": {"size": 3, "top_k": 1}, "fast": True, "stage": {"attack": {"rl": {"size": 4}, "fast": False}}}
    new = {"rl": {"group_size": 3, "top_k": 1}, "stage": {"attack": {"rl": {"group_size": 4}}}}
    assert moved.current_config(old) == new


def test_the_tables_name_what_exists() -> None:
    for old, told in moved.MOVED_KEYS.items():
        assert expected_type(old) is None, f"{old} is a key of the schema"
        if told.startswith("is now "):
            assert expected_type(told.split()[2].rstrip(",;:")) is not None, f"{old} {told}"
    for old, new in moved.MOVED_MODULES.items():
        assert importlib.util.find_spec(new) is not None, f"{old} -> {new}"


def test_a_name_that_never_was_is_no_attribute() -> None:
    with pytest.raises(AttributeError, match=r"nemo_advrm\.models\.policy has no attribute Nothing"):
        _ = importlib.import_module("nemo_advrm.models.policy").Nothing


def test_the_names_of_the_plug_in_are_in_modules_that_exist() -> None:
    """They are imported at first use, in NeMo-Aligner's environment only."""
    from nemo_advrm.integrations import nemo_aligner

    for module in nemo_aligner._MODULES.values():
        assert importlib.util.find_spec(f"{nemo_aligner.__name__}.{module}") is not None, module
