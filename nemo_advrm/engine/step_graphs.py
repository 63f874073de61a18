"""CUDA graphs of decoding steps: a step's thousands of launches become one, wherever its shapes return."""

from __future__ import annotations

import logging
from collections.abc import Callable, Hashable, Iterable
from typing import Protocol

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from torch import Tensor

from nemo_advrm.engine import runtime
from nemo_advrm.engine.model import MegatronModel
from nemo_advrm.errors import ConfigError, one_line

_log = logging.getLogger(__name__)

Step = Callable[..., Tensor]


class Graph(Protocol):
    """What :class:`CUDAGraph` does; tests put another in its place, as there is none on a CPU."""

    def capture(self, work: Callable[[], Tensor]) -> Tensor:
        """Record ``work`` without running it; returns the tensor that every replay writes to."""

    def replay(self) -> None:
        """Run what was recorded, on what is now at the addresses of its tensors."""


class CUDAGraph:
    """PyTorch's graph, whose temporary tensors come from the memory ``pool``."""

    def __init__(self, pool: tuple[int, int]) -> None:
        self._graph = torch.cuda.CUDAGraph()
        self._pool = pool

    def capture(self, work: Callable[[], Tensor]) -> Tensor:
        # thread_local: the thread that watches over NCCL's collectives may go on asking for its events.
        # The outer context takes the stream back after a capture that failed, which torch.cuda.graph does not.
        with (
            torch.cuda.stream(torch.cuda.current_stream()),
            torch.cuda.graph(self._graph, pool=self._pool, capture_error_mode="thread_local"),
        ):
            return work()

    def replay(self) -> None:
        self._graph.replay()


class _Replay:
    """A captured step, with input tensors of its own that every call fills."""

    def __init__(self, graph: Graph, step: Step, inputs: tuple[Tensor, ...]) -> None:
        self._graph = graph
        self._inputs = tuple(tensor.clone() for tensor in inputs)
        self._output = graph.capture(lambda: step(*self._inputs))

    def __call__(self, inputs: tuple[Tensor, ...]) -> Tensor:
        for own, given in zip(self._inputs, inputs, strict=True):
            own.copy_(given)
        self._graph.replay()
        return self._output


class StepGraphs:
    """Runs steps, each of which is captured when its key returns, and replayed from then on.

    The first call of a key runs as it is, and prepares what no capture may do: Megatron's tables of rotary angles,
    compiled functions, handles of libraries. Graphs share one memory pool, as no two of them run at once, and a result
    is valid until the next call.

    A replay reads all but its inputs at the addresses of the capture, so when one of these has changed, all graphs are
    dropped. After a capture that failed, on this rank or on another of its tensor-parallel group, all steps run as they
    are: ranks whose collectives are captured need peers whose are too.

    Args:
        new_graph: makes an empty graph.
        read: the tensors that steps read besides their inputs.
        give_up: told why steps are not captured any more.
        all_captured: whether all ranks that capture together have done so; told whether this one has.
    """

    def __init__(
        self,
        new_graph: Callable[[], Graph],
        read: Callable[[], Iterable[Tensor]],
        give_up: Callable[[str], None],
        all_captured: Callable[[bool], bool] = bool,
    ) -> None:
        self._new_graph = new_graph
        self._read = read
        self._give_up = give_up
        self._all_captured = all_captured
        self._capturing = True
        self._addresses: tuple[int, ...] = ()
        self._replays: dict[Hashable, _Replay | None] = {}  # None after the first call

    def __call__(self, key: Hashable, step: Step, *inputs: Tensor) -> Tensor:
        """``step(*inputs)``. Under one key the inputs have equal shapes, and the step makes the same operations."""
        if not self._capturing:
            return step(*inputs)
        addresses = tuple(tensor.data_ptr() for tensor in self._read())
        if addresses != self._addresses:
            self._replays.clear()
            self._addresses = addresses
        if key not in self._replays:
            self._replays[key] = None
            return step(*inputs)
        replay = self._replays[key] or self._capture(step, inputs)
        if replay is None:
            return step(*inputs)
        self._replays[key] = replay
        return replay(inputs)

    def _capture(self, step: Step, inputs: tuple[Tensor, ...]) -> _Replay | None:
        replay, why = None, "another tensor-parallel rank could not capture it"
        try:
            replay = _Replay(self._new_graph(), step, inputs)
        except Exception as error:  # whatever it is, the step can still run as it is
            # the end of a capture that failed raises an error of its own over the one that says why
            cause = error.__context__ or error
            why = one_line(f"{type(cause).__name__}: {cause}")
        if self._all_captured(replay is not None):
            return replay
        self._capturing = False
        self._replays.clear()
        self._give_up(why)
        return None


def step_graphs(model: MegatronModel, wanted: str, read: Callable[[], Iterable[Tensor]]) -> StepGraphs | None:
    """Graphs for one call of generation, during which weights stay where they are; None where steps run as they are.

    Args:
        wanted: ``rl.decoding_graphs``.
        read: see :class:`StepGraphs`; the model's own tensors are added.

    Raises ConfigError for ``always`` on a CPU.
    """
    if not runtime.current().on_gpu:
        if wanted == "always":
            raise ConfigError("rl.decoding_graphs=always needs a GPU; use auto")
        return None
    if wanted == "never" or (wanted == "auto" and model.capture_failure):
        return None
    if model.model_config.num_moe_experts:
        give_up(model, wanted, "the host counts the tokens of every expert")
        return None
    if wanted == "auto" and runtime.current().layout.pipeline > 3:
        # before a capture PyTorch waits for all that this rank has sent: stages could wait for each other in a circle
        give_up(model, wanted, "not tried with more than three pipeline stages; rl.decoding_graphs=always captures")
        return None
    if model.config.fp8_param:
        give_up(model, wanted, "weights that are kept in FP8 have no address of their own")
        return None
    weights = [tensor for part in model.parts for tensor in (*part.parameters(), *part.buffers())]
    pool = torch.cuda.graph_pool_handle()
    return StepGraphs(
        new_graph=lambda: CUDAGraph(pool),
        read=lambda: (*weights, *read()),
        give_up=lambda why: give_up(model, wanted, why),
        all_captured=all_tensor_parallel_ranks,
    )


def give_up(model: MegatronModel, wanted: str, why: str) -> None:
    """Say why the steps of ``model`` are not captured, and do not try again; ConfigError for ``always``."""
    said = f"the decoding step could not be captured as a CUDA graph ({why})"
    if wanted == "always":
        raise ConfigError(f"rl.decoding_graphs=always: {said}")
    model.capture_failure = why
    _log.warning("%s: generation runs without graphs, several times slower", said)


def all_tensor_parallel_ranks(own: bool) -> bool:
    """Whether what ``own`` says of this rank holds on all ranks of the tensor-parallel group, which all call."""
    rt = runtime.current()
    if rt.layout.tensor == 1:
        return own
    all_of_them = torch.tensor(int(own), device=rt.device)
    dist.all_reduce(all_of_them, op=dist.ReduceOp.MIN, group=parallel_state.get_tensor_model_parallel_group())
    return bool(all_of_them)
