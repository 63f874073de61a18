"""Stage ``pipeline``: train the ensemble, attack it, retrain it, round after round; then RLHF and the report.

Every stage reads and writes files of the run directory only. ``state.json`` says which are complete; a run
that was stopped goes on at the first stage that is not.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

from nemo_advrm import writers
from nemo_advrm.config import for_stage
from nemo_advrm.data.jsonl import write_jsonl_atomic
from nemo_advrm.data.preferences import PreferencePair, load_preferences
from nemo_advrm.data.tokenizers import build_tokenizer
from nemo_advrm.errors import ConfigError
from nemo_advrm.layout import at_layout
from nemo_advrm.megatron import runtime, stopping
from nemo_advrm.models.language_model import EncodedResponse, build_policy
from nemo_advrm.models.policy import Prompt, encode_prompts
from nemo_advrm.models.trainable import derive_seed
from nemo_advrm.objectives.reference import fit_members
from nemo_advrm.rewards.base import RewardSource
from nemo_advrm.rewards.local import build_gold
from nemo_advrm.rewards.reference import Reference
from nemo_advrm.rewards.sources import load_members
from nemo_advrm.rewards.standardisation import combined
from nemo_advrm.schema import Config, RLHFRunConfig
from nemo_advrm.stages import artefacts, inputs, session
from nemo_advrm.stages.attack import attack_prompts, check_directions, run_attack
from nemo_advrm.stages.order import LIGHT, Step, find, labels_by_gold, last_round, order
from nemo_advrm.stages.reference import read_rollouts, sample, write_reference
from nemo_advrm.stages.rlhf import rlhf_prompts, run_rlhf
from nemo_advrm.stages.select import dropped, found_lines, reason_to_stop, select_round
from nemo_advrm.stages.sft import encode_responses, sft_rows, train_sft
from nemo_advrm.stages.state import RunState
from nemo_advrm.stages.train_rm import EncodedPreferences, bootstrap, encode_rows, keep_back, train_reward_model


def main(cfg: Config) -> int:
    """Run all that is not complete in ``run_dir`` and print the report's table; or the one stage ``pipeline.only``."""
    only = find(cfg, cfg.pipeline.only) if cfg.pipeline.only else None
    session.start(_one_process(cfg) if only and only.kind in LIGHT else cfg)
    Pipeline(cfg).run(only)
    return 0


def _one_process(cfg: Config) -> Config:
    """The layout of a stage that uses no model."""
    return replace(cfg, model=at_layout(cfg.model))


