"""What the loaders of demonstrations, comparisons and prompts share: rows under our names, their length, which are left
out, the prompts that are held out, and validation's batches.
"""

from __future__ import annotations

import hashlib
import json
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from etils import epath

from gptjax.config import nearest
from gptjax.data import lm, sources
from gptjax.data.values import Unreadable
from gptjax.errors import InputError

BAD_ROWS = ("stop", "drop")
FLAGS = "--config.data."  # what the flags that rows' errors name begin with
_MOST_ERRORS = 10  # bad rows named in one error


class TooLong(InputError):
    """A row with more tokens than fit."""


class AllTied(InputError):
    """A comparison that prefers no completion to another."""


class Record:
    """One row under our names. Null counts as absent.

    fields: our name → the row's name. If the row has no field of that very name, dots reach into objects and lists
    (`instances.0.output`), and several names with commas between them are joined by an empty line, but for those
    that are empty (`instruction,input`). flags: see load.
    """

    def __init__(self, value: Mapping, fields: Mapping[str, str], flags: str | None = FLAGS):
        self._value, self._fields, self._flags = value, fields, flags

    def __contains__(self, name: str) -> bool:
        return self._found(name) is not None

    def __getitem__(self, name: str) -> Any:
        """InputError: the row has no such field, or one of several isn't text."""
        found = self._found(name)
        if found is None:
            there = ", ".join(repr(field) for field in self._value if self._value[field] is not None)
            fix = f"name the one that holds it with {FLAGS}fields.{name}=NAME (NAME,NAME joins two)"
            if self._flags is None:
                fix = f"rename the one that holds it to {name!r}"
            raise InputError(f"no field {self._field(name)!r}; the row has {there or 'none'}: {fix}")
        if isinstance(found, Unreadable):
            raise InputError(f"field {self._field(name)!r} {found.reason}; fix or remove the row")
        return found

    def _field(self, name: str) -> str:
        return self._fields.get(name, name)

    def _found(self, name: str) -> Any:
        field = self._field(name)
        found = _reach(self._value, field)
        if found is not None or "," not in field:
            return found
        parts = [(part, _reach(self._value, part)) for part in field.split(",")]
        if parts[0][1] is None:
            return None
        for part, text in parts:
            if text is not None and not isinstance(text, str):
                raise InputError(f"field {part!r} is {type(text).__name__}, not text; only texts can be joined")
        return "\n\n".join(text for _, text in parts if text)


def _reach(value: Any, path: str) -> Any:
    """What lies at a path of names and list places with dots between them, None if nothing: a name may hold dots."""
    if isinstance(value, list):
        place, _, rest = path.partition(".")
        if not place.isdecimal() or int(place) >= len(value):
            return None
        return _reach(value[int(place)], rest) if rest else value[int(place)]
    if not isinstance(value, Mapping):
        return None
    if path in value:
        return value[path]
    for end in (i for i, character in enumerate(path) if character == "."):
        if path[:end] in value and (found := _reach(value[path[:end]], path[end + 1 :])) is not None:
            return found
    return None


class LeftOut:
    """The rows of a source that aren't used, and why. str() counts them: '3 too long, 2 with nothing but ties'."""

    def __init__(self, rows: Iterable[tuple[str, str, str]] = ()):
        self._rows = list(rows)  # (where, why, the error)

    def __len__(self) -> int:
        return len(self._rows)

    def __add__(self, other: LeftOut) -> LeftOut:
        return LeftOut(self._rows + other._rows)

    def __str__(self) -> str:
        return ", ".join(f"{count:,} {why}" for why, count in Counter(why for _, why, _ in self._rows).items())

    def add(self, where: str, error: InputError, reason: str) -> None:
        kinds = {TooLong: "too long", AllTied: "with nothing but ties"}
        self._rows.append((where, kinds.get(type(error), "bad"), reason))

    def first(self) -> str:
        """The first row of each kind."""
        kinds = {why: f"{where}: {reason}" for where, why, reason in reversed(self._rows)}
        return "; ".join(kinds.values())

    def describe(self) -> str:
        """', left out: 3 too long (dropped_rows.jsonl)', for a line that says what a run reads."""
        return f", left out: {self} (dropped_rows.jsonl)" if self._rows else ""

    def write(self, workdir) -> None:
        """dropped_rows.jsonl: a line {'row', 'why', 'reason'} for each, in place of one that was there."""
        path = epath.Path(workdir) / "dropped_rows.jsonl"
        if self._rows:
            lines = (json.dumps(dict(zip(("row", "why", "reason"), row, strict=True))) for row in self._rows)
            path.write_text("".join(f"{line}\n" for line in lines))
        else:
            path.unlink(missing_ok=True)


