"""Reads the published forms of preference data: one small reader per form, and the table that finds a row's form."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from nemo_advrm.data.columns import ANSWER_COLUMNS, PROMPT_COLUMNS, Columns, first_filled, has_text
from nemo_advrm.data.messages import starts_as_transcript, type_name
from nemo_advrm.data.preference_rows import Answer, AnswerSet, answer_set_of_pair, require_same_prompt
from nemo_advrm.data.row_reader import RowReader, Turns, check_number

Row = Mapping[str, Any]
# One answer of a row: (path in the row for error messages, text or chat messages, score).
RawAnswer = tuple[str, Any, float]

# Columns with all answers to a prompt, and the columns with ratings or ranks of answers that are plain texts.
_LISTS = ("completions", "responses", "answers", "generations", "candidates")
_RATING_LISTS = ("ratings", "scores", "rewards")
_RANK_LISTS = ("ranks", "ranking", "rank")
# Keys of an answer that is an object: its text, its rating (higher is better), its rank (lower is better).
_TEXTS = ("completion", "response", "answer", "text", "content")
_RATINGS = ("overall_score", "overall", "score", "rating", "reward", "helpfulness", "fine-grained_score")
_RANK = "rank"
# HelpSteer's attributes, the regression labels of an answer; absent ones are left out of this order.
ATTRIBUTES = ("helpfulness", "correctness", "coherence", "complexity", "verbosity")
# Two answers and a preference: negative if the first is better, positive if the second is (HelpSteer3,
# HelpSteer2-Preference).
_TWO = (("response1", "response2"), ("response_1", "response_2"))
_PREFERENCES = ("overall_preference", "preference_strength")


@dataclass(frozen=True)
class Form:
    """A form of row: `matches` recognises it, `read` returns its prompt and answers or raises BadRow."""

    name: str
    matches: Callable[[Row], bool]
    read: Callable[[RowReader], AnswerSet]
    keys: str  # for error messages and the documentation


def _both(row: Row) -> bool:
    return row.get("chosen") is not None and row.get("rejected") is not None


def _is_messages(value: Any) -> bool:
    return not isinstance(value, str) and not (isinstance(value, list) and value and not isinstance(value[0], dict))


def _is_transcript(value: Any) -> bool:
    return isinstance(value, str) and starts_as_transcript(value)


def _read_messages(reader: RowReader) -> AnswerSet:
    return _pair(reader, [reader.answer(reader.get(key), key) for key in _checked(reader, list)])


def _read_transcript(reader: RowReader) -> AnswerSet:
    both = [reader.answer(reader.get(key), key, transcript=True) for key in _checked(reader, str)]
    # hh-rlhf contains empty assistant turns that annotators preferred
    return _pair(reader, both, allow_empty=True)


def _read_prompt(reader: RowReader) -> AnswerSet:
    return _pair(reader, [reader.answer(reader.get(key), key) for key in _checked(reader, str)])


def _read_text(reader: RowReader) -> AnswerSet:
    return _pair(reader, [reader.raw_text(reader.get(key), key) for key in _checked(reader, str)])


def _checked(reader: RowReader, kind: type) -> tuple[str, str]:
    for key in ("chosen", "rejected"):
        value = reader.get(key)
        if value is None:
            raise reader.bad("missing_key", f"`{key}` is missing ({reader.keys()}); known forms: {_known()}")
        if not isinstance(value, kind):
            wanted = "a string" if kind is str else "a list of chat messages"
            raise reader.bad("wrong_type", f"`{key}` is {type_name(value)}, {wanted} was expected")
        if isinstance(value, str) and not value.strip():
            raise reader.bad("empty", f"`{key}` is empty")
    return "chosen", "rejected"


def _pair(reader: RowReader, both: list[tuple[Turns, str]], *, allow_empty: bool = False) -> AnswerSet:
    return answer_set_of_pair(
        both,
        reader.source,
        margin=reader.number("margin", at_least=0),
        weight=reader.number("weight", at_least=0),
        labels=(reader.numbers("chosen_labels"), reader.numbers("rejected_labels")),
        ended=(reader.is_ended("chosen_ended"), reader.is_ended("rejected_ended")),
        allow_empty=allow_empty,
    )


def _read_best_of_n(reader: RowReader) -> AnswerSet:
    """Read RewardBench 2 rows: every answer in `chosen` is better than every answer in `rejected`."""
    answers: list[RawAnswer] = []
    for key, score in (("chosen", 1.0), ("rejected", 0.0)):
        value = reader.get(key)
        if not value:
            raise reader.bad("empty", f"`{key}` is empty")
        # a string or a list of chat messages is one answer
        whole = not isinstance(value, list) or isinstance(value[0], dict)
        for index, item in enumerate([value] if whole else value):
            answers.append((key if whole else f"{key}[{index}]", item, score))
    return replace(_answer_set(reader, answers), compares_all=False)


def _list_column(row: Row) -> str | None:
    return next((name for name in _LISTS if isinstance(row.get(name), list) and row[name]), None)


def _first_number(item: Any, names: tuple[str, ...]) -> str | None:
    return next((name for name in names if isinstance(item, Mapping) and _is_number(item.get(name))), None)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _is_ranked(row: Row) -> bool:
    name = _list_column(row)
    if name is None:
        return False
    objects = any(_is_number(item.get(_RANK)) for item in row[name] if isinstance(item, dict))
    return objects or any(isinstance(row.get(ranks), list) for ranks in _RANK_LISTS)


def _is_rated_list(row: Row) -> bool:
    name = _list_column(row)
    if name is None or _is_ranked(row):
        return False
    return any(_first_number(item, _RATINGS) for item in row[name]) or any(
        isinstance(row.get(ratings), list) for ratings in _RATING_LISTS
    )


def _read_ranked(reader: RowReader) -> AnswerSet:
    """Read NeMo-RL's `completions` or Nectar's `answers`: the answer with the lower `rank` is better."""
    return _answer_set(reader, _listed(reader, (_RANK,), _RANK_LISTS, -1.0))


def _read_rated_list(reader: RowReader) -> AnswerSet:
    """Read UltraFeedback's `completions` with ratings, whose differences are the margins."""
    return _answer_set(reader, _listed(reader, _RATINGS, _RATING_LISTS, 1.0), graded=True)


