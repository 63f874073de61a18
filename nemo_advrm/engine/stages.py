"""The stages of a pipeline side by side: each sends on without waiting, and takes up what comes next."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from torch import Tensor

from nemo_advrm.engine import runtime, throughput
from nemo_advrm.engine.gpt import HeadedGPT
from nemo_advrm.engine.model import MegatronModel


@dataclass(frozen=True)
class Pass:
    """The way of some rows through all chunks of a model.

    Attributes:
        rows, length: shape of its tokens.
        run: output of a chunk, given its input; the first has none.
        take: called on the last stage with the output of the last chunk, which it may keep until the next pass.
    """

    rows: int
    length: int
    run: Callable[[HeadedGPT, Tensor | None], Tensor]
    take: Callable[[Tensor], None]


class Stages:
    """This rank's stage of the pipeline, while a model generates.

    All stages make the same passes in the same order, and a stage waits for nothing but its input. What it has sent is
    on its way while it makes the next pass, so as many stages work as there are passes that do not need each other's
    tokens. Every wait has the limit of the process groups (``trainer.timeout_minutes``).

    Messages to a later stage go through the pipeline's process group, those to an earlier one through that of all
    ranks, as in Megatron's schedules: NCCL takes the messages of a group between two ranks one after the other,
    whatever their direction, and each of two stages would wait for the other to receive.
    """

    def __init__(self, model: MegatronModel) -> None:
        self._model = model
        self._rt = runtime.current()
        self._group = parallel_state.get_pipeline_model_parallel_group()
        self._ranks = dist.get_process_group_ranks(self._group)
        self._own = dist.get_rank(self._group)
        self._sent: list[dist.Work] = []

    def make(self, passes: Iterable[Pass], announced: bool = True) -> None:
        """Make passes through all stages and chunks.

        Args:
            passes: a pass is asked for when this stage begins it, so what it needs may be on its way until then.
            announced: tell ranks that share experts with this one of each.
        """
        waiting = iter(passes)
        before: list[dist.Work] = []
        # in rounds, so that what is sent and not yet received has a bound
        while self._make_round(itertools.islice(waiting, len(self._ranks)), announced):
            _wait(before)
            before, self._sent = self._sent, []
        self._sent = before + self._sent

    def _make_round(self, passes: Iterable[Pass], announced: bool) -> bool:
        """Whether there were any."""
        experts_span_rows = self._rt.layout.experts_span_rows
        # ranks that share experts are in the same chunk at any time, and may have other numbers of passes
        first = len(self._model.parts) if experts_span_rows else 1
        # not context-parallel ranks: each has its own rows
        ranks = self._rt.layout.tensor * self._rt.layout.pipeline
        begun = []
        for each in passes:
            if announced and experts_span_rows:
                self._rt.any_with_rows(True)
            throughput.count_pass(self._model, [each.length] * each.rows, each.rows, ranks)
            begun.append(each)
            for part in self._model.parts[:first]:
                self._turn(part, each)
        for part in self._model.parts[first:]:
            for each in begun:
                self._turn(part, each)
        return bool(begun)

    def _turn(self, part: HeadedGPT, each: Pass) -> None:
        hidden = None
        if not part.pre_process:
            config = self._model.config
            shape = each.length, each.rows, config.hidden_size
            hidden = torch.empty(shape, dtype=config.params_dtype, device=self._rt.device)
            self._receive(hidden, (self._own - 1) % len(self._ranks))
        output = each.run(part, hidden)
        if part.post_process:
            each.take(output)
        else:
            # a copy, because the next replay of a graph may write over the output while it is being sent
            self._send(output.clone(memory_format=torch.contiguous_format), (self._own + 1) % len(self._ranks))

    def share_tokens(self, tokens_B: Tensor) -> None:
        """Send tokens from the last stage to all others, which ask for them by :meth:`shared_tokens`."""
        for stage in range(self._own):
            self._send(tokens_B, stage)

    def shared_tokens(self, rows: int) -> Tensor:
        """The next [rows] int64 tokens from the last stage; on the others."""
        tokens_B = torch.empty(rows, dtype=torch.int64, device=self._rt.device)
        self._receive(tokens_B, len(self._ranks) - 1)
        return tokens_B

    def finish(self) -> None:
        """Wait until all that was sent has gone; called when no pass is left."""
        _wait(self._sent)
        self._sent = []

    def _send(self, tensor: Tensor, stage: int) -> None:
        group = self._group if stage > self._own else None
        work = dist.isend(tensor, self._ranks[stage], group=group)
        assert work is not None
        self._sent.append(work)

    def _receive(self, tensor: Tensor, stage: int) -> None:
        dist.recv(tensor, self._ranks[stage], group=self._group if stage < self._own else None)


def _wait(sent: list[dist.Work]) -> None:
    for work in sent:
        work.wait()