class Pipeline:
    """The rounds of one run directory."""

    def __init__(self, cfg: Config) -> None:
        self.cfg = cfg
        self.directory = Path(cfg.run_dir)
        self.tokenizer = build_tokenizer(cfg.model.tokenizer)
        self.gold = build_gold(cfg.pipeline.gold)
        self._check()
        session.claim(cfg, self.directory, "pipeline", shared=True)
        self.state = RunState(self.directory / "state.json", cfg.seed)

    def run(self, only: Step | None = None) -> None:
        """Run every stage that is not complete, or just ``only``, whose forerunners must be complete."""
        steps = order(self.cfg)
        self._look_at([step for step in steps if only is None or step.name in only.after])
        if only is not None:
            self._check_forerunners(only)
        ended = False
        for step in steps if only is None else [only]:
            if step.round > self._last_round:
                if not ended:
                    self._say_that_rounds_ended()
                ended = True
            elif step.kind == "report":
                self._report()
            elif not self.state.is_complete(step.name):
                stopping.leave_if_asked(f"before {step.name}: the same command goes on there")
                self._run(step)

    def _run(self, step: Step) -> None:
        work: dict[str, Callable[[], None]] = {
            "sft": self._sft,
            "preferences": self._label_preferences,
            "train_rm": lambda: self._train_member(step.round, step.member),
            "reference": lambda: self._reference(step.round),
            "attack": lambda: self._attack(step.round),
            "select": lambda: self._select(step.round),
            "rlhf": lambda: self._rlhf(step.run, self.cfg.pipeline.rlhf[step.run], self._last_round),
        }
        lock = step.name.replace("/", ".")
        runtime.on_writer(lambda: writers.hold(self.directory / "locks", lock, self.directory / step.name))
        try:
            self.state.reload()  # another job may have completed it just now
            if self.state.is_complete(step.name):
                return
            if runtime.current().is_writer:
                print(f"== {step.name}", flush=True)
            with self.state.running(step.name):
                work[step.kind]()
                left = runtime.on_writer(lambda: artefacts.describe(self.directory, step))
                self.state.set_detail(step.name, files=left)
        finally:
            writers.release(self.directory / "locks", lock)

    def _look_at(self, steps: list[Step]) -> None:
        """What complete stages have left must be there; one of which nothing is left is done again, with a word."""
        for step in steps:
            if not self.state.is_complete(step.name):
                continue
            written = self.state.detail(step.name, "files")
            if not runtime.on_writer(lambda: artefacts.are_there(self.directory, step, written)):  # noqa: B023
                if runtime.current().is_writer:
                    print(f"{step.name} was complete, but nothing of it is left: it is done again", flush=True)
                self.state.set_detail(step.name, status="lost")

    @property
    def _last_round(self) -> int:
        return last_round(self.cfg, self.state.detail)

    def _check_forerunners(self, only: Step) -> None:
        for step in order(self.cfg):
            if step.name in only.after and step.round <= self._last_round and not self.state.is_complete(step.name):
                raise ConfigError(f"pipeline.only={only.name}: {step.name}, which it needs, is not complete")

    def _say_that_rounds_ended(self) -> None:
        number = self._last_round
        if runtime.current().is_writer:
            reason = self.state.detail(f"round_{number}/select", "stop")
            print(f"the rounds end after round {number}: {reason}", flush=True)

    # what the stages do

    def _sft(self) -> None:
        train_sft(for_stage(self.cfg, "sft"), self.tokenizer, self.directory / "sft", self._sft_rows)

    def _label_preferences(self) -> None:
        """Pairs of SFT responses labelled by gold: the human annotators of the embedded experiment."""
        from nemo_advrm.synthetic.corpus import sample_prompts
        from nemo_advrm.synthetic.gold import GoldReward
        from nemo_advrm.synthetic.preferences import gold_labelled_pairs

        options, cfg = self.cfg.synthetic, for_stage(self.cfg, "attack")
        # ties and equal responses are dropped, so a few more prompts are drawn than pairs are wanted
        for part, wanted, flips in (
            ("train", options.preference_pairs, options.flip_probability),
            ("validation", options.validation_pairs, 0.0),
        ):
            seed = derive_seed(self.cfg.seed, "preferences", part)
            prompts = encode_prompts(sample_prompts(wanted + wanted // 8 + 32, seed), self.tokenizer, cfg)
            rollouts = sample(cfg, self.tokenizer, self._policy(), prompts, 2, seed)
            rows = gold_labelled_pairs(
                [p.messages for p in prompts],
                list(zip(rollouts.responses[::2], rollouts.responses[1::2], strict=True)),
                GoldReward(),
                flips,
                seed,
            )
            path = self.directory / "preferences" / f"{part}.jsonl"
            runtime.on_writer(lambda path=path, kept=rows[:wanted]: write_jsonl_atomic(path, kept))  # type: ignore[misc]

    def _train_member(self, number: int, k: int) -> None:
        cfg = for_stage(self.cfg, "train_rm")
        stores = [str(self._round(i) / "pairs.jsonl") for i in range(number)]
        cfg.augmentation.pairs_path = ",".join(filter(None, [cfg.augmentation.pairs_path, *stores]))
        seed = derive_seed(self.cfg.seed, "rm", number, k)
        cfg.reward_model.feature_policy = cfg.reward_model.feature_policy or self._policy_path
        data = self._encoded_preferences
        data = bootstrap(data, derive_seed(seed, "bootstrap")) if cfg.ensemble.bootstrap else keep_back(cfg, data)
        directory = self._round(number) / f"rm_{k}"
        train_reward_model(
            cfg,
            self.tokenizer,
            directory,
            data,
            seed,
            f"{directory.parent.name}/rm_{k}",
            self._policy_path,
        )

    def _reference(self, number: int) -> None:
        cfg = for_stage(self.cfg, "attack")
        count = cfg.reference.samples_per_prompt
        if number == 0:
            seed = derive_seed(self.cfg.seed, "reference")
            rollouts = sample(cfg, self.tokenizer, self._policy(), self._prompts, count, seed)
        else:  # the same responses, scored by this round's members
            rollouts = read_rollouts(self._round(0) / "reference.jsonl", self._prompts, self.tokenizer)
        write_reference(self._round(number) / "reference.jsonl", rollouts, count, self._members(number), self.gold)

    def _attack(self, number: int) -> None:
        cfg = for_stage(self.cfg, "attack")
        cfg.pretrained_checkpoint.restore_from_path = self._policy_path
        home = self._round(number)
        run_attack(
            cfg,
            self.tokenizer,
            home / "attack",
            self._prompts,
            self._members(number),
            runtime.on_writer(lambda: Reference.read(home / "reference.jsonl")),
            self.gold,
            derive_seed(self.cfg.seed, "attack", number),
        )

    def _select(self, number: int) -> None:
        home = self._round(number)
        seed = derive_seed(self.cfg.seed, "select", number)
        counts = runtime.on_writer(lambda: select_round(for_stage(self.cfg, "attack"), home, number, seed))
        if runtime.current().is_writer:
            print(f"{home.name}: {counts['selected']} adversarial pairs  ({dropped(counts)})", flush=True)
            print(*found_lines(counts), sep="\n", flush=True)
        stop = runtime.on_writer(lambda: reason_to_stop(for_stage(self.cfg, "attack"), home, counts))
        self.state.set_detail(f"{home.name}/select", stop=stop, **counts)

    def _rlhf(self, name: str, options: RLHFRunConfig, last: int) -> None:
        cfg = for_stage(self.cfg, "rlhf")
        cfg.pretrained_checkpoint.restore_from_path = self._policy_path
        members = self._members(last if options.reward == "hardened" else 0)
        statistics = None
        if options.reward != "ensemble":
            members = members[:1]
        elif cfg.ensemble.standardise:
            reference = runtime.on_writer(lambda: Reference.read(self._round(0) / "reference.jsonl"))
            statistics = fit_members(reference.scores_PNK.flatten(0, 1))
        home = self.directory / "rlhf" / name
        reward = combined(members, options.aggregate, options.coefficient, statistics, home)
        prompts = encode_prompts(rlhf_prompts(cfg), self.tokenizer, cfg)
        # every reward meets the same prompts and random numbers
        run_rlhf(
            cfg,
            self.tokenizer,
            home,
            prompts,
            reward,
            self.gold,
            self.cfg.seed,
            f"rlhf/{name}",
        )

    def _report(self) -> None:
        from nemo_advrm.report import render_summary, write_report

        def write() -> None:
            write_report(self.directory)
            print(render_summary(self.directory))
            print(f"report: {self.directory / 'report' / 'index.html'}")

        runtime.on_writer(write)

    # what the stages share

    def _round(self, number: int) -> Path:
        return self.directory / f"round_{number}"

    @property
    def _policy_path(self) -> str:
        if self.cfg.pipeline.sft:
            return str(self.directory / "sft" / "model")
        return self.cfg.pretrained_checkpoint.restore_from_path

    def _policy(self) -> Any:
        return build_policy(self.cfg, self.tokenizer, self._policy_path, 0, trainable=False)

    @cached_property
    def _prompts(self) -> list[Prompt]:
        cfg = for_stage(self.cfg, "attack")
        return encode_prompts(attack_prompts(cfg), self.tokenizer, cfg)

    @cached_property
    def _sft_rows(self) -> list[EncodedResponse]:
        cfg = for_stage(self.cfg, "sft")
        return encode_responses(cfg, self.tokenizer, sft_rows(cfg))

    @cached_property
    def _encoded_preferences(self) -> EncodedPreferences:
        return encode_rows(for_stage(self.cfg, "train_rm"), self.tokenizer, *self._preferences())

    def _preferences(self) -> tuple[list[PreferencePair], list[PreferencePair]]:
        if not labels_by_gold(self.cfg):
            return inputs.training_and_validation_pairs(for_stage(self.cfg, "train_rm"))
        home = self.directory / "preferences"
        return load_preferences(home / "train.jsonl").rows, load_preferences(home / "validation.jsonl").rows

    def _members(self, number: int) -> list[RewardSource]:
        paths = [str(self._round(number) / f"rm_{k}" / "model") for k in range(1, self.cfg.ensemble.size + 1)]
        return load_members(for_stage(self.cfg, "train_rm"), paths, self.tokenizer)

    def _check(self) -> None:
        """What can be known to fail is told before anything starts."""
        cfg = self.cfg
        if not cfg.pipeline.sft and not cfg.pretrained_checkpoint.restore_from_path:
            raise ConfigError(
                "pretrained_checkpoint.restore_from_path is not set: name a policy, or set pipeline.sft=true"
            )
        if cfg.ensemble.size < 2:
            raise ConfigError(f"ensemble.size={cfg.ensemble.size}: an attack needs at least 2 reward models")
        if cfg.reward_model.loss == "regression":
            raise ConfigError(
                "reward_model.loss=regression: the pipeline's rounds train on pairs, which have no labels; train such "
                "members by train_rm and attack them by attack"
            )
        check_directions(cfg, cfg.ensemble.size)
        if not labels_by_gold(self.cfg):
            self._encoded_preferences  # noqa: B018 (reads and checks the data)
        self._prompts  # noqa: B018
        encode_prompts(rlhf_prompts(for_stage(cfg, "rlhf")), self.tokenizer, for_stage(cfg, "rlhf"))
        if cfg.pipeline.sft:
            self._sft_rows  # noqa: B018
