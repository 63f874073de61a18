"""Reads what ``harden`` trains on and measures by: finds, clean responses and held-out pairs."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

from nemo_advrm.config.schema import Config
from nemo_advrm.convert.hf_directory import check_language_model
from nemo_advrm.data import inputs
from nemo_advrm.data.answered_prompts import load_answers, split_by_prompt
from nemo_advrm.data.encoding import EncodedPair, encode_pairs
from nemo_advrm.data.jsonl import write_jsonl_atomic
from nemo_advrm.data.pair_store import PairStore
from nemo_advrm.data.preferences import PreferencePair
from nemo_advrm.data.prompts import load_prompts, split_train_validation
from nemo_advrm.data.row_lengths import RowLengths
from nemo_advrm.data.sft_rows import SftRow
from nemo_advrm.data.tokenizers import HFTokenizer, Tokenizer
from nemo_advrm.engine.collectives import run_on_rank_zero
from nemo_advrm.errors import ConfigError, DataError
from nemo_advrm.rank_info import RankInfo
from nemo_advrm.rewards.checkpoint_members import SourceSpec, member_config, member_tokenizer
from nemo_advrm.rewards.hybrid import policy_meta
from nemo_advrm.rollouts.base import rollout_engine
from nemo_advrm.rollouts.run_prompts import encode_prompts
from nemo_advrm.rollouts.sample import sample
from nemo_advrm.seeds import derive_seed

CLEAN = "clean.jsonl"
POLICY = "harden.policy"


@dataclass(frozen=True)
class HardeningRows:
    """The rows that were read, as text. ``clean`` is empty until the policy has answered the prompts, if one is named.

    Attributes:
        finds, held_out_finds: pairs of an ordinary answer over a find, to train on and to measure.
        clean: answers to clean prompts.
        pairs: preference pairs whose accuracy is measured.
    """

    finds: list[PreferencePair]
    held_out_finds: list[PreferencePair]
    clean: list[SftRow]
    pairs: list[PreferencePair]


@dataclass(frozen=True)
class HardeningData:
    """:class:`HardeningRows` as token ids; clean responses are split by prompt."""

    finds: list[EncodedPair]
    held_out_finds: list[EncodedPair]
    clean: list[list[int]]
    held_out_clean: list[list[int]]
    pairs: list[EncodedPair]


def read_rows(cfg: Config) -> HardeningRows:
    """Reads the files that ``harden.*`` names and prints a line for each.

    Raises ConfigError for a missing name, DataError for a bad file.
    """
    options = cfg.harden
    for name in ("finds", "prompts"):
        if not getattr(options, name):
            raise ConfigError(f"{name} is not set: nemo-advrm harden target=hf:DIR finds=FILE prompts=FILE")
    known = _finds(options.finds)
    finds = list(known.values())
    if options.held_out_finds:
        held_out = [row for key, row in _finds(options.held_out_finds).items() if key not in known]
        if not held_out:
            raise DataError(f"{options.held_out_finds}: all of its finds are in {options.finds} too")
    else:
        try:
            finds, held_out = split_train_validation(finds, options.held_out_fraction, derive_seed(cfg.seed, "finds"))
        except DataError as error:
            raise DataError(f"{options.finds}: {error}; give more finds, or held_out_finds=FILE") from None
    clean: list[SftRow] = []
    if options.policy.startswith("hf:"):
        check_language_model(Path(options.policy.removeprefix("hf:")))
    elif options.policy:
        policy_meta(options.policy, POLICY)
    else:
        try:
            clean = _answers(options.prompts, cfg)
        except DataError as error:
            raise DataError(
                f"{error}. If these are prompts without answers, name the language model that answers them: "
                "policy=hf:DIR"
            ) from None
    pairs: list[PreferencePair] = []
    if options.pairs:
        pairs = inputs.evaluation_pairs(
            dataclasses.replace(cfg, data=dataclasses.replace(cfg.data, validation_path=options.pairs))
        )
    return HardeningRows(finds, held_out, clean, pairs)


def answered(cfg: Config, rows: HardeningRows, directory: Path) -> HardeningRows:
    """Returns ``rows`` with the responses of ``harden.policy``, if one is named; all ranks call.

    They are sampled once, into ``directory/clean.jsonl``.
    """
    if not cfg.harden.policy:
        return rows
    path = directory / CLEAN
    if not run_on_rank_zero(path.exists):
        _sample(cfg, path)
    return dataclasses.replace(rows, clean=list(load_answers(path).rows))


def encoded(cfg: Config, rows: HardeningRows, tokenizer: Tokenizer) -> HardeningData:
    """Encodes the rows with the model's tokenizer.

    ``data.on_overlong`` and ``data.on_bad_row`` decide about pairs and clean responses. Finds may not be left out
    silently either, but the start of a long prompt of theirs is cut, as in other trainings on adversarial pairs.

    Raises DataError when too few are left.
    """
    limit, data, options = cfg.model.encoder_seq_length, cfg.data, cfg.harden
    finds, held_out_finds = (
        encode_pairs(part, tokenizer, limit, "truncate_prompt")[0] for part in (rows.finds, rows.held_out_finds)
    )
    pairs: list[EncodedPair] = []
    if rows.pairs:
        pairs, counts = encode_pairs(rows.pairs, tokenizer, limit, data.on_overlong, data.on_bad_row)
        inputs.print_encoding_counts("pairs", counts)
    clean = rows.clean
    if len(clean) > options.max_responses:
        draw = torch.Generator().manual_seed(derive_seed(cfg.seed, "clean"))
        places = torch.randperm(len(clean), generator=draw)[: options.max_responses].sort().values
        clean = [clean[i] for i in places.tolist()]
    try:
        parts = split_by_prompt(clean, options.held_out_fraction, derive_seed(cfg.seed, "clean"))
    except DataError as error:
        raise DataError(f"{options.prompts}: {error}") from None
    lengths = RowLengths(data.on_overlong, data.on_bad_row, "set data.on_overlong=skip or =truncate_prompt")
    kept, held_out = (_encoded_answers(part, tokenizer, limit, lengths) for part in parts)
    inputs.print_encoding_counts("clean responses", lengths.finish(len(kept) + len(held_out), "no clean responses"))
    for name, left in (("to train on", kept), ("to measure", held_out)):
        if len(left) < 2:
            raise DataError(f"{options.prompts}: {len(left)} clean responses {name} are too few: give more prompts")
    return HardeningData(finds, held_out_finds, kept, held_out, pairs)


def _encoded_answers(rows: Sequence[SftRow], tokenizer: Tokenizer, limit: int, lengths: RowLengths) -> list[list[int]]:
    found = []
    for row in rows:
        tokens = lengths.encode(row.source, partial(tokenizer.encode_conversation, row.prompt, row.response, row.ended))
        if tokens is None:
            continue
        told = f"{row.source}: prompt and answer are {len(tokens)} tokens long, the limit is {limit}"
        removable = partial(_prompt_tokens, tokenizer, row, tokens)
        cut = lengths.tokens_to_cut(len(tokens), limit, removable, told)
        if cut is not None:
            found.append(tokens[cut:])
    return found


def _prompt_tokens(tokenizer: Tokenizer, row: SftRow, tokens: list[int]) -> int:
    """Returns how many tokens at the start of a conversation are the prompt's, less one."""
    opened = tokenizer.encode_conversation(row.prompt, "", ended=False)
    shared = next((i for i, (a, b) in enumerate(zip(opened, tokens, strict=False)) if a != b), len(opened))
    return shared - 1


