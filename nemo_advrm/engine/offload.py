"""Moves tensors between a GPU and CPU memory on a stream of their own, beside the kernels of the model.

A copy from or to pageable memory goes through a buffer of the driver, and the host waits for it. So what waits in CPU
memory is pinned, in buffers that are kept: pinning takes longer than the copy. Memory on the GPU is taken on the stream
of the kernels, as what another stream has freed is no room for them, and the copies wait for the event of that moment.

Not measured on a GPU on this version.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass
class Coming:
    """Tensors on the device whose contents are being copied there."""

    tensors: list[Tensor]
    event: torch.cuda.Event | None

    def arrived(self) -> list[Tensor]:
        """The tensors; kernels that are started from now on see the contents. The host does not wait."""
        if self.event is not None:
            torch.cuda.current_stream().wait_event(self.event)
        return self.tensors


def to_device(waiting: Sequence[Tensor], device: torch.device) -> Coming:
    """Begin to copy tensors of CPU memory, which must not change before they have arrived."""
    tensors = [_room_on_device(tensor, device) for tensor in waiting]
    with _beside_kernels() as stream:
        for tensor, source in zip(tensors, waiting, strict=True):
            tensor.copy_(source, non_blocking=True)
            if stream is not None:
                tensor.record_stream(stream)
        return Coming(tensors, stream.record_event() if stream is not None else None)


def to_host(tensors: Sequence[Tensor], buffers: Sequence[Tensor]) -> None:
    """Begin to copy tensors of the device into ``buffers``; they may be dropped at once.

    The contents are there for a later :func:`to_device`, not yet for the host.
    """
    with _beside_kernels() as stream:
        for tensor, buffer in zip(tensors, buffers, strict=True):
            buffer.copy_(tensor, non_blocking=True)
            if stream is not None:
                tensor.record_stream(stream)  # else its memory could be written to before it is copied


def host_buffer(like: Tensor) -> Tensor:
    """Pinned memory for a tensor of this shape and type; plain memory where there is no GPU to pin it for."""
    return torch.empty_like(like, device="cpu", pin_memory=torch.cuda.is_available())


class HostBuffers:
    """The buffers of tensors that leave the device again and again, by any key; one is kept while its shape stays."""

    def __init__(self) -> None:
        self._buffers: dict[object, Tensor] = {}

    def of(self, key: object, like: Tensor) -> Tensor:
        kept = self._buffers.get(key)
        if kept is None or (kept.shape, kept.dtype) != (like.shape, like.dtype):
            kept = self._buffers[key] = host_buffer(like)
        return kept


class Parked:
    """The weights of a frozen model, which wait in CPU memory and are copied to the device for a use."""

    def __init__(self, parameters: Sequence[torch.nn.Parameter], device: torch.device) -> None:
        self.device = device
        self._parameters = list(parameters)
        self._coming: Coming | None = None
        self._in_use = False
        for parameter in self._parameters:
            plain = parameter.data.cpu()  # weights in FP8 are a class of their own, which this turns into numbers
            parameter.data = host_buffer(plain)
            parameter.data.copy_(plain)

    def prefetch(self) -> None:
        """Begin to copy the weights, before work during which they may come, if twice their room is free."""
        if self._coming is None and not self._in_use and _is_free(self.device, 2 * self._bytes()):
            self._fetch()

    @contextlib.contextmanager
    def resident(self) -> Iterator[None]:
        """The weights are on the device inside."""
        if self._in_use:
            yield
            return
        waiting = [parameter.data for parameter in self._parameters]
        coming = self._coming or self._fetch()
        self._in_use, self._coming = True, None
        for parameter, tensor in zip(self._parameters, coming.arrived(), strict=True):
            parameter.data = tensor
        del coming, tensor
        try:
            yield
        finally:
            for parameter, data in zip(self._parameters, waiting, strict=True):  # unchanged: nothing is copied back
                parameter.data = data
            self._in_use = False

    def _fetch(self) -> Coming:
        self._coming = to_device([parameter.data for parameter in self._parameters], self.device)
        return self._coming

    def _bytes(self) -> int:
        return sum(parameter.numel() * parameter.element_size() for parameter in self._parameters)


def _room_on_device(like: Tensor, device: torch.device) -> Tensor:
    return torch.empty_like(like, device=device)


def _is_free(device: torch.device, wanted: int) -> bool:
    """Whether a GPU has so many bytes free, those that PyTorch holds for later tensors included."""
    if not torch.cuda.is_available():
        return True
    held = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return torch.cuda.mem_get_info(device)[0] + held >= wanted


@contextlib.contextmanager
def _beside_kernels() -> Iterator[torch.cuda.Stream | None]:
    """Inside, copies go to their own stream, and wait for all kernels that were started before."""
    if not torch.cuda.is_available():
        yield None
        return
    stream = _copy_stream(torch.cuda.current_device())
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        yield stream


@functools.cache
def _copy_stream(device: int) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)
