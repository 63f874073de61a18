"""Passes of a batch through all stages with a key/value cache: over its prompts, over one new token of every row."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from torch import Tensor

from nemo_advrm.engine import runtime, throughput
from nemo_advrm.engine.gpt import HeadedGPT
from nemo_advrm.engine.kv_cache import KVCache
from nemo_advrm.engine.model import MegatronModel
from nemo_advrm.engine.step_graphs import StepGraphs


def prefill(model: MegatronModel, tokens_BS: Tensor, lengths_B: Tensor, cache: KVCache) -> Tensor | None:
    """Fill the cache with prompts of ascending lengths; returns what :func:`step` returns.

    A pass holds at most ``micro_batch_tokens`` tokens. Passes that hold only rows of similar length were rejected: they
    saved 4 % of the CPU time of ``make run``. Their effect on a GPU was not measured.
    """
    cache.begin(lengths_B)
    lengths, limit = lengths_B.tolist(), model.model_config.micro_batch_tokens
    parts = []
    start = 0
    while start < len(lengths):
        stop = start + 1
        while stop < len(lengths) and (stop + 1 - start) * lengths[stop] <= limit:
            stop += 1
        rows, width = slice(start, stop), lengths[stop - 1]
        cache.prefill_rows(start, stop)
        positions = torch.arange(width, device=tokens_BS.device).expand(stop - start, width)

        run = partial(
            _run,
            tokens_BS=tokens_BS[rows, :width],
            positions_BS=positions,
            read_at_B=lengths_B[rows] - 1,
            mask=None,
            cache=cache,
        )
        parts.append(_through_stages(model, stop - start, width, run))
        start = stop
    logits = [part for part in parts if part is not None]
    return torch.cat(logits) if logits else None


def step(model: MegatronModel, tokens_B: Tensor, cache: KVCache, graphs: StepGraphs | None = None) -> Tensor | None:
    """Append a token to every row.

    Returns:
        [B, V] logits of the next one on the last stage, None on the others. With ``graphs`` the next step writes to
        the same tensor.
    """
    rows = tokens_B.numel()

    def run(part: HeadedGPT, hidden: Tensor | None) -> Tensor:
        def on_tensors(tokens_B: Tensor, hidden: Tensor | None = None) -> Tensor:
            # all else that differs between two steps is made of the cache's lengths here, where a graph records it
            lengths_B = cache.lengths_B
            read_at_B = torch.zeros_like(lengths_B)
            return _run(part, hidden, tokens_B[:, None], lengths_B[:, None], read_at_B, cache.hidden_mask(), cache)

        inputs = (tokens_B,) if hidden is None else (tokens_B, hidden)
        if graphs is None:
            return on_tensors(*inputs)
        return graphs((id(part), rows, cache.attended), on_tensors, *inputs)

    logits = _through_stages(model, rows, 1, run)
    cache.advance()
    return logits


def _run(
    part: HeadedGPT,
    hidden: Tensor | None,
    tokens_BS: Tensor,
    positions_BS: Tensor,
    read_at_B: Tensor,
    mask: Tensor | None,
    cache: KVCache,
) -> Tensor:
    """Output of one chunk of the model, whose input is ``hidden`` unless it is the first."""
    part.set_input_tensor(hidden)
    output = part(tokens_BS, positions_BS, mask, read_at_B=read_at_B, inference_context=cache, gather_logits=True)
    part.set_input_tensor(None)
    return output


def accompany(model: MegatronModel) -> None:
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
        _through_stages(model, 1, 1, run, announced=False)


def _through_stages(
    model: MegatronModel,
    rows: int,
    length: int,
    run: Callable[[HeadedGPT, Tensor | None], Tensor],
    announced: bool = True,
) -> Tensor | None:
    """One pass through all stages and chunks: the output of the last chunk on the last stage, None on the others."""
    rt = runtime.current()
    if announced and rt.layout.experts_span_rows:
        rt.any_with_rows(True)
    # not context-parallel ranks: each has its own rows
    ranks = rt.layout.tensor * rt.layout.pipeline
    throughput.count_pass(model, [length] * rows, rows, ranks)
    group = parallel_state.get_pipeline_model_parallel_group() if rt.layout.pipeline > 1 else None
    result = None
    for part in model.parts:
        hidden = None
        if not part.pre_process:
            hidden = torch.empty(
                length, rows, model.config.hidden_size, dtype=model.config.params_dtype, device=rt.device
            )
            dist.recv(hidden, parallel_state.get_pipeline_model_parallel_prev_rank(), group=group)
        output = run(part, hidden)
        if part.post_process:
            result = output
        else:
            dist.send(output.contiguous(), parallel_state.get_pipeline_model_parallel_next_rank(), group=group)
    return result
