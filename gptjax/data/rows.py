"""What the loaders of demonstrations, comparisons and prompts share: rows under our names, their length,
the prompts that are held out, and validation's batches.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from gptjax.config import nearest
from gptjax.data import sources
from gptjax.errors import InputError


class TooLong(InputError):
    """A row with more tokens than fit."""


class Record:
    """One row under our names. fields: our name → the row's name. Null counts as absent."""

    def __init__(self, value: dict, fields: Mapping[str, str]):
        self._value = {name: content for name, content in value.items() if content is not None}
        self._fields = fields

    def __contains__(self, name: str) -> bool:
        return self._fields.get(name, name) in self._value

    def __getitem__(self, name: str) -> Any:
        """InputError: the row has no such field."""
        field = self._fields.get(name, name)
        if field not in self._value:
            raise InputError(
                f"no field {field!r}; the row has {', '.join(map(repr, self._value)) or 'none'}: name the one that "
                f"holds it with --config.data.fields.{name}=NAME"
            )
        return self._value[field]


def check_config(c: Any, names: Sequence[str]) -> None:
    """InputError: `fields` for a name that isn't one of ours, a max_length under 1, a share outside (0, 1)."""
    for name, field in c.fields.items():
        if name not in names:
            raise InputError(f"data.fields has the unknown name {name!r}{nearest(name, names)}")
        if not isinstance(field, str):
            raise InputError(f"data.fields.{name}={field!r} isn't the name of a field; give text")
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
            "--config.data.drop_long=True"
        )


def load(source: str | None, c: Any, make: Callable[[Record], Any]) -> tuple[list, int]:
    """(what `make` made of each row, how many rows were left out: too long, or None from `make`).

    InputError: no source, no row left; and `make`'s own, with the row's place put before it.
    """
    if source is None:
        raise InputError("there is no data to read; give --config.data.source=PATH")
    made, dropped = [], 0
    for row in sources.rows(source):
        try:
            example = make(Record(row.value, c.fields))
        except InputError as error:
            if not (isinstance(error, TooLong) and c.drop_long):
                raise InputError(f"{row.where}: {error}") from None
            example = None
        if example is None:
            dropped += 1
        else:
            made.append(example)
    if not made:
        raise InputError(f"source {source!r}: all {dropped} rows were left out; raise max_length or name another")
    return made, dropped


def load_split(c: Any, make: Callable[[Record], tuple[str, Any] | None], seed: int) -> tuple[list, list, int]:
    """(train, validation, rows left out) of c.source. make: record → (its prompt's text, example).

    Which prompts are held out depends on seed and their text alone, as far as each side gets one; rows of
    one prompt stay together. InputError: as `load`, or one prompt alone to share out.
    """
    made, dropped = load(c.source, c, make)
    share = _share(c.validation)
    if share is None:
        held_out, more = load(c.validation, c, make)
        return [e for _, e in made], [e for _, e in held_out], dropped + more
    draws = {prompt: _draw(seed, prompt) for prompt, _ in made}
    if len(draws) < 2:
        raise InputError(
            f"source {c.source!r} has one prompt only, so none can be held out; name another source with "
            "--config.data.validation=PATH"
        )
    # Else the prompt with the lowest draw is held out, or the one with the highest kept.
    bound = min(max(int(share * 2**64), min(draws.values()) + 1), max(draws.values()))
    train = [e for prompt, e in made if draws[prompt] >= bound]
    return train, [e for prompt, e in made if draws[prompt] < bound], dropped


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
