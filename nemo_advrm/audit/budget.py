"""How many responses each attack may try: as asked, or as many as the time allows that is left."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from nemo_advrm import files
from nemo_advrm.attacks.base import build_attack
from nemo_advrm.attacks.language_models import LanguageModels
from nemo_advrm.audit.attack_stage import attack_home, seconds_of_search
from nemo_advrm.audit.panel import Panel
from nemo_advrm.audit.settings import parse_budget
from nemo_advrm.audit.time_spent import RESERVE, read_cost, spent_seconds
from nemo_advrm.engine.collectives import run_on_rank_zero
from nemo_advrm.run_directory import results

BUDGET = "budget.json"
# Seconds of a response of an attack by RL, in those of an ordinary one: RL also asks the reference policy, and learns
_RL = 3.0
# responses to a prompt at least, whatever the time: RL learns nothing from fewer; each of a search's is searched for
_LEAST_RL, _LEAST_SEARCH = 4, 1


def samples_for(panel: Panel, attack: str, left: Sequence[str], models: LanguageModels) -> int:
    """Returns the responses that an attack may try on each target; all ranks call, and all targets get as many.

    The number is decided once and kept in ``attacks/ATTACK/budget.json``, so that an audit that was stopped goes on
    with the same one. A budget of time is shared out equally among the attacks that are left, and what a response of a
    search takes is tried first. Of the share of an attack, the judge gets what its questions will take, and half at
    most.

    Args:
        left: the attacks that have no number yet, this one among them.
        models: language models, shared by all attacks.
    """
    path = attack_home(panel, attack, 0).parent / BUDGET
    known = run_on_rank_zero(_read, path)
    if known:
        return known
    one = 0.0
    if parse_budget(panel.audit.budget).seconds and not build_attack(attack).trains:
        one = seconds_of_search(panel, attack, models)
    return run_on_rank_zero(_decide, panel, left, path, one)


def _read(path: Path) -> int:
    if not path.exists():
        return 0
    samples = results.read_object(path, ("samples",), f"remove {path.parent} and the attack is done again")["samples"]
    return int(samples)


def _decide(panel: Panel, left: Sequence[str], path: Path, one: float) -> int:
    """Returns the number and writes it; ``one`` is what a response takes, 0 for RL, of which it is estimated."""
    budget = parse_budget(panel.audit.budget)
    samples = budget.samples
    if not samples:
        cost = read_cost(panel.audit)
        judge = panel.judge_time
        spent = spent_seconds(panel.audit) + (judge.seconds if judge else 0.0)
        seconds = max(0.0, budget.seconds * (1 - RESERVE) - spent) / (len(left) * panel.targets)
        prompts, held_out = len(panel.training.prompts), len(panel.held_out.prompts) if panel.held_out else 0
        questions = (prompts + held_out) * panel.audit.responses_per_prompt
        seconds -= min(seconds / 2, judge.each * questions) if judge else 0.0
        least = (_LEAST_SEARCH if one else _LEAST_RL) * prompts
        one = one or _RL * cost["sampling_seconds"] / max(1, cost["responses"])
        # a search is repeated on the held-out prompts, a trained adversary answers all of them
        samples = max(least, int(seconds / one * prompts / (prompts + held_out))) if one else least
    files.write_text(path, json.dumps({"samples": samples}))
    return samples
