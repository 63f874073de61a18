"""Stage ``attack``: trains adversarial policies against an ensemble of reward models and records what they find."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

from nemo_advrm import files
from nemo_advrm.callbacks.rollouts import TrajectoryRecorder
from nemo_advrm.data.jsonl import read_jsonl, write_jsonl_atomic
from nemo_advrm.data.messages import Message
from nemo_advrm.data.tokenizers import Tokenizer, build_tokenizer
from nemo_advrm.errors import ConfigError, DataError
from nemo_advrm.megatron import checkpoint, manifest, runtime, stopping
from nemo_advrm.models.language_model import build_policy
from nemo_advrm.models.policy import AdversarialPolicy, Prompt, encode_prompts
from nemo_advrm.models.trainable import derive_seed
from nemo_advrm.rewards.base import RewardSource
from nemo_advrm.rewards.ensemble import AdversarialReward
from nemo_advrm.rewards.limits import prompts_with_room
from nemo_advrm.rewards.local import build_gold
from nemo_advrm.rewards.reference import Reference
from nemo_advrm.rewards.sources import load_members
from nemo_advrm.schema import Config
from nemo_advrm.stages import inputs, results, session
from nemo_advrm.stages.finds import asks_others
from nemo_advrm.stages.fit import drop_training_checkpoints, fit, records, tokenizer_meta
from nemo_advrm.stages.order import policy_name
from nemo_advrm.stages.reference import sample, write_reference

_RESTORE = "restore it, or run the attack again"
# what the summary of every adversary holds
_SUMMED = ("samples", "steps", "seconds", "success_standard", "success_strict")


def main(cfg: Config) -> int:
    """Attack ``ensemble.members`` from the policy ``pretrained_checkpoint.restore_from_path``."""
    if len(cfg.ensemble.members) < 2:
        raise ConfigError("ensemble.members must name at least 2 reward models, the attacked one first")
    if not cfg.pretrained_checkpoint.restore_from_path:
        raise ConfigError("pretrained_checkpoint.restore_from_path is not set: name the policy the attack starts from")
    check_directions(cfg, len(cfg.ensemble.members))
    session.start(cfg)
    directory = Path(cfg.run_dir)
    tokenizer = build_tokenizer(cfg.model.tokenizer)
    prompts = encode_prompts(attack_prompts(cfg), tokenizer, cfg)
    members = load_members(cfg, cfg.ensemble.members, tokenizer)
    prompts = prompts_with_room(prompts, tokenizer.fingerprint, members, cfg)
    session.claim(cfg, directory, "attack")
    gold = build_gold(cfg.pipeline.gold)
    if not runtime.on_writer((directory / "reference.jsonl").exists):
        policy = build_policy(cfg, tokenizer, cfg.pretrained_checkpoint.restore_from_path, 0, trainable=False)
        count = cfg.reference.samples_per_prompt
        rollouts = sample(cfg, tokenizer, policy, prompts, count, derive_seed(cfg.seed, "reference"))
        write_reference(directory / "reference.jsonl", rollouts, count, members, gold)
    reference = runtime.on_writer(lambda: Reference.read(directory / "reference.jsonl"))
    if len(reference.prompts_P) != len(prompts):
        raise DataError(
            f"{directory / 'reference.jsonl'} has {len(reference.prompts_P)} prompts, the attack {len(prompts)}: "
            "restore it, or remove it and it is sampled again"
        )
    summary = run_attack(cfg, tokenizer, directory / "attack", prompts, members, reference, gold, cfg.seed)
    if runtime.current().is_writer:
        for direction, found in summary["directions"].items():
            print(f"direction {direction}: {found['samples']} samples{_finished(found)}, {_rates(found)}")
        print(f"samples: {directory / 'attack' / 'samples.jsonl'}  (next: nemo-advrm select run_dir={cfg.run_dir})")
    return 0


def check_directions(cfg: Config, members: int) -> None:
    """Raise ConfigError when a member that is to be attacked does not exist."""
    for direction in cfg.adversarial.directions:
        if not 1 <= direction <= members:
            raise ConfigError(
                f"adversarial.directions={cfg.adversarial.directions}: there is no member {direction}, the ensemble "
                f"has {members} (ensemble.size, ensemble.members)"
            )


def attack_prompts(cfg: Config) -> list[tuple[Message, ...]]:
    """The prompts of the reference and the attack, at most ``reference.num_prompts``."""
    if cfg.data.prompts_path or cfg.data.train_path:
        return inputs.prompts(cfg)[: cfg.reference.num_prompts]
    if cfg.pipeline.gold == "synthetic":
        from nemo_advrm.synthetic.corpus import sample_prompts

        return sample_prompts(cfg.reference.num_prompts, derive_seed(cfg.seed, "attack prompts"))
    raise ConfigError("data.prompts_path is not set: name a file of prompts")


def run_attack(
    cfg: Config,
    tokenizer: Tokenizer,
    directory: Path,
    prompts: list[Prompt],
    members: list[RewardSource],
    reference: Reference,
    gold: RewardSource | None,
    seed: int,
) -> dict[str, Any]:
    """Attack in every direction; writes ``samples.jsonl``, ``metrics.jsonl`` and ``summary.json``."""
    finished = results.finished(directory, "summary.json", ("directions",))
    if finished is not None:
        runtime.on_writer(lambda: check_samples(directory))
        return finished
    for direction in cfg.adversarial.directions:
        for number in range(cfg.adversarial.policies):
            name = policy_name(direction, number)
            stopping.leave_if_asked(f"before the attack of {name}: the same command goes on there")
            attack_once(cfg, tokenizer, directory, prompts, members, reference, gold, seed, direction, number)
    return join_attacks(cfg, directory)


def attack_once(
    cfg: Config,
    tokenizer: Tokenizer,
    directory: Path,
    prompts: list[Prompt],
    members: list[RewardSource],
    reference: Reference,
    gold: RewardSource | None,
    seed: int,
    direction: int,
    number: int,
) -> None:
    """Train one adversary of a direction into its own directory below ``directory``; a finished one is not redone."""
    home = directory / policy_name(direction, number)
    if results.finished(home, "summary.json", _SUMMED) is None:
        policy_seed = derive_seed(seed, "attack", direction, number)
        _attack_member(cfg, tokenizer, home, prompts, members, reference, gold, direction, policy_seed)


def join_attacks(cfg: Config, directory: Path) -> dict[str, Any]:
    """Join what the adversaries have left: rows, metrics and the summary of every direction."""
    homes: dict[int, list[Path]] = {
        direction: [directory / policy_name(direction, i) for i in range(cfg.adversarial.policies)]
        for direction in cfg.adversarial.directions
    }
    found = {
        str(direction): _combined([results.finished(home, "summary.json", _SUMMED) or {} for home in own])
        for direction, own in homes.items()
    }
    result = {
        "directions": found,
        "threshold_z": cfg.selection.threshold_z,
        "by_disagreement": asks_others(cfg.adversarial),
    }
    everyone = [home for own in homes.values() for home in own]
    runtime.on_writer(lambda: _join_records(directory, everyone))
    results.mark(directory, "summary.json", result, [f"{home.name}/{manifest.NAME}" for home in everyone])
    return result


def check_samples(directory: Path) -> None:
    """Raise DataError when ``samples.jsonl`` has not as many rows as its attack has written."""
    path = directory / "samples.jsonl"
    cure = f"remove {directory / 'summary.json'} and run the attack again, which joins the rows of its policies"
    summary = results.read_object(directory / "summary.json", ("directions",), _RESTORE)
    try:
        wanted = sum(int(found["samples"]) for found in summary["directions"].values())
    except (TypeError, ValueError, KeyError, AttributeError) as error:
        raise DataError(f"{directory / 'summary.json'} is no summary of an attack: {cure}") from error
    rows = sum(1 for _ in read_jsonl(path))
    if rows != wanted:
        raise DataError(f"{path} has {rows} rows, the attack has written {wanted}: restore it, or {cure}")


def check_rule(cfg: Config, directory: Path) -> None:
    """Raise ConfigError when the attack in ``directory`` had a reward of another kind than ``adversarial`` says.

    Attacks of earlier versions and of NeMo-Aligner do not tell.
    """
    path = directory / "summary.json"
    if not path.exists():
        return
    asked = results.read_object(path, (), _RESTORE).get("by_disagreement")
    if asked is None or asked == asks_others(cfg.adversarial):
        return
    options = cfg.adversarial
    key = f"coefficient={options.coefficient:g}" if options.preset == "paper" else f"lam2={options.lam2:g}"
    done = "asked for the others' dislike" if asked else "maximised the target alone"
    raise ConfigError(f"adversarial.{key}: the attack in {directory} {done}; give the value that it had")


def add_to_summary(directory: Path, by_direction: dict[str, dict[str, Any]]) -> None:
    """Add what selection found of every direction to the attack's ``summary.json``, where it has one."""
    path = directory / "summary.json"
    if not path.exists():  # rows of another origin
        return
    summary = results.read_object(path, ("directions",), _RESTORE)
    for direction, facts in by_direction.items():
        summary["directions"].setdefault(direction, {}).update(facts)
    files.write_text(path, json.dumps(summary, indent=1))


