"""A document on its way through the steps, and what a step says of it."""

from __future__ import annotations

import dataclasses
from typing import Any


@dataclasses.dataclass(slots=True)
class Document:
    """A text and what is known of it.

    id: 'file:line', unique by construction; a piece of a document that was split has '#1', '#2', ... after it.
    fields: the other fields of its row. scores: what steps computed of it, by name. edits: how many places steps
    changed, by kind. place: its number in its shard, as it was read. row: its number in the shard as the current phase
    sees it. read: its characters when it was read.
    """

    id: str
    text: str
    fields: dict[str, Any] = dataclasses.field(default_factory=dict)
    scores: dict[str, float] = dataclasses.field(default_factory=dict)
    edits: dict[str, int] = dataclasses.field(default_factory=dict)
    place: int = 0
    row: int = 0
    read: int = 0

    def __post_init__(self):
        self.read = self.read or len(self.text)


@dataclasses.dataclass(frozen=True, slots=True)
class Drop:
    """What a step returns for a document that it removes. reason: which of its rules, in few words; score: the figure
    that decided; twin: id of the kept document that this one repeats; detail: anything else that a reader needs."""

    reason: str
    score: float | None = None
    twin: str | None = None
    detail: str | None = None


@dataclasses.dataclass(frozen=True, slots=True)
class Unreadable:
    """What a reader returns in place of a document. size: bytes that are lost, where they are known."""

    id: str
    reason: str
    detail: str
    size: int = 0


def name_of(step) -> str:
    """The name of a step in the manifest and the report: of a function its own, of an object its attribute `name`, or
    that of its class."""
    return getattr(step, "name", None) or getattr(step, "__name__", None) or type(step).__name__.lower()


def describe(step) -> str:
    """A step with its parameters, as the plan and the report name it."""
    if dataclasses.is_dataclass(step):
        values = ", ".join(f"{f.name}={_shown(getattr(step, f.name))}" for f in dataclasses.fields(step))
        return f"{name_of(step)}({values})"
    return f"{step.__module__}.{step.__qualname__}" if hasattr(step, "__qualname__") else name_of(step)


def _shown(value) -> str:
    return value.__qualname__ if hasattr(value, "__qualname__") else repr(value)
