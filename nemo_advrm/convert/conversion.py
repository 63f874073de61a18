"""Converts one checkpoint: opens source and target, checks everything, then copies one tensor at a time."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from torch import Tensor

from nemo_advrm import __version__
from nemo_advrm.config.layout import at_layout, validate_layout
from nemo_advrm.config.schema import Config, ConvertConfig
from nemo_advrm.config.schema_commands import FORMATS
from nemo_advrm.config.validation import check_fields
from nemo_advrm.convert.partial import failure_named
from nemo_advrm.convert.tensor_names import TensorSpec
from nemo_advrm.convert.tensors import TensorSink, TensorSource
from nemo_advrm.data.tokenizers import build_tokenizer, check_vocabulary
from nemo_advrm.engine.feature_file import FILE, refuse_features
from nemo_advrm.errors import CheckpointError, ConfigError, DataError
from nemo_advrm.untrusted_files import read_json_object, read_yaml

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
# path of a reward model in a pipeline's run directory: of its own, or a head of the trunk of all
_MEMBER = re.compile(r"/round_(\d+)/(?:rm_(\d+)/model|rm/model\?head=(\d+))$")
_HEAD = re.compile(r"(.+)\?head=([1-9][0-9]{0,8})", re.DOTALL)


def check_settings(cfg: ConvertConfig) -> None:
    """Raise ConfigError for a missing or invalid value, before any file is opened."""
    check_fields(cfg)
    for key, value in (("from", cfg.from_), ("to", cfg.to)):
        if not value:
            raise ConfigError(f"{key} is not set: {key}={' | '.join(filter(None, FORMATS))}")
    if cfg.average:
        _check_average(cfg)
    for key, value in (("path", cfg.path or ",".join(cfg.average)), ("out", cfg.out)):
        if not value and not (key == "out" and cfg.dry_run):
            raise ConfigError(f"{key} is not set")
    if not _is_size(cfg.max_shard_size):
        raise ConfigError(f"max_shard_size={cfg.max_shard_size}: not a size such as 5GB or 500MB")
    if cfg.tokenizer and not Path(cfg.tokenizer).exists():
        raise ConfigError(f"tokenizer={cfg.tokenizer}: there is no such file or directory")


def _check_average(cfg: ConvertConfig) -> None:
    if cfg.path:
        raise ConfigError("path and average are both set: average names all checkpoints whose weights are averaged")
    if len(cfg.average) < 2:
        raise ConfigError(f"average=[{cfg.average[0]}]: an average needs at least 2 checkpoints")
    for name in ("bridge", "peft"):
        if name in (cfg.from_, cfg.to):
            raise ConfigError(f"average is not possible with {name}: average to another format, then convert that")


def _is_size(text: str) -> bool:
    """Whether ``text`` is a size of at least 1 byte, as huggingface_hub reads sizes; its parser is not public."""
    tensors = {"empty": torch.empty(0), "byte": torch.empty(1, dtype=torch.uint8)}  # share a file of 1 byte
    try:
        return not split_torch_state_dict_into_shards(tensors, max_shard_size=text).is_sharded
    except (ValueError, OverflowError):
        return False


def open_source(cfg: ConvertConfig) -> TensorSource:
    """Open the checkpoint ``path`` in the format ``from``, or the average of those in ``average``.

    Raises CheckpointError when it cannot be converted.
    """
    if cfg.average:
        from nemo_advrm.convert.average import AverageSource

        return AverageSource([open_source(replace(cfg, path=path, average=[])) for path in cfg.average])
    path, tokenizer = Path(cfg.path), Path(cfg.tokenizer) if cfg.tokenizer else None
    if cfg.from_ == "hf":
        from nemo_advrm.convert.hf_source import HFSource

        return HFSource(path, tokenizer)
    if cfg.from_ == "megatron":
        from nemo_advrm.convert.megatron_checkpoint import MegatronSource

        found = None if path.exists() else _HEAD.fullmatch(cfg.path)
        path, head = (path, 0) if found is None else (Path(found[1]), int(found[2]))
        refuse_features(path, cfg.drop_reference_features)
        return MegatronSource(path, tokenizer, head)
    if cfg.from_ == "bridge":
        from nemo_advrm.convert.bridge_checkpoint import BridgeSource

        return BridgeSource(path, tokenizer)
    from nemo_advrm.convert.nemo_file import NemoSource

    return NemoSource(path, tokenizer)


def _open_sink(cfg: ConvertConfig, source: TensorSource, specs: dict[str, TensorSpec]) -> TensorSink:
    """Return the writer of ``out`` in the format ``to``; checks everything and writes nothing."""
    out = Path(cfg.out or f"{source.path}.{cfg.to}")
    if out.absolute() == source.path.absolute():
        raise CheckpointError(f"{out}: is also the checkpoint to convert")
    if cfg.to == "hf":
        from nemo_advrm.convert.hf_sink import HFSink

        return HFSink(out, source, specs, cfg)
    if cfg.to == "megatron":
        from nemo_advrm.convert.megatron_checkpoint import MegatronSink

        return MegatronSink(out, source, specs, cfg)
    from nemo_advrm.convert.nemo_file import NemoSink

    return NemoSink(out, source, specs, cfg)


def convert(cfg: ConvertConfig, report: Any = print, dtypes: Mapping[str, torch.dtype] | None = None) -> None:
    """Convert one checkpoint; with ``dry_run`` only print the plan.

    At most the parts of one canonical tensor are in memory at a time. After an error nothing remains at ``out``.

    Args:
        cfg: the settings.
        report: gets each line of what is to be told.
        dtypes: number formats of single tensors by canonical name, where they are not those of ``cfg.dtype``.

    Raises:
        ConfigError, CheckpointError, LayoutError: settings or checkpoint do not fit; raised before anything is written.
    """
    check_settings(cfg)
    if "bridge" in (cfg.from_, cfg.to):
        from nemo_advrm.convert import bridge_calls

        if bridge_calls.is_bridges_work(cfg):
            bridge_calls.hand_over(cfg, report)
            return
    if "peft" in (cfg.from_, cfg.to):
        from nemo_advrm.convert import peft_format

        peft_format.convert_adapters(cfg, report)
        return
    with open_source(cfg) as source:
        source.description.provenance |= {"converted_by": f"nemo_advrm {__version__}", **_card_facts(cfg)}
        _check_vocabulary(source)
        _lay_out(cfg, source)
        dtype, own = DTYPES.get(cfg.dtype), dtypes or {}
        specs = {name: replace(spec, dtype=own.get(name, dtype or spec.dtype)) for name, spec in source.specs.items()}
        sink = _open_sink(cfg, source, specs)
        for line in _summary(cfg, source, sink):
            report(line)
        if cfg.dry_run:
            return
        with failure_named(sink.path), sink:
            for name, spec in specs.items():
                sink.write(name, cast(name, source.read(name), spec.dtype))
        report(f"written: {sink.path}")


def cast(name: str, tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """Cast a tensor. Raises CheckpointError when a finite number becomes infinite."""
    converted = tensor.to(dtype)
    if dtype != tensor.dtype and not torch.equal(converted.isfinite(), tensor.isfinite()):
        raise CheckpointError(
            f"{name} holds {tensor.abs().max():.3g}, which is too large for dtype={str(dtype).removeprefix('torch.')}"
        )
    return converted


def _check_vocabulary(source: TensorSource) -> None:
    """Raise CheckpointError when the tokenizer has ids for which the embedding has no row."""
    about = source.description
    if about.tokenizer is None:
        return
    try:
        tokenizer = build_tokenizer(f"hf:{about.tokenizer}")
    except DataError:  # the weights may be used alone; opening the tokenizer later reports the error
        return
    check_vocabulary(tokenizer, about.model.vocab_size, str(source.path))


def _lay_out(cfg: ConvertConfig, source: TensorSource) -> None:
    """Set the parallel layout of the model, which pads the vocabulary. Raises LayoutError when it does not divide."""
    tensor, pipeline = cfg.tensor_model_parallel_size, cfg.pipeline_model_parallel_size
    model = at_layout(source.description.model, tensor, pipeline)
    # experts need sequence parallelism beside tensor parallelism; it splits no weights
    together = replace(model, sequence_parallel=model.num_moe_experts > 0 and tensor > 1)
    validate_layout(Config(model=together), tensor * pipeline)
    if cfg.to == "megatron":
        # a Megatron checkpoint opens at any layout, so its description names none
        if model.make_vocab_size_divisible_by % tensor:
            model.make_vocab_size_divisible_by *= tensor
        model = at_layout(model)
    source.description.model = model


def _card_facts(cfg: ConvertConfig) -> dict[str, Any]:
    """Return facts on the training for the model card, from the file ``card`` or from the checkpoint's run."""
    if cfg.card:
        return read_json_object(Path(cfg.card), ConfigError, f"card={cfg.card}")
    if cfg.from_ != "megatron" or cfg.average:  # what a member's run measured of it does not hold for an average
        return {}
    path = Path(cfg.path).absolute()
    return _config_facts(path.parent / "config.yaml") | _round_facts(path)


