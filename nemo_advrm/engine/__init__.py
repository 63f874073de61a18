"""Everything that knows Megatron-Core. Importing it first hides a broken Transformer Engine from Megatron-Core."""

from nemo_advrm.engine.transformer_engine import hide_if_broken

hide_if_broken()
