"""Key/value cache for generation, with its own length for every row of the batch."""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.inference.contexts import StaticInferenceContext
from torch import Tensor

from nemo_advrm.engine.varlen import CachedLengths


class KVCache(StaticInferenceContext):
    """Cache of a batch whose prompts are padded on the right; each row then grows from its own end.

    Megatron's static context has one position for the whole batch. Here prompts of different lengths decode together,
    positions are those of training, and finished rows can be dropped (:meth:`keep_rows`).

    One batch after another uses the same memory: tensors keep their addresses and those of fewer rows are the first
    ones, as a CUDA graph needs it. What an earlier batch has left behind the end of a row is masked.

    Args:
        rows: most rows of a batch.
        max_sequence_length: most tokens of a row, prompt and response.
        block: :attr:`attended` is a multiple of it, up to the longest row possible.
        by_lengths: attention takes the lengths of rows, so that no shape depends on them; else a mask.

    Attributes:
        lengths_B: tokens in the cache per row (int64).
        attended: positions that a new token attends to, its own included.
        prefilling: True during the pass over the prompts.
    """

    def __init__(
        self,
        rows: int,
        max_sequence_length: int,
        device: torch.device,
        block: int = 1,
        by_lengths: bool = False,
    ) -> None:
        # a multiple of 8, if of anything, because attention on a GPU copies masks whose rows are not aligned
        step = min(block, 8)
        super().__init__(max_batch_size=rows, max_sequence_length=-(-max_sequence_length // step) * step)
        # each model call returns logits for every position; the caller picks each row's last
        self.materialize_only_last_token_logits = False
        self._block = block
        self._by_lengths = by_lengths
        self._lengths = torch.zeros(rows, dtype=torch.int64, device=device)
        self._angles: dict[int, Tensor] = {}

    def begin(self, lengths_B: Tensor) -> None:
        """Take up a batch of prompts of these lengths in the place of the one before."""
        self.reset()
        self.prefilling = True
        self.lengths_B = self._lengths[: lengths_B.numel()]
        self.lengths_B.copy_(lengths_B)
        # the host counts along, so that it need not ask a GPU
        self._prompts = lengths_B.tolist()
        self._new_tokens = 0
        self._prefill = slice(0, lengths_B.numel())
        self._set_attended()

    def _set_attended(self) -> None:
        longest = max(self._prompts) + self._new_tokens
        self._filled = min(-(-longest // self._block) * self._block, self.max_sequence_length)
        self.attended = self.max_sequence_length if self._by_lengths else self._filled

    def tensors(self) -> list[Tensor]:
        """What a decoding step reads here by its address."""
        return [self._lengths, *(t for both in self.key_value_memory_dict.values() for t in both)]

    def prefill_rows(self, rows: slice) -> None:
        """The next prefill pass holds ``rows``; by default it holds all."""
        self._prefill = rows

    def rotary_angles(self, angles: Tensor, query_length: int) -> Tensor:
        """Select from rotary angles [max, 1, 1, d] those of this call's tokens, [s, 1 or b, 1, d]."""
        self._angles[angles.data_ptr()] = angles  # a graph still reads a table that Megatron has dropped
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
        seen = (slice(0, key.size(1)), slice(None), slice(0, self.attended))
        return keys[seen].permute(2, 0, 1, 3), values[seen].permute(2, 0, 1, 3)

    def _allocate(self, like: Tensor) -> Tensor:
        """[rows, groups, tokens, channels], in memory in the order that attention reads."""
        _, _, groups, channels = like.shape
        if self._by_lengths:
            return like.new_zeros(self.max_batch_size, self.max_sequence_length, groups, channels).transpose(1, 2)
        return like.new_zeros(self.max_batch_size, groups, self.max_sequence_length, channels)

    def start_decoding(self) -> None:
        """End the prefill; from now on each call holds one new token per row."""
        self.prefilling = False
        self.sequence_len_offset = 1  # tells Megatron that the prefill is over
        self.enable_decode_mode()
        self._new_tokens = 1
        self._set_attended()

    def advance(self) -> None:
        """Count the token that the last call stored."""
        self.lengths_B += 1
        self._new_tokens += 1
        self._set_attended()

    def seen(self) -> Tensor | CachedLengths:
        """Which keys new tokens see: lengths, or a mask [b, 1, 1, attended] that is True after the row's new token."""
        if self._by_lengths:
            return CachedLengths.of(self.lengths_B + 1, self.max_sequence_length)
        positions = torch.arange(self.attended, device=self.lengths_B.device)
        return (positions[None, :] > self.lengths_B[:, None])[:, None, None, :]

    def keep_rows(self, rows_B: Tensor) -> None:
        """Drop all rows but ``rows_B``, at least one (int64 indices into the present batch, on the host)."""
        self._prompts = [self._prompts[row] for row in rows_B.tolist()]
        kept = len(self._prompts)
        rows_B = rows_B.to(self._lengths.device)
        for keys_and_values in self.key_value_memory_dict.values():
            for memory in keys_and_values:
                memory[:kept, :, : self._filled] = memory[rows_B, :, : self._filled]
        self._lengths[:kept] = self._lengths[rows_B]
        self.lengths_B = self._lengths[:kept]
        self._set_attended()

    def __eq__(self, other: Any) -> bool:
        return self is other

    __hash__ = object.__hash__
