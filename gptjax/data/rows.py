"""Shared by the loaders of demonstrations, comparisons, prompts and labeled rows: field names, length checks, dropped
rows, and the train/validation split by text (of a prompt; of a labeled row its input).
"""

from __future__ import annotations

import hashlib
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from etils import epath

from gptjax.config import nearest
from gptjax.data import lm, sources
from gptjax.data.hashing import draw
from gptjax.data.values import Unreadable
from gptjax.errors import InputError
from gptjax.json_files import write_json_lines

BAD_ROWS = ("stop", "drop")
FLAGS = "--config.data."  # prefix of the flags that error messages name
_MAX_ERRORS = 10  # bad rows reported in one error


class TooLong(InputError):
    """A row with too many tokens."""


class AllTied(InputError):
    """A comparison whose completions all have the same rank."""


class Record:
    """A row, accessed by our field names. Null counts as absent.

    fields: our name → the row's name. Unless the row has a field of exactly that name, dots reach into objects and
    lists (`instances.0.output`), and names separated by commas (`instruction,input`) are joined by blank lines, without
    the empty ones. flags: see load.
    """

    def __init__(self, value: Mapping, fields: Mapping[str, str], flags: str | None = FLAGS):
        self._value, self._fields, self._flags = value, fields, flags

    def __contains__(self, name: str) -> bool:
        return self._found(name) is not None

    def __getitem__(self, name: str) -> Any:
        """Value of a field. InputError: the row does not have it, or one of several joined fields is not text."""
        found = self._found(name)
        if found is None:
            present = ", ".join(repr(field) for field in self._value if self._value[field] is not None)
            fix = f"Name the one to use with {FLAGS}fields.{name}=NAME (NAME,NAME joins two)."
            if self._flags is None:
                fix = f"Rename the one to use to {name!r}."
            raise InputError(f"There is no field {self._field(name)!r}, only {present or 'empty ones'}. {fix}")
        if isinstance(found, Unreadable):
            raise InputError(f"The field {self._field(name)!r} {found.reason}: fix or remove the row.")
        return found

    def text(self, name: str) -> str:
        """A field that is text; several, whose names are joined by commas, joined by spaces. InputError: not text."""
        joined = "," in self._field(name) and reach(self._value, self._field(name)) is None
        parts = self.values(name) if joined else [self[name]]
        for part in parts:
            if not isinstance(part, str):
                kind = type(part).__name__
                raise InputError(f"The field {self._field(name)!r} is {kind}, not text: fix the row.")
        return " ".join(parts)

    def values(self, name: str) -> list:
        """The values of a field that holds a list, or those of several fields whose names are joined by commas; there,
        empty ones at the end count as absent. InputError: there is none, or the field is not a list."""
        field = self._field(name)
        if "," in field and reach(self._value, field) is None:
            found = [reach(self._value, part) for part in field.split(",")]
            while found and found[-1] in (None, ""):
                found.pop()
            if found:
                return found
        found = self[name]
        if not isinstance(found, list):
            raise InputError(f"The field {field!r} is {type(found).__name__}, not a list: fix the row.")
        return found

    def _field(self, name: str) -> str:
        return self._fields.get(name, name)

    def _found(self, name: str) -> Any:
        field = self._field(name)
        found = reach(self._value, field)
        if found is not None or "," not in field:
            return found
        parts = [(part, reach(self._value, part)) for part in field.split(",")]
        if parts[0][1] is None:
            return None
        for part, text in parts:
            if text is not None and not isinstance(text, str):
                raise InputError(
                    f"The field {part!r} is {type(text).__name__}, but only texts can be joined: fix the row, or name "
                    "other fields."
                )
        return "\n\n".join(text for _, text in parts if text)


def reach(value: Any, path: str) -> Any:
    """The value at a path of names and list indices joined by dots; None if there is none. A name may contain dots."""
    if isinstance(value, list):
        index, _, rest = path.partition(".")
        if not index.isdecimal() or int(index) >= len(value):
            return None
        return reach(value[int(index)], rest) if rest else value[int(index)]
    if not isinstance(value, Mapping):
        return None
    if path in value:
        return value[path]
    for end in (i for i, character in enumerate(path) if character == "."):
        if path[:end] in value and (found := reach(value[path[:end]], path[end + 1 :])) is not None:
            return found
    return None


