"""Checkpoint conversion: Hugging Face <-> Megatron <-> .nemo, tensor by tensor."""
