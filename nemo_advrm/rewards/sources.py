"""Parses, checks and builds the members of an ensemble from the entries of ``ensemble.members``.

DIR, megatron:DIR                   a checkpoint of this package
hf:DIR                              a Hugging Face reward model, scored in this process
nemo:FILE                           a .nemo file of NeMo-Aligner
python:MODULE:FUNCTION              a function (prompts, responses, ended) -> one number per response
http://HOST:PORT                    a server of ``nemo-advrm serve``
triton+http://HOST:PORT/MODEL       a KServe v2 server: NeMo-Aligner's reward model server, Triton
                                    (sends tokens with ?tokenizer=SPEC, else text)
openai:URL#MODEL                    a language model behind an OpenAI-compatible endpoint, which judges (docs/judges.md)
human:FILE.csv                      people, who judge on a sheet; human alone: a sheet in the run directory
ADDRESS|ADDRESS                     servers of the same model; the next one is used when one fails
DIR?reference_features=off          first kind only: a hybrid reward model without its features (docs/hybrid.md)
DIR?attributes=0.8,0,-1             first three kinds: the weights of a model's several outputs
DIR?head=2                          first kind only: the second of several members on one trunk (ensemble.share=trunk)
"""

from __future__ import annotations

import dataclasses
import hashlib
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from nemo_advrm.config.layout import validate_layout
from nemo_advrm.config.schema import Config, ConvertConfig, PretrainedConfig, RewardModelConfig
from nemo_advrm.data.attributes import check_attributes, parse_weights
from nemo_advrm.data.tokenizers import Tokenizer
from nemo_advrm.engine.collectives import run_on_rank_zero
from nemo_advrm.errors import CheckpointError, ConfigError, LayoutError
from nemo_advrm.nearest_name import nearest_name
from nemo_advrm.optional_deps import require_extra
from nemo_advrm.registry import imported
from nemo_advrm.rewards import hf
from nemo_advrm.rewards.base import RewardSource
from nemo_advrm.rewards.checkpoint_members import (
    LOCAL_KINDS,
    OF_THE_JOB,
    SourceSpec,
    member_config,
    member_tokenizer,
    members_on_trunk,
    reward_meta,
)
from nemo_advrm.rewards.judges import opening

PYTHON_KIND = "python"
SYNTHETIC_GOLD = "python:nemo_advrm.synthetic.gold:gold_scores"
_SCHEMES = {"http": "http", "https": "http", "triton+http": "triton", "triton+https": "triton"}
_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*):")


def parse(text: str, place: str) -> SourceSpec:
    """Parses one entry. Raises ConfigError that names ``place``, the configuration key, and the nearest known kind."""
    if not text.strip():
        raise ConfigError(f"{place} is empty: name a checkpoint, hf:DIR or a server")
    scheme = _SCHEME.match(text)
    if text == opening.HUMAN:
        return opening.parse_judge(text, "", text, place)
    if scheme is None:
        return _local("megatron", text, text, place)
    kind, rest = scheme[1], text[scheme.end() :]
    if kind in LOCAL_KINDS:
        return _local(kind, rest, text, place)
    if kind == PYTHON_KIND:
        module, _, function = rest.partition(":")
        if not module or not function:
            raise ConfigError(f"{place}={text}: must be python:MODULE:FUNCTION")
        return SourceSpec(kind, rest, text, place)
    if kind in opening.KINDS:
        return opening.parse_judge(kind, rest, text, place)
    if kind in _SCHEMES:
        return _parse_addresses(text, place)
    if Path(text).exists() or Path(text.partition("?")[0]).exists():  # a directory with a colon in its name
        return _local("megatron", text, text, place)
    kinds = (*LOCAL_KINDS, PYTHON_KIND, *_SCHEMES, *opening.KINDS)
    raise ConfigError(f"{place}={text}: did you mean {nearest_name(kind, list(kinds))}:? kinds: {', '.join(kinds)}")


