"""Reward models of each kind on disk, tiny, for tests of ensembles and servers."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hf_models import tiny_hf
from hf_tokenizers import CHATML, save_hf
from tiny import TOKENIZER, VOCABULARY, tiny_config

from nemo_advrm.data.messages import Message
from nemo_advrm.data.tokenizers import Tokenizer
from nemo_advrm.engine import checkpoint
from nemo_advrm.engine.feature_file import FeatureWeights, policy_fingerprint
from nemo_advrm.engine.model import build_model
from nemo_advrm.rollouts.types import Rollouts

PROMPTS = ("this river", "these clouds", "this garden")
RESPONSES = ("birds sing .", "birds sing", "this river sleeps .", "these old clouds")
# of hybrid reward models: their features of a frozen policy, and the other prompts of prompt_gain
FEATURES = ("log_prob", "prompt_gain")
OTHER_PROMPTS: tuple[tuple[Message, ...], ...] = tuple(
    (Message(role="user", content=text),) for text in ("these clouds", "this old garden", "this baker")
)


def save_hf_reward(directory: Path, seed: int = 0, template: str | None = CHATML, **model: Any) -> Path:
    """A Hugging Face reward model with a byte-level tokenizer whose padding is its end token."""
    save_hf(directory, template=template, eos_token="<|endoftext|>", pad_token="<|endoftext|>")
    settings = {"vocab_size": 280, "bos_token_id": 1, "eos_token_id": 0, "pad_token_id": 0} | model
    tiny_hf("llama3", seed, reward=settings.pop("reward", True), **settings).save_pretrained(directory)
    return directory


def save_megatron(
    directory: Path, seed: int = 3, head: str = "reward", meta: Any = None, hashed: bool = False, **model: Any
) -> Path:
    """A checkpoint of this package over the synthetic language; Megatron-Core must be running."""
    cfg = tiny_config(**model)
    built = build_model(cfg.model, cfg.precision, head, VOCABULARY, seed=seed, trainable=False, head_init_std=0.3)  # type: ignore[arg-type]
    known = {"tokenizer": TOKENIZER.fingerprint, "tokenizer_spec": "synthetic"}
    checkpoint.save(directory, built, meta=known if meta is None else meta, hash_weights=hashed)
    return directory


def save_hybrid(directory: Path, policy: Path, weights: Sequence[float] = (0.5, 0.25, -2.0)) -> Path:
    """A checkpoint of this package with weights of its score and of the features of ``policy``."""
    save_megatron(directory)
    weighed = FeatureWeights(FEATURES, tuple(weights), str(policy), policy_fingerprint(policy), OTHER_PROMPTS, 7)
    weighed.write(directory)
    return directory


def one_step_of_rl(home: Path, members: Sequence[str | Path]) -> list[str]:
    """Arguments of an attack or an RLHF of one step on two prompts, whose policy is made in ``home``."""
    policy, prompts, cfg = save_megatron(home / "policy", head="lm"), home / "prompts.jsonl", tiny_config()
    prompts.write_text("".join(json.dumps({"prompt": p}) + "\n" for p in PROMPTS[:2]))
    keys = ("num_layers", "hidden_size", "num_attention_heads", "num_query_groups", "ffn_hidden_size")
    return [
        f"ensemble.members=[{','.join(map(str, members))}]",
        f"pretrained_checkpoint.restore_from_path={policy}",
        f"data.prompts_path={prompts}",
        *(f"model.{key}={getattr(cfg.model, key)}" for key in keys),
        "model.tokenizer=synthetic",
        "model.encoder_seq_length=64",
        "rl.max_steps=1",
        "rl.prompts_per_step=2",
        "rl.max_new_tokens=6",
        "sft_statistics.samples_per_prompt=3",
        "trainer.accelerator=cpu",
        "exp_manager.create_tensorboard_logger=false",
    ]


def one_step_pipeline(home: Path) -> list[str]:
    """Arguments of a pipeline as in :func:`one_step_of_rl`, with pairs and a held-out prompt that are written here."""
    pairs, held_out = home / "pairs.jsonl", home / "held_out.jsonl"
    rows = [{"prompt": p, "chosen": RESPONSES[i], "rejected": RESPONSES[3]} for p in PROMPTS[:2] for i in range(2)]
    pairs.write_text("".join(json.dumps(row) + "\n" for row in rows))
    held_out.write_text(json.dumps({"prompt": PROMPTS[2]}) + "\n")
    return [
        *one_step_of_rl(home, ["unused"])[1:],
        *(f"data.{key}={pairs}" for key in ("train_path", "validation_path")),
        f"data.held_out_prompts_path={held_out}",
    ]


def rollouts(tokenizer: Tokenizer = TOKENIZER) -> Rollouts:
    """Two prompts with responses of unequal lengths, one of them cut off."""
    prompts = [(Message(role="user", content=PROMPTS[i % 2]),) for i in range(4)]
    ended = [text.endswith(".") for text in RESPONSES]
    return Rollouts(
        prompts=prompts,
        responses=list(RESPONSES),
        ended=ended,
        prompt_tokens=[tokenizer.encode_prompt(p) for p in prompts],
        response_tokens=[tokenizer.encode_response(r) if r.endswith(".") else tokenizer.encode(r) for r in RESPONSES],
        prompt_index=[0, 1, 0, 1],
        fingerprint=tokenizer.fingerprint,
    )
