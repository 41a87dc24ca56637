"""Where a task's rows are: the files under --data that its patterns find, of one split."""

import re
from collections.abc import Sequence
from pathlib import Path

from gptjax import paths
from gptjax.errors import InputError
from gptjax.tasks.task import Task, fields_of

_TRAIN = re.compile(r"(?<![a-z])train(?:ing)?(?![a-z])", re.IGNORECASE)
_SPLIT = re.compile(r"(?<![a-z])(?:(val|valid|validation|dev)|(test))(?![a-z])", re.IGNORECASE)


def find_files(task: Task, data: str, patterns: Sequence[str]) -> list[str]:
    """What the first pattern with files finds in a folder: a file, or several of one split. InputError: none of them is
    there, or what is there is of several splits."""
    if paths.local(data).is_file():
        return [str(data)]
    if found := _found(task, Path(paths.local(data)), patterns):
        return found
    fields = " or ".join(", ".join(sorted(fields_of(form))) for form in task.form)
    published = "as published, or " if task.prepare else ""
    rows = f"rows (.jsonl, .json, .csv, .tsv, .parquet) {published}with the fields {fields}"
    raise InputError(
        f"{data} has no file for the task {task.name}: it looks for {', '.join(patterns) or 'none'}, "
        f"{'text, a line for each item' if task.lines else rows}."
    )


def task_files(task: Task, data: str | None) -> list[str]:
    """The files with a task's rows; none where the task file has the rows itself. InputError: as find_files, and where
    there is no data to look in."""
    if task.rows:
        return []
    if data is None:
        raise InputError(f"The task {task.name} needs --data=DIR, the folder with its files.")
    return find_files(task, data, task.files)


def find_joined(task: Task, data: str | None) -> str | None:
    """The table whose columns are added to the task's rows; if data is a file, next to it. None: there is none."""
    if not task.join or data is None:
        return None
    path = Path(paths.local(data))
    return next(iter(_found(task, path.parent if path.is_file() else path, task.join)), None)


def find_pool(task: Task, data: str) -> list[str]:
    """The files with the rows that examples are drawn from; if data is a file, next to it. Empty: there are none but
    those that are evaluated. InputError: the task needs them, for its threshold."""
    path = Path(paths.local(data))
    folder = path.parent if path.is_file() else path
    evaluated = [str(path)] if path.is_file() else _found(task, folder, task.files)
    found = [file for file in _found(task, folder, task.pool) if file not in evaluated]
    if not found and task.pool and task.kind == "threshold":
        raise InputError(
            f"{folder} has no rows to find the threshold of task {task.name} on: it looks for {', '.join(task.pool)}."
        )
    return found


def _found(task: Task, root: Path, patterns: Sequence[str]) -> list[str]:
    for pattern in patterns:
        found = [p for p in sorted(root.glob(pattern)) if _TRAIN.search(pattern) or not _TRAIN.search(p.name)]
        splits = {match.lastindex for p in found if (match := _SPLIT.search(p.name))}
        if len(splits) > 1:
            raise InputError(
                f"For the task {task.name} {root} has files of several splits ({', '.join(p.name for p in found)}): "
                "leave there the one to be evaluated, or give it with --data=FILE."
            )
        if found:
            return [str(path) for path in found]
    return []
