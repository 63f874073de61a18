"""The built-in rollout engine: the Megatron-Core model that is trained generates, so no weights are copied."""

from __future__ import annotations

from torch import Tensor

from nemo_advrm.engine.generation import Generation, generate
from nemo_advrm.engine.generation_rows import rows_at_once
from nemo_advrm.engine.model import MegatronModel
from nemo_advrm.rollouts.base import RolloutEngine


class MegatronEngine(RolloutEngine):
    """Generates with the policy's own model, over all its tensor- and pipeline-parallel ranks."""

    def generate(self, policy: MegatronModel, prompts: list[list[int]], uniforms_NT: Tensor) -> Generation:
        """See :meth:`RolloutEngine.generate`. A sample depends on its logits and its uniform numbers only."""
        longest = max(map(len, prompts), default=0) + self.sampling.max_new_tokens
        rl = self.cfg.rl
        rows = rows_at_once(policy, longest, rl.generation_batch_size)
        return generate(policy, prompts, self.sampling, uniforms_NT, rows, rl.decoding_graphs)
