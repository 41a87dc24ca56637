"""The items of a task from files of rows, and how many of their questions are not asked."""

import collections
import itertools
import json
from collections.abc import Iterable, Mapping
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


def load(task: Task, *files: str) -> Loaded:
    """All items of files of rows. InputError: a row that has none of the task's forms, or whose answer is empty."""
    prepare = function(task.prepare) if task.prepare else lambda row: [row]
    items, not_asked = [], collections.Counter()
    for row in itertools.chain.from_iterable(_rows(task, file) for file in files):
        try:
            prepared = prepare(row.value)
            for value in [prepared] if isinstance(prepared, Mapping | NotAsked) else prepared:
                if isinstance(value, NotAsked):
                    not_asked[value.why] += 1
                else:
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


def _rows(task: Task, source: str) -> Iterable[sources.Row]:
    """The rows of a source; of texts, whose files need no rows, {text} of each."""
    if task.kind == "text" and paths.local(source).is_file() and not may_hold_rows(source):
        return [sources.Row(document.name, {"text": document.text}) for document in sources.documents(source)]
    if task.prepare and (whole := _one_object(source)):
        return [sources.Row(str(source), whole)]
    return sources.rows(source, table=Table(columns=task.columns or None))


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
