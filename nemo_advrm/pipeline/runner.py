"""Runs the steps of a pipeline in the order of their dependencies and records which are complete.

Steps read and write files of the run directory only. ``state.json`` records the complete ones, so that a stopped run
resumes with the others. A process takes the first step that is ready and not locked by another process, so that
several workers of one command (``pipeline.jobs``) share the steps: see :mod:`nemo_advrm.pipeline.workers`. The steps
themselves are in :mod:`nemo_advrm.pipeline.rounds`.
"""

from __future__ import annotations

import time
from contextlib import nullcontext
from pathlib import Path

from nemo_advrm import locks
from nemo_advrm.attacks.run import check_target_members
from nemo_advrm.config import for_stage
from nemo_advrm.config.schema import Config
from nemo_advrm.config.validation import check_held_out
from nemo_advrm.detectors.base import build_detector
from nemo_advrm.engine import runtime, stopping
from nemo_advrm.engine.collectives import run_on_rank_zero
from nemo_advrm.errors import ConfigError
from nemo_advrm.objectives.losses import reads_labels
from nemo_advrm.pipeline import artefacts, branches
from nemo_advrm.pipeline.dag import Step, added_since, is_skipped, of_run
from nemo_advrm.pipeline.hybrids import lacks_features
from nemo_advrm.pipeline.rounds import Rounds
from nemo_advrm.pipeline.run_inputs import Inputs
from nemo_advrm.pipeline.state import RunState
from nemo_advrm.rank_info import worker
from nemo_advrm.run_directory import cost, run_dir

# interval at which a worker checks whether a step has become ready
POLL_SECONDS = 0.25


