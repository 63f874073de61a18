"""The policy trained by RL, for RLHF and for the attack. A step is: rollouts, rewards, advantages, update."""

from __future__ import annotations

import contextlib
import dataclasses
import time
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from nemo_advrm.config.moved import old_names
from nemo_advrm.config.schema import Config
from nemo_advrm.data.batching import BatchSchedule
from nemo_advrm.data.tokenizers import Tokenizer
from nemo_advrm.engine import runtime
from nemo_advrm.engine.builders import adapt_policy, build_policy
from nemo_advrm.engine.generation import uniforms
from nemo_advrm.engine.log_probs import Logits, log_probs, log_probs_and_entropy
from nemo_advrm.engine.model import MegatronModel
from nemo_advrm.engine.optim import MegatronOptimizer
from nemo_advrm.engine.schedule import Sums, forward_backward
from nemo_advrm.errors import ConfigError
from nemo_advrm.models.critic import Critic
from nemo_advrm.models.off_policy import importance_weights, off_policy_metrics, set_behaviour
from nemo_advrm.models.rollout_batch import RolloutBatch, response_log_probs
from nemo_advrm.models.trainable import TrainableModel, derive_seed
from nemo_advrm.objectives import advantages
from nemo_advrm.objectives.adversarial import apply_length_penalty, length_penalty
from nemo_advrm.objectives.kl import kl_noise, per_token_kl, response_kl
from nemo_advrm.objectives.losses import clipped_policy_gradient, policy_gradient
from nemo_advrm.objectives.masked import masked_mean, masked_whiten
from nemo_advrm.objectives.spread import rounding_of
from nemo_advrm.rewards.ensemble import PolicyReward, RewardOutput
from nemo_advrm.rewards.monitor import PREFIX
from nemo_advrm.rollouts.base import rollout_engine
from nemo_advrm.rollouts.types import Prompt, Rollouts


