"""A measured block on every rank of a layout."""

from __future__ import annotations

from tiny import TOKENIZER, pairs, tiny_config

from nemo_advrm.engine import runtime
from nemo_advrm.engine.generation import generate, uniforms
from nemo_advrm.engine.model import build_model
from nemo_advrm.engine.sampling import Sampling
from nemo_advrm.engine.scoring import score_sequences
from nemo_advrm.models.reward_model import RewardModel
from nemo_advrm.run_directory import cost

PROMPT, NEW = [3, 4, 5], 4


def spent_by(what: str) -> dict[str, float]:
    """The cost of one block: scoring a row of 7 tokens, writing 4 tokens after 3, or a training step on 8 pairs."""
    cfg = tiny_config("llama", runtime.current().layout)
    head = "lm" if what == "generate" else "reward"
    model = build_model(cfg.model, cfg.precision, head, TOKENIZER.vocab_size, seed=1, trainable=False)  # type: ignore[arg-type]
    module = RewardModel(cfg, TOKENIZER, pairs(8), [], "") if what == "train" else None
    with cost.measured() as spent:
        if what == "score":
            score_sequences(model, [[1, 2, 3, 4, 5, 6, 7]], TOKENIZER.pad_id)
        elif what == "generate":
            generate(model, [PROMPT], Sampling(NEW, (), 1.0, 0, 1.0), uniforms(1, 1, NEW))
        else:
            assert module is not None
            module.train_on(next(module.steps(0)), 0)
    return spent
