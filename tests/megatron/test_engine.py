"""Transformer Engine that is there but cannot be used, planted as a package: a run on a CPU goes on without it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from nemo_advrm.megatron import engine

# takes the step of a training on a CPU and says what took it
_TRAIN = """
import sys
sys.path.insert(0, "tests")
from nemo_advrm.models.language_model import EncodedResponse, SupervisedModel  # as a stage begins
from nemo_advrm.megatron import engine, runtime
from tiny import TOKENIZER, tiny_config
runtime.start(runtime.Layout(), "cpu")
cfg = tiny_config(num_layers=1)
cfg.trainer.max_steps = 1
model = SupervisedModel(cfg, TOKENIZER, [EncodedResponse([5, 6, 7, 8], 2)])
metrics = model.train_on([EncodedResponse([5, 6, 7, 8], 2)], 0)
import megatron.core.optimizer.clip_grads as clip
print("took", type(model.optimizer._inner[0]).__module__, clip.l2_norm_impl.__name__)
print("norm", metrics["grad_norm"] > 0)
print("usable", engine.usable(False), engine.usable(True), engine.fault())
"""
_WORKING = {
    "__init__.py": "__version__ = '2.9.0'\n",
    "pytorch/__init__.py": "import sys\nassert 'torch' in sys.modules, 'libtorch.so is not loaded'\n",
    "pytorch/optimizers.py": (
        "class FusedAdam:\n    def __init__(self, *a, **k): raise RuntimeError('no CUDA')\n"
        "class FusedSGD(FusedAdam): pass\n"
        "def multi_tensor_applier(*a): raise RuntimeError('no CUDA')\n"
        "def multi_tensor_scale(*a): raise RuntimeError('no CUDA')\n"
        "def multi_tensor_l2norm(*a): raise RuntimeError('no CUDA')\n"
    ),
}
_BROKEN = {"__init__.py": "raise FileNotFoundError('transformer_engine_torch.so')\n", "pytorch/__init__.py": ""}


def _plant(files: dict[str, str], home: Path) -> Path:
    for name, text in files.items():
        file = home / "transformer_engine" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    return home


@pytest.mark.parametrize(
    ("files", "answer"),
    [
        (_WORKING, "usable False True"),
        (_BROKEN, "usable False False cannot be imported (FileNotFoundError: transformer_engine_torch.so)"),
    ],
    ids=["needs a GPU", "broken"],
)
def test_training_on_a_cpu_takes_pytorchs_adam(files: dict[str, str], answer: str, tmp_path: Path) -> None:
    path = os.pathsep.join([str(_plant(files, tmp_path)), os.environ.get("PYTHONPATH", "")])
    root = Path(__file__).parents[2]
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", _TRAIN],
        cwd=root,
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        timeout=280,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    lines = done.stdout.splitlines()
    assert "took torch.optim.adamw local_multi_tensor_l2_norm" in lines
    assert "norm True" in lines
    assert answer in [line.strip() for line in lines]


@pytest.fixture
def planted(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A directory on the path; what is planted there is forgotten afterwards."""
    monkeypatch.syspath_prepend(str(tmp_path))
    for name in [m for m in sys.modules if m.partition(".")[0] == engine.PACKAGE]:
        monkeypatch.delitem(sys.modules, name)
    fault = engine.fault.__wrapped__
    monkeypatch.setattr(engine, "fault", fault)
    return tmp_path


@pytest.mark.parametrize("error", ["FileNotFoundError('a.so')", "OSError('libcuda.so.1')", "RuntimeError('CUDA')"])
def test_what_cannot_be_imported_looks_absent(planted: Path, error: str) -> None:
    _plant({"__init__.py": f"raise {error}\n"}, planted)
    assert engine.fault().startswith(f"cannot be imported ({error.partition('(')[0]}: ")
    assert not engine.usable(on_gpu=True)
    engine.hide_broken()
    try:
        with pytest.raises(ImportError):
            __import__("transformer_engine.pytorch")
    finally:
        del sys.modules[engine.PACKAGE]


def test_what_can_be_imported_is_for_runs_on_a_gpu(planted: Path) -> None:
    assert engine.fault().startswith("is not installed")
    engine.hide_broken()
    assert engine.PACKAGE not in sys.modules
    _plant(_WORKING, planted)
    assert engine.fault() == ""
    assert engine.usable(on_gpu=True) and not engine.usable(on_gpu=False)
    engine.hide_broken()
    assert sys.modules[engine.PACKAGE] is not None
