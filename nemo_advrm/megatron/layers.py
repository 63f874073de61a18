"""Transformer parts for Megatron-Core's layer spec where Transformer Engine is absent.

They replace three local modules: the norm (Megatron's refuses sequence parallelism), the attention
product (PyTorch's fused one instead of explicit score matrices) and the use of the key/value cache
(rows of one batch may be at different positions, and cached keys are already rotated).
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.models.common.embeddings.rope_utils import apply_rotary_pos_emb
from megatron.core.transformer.attention import SelfAttention
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn

from nemo_advrm.megatron.kv_cache import KVCache

# rows of one attention call when decoding on CPU; generation orders rows by length
_DECODED_TOGETHER = 16


class Norm(nn.Module):
    """RMSNorm or LayerNorm over the last dimension, by ``config.normalization``.

    With ``layernorm_zero_centered_gamma`` the stored weight is the scale minus one (Nemotron's
    layernorm1p). Under sequence parallelism the gradients of the weights are summed over tensor
    parallel ranks, which Megatron does for parameters that carry ``sequence_parallel``.
    """

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **_: Any) -> None:
        super().__init__()
        self.rms = config.normalization == "RMSNorm"
        self.zero_centered = config.layernorm_zero_centered_gamma
        self.eps = eps
        start = torch.zeros if self.zero_centered else torch.ones
        self.weight = nn.Parameter(start(hidden_size, dtype=config.params_dtype))
        self.bias = None if self.rms else nn.Parameter(torch.zeros(hidden_size, dtype=config.params_dtype))
        for parameter in self.parameters():
            parameter.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]

    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight + 1 if self.zero_centered else self.weight
        if self.rms:
            return F.rms_norm(x, weight.shape, weight, self.eps)
        return F.layer_norm(x, weight.shape, weight, self.bias, self.eps)


class FusedCoreAttention(MegatronModule):
    """softmax(QK'/sqrt(d))V through ``scaled_dot_product_attention``, with grouped queries.

    Rows are padded on the right, so the causal mask alone keeps real tokens from seeing padding;
    decoding from a cache passes an explicit mask (True = hidden) with ``AttnMaskType.arbitrary``.
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
    ) -> None:
        super().__init__(config=config)
        self.dropout = config.attention_dropout if attention_dropout is None else attention_dropout
        self.softmax_scale = softmax_scale

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        attn_mask_type: AttnMaskType | None = None,
        attention_bias: Tensor | None = None,
        packed_seq_params: Any = None,
    ) -> Tensor:
        """query [sq, b, heads, d], key and value [sk, b, groups, d] -> context [sq, b, heads * d]."""
        from megatron.core.tensor_parallel import get_cuda_rng_tracker

        masked = attn_mask_type == AttnMaskType.arbitrary
        dropout = self.dropout if self.training else 0.0
        q, k, v = (t.permute(1, 2, 0, 3) for t in (query, key, value))
        if q.size(2) == 1:
            # one token a row: the heads of a group stand as its queries, so that its keys are read once
            q = q.reshape(q.size(0), k.size(1), -1, q.size(3))

        visible = ~attention_mask if masked and attention_mask is not None else None

        def attend(rows: slice = slice(None), keys: int | None = None) -> Tensor:
            return F.scaled_dot_product_attention(
                q[rows],
                k[rows, :, :keys],
                v[rows, :, :keys],
                attn_mask=visible[rows, ..., :keys] if visible is not None else None,
                is_causal=not masked and query.size(0) > 1,
                dropout_p=dropout,
                scale=self.softmax_scale,
                enable_gqa=q.size(1) != k.size(1),
            )

        if dropout and not self.config.sequence_parallel:
            with get_cuda_rng_tracker().fork():
                context = attend()
        elif visible is not None and query.size(0) == 1 and query.device.type == "cpu":
            context = torch.cat([attend(rows, keys) for rows, keys in _row_groups(visible)])
        else:
            context = attend()
        if query.size(0) == 1:
            return context.reshape(1, query.size(1), -1)
        return context.permute(2, 0, 1, 3).reshape(query.size(0), query.size(1), -1)


def _row_groups(visible: Tensor) -> list[tuple[slice, int]]:
    """(rows, keys to read) of a step of decoding: on CPU the step waits for the cache to come from memory.

    ``visible`` is [b, 1, 1, keys], True in front.
    """
    lengths = visible.sum(-1).flatten().tolist()
    starts = range(0, len(lengths), _DECODED_TOGETHER)
    return [(slice(i, i + _DECODED_TOGETHER), max(lengths[i : i + _DECODED_TOGETHER])) for i in starts]


class CachedSelfAttention(SelfAttention):
    """Self-attention whose cache holds rotated keys and whose rows may be at different positions."""

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
        if inference_context is None:
            return super()._adjust_key_value_for_inference(
                inference_context, query, key, value, rotary_pos_emb, *args, **kwargs
            )
        cache = inference_context
        if rotary_pos_emb is not None:
            angles_q, angles_k = (cache.rotary_angles(angles, query.size(0)) for angles in rotary_pos_emb)
            group = self.pg_collection.cp
            query = apply_rotary_pos_emb(query, angles_q, config=self.config, cp_group=group)
            key = apply_rotary_pos_emb(key, angles_k, config=self.config, cp_group=group)
        key, value = cache.update(self.layer_number, key, value)
        mask_type = AttnMaskType.causal if cache.prefilling else AttnMaskType.arbitrary
        return query, key, value, None, mask_type, None
