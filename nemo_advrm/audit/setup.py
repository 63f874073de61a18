"""Opens everything an audit works with: the run directory, the models, the prompts and the ordinary responses."""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Callable
from pathlib import Path

from nemo_advrm import files
from nemo_advrm.audit import policy as audit_policy
from nemo_advrm.audit.panel import Panel, Split, texts
from nemo_advrm.audit.settings import SYNTHETIC, base_config, check, names_of, parse_budget
from nemo_advrm.audit.time_spent import JudgeTime, note_cost
from nemo_advrm.config.fields import Restart
from nemo_advrm.config.keys import about, keys_at_restart
from nemo_advrm.config.schema import AuditConfig, Config
from nemo_advrm.data import inputs
from nemo_advrm.data.messages import Message, prompt_key
from nemo_advrm.data.sft_scores import SFTScores
from nemo_advrm.data.tokenizers import Tokenizer
from nemo_advrm.engine.collectives import run_on_rank_zero
from nemo_advrm.errors import ConfigError, DataError
from nemo_advrm.rewards.base import RewardSource
from nemo_advrm.rewards.detector_features import FeatureReader
from nemo_advrm.rewards.features import ReferenceFeatures
from nemo_advrm.rewards.hybrid import Opened, open_sft_policy
from nemo_advrm.rewards.limits import prompts_with_room
from nemo_advrm.rewards.sft_responses import read_for_attack, sample_sft_scores
from nemo_advrm.rewards.sources import build_gold, gold_spec, load_members
from nemo_advrm.rollouts.run_prompts import encode_prompts, held_out_prompts
from nemo_advrm.rollouts.types import Prompt, Rollouts
from nemo_advrm.run_directory import results, run_dir
from nemo_advrm.seeds import derive_seed

SETTINGS = "audit.json"
_RESTORE = "restore it, choose another run_dir, or remove the directory"


def open_panel(audit: AuditConfig) -> Panel:
    """Joins the job, claims ``run_dir``, opens models and judge, samples the ordinary responses; all ranks call.

    They are not judged yet, see :func:`judge_ordinary`.

    What an earlier call of the same audit has made is read again. Raises what the parts raise, before any sampling.
    """
    check(audit)
    directory = Path(audit.run_dir)
    cfg = base_config(audit)
    run_dir.start(cfg)
    own = run_on_rank_zero(_same_audit, audit, directory / SETTINGS)
    run_dir.claim(cfg, directory, "audit")
    run_on_rank_zero(files.write_text, directory / SETTINGS, own)
    started = time.monotonic()
    policy = audit_policy.place(audit)
    cfg, tokenizer = audit_policy.with_policy(cfg, audit, policy)
    training, held_out = _prompts(audit, cfg)
    opened: Opened = {}
    models = load_members(cfg, cfg.ensemble.members, tokenizer, opened)
    judge = build_gold(cfg, tokenizer)
    sft_policy = open_sft_policy(cfg, tokenizer, policy, opened)
    parts, sampling, count = [], 0.0, 0
    for name, asked in (("training", training), ("held_out", held_out)):
        if asked:
            prompts = prompts_with_room(encode_prompts(asked, tokenizer, cfg), tokenizer.fingerprint, models, cfg)
            known, began = run_on_rank_zero(_reference(audit, name).exists), time.monotonic()
            parts.append((name, prompts, _responses(audit, cfg, tokenizer, name, prompts, models, sft_policy)))
            if not known:  # what an earlier call sampled took no time now
                sampling += time.monotonic() - began
                count += len(prompts) * audit.samples_per_prompt
    run_on_rank_zero(note_cost, directory, time.monotonic() - started, sampling, count)
    splits = [Split(name, prompts, sft) for name, prompts, sft in parts]
    second = splits[1] if len(splits) > 1 else None
    limit, gold = parse_budget(audit.budget).seconds, gold_spec(cfg)
    # people take the time that they take
    judge_time = JudgeTime(directory, limit) if limit and gold is not None and gold.kind != "human" else None
    return Panel(audit, cfg, tokenizer, names_of(audit), models, judge, splits[0], second, sft_policy, judge_time)


