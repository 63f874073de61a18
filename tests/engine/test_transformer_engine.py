"""Transformer Engine that is there but cannot be used, planted as a package: a run on a CPU goes on without it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import megatron.core.optimizer as optimizers
import pytest
import torch
from megatron.core.optimizer import clip_grads, distrib_optimizer, optimizer
from tiny import TOKENIZER, tiny_config

from nemo_advrm.engine import cpu, transformer_engine
from nemo_advrm.engine.microbatches import EncodedResponse
from nemo_advrm.engine.runtime import Runtime
from nemo_advrm.models.language_model import SupervisedModel

# takes the step of a training on a CPU and says what took it
_TRAIN = """
import sys
sys.path.insert(0, "tests")
from nemo_advrm.models.language_model import EncodedResponse, SupervisedModel  # as a stage begins
from nemo_advrm.engine import transformer_engine, runtime
from tiny import TOKENIZER, tiny_config
runtime.start(runtime.Layout(), "cpu")
cfg = tiny_config(num_layers=1)
cfg.trainer.max_steps = 1
model = SupervisedModel(cfg, TOKENIZER, [EncodedResponse([5, 6, 7, 8], 2)])
metrics = model.train_on([EncodedResponse([5, 6, 7, 8], 2)], 0)
print("norm", metrics["grad_norm"] > 0, type(model.optimizer._inner[0]).__module__)
te = transformer_engine
print("usable", te.is_usable(False), te.is_usable(True), te.import_error())
"""
_WORKING = {
    "__init__.py": "__version__ = '2.9.0'\n",
    "pytorch/__init__.py": "import sys\nassert 'torch' in sys.modules, 'libtorch.so is not loaded'\n",
}
_BROKEN = {"__init__.py": "raise FileNotFoundError('transformer_engine_torch.so')\n", "pytorch/__init__.py": ""}


def _plant(files: dict[str, str], home: Path) -> Path:
    for name, text in files.items():
        file = home / "transformer_engine" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    return home


@pytest.mark.long
def test_a_command_goes_on_without_what_cannot_be_imported(tmp_path: Path) -> None:
    path = os.pathsep.join([str(_plant(_BROKEN, tmp_path)), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", _TRAIN],
        cwd=Path(__file__).parents[2],
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        timeout=280,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    lines = done.stdout.splitlines()
    assert "norm True torch.optim.adamw" in lines
    assert "usable False False cannot be imported (FileNotFoundError: transformer_engine_torch.so)" in lines


@pytest.mark.parametrize("distributed", [False, True])
def test_training_on_a_cpu_takes_pytorchs_adam(
    single: Runtime, monkeypatch: pytest.MonkeyPatch, distributed: bool
) -> None:
    """Megatron-Core as it is after its import beside a Transformer Engine that works, on GPUs."""

    class FusedAdam:
        def __init__(self, *_: object, **__: object) -> None:
            raise RuntimeError("no CUDA")

    def needs_a_gpu(*_: object) -> None:
        raise RuntimeError("no CUDA")

    monkeypatch.setattr(optimizers, "Adam", FusedAdam)
    monkeypatch.setattr(optimizers, "USING_PYTORCH_OPTIMIZER", False)
    monkeypatch.setattr(distrib_optimizer, "Adam", FusedAdam)
    monkeypatch.setattr(distrib_optimizer, "USING_TE_OPTIMIZER", True)
    monkeypatch.setattr(distrib_optimizer, "HAVE_APEX_OR_TE", True)
    for module in (optimizer, clip_grads):
        monkeypatch.setattr(module, "multi_tensor_applier", needs_a_gpu)
        monkeypatch.setattr(module, "multi_tensor_scale_impl", needs_a_gpu)
    monkeypatch.setattr(clip_grads, "l2_norm_impl", needs_a_gpu)
    cpu.redirect_megatron_to_cpu()  # as every start on a CPU does
    cfg = tiny_config(num_layers=1, use_distributed_optimizer=distributed)
    cfg.trainer.max_steps = 1
    row = EncodedResponse([5, 6, 7, 8], 2)
    module = SupervisedModel(cfg, TOKENIZER, [row])
    assert module.train_on([row], 0)["grad_norm"] > 0
    assert type(module.optimizer._inner[0]) in (torch.optim.Adam, torch.optim.AdamW)


@pytest.fixture
def planted(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A directory on the path; what is planted there is forgotten afterwards."""
    monkeypatch.syspath_prepend(str(tmp_path))
    for name in [m for m in sys.modules if m.partition(".")[0] == transformer_engine.PACKAGE]:
        monkeypatch.delitem(sys.modules, name)
    fault = transformer_engine.import_error.__wrapped__
    monkeypatch.setattr(transformer_engine, "import_error", fault)
    return tmp_path


@pytest.mark.parametrize("error", ["FileNotFoundError('a.so')", "OSError('libcuda.so.1')", "RuntimeError('CUDA')"])
def test_what_cannot_be_imported_looks_absent(planted: Path, error: str) -> None:
    _plant({"__init__.py": f"raise {error}\n"}, planted)
    assert transformer_engine.import_error().startswith(f"cannot be imported ({error.partition('(')[0]}: ")
    assert not transformer_engine.is_usable(on_gpu=True)
    transformer_engine.hide_if_broken()
    try:
        with pytest.raises(ImportError):
            __import__("transformer_engine.pytorch")
    finally:
        del sys.modules[transformer_engine.PACKAGE]


def test_what_can_be_imported_is_for_runs_on_a_gpu(planted: Path) -> None:
    assert transformer_engine.import_error().startswith("is not installed")
    transformer_engine.hide_if_broken()
    assert transformer_engine.PACKAGE not in sys.modules
    _plant(_WORKING, planted)
    assert transformer_engine.import_error() == ""
    assert transformer_engine.is_usable(on_gpu=True) and not transformer_engine.is_usable(on_gpu=False)
    transformer_engine.hide_if_broken()
    assert sys.modules[transformer_engine.PACKAGE] is not None
