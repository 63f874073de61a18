"""Runs one attack on one target in a directory of its own, on the prompts that it sees and on held-out ones."""

from __future__ import annotations

import dataclasses
import re
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nemo_advrm.attacks.base import SAMPLES, Attack, AttackInputs, Budget, Found, NothingProposed, build_attack
from nemo_advrm.attacks.held_out_success import HeldOut
from nemo_advrm.attacks.language_models import LanguageModels
from nemo_advrm.audit.panel import Panel
from nemo_advrm.audit.settings import steps_of
from nemo_advrm.config.schema import Config
from nemo_advrm.data.jsonl import write_jsonl_atomic
from nemo_advrm.data.run_records import ATTACK_SAMPLE, RESTORE_ROWS, read_rows
from nemo_advrm.data.sft_scores import SFTScores
from nemo_advrm.engine.collectives import run_on_rank_zero
from nemo_advrm.errors import ConfigError
from nemo_advrm.rollouts.base import UNTRAINED
from nemo_advrm.run_directory import results
from nemo_advrm.seeds import derive_seed
from nemo_advrm.training.run_training import RECORDS, drop_training_checkpoints

SUMMARY = "summary.json"
_HELD_OUT, _FINISHED = "held_out", "finished"
_PILOT = 4  # responses by which the time of a search is measured


@dataclass(frozen=True)
class AttackResult:
    """A finished attack on one target.

    Attributes:
        attack: its name.
        target: index of the target.
        samples: the file of its responses, by name of the split.
        seconds: how long it took.
        responses: how many it tried on the prompts that it sees.
        underrates: it looks for good responses that are scored low.
    """

    attack: str
    target: int
    samples: dict[str, Path]
    seconds: float
    responses: int
    underrates: bool

    def rows(self, split: str) -> list[dict[str, Any]]:
        """Returns the responses to the prompts of a split; [] where there are none. Raises DataError for a bad row."""
        return _rows(self.samples[split]) if split in self.samples else []


def attack_home(panel: Panel, attack: str, target: int) -> Path:
    """Returns the directory of an attack on a target."""
    return Path(panel.audit.run_dir) / "attacks" / directory_name(attack) / panel.names[target]


def directory_name(attack: str) -> str:
    """Returns the name of an attack as that of a directory: ``python:MODULE:CLASS`` is CLASS."""
    return re.sub(r"[^\w.-]+", "_", attack.rpartition(":")[2])


def finished(panel: Panel, attack: str, target: int) -> AttackResult | None:
    """Returns the result of an attack that an earlier call has finished, else None; all ranks call.

    Raises DataError when its files are damaged.
    """
    home = attack_home(panel, attack, target)
    found = results.finished(home, SUMMARY, ("seconds", "responses", "underrates", "samples"))
    if found is None:
        return None
    samples = {name: home / path for name, path in found["samples"].items()}
    return AttackResult(attack, target, samples, found["seconds"], found["responses"], found["underrates"])


def config_of(panel: Panel, attack: str, samples: int) -> tuple[Config, Budget]:
    """Returns the configuration and the budget of an attack that may try ``samples`` responses."""
    cfg = panel.cfg
    steps, per_step = steps_of(samples, len(panel.training.prompts), cfg.rl.group_size)
    rl = dataclasses.replace(cfg.rl, max_steps=steps, prompts_per_step=per_step)
    adversarial = dataclasses.replace(cfg.adversarial, attack=attack)
    return dataclasses.replace(cfg, rl=rl, adversarial=adversarial), Budget(steps, per_step * cfg.rl.group_size)


def check_attack(panel: Panel, attack: str) -> None:
    """Raises ConfigError for an attack by RL on a policy that cannot be trained here."""
    engine = panel.cfg.rl.rollout_engine
    if build_attack(attack).trains and engine in UNTRAINED:
        why = "is served elsewhere" if engine == "openai" else "has no conversion table"
        raise ConfigError(f"attacks: {attack} trains the policy, which {why} ({panel.audit.policy})")