def success_rates(path: Path, cure: str) -> list[float]:
    """``success_standard`` of every direction that has one in an attack's ``summary.json``.

    Raises DataError with the ``cure`` when the file cannot be read or is no summary of an attack.
    """
    directions = results.read_object(path, ("directions",), cure)["directions"]
    found: list[Any] = list(directions.values()) if isinstance(directions, dict) else [None]
    if not all(isinstance(d, dict) and isinstance(d.get("success_standard", ""), int | float | None) for d in found):
        raise DataError(f"{path} cannot be read (it is no summary of an attack): {cure}")
    return [float(d["success_standard"]) for d in found if d["success_standard"] is not None]


def _join_records(directory: Path, homes: list[Path]) -> None:
    for name in ("samples.jsonl", "metrics.jsonl"):
        files = [home / name for home in homes]
        write_jsonl_atomic(directory / name, (row for file in files for _, row in read_jsonl(file)))


def _attack_member(
    cfg: Config,
    tokenizer: Tokenizer,
    directory: Path,
    prompts: list[Prompt],
    members: list[RewardSource],
    reference: Reference,
    gold: RewardSource | None,
    direction: int,
    seed: int,
) -> None:
    started = time.monotonic()
    module = AdversarialPolicy(
        cfg,
        tokenizer,
        prompts,
        AdversarialReward(members, cfg.adversarial, reference, direction - 1),
        cfg.pretrained_checkpoint.restore_from_path,
        seed,
    )
    samples = directory / "samples.jsonl"
    fit(
        module, cfg, directory, f"attack on R_{direction}", [TrajectoryRecorder(samples, direction, reference, gold)], 0
    )
    limit = cfg.trainer.timeout_minutes
    checkpoint.save(directory / "model", module.model, meta=tokenizer_meta(module), limit_minutes=limit)
    seconds = time.monotonic() - started
    summary = runtime.on_writer(lambda: _summary(directory, samples, seconds))
    results.mark(directory, "summary.json", summary, records(directory))
    drop_training_checkpoints(directory)
    module.release()


