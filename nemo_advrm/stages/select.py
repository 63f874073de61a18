"""Stage ``select``: picks adversarial samples, pairs them with SFT responses and writes the pair store."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Hashable
from pathlib import Path
from types import NoneType
from typing import Any

import torch

from nemo_advrm import writers
from nemo_advrm.data.jsonl import read_jsonl, write_jsonl_atomic
from nemo_advrm.data.pair_store import AdversarialPair, PairStore, Provenance
from nemo_advrm.data.plain_text import stands_as_text
from nemo_advrm.data.tokenizers import Tokenizer, build_tokenizer
from nemo_advrm.errors import ConfigError, DataError
from nemo_advrm.models.trainable import derive_seed
from nemo_advrm.objectives.reference import own_z_scores
from nemo_advrm.objectives.selection import qualifies, select_pairs, text_signature
from nemo_advrm.rewards.reference import Reference
from nemo_advrm.schema import Config, SelectionConfig
from nemo_advrm.stages.attack import check_samples

# what selection reads of every sample, and of which type
_TYPES: dict[str, tuple[type, ...]] = {
    "direction": (int,),
    "prompt_id": (int,),
    "step": (int,),
    "policy": (str,),
    "response": (str,),
    "scores": (list,),
    "z": (list,),
    "disagreement_z": (int, float),
    "gold": (int, float, NoneType),
}


def main(cfg: Config) -> int:
    """Select from the attack in ``run_dir`` (``attack/samples.jsonl`` beside ``reference.jsonl``)."""
    directory = Path(cfg.run_dir)
    samples = directory / "attack" / "samples.jsonl"
    if not samples.exists():
        raise ConfigError(f"run_dir={cfg.run_dir}: no attack/samples.jsonl there; run nemo-advrm attack first")
    writers.hold(directory)
    if (directory / "attack" / "summary.json").exists():  # rows of another origin have none
        check_samples(directory / "attack")
    counts = select_round(cfg, directory, 0, cfg.seed)
    print(f"{counts['selected']} pairs: {directory / 'pairs.jsonl'}  ({dropped(counts)})")
    return 0


def select_round(cfg: Config, directory: Path, round_number: int, seed: int) -> dict[str, int]:
    """Select from every direction of an attack; marks the samples, writes ``pairs.jsonl``; returns counts."""
    tokenizer = build_tokenizer(cfg.model.tokenizer)  # the policy's, whose tokens the responses were
    reference = Reference.read(directory / "reference.jsonl")
    path = directory / "attack" / "samples.jsonl"
    members = reference.scores_PNK.size(-1)
    # a selection that is repeated starts anew
    rows: list[dict[str, Any]] = []
    for n, row in read_jsonl(path):
        rows.append({**_checked(row, f"{path}:{n}", members), "selected": False})
        _check_reference(rows[-1], f"{path}:{n}", reference)
    usable_PI = _usable_sft(reference, tokenizer)
    # of z: raw scores would leave the choice to the member of the largest scale
    quality_PN = own_z_scores(reference.scores_PNK, reference.statistics()).mean(-1)
    totals: Counter[str] = Counter()
    pairs: list[AdversarialPair] = []
    for direction in sorted({row["direction"] for row in rows}):
        own = [i for i, row in enumerate(rows) if row["direction"] == direction]
        own_rows = [rows[i] for i in own]
        unusable = [_unusable(cfg.selection, row, usable_PI, tokenizer) for row in own_rows]
        chosen, counts = _select_direction(cfg, own_rows, reference, direction, seed, unusable)
        totals.update(counts)
        totals["selected"] += len(chosen)
        for i in chosen:
            rows[own[i]]["selected"] = True
        pairs += [
            _pair(cfg.selection, rows[own[i]], reference, usable_PI, quality_PN, round_number, seed) for i in chosen
        ]
    store = directory / "pairs.jsonl"
    store.unlink(missing_ok=True)
    PairStore(store).append(pairs)
    write_jsonl_atomic(path, rows)
    return dict(totals)


def _usable_sft(reference: Reference, tokenizer: Tokenizer) -> list[list[int]]:
    """Places of each prompt's SFT responses that may be chosen: they ended, and they are text."""
    return [
        [i for i in reference.finished(p) if stands_as_text(responses[i], tokenizer)]
        for p, responses in enumerate(reference.responses_PN)
    ]


def _unusable(
    options: SelectionConfig, row: dict[str, Any], usable_PI: list[list[int]], tokenizer: Tokenizer
) -> str | None:
    """Why an adversarial response cannot be one side of a pair; None when it can."""
    if options.require_ended and row.get("ended") is False:
        return "unended"
    if not stands_as_text(row["response"], tokenizer):
        return "not_text"
    return None if usable_PI[row["prompt_id"]] else "no_usable_sft"


