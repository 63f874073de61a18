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
        take: called on the last stage with the output of the last chunk, which the next pass may write
            over where steps are replayed.
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

    Hidden states go to a later stage through the pipeline's process group and to the first one through that of all
    ranks, as in Megatron's schedules, and tokens through the replica's: NCCL takes the messages of one group between
    two ranks one after the other, whatever their direction, so two stages could each wait for the other to receive.
    """

    def __init__(self, model: MegatronModel) -> None:
        self._model = model
        self._rt = runtime.current()
        self._group = parallel_state.get_pipeline_model_parallel_group()
        self._ranks = dist.get_process_group_ranks(self._group)
        self._own = dist.get_rank(self._group)
        self._sent: list[dist.Work] = []
        self._sent_before: list[dist.Work] = []

    def make(self, passes: Iterable[Pass], announced: bool = True) -> bool:
        """Make passes through all stages and chunks; whether there were any.

        All of them may be under way at once, and those of the call before.

        Args:
            passes: a pass is asked for when this stage begins it, so what it needs may be on its way until then.
            announced: tell ranks that share experts with this one of each.
        """
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
        _wait(self._sent_before)
        self._sent_before, self._sent = self._sent, []
        return bool(begun)

    def make_many(self, passes: Iterable[Pass]) -> None:
        """Make passes that need nothing of each other, as many at once as there are stages."""
        waiting = iter(passes)
        while self.make(itertools.islice(waiting, len(self._ranks))):
            pass

    def _turn(self, part: HeadedGPT, each: Pass) -> None:
        hidden = None
        if not part.pre_process:
            config = self._model.config
            shape = each.length, each.rows, config.hidden_size
            hidden = torch.empty(shape, dtype=config.params_dtype, device=self._rt.device)
            group = None if self._own == 0 else self._group
            dist.recv(hidden, self._ranks[self._own - 1], group=group)
        output = each.run(part, hidden)
        if part.post_process:
            each.take(output)
        else:
            # a copy, because the next replay of a graph may write over the output while it is being sent
            output = output.clone(memory_format=torch.contiguous_format)
            following = (self._own + 1) % len(self._ranks)
            self._send(output, following, None if following == 0 else self._group)

    def share_tokens(self, tokens_B: Tensor) -> None:
        """Send tokens from the last stage to all others, which ask for them by :meth:`shared_tokens`."""
        for stage in range(self._own):
            self._send(tokens_B, stage, self._rt.replica)

    def shared_tokens(self, rows: int) -> Tensor:
        """The next [rows] int64 tokens from the last stage; on the others."""
        tokens_B = torch.empty(rows, dtype=torch.int64, device=self._rt.device)
        dist.recv(tokens_B, self._ranks[-1], group=self._rt.replica)
        return tokens_B

    def finish(self) -> None:
        """Wait until all that was sent has gone; called when no pass is left."""
        _wait(self._sent_before + self._sent)
        self._sent_before, self._sent = [], []

    def _send(self, tensor: Tensor, stage: int, group: dist.ProcessGroup | None) -> None:
        work = dist.isend(tensor, self._ranks[stage], group=group)
        assert work is not None
        self._sent.append(work)


def _wait(sent: list[dist.Work]) -> None:
    for work in sent:
        work.wait()
