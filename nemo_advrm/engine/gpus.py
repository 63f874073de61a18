"""GPUs that the planner knows: memory, peak rates and links, from the manufacturers' data sheets."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class GPU:
    """One GPU type.

    Attributes:
        title: name for people.
        memory: GiB as CUDA reports it, less than the nominal GB.
        bf16, fp8, fp32: peak of dense matrix products, TFLOP/s; 0 if the format is not supported.
        bandwidth: memory bandwidth, TB/s.
        link: to the other GPUs of the node (NVLink, else PCIe), GB/s in one direction.
        network: share of the node's network, GB/s in one direction.
        host: to CPU memory (PCIe), GB/s in one direction.
    """

    title: str
    memory: float
    bf16: float
    fp8: float
    fp32: float
    bandwidth: float
    link: float
    network: float
    host: float

    def peak(self, precision: str) -> float:
        """FLOP/s of matrix products in ``precision.name``; 0 if the GPU does not support it."""
        rate = {"fp32": self.fp32, "bf16": self.bf16}.get(precision, self.fp8)
        return rate * 1e12


# of these GPUs only Blackwell supports MXFP8 (see supports)
GPUS: dict[str, GPU] = {
    "a100_40": GPU("A100 40 GB", 39.4, 312, 0, 19.5, 1.555, 300, 25, 25),
    "a100_80": GPU("A100 80 GB", 79.2, 312, 0, 19.5, 2.039, 300, 25, 25),
    "h100": GPU("H100 SXM 80 GB", 79.2, 989, 1979, 67, 3.35, 450, 50, 50),
    "h200": GPU("H200 141 GB", 139.8, 989, 1979, 67, 4.8, 450, 50, 50),
    "b200": GPU("B200 180 GB", 178.3, 2250, 4500, 75, 7.7, 900, 50, 50),
    "rtx4090": GPU("RTX 4090 24 GB", 23.5, 165, 330, 82.6, 1.008, 25, 3, 25),
}

GPUS_PER_NODE = 8


def peak_of(device_name: str, precision: str) -> float | None:
    """Peak FLOP/s of a GPU by the name that CUDA gives it; None if it is not in the table."""
    name = device_name.lower()
    return next((gpu.peak(precision) for key, gpu in GPUS.items() if key.split("_")[0] in name), None)


def supports(gpu: str, precision: str) -> bool:
    """Whether the GPU supports the precision."""
    if precision == "mxfp8":
        return gpu == "b200"
    if precision == "fp8_blockwise":
        return gpu in ("h100", "h200", "b200")
    return GPUS[gpu].peak(precision) > 0