def check_config(c: Any, names: Sequence[str]) -> None:
    """InputError: `fields` for a name that isn't one of ours, or of one field for two of ours, a max_length under 1, a
    share outside (0, 1), another bad_rows."""
    for name, field in c.fields.items():
        if name not in names:
            raise InputError(f"data.fields has the unknown name {name!r}{nearest(name, names)}")
        if not isinstance(field, str):
            raise InputError(f"data.fields.{name}={field!r} isn't the name of a field; give text")
    by_field: dict[str, str] = {}
    for name in names:
        field = c.fields.get(name, name)
        if field in by_field:
            implicit = "; a prompt that chosen and rejected begin with needs no field" if "chosen" in names else ""
            raise InputError(
                f"data.fields.{by_field[field]} and data.fields.{name} are both {field!r}: one text would be taken for "
                f"both; give another name{implicit}"
            )
        by_field[field] = name
    if c.bad_rows not in BAD_ROWS:
        raise InputError(f"data.bad_rows={c.bad_rows!r} is unknown; there are {' and '.join(BAD_ROWS)}")
    if c.max_length is not None and c.max_length < 1:
        raise InputError(f"data.max_length={c.max_length} leaves room for nothing; give at least 1")
    share = _share(getattr(c, "validation", "0.5"))
    if share is not None and not 0 < share < 1:
        raise InputError(f"data.validation={c.validation} isn't a share between 0 and 1, nor the name of a source")


def limit(max_length: int | None, length: int) -> int:
    """Tokens a row may have: max_length, or all of `length`. InputError: max_length is more than that."""
    if max_length is not None and max_length > length:
        raise InputError(
            f"data.max_length={max_length} is more than the {length} tokens the model has room for; lower it or "
            "leave it unset"
        )
    return length if max_length is None else max_length


def check_length(prompt: int, response: int, most: int, what: str) -> None:
    """TooLong: prompt and response (with end-of-text), in tokens, don't fit into `most`."""
    if prompt + response > most:
        raise TooLong(
            f"the prompt has {prompt} tokens and the {what} {response} with end-of-text, together more than "
            f"{most}; raise max_length (up to the model's context), shorten the row, or leave such rows out with "
            f"{FLAGS}drop_long=True"
        )


def load(
    source: str | None, c: Any, make: Callable[[Record], Any], flags: str | None = FLAGS
) -> tuple[list, LeftOut]:
    """(what `make` made of each row, the rows left out).

    Left out are comparisons with nothing but ties, rows that are too long where c.drop_long, and whatever else is
    wrong with a row where c.bad_rows is 'drop'. flags: how the flags that errors name begin, None = there are none.

    InputError: no source, no row left, or the first ten rows that are wrong, each with its place and its error.
    """
    if source is None:
        raise InputError(f"there is no data to read; give {FLAGS}source=PATH")
    made, left_out, wrong = [], LeftOut(), []

    def refuse(where: str, error: InputError) -> None:
        reason = str(error) if flags is None else str(error).replace(FLAGS, flags)
        dropped = c.drop_long if isinstance(error, TooLong) else isinstance(error, AllTied) or c.bad_rows == "drop"
        if dropped:
            left_out.add(where, error, reason)
        else:
            wrong.append((where, error, reason))
            if len(wrong) == _MOST_ERRORS:
                raise InputError(_message(wrong, made, flags)) from None

    for row in sources.rows(source, refuse):
        try:
            made.append(make(Record(row.value, c.fields, flags)))
        except InputError as error:
            refuse(row.where, error)
    if wrong:
        raise InputError(_message(wrong, made, flags))
    if not made:
        raise InputError(f"source {source!r}: all {len(left_out)} rows were left out: {left_out}; {left_out.first()}")
    if len(left_out) > len(made):
        warnings.warn(
            f"source {source!r}: more rows are left out ({left_out}) than used ({len(made):,}); {left_out.first()}",
            stacklevel=2,
        )
    return made, left_out


