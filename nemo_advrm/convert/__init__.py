"""Converts checkpoints between Hugging Face, Megatron and .nemo, one tensor at a time."""

import nemo_advrm.engine  # noqa: F401  (before Megatron-Core is imported)
