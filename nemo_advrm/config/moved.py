"""The one table of everything that was renamed or removed, and what serves the old names.

Configuration keys are refused with what replaces them: a setting that silently means something else is worse than an
error. Class paths in .nemo files and imports of earlier documentation stay readable, through an import hook. Fields of
data files were never renamed.

The import hook is our own because the standard library has none; a stub module in every old place would keep the old
layout alive in the tree.
"""

from __future__ import annotations

import importlib
import importlib.abc
import importlib.machinery
import sys
import warnings
from collections.abc import Callable, Mapping, Sequence
from types import ModuleType
from typing import Any

# Old dotted key -> what to tell: "is now NEW.KEY" or "was removed: ...". A key that names a section covers its keys:
# "is now X" then means X.REST for OLD.REST.
MOVED_KEYS: dict[str, str] = {
    "reference": "is now sft_statistics",
    "adversarial.lam1": "is now adversarial.target_weight",
    "adversarial.lam2": "is now adversarial.others_weight",
    "adversarial.anchor": "is now adversarial.min_target_score",
    "adversarial.directions": "is now adversarial.target_members",
    "adversarial.policies": "is now adversarial.num_adversaries",
    "trainer.hang_minutes": "was removed: trainer.timeout_minutes ends a job that hangs (docs/scale.md)",
    "trainer.straggler_ratio": "was removed: nvidia-resiliency-ext finds slow ranks (docs/scale.md)",
    "trainer.compare_gpu_kernels": "was removed: nvidia-resiliency-ext compares the GPUs' kernels (docs/scale.md)",
    "serve.triton_port": "was removed: NeMo-Aligner's clients connect to serve.port",
    "serve.triton_python": "was removed: NeMo-Aligner's clients connect to serve.port",
}

# Old module or package -> its new place; a package covers the modules below it, the longest match counts. Serves old
# documented imports and class paths of .nemo files ("target: nemo_advrm.aligner....") alike.
MOVED_MODULES: dict[str, str] = {
    "nemo_advrm.aligner": "nemo_advrm.integrations.nemo_aligner",
    "nemo_advrm.aligner.reference": "nemo_advrm.integrations.nemo_aligner.sft_scores",
    "nemo_advrm.aligner.critic": "nemo_advrm.integrations.nemo_aligner.critic_client",
    "nemo_advrm.aligner.rollouts": "nemo_advrm.integrations.nemo_aligner.rollout_reader",
    "nemo_advrm.callbacks": "nemo_advrm.training.callbacks",
    "nemo_advrm.callbacks.checkpoints": "nemo_advrm.training.callbacks.periodic_checkpoints",
    "nemo_advrm.callbacks.metrics": "nemo_advrm.training.callbacks.metrics_writer",
    "nemo_advrm.callbacks.preemption": "nemo_advrm.training.callbacks.periodic_checkpoints",
    "nemo_advrm.callbacks.rollouts": "nemo_advrm.training.callbacks.rollout_records",
    "nemo_advrm.checks": "nemo_advrm.config.validation",
    "nemo_advrm.keys": "nemo_advrm.config.keys",
    "nemo_advrm.layout": "nemo_advrm.config.layout",
    "nemo_advrm.megatron": "nemo_advrm.engine",
    "nemo_advrm.megatron.planner": "nemo_advrm.plan",
    "nemo_advrm.objectives.reference": "nemo_advrm.objectives.sft_statistics",
    "nemo_advrm.rewards.http_client": "nemo_advrm.http_client",
    "nemo_advrm.rewards.reference": "nemo_advrm.data.sft_scores",
    "nemo_advrm.schema": "nemo_advrm.config.schema",
    "nemo_advrm.stages": "nemo_advrm.commands",
    "nemo_advrm.synthetic.signature": "nemo_advrm.synthetic.gold",
    "nemo_advrm.training.callbacks.preemption": "nemo_advrm.training.callbacks.periodic_checkpoints",
}