def _round_facts(path: Path) -> dict[str, Any]:
    """Return facts on ``RUN/round_N/rm_K/model`` or ``RUN/round_N/rm/model?head=K``.

    They are from RUN's configuration, N, and member K's SFT score statistics.
    """
    found = _MEMBER.search(path.as_posix())
    if found is None:
        return {}
    directory, member = path.parent.parent, int(found[2] or found[3]) - 1
    facts: dict[str, Any] = {**_config_facts(directory.parent / "config.yaml"), "rounds": int(found[1])}
    file = directory / "reference.jsonl"
    if not file.exists():
        return facts
    from nemo_advrm.data.sft_scores import SFTScores
    from nemo_advrm.objectives.sft_statistics import fresh_std

    scores_PNK = SFTScores.read(file).scores_PNK.double()
    if not 0 <= member < scores_PNK.size(2):
        raise CheckpointError(f"{file}: has scores for {scores_PNK.size(2)} members, not for member {member + 1}")
    scores_PN = scores_PNK[:, :, member]
    facts["reference_mean"] = scores_PN.mean().item()
    if scores_PN.size(1) > 1:
        deviations = scores_PN - scores_PN.mean(1, keepdim=True)
        facts["reference_std"] = fresh_std(deviations.reshape(-1, 1), scores_PN.size(1)).item()
    return facts