class Pipeline:
    """Runs the steps of one run directory in this process.

    A run directory may hold arms and branches that ``cfg`` does not name; their steps are not run.
    """

    def __init__(self, cfg: Config) -> None:
        self.directory = Path(cfg.run_dir)
        check(cfg)
        inputs = Inputs(cfg)
        if worker() <= 1:
            inputs.check()
        run_dir.claim(cfg, self.directory, "pipeline", shared=True)
        self.cfg, self.order = run_on_rank_zero(of_run, cfg)
        self.state = RunState(self.directory / "state.json", cfg.seed)
        self.rounds = Rounds(self.cfg, self.state, inputs)

    def run(self, only: Step | None = None) -> None:
        """Runs every step that is not complete, or ``only`` one step.

        Raises ConfigError when a step that ``only`` needs is not complete.
        """
        self._check_results([step for step in self.order if only is None or step.name in only.after])
        self._reopen([step for step in self.order if only is None or step.name == only.name])
        if only is not None and only.kind == "report":
            self._check_needed(only)
            self._report()
        elif only is not None:
            self._check_needed(only)
            self._print_ended(only)
            if not self._is_over(only) and self._take(only):
                self._do(only)
        else:
            while left := [step for step in self.order if step.kind != "report" and not self._is_over(step)]:
                self._next(left)
            self._print_ended()
            if worker() <= 1 and any(step.kind == "report" for step in self.order):
                self._report()

    def _next(self, left: list[Step]) -> None:
        """Runs the first step that is ready and not taken by another worker; without one, waits ``POLL_SECONDS``."""
        waiting = {step.name for step in left}
        ready = [step for step in left if waiting.isdisjoint(step.after)]
        stopping.leave_if_asked(f"before {(ready or left)[0].name}: the same command resumes there")
        taken = next((step for step in ready if self._take(step)), None)
        if taken is not None:
            self._do(taken)
            return
        time.sleep(POLL_SECONDS)
        self.state.reload()

    def _take(self, step: Step) -> bool:
        """Locks a step for this process; returns False when it is complete by now or locked by another worker.

        Raises ConfigError when a process of another command holds the lock.
        """
        try:
            run_on_rank_zero(lambda: locks.acquire(self.directory / "locks", _lock(step), self.directory / step.name))
        except locks.InUse:
            if worker():
                return False
            raise
        self.state.reload()  # another process may have completed it since
        if self.state.is_complete(step.name):
            locks.release(self.directory / "locks", _lock(step))
            return False
        return True

    def _do(self, step: Step) -> None:
        try:
            if runtime.current().is_writer:
                print(f"== {step.name}", flush=True)
            with self.state.running(step.name):
                is_added_to = step.kind == "train_rm" and run_on_rank_zero(self._result(step).exists)
                # a training is not repeated: its cost stays, and all of this is for its features
                with cost.measured() as spent, cost.part("features") if is_added_to else nullcontext():
                    self.rounds.do(step)
                if is_added_to:
                    spent = {key: value + (self.state.detail(step.name, key) or 0.0) for key, value in spent.items()}
                self.state.set_detail(step.name, **spent)
                left = run_on_rank_zero(artefacts.describe, self.directory, step)
                self.state.set_detail(step.name, files=left)
        finally:
            locks.release(self.directory / "locks", _lock(step))

    def _result(self, step: Step) -> Path:
        return self.directory / step.name / "result.json"

    def _is_over(self, step: Step) -> bool:
        return self.state.is_complete(step.name) or is_skipped(self.cfg, step, self.state.detail)

    def _check_results(self, steps: list[Step]) -> None:
        """Checks the files of complete steps; marks a step that has lost all its files to be run again.

        Raises DataError when only a part is missing or changed.
        """
        # later steps first: those that join others list what these left, and one error about a file is enough
        for step in reversed(steps):
            if not self.state.is_complete(step.name):
                continue
            written = self.state.detail(step.name, "files")
            if not run_on_rank_zero(artefacts.are_there, self.directory, step, written):
                if runtime.current().is_writer:
                    print(f"{step.name} was complete, but its files are gone: it is run again", flush=True)
                self.state.set_detail(step.name, status="lost")

    def _reopen(self, steps: list[Step]) -> None:
        """Marks what later arms made incomplete: measurements of an arm's runs, and members without features."""
        for step in steps:
            if self.state.is_complete(step.name) and (added := added_since(step, self.state.detail)):
                if runtime.current().is_writer:
                    print(f"{step.name} was complete before {', '.join(added)} were added: it is run again", flush=True)
                self.state.set_detail(step.name, status="outdated")
            if run_on_rank_zero(lacks_features, self.cfg, step, self.state.detail):
                if runtime.current().is_writer:
                    print(
                        f"{step.name} was trained before its reference features were used: they are fitted", flush=True
                    )
                self.state.set_detail(step.name, status="outdated")

    def _check_needed(self, only: Step) -> None:
        for step in self.order:
            if step.name in only.after and not self._is_over(step):
                raise ConfigError(f"pipeline.only={only.name}: {step.name}, which it needs, is not complete")

    def _print_ended(self, only: Step | None = None) -> None:
        """Prints the branches whose rounds ended early; with ``only``, when that step is skipped for this reason."""
        if worker() > 1 or not runtime.current().is_writer:
            return
        for name, options in branches.all_branches(self.cfg).items():
            number = branches.last_round(self.cfg, name, self.state.detail)
            concerned = only is None or (only.branch == name and is_skipped(self.cfg, only, self.state.detail))
            if number < options.rounds and concerned:
                reason = self.state.detail(f"{branches.attack_home(self.cfg, name, number)}/select", "stop")
                rounds = f"the rounds of {name}" if name else "the rounds"
                print(f"{rounds} end after round {number}: {reason}", flush=True)

    def _report(self) -> None:
        from nemo_advrm.report import write_report

        def write() -> None:
            report = write_report(self.directory)
            print(report.text())
            print(f"report: {report.page}")

        run_on_rank_zero(write)


def _lock(step: Step) -> str:
    return step.name.replace("/", ".")


def check(cfg: Config) -> None:
    """Raises ConfigError for settings that would fail later."""
    if not cfg.pipeline.sft and not cfg.pretrained_checkpoint.restore_from_path:
        raise ConfigError("pretrained_checkpoint.restore_from_path is not set: name a policy, or set pipeline.sft=true")
    if cfg.ensemble.size < 2:
        raise ConfigError(f"ensemble.size={cfg.ensemble.size}: an attack needs at least 2 reward models")
    if reads_labels(cfg.reward_model.loss):
        raise ConfigError(
            f"reward_model.loss={cfg.reward_model.loss}: the pipeline trains on pairs, which have no labels; "
            "train such members with nemo-advrm train_rm and attack them with nemo-advrm attack"
        )
    check_target_members(cfg, cfg.ensemble.size)
    rl, attack = for_stage(cfg, "rlhf"), for_stage(cfg, "attack")
    check_held_out(rl, "rl.held_out_prompts", rl.rl.held_out_prompts)
    check_held_out(attack, "adversarial.held_out_prompts", attack.adversarial.held_out_prompts)
    build_detector(attack.adversarial.detector)  # one from outside that cannot be imported is an error now
    run_on_rank_zero(of_run, cfg)