def _local(kind: str, rest: str, text: str, place: str) -> SourceSpec:
    """Parses a path with optional ``?attributes=``, ``?reference_features=`` and ``?head=``."""
    location, mark, query = rest.rpartition("?")
    if not mark or Path(rest).exists():  # the file's own name contains a question mark
        location, query = rest, ""
    if not location:
        raise ConfigError(f"{place}={text}: a path is missing after {kind}:")
    weights: tuple[float, ...] = ()
    features, head = True, 0
    for option in query.split("&") if mark and query else ():
        key, _, value = option.partition("=")
        if key == "attributes":
            weights = parse_weights(value, f"{place}={text}")
        elif key == "reference_features" and kind == "megatron":
            if value not in ("on", "off"):
                raise ConfigError(f"{place}={text}: reference_features={value} must be on or off")
            features = value == "on"
        elif key == "head" and kind == "megatron":
            if not (value.isdecimal() and value.isascii() and int(value[:9]) > 0):
                raise ConfigError(f"{place}={text}: head={value} must be the number of a member, from 1")
            head = int(value[:9])
        else:
            raise ConfigError(
                f"{place}={text}: only ?attributes=W1,W2,... can follow a path, and ?reference_features=off or ?head=2 "
                f"that of a checkpoint of this package, not ?{option}"
            )
    if head and weights:
        raise ConfigError(f"{place}={text}: a head is one output, which takes no attributes")
    return SourceSpec(kind, location, text, place, weights, features, head)


def _parse_addresses(text: str, place: str) -> SourceSpec:
    kinds = set()
    for address in text.split("|"):
        scheme = _SCHEME.match(address)
        if scheme is None or scheme[1] not in _SCHEMES:
            raise ConfigError(f"{place}={text}: {address!r} is not the address of a server (http://HOST:PORT)")
        kinds.add(_SCHEMES[scheme[1]])
        fault = _address_fault(address, _SCHEMES[scheme[1]])
        if fault:
            raise ConfigError(f"{place}={text}: {fault}")
    if len(kinds) > 1:
        raise ConfigError(f"{place}={text}: the addresses of one member must speak the same protocol")
    return SourceSpec(kinds.pop(), text, text, place)


def _address_fault(address: str, kind: str) -> str:
    """Returns what is wrong with a server's address, "" when nothing is."""
    url = urlsplit(address.removeprefix("triton+"))
    try:
        named = bool(url.hostname) and (url.port is None or url.port > 0)
    except ValueError:  # the port is no number, or too large
        named = False
    if not named:
        return f"{address!r} names no host and port (http://HOST:PORT)"
    if kind == "triton" and not url.path.strip("/"):
        return f"{address!r} names no model (triton+http://HOST:PORT/MODEL)"
    return ""


def parse_members(members: Sequence[str]) -> list[SourceSpec]:
    """Parses ``ensemble.members``, R_1 first; raises ConfigError that names the entry."""
    return [parse(text, f"ensemble.members[{k}]") for k, text in enumerate(members)]


def only_addresses_differ(before: Any, now: Sequence[str]) -> bool:
    """Returns whether two lists of members differ in server addresses only, as when a job resumes on other nodes.

    ``before`` comes from a file and may hold anything; values that are no members never match.
    """
    if not isinstance(before, list) or len(before) != len(now) or not all(isinstance(text, str) for text in before):
        return False
    try:
        was = parse_members(before)
    except ConfigError:
        return False
    pairs = zip(was, parse_members(now), strict=True)
    return all(old.text == new.text or _same_but_for_the_address(old, new) for old, new in pairs)


def _same_but_for_the_address(old: SourceSpec, new: SourceSpec) -> bool:
    if old.kind != new.kind:
        return False
    if old.kind == opening.OPENAI:
        return old.location.partition("#")[2] == new.location.partition("#")[2]
    return old.kind in _SCHEMES.values()