class LeftOut:
    """The rows of a source that were dropped, and why. str() counts them: '3 too long, 2 all ties'."""

    def __init__(self, rows: Iterable[tuple[str, str, str]] = ()):
        self._rows = list(rows)  # (where, why, reason)

    def __len__(self) -> int:
        return len(self._rows)

    def __add__(self, other: LeftOut) -> LeftOut:
        return LeftOut(self._rows + other._rows)

    def __str__(self) -> str:
        return ", ".join(f"{count:,} {why}" for why, count in Counter(why for _, why, _ in self._rows).items())

    def add(self, where: str, error: InputError, reason: str) -> None:
        """Adds the row at `where`, dropped because of `error`. reason: its message, as it is shown."""
        kinds = {TooLong: "too long", AllTied: "all ties"}
        self._rows.append((where, kinds.get(type(error), "bad"), reason))

    def first(self) -> str:
        """The first dropped row of each kind, as sentences."""
        kinds = {why: f"{where}: {reason}" for where, why, reason in reversed(self._rows)}
        return " ".join(kinds.values())

    def describe(self) -> str:
        """', dropped: 3 too long (dropped_rows.jsonl)', a clause for the message about a run's data; '' if none was."""
        return f", dropped: {self} (dropped_rows.jsonl)" if self._rows else ""

    def write(self, workdir) -> None:
        """Writes dropped_rows.jsonl, a line {'row', 'why', 'reason'} for each row; replaces or removes an old one."""
        path = epath.Path(workdir) / "dropped_rows.jsonl"
        if self._rows:
            write_json_lines(path, (dict(zip(("row", "why", "reason"), row, strict=True)) for row in self._rows))
        else:
            path.unlink(missing_ok=True)


def check_config(c: Any, names: Sequence[str], used: Sequence[str] | None = None) -> None:
    """Checks what the data configs share. names: our field names; used: those that are read, by default all.

    InputError: `fields` for an unknown name, or one field for two names; max_length below 1; a validation fraction
    outside (0, 1); an unknown bad_rows.
    """
    for name, field in c.fields.items():
        if name not in names:
            raise InputError(f"data.fields has the unknown name {name!r}{nearest(name, names)}")
        if not isinstance(field, str):
            raise InputError(f"data.fields.{name}={field!r} is not the name of a field: give text.")
    by_field: dict[str, str] = {}
    for name in names if used is None else used:
        field = c.fields.get(name, name)
        if field in by_field:
            implicit = " The prompt needs no field if chosen and rejected begin with it." if "chosen" in names else ""
            raise InputError(
                f"data.fields.{by_field[field]} and data.fields.{name} are both {field!r}, so one text would be used "
                f"for both: give another name for one of them.{implicit}"
            )
        by_field[field] = name
    if c.bad_rows not in BAD_ROWS:
        raise InputError(f"data.bad_rows={c.bad_rows!r} is unknown: use {' or '.join(map(repr, BAD_ROWS))}.")
    if c.max_length is not None and c.max_length < 1:
        raise InputError(f"data.max_length={c.max_length} leaves no room for tokens: give at least 1.")
    fraction = fraction_of(getattr(c, "validation", "0.5"))
    if fraction is not None and not 0 < fraction < 1:
        raise InputError(
            f"data.validation={c.validation} is out of range: give a fraction between 0 and 1, or another source."
        )


def limit(max_length: int | None, length: int) -> int:
    """The maximum number of tokens of a row: max_length, or `length` if it is None. InputError: max_length > length."""
    if max_length is not None and max_length > length:
        raise InputError(
            f"data.max_length={max_length} is more than the {length} tokens that fit into the model's context: lower "
            "it, or leave it unset."
        )
    return length if max_length is None else max_length


def check_length(prompt: int, response: int, most: int, what: str) -> None:
    """TooLong: prompt and response (with end-of-text) together have more than `most` tokens. what: the response."""
    if prompt + response > most:
        raise TooLong(
            f"The prompt has {prompt} tokens and the {what} {response} with end-of-text, together more than {most}. "
            f"Raise max_length (up to the model's context), shorten the row, or drop such rows with "
            f"{FLAGS}drop_long=True."
        )


def load(
    source: str | None, c: Any, make: Callable[[Record], Any], flags: str | None = FLAGS
) -> tuple[list, LeftOut]:
    """Reads a source and applies `make` to each row.

    Args:
        c: the config: its fields, drop_long and bad_rows.
        flags: prefix of the flags that errors name; None = there are no flags.
    Returns:
        (make(row) of each row, the dropped rows). Dropped are comparisons whose ranks are all equal, rows that are too
        long if c.drop_long, and rows with any other error if c.bad_rows is 'drop'.
    Raises:
        InputError: no source, no row left, or bad rows: the first ten, each with its place and error.
    """
    if source is None:
        raise InputError(f"There is no data to read: give {FLAGS}source=PATH.")
    made, left_out, wrong = [], LeftOut(), []

    def reject(where: str, error: InputError) -> None:
        reason = str(error) if flags is None else str(error).replace(FLAGS, flags)
        if isinstance(error, TooLong):  # not of labeled rows, which are cut
            dropped = getattr(c, "drop_long", False)
        else:
            dropped = isinstance(error, AllTied) or c.bad_rows == "drop"
        if dropped:
            left_out.add(where, error, reason)
        else:
            wrong.append((where, error, reason))
            if len(wrong) == _MAX_ERRORS:
                raise InputError(_message(wrong, made, flags)) from None

    columns = getattr(c, "columns", None)
    table = sources.Table(getattr(c, "format", None), columns and tuple(name.strip() for name in columns.split(",")))
    for row in sources.rows(source, reject, table):
        try:
            made.append(make(Record(row.value, c.fields, flags)))
        except InputError as error:
            reject(row.where, error)
    if wrong:
        raise InputError(_message(wrong, made, flags))
    if not made:
        raise InputError(
            f"All {len(left_out)} rows of the source {source!r} were dropped ({left_out}). {left_out.first()}"
        )
    if len(left_out) > len(made):
        warnings.warn(
            f"More rows of the source {source!r} are dropped ({left_out}) than used ({len(made):,}). "
            f"{left_out.first()}",
            stacklevel=2,
        )
    return made, left_out


