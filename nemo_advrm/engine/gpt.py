"""Megatron-Core's GPT with one of three heads: next-token logits, a reward per row, or a value per token."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.tensor_parallel import gather_from_sequence_parallel_region
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn

from nemo_advrm.config.schema import ModelConfig
from nemo_advrm.engine import context
from nemo_advrm.engine.context import SplitLogits
from nemo_advrm.engine.dimensions import Head, tokens_at_once
from nemo_advrm.engine.kv_cache import KVCache
from nemo_advrm.engine.layers import Norm
from nemo_advrm.engine.log_probs import DeferredLogits
from nemo_advrm.engine.packing import Packing
from nemo_advrm.engine.rotation import rotation
from nemo_advrm.engine.transformer import layer_spec
from nemo_advrm.engine.varlen import CachedLengths


class ScalarHead(nn.Module):
    """Linear map from the last hidden state to ``outputs`` numbers, in fp32 on every rank.

    It is on the last pipeline stage. Tensor-parallel ranks have replicas, whose gradients are equal because they see
    the same hidden state.
    """

    def __init__(self, hidden_size: int, outputs: int, init_std: float, bias: bool = False) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(outputs, hidden_size, dtype=torch.float32))
        self.bias = nn.Parameter(torch.zeros(outputs, dtype=torch.float32)) if bias else None
        nn.init.normal_(self.weight, std=init_std)

    @torch.no_grad()
    def draw(self, seeds: Sequence[int], init_std: float) -> None:
        """Draw the weights of each output from its own seed: those of an output do not depend on how many there are."""
        for row_H, seed in zip(self.weight, seeds, strict=True):
            generator = torch.Generator("cpu").manual_seed(seed)  # the same numbers on every kind of device
            row_H.copy_(init_std * torch.randn(row_H.numel(), generator=generator, device="cpu"))

    def forward(self, hidden: Tensor) -> Tensor:
        """[..., hidden] in any dtype -> [..., outputs] in fp32."""
        return nn.functional.linear(hidden.float(), self.weight, self.bias)


class HeadedGPT(GPTModel):
    """A GPT model chunk with ``head`` on the last stage.

    Sequence parallelism: the last hidden state is gathered before the head, which then computes only the requested
    tokens, so that no logits are computed for prompts.

    Context parallelism: inputs are whole sequences, and so are outputs, on every rank. Only the logits for training a
    language model stay split (:class:`SplitLogits`).

    ``banned_token_ids`` get no probability: padding of the vocabulary, and control tokens in responses.
    """

    def __init__(
        self,
        config: TransformerConfig,
        model: ModelConfig,
        head: Head,
        vocab_size: int,
        on_gpu: bool,
        pre_process: bool,
        post_process: bool,
        banned_token_ids: tuple[int, ...] = (),
        head_outputs: int = 1,
        head_init_std: float = 0.02,
        vp_stage: int | None = None,
    ) -> None:
        spec = layer_spec(model, config.params_dtype, on_gpu)
        local = spec.submodules.input_layernorm is Norm
        layers = get_num_layers_to_build(config, vp_stage)
        block = TransformerBlockSubmodules(layer_specs=[spec] * layers, layer_norm=Norm) if local else spec
        super().__init__(
            config=config,
            transformer_layer_spec=block,
            vocab_size=vocab_size,
            max_sequence_length=model.encoder_seq_length,
            pre_process=pre_process,
            post_process=post_process,
            share_embeddings_and_output_weights=model.share_embeddings_and_output_weights and head == "lm",
            position_embedding_type=model.position_embedding_type,
            rotary_percent=model.rotary_percent,
            rotary_base=model.rotary_base,
            vp_stage=vp_stage,
        )
        if model.position_embedding_type == "rope":
            self.rotary_pos_emb.cp_group = None  # keep the angles of the whole sequence; forward slices them
        if model.rope_scaling:
            self._scale_rotation(model)
        # rounded to the dtype of the embeddings, as in transformers
        self.embedding_scale = torch.tensor(model.embedding_scale, dtype=config.params_dtype, device="cpu").item()
        self.logit_softcap = model.logit_softcap
        self.head_kind = head
        if not post_process:
            return
        if head == "lm":
            # hidden states arrive gathered (see the class docstring)
            self.output_layer.sequence_parallel = False
            self.output_layer.allreduce_dgrad = config.tensor_model_parallel_size > 1
            banned_V = torch.zeros(vocab_size, dtype=torch.bool, device="cpu")
            banned_V[list(banned_token_ids)] = True
            part = vocab_size // config.tensor_model_parallel_size
            rank = self.pg_collection.tp.rank()
            # buffers, so that they are on the model's device; not in its checkpoints
            self.register_buffer("banned_V", banned_V, persistent=False)
            self.register_buffer("own_banned_V", banned_V[rank * part : (rank + 1) * part], persistent=False)
            self.rows_per_chunk = tokens_at_once(model, vocab_size)
        else:
            del self.output_layer
            self.head = ScalarHead(config.hidden_size, head_outputs, head_init_std, model.head_bias)

    def _scale_rotation(self, model: ModelConfig) -> None:
        """Set Llama 3.1's frequencies; Megatron's constructor takes only the first of the four numbers."""
        rotary = self.rotary_pos_emb
        rotary.inv_freq = rotary._apply_scaling(
            rotary.inv_freq,
            factor=model.rope_scaling_factor,
            low_freq_factor=model.rope_scaling_low_freq_factor,
            high_freq_factor=model.rope_scaling_high_freq_factor,
            original_max_position_embeddings=model.rope_scaling_original_context,
        )

    def forward(
        self,
        input_ids: Tensor,
        position_ids: Tensor,
        attention_mask: Tensor | CachedLengths | None = None,
        *,
        read_at_B: Tensor | None = None,
        predict_BS: Tensor | None = None,
        inference_context: KVCache | None = None,
        packing: Packing | None = None,
        gather_logits: bool = False,
        with_hidden: bool = False,
    ) -> Tensor | SplitLogits | DeferredLogits:
        """One pipeline stage.

        Args:
            input_ids, position_ids: [B, S] int64.
            attention_mask: see :meth:`KVCache.seen`; only used when decoding from a cache.
            read_at_B: position of each row's last real token (reward, and lm when generating); of each sequence's in
                the row, if it is packed.
            predict_BS: mask of the positions whose next-token logits are requested (lm when training).
            packing: where the sequences of the one row are, if it is packed.
            gather_logits: gather the vocabulary over tensor-parallel ranks.
            with_hidden: append the hidden states that the head reads (reward).

        Returns:
            Hidden states [S, B, H] before the last stage. On the last stage: [B, outputs] at ``read_at_B`` (reward;
            [B, outputs + H] in fp32 with ``with_hidden``), [B, S] (value), [N, V / tp] at ``predict_BS`` in row order
            (lm; :class:`SplitLogits` under context parallelism; :class:`DeferredLogits` where they are more than
            ``model.logits_chunk_size``) or [B, V] at ``read_at_B`` (lm).
        """
        length = input_ids.size(1)
        sliced = self.config.context_parallel_size > 1
        params, order_T = (packing.params, packing.order_T) if packing is not None else (None, None)
        if sliced:
            input_ids, position_ids = (context.cp_slice(ids, 1, order_T) for ids in (input_ids, position_ids))
        embedded = None  # then Megatron embeds
        if self.pre_process and self.embedding_scale != 1:
            embedded = self.embedding(input_ids=input_ids, position_ids=position_ids) * self.embedding_scale
        decoder_input, rotary, rotary_cos, rotary_sin, offset, _ = self._preprocess(
            input_ids=input_ids,
            position_ids=position_ids,
            decoder_input=embedded,
            inference_context=inference_context,
            packed_seq_params=params,
        )[:6]
        if sliced and rotary is not None and packing is None:
            rotary = context.cp_slice(rotary, 0)
        if rotary is not None and not self.config.apply_rope_fusion:
            if inference_context is not None:
                rotary = inference_context.rotary_angles(rotary, length)
            elif packing is not None:
                rotary = rotary[position_ids[0]]
            rotary = rotation(rotary, self.config.params_dtype)
        hidden_SBH = self.decoder(
            hidden_states=decoder_input,
            attention_mask=attention_mask,
            inference_context=inference_context,
            rotary_pos_emb=rotary,
            rotary_pos_cos=rotary_cos,
            rotary_pos_sin=rotary_sin,
            sequence_len_offset=offset,
            packed_seq_params=params,
        )
        if not self.post_process:
            return hidden_SBH
        if self.config.sequence_parallel:
            hidden_SBH = gather_from_sequence_parallel_region(
                hidden_SBH, tensor_parallel_output_grad=False, group=self.pg_collection.tp
            )
        if self.head_kind == "value":
            values_SB = self.head(hidden_SBH).squeeze(-1)
            return (context.gather_sequence(values_SB, order_T) if sliced else values_SB).transpose(0, 1)
        if read_at_B is None:
            assert predict_BS is not None
            own_BS = context.cp_slice(predict_BS, 1, order_T) if sliced else predict_BS
            logits_NV = self._next_tokens(hidden_SBH.transpose(0, 1)[own_BS], gather_logits)
            return SplitLogits.of(logits_NV, predict_BS, order_T) if sliced else logits_NV
        rows_B = torch.arange(hidden_SBH.size(1), device=hidden_SBH.device)
        if not sliced:
            return self._read(hidden_SBH[read_at_B, rows_B], gather_logits, with_hidden)
        index_B, held_B = context.own_index(read_at_B, length, order_T)
        own = self._read(hidden_SBH[index_B, rows_B], gather_logits, with_hidden)
        return context.cp_all_reduce(own.masked_fill(~held_B[:, None], 0.0))

    def _read(self, picked_BH: Tensor, gather_logits: bool, with_hidden: bool) -> Tensor:
        output = self._apply_head(picked_BH, gather_logits)
        # one tensor, so that the sum over context-parallel ranks and the schedules treat both parts alike
        return torch.cat([output, picked_BH.float()], -1) if with_hidden else output

    def _next_tokens(self, picked_NH: Tensor, gather_logits: bool) -> Tensor | DeferredLogits:
        if self.head_kind == "lm" and not gather_logits and picked_NH.size(0) > self.rows_per_chunk:
            return DeferredLogits(picked_NH, lambda chunk_NH: self._apply_head(chunk_NH, False), self.rows_per_chunk)
        return self._apply_head(picked_NH, gather_logits)

    def _apply_head(self, picked_NH: Tensor, gather_logits: bool) -> Tensor:
        """Rewards [N, outputs] or logits [N, V / tp] (gathered: [N, V]) of hidden states."""
        if self.head_kind == "reward":
            return self.head(picked_NH)  # type: ignore[no-any-return]
        weight = self.shared_embedding_or_output_weight() if self.share_embeddings_and_output_weights else None
        logits, _ = self.output_layer(picked_NH.unsqueeze(1), weight=weight, runtime_gather_output=gather_logits)
        logits = logits.squeeze(1)
        if self.logit_softcap:
            logits = self.logit_softcap * torch.tanh(logits / self.logit_softcap)
        banned_V = self.banned_V if gather_logits else self.own_banned_V
        return logits.masked_fill(banned_V, -1e9)

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple[Any, ...] = (), metadata: dict[str, Any] | None = None
    ) -> dict[str, Any]:
        """Megatron's sharded tensors. GPTModel's method needs an output layer, so other heads use the base class's."""
        if self.head_kind == "lm":
            return super().sharded_state_dict(prefix, sharded_offsets, metadata)
        return MegatronModule.sharded_state_dict(self, prefix, sharded_offsets, metadata)