def _finds(paths: str) -> dict[tuple[str, str], PreferencePair]:
    """Reads one or more files of pairs, by prompt and find; of equal finds the first counts."""
    first: dict[tuple[str, str], PreferencePair] = {}
    for path in filter(None, (path.strip() for path in paths.split(","))):
        pairs = PairStore(path).preferences_by_key()
        if RankInfo.from_environment().rank == 0:
            print(f"{path}: {len(pairs)} finds", flush=True)
        for key, row in pairs.items():
            first.setdefault(key, row)
    if not first:
        raise DataError(f"{paths}: holds no finds: there is nothing to cure")
    return first


def _answers(path: str, cfg: Config) -> list[SftRow]:
    report = load_answers(path, on_bad_row=cfg.data.on_bad_row, ignore_columns=cfg.data.ignore_columns)
    if RankInfo.from_environment().rank == 0:
        print(report.summary(), flush=True)
    return list(report.rows)


def _sample(cfg: Config, path: Path) -> None:
    """Samples the policy's responses to the prompts and writes them to ``path``; all ranks call."""
    options = cfg.harden
    own, tokenizer, location = _policy(cfg)
    engine = rollout_engine(own, tokenizer)
    policy = engine.open_policy(location)
    own = dataclasses.replace(
        own, model=dataclasses.replace(own.model, encoder_seq_length=engine.language_model(policy).context)
    )
    report = load_prompts(options.prompts, on_bad_row=cfg.data.on_bad_row, ignore_columns=cfg.data.ignore_columns)
    prompts = encode_prompts(list(report.rows), tokenizer, own)
    most = max(2, options.max_responses // options.samples_per_prompt)
    draw = torch.Generator().manual_seed(derive_seed(cfg.seed, "clean prompts"))
    prompts = [prompts[i] for i in torch.randperm(len(prompts), generator=draw)[:most].sort().values.tolist()]
    seed = derive_seed(cfg.seed, "clean responses")
    rollouts = sample(engine, policy, prompts, options.samples_per_prompt, seed)
    rows = [
        {"prompt_id": index, "messages": list(prompt), "response": response, "ended": ended}
        for index, prompt, response, ended in zip(
            rollouts.prompt_index, rollouts.prompts, rollouts.responses, rollouts.ended, strict=True
        )
    ]
    run_on_rank_zero(write_jsonl_atomic, path, rows)


def _policy(cfg: Config) -> tuple[Config, Tokenizer, str]:
    """Returns the configuration of the policy's engine, its tokenizer, and its place as the engine opens it.

    A Hugging Face model answers by transformers, so that it needs no conversion table.
    """
    named = cfg.harden.policy
    if named.startswith("hf:"):
        own = dataclasses.replace(cfg, rl=dataclasses.replace(cfg.rl, rollout_engine="transformers"))
        return own, HFTokenizer(Path(named.removeprefix("hf:"))), named
    meta = policy_meta(named, POLICY)
    tokenizer = member_tokenizer(SourceSpec("megatron", named, named, POLICY), meta, None)
    return dataclasses.replace(cfg, model=member_config(meta, cfg.model)), tokenizer, named
