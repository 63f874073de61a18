"""The command ``doctor``: lists the hardware and libraries found, and what each missing one means for the user."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from nemo_advrm import tried_versions
from nemo_advrm.config.schema import Config, ModelConfig
from nemo_advrm.engine import transformer_engine

FP8_CAPABILITY, MXFP8_CAPABILITY = (8, 9), (10, 0)

REQUIRED = ("torch", "megatron-core", "nemo-toolkit", "lightning", "transformers", "numpy")


@dataclass(frozen=True)
class Finding:
    """One line of the table."""

    what: str
    found: str
    meaning: str
    present: bool = True


def main(cfg: Config) -> int:
    """Prints the table; always returns 0, because a missing part is information, not a failure."""
    table = Table(show_lines=False, expand=False)
    for title in ("", "what", "found", "what it means"):
        table.add_column(title, overflow="fold")
    for finding in findings(cfg.model):
        table.add_row("+" if finding.present else "-", finding.what, escape(finding.found), escape(finding.meaning))
    Console(width=None if os.isatty(1) else 120).print(table)
    return 0


def findings(model: ModelConfig) -> list[Finding]:
    """Returns all findings, required parts first, and the fused kernels that ``model`` would use here."""
    here = tried_versions.installed()
    rows = [Finding("Python", here["python"], _python(here["python"]))]
    rows += [_required(package) for package in REQUIRED]
    rows += [_transformer_engine(), _tried_set(here), _apex()]
    try:
        import torch
    except ImportError:
        return [*rows, _cpu(_cpu_flags())]
    capabilities = [torch.cuda.get_device_capability(i) for i in range(torch.cuda.device_count())]
    rows += _gpus(torch)
    rows.append(fp8_finding(capabilities, not transformer_engine.import_error()))
    rows += _backends(torch.distributed)
    rows += [_kernels(bool(capabilities)), _fusions(model, bool(capabilities)), _packing(model, bool(capabilities))]
    return [*rows, _cpu(_cpu_flags())]


def _required(package: str) -> Finding:
    version = tried_versions.version_of(package)
    if not version:
        return Finding(package, "absent", "required: run make setup, or pip install nemo_advrm", False)
    return Finding(package, version, tried_versions.compare(package, version))


def _python(version: str) -> str:
    """Returns whether a release of this 3.x was tried."""
    tried = [one.versions["python"] for one in tried_versions.TRIED]
    if version.rpartition(".")[0] in {one.rpartition(".")[0] for one in tried}:
        return "tried"
    return f"untested: {', '.join(sorted(set(tried)))} were tried"


def _tried_set(here: dict[str, str]) -> Finding:
    """Returns whether the versions of this environment ran together."""
    together, meaning = tried_versions.compare_set(here)
    return Finding("Tried versions", "yes" if together else "no", f"{meaning} (docs/install.md)", together)


def _transformer_engine() -> Finding:
    name, version = "Transformer Engine", tried_versions.version_of("transformer-engine")
    if not version:
        lost = "no FP8, no fused layers; Megatron-Core's own layers are used (same results)"
        return Finding(name, "absent", f"{lost}. On a GPU: pip install 'nemo_advrm[gpu]'", False)
    if fault := transformer_engine.import_error():
        return Finding(name, version, f"{fault}; treated as absent", False)
    tried = tried_versions.compare("transformer-engine", version)
    return Finding(name, version, f"{tried}. FP8 and fused layers can be used by runs on a GPU")


def _apex() -> Finding:
    version = tried_versions.version_of("apex")
    if not version:
        meaning = (
            "no fused Adam and no fused weight-gradient accumulation unless Transformer Engine brings them: slower on "
            "a GPU, same results. It is not on the package index; NVIDIA/apex is built from source"
        )
        return Finding("Apex", "absent", meaning, False)
    return Finding("Apex", version, "fused optimizer and gradient accumulation can be used")


def _gpus(torch) -> list[Finding]:  # type: ignore[no-untyped-def]
    if torch.cuda.is_available():
        rows = []
        for index in range(torch.cuda.device_count()):
            device = torch.cuda.get_device_properties(index)
            memory = device.total_memory / 2**30
            found = f"{device.name}, {memory:.0f} GiB, compute capability {device.major}.{device.minor}"
            rows.append(Finding(f"GPU {index}", found, "used when trainer.accelerator is auto or gpu"))
        return rows
    why = "no device or driver was found" if torch.version.cuda else "torch is a build without CUDA"
    return [Finding("GPU", "none", f"{why}; everything runs on the CPU with gloo: right for small models", False)]


def fp8_finding(capabilities: list[tuple[int, int]], transformer_engine: bool) -> Finding:
    """Returns FP8 support by the lowest compute capability of the GPUs."""
    if not capabilities:
        return Finding("FP8", "no", "needs a GPU; use precision=fp32", False)
    weakest = min(capabilities)
    if weakest < FP8_CAPABILITY:
        return Finding("FP8", "no", "needs compute capability 8.9 or more; use precision=bf16", False)
    if not transformer_engine:
        return Finding("FP8", "hardware only", "install Transformer Engine to use precision=fp8_*", False)
    if weakest < MXFP8_CAPABILITY:
        usable = "precision=fp8_delayed, fp8_current" + (", fp8_blockwise" if weakest >= (9, 0) else "")
        return Finding("FP8", "yes", f"{usable}; mxfp8 needs compute capability 10.0")
    return Finding("FP8", "yes, MXFP8 too", "precision=fp8_delayed, fp8_current, fp8_blockwise, mxfp8")


def _backends(distributed) -> list[Finding]:  # type: ignore[no-untyped-def]
    available = distributed.is_available()
    if available and distributed.is_nccl_available():
        nccl = Finding("NCCL", "yes", "collectives between GPUs")
    else:
        nccl = Finding("NCCL", "no", "no collectives between GPUs; a CPU job does not need it", False)
    if available and distributed.is_gloo_available():
        return [nccl, Finding("gloo", "yes", "collectives between processes on CPUs")]
    return [nccl, Finding("gloo", "no", "no CPU job, of one process or several, can run", False)]


def _kernels(on_gpu: bool) -> Finding:
    """Returns the kernels of the layers and of the optimizer."""
    from nemo_advrm.engine.fusions import loads

    if transformer_engine.is_usable(on_gpu):
        adam, layers = "Adam (Transformer Engine)", "linear layers with norms and attention (Transformer Engine)"
    else:
        adam = "Adam (Apex)" if on_gpu and loads("apex.optimizers") else ""
        layers = "attention (PyTorch)"
    missing = "" if adam else "Adam is PyTorch's, which makes temporary copies of the parameters it updates"
    return Finding("Fused kernels", ", ".join(filter(None, (layers, adam))), missing)


def _fusions(model: ModelConfig, on_gpu: bool) -> Finding:
    """Returns Megatron-Core's fused operations for the configured model."""
    from nemo_advrm.engine.fusions import fusions

    every = fusions(model, on_gpu)
    active = ", ".join(fusion.title for fusion in every if fusion.active)
    reasons = "; ".join(f"{fusion.title}: {fusion.reason}" for fusion in every if not fusion.active)
    return Finding("Megatron's fusions", active or "none", f"not active: {reasons}", bool(active))


