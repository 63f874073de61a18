"""Selects adversarial samples, pairs them with SFT responses and writes the pair store."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Hashable, Sequence
from pathlib import Path
from typing import Any

import torch

from nemo_advrm.attacks.attack_summary import add_to_summary, check_rule, has_underrated, success_rates
from nemo_advrm.attacks.pairing import ChosenSide, wrong_labels
from nemo_advrm.config.schema import Config
from nemo_advrm.data.jsonl import write_jsonl_atomic
from nemo_advrm.data.pair_store import AdversarialPair, PairStore
from nemo_advrm.data.run_records import ATTACK_SAMPLE, RESTORE_ROWS, read_rows
from nemo_advrm.data.sft_scores import SFTScores
from nemo_advrm.data.tokenizers import build_tokenizer
from nemo_advrm.detectors.base import features_of
from nemo_advrm.errors import ConfigError, DataError
from nemo_advrm.objectives.selection import AFTER_FINDS, first_step, select_pairs, text_signature
from nemo_advrm.rewards.find_rule import FindRule, falls_short
from nemo_advrm.seeds import derive_seed

RANDOM_PAIRS = "random_pairs.jsonl"


def select_round(cfg: Config, directory: Path, round_number: int, seed: int) -> dict[str, Any]:
    """Selects samples for every target of an attack; marks the samples and writes ``pairs.jsonl``.

    Returns:
        The number of ``selected`` samples and of samples dropped for each reason, over all targets; and under
        ``directions``, by target: ``selected``, ``found`` (different finds, before near-duplicates and caps are
        removed), ``null`` (finds among as many SFT responses) and ``wrong_labels`` (share of pairs whose rejected side
        has the higher gold; None without gold). These are also written to ``attack/summary.json``.

    Raises:
        ConfigError: the attack maximised another reward than ``adversarial`` configures.
        DataError: a sample is not one of this attack; names the line.
    """
    check_rule(cfg, directory / "attack")
    underrates = has_underrated(directory / "attack")
    tokenizer = build_tokenizer(cfg.model.tokenizer)  # the policy's tokenizer
    sft_responses = SFTScores.read(directory / "reference.jsonl", features_of(cfg.adversarial.detector))
    path = directory / "attack" / "samples.jsonl"
    # a repeated selection ignores the marks of the one before
    rows: list[dict[str, Any]] = []
    for n, row in read_rows(path, ATTACK_SAMPLE, "an attack", RESTORE_ROWS):
        rows.append({**row, "selected": False})
        _check_prompt_and_members(rows[-1], f"{path}:{n}", sft_responses)
    totals: Counter[str] = Counter()
    pairs: list[AdversarialPair] = []
    by_target: dict[str, dict[str, Any]] = {}
    for target in sorted({row["direction"] for row in rows}):
        own = [row for row in rows if row["direction"] == target]
        late = late_rows(own, cfg.selection.last_fraction)
        rule = FindRule(cfg, sft_responses, target, tokenizer, underrates)
        chosen, counts, facts = _select_target(cfg, late, rule, target, seed)
        totals.update({"selected": len(chosen), "early": len(own) - len(late), **counts})
        side = ChosenSide(cfg.selection, sft_responses, rule.usable_PI, target, seed, underrates)
        made = [side.pair(row, round_number, f"attack/{row['policy']}/model") for row in chosen]
        by_target[str(target)] = {"selected": len(made), **facts, "wrong_labels": wrong_labels(made)}
        pairs += made
        for row in chosen:
            row["selected"] = True
    store = directory / "pairs.jsonl"
    store.unlink(missing_ok=True)
    PairStore(store).append(pairs)
    write_jsonl_atomic(path, rows)
    add_to_summary(directory / "attack", by_target)
    return {**totals, "directions": by_target}


def late_rows(rows: list[dict[str, Any]], last_fraction: float) -> list[dict[str, Any]]:
    """Returns the rows of the last ``last_fraction`` of every adversary's steps, in their order."""
    steps: Counter[str] = Counter()
    for row in rows:
        steps[row["policy"]] = max(steps[row["policy"]], row["step"] + 1)
    first = {policy: first_step(count, last_fraction) for policy, count in steps.items()}
    return [row for row in rows if row["step"] >= first[row["policy"]]]


def _check_prompt_and_members(row: dict[str, Any], source: str, sft_responses: SFTScores) -> None:
    """Raises DataError for a row whose prompt or members are not those of ``sft_responses``."""
    prompts, _, members = sft_responses.scores_PNK.shape
    number, target = row["prompt_id"], row["direction"]
    if number >= prompts:
        raise DataError(f"{source}: prompt_id={number}, reference.jsonl has {prompts} prompts: restore both files")
    if target > members:
        raise DataError(f"{source}: direction={target}, reference.jsonl has {members} members: restore both files")
    for key in ("scores", "z"):
        if len(row[key]) != members:
            raise DataError(f"{source}: {key}={row[key]}, reference.jsonl has {members} members: restore both files")


def _select_target(
    cfg: Config, rows: list[dict[str, Any]], rule: FindRule, target: int, seed: int
) -> tuple[list[dict[str, Any]], dict[str, int], dict[str, float]]:
    """Returns the selected rows, the number dropped for each reason, and the finds with the null count."""
    options = cfg.selection
    signature = _signature(cfg)
    qualified_B = rule.qualified(rows)
    taken, counts = select_pairs(
        qualified_B,
        rule.ranking(rows),
        [row["prompt_id"] for row in rows],
        [row["response"] for row in rows],
        lambda i: signature(rows[i]["response"]),
        unusable=[rule.unusable(row) if ok else None for row, ok in zip(rows, qualified_B.tolist(), strict=True)],
        per_signature=options.per_signature,
        per_prompt=options.per_prompt,
        total=options.max_pairs,
        top_fraction=options.top_fraction,
        generator=_generator(seed, target) if options.random_within_top else None,
    )
    found = len(taken) + sum(counts[reason] for reason in AFTER_FINDS)
    if rule.falls_short(found, len(rows)):
        taken, counts = [], {**counts, **dict.fromkeys(AFTER_FINDS, 0), "below_null": found}
    return [rows[i] for i in taken], counts, {"found": found, "null": rule.null(len(rows))}


