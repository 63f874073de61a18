"""Arithmetic of how many rows are generated at once; the engine asks with what is free, the planner with what will be.

No Megatron-Core here (see ``engine/dimensions.py``).
"""

from __future__ import annotations

# share of the free memory for caches and logits; the rest is for activations of the prefill and for fragmentation
_SHARE = 0.8
# fp32 tensors [rows, vocabulary] at once while tokens are sampled: logits, probabilities, their order, their sums
_VOCABULARY_TENSORS = 6


def cache_bytes_per_token(layers: int, key_width: int, element: int) -> int:
    """Bytes of a token's keys and values in ``layers`` layers; ``key_width`` is that of a rank's keys."""
    return 2 * layers * key_width * element


def logits_bytes_per_row(vocab_size: int) -> int:
    """Bytes that the last stage needs per row for logits of the whole vocabulary and for sampling from them."""
    return _VOCABULARY_TENSORS * 4 * vocab_size


def rows_that_fit(bytes_per_row: float, free: float) -> int:
    """Rows of which caches and logits fit into ``free`` bytes; at least 1."""
    return max(1, int(free * _SHARE) // max(1, int(bytes_per_row)))
