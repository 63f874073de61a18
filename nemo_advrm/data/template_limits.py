"""Limits the steps, the time and the output of chat templates, which are programs from untrusted models.

transformers renders templates in jinja's sandbox. It blocks access to Python objects, but does not limit loops or
memory. Steps and sizes are counted inside the compiled template: a thread cannot be stopped from outside, and a process
per conversation would be too slow.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Iterable, Iterator
from contextvars import ContextVar
from typing import Any

MAX_STEPS = 200_000  # loop iterations and calls; a template needs some tens per message
MAX_CHARS = 8_000_000  # of the rendered text and of every intermediate value
MAX_NUMBER = 1_000_000  # of an argument (a width, a count)
MAX_SECONDS = 60.0
_MAX_SOURCE = 1_000_000  # characters of a template

# functions whose result can be as long as the product of their arguments
_MULTIPLY = ("expandtabs", "format", "format_map", "indent", "join", "replace", "translate", "wordwrap", "xmlattr")


class TemplateLimit(Exception):
    """A chat template exceeded a limit; the message names it."""


class _Budget:
    def __init__(self) -> None:
        self.steps = MAX_STEPS
        self.deadline = time.monotonic() + MAX_SECONDS


_budget: ContextVar[_Budget | None] = ContextVar("chat template budget", default=None)


def limit_templates() -> None:
    """Patch transformers to compile chat templates with limits; later calls do nothing."""
    from transformers.utils import chat_template_utils

    theirs = chat_template_utils._compile_jinja_template
    if not getattr(theirs, "limited", False):
        chat_template_utils._compile_jinja_template = _compiler(theirs)


def _compiler(theirs: Any) -> Any:
    limited: Any = None

    @functools.lru_cache(maxsize=64)
    def compile_template(source: str) -> Any:
        nonlocal limited
        if len(source) > _MAX_SOURCE:
            raise TemplateLimit(f"the template has more than {_MAX_SOURCE} characters")
        if limited is None:
            limited = _environment(theirs("").environment)
        return limited.from_string(source)

    compile_template.limited = True  # type: ignore[attr-defined]
    return compile_template


def _spend() -> None:
    budget = _budget.get()
    if budget is None:
        return
    budget.steps -= 1
    if budget.steps < 0:
        raise TemplateLimit(f"it takes more than {MAX_STEPS} steps")
    if time.monotonic() > budget.deadline:
        raise TemplateLimit(f"it takes longer than {MAX_SECONDS:g} s")


def _size(value: Any, left: int = MAX_CHARS) -> int:
    """Return the approximate number of characters of ``value`` as text; stops when it exceeds ``left``."""
    if isinstance(value, str | bytes):
        return len(value)
    if isinstance(value, int):
        return value.bit_length() // 3
    total = 0
    if isinstance(value, dict):
        value = [*value.keys(), *value.values()]
    if isinstance(value, list | tuple | set | frozenset):
        total = 4 * len(value)  # brackets, commas, quotes
        for item in value:
            if total > left:
                break
            total += _size(item, left - total)
    return total


def _checked(value: Any) -> Any:
    if _size(value) > MAX_CHARS:
        raise TemplateLimit(f"it makes more than {MAX_CHARS} characters")
    return value


def _check_call(name: str, values: Iterable[Any]) -> None:
    product = 1
    for value in values:
        if isinstance(value, int) and abs(value) > MAX_NUMBER:
            raise TemplateLimit(f"it asks for more than {MAX_NUMBER}")
        if name in _MULTIPLY:
            product *= max(1, value if isinstance(value, int) else _size(_checked(value)))
    # the text of a conversation times a short text is normal, two long texts are not
    if name in _MULTIPLY and product > 100 * MAX_CHARS:
        raise TemplateLimit(f"it makes more than {MAX_CHARS} characters")


def _count(values: Iterable[Any]) -> Iterator[Any]:
    for value in values:
        _spend()
        yield value


def _guarded(name: str, function: Any) -> Any:
    """Wrap a jinja filter with limits; functools.wraps keeps the attributes by which jinja passes its context."""

    @functools.wraps(function)
    def call(*arguments: Any, **named: Any) -> Any:
        _spend()
        _check_call(name, [*arguments, *named.values()])
        if name == "format":
            _check_widths(str(arguments[0]))
        result = function(*arguments, **named)
        return _count(result) if hasattr(result, "__next__") else _checked(result)

    return call


def _environment(theirs: Any) -> Any:
    """Return a copy of the environment ``theirs`` whose templates count their steps and check the sizes of values."""
    from jinja2 import Template, nodes
    from jinja2.sandbox import ImmutableSandboxedEnvironment
    from jinja2.visitor import NodeTransformer

    class Counting(NodeTransformer):
        def visit_For(self, node: Any) -> Any:
            self.generic_visit(node)
            node.iter = _call_of("count", [node.iter], node.lineno)
            return node

        def visit_Concat(self, node: Any) -> Any:
            self.generic_visit(node)
            return _call_of("join_parts", node.nodes, node.lineno)

    def _call_of(name: str, arguments: list[Any], line: int) -> Any:
        return nodes.Call(nodes.EnvironmentAttribute(name), arguments, [], None, None, lineno=line)

    class LimitedTemplate(Template):
        def render(self, *arguments: Any, **named: Any) -> str:
            token = _budget.set(_Budget())
            try:
                return super().render(*arguments, **named)
            finally:
                _budget.reset(token)

    class Limited(ImmutableSandboxedEnvironment):
        intercepted_binops = frozenset(("+", "*", "%", "**"))
        template_class = LimitedTemplate

        def _generate(self, source: Any, *arguments: Any, **named: Any) -> str:
            return super()._generate(Counting().visit(source), *arguments, **named)

        def call(self, context: Any, obj: Any, /, *arguments: Any, **named: Any) -> Any:  # type: ignore[override]
            _spend()
            # jinja wraps str.format
            owner = getattr(getattr(obj, "__wrapped__", obj), "__self__", None)
            text = [owner] if isinstance(owner, str) else []
            if text and getattr(obj, "__name__", "").startswith("format"):
                _check_widths(text[0])
            _check_call(getattr(obj, "__name__", ""), [*text, *arguments, *named.values()])
            return _checked(super().call(context, obj, *arguments, **named))

        def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
            _spend()
            for value, other in ((left, right), (right, left)):
                if operator == "*" and isinstance(other, int) and _size(_checked(value)) * abs(other) > MAX_CHARS:
                    if isinstance(value, int) and abs(value) <= MAX_NUMBER:
                        continue  # two numbers
                    raise TemplateLimit(f"it makes more than {MAX_CHARS} characters")
            if operator == "**" and isinstance(right, int) and _size(left) * abs(right) > 1000:
                raise TemplateLimit("it computes a number of more than 1000 digits")
            if operator == "%" and isinstance(left, str):
                _check_widths(left)
                _check_call("format", [left.count("%"), right])
            return _checked(super().call_binop(context, operator, left, right))

        @staticmethod
        def count(values: Any) -> Any:
            # a loop over a value that is not iterable fails in jinja as usual
            return _count(values) if hasattr(values, "__next__") else _Counted(values)

        @staticmethod
        def join_parts(*parts: Any) -> str:
            return "".join(str(_checked(part)) for part in parts)

        @staticmethod
        def concat(parts: Iterable[str]) -> str:
            left, kept = MAX_CHARS, []
            for part in parts:
                left -= len(part)
                if left < 0:
                    raise TemplateLimit(f"it writes more than {MAX_CHARS} characters")
                kept.append(part)
            return "".join(kept)

    limited = object.__new__(Limited)
    limited.__dict__.update(theirs.__dict__)  # as jinja's Environment.overlay does
    limited.overlayed, limited.linked_to, limited.cache, limited.optimized = True, theirs, None, False
    limited.filters = {name: _guarded(name, function) for name, function in theirs.filters.items()}
    limited.finalize = _checked
    limited.extensions = {name: extension.bind(limited) for name, extension in theirs.extensions.items()}
    return limited


class _Counted:
    """The values of a loop; jinja needs the length of some loops."""

    def __init__(self, values: Any) -> None:
        self._values = values

    def __iter__(self) -> Iterator[Any]:
        return _count(self._values)

    def __len__(self) -> int:
        return len(self._values)


def _check_widths(text: str) -> None:
    """Raise TemplateLimit for a format string with a width or precision above the limit."""
    digits = 0
    for character in text:
        digits = digits + 1 if character.isdigit() else 0
        if digits > 6:
            raise TemplateLimit(f"it asks for more than {MAX_NUMBER}")
