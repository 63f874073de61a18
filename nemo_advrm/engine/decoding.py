"""Switches off, while a model generates, what cannot process one new token per row."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from nemo_advrm.engine.attention import CachedSelfAttention, FusedCoreAttention

_SEQUENCE_PARALLEL_SWITCHES = ("sequence_parallel", "scatter_to_sequence_parallel", "reduce_scatter_embeddings")


@contextlib.contextmanager
def decoding(parts: list[Any]) -> Iterator[None]:
    """Inside, the chunks of one model process whole batches of single tokens, each rank by itself.

    Off are sequence and context parallelism (one token per row cannot be split over ranks), FP8 (its products need more
    than one token per row; bf16 takes its place), and the fused rotation (its kernel uses the same angles for all rows,
    but rows of a cache differ). Our attention takes the place of Transformer Engine's, which would compute the masks of
    rows of unequal lengths by an unfused path.

    Args:
        parts: the chunks, which share their configuration.
    """
    config = parts[0].config
    modules = [module for part in parts for module in part.modules()]
    with contextlib.ExitStack() as stack:

        def switch(owner: Any, name: str, value: Any) -> None:
            stack.callback(setattr, owner, name, getattr(owner, name))
            setattr(owner, name, value)

        switch(config, "fp8", None)
        switch(config, "apply_rope_fusion", False)
        if config.sequence_parallel:
            for owner in (config, *modules):
                for name in _SEQUENCE_PARALLEL_SWITCHES:
                    if getattr(owner, name, False) is True:
                        switch(owner, name, False)
        if config.context_parallel_size > 1:
            switch(config, "context_parallel_size", 1)
            for module in modules:
                # Transformer Engine's attention keeps the group that it was constructed with; of Megatron's modules
                # only those that are Transformer Engine's have this method, in every version
                if hasattr(module, "set_context_parallel_group"):
                    group = (module.cp_group, module.cp_global_ranks, module.cp_stream, module.cp_comm_type)
                    stack.callback(module.set_context_parallel_group, *group)
                    module.set_context_parallel_group(None, None, None, module.cp_comm_type)
        for module in modules:
            if isinstance(module, CachedSelfAttention) and not isinstance(module.core_attention, FusedCoreAttention):
                switch(module, "core_attention", _our_attention(module))
        yield


def _our_attention(layer: CachedSelfAttention) -> FusedCoreAttention:
    """What the layer would have without Transformer Engine; where that has soft-caps or windows it has it anyway."""
    config = layer.config
    core = FusedCoreAttention(
        config, layer.layer_number, layer.attn_mask_type, layer.attention_type, softmax_scale=config.softmax_scale
    )
    return core.eval()
