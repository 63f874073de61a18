"""Attention of a layer, with sliding windows, soft-caps, context parallelism and a key/value cache.

It replaces two of Megatron-Core's modules. Core attention: Megatron's own computes explicit score matrices and has none
of these features; this one calls PyTorch's fused kernel. Self-attention: Megatron's static cache has one position for
the whole batch; here rows may be at different positions, and cached keys are already rotated.
"""

from __future__ import annotations

import contextlib
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer.attention import SelfAttention
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.utils import is_layer_window_attention
from torch import Tensor
from torch.nn.attention.bias import causal_lower_right

from nemo_advrm.engine import context, varlen
from nemo_advrm.engine.kv_cache import KVCache
from nemo_advrm.engine.rotation import rotate


class FusedCoreAttention(MegatronModule):
    """softmax(QK' * scale)V through ``scaled_dot_product_attention``, with grouped queries.

    Rows are padded on the right, so the causal mask also hides padding from real tokens. Decoding from a cache passes
    an explicit mask (True = hidden) with ``AttnMaskType.arbitrary``, or lengths for a kernel that takes them. Layers
    with a sliding window (``config.window_size``) also hide the keys before the window.

    Args:
        softcap: bounds scores by ``softcap * tanh(score / softcap)`` (Gemma 2); 0 means no bound. No fused kernel of
            PyTorch computes it, so the scores [b, heads, sq, sk] are materialised.
    """

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        attn_mask_type: AttnMaskType,
        attention_type: str,
        attention_dropout: float | None = None,
        softmax_scale: float | None = None,
        cp_comm_type: str | None = None,
        pg_collection: Any = None,
        softcap: float = 0.0,
    ) -> None:
        super().__init__(config=config)
        self.dropout = config.attention_dropout if attention_dropout is None else attention_dropout
        self.softmax_scale = softmax_scale
        self.softcap = softcap
        # number of keys that a query sees, its own included; 0 means all. layer_number counts from 1 over all stages
        self.window = 0
        if config.window_size and is_layer_window_attention(
            config.window_size, config.window_attn_skip_freq, layer_number
        ):
            self.window = config.window_size[0] + 1

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | varlen.CachedLengths | None,
        attn_mask_type: AttnMaskType | None = None,
        attention_bias: Tensor | None = None,
        packed_seq_params: PackedSeqParams | None = None,
    ) -> Tensor:
        """query [sq, b, heads, d], key and value [sk, b, groups, d] -> context [sq, b, heads * d].

        Packed: query [t, heads, d], key and value [t, groups, d] -> like query.
        """
        if isinstance(attention_mask, varlen.CachedLengths):
            return varlen.cached_attention(query, key, value, attention_mask, self.window, self.softmax_scale)
        if packed_seq_params is not None:
            return self._packed(query, key, value, packed_seq_params)
        if self.config.context_parallel_size > 1:
            return self._context_parallel(query, key, value)
        length = query.size(0)
        q, k, v = (t.permute(1, 2, 0, 3) for t in (query, key, value))
        if length == 1:
            # one token per row: the heads of a group become its queries, so that its keys are read once
            q = q.reshape(q.size(0), k.size(1), -1, q.size(3))
        if attn_mask_type == AttnMaskType.arbitrary:
            visible = None if attention_mask is None else self._within_window(~attention_mask)
            is_causal = False
        else:
            visible = self._causal(length, length, query.device)
            is_causal = visible is None and length > 1
        result = self._attend(q, k, v, visible, is_causal)
        if length == 1:
            return result.reshape(1, query.size(1), -1)
        return result.permute(2, 0, 1, 3).reshape(length, query.size(1), -1)

    def _packed(self, query: Tensor, key: Tensor, value: Tensor, packed: PackedSeqParams) -> Tensor:
        """:meth:`forward` for packed sequences: by a kernel, else by a mask that hides the other sequences."""
        if self.config.context_parallel_size == 1 and varlen.attends(query, self.softcap, self._dropout):
            return varlen.attention(query, key, value, packed, self.window, self.softmax_scale)
        bounds = packed.cu_seqlens_q
        ranks = self.config.context_parallel_size
        total = query.size(0) * ranks
        sequence_T = torch.repeat_interleave(bounds.diff(), output_size=total)
        within = sequence_T[:, None] == sequence_T
        causal = self._causal(total, total, query.device)
        visible = within.tril() if causal is None else within & causal
        if ranks > 1:  # keys and values of all ranks, rank after rank
            order_T = context.by_rank(bounds, ranks)
            visible = visible[context.own_of(order_T)][:, order_T]
            gathered = context.cp_gather_ranks(torch.cat([key, value], -1), used_whole=False)
            key, value = gathered.split(key.size(-1), -1)
        q, k, v = (t.transpose(0, 1)[None] for t in (query, key, value))
        return self._attend(q, k, v, visible, False)[0].transpose(0, 1)

    def _context_parallel(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """:meth:`forward` for this rank's slice of the sequences, under context parallelism.

        Keys and values are gathered before attention, as in Llama 3 (arXiv 2407.21783, section 3.3.2): with grouped
        queries they are small beside the other activations, and windows and soft-caps need no special case. Each of
        the rank's two query chunks then attends to the keys up to its own end.
        """
        gathered = context.cp_all_gather(torch.cat([key, value], -1), used_whole=False)
        length = query.size(0) // 2
        results = []
        for chunk, part in zip(context.own_chunks(), query.permute(1, 2, 0, 3).chunk(2, 2), strict=True):
            first = max(0, chunk * length - self.window + 1) // length if self.window else 0
            seen = torch.cat(gathered[first : chunk + 1]).permute(1, 2, 0, 3)
            k, v = seen.split(key.size(-1), -1)
            visible = self._causal(length, k.size(2), query.device)
            if visible is None and not self.softcap:
                visible = causal_lower_right(length, k.size(2))
            results.append(self._attend(part, k, v, visible, False))
        return torch.cat(results, 2).permute(2, 0, 1, 3).reshape(query.size(0), query.size(1), -1)

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, visible: Tensor | None, is_causal: bool) -> Tensor:
        """q [b, heads, sq, d], k and v [b, groups, sk, d], ``visible`` broadcast to [b, heads, sq, sk] -> like q."""
        from megatron.core.tensor_parallel import get_cuda_rng_tracker

        dropout = self._dropout
        own_stream = dropout and not self.config.sequence_parallel
        with get_cuda_rng_tracker().fork() if own_stream else contextlib.nullcontext():
            if self.softcap:
                return capped_attention(q, k, v, visible, self.softcap, self.softmax_scale, dropout)
            return F.scaled_dot_product_attention(
                q,
                k,
                v,
                attn_mask=visible,
                is_causal=is_causal,
                dropout_p=dropout,
                scale=self.softmax_scale,
                enable_gqa=q.size(1) != k.size(1),
            )

    @property
    def _dropout(self) -> float:
        return self.dropout if self.training else 0.0

    def _causal(self, queries: int, keys: int, device: torch.device) -> Tensor | None:
        """Mask [queries, keys], True = visible, of the last ``queries`` positions; None if the fused mask is enough."""
        windowed = 0 < self.window < keys
        if keys == 1 or not (windowed or self.softcap):
            return None
        at_keys = torch.arange(keys, device=device)
        at_queries = at_keys[keys - queries :, None]
        visible = at_queries >= at_keys
        return visible & (at_queries < at_keys + self.window) if windowed else visible

    def _within_window(self, visible: Tensor) -> Tensor:
        """Mask [b, 1, 1, sk] that is True up to each row's new token -> True only in the last ``window`` of these."""
        if not 0 < self.window < visible.size(-1):
            return visible
        positions = torch.arange(visible.size(-1), device=visible.device)
        return visible & (positions >= visible.sum(-1, keepdim=True) - self.window)


