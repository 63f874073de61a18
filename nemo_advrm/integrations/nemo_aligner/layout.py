"""Which of NeMo-Aligner's parallel layouts the plug-in takes."""

from __future__ import annotations

from nemo_advrm.errors import ConfigError


def refuse_shared_sequences(ranks: int) -> None:
    """Raise ConfigError when ``ranks`` above 1 are to share every sequence.

    NeMo-Aligner 0.7.0 cuts sequences for supervised fine-tuning, SteerLM and DPO alone: its actors, critics and reward
    models would give each rank the whole sequence as its part, and every rank would ask the reward servers.
    """
    if ranks > 1:
        raise ConfigError(
            f"model.context_parallel_size={ranks}: NeMo-Aligner's actors and reward models do not share sequences "
            "between ranks; set it to 1"
        )
