"""Stage ``pipeline``: train the ensemble, attack it, retrain it, round after round; then RLHF and the report.

Every step reads and writes files of the run directory only. ``state.json`` says which are complete; a run that was
stopped goes on with those that are not. A process takes the first step that is ready and that no other process works
on, so that several workers of one command (``pipeline.jobs``) share the steps: see :mod:`nemo_advrm.pipeline.workers`.
"""

from __future__ import annotations

import time
from pathlib import Path

from nemo_advrm import locks
from nemo_advrm.attacks.run import check_target_members
from nemo_advrm.config import for_stage
from nemo_advrm.config.schema import Config
from nemo_advrm.config.validation import check_held_out
from nemo_advrm.engine import runtime, stopping
from nemo_advrm.engine.collectives import run_on_rank_zero
from nemo_advrm.errors import ConfigError
from nemo_advrm.pipeline import artefacts, branches
from nemo_advrm.pipeline.dag import Step, added_since, is_skipped, of_run
from nemo_advrm.pipeline.state import RunState
from nemo_advrm.pipeline.steps import Inputs, Steps
from nemo_advrm.rank_info import worker
from nemo_advrm.run_directory import cost, run_dir

# between looks of a worker for a step that has become ready
LOOK_SECONDS = 0.25


class Pipeline:
    """The steps of one run directory, as this process takes them.

    A run may hold arms and branches that ``cfg`` does not ask for: their steps are left alone.
    """

    def __init__(self, cfg: Config) -> None:
        self.directory = Path(cfg.run_dir)
        check(cfg)
        found = Inputs(cfg)
        if worker() <= 1:
            found.check()
        run_dir.claim(cfg, self.directory, "pipeline", shared=True)
        self.cfg, self.order = run_on_rank_zero(of_run, cfg)
        self.state = RunState(self.directory / "state.json", cfg.seed)
        self.steps = Steps(self.cfg, self.state, found)

    def run(self, only: Step | None = None) -> None:
        """Run every step that is not complete, or just ``only``, whose forerunners must be complete."""
        self._look_at([step for step in self.order if only is None or step.name in only.after])
        self._reopen([step for step in self.order if only is None or step.name == only.name])
        if only is not None and only.kind == "report":
            self._check_forerunners(only)
            self._report()
        elif only is not None:
            self._check_forerunners(only)
            self._say_what_ended(only)
            if not self._is_over(only) and self._take(only):
                self._do(only)
        else:
            while left := [step for step in self.order if step.kind != "report" and not self._is_over(step)]:
                self._next(left)
            self._say_what_ended()
            if worker() <= 1:
                self._report()

    def _next(self, left: list[Step]) -> None:
        """Do the first step that is ready and that nobody else works on; if there is none, wait a moment for one."""
        waiting = {step.name for step in left}
        ready = [step for step in left if waiting.isdisjoint(step.after)]
        stopping.leave_if_asked(f"before {(ready or left)[0].name}: the same command goes on there")
        taken = next((step for step in ready if self._take(step)), None)
        if taken is not None:
            self._do(taken)
            return
        time.sleep(LOOK_SECONDS)
        self.state.reload()

    def _take(self, step: Step) -> bool:
        """Become the process that works on a step; False when it is complete by now, or another worker has it.

        Raises ConfigError when a process has it that does not belong to this command.
        """
        try:
            run_on_rank_zero(lambda: locks.acquire(self.directory / "locks", _lock(step), self.directory / step.name))
        except locks.InUse:
            if worker():
                return False
            raise
        self.state.reload()  # another job may have completed it just now
        if self.state.is_complete(step.name):
            locks.release(self.directory / "locks", _lock(step))
            return False
        return True

    def _do(self, step: Step) -> None:
        try:
            if runtime.current().is_writer:
                print(f"== {step.name}", flush=True)
            with self.state.running(step.name):
                with cost.measured() as spent:
                    self.steps.do(step)
                self.state.set_detail(step.name, **spent.details())
                left = run_on_rank_zero(artefacts.describe, self.directory, step)
                self.state.set_detail(step.name, files=left)
        finally:
            locks.release(self.directory / "locks", _lock(step))

    def _is_over(self, step: Step) -> bool:
        return self.state.is_complete(step.name) or is_skipped(self.cfg, step, self.state.detail)

    def _look_at(self, steps: list[Step]) -> None:
        """What complete stages have left must be there; one of which nothing is left is done again, with a word."""
        for step in steps:
            if not self.state.is_complete(step.name):
                continue
            written = self.state.detail(step.name, "files")
            if not run_on_rank_zero(artefacts.are_there, self.directory, step, written):
                if runtime.current().is_writer:
                    print(f"{step.name} was complete, but nothing of it is left: it is done again", flush=True)
                self.state.set_detail(step.name, status="lost")

    def _reopen(self, steps: list[Step]) -> None:
        """What was measured on the runs of an arm is measured again when the arm has got more of them."""
        for step in steps:
            if self.state.is_complete(step.name) and (added := added_since(step, self.state.detail)):
                if runtime.current().is_writer:
                    print(f"{step.name} was complete before {', '.join(added)} came: it is done again", flush=True)
                self.state.set_detail(step.name, status="outdated")

    def _check_forerunners(self, only: Step) -> None:
        for step in self.order:
            if step.name in only.after and not self._is_over(step):
                raise ConfigError(f"pipeline.only={only.name}: {step.name}, which it needs, is not complete")

    def _say_what_ended(self, only: Step | None = None) -> None:
        """The branches whose rounds ended early, once; with ``only``, when that step is left out for it."""
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
    """Raise ConfigError for what can be known to fail before anything starts."""
    if not cfg.pipeline.sft and not cfg.pretrained_checkpoint.restore_from_path:
        raise ConfigError("pretrained_checkpoint.restore_from_path is not set: name a policy, or set pipeline.sft=true")
    if cfg.ensemble.size < 2:
        raise ConfigError(f"ensemble.size={cfg.ensemble.size}: an attack needs at least 2 reward models")
    if cfg.reward_model.loss == "regression":
        raise ConfigError(
            "reward_model.loss=regression: the pipeline's rounds train on pairs, which have no labels; train such "
            "members by train_rm and attack them by attack"
        )
    check_target_members(cfg, cfg.ensemble.size)
    rl, attack = for_stage(cfg, "rlhf"), for_stage(cfg, "attack")
    check_held_out(rl, "rl.held_out_prompts", rl.rl.held_out_prompts)
    check_held_out(attack, "adversarial.held_out_prompts", attack.adversarial.held_out_prompts)
    run_on_rank_zero(of_run, cfg)