def _message(wrong: list[tuple[str, InputError, str]], good: list, flags: str | None) -> str:
    """One message for all the bad rows: places that share a reason are named together. good: the rows that are not."""
    places: dict[str, list[str]] = {}
    for where, _, reason in wrong:
        places.setdefault(reason, []).append(where)
    lines = [f"{_together(where)}: {reason}" for reason, where in places.items()]
    can_drop = good and flags is not None and not all(isinstance(error, TooLong) for _, error, _ in wrong)
    dropped = f" (or leave such rows out with {flags}bad_rows=drop)" if can_drop else ""
    if len(wrong) == 1:
        return lines[0] + dropped
    count = f"the first {len(wrong)} bad rows" if len(wrong) == _MOST_ERRORS else f"{len(wrong)} bad rows"
    return f"{count}{dropped}:\n  " + "\n  ".join(lines)


def _together(places: list[str]) -> str:
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
    """(train, validation, rows left out) of c.source. make: record → (its prompt's text, example).

    Which prompts are held out depends on seed and their text alone, as far as each side gets one; rows of
    one prompt stay together. Fewer than lm.FEW held out are a warning. InputError: as `load`, or one prompt alone to
    share out.
    """
    train, held_out, left_out = _load_split(c, make, seed, flags)
    if len(held_out) < lm.FEW:
        warnings.warn(
            f"{len(held_out)} of the {len(train) + len(held_out)} rows of {c.source!r} are held out, fewer than "
            f"{lm.FEW}, so what is measured on them is noisy; hold out more with {FLAGS}validation",
            stacklevel=2,
        )
    return train, held_out, left_out


def _load_split(c, make, seed, flags):
    made, left_out = load(c.source, c, make, flags)
    share = _share(c.validation)
    if share is None:
        held_out, more = load(c.validation, c, make, flags)
        return [e for _, e in made], [e for _, e in held_out], left_out + more
    draws = {prompt: _draw(seed, prompt) for prompt, _ in made}
    if len(draws) < 2:
        raise InputError(
            f"source {c.source!r} has one prompt only, so none can be held out; name another source with "
            f"{FLAGS}validation=PATH"
        )
    # Else the prompt with the lowest draw is held out, or the one with the highest kept.
    bound = min(max(int(share * 2**64), min(draws.values()) + 1), max(draws.values()))
    train = [e for prompt, e in made if draws[prompt] >= bound]
    return train, [e for prompt, e in made if draws[prompt] < bound], left_out


def prompt_text(prompt: str | Sequence[dict]) -> str:
    """What a prompt is told apart by: its text, or the text of the turns before the first answer."""
    if isinstance(prompt, str):
        return prompt
    roles = [message["role"] for message in prompt]
    end = roles.index("assistant") if "assistant" in roles else len(roles)
    return "\n".join(message["content"] for message in prompt[:end])


def fingerprint(arrays: Iterable[np.ndarray]) -> str:
    """sha256 (hex) of arrays, their shapes and their order."""
    digest = hashlib.sha256()
    for array in arrays:
        digest.update(f"{array.dtype.str}{array.shape}".encode())
        digest.update(np.ascontiguousarray(array).tobytes())
    return digest.hexdigest()


class InOrder:
    """Batches of `count` examples in their order, len() of them, by random access; for validation.

    here: the rows of a batch to give. read: int64 [n] of example numbers, -1 for a row of padding in the last batch →
    dict of arrays.
    """

    def __init__(self, count: int, rows: int, here: np.ndarray, read: Callable[[np.ndarray], dict]):
        self._count, self._rows, self._here, self._read = count, rows, here, read

    def __len__(self) -> int:
        return -(-self._count // self._rows)

    def __getitem__(self, step: int) -> dict[str, Any]:
        if not 0 <= step < len(self):
            raise IndexError(f"batch {step} of {len(self)}")
        index = step * self._rows + self._here
        return self._read(np.where(index < self._count, index, -1))


def _share(validation: str) -> float | None:
    """The share held out, None where another source is named."""
    try:
        return float(validation)
    except ValueError:
        return None


def _draw(seed: int, prompt: str) -> int:
    """A number in [0, 2⁶⁴) that depends on nothing but seed and prompt."""
    digest = hashlib.sha256(f"{seed}:{prompt}".encode("utf-8", "surrogatepass")).digest()
    return int.from_bytes(digest[:8], "big")