# Function or class by its present module and old name -> present name, after "MODULE:" where it went elsewhere; a
# module that has some says ``__getattr__ = old_names(__name__)``.
MOVED_NAMES: dict[str, str] = {
    "nemo_advrm.models.policy.AdversarialPolicy": "nemo_advrm.attacks.adversarial_policy:AdversarialPolicy",
    "nemo_advrm.integrations.nemo_aligner.members.read_reference": "read_sft_scores",
    "nemo_advrm.integrations.nemo_aligner.sft_scores.write_reference": "write_sft_scores",
    "nemo_advrm.rewards.remote.plain_text": "nemo_advrm.data.messages:plain_text",
    "nemo_advrm.training.callbacks.periodic_checkpoints.PreemptionCheckpoint": "PeriodicCheckpoint",
}


def moved_key(name: str) -> str:
    """The sentence that refuses a renamed or removed key, "" for any other; ``stage.NAME.KEY`` is looked up as KEY."""
    parts = name.split(".")
    prefix = ".".join(parts[:2]) + "." if parts[0] == "stage" and len(parts) > 2 else ""
    parts = parts[2:] if prefix else parts
    for end in range(len(parts), 0, -1):
        told = MOVED_KEYS.get(".".join(parts[:end]))
        if told is None:
            continue
        action, is_renamed, new = told.partition("is now ")
        if is_renamed and not action:
            return f"{name} is now {'.'.join([prefix + new, *parts[end:]])}"
        return f"{name} {told}"
    return ""


def current_config(plain: Mapping[str, Any]) -> dict[str, Any]:
    """The ``config.yaml`` of an earlier version's run with the present keys; removed keys are left out."""
    return _current(plain, "")


def _current(section: Mapping[str, Any], prefix: str) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in section.items():
        told = moved_key(f"{prefix}{name}")
        if told.startswith(f"{prefix}{name} is now {prefix}"):
            name = told.split()[3].removeprefix(prefix)
        elif told:
            continue  # removed, or now in another section, where its default counts
        found[name] = _current(value, f"{prefix}{name}.") if isinstance(value, dict) else value
    return found


def moved_module(name: str) -> str:
    """The present name of a module that was moved, "" for any other."""
    parts = name.split(".")
    for end in range(len(parts), 1, -1):
        new = MOVED_MODULES.get(".".join(parts[:end]))
        if new is not None:
            return ".".join([new, *parts[end:]])
    return ""


def old_names(module: str) -> Callable[[str], Any]:
    """The ``__getattr__`` of a module that serves old names of its functions and classes."""

    def find(name: str) -> Any:
        new = MOVED_NAMES.get(f"{module}.{name}")
        if new is None:
            raise AttributeError(f"module {module} has no attribute {name}")
        home, _, name_now = new.rpartition(":")
        warnings.warn(f"{module}.{name} is now {home or module}.{name_now}", DeprecationWarning, stacklevel=2)
        return getattr(importlib.import_module(home or module), name_now)

    return find


class _MovedModules(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Imports a moved module under its old name, with a DeprecationWarning; both names are the same module.

    It must stand first in ``sys.meta_path``: below a moved package the path finder would find the file in the new
    folder and load it a second time under the old name.
    """

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if not fullname.startswith("nemo_advrm."):
            return None
        if moved_module(fullname):
            return importlib.machinery.ModuleSpec(fullname, self)
        # A package whose modules all went elsewhere has no folder any more, but is imported on the way to them.
        if any(old.startswith(fullname + ".") for old in MOVED_MODULES):
            found = importlib.machinery.PathFinder.find_spec(fullname, path)
            return found or importlib.machinery.ModuleSpec(fullname, self, is_package=True)
        return None

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType | None:
        return None

    def exec_module(self, module: ModuleType) -> None:
        old = module.__name__
        new = moved_module(old)
        if new:
            warnings.warn(f"{old} is now {new}", DeprecationWarning, stacklevel=2)
            # the import system hands out what stands in sys.modules after this call
            sys.modules[old] = importlib.import_module(new)


def serve_moved_modules() -> None:
    """Install the import hook, once; called when ``nemo_advrm`` is imported."""
    if not any(isinstance(finder, _MovedModules) for finder in sys.meta_path):
        sys.meta_path.insert(0, _MovedModules())
