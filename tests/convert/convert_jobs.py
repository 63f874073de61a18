"""Opens a converted checkpoint at the running layout and computes with it, on all ranks."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch
from tiny import TOKENIZER, tiny_config

from nemo_advrm.config.layout import at_layout
from nemo_advrm.config.schema import PrecisionConfig
from nemo_advrm.convert.megatron_checkpoint import read_model
from nemo_advrm.engine import checkpoint, runtime
from nemo_advrm.engine.generation import generate
from nemo_advrm.engine.microbatches import Microbatch
from nemo_advrm.engine.model import MegatronModel, build_model
from nemo_advrm.engine.sampling import Sampling
from nemo_advrm.engine.schedule import forward
from nemo_advrm.engine.scoring import score_sequences


def build(path: str) -> MegatronModel:
    """The model that the checkpoint itself describes, with its weights."""
    meta = checkpoint.read_meta(Path(path))
    layout = runtime.current().layout
    model = at_layout(read_model(meta, Path(path)), layout.tensor, layout.pipeline, layout.context, layout.expert)
    vocabulary = model.vocab_size or meta["vocab_size"]
    built = build_model(model, PrecisionConfig(), meta["head"], vocabulary, seed=3, trainable=False)
    checkpoint.load(Path(path), built)
    return built


def save_reward_model(path: str) -> None:
    """A random reward model of this package's own, over its embedded language, saved at the running layout."""
    cfg = tiny_config("llama", runtime.current().layout)
    model = build_model(
        cfg.model, cfg.precision, "reward", TOKENIZER.vocab_size, seed=4, trainable=False, head_init_std=0.2
    )
    checkpoint.save(Path(path), model, meta={"tokenizer": TOKENIZER.fingerprint, "steps": 12})


def logits(path: str, tokens_BS: torch.Tensor) -> torch.Tensor:
    """[B, S, vocabulary] on all ranks."""
    model = build(path)
    rows, length = tokens_BS.shape
    everywhere = torch.ones(rows, length, dtype=torch.bool)
    microbatch = Microbatch(tokens_BS, torch.full((rows,), length), {"predict_BS": everywhere, "gather_logits": True})
    found = forward(model, [microbatch], lambda output, _: output)
    shape = (tokens_BS.numel(), model.vocab_size)
    whole = runtime.current().broadcast_from_last_stage(found[0] if found else torch.empty(shape))
    return whole.view(rows, length, -1)[..., : model.model_config.vocab_size]


def scores(path: str, sequences: list[list[int]]) -> torch.Tensor:
    """[N]: every sequence scored alone at its last token, whatever the padding."""
    return score_sequences(build(path), sequences, pad_id=0)


def values(path: str, sequences: list[list[int]]) -> list[list[float]]:
    """The value at every token of each sequence, by a critic; on the last pipeline stage."""
    model = build(path)
    microbatches = [Microbatch(torch.tensor([row]), torch.tensor([len(row)])) for row in sequences]
    return [found[0].tolist() for found in forward(model, microbatches, lambda output, _: output)]


def greedy(path: str, prompts: list[list[int]], new: int) -> list[list[int]]:
    uniforms = torch.zeros(len(prompts), new)
    return generate(build(path), prompts, Sampling(new, (), temperature=0), uniforms).responses


def add_head_bias(path: str, out: str, bias: float) -> None:
    """The reward model of ``path`` with a bias of its head."""
    plain = build(path)
    config = replace(plain.model_config, head_bias=True)
    biased = build_model(config, PrecisionConfig(), "reward", plain.vocab_size, seed=3, trainable=False)
    tensors = {k: v for k, v in plain.state_dict().items() if torch.is_tensor(v)}
    biased.parts[0].load_state_dict(tensors | {"head.bias": torch.tensor([bias])}, strict=False)
    checkpoint.save(Path(out), biased)