def check(spec: SourceSpec, cfg: Config, world_size: int) -> None:
    """Checks a member before work starts; servers are contacted by :func:`build` only.

    Raises CheckpointError, ConfigError or LayoutError that names the member.
    """
    try:
        if spec.kind == "megatron":
            from nemo_advrm.rewards import hybrid

            meta = reward_meta(spec)
            outputs = 1 if members_on_trunk(spec, meta) > 1 else meta.get("head_outputs", 1)
            check_attributes(spec.text.partition("?")[0], outputs, spec.attributes)
            member = dataclasses.replace(cfg, model=member_config(meta, cfg.model))
            validate_layout(member, world_size)
            if spec.features:
                hybrid.check_hybrid(spec, cfg, world_size)
        elif spec.kind == "hf":
            hf.check_directory(spec.path, spec.attributes)
        elif spec.kind == PYTHON_KIND:
            imported(spec.location, f"{spec.place}={spec.text}")
        elif spec.kind == "nemo":
            _check_nemo(spec, cfg, world_size)
        elif spec.kind in opening.KINDS:
            opening.check_judge_source(spec, cfg)
    except (CheckpointError, LayoutError) as error:
        raise type(error)(f"{spec.place}: {error}") from error


def build(
    spec: SourceSpec,
    name: str,
    cfg: Config,
    running: Tokenizer | None = None,
    opened: Any = None,
    merge: bool = True,
) -> RewardSource:
    """Opens a member; all ranks call.

    Args:
        running: the policy's tokenizer, used for checkpoints that do not name their own.
        opened: frozen policies of hybrid members, and trunks and bases of several members that are already loaded, to
            be shared (see ``hybrid.Opened``).
        merge: merge adapters into a base of their own; False leaves the base as it is, for other members too.
    """
    if spec.kind == "megatron":
        # imported here: NeMo-Aligner's processes, which have another version of Megatron-Core, use servers only
        from nemo_advrm.engine.builders import build_reward_model
        from nemo_advrm.rewards import hybrid
        from nemo_advrm.rewards.local import MegatronReward

        opened = {} if opened is None else opened
        meta = reward_meta(spec)
        if members_on_trunk(spec, meta) > 1:
            from nemo_advrm.rewards.shared_trunk import open_head

            return open_head(spec, meta, name, cfg, running, opened)
        outputs = meta.get("head_outputs", 1)
        check_attributes(spec.text.partition("?")[0], outputs, spec.attributes)
        head = RewardModelConfig(loss="bt" if outputs == 1 else "regression", num_attributes=outputs)
        own = dataclasses.replace(cfg, model=member_config(meta, cfg.model), reward_model=head)
        tokenizer = member_tokenizer(spec, meta, running)
        if merge or "base" not in meta:
            model = build_reward_model(own, tokenizer, spec.location, seed=0, trainable=False)
            reward = MegatronReward(name, model, tokenizer, spec.attributes)
        else:
            from nemo_advrm.rewards.shared_base import open_adapters

            reward = open_adapters(name, spec.path, meta, own, tokenizer, spec.attributes, opened)
        return hybrid.open_hybrid(reward, spec, cfg, opened) if spec.features else reward
    if spec.kind == "nemo":
        return build(as_checkpoint(spec, cfg), name, cfg, running, opened, merge)
    if spec.kind == PYTHON_KIND:
        from nemo_advrm.rewards.local import FunctionReward

        return FunctionReward(name, imported(spec.location, f"{spec.place}={spec.text}"))
    if spec.kind == "hf":
        return hf.HFReward.load(name, spec.path, cfg, spec.attributes)
    if spec.kind in opening.KINDS:
        return opening.open_judge(spec, name, cfg)
    require_extra("serve", "httpx", "tenacity")
    from nemo_advrm.rewards import remote

    return remote.connect(name, spec.kind, spec.location.split("|"), cfg.remote)


def for_scoring(cfg: Config, members: Sequence[str]) -> Config:
    """Returns the configuration of a command that scores with ``members`` and has no model of its own.

    Its ``model`` is that of the first member that is a checkpoint, so that the parallel layout is checked against it.
    """
    specs = parse_members(members)
    own = [reward_meta(spec) for spec in specs if spec.kind == "megatron"]
    ensemble = dataclasses.replace(cfg.ensemble, members=list(members))
    model = cfg.model
    if own:
        model = dataclasses.replace(member_config(own[0], cfg.model), tokenizer=cfg.model.tokenizer)
    return dataclasses.replace(cfg, ensemble=ensemble, model=model, pretrained_checkpoint=PretrainedConfig())