def _same_audit(audit: AuditConfig, path: Path) -> str:
    """Returns the settings as text, to be recorded; raises ConfigError when the directory holds an audit with others.

    The configuration of the run has its own check, which does not know the names of these settings.
    """
    own = {
        field.name: getattr(audit, field.name)
        for field in dataclasses.fields(audit)
        if about(AuditConfig, field.name).restart is Restart.SAME
    }
    changeable = keys_at_restart(Restart.FREE)
    own["also"] = [word for word in audit.also if word.partition("=")[0].lstrip("+") not in changeable]
    if path.exists():
        before = results.read_object(path, (), _RESTORE)
        for key, value in own.items():
            if key in before and before[key] != value:
                raise ConfigError(
                    f"{path.parent} holds an audit with {key}={before[key]!r}, but now {key}={value!r}: choose another "
                    "run_dir, or remove the directory"
                )
    return json.dumps(own, indent=1)


def _prompts(audit: AuditConfig, cfg: Config) -> tuple[list[tuple[Message, ...]], list[tuple[Message, ...]]]:
    """Returns the prompts that attacks see, and held-out ones: of a file of their own, else the next ones of the file.

    A file with too few prompts is split in proportion. Raises DataError for fewer than two prompts that attacks see.
    """
    most, more = audit.num_prompts, audit.num_held_out
    if audit.prompts == SYNTHETIC:
        from nemo_advrm.synthetic.corpus import sample_prompts

        offered = _different(sample_prompts(4 * most, derive_seed(audit.seed, "audit prompts")))
        held_out = _different(sample_prompts(4 * more, derive_seed(audit.seed, "audit held out"), held_out=True))
        return offered[:most], held_out[:more]
    offered = inputs.prompts(cfg)
    if audit.held_out_prompts:
        training = offered[:most]
        return training, held_out_prompts(cfg, more, training) if more else []
    if len(offered) < most + more:
        most = max(2, round(len(offered) * most / (most + more)))
    training = offered[:most]
    if len(training) < 2:
        raise DataError(f"prompts={audit.prompts}: an audit needs at least 2 prompts")
    return training, offered[most : most + more]


def _different(prompts: list[tuple[Message, ...]]) -> list[tuple[Message, ...]]:
    return list({prompt_key(prompt): prompt for prompt in prompts}.values())


def _responses(
    audit: AuditConfig,
    cfg: Config,
    tokenizer: Tokenizer,
    name: str,
    prompts: list[Prompt],
    models: list[RewardSource],
    sft_policy: ReferenceFeatures | None,
) -> SFTScores:
    """Samples the policy's responses and scores them by all models, or reads them."""
    path = _reference(audit, name)
    reader = FeatureReader(models, [cfg.adversarial.detector], range(len(audit.target)), sft_policy)
    sample_sft_scores(cfg, tokenizer, path, prompts, reader, None, derive_seed(cfg.seed, "audit reference", name))
    return read_for_attack(cfg, path, prompts)


def _reference(audit: AuditConfig, name: str) -> Path:
    return Path(audit.run_dir) / f"reference_{name}.jsonl"


def ordinary_texts(sft: SFTScores) -> Rollouts:
    """Returns the ordinary responses as texts, in the order of the prompts."""
    prompts = [prompt for prompt, own in zip(sft.prompts_P, sft.responses_PN, strict=True) for _ in own]
    responses = [response for own in sft.responses_PN for response in own]
    ended = [one for p in range(len(sft.responses_PN)) for one in sft.ended(p)]
    return texts(prompts, responses, ended)


def judge_ordinary(panel: Panel, parts: float) -> Panel:
    """Returns the panel with what the judge says of the ordinary responses; all ranks call.

    Without a judge it is as is. What an earlier call has asked is read again.

    Args:
        parts: the judge may take one part of so many of the time that is left.
    """
    if panel.judge is None:
        return panel
    judged, prompts = [], sum(len(split.prompts) for split in panel.splits)
    for split in panel.splits:
        path = Path(panel.audit.run_dir) / f"judged_{split.name}.jsonl"
        panel.begin_turn(parts * prompts / len(split.prompts))
        order = sorted(range(split.sft.scores_PNK[..., 0].numel()), key=_two_of_each_first(panel))
        judged.append(split.with_verdicts(panel.verdicts(path, ordinary_texts(split.sft), order)))
    return dataclasses.replace(panel, training=judged[0], held_out=judged[1] if len(judged) > 1 else None)


def _two_of_each_first(panel: Panel) -> Callable[[int], tuple[int, int]]:
    """Sorts ordinary responses: two to each prompt, which can be compared, then the third of each, and so on."""
    count = panel.audit.samples_per_prompt
    return lambda i: (max(1, i % count), i)