class PolicyModel(TrainableModel):
    """A Megatron language model trained by RL against a reward.

    Args:
        cfg: configuration of the stage; ``cfg.rl`` sets the algorithm.
        tokenizer: of the policy.
        prompts: the prompts to sample responses to.
        reward: computes the rewards of rollouts.
        restore_from: checkpoint of the initial policy, which is also the reference policy of the KL penalty.
        seed: seed of prompt order and sampling.
        reference: the reference policy when it is loaded already, else it is loaded from ``restore_from``. With
            ``model.peft=lora`` it is the trained policy without its adapters: one copy of the weights is in memory.

    ``behaviour`` is a policy elsewhere that writes the rollouts; None: the trained policy does, as it is at each step.
    After each step ``last_rollouts`` and ``last_reward_output`` hold this data-parallel rank's rollouts.
    """

    stage = "rlhf"

    def __init__(
        self,
        cfg: Config,
        tokenizer: Tokenizer,
        prompts: list[Prompt],
        reward: PolicyReward,
        restore_from: str,
        seed: int = 0,
        reference: MegatronModel | None = None,
    ) -> None:
        super().__init__(cfg, tokenizer, cfg.rl.max_steps, seed)
        replicas = runtime.current().dp_size
        if cfg.rl.prompts_per_step % replicas:
            raise ConfigError(
                f"rl.prompts_per_step={cfg.rl.prompts_per_step} cannot be divided by {replicas} data-parallel replicas"
            )
        self.prompts = prompts
        self.reward = reward
        self.engine = rollout_engine(cfg, tokenizer)
        self.behaviour = self.engine.behaviour()
        self.model, self.reference = self._open(restore_from, derive_seed(seed, "weights"), reference)
        self.optimizer = MegatronOptimizer(self.model, cfg.model.optim, cfg.trainer.gradient_clip_val)
        self.critic = Critic(cfg, tokenizer, restore_from, seed) if cfg.rl.algorithm == "ppo" else None
        self.last_rollouts: Rollouts | None = None
        self.last_reward_output: RewardOutput | None = None

    def _open(
        self, restore_from: str, seed: int, reference: MegatronModel | None
    ) -> tuple[MegatronModel, MegatronModel]:
        """Returns the policy and the reference policy."""
        cfg, tokenizer = self.config, self.tokenizer
        adapted = cfg.model.peft == "lora"
        model = None if adapted else build_policy(cfg, tokenizer, restore_from, seed, trainable=True)
        if reference is None:
            reference = build_policy(cfg, tokenizer, restore_from, seed, trainable=False)
        return model or adapt_policy(cfg, reference, restore_from, seed), reference

    def trained(self) -> dict[str, tuple[MegatronModel, MegatronOptimizer]]:
        models = {"policy": (self.model, self.optimizer)}
        if self.critic is not None:
            models["critic"] = (self.critic.model, self.critic.optimizer)
        return models

    def steps(self, start: int) -> Iterator[list[Prompt]]:
        """Yields this rank's prompts of each step; all rollouts of one prompt are sampled on one rank."""
        rt = runtime.current()
        size = self.config.rl.prompts_per_step
        order = BatchSchedule(len(self.prompts), size, derive_seed(self.seed, "prompts"))
        share = size // rt.dp_size
        for step in range(start, self.max_steps):
            rows = order.rows_for_step(step)[rt.dp_rank * share : (rt.dp_rank + 1) * share]
            yield [self.prompts[i] for i in rows]

    def train_on(self, batch: list[Prompt], step: int) -> dict[str, float]:
        started = time.perf_counter()
        with contextlib.ExitStack() as stack:
            for _, optimizer in self.trained().values():
                stack.enter_context(optimizer.offloaded())
            rollouts = self._roll_out(batch, step)
            reward_output = self._compute_rewards(rollouts)
            data = self._prepare(rollouts, reward_output)
        self.last_rollouts, self.last_reward_output = rollouts, reward_output
        metrics = self._update(data, step)
        if self.critic is not None:
            metrics |= self.critic.update(data, self.config.rl.updates_per_rollout, step)
        metrics |= self._describe(rollouts, reward_output, data)
        metrics["samples_per_second"] = metrics["samples"] / (time.perf_counter() - started)
        return metrics

    # the parts of one step, in order

    def _roll_out(self, batch: list[Prompt], step: int) -> Rollouts:
        rl, rt = self.config.rl, runtime.current()
        total = rl.prompts_per_step * rl.group_size
        rows = len(batch) * rl.group_size
        numbers = uniforms(derive_seed(self.seed, "sampling", step), total, rl.max_new_tokens)
        repeated = [prompt for prompt in batch for _ in range(rl.group_size)]
        own = numbers[rt.dp_rank * rows : (rt.dp_rank + 1) * rows]
        return self.engine.roll_out(self.model if self.behaviour is None else self.behaviour, repeated, own)

    def _compute_rewards(self, rollouts: Rollouts) -> RewardOutput:
        """Returns the rewards to train on; unended responses get the length penalty, which is equal on all ranks."""
        rl, reward_output = self.config.rl, self.reward.compute_rewards(rollouts)
        if not rl.apply_unended_penalty:
            return reward_output
        ended_B = torch.tensor(rollouts.ended)
        penalty = rl.unended_penalty
        if penalty is None:
            own = torch.stack([reward_output.rewards_N, reward_output.noise_N, ended_B.float()])
            rewards_N, noise_N, ended_N = torch.cat(runtime.current().gather_data_parallel(own), 1)
            penalty = length_penalty(rewards_N, ended_N.bool(), noise_N)
        rewards_B = apply_length_penalty(reward_output.rewards_N, ended_B, penalty)
        noise_B = torch.where(ended_B, reward_output.noise_N, rounding_of(rewards_B))
        return dataclasses.replace(
            reward_output, rewards_N=rewards_B, noise_N=noise_B, unpenalised_N=reward_output.proxy_N
        )

    @torch.no_grad()
    def _prepare(self, rollouts: Rollouts, reward_output: RewardOutput) -> RolloutBatch:
        """Computes log-probabilities, KL and advantages of the rollouts.

        The rounding error of the rewards is passed along with them, so that scaling by a standard deviation does not
        amplify rounding differences between equal rewards.
        """
        rl = self.config.rl
        data = RolloutBatch.of(rollouts)
        pad_id = self.tokenizer.pad_id
        self.reference.prefetch()
        data.old_log_probs_BT, data.entropy_BT = response_log_probs(self.model, data, pad_id, rl.temperature)
        data.reference_log_probs_BT, _ = response_log_probs(
            self.reference, data, pad_id, rl.temperature, with_entropy=False
        )
        pair = (data.old_log_probs_BT, data.reference_log_probs_BT, data.mask_BT)
        rewards_B, noise_B = reward_output.rewards_N, reward_output.noise_N
        kl_noise_BT = kl_noise(*pair, rl.kl.estimator, self.model.config.params_dtype)
        if self.critic is not None:
            kl_BT = per_token_kl(*pair, rl.kl.estimator)
            token_rewards_BT = advantages.token_rewards(kl_BT, rewards_B, data.mask_BT, rl.kl.coefficient)
            data.old_values_BT = self.critic.values(data)
            data.advantages_BT, data.returns_BT = advantages.gae(
                token_rewards_BT, data.old_values_BT, data.mask_BT, rl.gamma, rl.gae_lambda
            )
            if rl.scale_advantages:
                token_noise_BT = advantages.token_rewards(kl_noise_BT, noise_B, data.mask_BT, -rl.kl.coefficient)
                values_noise_BT = rounding_of(data.old_values_BT, self.critic.model.config.params_dtype)
                noise_BT = advantages.gae_noise(token_noise_BT, values_noise_BT, data.mask_BT, rl.gamma, rl.gae_lambda)
                data.advantages_BT = self._whiten(data.advantages_BT, noise_BT, data.mask_BT)
            return data
        if rl.kl.coefficient:
            rewards_B = rewards_B - rl.kl.coefficient * response_kl(*pair, rl.kl.estimator, "mean")
            noise_B = noise_B + rl.kl.coefficient * masked_mean(kl_noise_BT, data.mask_BT, dim=-1)
        data.advantages_BT = self._advantages(rewards_B, noise_B)[:, None] * data.mask_BT
        if self.behaviour is not None:
            set_behaviour(data, rollouts)
            data.advantages_BT = data.advantages_BT * importance_weights(data, self.config.policy_server)
        return data

    def _advantages(self, rewards_B: Tensor, noise_B: Tensor) -> Tensor:
        """Returns the advantages of this rank's rows, computed over all data-parallel ranks, [B]."""
        rl, rt = self.config.rl, runtime.current()
        rewards_N, noise_N = torch.cat(rt.gather_data_parallel(torch.stack([rewards_B, noise_B])), 1)
        if rl.algorithm == "rloo":
            values_N = advantages.rloo(rewards_N, rl.group_size, noise_N)
        elif rl.algorithm == "grpo":
            values_N = advantages.grpo(rewards_N, rl.group_size, noise_N)
        else:
            values_N = advantages.reinforce(rewards_N, rl.baseline, noise_N)
        if rl.scale_advantages and rl.algorithm != "grpo":
            values_N = advantages.scale_by_std(values_N)
        rows = rewards_B.numel()
        return values_N[rt.dp_rank * rows : (rt.dp_rank + 1) * rows]

    def _whiten(self, advantages_BT: Tensor, noise_BT: Tensor, mask_BT: Tensor) -> Tensor:
        """Normalises to zero mean and unit variance over the tokens of all data-parallel ranks, [B, T]."""
        rt = runtime.current()
        own = torch.stack([advantages_BT[mask_BT], noise_BT[mask_BT]])
        parts = rt.gather_data_parallel(own)
        everyone, noise = torch.cat(parts, 1)
        floor = noise.square().mean().sqrt().item()
        whitened = masked_whiten(everyone, torch.ones_like(everyone, dtype=torch.bool), noise=floor)
        start = sum(p.size(1) for p in parts[: rt.dp_rank])
        result = torch.zeros_like(advantages_BT)
        result[mask_BT] = whitened[start : start + own.size(1)]
        return result

    def _update(self, data: RolloutBatch, step: int) -> dict[str, float]:
        rl = self.config.rl
        lr = self.learning_rate(step)
        if self.critic is not None and step < rl.critic_warmup_steps:
            idle = ("loss", "policy_loss", "grad_norm", "approx_kl", "clipfrac")
            return {**dict.fromkeys(idle, 0.0), "learning_rate": lr}
        _, microbatches = data.microbatches(self.model, self.tokenizer.pad_id)
        metrics: dict[str, float] = {}
        norm = 0.0
        for _ in range(rl.updates_per_rollout):
            self.optimizer.zero_grad()
            metrics = forward_backward(self.model, microbatches, self._loss)
            norm = self.optimizer.step(lr, step)
        return {**metrics, "grad_norm": norm, "learning_rate": lr}

    def _loss(self, logits_NV: Logits, microbatch: Any) -> tuple[Tensor, int, Sums]:
        rl, extra = self.config.rl, microbatch.extra
        if rl.entropy_coefficient:
            log_probs_N, entropy_N = log_probs_and_entropy(logits_NV, extra["targets_N"], rl.temperature)
        else:
            log_probs_N, entropy_N = log_probs(logits_NV, extra["targets_N"], rl.temperature), None
        count = log_probs_N.numel()
        everything_N = torch.ones_like(log_probs_N, dtype=torch.bool)
        log_ratio_N = (log_probs_N - extra["old_log_probs_N"]).detach()
        # with several updates per rollout, the later ones are off-policy and need clipping; for the first update both
        # losses have the same gradient
        if rl.algorithm in ("ppo", "grpo") or rl.updates_per_rollout > 1:
            loss_N, clipped_N = clipped_policy_gradient(
                log_probs_N, extra["old_log_probs_N"], extra["advantages_N"], everything_N, rl.clip_low, rl.clip_high
            )
        else:
            loss_N = policy_gradient(log_probs_N, extra["advantages_N"], everything_N)
            clipped_N = torch.zeros_like(everything_N)
        sums: Sums = {
            "policy_loss": (loss_N.detach().sum(), count),
            "approx_kl": ((log_ratio_N.exp() - 1 - log_ratio_N).sum(), count),
            "clipfrac": (clipped_N.float().sum(), count),
        }
        if entropy_N is not None:
            loss_N = loss_N - rl.entropy_coefficient * entropy_N
        return loss_N.sum(), count, sums

    def _describe(self, rollouts: Rollouts, reward_output: RewardOutput, data: RolloutBatch) -> dict[str, float]:
        """Returns metrics of a step, as means over the rollouts of all data-parallel ranks."""
        rt = runtime.current()
        k1_B = response_kl(data.old_log_probs_BT, data.reference_log_probs_BT, data.mask_BT, "k1", "sum")
        columns = {
            "proxy": reward_output.proxy_N,  # without penalties
            "reward": reward_output.rewards_N,  # with the length penalty and that of a detector, as trained on
            "kl": k1_B,
            "entropy": masked_mean(data.entropy_BT, data.mask_BT, dim=-1),
            "response_length": data.mask_BT.sum(-1).float(),
            "ended": torch.tensor(rollouts.ended, dtype=torch.float32),
        }
        for k in range(reward_output.scores_NK.size(-1)):
            columns[f"scores/{k + 1}"] = reward_output.scores_NK[:, k]
            if "z" in reward_output.details:
                columns[f"z/{k + 1}"] = reward_output.details["z"][:, k]
        columns |= {name: values_N for name, values_N in reward_output.details.items() if name.startswith(PREFIX)}
        table = torch.cat(rt.gather_data_parallel(torch.stack([c.float() for c in columns.values()], -1)))
        means = dict(zip(columns, table.mean(0).tolist(), strict=True))
        means["proxy_std"] = table[:, 0].std(correction=0).item()
        means["samples"] = float(table.size(0))
        if self.behaviour is not None:
            means |= off_policy_metrics(data, reward_output.proxy_N, self.config.policy_server)
        return means


__getattr__ = old_names(__name__)
