"""Runs the attacks on all target members, each with its own seed, and joins their samples."""

from __future__ import annotations

import time
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from nemo_advrm.attacks import summary_file
from nemo_advrm.attacks.adversary_names import policy_name
from nemo_advrm.attacks.attack_summary import check_samples, of_adversary, of_target
from nemo_advrm.attacks.base import AttackInputs, Budget, build_attack
from nemo_advrm.attacks.held_out_success import HELD_OUT_REFERENCE, HeldOut, held_out_set
from nemo_advrm.attacks.language_models import LanguageModels
from nemo_advrm.config.schema import Config
from nemo_advrm.data.hidden_states import beside
from nemo_advrm.data.jsonl import read_jsonl, write_jsonl_atomic
from nemo_advrm.data.sft_scores import SFTScores
from nemo_advrm.data.tokenizers import Tokenizer
from nemo_advrm.engine import manifest, stopping
from nemo_advrm.engine.collectives import run_on_rank_zero
from nemo_advrm.errors import ConfigError
from nemo_advrm.rewards.base import RewardSource
from nemo_advrm.rewards.features import ReferenceFeatures
from nemo_advrm.rewards.find_rule import asks_others
from nemo_advrm.rollouts.base import check_trainable
from nemo_advrm.rollouts.openai_engine import served_model
from nemo_advrm.rollouts.transformers_engine import hf_directory
from nemo_advrm.rollouts.types import Prompt
from nemo_advrm.run_directory import results
from nemo_advrm.seeds import derive_seed
from nemo_advrm.training.run_training import drop_training_checkpoints, records, save_model


def check_target_members(cfg: Config, members: int) -> None:
    """Raises ConfigError when ``adversarial.target_members`` names a member that does not exist."""
    for target in cfg.adversarial.target_members:
        if not 1 <= target <= members:
            raise ConfigError(
                f"adversarial.target_members={cfg.adversarial.target_members}: there is no member {target}, the "
                f"ensemble has {members} (ensemble.size, ensemble.members)"
            )


def check_attack(cfg: Config) -> None:
    """Raises ConfigError for a policy that the rollout engine cannot open, or cannot train where the attack trains."""
    engine, policy = cfg.rl.rollout_engine, cfg.pretrained_checkpoint.restore_from_path
    if build_attack(cfg.adversarial.attack).trains:
        check_trainable(cfg, f"adversarial.attack={cfg.adversarial.attack}")
    if engine == "openai":
        served_model(cfg.policy_server.policy or policy)
    elif engine == "transformers":
        hf_directory(policy)