def _checked(row: Any, source: str, members: int) -> dict[str, Any]:
    """``row`` itself; DataError that names ``source`` and what is wrong when it is no sample of this attack."""
    lacking = sorted(_TYPES.keys() - row.keys()) if isinstance(row, dict) else ["all keys"]
    if lacking:
        raise DataError(f"{source}: no row of an attack (it lacks {', '.join(lacking)}): restore the file")
    wrong = [key for key, types in _TYPES.items() if not _is(row[key], types)]
    wrong += [
        key
        for key in ("scores", "z")
        if key not in wrong and not all(_is(value, (int, float)) for value in row[key])
    ]
    if "direction" not in wrong and not 1 <= row["direction"] <= members:
        wrong.append("direction")
    if wrong:
        shown = f"{wrong[0]}={row[wrong[0]]!r}"[:80]
        raise DataError(
            f"{source}: no row of this attack on {members} members ({shown}): restore the file"
        )
    return row


def _is(value: Any, types: tuple[type, ...]) -> bool:
    """Whether a JSON value has one of the types; numbers are finite (read_jsonl limits their digits)."""
    if isinstance(value, bool) or not isinstance(value, types):
        return False
    return not isinstance(value, int | float) or math.isfinite(value)


def _check_reference(row: dict[str, Any], source: str, reference: Reference) -> None:
    """Raise DataError for a row of an attack on another reference."""
    prompts, _, members = reference.scores_PNK.shape
    number = row["prompt_id"]
    if not isinstance(number, int) or not 0 <= number < prompts:
        raise DataError(f"{source}: prompt_id={number!r}, the reference has {prompts} prompts: restore both files")
    for key in ("scores", "z"):
        if not isinstance(row[key], list) or len(row[key]) != members:
            raise DataError(f"{source}: {key}={row[key]!r}, the reference has {members} members: restore both files")


def _select_direction(
    cfg: Config,
    rows: list[dict[str, Any]],
    reference: Reference,
    direction: int,
    seed: int,
    unusable: list[str | None],
) -> tuple[list[int], dict[str, int]]:
    options, target = cfg.selection, direction - 1
    scores_BK = torch.tensor([row["scores"] for row in rows])
    ranking_B = torch.tensor([row["disagreement_z"] for row in rows])
    prompts = [row["prompt_id"] for row in rows]
    qualified_B = qualifies(
        scores_BK,
        torch.tensor([row["z"] for row in rows]),
        reference.prompt_mean(prompts)[:, target],
        ranking_B,
        options.threshold_z,
        target,
        options.require_others_negative,
    )
    # an empty response, or one that is among the SFT responses, teaches nothing about ordinary text
    usable = [
        bool(row["response"].strip()) and row["response"] not in reference.responses_PN[row["prompt_id"]]
        for row in rows
    ]
    signature = _signature(cfg)
    return select_pairs(
        qualified_B & torch.tensor(usable),
        ranking_B,
        prompts,
        [row["response"] for row in rows],
        lambda i: signature(rows[i]["response"]),
        unusable=unusable,
        per_signature=options.per_signature,
        per_prompt=options.per_prompt,
        total=options.max_pairs,
        top_fraction=options.top_fraction,
        generator=_generator(seed, direction) if options.random_within_top else None,
    )


def _generator(seed: int, direction: int) -> torch.Generator:
    return torch.Generator().manual_seed(derive_seed(seed, "select", direction))


def _signature(cfg: Config) -> Callable[[str], Hashable]:
    if cfg.model.tokenizer == "synthetic":
        from nemo_advrm.synthetic.signature import token_class_signature

        return token_class_signature
    return text_signature


def _pair(
    options: SelectionConfig,
    row: dict[str, Any],
    reference: Reference,
    usable_PI: list[list[int]],
    quality_PN: torch.Tensor,
    round_number: int,
    seed: int,
) -> AdversarialPair:
    prompt_id = row["prompt_id"]
    scores_NK = reference.scores_PNK[prompt_id]
    usable = usable_PI[prompt_id]
    if options.chosen == "random":
        draw = torch.Generator().manual_seed(
            derive_seed(seed, "chosen", row["direction"], row["step"], row["response"])
        )
        best = usable[int(torch.randint(len(usable), (1,), generator=draw))]
    else:
        best = max(usable, key=lambda i: quality_PN[prompt_id, i].item())
    gold = reference.gold_PN
    return AdversarialPair(
        reference.prompts_P[prompt_id],
        reference.responses_PN[prompt_id][best],
        row["response"],
        Provenance(
            round=round_number,
            step=row["step"],
            direction=row["direction"],
            prompt_id=prompt_id,
            scores=tuple(row["scores"]),
            z=tuple(row["z"]),
            disagreement_z=row["disagreement_z"],
            policy_checkpoint=f"attack/{row['policy']}/model",
            chosen_scores=tuple(scores_NK[best].tolist()),
            chosen_gold=None if gold is None else gold[prompt_id, best].item(),
            rejected_gold=row["gold"],
        ),
        rejected_ended=row.get("ended") is not False,
    )


def dropped(counts: dict[str, int]) -> str:
    """What selection left out, by reason."""
    return ", ".join(f"{v} {k.replace('_', ' ')}" for k, v in counts.items() if k != "selected" and v)