def _listed(reader: RowReader, names: tuple[str, ...], lists: tuple[str, ...], sign: float) -> list[RawAnswer]:
    """Return every answer of the list column with its rating or rank times `sign`.

    Args:
        names: keys of the number in an answer that is an object.
        lists: columns that hold the numbers of answers that are texts.

    Raises BadRow for an answer without text or number.
    """
    column = _list_column(reader.row)
    if column is None:
        raise reader.bad("missing_key", f"none of {', '.join(_LISTS)} is a list of answers ({reader.keys()})")
    items = reader.get(column)
    beside = next((name for name in lists if isinstance(reader.row.get(name), list)), None)
    scores = reader.get(beside) if beside else [None] * len(items)
    if len(scores) != len(items):
        raise reader.bad("bad_value", f"`{beside}` has {len(scores)} numbers for {len(items)} answers in `{column}`")
    answers: list[RawAnswer] = []
    for index, (item, score) in enumerate(zip(items, scores, strict=True)):
        place = f"{column}[{index}]"
        where = f"{beside}[{index}]" if beside else f"{place}.{names[0]}"
        if isinstance(item, dict):
            item = reader.columns.without_ignored(item)
            name, key = _first_number(item, names) or names[0], first_filled(item, _TEXTS)
            if key is None:
                raise reader.bad("empty", f"`{place}` holds no answer ({', '.join(_TEXTS)})")
            if not beside:
                score, where = item.get(name), f"{place}.{name}"
            for other in item:
                if other not in (key, *names) and not _is_writer_instruction(other, item, reader):
                    reader.columns.note_unread(f"{place}.", other, item[other], reader.source)
            place, item = f"{place}.{key}", item[key]
        number = check_number(score, where, reader.source)
        if number is None:
            raise reader.bad("missing_key", f"`{where}` is missing: every answer needs a number")
        answers.append((place, item, sign * number))
    return answers


def _is_writer_instruction(name: str, item: Row, reader: RowReader) -> bool:
    """Return whether `name` is UltraFeedback's prompt that states a `principle`.

    It instructed the model that wrote the answer and was not shown to the judge, so it is not part of the prompt.
    """
    if name != "custom_system_prompt" or "principle" not in item:
        return False
    reader.columns.unread.setdefault(name)
    return True


def _two_columns(row: Row) -> tuple[str, str] | None:
    return next((pair for pair in _TWO if all(has_text(row.get(name)) for name in pair)), None)


def _read_two_responses(reader: RowReader) -> AnswerSet:
    """Read HelpSteer3 rows: the preference runs from -3 (first answer much better) to 3 (second much better).

    Its absolute value is the margin.
    """
    first, second = _two_columns(reader.row) or _TWO[0]
    name = next((key for key in _PREFERENCES if reader.row.get(key) is not None), _PREFERENCES[0])
    preference = reader.number(name)
    if preference is None:
        raise reader.bad("missing_key", f"`{name}` is missing ({reader.keys()})")
    answers: list[RawAnswer] = [(first, reader.get(first), -preference), (second, reader.get(second), 0.0)]
    return _answer_set(reader, answers, graded=True)


def _is_rated(row: Row) -> bool:
    return first_filled(row, ANSWER_COLUMNS) is not None and _first_number(row, _RATINGS) is not None


def _read_rated(reader: RowReader) -> AnswerSet:
    """Read HelpSteer rows with one rated answer each; all answers of the file to one prompt are compared."""
    name, value = reader.first(ANSWER_COLUMNS) or ("response", None)
    rating = _first_number(reader.row, _RATINGS)
    score = None if rating is None else reader.number(rating)
    if score is None:
        raise reader.bad("missing_key", f"none of {', '.join(_RATINGS)} is a number ({reader.keys()})")
    labels = tuple(number for attribute in ATTRIBUTES if (number := reader.number(attribute)) is not None)
    answer_set = _answer_set(reader, [(name, value, score)], graded=True)
    answers = tuple(replace(answer, labels=labels or None) for answer in answer_set.answers)
    return replace(answer_set, answers=answers, merged=True)


