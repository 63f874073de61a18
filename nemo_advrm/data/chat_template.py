"""Renders chat templates deterministically: the text depends on the conversation alone, not on the date."""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Sequence
from datetime import timedelta
from functools import cached_property
from typing import Any

from nemo_advrm.data.messages import Message
from nemo_advrm.data.reading import ReadingRule
from nemo_advrm.data.template_limits import limit_templates
from nemo_advrm.errors import DataError

_log = logging.getLogger(__name__)
_MARK = "\U000ffffd"  # a private-use character that marks the end of a text
_RANDOM = re.compile(r"\|\s*random\b|\blipsum\b")
# Shadows the `strftime_now` function that transformers defines for templates; arguments cannot replace it.
_CLOCK = (
    "{%- macro strftime_now(format) %}{{ pinned_dates[format] if format in pinned_dates else "
    "format if '%' not in format else raise_exception('the format of its date is not written out in the template') }}"
    "{% endmacro %}{{ '' }}"
)
_PROBES: tuple[list[Message], ...] = (
    [Message(role="user", content="Hi"), Message(role="assistant", content="Hello")],
    [
        Message(role="system", content="Be brief."),
        Message(role="user", content="Hi"),
        Message(role="assistant", content="Hello"),
    ],
    [Message(role="user", content="Hi")],
)


class ChatTemplate:
    """The chat template of a transformers tokenizer, with the date fixed to that of ``rule``.

    Raises DataError for a template that uses random numbers, and when no probe conversation can be rendered.
    """

    def __init__(self, tokenizer: Any, name: str, rule: ReadingRule) -> None:
        self._tokenizer = tokenizer
        self._name = name
        own: str = tokenizer.get_chat_template()
        self.asks_date = "strftime_now" in own
        self._text = _CLOCK + own if self.asks_date else own
        self._dates = _dates(own, rule) if self.asks_date else {}
        if _RANDOM.search(own) or self._probe() != self._probe():
            raise DataError(
                f"the chat template of {name} uses random numbers: the same conversation would get different scores"
            )
        if self.asks_date:
            another = ReadingRule(date=(rule.now + timedelta(days=403, hours=5, minutes=7, seconds=11)).isoformat())
            if self._probe() != self._probe(_dates(own, another)):
                _log.warning(
                    "the chat template of %s writes the date: it always gets %s (docs/templates.md)",
                    name,
                    rule.date,
                )

    def render_open(self, messages: Sequence[Message]) -> str:
        """Render the conversation up to the end of the last message's text, without what the template writes after it.

        White space at the end of that text is removed where the template strips it, as transformers does
        (``continue_final_message``). Raises DataError when the template does not write the end of the text, or writes
        it more than once: then the end of the conversation is ambiguous.
        """
        last = messages[-1]
        written = {character for message in messages for character in message["content"]}
        mark = next(c for c in map(chr, range(ord(_MARK), 0, -1)) if c not in written)
        text = self.render([*messages[:-1], {**last, "content": f"{last['content']}{mark} "}])
        place = text.rfind(mark)
        if text.count(mark) != 1:
            times = "more than once" if text.count(mark) else "not"
            raise DataError(f"the chat template of {self._name} writes the end of the last message {times}")
        return text[:place] if text[place + 1 : place + 2] == " " else text[:place].rstrip()

    @cached_property
    def tail(self) -> str:
        """The text that the template writes after the answer of a finished conversation."""
        return self._around("assistant")[1]

    @cached_property
    def head(self) -> str:
        """The text that the template writes before the user's text."""
        return self._around("user")[0]

    def _around(self, role: str) -> tuple[str, str]:
        """Return the text before and after the message of ``role`` in a finished conversation.

        Both are "" when the template leaves the message out.
        """
        refusal: DataError | None = None
        for probe in _PROBES[:2]:  # some templates require a system message
            marked = [{**message, "content": _MARK} if message["role"] == role else message for message in probe]
            try:
                text = self.render(marked)
            except DataError as error:
                refusal = refusal or error
                continue
            before, mark, after = text.rpartition(_MARK)
            return (before, after) if mark else ("", "")
        assert refusal is not None
        raise refusal

    def render(self, messages: Sequence[Message], dates: dict[str, str] | None = None, **options: Any) -> str:
        """Render a finished conversation, or with ``add_generation_prompt=True`` a prompt that a policy continues.

        ``dates`` replace those of the rule. Raises DataError when the template refuses the conversation.
        """
        if self.asks_date:
            options["pinned_dates"] = dates or self._dates
        limit_templates()
        try:
            return self._tokenizer.apply_chat_template(
                list(messages), chat_template=self._text, tokenize=False, **options
            )
        except Exception as error:  # a template can raise any exception
            raise DataError(f"the chat template of {self._name} refuses this conversation: {error}") from error

    def _probe(self, dates: dict[str, str] | None = None) -> list[str]:
        """Render the probe conversations; those that the template refuses are left out."""
        texts = []
        refusal: DataError | None = None
        for probe in _PROBES:
            for prompt in (False, True):
                try:
                    texts.append(self.render(probe, dates, add_generation_prompt=prompt))
                except DataError as error:
                    refusal = refusal or error
        if not texts and refusal is not None:
            raise DataError(f"{self._name}: the chat template cannot be rendered: {refusal}") from refusal
        return texts


def fixed_text(template: str, rule: ReadingRule) -> str | None:
    """Return the source of a template with the dates of ``rule`` written into it; None if it does not use the date."""
    if "strftime_now" not in template:
        return None
    dates = json.dumps(_dates(template, rule), ensure_ascii=False, sort_keys=True)  # is a mapping in jinja too
    return f"{{%- set pinned_dates = {dates} %}}{{{{ '' }}}}{_CLOCK}{template}"


def _dates(template: str, rule: ReadingRule) -> dict[str, str]:
    """Map every string of the template that may be a date format to the formatted date of ``rule``."""
    import jinja2

    try:
        tokens = list(jinja2.Environment().lexer.tokenize(template))
    except jinja2.TemplateSyntaxError:
        return {}  # rendering it reports the error
    formats = {token.value for token in tokens if token.type == "string" and "%" in token.value}
    return {text: rule.now.strftime(text) for text in formats}
