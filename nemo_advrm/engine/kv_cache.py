"""Key/value cache for generation, with its own length for every row of the batch."""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.inference.contexts import StaticInferenceContext
from torch import Tensor


class KVCache(StaticInferenceContext):
    """Cache of one batch whose prompts are padded on the right; each row then grows from its own end.

    Megatron's static context has one position for the whole batch. Here prompts of different lengths decode together,
    positions are those of training, and finished rows can be dropped (:meth:`keep_rows`).

    Attributes:
        lengths_B: tokens in the cache per row (int64).
        prefilling: True during the pass over the prompts.
    """

    def __init__(self, lengths_B: Tensor, max_sequence_length: int) -> None:
        super().__init__(max_batch_size=lengths_B.numel(), max_sequence_length=max_sequence_length)
        # each model call returns logits for every position; the caller picks each row's last
        self.materialize_only_last_token_logits = False
        self.lengths_B = lengths_B.clone()
        self.prefilling = True
        # the host counts along, so that it need not ask a GPU
        self._prompts = lengths_B.tolist()
        self.attended = max(self._prompts)
        self._prefill = slice(0, lengths_B.numel())

    def prefill_rows(self, start: int, stop: int) -> None:
        """The next prefill pass holds rows ``start`` to ``stop``; by default it holds all."""
        self._prefill = slice(start, stop)

    def rotary_angles(self, angles: Tensor, query_length: int) -> Tensor:
        """Select from rotary angles [max, 1, 1, d] those of this call's tokens, [s, 1 or b, 1, d]."""
        if self.prefilling:
            return angles[:query_length]
        return angles[self.lengths_B].transpose(0, 1)

    def update(self, layer_number: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Store this call's keys and values [s, b, groups, d]; return all keys and values to attend to."""
        if layer_number not in self.key_value_memory_dict:
            self.key_value_memory_dict[layer_number] = (self._allocate(key), self._allocate(value))
        keys, values = self.key_value_memory_dict[layer_number]
        if self.prefilling:
            keys[self._prefill, :, : key.size(0)] = key.permute(1, 2, 0, 3)
            values[self._prefill, :, : value.size(0)] = value.permute(1, 2, 0, 3)
            return key, value
        rows = torch.arange(key.size(1), device=key.device)
        keys[rows, :, self.lengths_B] = key[0]
        values[rows, :, self.lengths_B] = value[0]
        end = self.attended
        return keys[:, :, :end].permute(2, 0, 1, 3), values[:, :, :end].permute(2, 0, 1, 3)

    def _allocate(self, like: Tensor) -> Tensor:
        _, _, groups, channels = like.shape
        return like.new_zeros(self.lengths_B.numel(), groups, self.max_sequence_length, channels)

    def start_decoding(self) -> None:
        """End the prefill; from now on each call holds one new token per row."""
        self.prefilling = False
        self.sequence_len_offset = 1  # tells Megatron that the prefill is over
        self.enable_decode_mode()
        self.attended += 1

    def advance(self) -> None:
        """Count the token that the last call stored."""
        self.lengths_B += 1
        self.attended += 1

    def hidden_mask(self) -> Tensor:
        """Mask [b, 1, 1, attended]: True after the row's new token."""
        positions = torch.arange(self.attended, device=self.lengths_B.device)
        return (positions[None, :] > self.lengths_B[:, None])[:, None, None, :]

    def keep_rows(self, rows_B: Tensor) -> None:
        """Drop all rows but ``rows_B``, at least one (int64 indices into the present batch, on the host)."""
        after_prompt = self.attended - max(self._prompts)
        self._prompts = [self._prompts[row] for row in rows_B.tolist()]
        self.attended = max(self._prompts) + after_prompt
        rows_B = rows_B.to(self.lengths_B.device)
        self.lengths_B = self.lengths_B[rows_B]
        self.max_batch_size = rows_B.numel()
        for layer, (keys, values) in self.key_value_memory_dict.items():
            self.key_value_memory_dict[layer] = (keys[rows_B], values[rows_B])

    def __eq__(self, other: Any) -> bool:
        return self is other

    __hash__ = object.__hash__