def _answer_set(reader: RowReader, answers: list[RawAnswer], *, graded: bool = False) -> AnswerSet:
    """Return the prompt with its scored answers. Raises BadRow when the answers have different prompts."""
    scored: list[Answer] = []
    prompt: Turns = ()
    for index, (place, value, score) in enumerate(answers):
        own, text = reader.answer(value, place, transcript=_is_transcript(value) and reader.prompt_column() is None)
        if not text.strip():
            raise reader.bad("empty", f"the answer in `{place}` is empty")
        prompt = own if index == 0 else prompt
        require_same_prompt(prompt, own, reader.source, f"`{answers[0][0]}` and `{place}`")
        scored.append(Answer(text, score, source=reader.source))
    weight = reader.number("weight", at_least=0)
    return AnswerSet(prompt, tuple(scored), None, 1.0 if weight is None else weight, graded)


def _has_prompt(row: Row) -> bool:
    return row.get("prompt") is not None or first_filled(row, PROMPT_COLUMNS) is not None


# In the order in which `auto` tries them.
FORMS: tuple[Form, ...] = (
    Form(
        "best_of_n",
        lambda row: (
            _both(row) and not all(isinstance(row[k], str) or _is_messages(row[k]) for k in ("chosen", "rejected"))
        ),
        _read_best_of_n,
        "`chosen` and `rejected` as lists of answers",
    ),
    Form(
        "messages",
        lambda row: _both(row) and any(_is_messages(row[key]) for key in ("chosen", "rejected")),
        _read_messages,
        "`chosen` and `rejected` as chat messages",
    ),
    Form(
        "transcript",
        lambda row: _both(row) and any(_is_transcript(row[key]) for key in ("chosen", "rejected")),
        _read_transcript,
        "`chosen` and `rejected` as Human:/Assistant: texts",
    ),
    Form("prompt", lambda row: _both(row) and _has_prompt(row), _read_prompt, "`prompt`, `chosen`, `rejected`"),
    Form("text", _both, _read_text, "`chosen` and `rejected` as whole texts"),
    Form(
        "two_responses",
        lambda row: _two_columns(row) is not None and any(row.get(key) is not None for key in _PREFERENCES),
        _read_two_responses,
        "`response1`, `response2`, `overall_preference`",
    ),
    Form("ranked", _is_ranked, _read_ranked, "`completions` with a `rank` each"),
    Form("rated_list", _is_rated_list, _read_rated_list, "`completions` with a rating each"),
    Form("rated", _is_rated, _read_rated, "`prompt`, `response` and a rating"),
)
FORMATS = ("auto", *(form.name for form in FORMS), "nemo_aligner")
_BY_NAME = {form.name: form for form in FORMS}


def find_form(row: Any, format: str = "auto") -> Form | None:
    """Return the form of a row, or None; a `format` other than auto is returned without a check."""
    if format != "auto":
        return _BY_NAME[format]
    return next((form for form in FORMS if form.matches(row)), None) if isinstance(row, dict) else None


def read_answer_set(row: Any, source: str, format: str = "auto", columns: Columns | None = None) -> AnswerSet:
    """Read the prompt and the answers of one row of any form in FORMS.

    Turns from several places (a prompt column, a system column, the conversations) are joined, see
    `messages.join_turns`. The last assistant turn is the answer; the turns before it must be equal for all answers.

    Raises BadRow with the reasons wrong_type, missing_key, empty, identical, different_prompts, no_answer, bad_value,
    unread_content.
    """
    reader = RowReader(row, source, columns)
    form = find_form(reader.row, format) or _BY_NAME["text"]
    _refuse_repeated_prompt(reader, form, format)
    answer_set = form.read(reader)
    reader.finish()
    return replace(answer_set, dropped=reader.columns.dropped(row))


def _refuse_repeated_prompt(reader: RowReader, form: Form, format: str) -> None:
    """Raise BadRow when both answers begin with the whole prompt: they may contain it or quote it."""
    name = reader.prompt_column() or "prompt"
    prompt = reader.row.get(name)
    if format != "auto" or form.name != "prompt" or not isinstance(prompt, str) or len(prompt.split()) < 3:
        return
    texts = [reader.row[key] for key in ("chosen", "rejected")]
    if all(isinstance(text, str) and text.lstrip().startswith(prompt.strip()) for text in texts):
        raise reader.bad(
            "different_prompts",
            f"`chosen` and `rejected` both begin with the whole `{name}`: set data.format=text (they contain it) or "
            "data.format=prompt (they quote it)",
        )


def _known() -> str:
    return "; ".join(form.keys for form in FORMS)