def gold_spec(cfg: Config) -> SourceSpec | None:
    """Parses ``pipeline.gold``; None when it is empty. ``synthetic`` is the gold of the embedded language."""
    if not cfg.pipeline.gold:
        return None
    text = SYNTHETIC_GOLD if cfg.pipeline.gold == "synthetic" else cfg.pipeline.gold
    return parse(text, "pipeline.gold")


def refuse_people(cfg: Config, command: str) -> None:
    """Raises ConfigError for people in a command that scores new responses again and again, and would always stop."""
    gold = gold_spec(cfg)
    for spec in [*parse_members(cfg.ensemble.members), *([gold] if gold else [])]:
        if spec.kind == opening.HUMAN:
            raise ConfigError(
                f"{spec.place}={spec.text}: {command} scores new responses at any time; people can judge where all "
                "responses are there at once: evaluate, an audit (docs/judges.md)"
            )


def build_gold(cfg: Config, running: Tokenizer | None = None) -> RewardSource | None:
    """Opens the gold reward, used for labels and evaluation only; None when none is configured. All ranks call."""
    spec = gold_spec(cfg)
    return None if spec is None else build(spec, "gold", cfg, running)


def load_members(
    cfg: Config, members: Sequence[str], running: Tokenizer | None = None, opened: dict[Any, Any] | None = None
) -> list[RewardSource]:
    """Opens all members, R_1 first; all ranks call.

    ``opened`` receives the frozen policies of hybrid ones, and trunks that several share, which score for all of them
    in one pass. With ``ensemble.share=lora`` several members that are adapters share their base.
    """
    opened = {} if opened is None else opened
    specs = parse_members(members)
    merge = cfg.ensemble.share != "lora" or len(specs) == 1
    return [build(spec, f"R_{k + 1} ({spec.text})", cfg, running, opened, merge) for k, spec in enumerate(specs)]


def _check_nemo(spec: SourceSpec, cfg: Config, world_size: int) -> None:
    from nemo_advrm.convert.conversion import open_source  # imported here: convert is a layer above rewards

    with open_source(ConvertConfig(from_="nemo", path=spec.location)) as source:
        described = source.description
        if described.head != "reward":
            raise CheckpointError(f"{spec.text}: holds a model with the head {described.head!r}, not a reward model")
        head = source.specs["head.weight"]
        check_attributes(spec.text.partition("?")[0], head.shape[0], spec.attributes)
        own = dataclasses.replace(described.model, **{key: getattr(cfg.model, key) for key in OF_THE_JOB})
        validate_layout(dataclasses.replace(cfg, model=own), world_size)


def as_checkpoint(spec: SourceSpec, cfg: Config) -> SourceSpec:
    """Returns a model on this machine as a checkpoint of this package: itself, or what it is converted to; all ranks.

    A .nemo file or Hugging Face model is converted below ``run_dir``, once per version of its files.
    """
    if spec.kind == "megatron":
        return spec
    from nemo_advrm.convert.conversion import convert

    version = run_on_rank_zero(_version, spec)
    out = Path(cfg.run_dir) / "members" / f"{spec.path.stem}-{version}"
    settings = ConvertConfig(from_=spec.kind, path=spec.location, to="megatron", out=str(out))

    def make() -> None:
        if not out.exists():
            out.parent.mkdir(parents=True, exist_ok=True)
            convert(settings, report=lambda _: None)

    run_on_rank_zero(make)
    return dataclasses.replace(spec, kind="megatron", location=str(out))


def _version(spec: SourceSpec) -> str:
    """Returns a name for the present content of a file or directory, from paths, sizes and times."""
    try:
        files = sorted(path for path in spec.path.iterdir() if path.is_file()) if spec.path.is_dir() else [spec.path]
        stats = [(path, path.stat()) for path in files]
    except OSError as error:
        raise CheckpointError(f"{spec.place}={spec.text}: cannot be read ({error.strerror})") from None
    text = " ".join(f"{path.absolute()} {stat.st_size} {stat.st_mtime_ns}" for path, stat in stats)
    return hashlib.sha256(text.encode()).hexdigest()[:8]
