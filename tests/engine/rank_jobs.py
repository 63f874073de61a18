"""Jobs of test_ranks.py: data-parallel ranks whose rows make unequal numbers of microbatches, or none."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import torch
from tiny import TOKENIZER, VOCABULARY, pairs, responses, rollout_batch, sequences, tiny_config

from nemo_advrm.engine import checkpoint, runtime
from nemo_advrm.engine.builders import build_policy, build_reward_model
from nemo_advrm.engine.collectives import without_views
from nemo_advrm.engine.model import MegatronModel, build_model
from nemo_advrm.engine.scoring import score_sequences
from nemo_advrm.models.critic import Critic
from nemo_advrm.models.language_model import SupervisedModel
from nemo_advrm.models.reward_model import RewardModel
from nemo_advrm.models.rollout_batch import response_log_probs

Result = tuple[dict[str, float], list[Any], int]
"""(metrics over all ranks, what this rank's own rows gave, passes through this rank's part of the model)"""


def _own(rows: list[Any], shares: list[int]) -> list[Any]:
    """This rank's rows; data-parallel rank r works on shares[r] of them."""
    rank = runtime.current().dp_rank
    start = sum(shares[:rank])
    return rows[start : start + shares[rank]]


def _count(model: MegatronModel) -> list[None]:
    """Grows by one with every pass of this rank through its first chunk."""
    passes: list[None] = []
    model.parts[0].register_forward_pre_hook(lambda *_: passes.append(None))
    return passes


def _config(model: dict[str, Any]) -> Any:
    # one row a microbatch: ranks with unequal numbers of rows cut unequal numbers of microbatches
    return tiny_config("llama", runtime.current().layout, micro_batch_size=1, **model)


def save_initial(path: str) -> None:
    """The checkpoints that every layout starts from: ``path``/{lm, reward, value}."""
    cfg = tiny_config()
    for head in ("lm", "reward", "value"):
        model = build_model(cfg.model, cfg.precision, head, VOCABULARY, seed=1, trainable=False, head_init_std=0.2)
        checkpoint.save(Path(path) / head, model)


def train_reward_model(path: str, shares: list[int], model: dict[str, Any]) -> Result:
    """Two steps, and then a validation of the first row alone."""
    module = RewardModel(_config(model), TOKENIZER, pairs(8), pairs(1, seed=2), f"{path}/reward")
    passes = _count(module.model)
    for step in range(2):
        metrics = module.train_on(_own(pairs(8), shares), step)
    passed = len(passes)
    module.log_dict = lambda *args, **kwargs: None  # type: ignore[method-assign]
    for i, batch in enumerate(module.val_dataloader()):
        module.validation_step(batch, i)
    module.on_validation_epoch_end()
    return {**metrics, **module.validation_metrics}, [], passed


def train_supervised(path: str, shares: list[int], model: dict[str, Any]) -> Result:
    module = SupervisedModel(_config(model), TOKENIZER, responses(8), f"{path}/lm")
    passes = _count(module.model)
    for step in range(2):
        metrics = module.train_on(_own(responses(8), shares), step)
    return metrics, [], len(passes)


def score(path: str, shares: list[int], model: dict[str, Any]) -> Result:
    scorer = build_reward_model(_config(model), TOKENIZER, f"{path}/reward", 0, trainable=False)
    passes = _count(scorer)
    scores = score_sequences(scorer, _own(sequences(24), [4 * share for share in shares]), TOKENIZER.pad_id)
    return {}, scores.tolist(), len(passes)


def log_probs(path: str, shares: list[int], model: dict[str, Any]) -> Result:
    policy = build_policy(_config(model), TOKENIZER, f"{path}/lm", 0, trainable=False)
    passes = _count(policy)
    data = rollout_batch(_own(responses(8), shares))
    values_BT, _ = response_log_probs(policy, data, TOKENIZER.pad_id)
    return {}, values_BT[data.mask_BT].tolist(), len(passes)


def train_critic(path: str, shares: list[int], model: dict[str, Any]) -> Result:
    cfg = _config(model)
    critic = Critic(cfg, TOKENIZER, f"{path}/value", 0)
    checkpoint.load(Path(path) / "value", critic.model)
    passes = _count(critic.model)
    data = rollout_batch(_own(responses(8), shares))
    data.old_values_BT = critic.values(data)
    data.returns_BT = data.mask_BT.float()
    metrics = critic.update(data, 2, 0)
    return metrics, critic.values(data)[data.mask_BT].tolist(), len(passes)


def gathered(size: int) -> tuple[list[Any], int]:
    """What the writer gets of every rank's view of a tensor of ``size``, and the bytes that a rank sends."""
    rt = runtime.current()
    row = torch.full((size,), float(rt.dp_rank))[:3]
    rows = rt.gather_to_writer([{"z": row}])
    return [[{key: value.tolist() for key, value in row.items()} for row in part] for part in rows], len(
        pickle.dumps(without_views([{"z": row}]))
    )
