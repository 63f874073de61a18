"""Checkpoint conversion: Hugging Face <-> Megatron <-> .nemo, tensor by tensor."""

import nemo_advrm.engine  # noqa: F401  (before Megatron-Core is imported)
