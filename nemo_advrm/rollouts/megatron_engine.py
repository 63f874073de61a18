"""The built-in rollout engine: Megatron-Core's own model generates, so that no weights are copied elsewhere."""

from __future__ import annotations

from torch import Tensor

from nemo_advrm.engine.generation import Generation, generate
from nemo_advrm.engine.model import MegatronModel
from nemo_advrm.rollouts.base import RolloutEngine


class MegatronEngine(RolloutEngine):
    """Generates with the policy itself, over all its tensor- and pipeline-parallel ranks."""

    def generate(self, policy: MegatronModel, prompts: list[list[int]], uniforms_NT: Tensor) -> Generation:
        """See :meth:`RolloutEngine.generate`; a sample depends on its logits and its uniform numbers alone."""
        # as many rows at once as scoring takes; how rows are grouped does not change what is sampled
        rows = 4 * policy.model_config.micro_batch_size
        return generate(policy, prompts, self.sampling, uniforms_NT, max_rows=rows)
