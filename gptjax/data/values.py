"""JSON and Arrow values as Python values, with a placeholder for those that Python cannot represent."""

from __future__ import annotations

import itertools
import json
from typing import Any


class Unreadable:
    """Placeholder of a value that Python cannot represent: an error only if the value is used.

    reason: the predicate of a sentence, as "is not UTF-8 (invalid start byte at byte offset 3)".
    """

    def __init__(self, reason: str):
        self.reason = reason

    def __repr__(self) -> str:
        return f"<a value that {self.reason}>"


def parse_json(text: str | bytes) -> Any:
    """json.loads, but an integer with more digits than Python converts becomes an Unreadable.

    ValueError: not JSON, not UTF-8, or nested too deep for Python's parser.
    """
    try:
        return json.loads(text)
    except (json.JSONDecodeError, UnicodeDecodeError):
        raise
    except RecursionError:
        raise ValueError("lists or objects are nested too deep") from None
    except ValueError:  # from int(), which is limited to sys.get_int_max_str_digits() digits
        pass
    try:
        return json.loads(text, parse_int=_integer)
    except RecursionError:
        raise ValueError("lists or objects are nested too deep") from None


def _integer(digits: str) -> Any:
    try:
        return int(digits)
    except ValueError:
        return Unreadable(f"is an integer of {len(digits)} digits")


def python_values(array: Any) -> list:
    """to_pylist() of a pyarrow array, with an Unreadable for each value, at any depth, that Python cannot represent:
    nanoseconds, dates out of range, unknown time zones, strings that are not UTF-8."""
    import pyarrow.types as kinds

    try:
        return array.to_pylist()
    except Exception:  # any error of any type: convert each value separately
        pass
    kind = array.type
    if kinds.is_struct(kind):
        names = [field.name for field in kind]
        fields = [python_values(array.field(i)) for i in range(len(names))]
        rows = [dict(zip(names, row, strict=True)) for row in zip(*fields, strict=True)]
        return [row if valid else None for row, valid in zip(rows, array.is_valid().to_pylist(), strict=True)]
    if kinds.is_list(kind) or kinds.is_large_list(kind) or kinds.is_fixed_size_list(kind):
        items = iter(python_values(array.flatten()))
        lengths = array.value_lengths().to_pylist()
        return [None if n is None else list(itertools.islice(items, n)) for n in lengths]
    return [_python_value(array[i]) for i in range(len(array))]


def _python_value(scalar: Any) -> Any:
    try:
        return scalar.as_py()
    except UnicodeDecodeError as error:
        return Unreadable(f"is not UTF-8 ({error.reason} at byte offset {error.start})")
    except Exception as error:
        return Unreadable(f"is a {scalar.type} that Python has no value for ({str(error).partition('. ')[0]})")
