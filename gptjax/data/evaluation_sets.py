"""Evaluation sets as texts: which of them occur in a corpus is asked by contamination and by curation."""

from collections.abc import Iterator

from gptjax import paths
from gptjax.data import sources
from gptjax.data.formats import may_hold_rows
from gptjax.errors import InputError


def evaluation_sets(path: str, fields: list[str] | None) -> dict[str, list[str]]:
    """{name: texts of its items}. fields: of the rows, joined by spaces; None = all text in a row. InputError: no rows,
    an item without text, or two files of one name."""
    root = paths.local(path)
    files = [root]
    if root.is_dir():
        files = sorted(file for file in root.iterdir() if may_hold_rows(file.name))
        if not files:
            raise InputError(f"{path} has no file of rows: give .jsonl, .json, .csv, .tsv or .parquet files.")
    sets = {}
    for file in files:
        items = []
        for row in sources.rows(str(file)):
            missing = [name for name in fields or () if name not in row.value]
            if missing:
                there = ", ".join(map(repr, row.value))
                raise InputError(f"{row.where}: There is no field {missing[0]!r}, only {there}: change --fields.")
            text = " ".join(_texts([row.value[name] for name in fields] if fields else row.value))
            if not text.strip():
                raise InputError(f"{row.where}: The row has no text: remove it, or name its fields by --fields.")
            items.append(text)
        if (name := file.stem) in sets:
            raise InputError(f"{path} has two files of the name {name!r}, as their results would have: rename one.")
        sets[name] = items
    return sets


def _texts(value) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list):
        for part in value.values() if isinstance(value, dict) else value:
            yield from _texts(part)
