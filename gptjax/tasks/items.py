"""The items of a task from files of rows, and how many of their questions are not asked."""

import collections
import itertools
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import NamedTuple

from gptjax import paths
from gptjax.data import sources
from gptjax.data.formats import may_hold_rows
from gptjax.data.tables import Table
from gptjax.errors import InputError
from gptjax.tasks.task import Item, Task, function, make_item


class NotAsked(NamedTuple):
    """What a prepare function returns in place of a row that its data set's own scorer leaves out. why: what such rows
    are, in the plural. They are counted; any other row that cannot be used is an error."""

    why: str


class Loaded(NamedTuple):
    """items, and {why: how many rows are not asked}."""

    items: list[Item]
    not_asked: dict[str, int]


def load(task: Task, *files: str, join: str | None = None) -> Loaded:
    """All items of files of rows. join: the file of task.join. InputError: a row that has none of the task's forms, or
    whose answer is empty."""
    prepare = function(task.prepare) if task.prepare else lambda row: [row]
    added = _joined(task, join) if join else {}
    items, not_asked = [], collections.Counter()
    for row in itertools.chain(_own_rows(task), *(_rows(task, file) for file in files)):
        try:
            prepared = prepare(row.value)
            for value in [prepared] if isinstance(prepared, Mapping | NotAsked) else prepared:
                if isinstance(value, NotAsked):
                    not_asked[value.why] += 1
                    continue
                value = {**added.get(_key(task, value), {}), **value} if added else value
                items.append(make_item(task, value, row.where))
        except InputError as error:
            raise InputError(f"{row.where}: {error}") from None
        except (AttributeError, LookupError, TypeError, ValueError) as error:  # of a prepare function
            raise InputError(f"{row.where}: {task.prepare} cannot read the row ({error!r}): fix it.") from None
    if not items:
        only = f" but {', '.join(not_asked)}" if not_asked else ""
        raise InputError(f"{', '.join(files)}: no rows{only} for the task {task.name}.")
    return Loaded(items, dict(not_asked))


def load_items(task: Task, *files: str) -> list[Item]:
    """The items of `load`."""
    return load(task, *files).items


def _own_rows(task: Task) -> Iterable[sources.Row]:
    return (sources.Row(f"{task.name}.toml, row {i}", dict(row)) for i, row in enumerate(task.rows, 1))


def _rows(task: Task, source: str) -> Iterable[sources.Row]:
    """The rows of a source; of texts, whose files need no rows, {text} of each."""
    if task.lines:
        lines = sources.documents(source, lines=True)
        return (sources.Row(line.name, {"line": line.text, "file": Path(source).name}) for line in lines)
    if task.kind == "text" and paths.local(source).is_file() and not may_hold_rows(source):
        return [sources.Row(document.name, {"text": document.text}) for document in sources.documents(source)]
    if task.prepare and (whole := _one_object(source)):
        return [sources.Row(str(source), whole)]
    return sources.rows(source, table=Table(columns=task.columns or None))


def _joined(task: Task, file: str) -> dict[tuple[str, ...], dict]:
    """The rows of a table by what they have in common with the task's."""
    found = {}
    for row in sources.rows(file):
        if missing := [name for name in task.join_on if name not in row.value]:
            raise InputError(
                f"{row.where}: there is no column {missing[0]!r} to join with the rows of task {task.name} by, only "
                f"{', '.join(map(repr, row.value))}."
            )
        found[_key(task, row.value)] = row.value
    return found


def _key(task: Task, row: Mapping) -> tuple[str, ...]:
    return tuple(str(row.get(name)) for name in task.join_on)


def _one_object(source: str) -> dict | None:
    """The object that a .json file consists of, as SQuAD's and its successors'; None where it has rows."""
    path = paths.local(source)
    if path.suffix != ".json" or not path.is_file():
        return None
    try:
        value = json.loads(path.read_bytes())
    except ValueError:  # an object a line, or nothing that can be read: sources.rows says which
        return None
    return value if isinstance(value, dict) else None