def run_attack(
    panel: Panel,
    attack: str,
    target: int,
    samples: int,
    models: LanguageModels,
    counter: Callable[[int], None],
    progress: Callable[[int, int], None] | None = None,
) -> AttackResult:
    """Runs an attack on a target and marks it finished; all ranks call.

    A trained adversary answers all prompts when its training is over, because what it wrote before is not what it has
    learned. An attack that trains nothing is repeated on the held-out prompts, with a budget in proportion. The judge
    is not asked here: the attack must not search with it, and it may cost money.

    Args:
        samples: responses that it may try.
        models: language models, shared by all attacks.
        counter: is told how many responses were scored.
        progress: of a search, see :class:`AttackInputs`.
    """
    started = time.monotonic()
    home = attack_home(panel, attack, target)
    cfg, budget = config_of(panel, attack, samples)
    made = build_attack(attack)
    inputs = dataclasses.replace(_inputs(panel, cfg, made, target, models, home, counter), progress=progress)
    options, columns = inputs.reward_options, panel.columns(target)
    training, held_out = panel.training, panel.held_out
    found = _find(made, inputs, budget)
    files = {training.name: SAMPLES}
    if found.adversary is not None:
        for split in panel.splits:
            sft, members = split.of(columns), panel.members(target)
            asked = HeldOut(cfg, panel.tokenizer, split.prompts, members, sft, None, panel.sft_policy)
            asked.measure(found.adversary.model, 1, home / _FINISHED / split.name, options)
            files[split.name] = f"{_FINISHED}/{split.name}/held_out.jsonl"
    elif held_out is not None:
        _search_held_out(panel, made, inputs, budget, held_out.of(columns))
        files[held_out.name] = f"{_HELD_OUT}/{SAMPLES}"
    result = AttackResult(attack, target, {name: home / path for name, path in files.items()}, 0.0, 0, made.underrates)
    seconds = time.monotonic() - started
    result = dataclasses.replace(result, seconds=round(seconds, 3), responses=len(_rows(home / SAMPLES)))
    summary = {
        "attack": attack,
        "target": panel.audit.target[target],
        "samples": files,
        "responses": result.responses,
        "seconds": result.seconds,
        "underrates": made.underrates,
    }
    left = {*files.values(), *(name for name in RECORDS if (home / name).exists())}
    results.mark(home, SUMMARY, summary, sorted(left))
    if found.adversary is not None:
        drop_training_checkpoints(home)
        found.adversary.release()
    return result


def seconds_of_search(panel: Panel, attack: str, models: LanguageModels) -> float:
    """Returns what a response of an attack that trains nothing takes, in seconds, by trying a few; all ranks call.

    It is measured because it cannot be known: one response may take the scoring of one text, or of hundreds. The first
    try opens the models and is not timed.
    """
    cfg, _ = config_of(panel, attack, 1)
    made, home = build_attack(attack), attack_home(panel, attack, 0).parent / "pilot"
    seconds, responses = 0.0, 0
    for count in (1, _PILOT):
        started = time.monotonic()
        found = _find(made, _inputs(panel, cfg, made, 0, models, home, lambda _: None), Budget(1, count))
        seconds = time.monotonic() - started
        responses = run_on_rank_zero(_count_rows, found.samples)
    run_on_rank_zero(shutil.rmtree, home)
    return seconds / max(1, responses)


def _find(attack: Attack, inputs: AttackInputs, budget: Budget) -> Found:
    """Lets an attack search; where it has nothing to propose, the file of its samples is empty. All ranks call.

    A pilot of a few responses, or a few held-out prompts, may give nothing where all prompts give something.
    """
    try:
        return attack.find(inputs, budget)
    except NothingProposed:
        inputs.directory.mkdir(parents=True, exist_ok=True)
        samples = inputs.directory / SAMPLES
        run_on_rank_zero(write_jsonl_atomic, samples, [])
        return Found(samples)


def _rows(path: Path) -> list[dict[str, Any]]:
    """Returns the rows of an attack; [] of an empty file: a search may have nothing to propose."""
    if not path.stat().st_size:
        return []
    return [row for _, row in read_rows(path, ATTACK_SAMPLE, "an attack", RESTORE_ROWS)]


def _count_rows(path: Path) -> int:
    return len(_rows(path))


def _inputs(
    panel: Panel,
    cfg: Config,
    made: Attack,
    target: int,
    models: LanguageModels,
    home: Path,
    counter: Callable[[int], None],
) -> AttackInputs:
    return AttackInputs(
        cfg,
        panel.tokenizer,
        panel.training.prompts,
        cfg.pretrained_checkpoint.restore_from_path,
        panel.training.of(panel.columns(target)),
        panel.members(target, counter),
        1,
        None,
        derive_seed(cfg.seed, "audit", cfg.adversarial.attack),  # the same for all targets: only the target differs
        home,
        panel.sft_policy,
        models,
        made.reward_options(cfg.adversarial),
        made.underrates,
    )


def _search_held_out(panel: Panel, attack: Attack, inputs: AttackInputs, budget: Budget, sft: SFTScores) -> None:
    """Repeats a search on the held-out prompts, whose ordinary responses are ``sft``."""
    assert panel.held_out is not None
    prompts = panel.held_out.prompts
    share = len(prompts) / len(inputs.prompts)
    own = dataclasses.replace(
        inputs,
        prompts=prompts,
        sft_responses=sft,
        seed=derive_seed(inputs.seed, _HELD_OUT),
        directory=inputs.directory / _HELD_OUT,
    )
    _find(attack, own, dataclasses.replace(budget, samples_per_step=max(1, round(budget.samples_per_step * share))))