@dataclass(frozen=True)
class AttackRun:
    """The attacks on every target in ``directory``.

    Args:
        prompts: the prompts of ``sft_responses``, in its order.
        members: the ensemble, R_1 first.
        gold: measures success; None without a gold reward.
        seed: seed from which every adversary derives its own.
        sft_policy: the loaded SFT policy; None unless the detector reads log-probabilities.
    """

    cfg: Config
    tokenizer: Tokenizer
    directory: Path
    prompts: list[Prompt]
    members: list[RewardSource]
    sft_responses: SFTScores
    gold: RewardSource | None
    seed: int
    sft_policy: ReferenceFeatures | None = None

    def run(self) -> dict[str, Any]:
        """Runs all attacks that are not finished, one after the other, joins their samples and returns the summary."""
        again = "the samples of the attacks are joined again"
        finished = results.finished(self.directory, "summary.json", (), summary_file.wrong_attack, again)
        if finished is not None:
            run_on_rank_zero(check_samples, self.directory)
            return finished
        for target in self.cfg.adversarial.target_members:
            for number in range(self.cfg.adversarial.num_adversaries):
                name = policy_name(target, number)
                stopping.leave_if_asked(f"before the attack of {name}: the same command resumes there")
                self.train(target, number)
        return join_attacks(self.cfg, self.directory)

    def train(self, target: int, number: int) -> None:
        """Runs one attack in its own directory below ``directory``; does nothing when it is finished.

        Attacks are independent of each other: several processes may run them in one ``directory``.
        """
        home = self.directory / policy_name(target, number)
        if _finished_adversary(home) is None:
            held_out = self._held_out  # all ranks sample its SFT responses, before the attack
            self._find(home, target, derive_seed(self.seed, "attack", target, number), held_out)

    @cached_property
    def _models(self) -> LanguageModels:
        """Language models for all attacks that train nothing."""
        path = self.cfg.pretrained_checkpoint.restore_from_path
        return LanguageModels(self.cfg, self.tokenizer, path, self.sft_policy)

    @cached_property
    def _held_out(self) -> HeldOut | None:
        """The held-out prompts, read once for all adversaries, and with them the detectors that are fitted to them."""
        return held_out_set(
            self.cfg, self.tokenizer, self.directory, self.prompts, self.members, self.gold, self.sft_policy
        )

    def _find(self, home: Path, target: int, seed: int, held_out: HeldOut | None) -> None:
        """Runs one attack into ``home`` and marks it finished."""
        started = time.monotonic()
        cfg, rl = self.cfg, self.cfg.rl
        attack = build_attack(cfg.adversarial.attack)
        options = attack.reward_options(cfg.adversarial)
        inputs = AttackInputs(
            cfg,
            self.tokenizer,
            self.prompts,
            cfg.pretrained_checkpoint.restore_from_path,
            self.sft_responses,
            self.members,
            target,
            self.gold,
            seed,
            home,
            self.sft_policy,
            self._models,
            options,
            attack.underrates,
        )
        enough = -(-cfg.adversarial.enough // cfg.adversarial.num_adversaries)
        budget = Budget(rl.max_steps, rl.prompts_per_step * rl.group_size, enough)
        found = attack.find(inputs, budget)
        module, measured = found.adversary, None
        if module is not None:
            if held_out is not None:
                measured = held_out.measure(module.model, target, home, options)
            save_model(home, module)
        elif held_out is not None:
            measured = held_out.measure_search(attack, inputs, budget.samples_per_step)
        seconds = time.monotonic() - started
        summary = run_on_rank_zero(of_adversary, home, seconds, measured)
        results.mark(home, "summary.json", summary, records(home))
        drop_training_checkpoints(home)
        if module is not None:
            module.release()


def _finished_adversary(home: Path) -> dict[str, Any] | None:
    return results.finished(home, "summary.json", (), summary_file.wrong_adversary)


def join_attacks(cfg: Config, directory: Path) -> dict[str, Any]:
    """Joins the files of all attacks in ``directory``: ``samples.jsonl``, ``metrics.jsonl`` and ``summary.json``."""
    homes: dict[int, list[Path]] = {
        target: [directory / policy_name(target, i) for i in range(cfg.adversarial.num_adversaries)]
        for target in cfg.adversarial.target_members
    }
    found = {str(target): of_target([_finished_adversary(home) or {} for home in own]) for target, own in homes.items()}
    result = {
        "directions": found,
        "threshold_z": cfg.selection.threshold_z,
        "by_disagreement": asks_others(cfg.adversarial),
        "underrates": build_attack(cfg.adversarial.attack).underrates,
        "detector": cfg.adversarial.detector,
    }
    everyone = [home for own in homes.values() for home in own]
    run_on_rank_zero(_join_records, directory, everyone)
    # not samples.jsonl, because selection marks rows in it; its rows are counted instead (check_samples)
    left = [f"{home.name}/{name}" for home in everyone for name in (manifest.NAME, "summary.json", *records(home))]
    shared = ("metrics.jsonl", HELD_OUT_REFERENCE, beside(directory / HELD_OUT_REFERENCE).name)
    left += [name for name in shared if (directory / name).exists()]
    results.mark(directory, "summary.json", result, left)
    return result


def _join_records(directory: Path, homes: list[Path]) -> None:
    for name in ("samples.jsonl", "metrics.jsonl"):
        files = [home / name for home in homes if (home / name).exists()]
        write_jsonl_atomic(directory / name, (row for file in files for _, row in read_jsonl(file)))
