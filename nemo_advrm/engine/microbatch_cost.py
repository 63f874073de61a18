"""The fixed cost of a microbatch on this machine: on a GPU it is measured when a model is built.

A GPU waits for the host to start a microbatch's kernels, however small they are. How many tokens it could have
computed meanwhile depends on the model, its layout, the GPU and the processor that starts the kernels.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable

import torch
import torch.distributed as dist

from nemo_advrm.engine import runtime
from nemo_advrm.engine.microbatches import filler, microbatch_limit, scored_microbatch
from nemo_advrm.engine.model import MegatronModel
from nemo_advrm.engine.schedule import forward

_log = logging.getLogger(__name__)

LEAST, MOST = 128, 65_536
_LONGEST = 1024  # tokens of a measured row: attention to more would count as a cost of tokens


def measure(model: MegatronModel, seconds_of: Callable[[MegatronModel, int, int], float] | None = None) -> int:
    """Seconds of a microbatch without tokens over the seconds of a token: a power of two from LEAST to MOST.

    All ranks call and get the same number. Two sizes are measured: the smallest microbatch, and the largest that the
    model's limits allow. The passes are forward passes, because backward passes would leave gradients; both have about
    the same ratio. The random generators, which only dropout uses, are not advanced.

    Args:
        seconds_of: (model, rows, tokens per row) -> seconds of one forward pass.
    """
    seconds_of = seconds_of or _seconds_of
    limit = microbatch_limit(model)
    length = min(model.model_config.encoder_seq_length, limit, _LONGEST)
    rows = max(1, limit // length)
    smallest = filler(model).tokens_BS.size(1)
    cost = _ratio((smallest, seconds_of(model, 1, smallest)), (rows * length, seconds_of(model, rows, length)))
    if dist.get_world_size() > 1:  # ranks that cut rows differently would wait for each other for ever
        most = torch.tensor(cost, device=runtime.current().device)
        dist.all_reduce(most, op=dist.ReduceOp.MAX)
        cost = int(most)
    if runtime.current().is_writer:
        _log.info("a microbatch costs as much as %d tokens", cost)
    return cost


def _ratio(small: tuple[int, float], large: tuple[int, float]) -> int:
    """Intercept over slope of the line through two points (tokens, seconds), rounded and bounded."""
    (tokens, seconds), (more_tokens, more_seconds) = small, large
    slope = (more_seconds - seconds) / max(1, more_tokens - tokens)
    if slope <= 0:  # even the largest microbatch only waits for the host
        return MOST
    cost = max(seconds / slope - tokens, LEAST)
    return int(min(2 ** round(math.log2(cost)), MOST))


def _seconds_of(model: MegatronModel, rows: int, length: int) -> float:
    """The least of three passes over ``rows`` rows of ``length`` tokens, after one that compiles kernels."""
    vocabulary = model.model_config.vocab_size or model.vocab_size
    tokens = [[(row + place) % vocabulary for place in range(length)] for row in range(rows)]
    microbatch = scored_microbatch(model, tokens, 0)
    if model.head != "reward":  # one output a row here too, so that layers are measured and not the output layer
        predict_BS = torch.zeros_like(microbatch.tokens_BS, dtype=torch.bool)
        predict_BS[:, -1] = True
        microbatch.forward = {"predict_BS": predict_BS}
    seconds = []
    for _ in range(4):
        _wait()
        start = time.perf_counter()
        forward(model, [microbatch], lambda output, _: None)
        _wait()
        seconds.append(time.perf_counter() - start)
    return min(seconds[1:])


def _wait() -> None:
    if runtime.current().on_gpu:
        torch.cuda.synchronize()