def _message(wrong: list[tuple[str, InputError, str]], good: list, flags: str | None) -> str:
    """One message for all bad rows; rows with the same reason are listed together. good: the rows without an error."""
    places: dict[str, list[str]] = {}
    for where, _, reason in wrong:
        places.setdefault(reason, []).append(where)
    lines = [f"{_joined(where)}: {reason}" for reason, where in places.items()]
    can_drop = good and flags is not None and not all(isinstance(error, TooLong) for _, error, _ in wrong)
    fix = f"Or drop such rows with {flags}bad_rows=drop." if can_drop else ""
    if len(wrong) == 1:
        return f"{lines[0]} {fix}".rstrip()
    count = f"The first {len(wrong)} bad rows" if len(wrong) == _MAX_ERRORS else f"There are {len(wrong)} bad rows"
    return "\n  ".join([f"{count}:", *lines]) + (f"\n{fix}" if fix else "")


def _joined(places: list[str]) -> str:
    """'x.jsonl:3, 5, y.jsonl:1' of 'x.jsonl:3', 'x.jsonl:5', 'y.jsonl:1'."""
    listed, last = [], None
    for place in places:
        file = place.rstrip("0123456789")
        listed.append(place[len(file) :] if file == last else place)
        last = file
    return ", ".join(listed)


def load_split(
    c: Any, make: Callable[[Record], tuple[str, Any]], seed: int, flags: str | None = FLAGS
) -> tuple[list, list, LeftOut]:
    """(training examples, validation examples, dropped rows) of c.source. make: record → (text of its prompt, example).

    Which prompts are held out depends only on the seed and their text, except that each split gets at least one; rows
    with the same prompt stay together. Warns if fewer than lm.FEW rows are held out.
    InputError: as `load`, or a source with a single prompt.
    """
    made, left_out = load(c.source, c, make, flags)
    if fraction_of(c.validation) is None:
        held_out, more = load(c.validation, c, make, flags)
        train, held_out, left_out = [e for _, e in made], [e for _, e in held_out], left_out + more
    else:
        train, held_out = hold_out(made, fraction_of(c.validation), seed, c.source)
    warn_if_few(train, held_out, c.source)
    return train, held_out, left_out


def hold_out(
    made: list[tuple[str, Any]], fraction: float, seed: int, source: str, key: str = "validation", what: str = "prompt"
) -> tuple[list, list]:
    """(training examples, validation examples) of (text, example) pairs; examples with the same text stay together, as
    in load_split. key: of the config, what: the text is, for messages."""
    draws = {text: draw(seed, text) for text, _ in made}
    if len(draws) < 2:
        raise InputError(
            f"The source {source!r} has only one {what}, so none can be held out: give another source with "
            f"{FLAGS}{key}=PATH."
        )
    # At least the text with the lowest draw is held out, and the one with the highest is not.
    bound = min(max(int(fraction * 2**64), min(draws.values()) + 1), max(draws.values()))
    return [e for text, e in made if draws[text] >= bound], [e for text, e in made if draws[text] < bound]


def warn_if_few(train: list, held_out: list, source: str, key: str = "validation") -> None:
    if len(held_out) < lm.FEW:
        warnings.warn(
            f"Only {len(held_out)} of the {len(train) + len(held_out)} rows of {source!r} are held out, fewer than "
            f"{lm.FEW}, so validation metrics are noisy: hold out more with {FLAGS}{key}.",
            stacklevel=2,
        )


def prompt_text(prompt: str | Sequence[dict]) -> str:
    """The text that identifies a prompt: its own, or that of the turns before the first answer."""
    if isinstance(prompt, str):
        return prompt
    roles = [message["role"] for message in prompt]
    end = roles.index("assistant") if "assistant" in roles else len(roles)
    return "\n".join(message["content"] for message in prompt[:end])


def fingerprint(arrays: Iterable[np.ndarray]) -> str:
    """SHA-256 (hex) of arrays: contents, dtypes, shapes and order."""
    digest = hashlib.sha256()
    for array in arrays:
        digest.update(f"{array.dtype.str}{array.shape}".encode())
        digest.update(np.ascontiguousarray(array).tobytes())
    return digest.hexdigest()


def fraction_of(validation: str) -> float | None:
    """The fraction held out; None if `validation` names another source."""
    try:
        return float(validation)
    except ValueError:
        return None
