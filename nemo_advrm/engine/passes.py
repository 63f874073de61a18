"""Passes with a key/value cache: over the prompts of a batch, over one new token of every row."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor

from nemo_advrm.engine import runtime
from nemo_advrm.engine.gpt import HeadedGPT
from nemo_advrm.engine.kv_cache import KVCache
from nemo_advrm.engine.model import MegatronModel
from nemo_advrm.engine.stages import Pass, Stages
from nemo_advrm.engine.step_graphs import StepGraphs
from nemo_advrm.engine.varlen import CachedLengths


def prompt_passes(
    model: MegatronModel, tokens_BS: Tensor, lengths_B: Tensor, cache: KVCache, take: Callable[[Tensor], None]
) -> Iterator[Pass]:
    """Passes that fill the cache with prompts of ascending lengths; ``take`` gets logits [rows, V] of each.

    A pass holds at most ``micro_batch_tokens`` tokens. Passes that hold only rows of similar length were rejected: they
    saved 4 % of the CPU time of ``make run``. Their effect on a GPU was not measured.
    """
    cache.begin(lengths_B)
    lengths, limit = lengths_B.tolist(), model.model_config.micro_batch_tokens
    start = 0
    while start < len(lengths):
        stop = start + 1
        while stop < len(lengths) and (stop + 1 - start) * lengths[stop] <= limit:
            stop += 1
        rows, width = slice(start, stop), lengths[stop - 1]
        positions = torch.arange(width, device=tokens_BS.device).expand(stop - start, width)
        run = partial(
            _run,
            tokens_BS=tokens_BS[rows, :width],
            positions_BS=positions,
            read_at_B=lengths_B[rows] - 1,
            mask=None,
            cache=cache,
            cache_rows=rows,
        )
        yield Pass(stop - start, width, run, take)
        start = stop


def token_pass(tokens_B: Tensor, cache: KVCache, graphs: StepGraphs | None, take: Callable[[Tensor], None]) -> Pass:
    """The pass that appends a token to every row; ``take`` gets the logits [B, V] of the next ones."""
    rows = tokens_B.numel()

    def run(part: HeadedGPT, hidden: Tensor | None) -> Tensor:
        def on_tensors(tokens_B: Tensor, hidden: Tensor | None = None) -> Tensor:
            # all else that differs between two steps is made of the cache's lengths here, where a graph records it
            lengths_B = cache.lengths_B
            read_at_B = torch.zeros_like(lengths_B)
            return _run(part, hidden, tokens_B[:, None], lengths_B[:, None], read_at_B, cache.seen(), cache)

        inputs = (tokens_B,) if hidden is None else (tokens_B, hidden)
        if graphs is None:
            return on_tensors(*inputs)
        return graphs((id(part), id(cache), rows, cache.attended), on_tensors, *inputs)

    return Pass(rows, 1, run, take)


def _run(
    part: HeadedGPT,
    hidden: Tensor | None,
    tokens_BS: Tensor,
    positions_BS: Tensor,
    read_at_B: Tensor,
    mask: Tensor | CachedLengths | None,
    cache: KVCache,
    cache_rows: slice | None = None,
) -> Tensor:
    """Output of one chunk of the model, whose input is ``hidden`` unless it is the first."""
    if cache_rows is not None:
        cache.prefill_rows(cache_rows)
    part.set_input_tensor(hidden)
    output = part(tokens_BS, positions_BS, mask, read_at_B=read_at_B, inference_context=cache, gather_logits=True)
    part.set_input_tensor(None)
    return output


def accompany(stages: Stages) -> None:
    """Make passes over one token while ranks that share experts with this one go on; called when its own are made.

    A pass exchanges tokens with all ranks that share experts, whatever each of them passes.
    """
    rt = runtime.current()
    if not rt.layout.experts_span_rows:
        return
    token_BS = torch.zeros(1, 1, dtype=torch.int64, device=rt.device)
    cache = KVCache(1, 1, rt.device)
    cache.begin(torch.ones(1, dtype=torch.int64, device=rt.device))
    run = partial(_run, tokens_BS=token_BS, positions_BS=token_BS, read_at_B=token_BS[0], mask=None, cache=cache)
    while rt.any_with_rows(False):
        stages.make([Pass(1, 1, run, take=lambda logits: None)], announced=False)
