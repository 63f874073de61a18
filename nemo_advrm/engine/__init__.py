"""Megatron-Core as this package uses it; what imports it first is safe from a broken Transformer Engine."""

from nemo_advrm.engine.engine import hide_broken

hide_broken()
