"""Megatron-Core as this package uses it; what imports it first is safe from a broken Transformer Engine."""

from nemo_advrm.engine.transformer_engine import hide_if_broken

hide_if_broken()
