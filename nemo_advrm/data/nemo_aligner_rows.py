"""Preference pairs as the jsonl that NeMo-Aligner trains reward models on: a chosen line, then its rejected one."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

from nemo_advrm.data.jsonl import write_jsonl_atomic
from nemo_advrm.data.messages import Message
from nemo_advrm.data.preference_rows import PreferencePair
from nemo_advrm.errors import DataError

Render = Callable[[Sequence[Message]], str]
_SPEAKERS = {"user": "Human", "assistant": "Assistant"}


def as_transcript(messages: Sequence[Message]) -> str:
    r"""The conversation as "\n\nHuman: ..\n\nAssistant:", which ``load_preferences`` reads back; "" for raw text.

    Raises DataError for a system message: transcripts have no place for it.
    """
    turns = []
    for message in messages:
        if message["role"] not in _SPEAKERS:
            raise DataError(f"a {message['role']} message cannot be written as a transcript: give a render function")
        turns.append(f"\n\n{_SPEAKERS[message['role']]}: {message['content']}")
    return "".join(turns) + "\n\nAssistant: " if turns else ""


def write_nemo_aligner(path: str | Path, pairs: Iterable[PreferencePair], render: Render = as_transcript) -> int:
    """Write ``{"text": prompt + answer}`` twice a pair and return the number of pairs.

    Margins and weights have no place in this format. The file appears whole or not at all.

    Args:
        render: the text that stands before an answer, in the template of the model that will be trained.

    Raises:
        DataError: no pairs, or a conversation that cannot be rendered; names the pair's source.
    """
    count = 0

    def rows() -> Iterator[dict[str, str]]:
        nonlocal count
        for pair in pairs:
            try:
                prompt = render(pair.prompt)
            except DataError as error:
                raise DataError(f"{pair.source}: {error}") from error
            yield {"text": prompt + pair.chosen}
            yield {"text": prompt + pair.rejected}
            count += 1
        if not count:
            raise DataError(f"{path}: there are no pairs to write")

    write_jsonl_atomic(path, rows())
    return count
