"""JSON files that came with a checkpoint: whatever they hold ends in an object or in one error."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from nemo_advrm.errors import CheckpointError, UserError
from nemo_advrm.place import one_line

# the vocabulary of a tokenizer has some 20 MB
MAX_BYTES = 256 << 20


def read_json_object(path: Path, error: type[UserError] = CheckpointError, what: str = "") -> dict[str, Any]:
    """The object in a file.

    Raises ``error`` that names the file, after ``what``: it cannot be read, is larger than such a file is, is no JSON
    (numbers of thousands of digits and thousands of brackets are none either), or holds something else.
    """
    start = f"{what or path}: "
    name = f"{path.name}: " if what else ""
    try:
        if path.stat().st_size > MAX_BYTES:
            raise ValueError(f"has more than {MAX_BYTES} bytes")
        value = json.loads(path.read_text(encoding="utf-8"))
    except RecursionError:
        raise error(f"{start}not JSON ({name}nested too deeply)") from None
    except OSError as problem:
        raise error(f"{start}cannot be read ({name}{problem.strerror or problem})") from None
    except ValueError as problem:
        raise error(f"{start}not JSON ({name}{one_line(problem, 200)})") from None
    if not isinstance(value, dict):
        raise error(f"{start}not a JSON object{f' ({path.name})' if what else ''}")
    return value
