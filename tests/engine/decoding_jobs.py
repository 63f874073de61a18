"""Generation by steps of repeating shapes, as on a GPU, beside that of a CPU; on all ranks of a layout."""

from __future__ import annotations

import contextlib
import itertools
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any
from unittest.mock import patch

import torch
import torch.nn.functional as F
from tiny import TOKENIZER, sequences, tiny_config
from torch import Tensor

from nemo_advrm.engine import generation, row_group, runtime, torch_compat
from nemo_advrm.engine.builders import build_policy
from nemo_advrm.engine.generation import generate, uniforms
from nemo_advrm.engine.model import MegatronModel
from nemo_advrm.engine.sampling import Sampling
from nemo_advrm.engine.stages import Pass
from nemo_advrm.engine.step_graphs import StepGraphs, all_tensor_parallel_ranks
from nemo_advrm.engine.step_shapes import StepShapes
from nemo_advrm.engine.written import Written


class RecordedGraph:
    """Stands for a CUDA graph: a replay works on what is now in the tensors of the capture, and writes to one of it."""

    def __init__(self) -> None:
        self.replays = 0

    def capture(self, work: Callable[[], Tensor]) -> Tensor:
        self._work = work
        self.output = torch.full_like(work(), torch.nan)  # a capture computes nothing
        return self.output

    def replay(self) -> None:
        self.replays += 1
        self.output.copy_(self._work())


class FailedGraph(RecordedGraph):
    def capture(self, work: Callable[[], Tensor]) -> Tensor:
        super().capture(work)  # with the collectives that the other ranks take part in
        raise RuntimeError("operation not permitted when stream is capturing")


def lengths_kernel(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seq_q: Tensor,
    cu_seq_k: Tensor,
    max_q: int,
    max_k: int,
    *,
    scale: float | None = None,
    window_size: tuple[int, int] = (-1, -1),
    enable_gqa: bool = False,
    seqused_k: Tensor | None = None,
) -> Tensor:
    """PyTorch's ``varlen_attn`` by its documentation for one query of each sequence, one after the other."""
    assert seqused_k is not None and {t.dtype for t in (cu_seq_q, cu_seq_k, seqused_k)} == {torch.int32}
    assert key.is_contiguous() and value.is_contiguous()  # what the cache holds, and no copy of it
    assert max_q == 1 and cu_seq_q.tolist() == list(range(query.size(0) + 1)) and enable_gqa
    assert cu_seq_k.diff().tolist() == [max_k] * seqused_k.numel() and int(seqused_k.max()) <= max_k
    results = []
    for row, (start, seen) in enumerate(zip(cu_seq_k.tolist(), seqused_k.tolist(), strict=False)):
        first = max(0, seen - 1 - window_size[0]) if window_size[0] >= 0 else 0
        k, v = (t[start + first : start + seen].transpose(0, 1)[None] for t in (key, value))
        results.append(F.scaled_dot_product_attention(query[row][None, :, None], k, v, scale=scale, enable_gqa=True))
    return torch.cat(results)[:, :, 0]


@dataclass
class Made:
    """What was generated, and how.

    Attributes:
        log_probs: of every token by group of rows, row of the group and place; empty before the last stage.
        steps: shapes (rows, attended positions) of every step.
        replays: of each graph.
        given_up: why, each time that steps are not captured any more.
    """

    responses: list[list[int]] = field(default_factory=list)
    ended: list[bool] = field(default_factory=list)
    log_probs: dict[tuple[int, int, int], float] = field(default_factory=dict)
    steps: list[tuple[int, int]] = field(default_factory=list)
    replays: list[int] = field(default_factory=list)
    given_up: list[str] = field(default_factory=list)


@contextlib.contextmanager
def _watched(made: Made) -> Iterator[None]:
    logits: deque[Tensor] = deque()
    numbers = itertools.count()

    def pick(logits_BV: Tensor, *args: Any) -> Tensor:
        logits.append(logits_BV.clone())  # a replay for the next group may write there before the token is added
        return picked(logits_BV, *args)

    class Watched(Written):
        def __init__(self, *args: Any) -> None:
            super().__init__(*args)
            self.number = next(numbers)

        def add(self, t: int, picked_B: Tensor) -> None:
            if logits:  # groups write in the order in which they picked
                log_probs_B = torch.log_softmax(logits.popleft().float(), -1).gather(-1, picked_B[:, None])[:, 0]
                rows = zip(self.rows_B.tolist(), self._running_B.tolist(), log_probs_B.tolist(), strict=True)
                made.log_probs.update({(self.number, row, t): value for row, runs, value in rows if runs})
            super().add(t, picked_B)

    def token_pass(tokens_B: Tensor, cache: Any, *args: Any) -> Pass:
        made.steps.append((tokens_B.numel(), cache.attended))
        return passed(tokens_B, cache, *args)

    picked, passed = row_group.pick, row_group.token_pass
    with (
        patch.object(row_group, "pick", pick),
        patch.object(row_group, "Written", Watched),
        patch.object(row_group, "token_pass", token_pass),
    ):
        yield


@contextlib.contextmanager
def as_on_a_gpu(
    shapes: StepShapes, made: Made, fails_on: int | None = None, by_lengths: bool = False
) -> Iterator[None]:
    """Steps of ``shapes``, recorded as graphs; recording fails on rank ``fails_on``.

    With ``by_lengths``, attention to the cache is by :func:`lengths_kernel`.
    """
    graphs: list[RecordedGraph] = []

    def new_graph() -> RecordedGraph:
        graphs.append(FailedGraph() if runtime.current().rank == fails_on else RecordedGraph())
        return graphs[-1]

    def step_graphs(model: MegatronModel, wanted: str, read: Callable[[], Iterable[Tensor]]) -> StepGraphs:
        return StepGraphs(new_graph, read, made.given_up.append, all_tensor_parallel_ranks)

    with (
        patch.object(generation, "step_shapes", lambda rt: shapes),
        patch.object(generation, "step_graphs", step_graphs),
        patch.object(generation, "reason_against_lengths", lambda *_: "" if by_lengths else "no kernel"),
        patch.object(torch_compat, "varlen_kernel", lambda: lengths_kernel),
    ):
        yield
    made.replays = [graph.replays for graph in graphs]


def both_ways(
    architecture: str,
    model: dict[str, Any],
    sampling: Sampling,
    shapes: StepShapes,
    fails_on: int | None = None,
    by_lengths: bool = False,
) -> tuple[Made, Made]:
    """Responses to 12 prompts in batches of 5 as on a CPU, and as on a GPU."""
    cfg = tiny_config(architecture, runtime.current().layout, **model)
    policy = build_policy(cfg, TOKENIZER, "", 2, trainable=False)
    prompts = sequences(12, seed=5, longest=9)
    numbers = uniforms(7, len(prompts), sampling.max_new_tokens)
    results = Made(), Made()
    for made in results:
        gpu = as_on_a_gpu(shapes, made, fails_on, by_lengths) if made is results[1] else contextlib.nullcontext()
        with _watched(made), gpu:
            found = generate(policy, prompts, sampling, numbers, max_rows=5)
        made.responses, made.ended = found.responses, found.ended
    return results
