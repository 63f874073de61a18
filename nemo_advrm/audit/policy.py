"""The policy of an audit: converted once, or sampled by transformers where there is no conversion."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from nemo_advrm.audit.settings import SERVED, given_keys, learning_rate
from nemo_advrm.config.schema import AuditConfig, Config, ConvertConfig
from nemo_advrm.config.validation import check_values
from nemo_advrm.data.tokenizers import Tokenizer, build_tokenizer
from nemo_advrm.engine.checkpoint_meta import read_meta
from nemo_advrm.engine.collectives import run_on_rank_zero
from nemo_advrm.errors import CheckpointError, NotWritten
from nemo_advrm.rewards.checkpoint_members import SourceSpec, member_config, member_tokenizer


def place(audit: AuditConfig) -> str:
    """Returns the policy as ``pretrained_checkpoint.restore_from_path`` has it; all ranks call.

    ``openai:URL#MODEL`` stays where it is. ``hf:DIR`` is converted once into ``run_dir/policy``. Where its architecture
    has no conversion table it stays ``hf:DIR``, with a printed line: transformers then samples it, and attacks by RL
    are left out.

    Raises CheckpointError for a directory that holds no language model, NotWritten where there is no room for it.
    """
    if audit.policy.startswith(SERVED):
        return audit.policy
    if not audit.policy.startswith("hf:"):
        return audit.policy.removeprefix("megatron:")
    refusal = run_on_rank_zero(_convert, audit)
    if not refusal:
        return str(_out(audit))
    run_on_rank_zero(lambda: print(f"policy: transformers samples it, attacks by RL are left out: {refusal}"))
    return audit.policy


def _out(audit: AuditConfig) -> Path:
    return Path(audit.run_dir) / "policy"


def _convert(audit: AuditConfig) -> str:
    """Converts the policy unless that is done; returns why it cannot be converted, "" when it can."""
    from nemo_advrm.convert.conversion import convert
    from nemo_advrm.convert.hf_directory import check_language_model

    source, out = Path(audit.policy.removeprefix("hf:")), _out(audit)
    if out.exists():
        return ""
    check_language_model(source)
    out.parent.mkdir(parents=True, exist_ok=True)
    try:
        convert(ConvertConfig(from_="hf", path=str(source), to="megatron", out=str(out)), report=lambda _: None)
    except NotWritten as error:  # transformers could sample it, but whoever has no room wants to know
        raise NotWritten(f"policy={audit.policy} is converted for the attacks by RL: {error}") from None
    except CheckpointError as error:
        return str(error)
    return ""


def with_policy(cfg: Config, audit: AuditConfig, policy: str) -> tuple[Config, Tokenizer]:
    """Returns the configuration with the policy's architecture, and the policy's tokenizer.

    Raises CheckpointError when the checkpoint is no language model or names no tokenizer.
    """
    if policy.startswith(SERVED):
        found = dataclasses.replace(cfg, rl=dataclasses.replace(cfg.rl, rollout_engine="openai"))
        check_values(found)  # its deadline against the limit of other ranks
        tokenizer: Tokenizer = build_tokenizer(cfg.model.tokenizer)
    elif policy.startswith("hf:"):
        model = dataclasses.replace(cfg.model, tokenizer=policy)
        found = dataclasses.replace(cfg, model=model, rl=dataclasses.replace(cfg.rl, rollout_engine="transformers"))
        tokenizer = build_tokenizer(policy)
    else:
        meta = read_meta(Path(policy))
        if meta["head"] != "lm":
            raise CheckpointError(f"policy={audit.policy}: its model has the head {meta['head']!r}: no language model")
        tokenizer = member_tokenizer(SourceSpec("megatron", policy, audit.policy, "policy"), meta, None)
        files = Path(policy) / "tokenizer"
        named = f"hf:{files}" if files.is_dir() else meta["tokenizer_spec"]
        found = dataclasses.replace(
            cfg, model=dataclasses.replace(member_config(meta, cfg.model), optim=cfg.model.optim, tokenizer=named)
        )
        optim = found.model.optim
        optim.sched.name = "constant"
        if audit.learning_rate:
            optim.lr = audit.learning_rate
        elif "model.optim.lr" not in given_keys(audit):
            optim.lr = learning_rate(found.model.hidden_size)
    pretrained = dataclasses.replace(cfg.pretrained_checkpoint, restore_from_path=policy)
    return dataclasses.replace(found, pretrained_checkpoint=pretrained), tokenizer
