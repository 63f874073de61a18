"""Runs an audit from its settings to its page; a stopped one goes on with the first attack that is not finished."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from nemo_advrm import signals
from nemo_advrm.attacks.base import build_attack
from nemo_advrm.attacks.language_models import LanguageModels
from nemo_advrm.audit.attack_stage import (
    AttackResult,
    attack_home,
    check_attack,
    finished,
    run_attack,
)
from nemo_advrm.audit.budget import BUDGET, samples_for
from nemo_advrm.audit.finds import finds_of, judge_attack, rollouts_of_rows, to_judge, write_pairs
from nemo_advrm.audit.measure_names import STRICT, SUSPECTED, short_name
from nemo_advrm.audit.page import write_page
from nemo_advrm.audit.panel import Panel
from nemo_advrm.audit.progress import AuditProgress
from nemo_advrm.audit.settings import parse_budget
from nemo_advrm.audit.setup import judge_ordinary, open_panel, ordinary_texts
from nemo_advrm.audit.success import rate
from nemo_advrm.audit.summary import Facts, summarise
from nemo_advrm.audit.time_spent import spent_seconds
from nemo_advrm.config.schema import AuditConfig
from nemo_advrm.engine import runtime, stopping
from nemo_advrm.engine.collectives import run_on_rank_zero
from nemo_advrm.errors import ConfigError
from nemo_advrm.files import write_text
from nemo_advrm.registry import ATTACKS
from nemo_advrm.report.names import duration
from nemo_advrm.rewards.base import checked_scores
from nemo_advrm.rewards.sources import gold_spec
from nemo_advrm.rollouts.types import Rollouts

SUMMARY = "summary.json"
# One part of so many of the time: what the judge may take for ordinary responses before the attacks, and after them of
# what is left
_ORDINARY, _ORDINARY_AGAIN = 3.0, 2.0


def run_audit(audit: AuditConfig) -> Facts:
    """Runs the attacks that are not finished, judges what they found, writes the page; returns the summary.

    All ranks call. Raises ConfigError for an attack that was named and cannot run here; one of the built-in ones that
    was not named is left out with its reason. Raises Preempted after a signal.
    """
    started = time.monotonic()
    panel = open_panel(audit)
    gold = gold_spec(panel.cfg)
    # people get one sheet with everything, after all attacks; other judges are asked after each
    at_the_end = gold is not None and gold.kind == "human"
    if not at_the_end:
        panel = judge_ordinary(panel, _ORDINARY)
    names, left_out = _attacks(panel)
    policy = panel.cfg.pretrained_checkpoint.restore_from_path
    models = LanguageModels(panel.cfg, panel.tokenizer, policy, panel.sft_policy)
    progress = AuditProgress(len(names) * panel.targets, lambda: _time_used(panel))
    done: list[AttackResult] = []
    samples: dict[str, int] = {}
    for place, name in enumerate(names):
        try:
            samples[name] = samples_for(panel, name, names[place:], models)
            done += _on_all_targets(panel, name, samples[name], models, progress, judge=not at_the_end)
        except ConfigError as error:
            if audit.attacks:
                raise
            left_out[name] = str(error)
            samples.pop(name, None)
            progress.attacks -= panel.targets
            run_on_rank_zero(_forget, panel, name)
        finally:
            progress.stop()
    if not samples:
        raise ConfigError("no attack can run: " + "; ".join(f"{name}: {why}" for name, why in left_out.items()))
    if at_the_end:
        panel = _ask_people(panel, done)
    elif panel.judge_time is not None:
        panel = judge_ordinary(panel, _ORDINARY_AGAIN)
    done = [result for result in done if result.attack in samples]
    judged = [one for i, result in enumerate(done) for one in judge_attack(panel, result, len(done) - i)]
    seconds = time.monotonic() - started
    judging = panel.judge_time.seconds if panel.judge_time is not None else 0.0
    before = run_on_rank_zero(lambda: spent_seconds(audit) + judging)
    summary = summarise(panel, judged, samples, left_out, max(seconds, before))
    by_target = [finds_of([one for one in judged if one.result.target == k]) for k in range(panel.targets)]
    summary["pairs"] = run_on_rank_zero(write_pairs, panel, [find for finds in by_target for find in finds])
    run_on_rank_zero(_write, Path(audit.run_dir), summary)
    return summary


def _ask_people(panel: Panel, done: Sequence[AttackResult]) -> Panel:
    """Asks for all judgements at once, so that there is one sheet; returns the panel with those of ordinary responses.

    Raises WaitingForPeople while the sheet is not filled in.
    """
    assert panel.judge is not None
    parts = [ordinary_texts(split.sft) for split in panel.splits]
    for result in done:
        parts += [rollouts_of_rows(split, to_judge(panel, result, split)) for split in panel.splits]
    checked_scores(panel.judge, Rollouts.concatenated(parts))
    return judge_ordinary(panel, _ORDINARY)


def _attacks(panel: Panel) -> tuple[list[str], dict[str, str]]:
    """Returns the attacks to run and, of the built-in ones that were not named, those that are left out with why."""
    if panel.audit.attacks:
        for name in panel.audit.attacks:
            check_attack(panel, name)
        return list(dict.fromkeys(panel.audit.attacks)), {}
    kept, left_out = [], {}
    for name in ATTACKS:
        try:
            check_attack(panel, name)
        except ConfigError as error:
            left_out[name] = str(error)
            continue
        if name == "adv_rm" and not panel.audit.others:
            left_out[name] = "it needs others; with one model it is over_optimisation"
            continue
        kept.append(name)
    # searches first: what RL takes is known best, so that it gets the time that is left
    kept.sort(key=lambda name: build_attack(name).trains)
    return kept, left_out


def _on_all_targets(
    panel: Panel, attack: str, samples: int, models: LanguageModels, progress: AuditProgress, judge: bool
) -> list[AttackResult]:
    """Runs an attack on every target, unless that is done, and tells how often it succeeded."""
    trains = build_attack(attack).trains
    done = []
    for k in range(panel.targets):
        stopping.leave_if_asked(f"before {attack} on {panel.names[k]}: the same command resumes there")
        result: AttackResult | None = finished(panel, attack, k)
        search = 0.0
        if result is None:
            progress.begin(short_name(attack), panel.names[k], _responses(panel, samples), trains)
            counter = progress.scored if trains else _stoppable(progress.scored)
            result = run_attack(panel, attack, k, samples, models, counter, progress.tried)
            search = result.seconds
        done.append(result)
        if not judge:
            progress.end(short_name(attack), panel.names[k], None, f"{result.responses} responses")
            continue
        measure = SUSPECTED if panel.judge is None else STRICT
        judged = judge_attack(panel, result, max(1, progress.attacks - progress.done), search)
        shares = {one.split.name: rate(one.first().of(measure)) for one in judged}
        known = {name: share for name, share in shares.items() if share is not None}
        parts = [f"{measure} {one['rate']:.0%} of {one['trials']} {name} prompts" for name, one in known.items()]
        highest = max((one["rate"] for one in known.values()), default=None)
        line = ", ".join(parts).replace("_", "-") or "nothing submitted"
        progress.end(short_name(attack), panel.names[k], highest, line)
    return done


def _responses(panel: Panel, samples: int) -> int:
    """Returns about how many responses a search tries in all, with its repetition on the held-out prompts."""
    prompts = [len(split.prompts) for split in panel.splits]
    return round(samples * sum(prompts) / prompts[0])


def _time_used(panel: Panel) -> str:
    """Returns how much of the time of a budget is used, "" where it is one of responses; on rank 0."""
    limit = parse_budget(panel.audit.budget).seconds
    if not limit:
        return ""
    return f"{duration(spent_seconds(panel.audit) + panel.judge_seconds)} of {duration(limit)} used"


def _stoppable(counter: Callable[[int], None]) -> Callable[[int], None]:
    """Ends a search at a signal, which starts over then; a training saves its steps itself.

    Of several processes only all together may stop, which they do before the next attack.
    """

    def counted(count: int) -> None:
        counter(count)
        if signals.received() and runtime.current().world_size == 1:
            stopping.leave_if_asked("during a search: the same command starts it over")

    return counted


def _forget(panel: Panel, attack: str) -> None:
    """Removes the budget of an attack that cannot run."""
    home = attack_home(panel, attack, 0).parent
    (home / BUDGET).unlink(missing_ok=True)


def _write(directory: Path, summary: dict[str, Any]) -> None:
    write_page(directory / "report", summary)
    text = json.dumps(summary, indent=1, allow_nan=False, ensure_ascii=False)
    write_text(directory / SUMMARY, f"{text}\n")