def _packing(model: ModelConfig, on_gpu: bool) -> Finding:
    """Returns whether the configured model reads packed rows in bf16."""
    import torch

    from nemo_advrm.engine import varlen

    used = varlen.packs(model, torch.bfloat16, on_gpu)
    reason = varlen.reason_against(model, torch.bfloat16, on_gpu)
    meaning = f"model.sequence_packing={model.sequence_packing}; attention has "
    meaning += f"no kernel for it: {reason}" if reason else "a kernel for it in bf16"
    return Finding("Packed rows", "yes" if used else "no", meaning, used)


def _cpu_flags() -> set[str]:
    """Returns the instruction sets of the first processor, empty if unknown."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return set()
    flags = (line.partition(":")[2].split() for line in lines if line.startswith(("flags", "Features")))
    return set(next(flags, []))


def _cpu(flags: set[str]) -> Finding:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    found = f"{cores} cores; " + ", ".join(
        f"{name} {'yes' if flag in flags else 'no'}"
        for name, flag in (("AVX-512", "avx512f"), ("AVX-512 bf16", "avx512_bf16"), ("AMX bf16", "amx_bf16"))
    )
    if flags & {"avx512_bf16", "amx_bf16"}:
        return Finding("CPU", found, "precision=bf16 is faster than fp32 for models whose layers are wide")
    return Finding("CPU", found, "training on a CPU is in fp32")