def _config_facts(run: Path) -> dict[str, Any]:
    """Read facts on the training from the run's config.yaml; {} when the file does not exist."""
    if not run.exists():
        return {}
    keys = {
        "base_model": ("pretrained_checkpoint", "restore_from_path"),
        "data": ("data", "train_path"),
        "adversarial_pairs": ("augmentation", "pairs_path"),
    }
    settings = read_yaml(run)
    sections = {fact: (settings.get(section), key) for fact, (section, key) in keys.items()}
    found = {fact: section.get(key) for fact, (section, key) in sections.items() if isinstance(section, dict)}
    return {fact: value for fact, value in found.items() if isinstance(value, str) and value}


def _summary(cfg: ConvertConfig, source: TensorSource, sink: TensorSink) -> Iterator[str]:
    specs = source.specs
    if cfg.dry_run:
        for name, spec in specs.items():
            yield f"{source.native(name)} -> {sink.native(name)} {list(spec.shape)}"
    total = sum(spec.nbytes for spec in specs.values())
    if (source.path / FILE).exists():
        yield f"{FILE} is left out (drop_reference_features=true): the scores are those of the plain reward model"
    kind = {"lm": "language model", "reward": "reward model", "value": "critic"}[source.description.head]
    yield (
        f"{kind}, {len(specs)} tensors: {total / 1e9:.3f} GB at {source.path} -> {sink.nbytes / 1e9:.3f} GB"
        f"{f' at {sink.path}' if cfg.out else ''}{' (dry run: nothing is written)' if cfg.dry_run else ''}"
    )