def _generator(seed: int, target: int) -> torch.Generator:
    return torch.Generator().manual_seed(derive_seed(seed, "select", target))


def _signature(cfg: Config) -> Callable[[str], Hashable]:
    if cfg.model.tokenizer == "synthetic":
        from nemo_advrm.synthetic.gold import token_class_signature

        return token_class_signature
    return text_signature


def dropped(counts: dict[str, Any]) -> str:
    """Returns the printed text: how many samples were dropped for each reason."""
    shown = {k: v for k, v in counts.items() if k not in ("selected", "directions") and v}
    return ", ".join(f"{count} {reason.replace('_', ' ')}" for reason, count in shown.items())


def found_lines(counts: dict[str, Any]) -> list[str]:
    """Returns a printed line for every target: its finds, the null count, and the share of wrong labels."""
    lines = []
    for target, facts in counts["directions"].items():
        wrong = "" if facts["wrong_labels"] is None else f", wrong labels {facts['wrong_labels']:.2f}"
        lines.append(
            f"target {target}: {facts['found']} different finds, null count {facts['null']:.1f} (finds among as many "
            f"SFT responses); {facts['selected']} pairs{wrong}"
        )
    return lines


def reason_to_stop(cfg: Config, home: Path, counts: dict[str, Any]) -> str:
    """Returns why the rounds end with the one in ``home``, "" when they go on; ``counts`` is :func:`select_round`'s."""
    options, found = cfg.selection, counts["directions"]
    if found and all(falls_short(facts["found"], facts["null"], options) for facts in found.values()):
        details = "; ".join(
            f"target {target}: {facts['found']}, null count {facts['null']:.1f}" for target, facts in found.items()
        )
        return (
            f"the attack found less than selection.null_ratio={options.null_ratio:g} times the null count ({details})"
        )
    if counts["selected"] < options.min_pairs:
        return f"{counts['selected']} pairs were selected, fewer than selection.min_pairs={options.min_pairs}"
    cure = f"restore it, or remove {home / 'attack'} to run the attack again"
    rates = success_rates(home / "attack" / "summary.json", cure)
    if rates and max(rates) < cfg.pipeline.stop_success_rate:
        return f"attack success {max(rates):.2f} is below pipeline.stop_success_rate"
    return ""


def random_pairs(cfg: Config, home: Path, count: int, seed: int, round_number: int = 0) -> dict[str, Any]:
    """Writes ``count`` pairs of SFT responses only, a control for adversarial pairs, to ``home/random_pairs.jsonl``.

    The chosen sides follow the same rule (``selection.chosen``). The rejected sides are drawn from the prompt's other
    SFT responses that ended and are text. Prompts and ``adversarial.target_members`` take turns. Returns ``selected``
    and ``wrong_labels``. Raises ConfigError when ``home/reference.jsonl`` has too few such responses.
    """
    tokenizer = build_tokenizer(cfg.model.tokenizer)
    sft_responses = SFTScores.read(home / "reference.jsonl", features_of(cfg.adversarial.detector))
    rules = [FindRule(cfg, sft_responses, target, tokenizer) for target in cfg.adversarial.target_members]
    usable_PI, sft_PN = rules[0].usable_PI, sft_responses.responses_PN
    sides = [ChosenSide(cfg.selection, sft_responses, usable_PI, rule.target, seed) for rule in rules]
    draw = torch.Generator().manual_seed(derive_seed(seed, "random pairs"))
    # one of equal responses to a prompt
    different_PI = [list({sft_PN[p][i]: i for i in usable}.values()) for p, usable in enumerate(usable_PI)]
    left = [_shuffled(usable, draw) for usable in different_PI]
    pairs: list[AdversarialPair] = []
    while len(pairs) < count and any(left):
        for prompt in _shuffled(range(len(left)), draw):
            turn = len(pairs) % len(sides)
            pair = _random_pair(rules[turn], sides[turn], prompt, left[prompt], round_number)
            if pair is not None and len(pairs) < count:
                pairs.append(pair)
    if len(pairs) < count:
        raise ConfigError(
            f"{home / 'reference.jsonl'}: its SFT responses make {len(pairs)} different pairs, {count} are needed: "
            "raise sft_statistics.num_prompts or sft_statistics.samples_per_prompt"
        )
    store = home / RANDOM_PAIRS
    store.unlink(missing_ok=True)
    PairStore(store).append(pairs)
    return {"selected": len(pairs), "wrong_labels": wrong_labels(pairs)}


def _random_pair(
    rule: FindRule, side: ChosenSide, prompt: int, left: list[int], round_number: int
) -> AdversarialPair | None:
    """Returns a pair whose rejected side is the next usable response of ``left``, None when there is none."""
    while left:
        row = rule.sft_row(prompt, left.pop())
        pair = side.pair(row, round_number, "")
        if pair.chosen != pair.rejected:
            return pair
    return None


def _shuffled(values: Sequence[int], draw: torch.Generator) -> list[int]:
    return [values[i] for i in torch.randperm(len(values), generator=draw).tolist()]