def capped_attention(
    q: Tensor, k: Tensor, v: Tensor, visible: Tensor | None, cap: float, scale: float | None, dropout: float
) -> Tensor:
    """softmax(cap * tanh(QK' * scale / cap))V with an fp32 softmax.

    Args:
        q: [b, heads, sq, d].
        k, v: [b, groups, sk, d]; heads g * heads / groups to (g + 1) * heads / groups - 1 share group g.
        visible: [sq, sk] or [b, 1, 1, sk], True = visible; None shows all keys.
        scale: factor of the scores; None means 1 / sqrt(d).

    Returns:
        [b, heads, sq, d].
    """
    b, heads, length, d = q.shape
    groups = k.size(1)
    # the heads of a group are stacked as its queries
    scores = q.reshape(b, groups, -1, d) @ k.transpose(-1, -2)
    scores = scores * (d**-0.5 if scale is None else scale)
    scores = (cap * torch.tanh(scores / cap)).view(b, heads, length, -1)
    if visible is not None:
        scores = scores.masked_fill(~visible, float("-inf"))
    weights = F.softmax(scores, dim=-1, dtype=torch.float32).to(q.dtype)
    weights = F.dropout(weights, dropout)
    return (weights.view(b, groups, -1, weights.size(-1)) @ v).view(b, heads, length, d)


class CachedSelfAttention(SelfAttention):
    """Self-attention with a cache of rotated keys, whose rows may be at different positions."""

    def _adjust_key_value_for_inference(
        self,
        inference_context: KVCache | None,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        rotary_pos_emb: Any,
        *args: Any,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor, Tensor, Any, AttnMaskType, None]:
        if rotary_pos_emb is not None and not self.config.apply_rope_fusion:
            # angles of this call's tokens (see HeadedGPT.forward), the same for queries and keys
            query, key = rotate(query, rotary_pos_emb[0]), rotate(key, rotary_pos_emb[1])
            rotary_pos_emb = None
        if inference_context is None:
            return super()._adjust_key_value_for_inference(
                inference_context, query, key, value, rotary_pos_emb, *args, **kwargs
            )
        cache = inference_context
        key, value = cache.update(self.layer_number, key, value)
        mask_type = AttnMaskType.causal if cache.prefilling else AttnMaskType.arbitrary
        return query, key, value, None, mask_type, None
