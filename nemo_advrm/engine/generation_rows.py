"""How many rows to generate at once, as many as asked for or as a GPU has room for, and in how many groups."""

from __future__ import annotations

import torch
import torch.distributed as dist

from nemo_advrm.engine import runtime
from nemo_advrm.engine.generation_memory import cache_bytes_per_token, logits_bytes_per_row, rows_that_fit
from nemo_advrm.engine.model import MegatronModel


def rows_at_once(model: MegatronModel, longest: int, asked: int = 0) -> int:
    """Rows of a batch of generation, the same on all ranks of the replica, which all call.

    Args:
        longest: tokens of the longest row, prompt and response.
        asked: ``rl.generation_batch_size``; 0 is as many as the free memory of each of the replica's GPUs has room
            for, and 4 x micro_batch_size on a CPU.
    """
    rt = runtime.current()
    if asked:
        return asked
    if not rt.on_gpu:
        return 4 * model.model_config.micro_batch_size
    rows = rows_that_fit(bytes_per_row(model, longest), _free_bytes(model, rt.device))
    if rt.layout.model_parallel > 1:
        least = torch.tensor(rows, device=rt.device)
        dist.all_reduce(least, op=dist.ReduceOp.MIN, group=rt.replica)
        rows = int(least)
    return rows


def groups_in_flight(rows: int) -> int:
    """How many groups a batch of ``rows`` rows is divided into: one for each pipeline stage, as far as rows go."""
    return min(rows, runtime.current().layout.pipeline)


def bytes_per_row(model: MegatronModel, longest: int) -> int:
    """Bytes of this rank's cache of ``longest`` tokens, and on the last stage of what sampling makes of the logits."""
    config = model.config
    layers = sum(len(part.decoder.layers) for part in model.parts)
    groups = max(1, config.num_query_groups // config.tensor_model_parallel_size)
    cache = longest * cache_bytes_per_token(layers, groups * config.kv_channels, config.params_dtype.itemsize)
    has_logits = any(part.post_process for part in model.parts)
    return cache + has_logits * logits_bytes_per_row(model.vocab_size)


def _free_bytes(model: MegatronModel, device: torch.device) -> int:
    """Bytes that PyTorch can still hand out, less the weights that have yet to come (see MegatronModel.resident)."""
    free, _ = torch.cuda.mem_get_info(device)
    unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    waiting = sum(p.nbytes for part in model.parts for p in part.parameters() if p.device != device)
    return max(0, free + unused - waiting)