def _summary(directory: Path, samples: Path, seconds: float) -> dict[str, Any]:
    path = directory / "metrics.jsonl"
    rows = [_metrics(row, f"{path}:{number}") for number, row in read_jsonl(path)]
    return {
        "samples": sum(1 for _ in read_jsonl(samples)),
        "success_standard": _mean(rows, "success"),
        "success_strict": _mean(rows, "success_strict"),
        "ended": _mean(rows, "ended"),
        "steps": len(rows),
        "seconds": seconds,
    }


def _metrics(row: Any, source: str) -> dict[str, Any]:
    """A row of metrics; DataError that names ``source`` for one of another type."""
    if not isinstance(row, dict):
        raise DataError(f"{source}: no row of metrics: restore or remove the line")
    for key in ("success", "success_strict", "ended"):
        if not isinstance(row.get(key), int | float | None):
            raise DataError(f"{source}: no row of metrics ({key}={str(row[key])[:40]!r}): restore or remove the line")
    return row


def _combined(summaries: list[dict[str, Any]]) -> dict[str, Any]:
    """One direction's adversaries together: counts and seconds add up, rates are averaged."""
    result = {key: sum(s[key] for s in summaries) for key in ("samples", "steps", "seconds")}
    for key in ("success_standard", "success_strict", "ended"):
        result[key] = _mean(summaries, key)
    return result


def _finished(found: dict[str, Any]) -> str:
    """The share of an adversary's responses that ended; summaries of earlier versions do not have it."""
    share = found.get("ended")
    return "" if share is None else f", {share:.0%} of them ended"


def _mean(rows: list[dict[str, Any]], key: str) -> float | None:
    values = [row[key] for row in rows if row.get(key) is not None]
    return sum(values) / len(values) if values else None


def _rates(found: dict[str, Any]) -> str:
    if found["success_standard"] is None:
        return "no gold reward to tell success by"
    return f"success {found['success_standard']:.2f} (strict {found['success_strict']:.2f})"
