"""JSON and JSONL (a value a line) that every parser reads, without NaN, and files that are written atomically."""

import json
import math
import os
from collections.abc import Iterable

from etils import epath


def json_safe(value):
    """A value in JSON's types, at any depth: None for NaN and infinities, numbers and lists for numpy's and JAX's
    arrays."""
    if isinstance(value, dict):
        return {k: json_safe(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [json_safe(v) for v in value]
    if hasattr(value, "tolist"):  # a scalar or an array of numpy or JAX
        return json_safe(value.tolist())
    return None if isinstance(value, float) and not math.isfinite(value) else value


def dumps(value, **options) -> str:
    """json.dumps of what json_safe makes of a value."""
    return json.dumps(json_safe(value), allow_nan=False, **options)


def json_lines(rows: Iterable) -> str:
    """JSONL: `dumps` of each row, a line each."""
    return "".join(dumps(row) + "\n" for row in rows)


def write_json(path, value):
    """Atomic: a reader sees the old file or the new one. Values that are not finite become null (json_safe)."""
    _replace(path, dumps(value, indent=2) + "\n")


def write_json_lines(path, rows: Iterable):
    """Writes `json_lines` as `write_json` does."""
    _replace(path, json_lines(rows))


def read_json_lines(path) -> list:
    """The rows of a file of JSONL."""
    return [json.loads(line) for line in epath.Path(path).read_text().split("\n") if line]


def _replace(path, text: str):
    path = epath.Path(path)
    temporary = path.parent / f".{path.name}.{os.getpid()}.tmp"
    try:
        temporary.write_text(text)
        temporary.replace(path)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise
