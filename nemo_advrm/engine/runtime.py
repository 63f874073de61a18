"""Starts and stops Megatron-Core's process groups under torchrun, under SLURM or in a single process."""

from __future__ import annotations

import gc
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from nemo_advrm.config.layout import expert_tensor_parallel_size
from nemo_advrm.engine import peers
from nemo_advrm.engine.collectives import without_views
from nemo_advrm.errors import ConfigError, LayoutError
from nemo_advrm.rank_info import RankInfo
from nemo_advrm.seeds import derive_seed

T = TypeVar("T")


@dataclass(frozen=True)
class Layout:
    """Parallel sizes of a job; the remaining factor of the world size is the data-parallel size.

    The ranks of a pipeline stage, whichever replica they belong to, form groups of ``expert`` that share the experts.
    """

    tensor: int = 1
    pipeline: int = 1
    context: int = 1
    expert: int = 1

    @property
    def model_parallel(self) -> int:
        """Number of processes of one model replica, which all work on the same rows."""
        return self.tensor * self.pipeline * self.context

    @property
    def experts_span_rows(self) -> bool:
        """Whether ranks that share experts may work on different rows."""
        return self.tensor % self.expert != 0


@dataclass(eq=False)
class Runtime:
    """Device, ranks and groups of this process. Made by :func:`start`.

    Attributes:
        replica: the processes of this one's model replica.
        dp_rank, dp_size: rank and number of the data-parallel replicas.
        is_first_stage, is_last_stage: of the pipeline.
        without_megatron: None once Megatron's process groups exist, else the timeout in minutes that they will have.
    """

    layout: Layout
    device: torch.device
    rank: int
    world_size: int
    replica: dist.ProcessGroup
    dp_rank: int
    dp_size: int
    is_first_stage: bool
    is_last_stage: bool
    without_megatron: float | None = None

    @property
    def on_gpu(self) -> bool:
        return self.device.type == "cuda"

    @property
    def is_writer(self) -> bool:
        """True on rank 0, which writes text files and prints."""
        return self.rank == 0

    @property
    def is_replica_source(self) -> bool:
        """True on the first rank of each model replica."""
        return self.layout.model_parallel == 1 or dist.get_rank(self.replica) == 0

    def dp_slice(self, count: int) -> slice:
        """This data-parallel rank's contiguous share of ``count`` rows, in rank order."""
        return slice(count * self.dp_rank // self.dp_size, count * (self.dp_rank + 1) // self.dp_size)

    def broadcast_from_last_stage(self, value: torch.Tensor) -> torch.Tensor:
        """The ``value`` of the last pipeline stage, on all; on the others it gives shape and dtype alone."""
        if self.layout.pipeline == 1:
            return value
        from megatron.core import parallel_state

        value = value.to(self.device).contiguous()
        last = parallel_state.get_pipeline_model_parallel_last_rank()
        dist.broadcast(value, last, group=parallel_state.get_pipeline_model_parallel_group())
        return value

    def gather_data_parallel(self, value: Any) -> list[Any]:
        """All-gather a picklable ``value`` over data-parallel ranks, in rank order."""
        if self.dp_size == 1:
            return [value]
        from megatron.core import parallel_state

        values: list[Any] = [None] * self.dp_size
        dist.all_gather_object(values, without_views(value), group=parallel_state.get_data_parallel_group())
        return values

    def gather_to_writer(self, value: Any) -> list[Any]:
        """Gather a picklable ``value`` of every data-parallel rank, in rank order, on rank 0; other ranks get [].

        All ranks call. Only rank 0's data-parallel group communicates, as all ranks of a replica have the same value.
        """
        if self.dp_size == 1:
            return [value] if self.is_writer else []
        from megatron.core import parallel_state

        group = parallel_state.get_data_parallel_group()
        if 0 not in dist.get_process_group_ranks(group):
            return []
        values: list[Any] | None = [None] * self.dp_size if self.is_writer else None
        dist.gather_object(without_views(value), values, dst=0, group=group)
        return values or []

    def dp_all_reduce_max(self, count: int) -> int:
        """Maximum of ``count`` over data-parallel ranks, on all of them."""
        if self.dp_size == 1:
            return count
        from megatron.core import parallel_state

        # by gloo on GPUs too: then only the host waits, and the GPU continues with its queued work
        groups = parallel_state.get_data_parallel_group_gloo if self.on_gpu else parallel_state.get_data_parallel_group
        most = torch.tensor(count)
        dist.all_reduce(most, op=dist.ReduceOp.MAX, group=groups())
        return int(most)

    def any_with_rows(self, flag: bool) -> bool:
        """Whether ``flag`` holds on any data- or context-parallel rank; all of them call."""
        if self.dp_size * self.layout.context == 1:
            return flag
        from megatron.core import parallel_state

        # by gloo on GPUs too, as above
        groups = parallel_state.get_data_parallel_group_gloo if self.on_gpu else parallel_state.get_data_parallel_group
        either = torch.tensor(int(flag))
        dist.all_reduce(either, op=dist.ReduceOp.MAX, group=groups(with_context_parallel=True))
        return bool(either)

    def barrier(self) -> None:
        if self.world_size > 1:
            dist.barrier()

    def seed(self, seed: int) -> None:
        """Seed every generator equally on all ranks, except for what tensor-parallel ranks hold parts of."""
        from megatron.core import tensor_parallel

        need_megatron()
        torch.manual_seed(seed)
        if not self.on_gpu:
            tensor_parallel.get_cuda_rng_tracker().reset()
        tensor_parallel.model_parallel_cuda_manual_seed(seed)

    def seed_step(self, seed: int) -> None:
        """Seed dropout, so that ranks with other sequences, other parts of these or other layers draw other masks.

        Tensor-parallel ranks draw equal ones where they hold equal values. Every training step calls it with a value
        derived from the run's seed and the step, so that a restarted run draws the same numbers as an uninterrupted
        one.
        """
        from megatron.core import parallel_state

        need_megatron()
        context = parallel_state.get_context_parallel_rank()
        stage = parallel_state.get_pipeline_model_parallel_rank()
        self.seed(derive_seed(seed, "dropout", self.dp_rank, context, stage))


_current: Runtime | None = None


def is_running() -> bool:
    """Whether :func:`start` has been called."""
    return _current is not None


def current() -> Runtime:
    """The running :class:`Runtime`; raises RuntimeError before :func:`start`."""
    if _current is None:
        raise RuntimeError("Megatron-Core is not running: call nemo_advrm.engine.runtime.start first")
    return _current


def uses_gpu(accelerator: str) -> bool:
    """Whether a run with this ``trainer.accelerator`` uses a GPU."""
    return accelerator != "cpu" and torch.cuda.is_available()


def start(
    layout: Layout | None = None, accelerator: str = "auto", timeout_minutes: float = 30.0, megatron: bool = True
) -> Runtime:
    """Join the job and build Megatron's process groups for ``layout``.

    A second call with the same layout returns the running Runtime; another layout rebuilds the groups. ``accelerator``
    is a value of the schema's ``trainer.accelerator``, which is not checked again.

    With ``megatron=False`` a process that is alone leaves the groups to :func:`need_megatron`: importing Megatron-Core
    takes longer than a Hugging Face model needs to score a file. Several processes always get their groups, which
    collectives between replicas use.

    Raises LayoutError if the layout does not divide the number of processes, ConfigError if a GPU is requested and
    none is found, ProcessLost if other processes do not join in time.
    """
    global _current
    layout = layout or Layout()
    if _current is not None and _current.layout == layout:
        if megatron:
            need_megatron()
        return _current
    if accelerator == "gpu" and not torch.cuda.is_available():
        raise ConfigError("trainer.accelerator=gpu: PyTorch sees no GPU; use accelerator=cpu or check the driver")
    on_gpu = uses_gpu(accelerator)
    rank_info = RankInfo.from_environment()
    if rank_info.world_size % layout.model_parallel:
        raise LayoutError(
            f"{rank_info.world_size} processes cannot be split into model replicas of tensor {layout.tensor} x "
            f"pipeline {layout.pipeline} x context {layout.context} = {layout.model_parallel} processes"
        )
    device = torch.device("cuda", rank_info.local_rank) if on_gpu else torch.device("cpu")
    if on_gpu:
        torch.cuda.set_device(device)
    if not dist.is_initialized():
        peers.join(rank_info, "nccl" if on_gpu else "gloo", timeout_minutes)
    if not megatron and rank_info.world_size == 1:
        alone = dist.group.WORLD
        assert alone is not None
        _current = Runtime(layout, device, 0, 1, alone, 0, 1, True, True, timeout_minutes)
        return _current
    replica = _initialize_groups(layout, on_gpu, timeout_minutes)
    from megatron.core import parallel_state

    _current = Runtime(
        layout,
        device,
        rank_info.rank,
        rank_info.world_size,
        replica,
        dp_rank=parallel_state.get_data_parallel_rank(),
        dp_size=parallel_state.get_data_parallel_world_size(),
        is_first_stage=parallel_state.is_pipeline_first_stage(ignore_virtual=True),
        is_last_stage=parallel_state.is_pipeline_last_stage(ignore_virtual=True),
    )
    return _current


def need_megatron() -> None:
    """Build Megatron's process groups where :func:`start` has left them out; called before a model is built."""
    rt = current()
    if rt.without_megatron is not None:
        rt.replica = _initialize_groups(rt.layout, rt.on_gpu, rt.without_megatron)
        rt.without_megatron = None


def _initialize_groups(layout: Layout, on_gpu: bool, timeout_minutes: float) -> dist.ProcessGroup:
    """Make Megatron's process groups; returns that of this process's model replica."""
    from megatron.core import parallel_state

    if not on_gpu:
        from nemo_advrm.engine import cpu

        cpu.redirect_megatron_to_cpu()
    if parallel_state.model_parallel_is_initialized():
        # Megatron only drops its references (but destroys the gloo twins): threads and sockets would leak
        groups = parallel_state._global_process_group_list or []
        parallel_state.destroy_model_parallel()
        gc.collect()  # trained models are in reference cycles, and hold their groups, whose threads never rest
        for group in groups:
            if group in dist.distributed_c10d._world.pg_map:
                dist.destroy_process_group(group)
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=layout.tensor,
        pipeline_model_parallel_size=layout.pipeline,
        context_parallel_size=layout.context,
        expert_model_parallel_size=layout.expert,
        expert_tensor_parallel_size=expert_tensor_parallel_size(layout.tensor, layout.expert),
        distributed_timeout_minutes=timeout_minutes,  # type: ignore[arg-type]  # goes into a timedelta
        create_gloo_process_groups=on_gpu,
    )
    return _replica_group(layout, timeout_minutes)


def _replica_group(layout: Layout, timeout_minutes: float) -> dist.ProcessGroup:
    """Group of the ranks that share rows. Megatron's model-parallel group does not include context-parallel ranks."""
    from megatron.core import parallel_state

    if layout.context == 1:
        return parallel_state.get_model_parallel_group()
    replicas = dist.get_world_size() // layout.model_parallel
    # the rank order of Megatron's own groups
    ranks = parallel_state.RankGenerator(
        layout.tensor, 1, replicas, layout.pipeline, layout.context, "tp-cp-ep-dp-pp"
    ).get_ranks("tp-cp-pp")
    groups = [
        parallel_state.create_group(own, timeout=timedelta(minutes=timeout_minutes), group_desc="REPLICA_GROUP")
        for own in ranks
    ]
    return next(group for own, group in zip(ranks, groups, strict=True) if dist.get_rank() in own)


def stop() -> None:
    """Leave the job and destroy every process group."""
    global _current
    from megatron.core import parallel_state

    if _current is None:
        return
    parallel_state.destroy_model_parallel()
    if dist.is_initialized():
        dist.destroy_process_group()
    peers.leave()
    _current = None
