"""Only the two modules of compatibility ask which version of PyTorch, Megatron-Core or Transformer Engine is there."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parent.parent / "nemo_advrm"
COMPAT = {"engine/compat.py", "engine/torch_compat.py"}

# (module, question) -> why it is no question about a version of these libraries
ALLOWED = {
    ("commands/doctor.py", "a guard of an import"): "says what is missing, where torch itself may be",
    ("config/compose.py", "a version"): "recorded with every run",
    ("data/hf_tokenizer.py", "a version"): "of the tokenizers' libraries, in the key of a cache",
    ("rollouts/transformers_language_model.py", "a signature"): "of the user's model, which may keep fewer logits",
    ("tried_versions.py", "a version"): "compared with the table, for doctor",
}

LIBRARIES = {"torch", "megatron", "transformer_engine"}
# of Megatron-Core
OF_A_VERSION = (".get_te_version", ".is_te_min_version", ".get_torch_version", ".is_torch_min_version")


def questions(source: str) -> Iterator[tuple[str, int]]:
    """Each place that asks for a version, or finds it out: what it asks, and its line."""
    tree = ast.parse(source)
    names = _imported(tree)
    for node in ast.walk(tree):
        match node:
            case ast.Name() | ast.Attribute():
                full = _full_name(node, names)
                if full in {"inspect.signature", "inspect.getfullargspec"}:
                    yield "a signature", node.lineno
                elif _of_a_version(full):
                    yield "a version", node.lineno
            case ast.Try() if any(_catches_imports(handler) for handler in node.handlers):
                if any(_library(name) for statement in node.body for name in _imports(statement)):
                    yield "a guard of an import", node.lineno
            # a name that is not written out comes from a file, and says nothing about the library
            case ast.Call(func=ast.Name(id="hasattr" | "getattr" as function), args=[asked, ast.Constant(), *default]):
                if (function == "hasattr" or default) and _library(_full_name(asked, names)):
                    yield "a name", node.lineno


def _imported(tree: ast.AST) -> dict[str, str]:
    """The names that a module imports, with the full names of what they are."""
    found: dict[str, str] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            # "import a.b" binds a, "import a.b as c" binds a.b
            found |= {one.asname or one.name.partition(".")[0]: one.name if one.asname else "" for one in node.names}
        elif isinstance(node, ast.ImportFrom):
            found |= {one.asname or one.name: f"{node.module}.{one.name}" for one in node.names}
    return {name: full or name for name, full in found.items()}


def _full_name(node: ast.AST, names: dict[str, str]) -> str:
    """``torch.nn.F`` of ``nn.F``; empty for what no import binds."""
    if isinstance(node, ast.Name):
        return names.get(node.id, "")
    if isinstance(node, ast.Attribute) and (owner := _full_name(node.value, names)):
        return f"{owner}.{node.attr}"
    return ""


def _of_a_version(full_name: str) -> bool:
    if full_name.endswith(".__version__"):
        return not full_name.startswith("nemo_advrm.")
    return full_name in {"importlib.metadata.version", "torch.torch_version"} or full_name.endswith(OF_A_VERSION)


def _library(full_name: str) -> bool:
    return full_name.partition(".")[0] in LIBRARIES


def _catches_imports(handler: ast.ExceptHandler) -> bool:
    caught = ast.walk(handler.type) if handler.type else ()
    return any(isinstance(one, ast.Name) and one.id in {"ImportError", "ModuleNotFoundError"} for one in caught)


def _imports(statement: ast.stmt) -> Iterator[str]:
    for node in ast.walk(statement):
        match node:
            case ast.Import(names=imported):
                yield from (one.name for one in imported)
            case ast.ImportFrom(module=str(module)):
                yield module
            case ast.Call(func=ast.Attribute(attr="import_module"), args=[ast.Constant(value=str(module)), *_]):
                yield module


@pytest.mark.parametrize(
    ("source", "asked"),
    [
        ("import inspect, torch\ninspect.signature(torch.add)", "a signature"),
        ("from inspect import signature as of\nof(print)", "a signature"),
        ("import torch\nprint(torch.__version__)", "a version"),
        ("import megatron.core as core\nif core.__version__ > '0.17': pass", "a version"),
        ("from torch import __version__ as v\nprint(v)", "a version"),
        ("from importlib.metadata import version\nversion('torch')", "a version"),
        ("import importlib.metadata\nimportlib.metadata.version('torch')", "a version"),
        ("from importlib import metadata\nmetadata.version('torch')", "a version"),
        ("from megatron.core.utils import is_te_min_version\nis_te_min_version('2.9')", "a version"),
        ("try:\n    from megatron.core import x\nexcept ImportError:\n    x = None", "a guard of an import"),
        ("try:\n    import torch.a\nexcept (OSError, ModuleNotFoundError):\n    pass", "a guard of an import"),
        (
            "import importlib\ntry:\n    importlib.import_module('megatron.core')\nexcept ImportError:\n    pass",
            "a guard of an import",
        ),
        ("import torch.nn as nn\nhasattr(nn, 'RMSNorm')", "a name"),
        ("from megatron.core import utils\ngetattr(utils, 'x', None)", "a name"),
    ],
)
def test_a_question_is_found(source: str, asked: str) -> None:
    assert asked in {found for found, _ in questions(source)}


@pytest.mark.parametrize(
    "source",
    [
        "from nemo_advrm import __version__\nprint(__version__)",
        "try:\n    import gguf\nexcept ImportError:\n    pass",
        "try:\n    import torch\nexcept OSError:\n    pass",
        "import inspect\ninspect.unwrap(print)",
        "def f(module):\n    return hasattr(module, 'x') and getattr(module, 'y', 0)",
        "import torch\ngetattr(torch, 'add')",
        "import torch\ndef f(name): return getattr(torch, name, None)",
        "import torch\nprint(torch.version.cuda)",
    ],
)
def test_other_code_asks_nothing(source: str) -> None:
    assert not list(questions(source))


def test_nothing_else_asks_for_a_version() -> None:
    found: dict[tuple[str, str], list[int]] = {}
    for file in sorted(PACKAGE.rglob("*.py")):
        module = file.relative_to(PACKAGE).as_posix()
        for asked, line in questions(file.read_text(encoding="utf-8")):
            found.setdefault((module, asked), []).append(line)
    outside = {key: lines for key, lines in found.items() if key[0] not in COMPAT and key not in ALLOWED}
    assert not outside, f"belongs into {' or '.join(sorted(COMPAT))}"
    assert found.keys() >= ALLOWED.keys(), "no longer asked: take it off the list"
    assert {module for module, _ in found} >= COMPAT
