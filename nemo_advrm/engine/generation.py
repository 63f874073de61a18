"""Generates responses with a key/value cache under tensor and pipeline parallelism.

Context-parallel ranks generate for different prompts, because one new token per row cannot be split over ranks.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from torch import Tensor

from nemo_advrm.data.batching import pad_rows
from nemo_advrm.engine import runtime, throughput
from nemo_advrm.engine.decoding import decoding
from nemo_advrm.engine.kv_cache import KVCache
from nemo_advrm.engine.model import MegatronModel
from nemo_advrm.engine.sampling import Sampling, pick
from nemo_advrm.engine.written import Written
from nemo_advrm.errors import ConfigError

# drop finished rows once they are this share of the batch: copying the cache costs about as much as one step
_DROP_SHARE = 0.25

# tokens between two looks at which rows have ended, on a GPU (see Written)
_LOOK_EVERY = 8


@dataclass(frozen=True)
class Generation:
    """Responses in the order of their prompts.

    ``ended`` is False for a response that reached the length limit. Otherwise its last token is the stop token.
    """

    responses: list[list[int]]
    ended: list[bool]


def uniforms(seed: int, rows: int, tokens: int) -> Tensor:
    """[rows, tokens] random numbers in [0, 1). Row i depends on ``seed`` and i only, not on ``rows``."""
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(rows, tokens, generator=generator)


@torch.no_grad()
def generate(
    model: MegatronModel, prompts: list[list[int]], sampling: Sampling, uniforms_BT: Tensor, max_rows: int = 0
) -> Generation:
    """Generate a response to every prompt. All ranks of a replica call with the same prompts and get the same result.

    Every replica must call, even without prompts, because weights may have to be gathered. Apart from that replicas do
    not communicate (there is no FP8 here), so each makes only the passes that its own responses need.

    Args:
        prompts: token ids, none empty; lengths may differ.
        uniforms_BT: [len(prompts), max_new_tokens] (see :func:`uniforms`); not used if greedy.
        max_rows: largest batch; 0 means all rows. Rows of similar length share a batch.

    Raises:
        ConfigError: a prompt is empty, or prompt plus response exceed the model's context.
    """
    limit = model.model_config.encoder_seq_length
    for i, prompt in enumerate(prompts):
        if not prompt:
            raise ConfigError(f"prompt {i} is empty")
        if len(prompt) + sampling.max_new_tokens > limit:
            raise ConfigError(
                f"prompt {i} has {len(prompt)} tokens; with rl.max_new_tokens={sampling.max_new_tokens} that exceeds "
                f"model.encoder_seq_length={limit}"
            )
    model.gather_parameters()
    model.eval()
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    # context-parallel ranks take different rows, interleaved by length for equal work
    ranks = parallel_state.get_context_parallel_world_size()
    own = order[parallel_state.get_context_parallel_rank() :: ranks]
    step = max_rows or len(own) or 1
    made: dict[int, tuple[list[int], bool]] = {}
    with model.resident(), decoding(model.parts):
        for start in range(0, len(own), step):
            rows = own[start : start + step]
            tokens, ended = _generate_batch(model, [prompts[i] for i in rows], sampling, uniforms_BT[rows])
            made.update(zip(rows, zip(tokens, ended, strict=True), strict=True))
    if ranks > 1:
        parts: list[dict[int, tuple[list[int], bool]]] = [{} for _ in range(ranks)]
        dist.all_gather_object(parts, made, group=parallel_state.get_context_parallel_group())
        made = {row: answer for part in parts for row, answer in part.items()}
    answers = [made[i] for i in range(len(prompts))]
    return Generation([tokens for tokens, _ in answers], [ended for _, ended in answers])


@torch.no_grad()
def likeliest_tokens(
    model: MegatronModel, rows: list[list[int]], count: int, max_rows: int = 0
) -> tuple[Tensor, Tensor]:
    """The ``count`` likeliest next tokens after each row, by falling probability; all ranks of a replica call.

    Every replica must call, even without rows (see :func:`generate`).

    Args:
        rows: token ids, none empty; lengths may differ.
        max_rows: largest batch; 0 means all rows.

    Returns:
        [N, count] int64 token ids, and their log-probabilities in nats, [N, count] fp32; on the CPU. That of a banned
        token is about -1e9.

    Raises ConfigError for a row that is empty or longer than the model's context.
    """
    limit = model.model_config.encoder_seq_length
    for i, row in enumerate(rows):
        if not 0 < len(row) <= limit:
            raise ConfigError(f"row {i} has {len(row)} tokens, the model takes 1 to model.encoder_seq_length={limit}")
    model.gather_parameters()
    model.eval()
    rt = runtime.current()
    order = sorted(range(len(rows)), key=lambda i: len(rows[i]))
    ids_NK, log_probs_NK = torch.zeros(len(rows), count, dtype=torch.int64), torch.zeros(len(rows), count)
    step = max_rows or len(rows) or 1
    with model.resident(), decoding(model.parts):
        for start in range(0, len(order), step):
            own = order[start : start + step]
            tokens_BS, lengths_B = (tensor.to(rt.device) for tensor in pad_rows([rows[i] for i in own], pad_id=0))
            logits = _prefill(model, tokens_BS, lengths_B, KVCache(lengths_B, tokens_BS.size(1)))
            log_probs_BK = torch.zeros(len(own), count, device=rt.device)
            ids_BK = torch.zeros(len(own), count, dtype=torch.int64, device=rt.device)
            if logits is not None:
                log_probs_BK, ids_BK = torch.log_softmax(logits.float(), -1).topk(count)
            log_probs_NK[own] = rt.broadcast_from_last_stage(log_probs_BK).cpu()
            ids_NK[own] = rt.broadcast_from_last_stage(ids_BK).cpu()
    return ids_NK, log_probs_NK


def _generate_batch(
    model: MegatronModel, prompts: list[list[int]], sampling: Sampling, uniforms_BT: Tensor
) -> tuple[list[list[int]], list[bool]]:
    rt = runtime.current()
    tokens_BS, lengths_B = (tensor.to(rt.device) for tensor in pad_rows(prompts, pad_id=0))
    uniforms_BT = uniforms_BT.to(rt.device)
    cache = KVCache(lengths_B, tokens_BS.size(1) + sampling.max_new_tokens)
    written = Written(len(prompts), sampling, rt.device, _LOOK_EVERY if rt.on_gpu else 1)

    logits = _prefill(model, tokens_BS, lengths_B, cache)
    cache.start_decoding()
    for t in range(sampling.max_new_tokens):
        rows_B = written.rows_B
        picked_B = torch.empty_like(rows_B) if logits is None else pick(logits, uniforms_BT[rows_B, t], sampling)
        picked_B = rt.broadcast_from_last_stage(picked_B)
        written.add(t, picked_B)
        if t + 1 == sampling.max_new_tokens:
            break
        running = written.running(t)
        if running is not None:
            if not running.numel():
                break
            if running.numel() <= rows_B.numel() * (1 - _DROP_SHARE):
                cache.keep_rows(running)
                running = running.to(rt.device)
                written.keep_rows(running)
                picked_B = picked_B[running]
        positions = cache.lengths_B[:, None]
        read_at = torch.zeros_like(cache.lengths_B)
        logits = _call_pipeline(model, picked_B[:, None], positions, read_at, cache.hidden_mask(), cache)
        cache.advance()
    return written.responses()


def _prefill(model: MegatronModel, tokens_BS: Tensor, lengths_B: Tensor, cache: KVCache) -> Tensor | None:
    """Fill the cache with prompts of ascending lengths; returns what :func:`_call_pipeline` returns.

    A pass holds at most ``micro_batch_tokens`` tokens. Passes that hold only rows of similar length were rejected: they
    saved 4 % of the CPU time of ``make run``. Their effect on a GPU was not measured.
    """
    lengths, limit = lengths_B.tolist(), model.model_config.micro_batch_tokens
    parts = []
    start = 0
    while start < len(lengths):
        stop = start + 1
        while stop < len(lengths) and (stop + 1 - start) * lengths[stop] <= limit:
            stop += 1
        width = lengths[stop - 1]
        cache.prefill_rows(start, stop)
        positions = torch.arange(width, device=tokens_BS.device).expand(stop - start, width)
        read_at_B = lengths_B[start:stop] - 1
        parts.append(_call_pipeline(model, tokens_BS[start:stop, :width], positions, read_at_B, None, cache))
        start = stop
    logits = [part for part in parts if part is not None]
    return torch.cat(logits) if logits else None


def _call_pipeline(
    model: MegatronModel,
    tokens_BS: Tensor,
    positions_BS: Tensor,
    read_at_B: Tensor,
    mask: Tensor | None,
    cache: KVCache,
) -> Tensor | None:
    """One pass through all stages and chunks; [B, V] logits on the last stage, None on the others."""
    rt = runtime.current()
    rows, length = tokens_BS.shape
    # not context-parallel ranks: each has its own rows
    ranks = rt.layout.tensor * rt.layout.pipeline
    throughput.count_pass(model, [length] * rows, rows, ranks)
    group = parallel_state.get_pipeline_model_parallel_group() if rt.layout.pipeline > 1 else None
    output = None
    for part in model.parts:
        if not part.pre_process:
            hidden = torch.empty(
                length, rows, model.config.hidden_size, dtype=model.config.params_dtype, device=rt.device
            )
            dist.recv(hidden, parallel_state.get_pipeline_model_parallel_prev_rank(), group=group)
            part.set_input_tensor(hidden)
        output = part(tokens_BS, positions_BS, mask, read_at_B=read_at_B, inference_context=cache, gather_logits=True)
        if not part.pre_process:
            part.set_input_tensor(None)
        if not part.post_process:
            dist.send(output.contiguous(), parallel_state.get_pipeline_model_parallel_next_rank(), group=group)
            output = None
    return output
