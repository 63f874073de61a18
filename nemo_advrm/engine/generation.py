"""Generates responses with a key/value cache under tensor and pipeline parallelism.

Context-parallel ranks generate for different prompts, because one new token per row cannot be split over ranks. The
rows of a batch are divided into groups, of which every pipeline stage has another in work: a row's next token needs
all stages, one after the other.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from torch import Tensor

from nemo_advrm.data.batching import pad_rows
from nemo_advrm.engine import runtime
from nemo_advrm.engine.decoding import decoding
from nemo_advrm.engine.generation_rows import groups_in_flight
from nemo_advrm.engine.kv_cache import KVCache
from nemo_advrm.engine.model import MegatronModel
from nemo_advrm.engine.passes import accompany, prompt_passes
from nemo_advrm.engine.row_group import RowGroup
from nemo_advrm.engine.sampling import Sampling
from nemo_advrm.engine.stages import Pass, Stages
from nemo_advrm.engine.step_graphs import all_tensor_parallel_ranks, step_graphs
from nemo_advrm.engine.step_shapes import step_shapes
from nemo_advrm.engine.varlen import reason_against_lengths
from nemo_advrm.errors import ConfigError


@dataclass(frozen=True)
class Generation:
    """Responses in the order of their prompts.

    ``ended`` is False for a response that reached the length limit. Otherwise its last token is the stop token.
    ``log_probs`` are those of its tokens under the policy that wrote them, in nats, where that is not the model here:
    NaN where it does not tell them, None where no other policy wrote.
    """

    responses: list[list[int]]
    ended: list[bool]
    log_probs: list[list[float]] | None = None


def uniforms(seed: int, rows: int, tokens: int) -> Tensor:
    """[rows, tokens] random numbers in [0, 1). Row i depends on ``seed`` and i only, not on ``rows``."""
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(rows, tokens, generator=generator)


@torch.no_grad()
def generate(
    model: MegatronModel,
    prompts: list[list[int]],
    sampling: Sampling,
    uniforms_BT: Tensor,
    max_rows: int = 0,
    graphs: str = "auto",
) -> Generation:
    """Generate a response to every prompt. All ranks of a replica call with the same prompts and get the same result.

    Every replica must call, even without prompts, because weights may have to be gathered. Apart from that only
    replicas that share experts communicate (there is no FP8 here): each other makes only the passes that its own
    responses need.

    Args:
        prompts: token ids, none empty; lengths may differ.
        uniforms_BT: [len(prompts), max_new_tokens] (see :func:`uniforms`); not used if greedy.
        max_rows: largest batch; 0 means all rows. Rows of similar length share a batch.
        graphs: ``rl.decoding_graphs``.

    Raises:
        ConfigError: a prompt is empty, prompt plus response exceed the model's context, or graphs are wanted always
            and cannot be had.
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
    most = max_rows or len(own) or 1
    made: dict[int, tuple[list[int], bool]] = {}
    rt = runtime.current()
    longest = max((len(prompts[i]) for i in own), default=0) + sampling.max_new_tokens
    shapes = step_shapes(rt)
    # of the first batch, which is the largest
    largest = min(most, len(own))
    count = groups_in_flight(largest)
    # ranks whose collectives are captured need peers that take the same steps
    by_lengths = all_tensor_parallel_ranks(
        not reason_against_lengths(model.model_config, model.config.params_dtype, rt.on_gpu)
    )
    caches = [
        KVCache(len(range(i, largest, count)), longest, rt.device, shapes.block, by_lengths) for i in range(count)
    ]
    stages = Stages(model)
    with model.resident(), decoding(model.parts):
        captured = step_graphs(model, graphs, lambda: [tensor for cache in caches for tensor in cache.tensors()])
        for start in range(0, len(own), most):
            batch = own[start : start + most]
            # ascending by length; interleaved, because the stages wait for the slowest group
            divided = [batch[i::count] for i in range(min(count, len(batch)))]
            groups = [
                RowGroup(stages, [prompts[i] for i in rows], sampling, uniforms_BT[rows], cache, captured, shapes)
                for rows, cache in zip(divided, caches, strict=False)
            ]
            _write(model, stages, groups, sampling.max_new_tokens)
            for rows, group in zip(divided, groups, strict=True):
                made.update(zip(rows, zip(*group.responses(), strict=True), strict=True))
        accompany(stages)
        stages.finish()
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
    most = max_rows or len(rows) or 1
    cache = KVCache(min(most, len(rows)), max(map(len, rows), default=0), rt.device)
    stages = Stages(model)
    with model.resident(), decoding(model.parts):
        for start in range(0, len(order), most):
            own = order[start : start + most]
            tokens_BS, lengths_B = (tensor.to(rt.device) for tensor in pad_rows([rows[i] for i in own], pad_id=0))
            logits: list[Tensor] = []
            stages.make_many(prompt_passes(model, tokens_BS, lengths_B, cache, logits.append))
            log_probs_BK = torch.zeros(len(own), count, device=rt.device)
            ids_BK = torch.zeros(len(own), count, dtype=torch.int64, device=rt.device)
            if logits:
                log_probs_BK, ids_BK = torch.log_softmax(torch.cat(logits).float(), -1).topk(count)
            log_probs_NK[own] = rt.broadcast_from_last_stage(log_probs_BK).cpu()
            ids_NK[own] = rt.broadcast_from_last_stage(ids_BK).cpu()
        accompany(stages)
        stages.finish()
    return ids_NK, log_probs_NK


def _write(model: MegatronModel, stages: Stages, groups: list[RowGroup], tokens: int) -> None:
    """Write the responses of a batch, token by token, the groups in turn."""

    def passes_after(t: int) -> Iterator[Pass]:
        for group in groups:
            following = group.pass_after(t)
            if following is not None:
                yield following

    stages.make_many(chain.from_iterable(group.prompt_passes(model) for group in groups))
    for group in groups:
        group.pick_first()
    for t in range(tokens):
        if not stages.make(passes_after(t)):
            break
