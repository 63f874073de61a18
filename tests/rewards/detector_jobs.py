"""Jobs on several ranks: what detectors read of the members and of the SFT policy."""

from __future__ import annotations

import torch
from reward_members import rollouts
from tiny import TOKENIZER, tiny_config

from nemo_advrm.engine import runtime
from nemo_advrm.rewards.detector_features import FeatureReader
from nemo_advrm.rewards.hybrid import open_sft_policy
from nemo_advrm.rewards.sources import load_members

Read = tuple[torch.Tensor, dict[int, torch.Tensor], torch.Tensor, torch.Tensor]


def read(members: list[str], policy: str, model: dict[str, bool]) -> Read:
    """Scores, hidden states, log-probabilities and entropies of some rollouts; each replica reads its own."""
    rt = runtime.current()
    cfg, made = tiny_config(layout=rt.layout, **model), rollouts()
    cfg.adversarial.detector = "sft_log_prob"
    sft_policy, loaded = open_sft_policy(cfg, TOKENIZER, policy), load_members(cfg, members, TOKENIZER)
    share = list(range(rt.dp_rank, len(made), rt.dp_size))
    states = FeatureReader(loaded, ["mahalanobis"], range(len(members))).read(made.select(share))
    likely = FeatureReader(loaded, ["sft_log_prob", "sft_entropy"], [0], sft_policy).read(made.select(share))
    assert states.log_probs_N is states.entropies_N is None and not likely.hidden_states  # only what detectors read
    assert torch.equal(states.scores_NK, likely.scores_NK)
    assert likely.log_probs_N is not None and likely.entropies_N is not None
    both = torch.stack([likely.log_probs_N, likely.entropies_N], -1)
    parts = rt.gather_data_parallel((share, states.scores_NK, states.hidden_states, both))
    order = torch.tensor([place for places, *_ in parts for place in places]).argsort()
    hidden = {k: torch.cat([part[k] for _, _, part, _ in parts])[order] for k in states.hidden_states}
    log_probs_N, entropies_N = torch.cat([part[3] for part in parts])[order].unbind(-1)
    return torch.cat([part[1] for part in parts])[order], hidden, log_probs_N, entropies_N
