"""Chat templates end: however long they would run or write, one error says so; usual ones are rendered as before."""

from __future__ import annotations

from typing import Any

import pytest
from transformers.utils import chat_template_utils

from nemo_advrm.data import template_limits
from nemo_advrm.data.template_limits import TemplateLimit, limit_templates

MESSAGES = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello there"}]


def render(template: str, **options: Any) -> str:
    limit_templates()
    text, _ = chat_template_utils.render_jinja_template([MESSAGES], chat_template=template, **options)
    return text[0]


@pytest.mark.parametrize(
    "template",
    [
        "{% for i in range(10**12) %}x{% endfor %}",
        "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
        "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(60) }}",
        "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
        "{{ 'a' * 10**11 }}",
        "{{ ['a'] * 10**11 }}",
        "{{ 'a'|center(10**10) }}",
        "{{ 'a'.ljust(10**10) }}",
        "{{ '{:>10000000000}'.format(1) }}",
        "{{ '%10000000000d' % 1 }}",
        "{{ '%10000000000d'|format(1) }}",
        "{{ 10 ** (10 ** 10) }}",
        "{% set n = namespace(x='a') %}{% for i in range(99) %}{% set n.x = n.x + n.x %}{% endfor %}",
        "{% set n = namespace(x='a') %}{% for i in range(99) %}{% set n.x = n.x ~ n.x %}{% endfor %}",
        "{% set n = namespace(x='a') %}{% for i in range(99) %}{% set y %}{{ n.x }}{{ n.x }}{% endset %}"
        "{% set n.x = y %}{% endfor %}",
        "{% set n = namespace(x=['a']) %}{% for i in range(99) %}{% set n.x = [n.x, n.x] %}{% endfor %}{{ n.x }}",
        "{% set x = 'a' * 1000000 %}{{ x.replace('a', x) }}",
        "{% set x = 'a' * 1000000 %}{{ x|replace('a', x) }}",
        "{% set x = 'a' * 1000000 %}{{ x.join(x) }}",
        "{% set x = 'a' * 1000000 %}{% for i in range(99) %}{{ x }}{% endfor %}",
        "{% for a in messages recursive %}{{ loop(messages) }}{{ loop(messages) }}{% endfor %}",
        "{{ '" + "x" * 1_000_001 + "' }}",
        "{{ " + "(" * 100_000 + "1" + ")" * 100_000 + " }}",
    ],
)
def test_a_template_without_end_or_bound_ends_with_an_error(template: str) -> None:
    with pytest.raises((TemplateLimit, OverflowError, RecursionError)):
        render(template)


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        ("{% for m in messages %}"
         "{{ loop.index }}/{{ loop.length }} {{ m['role'] }}: {{ m.content|trim }}\n{% endfor %}",
         "1/2 user: Hi\n2/2 assistant: Hello there\n"),
        ("{% for m in messages if m.role == 'user' %}"
         "{{ m.content ~ '!' + '?' * 2 }}{% else %}none{% endfor %}", "Hi!??"),
        ("{% for m in [] %}x{% else %}none{% endfor %}"
         "{{ messages[:1]|tojson }}", 'none[{"role": "user", "content": "Hi"}]'),
        ("{% for m in messages %}{% if loop.last %}{{ loop.previtem.content }}{% endif %}{% endfor %}", "Hi"),
        ("{% for m in messages|selectattr('role', 'equalto', 'user') %}{{ m.content.split('i')[0] }}{% endfor %}", "H"),
        ("{{ messages|map(attribute='role')|join(', ') }} {{ '%s-%d' % ('a', 7) }} {{ '{}'.format(3) }}",
         "user, assistant a-7 3"),
        ("{% set n = namespace(k=0) %}{% for m in messages %}{% set n.k = n.k + 1 %}{% if n.k == 1 %}{% continue %}"
         "{% endif %}{{ n.k }}{% endfor %}", "2"),
        ("{% macro turn(m) %}<{{ m.role }}>{% endmacro %}{% for m in messages %}{{ turn(m) }}{% endfor %}",
         "<user><assistant>"),
        ("{% for k, v in messages[0].items() %}{{ k }}={{ v }};{% endfor %}", "role=user;content=Hi;"),
        ("{% generation %}{{ messages[1].content|upper|indent(4) }}{% endgeneration %}", "HELLO THERE"),
    ],
)  # fmt: skip
def test_a_usual_template_is_rendered_as_without_limits(template: str, expected: str) -> None:
    assert render(template) == expected


def test_a_template_that_takes_too_long_is_stopped_by_the_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(template_limits, "MAX_SECONDS", -1.0)
    with pytest.raises(TemplateLimit, match="takes longer than"):
        render("{% for m in messages %}{{ m.content }}{% endfor %}")
