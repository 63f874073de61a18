"""Jobs on several ranks: a hybrid reward model that is opened, scored, and fitted anew."""

from __future__ import annotations

from reward_members import rollouts
from tiny import TOKENIZER, tiny_config

from nemo_advrm.data.encoding import encode_pairs
from nemo_advrm.data.preference_rows import PreferencePair
from nemo_advrm.engine import runtime
from nemo_advrm.rewards.features import HybridReward
from nemo_advrm.rewards.hybrid import fit_features
from nemo_advrm.rewards.sources import load_members


def score_and_fit(model: str) -> tuple[list[float], list[float]]:
    """(scores of some rollouts, of which each data-parallel replica has its own; weights fitted on some pairs)."""
    rt = runtime.current()
    cfg = tiny_config(layout=rt.layout)
    cfg.reward_model.reference_features = ["log_prob", "prompt_gain"]
    (hybrid,) = load_members(cfg, [model], TOKENIZER)
    assert isinstance(hybrid, HybridReward)
    made = rollouts()
    share = list(range(rt.dp_rank, len(made), rt.dp_size))
    parts = rt.gather_data_parallel((share, hybrid.score(made.select(share)).tolist()))
    scores = dict(pair for places, values in parts for pair in zip(places, values, strict=True))
    rows = [
        PreferencePair(prompt, chosen, rejected, source=f"row {i}", rejected_ended=i % 2 == 0)
        for i, (prompt, chosen, rejected) in enumerate(
            zip(made.prompts, made.responses, made.responses[1:] + made.responses[:1], strict=True)
        )
    ]
    pairs, _ = encode_pairs(rows, TOKENIZER, 64)
    fitted = fit_features(cfg, hybrid.member, pairs, hybrid.weights.prompts, hybrid.weights.policy)
    return [scores[i] for i in range(len(made))], list(fitted.weights.weights)
