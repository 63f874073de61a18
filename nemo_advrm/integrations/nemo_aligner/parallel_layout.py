"""Refuses the parallel layouts of NeMo-Aligner that the plug-in does not support."""

from __future__ import annotations

from nemo_advrm.errors import ConfigError


def refuse_context_parallelism(size: int) -> None:
    """Raise ConfigError if the context-parallel ``size`` is above 1 (0: not yet known).

    NeMo-Aligner 0.7.0 slices sequences only for supervised fine-tuning, SteerLM and DPO. Its actors, critics and reward
    models would give each rank the whole sequence as its slice, and every rank would query the reward servers.
    """
    if size > 1:
        raise ConfigError(
            f"model.context_parallel_size={size}: NeMo-Aligner's actors and reward models do not support context "
            "parallelism; set it to 1"
        )
