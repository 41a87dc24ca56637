"""Points: what is known of finished runs, read from results.jsonl of a sweep or any CSV, TSV, JSONL or JSON.

A row is a run: N (parameters), D (tokens), C (FLOPs), loss; also steps, learning rate, name, status, seed, metric,
tokenizer, count. Column names are read without regard to case, with the aliases below. Of N, D and C two are enough:
the third is from C = 6 N D. Which rows are left out: those whose status is other than "done". A loss that is not a
positive number, in a row that is not left out, is an error.
"""

import csv
import dataclasses
import hashlib
import io
import json
import math
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from gptjax import paths
from gptjax.config import nearest
from gptjax.errors import InputError
from gptjax.scaling.laws import Law

ALIASES = {
    "N": ("n", "params", "parameters", "n_params", "num_params", "n_parameters", "num_parameters", "model_size"),
    "D": ("d", "tokens", "n_tokens", "num_tokens", "train_tokens", "training_tokens", "dataset_size"),
    "C": ("c", "flops", "flop", "compute", "compute_budget", "budget", "train_flops", "training_flops",
          "training_flop"),
    "S": ("s", "s_min", "steps", "step", "n_steps"),
    "lr": ("lr", "learning_rate", "peak_lr", "max_lr"),
    "loss": ("loss", "final_loss", "val_loss", "valid_loss", "validation_loss", "eval_loss", "test_loss"),
}  # fmt: skip
_MEANING = {"N": "parameters", "D": "tokens", "C": "FLOPs", "S": "steps", "lr": "learning rates", "loss": "the loss"}
_UNITS = 100.0  # C / (6 N D) further than this from 1 cannot be a matter of what is counted


@dataclasses.dataclass(frozen=True)
class Points:
    """Runs, as float64 arrays [n] by column, N, D, C, S, lr and loss; those that the file has no values for are absent.

    names: of the runs, or their places in the file. workdirs: of those that have one. metric, tokenizer, count, rule
    (of C: 6nd or exact): of all of them, or None where the file does not say. left_out: a sentence for each row that is
    not used. sha256: of the file. found: its columns' names.
    """

    columns: dict[str, np.ndarray]
    names: tuple[str, ...]
    workdirs: tuple[str | None, ...] = ()
    metric: str | None = None
    tokenizer: str | None = None
    count: str | None = None
    rule: str | None = None
    left_out: tuple[str, ...] = ()
    path: str = ""
    sha256: str = ""
    found: tuple[str, ...] = ()

    def __len__(self):
        return len(self.names)

    def __getitem__(self, column: str) -> np.ndarray:
        """A column. InputError: the file has none."""
        if column not in self.columns:
            there = ", ".join(map(repr, self.found or self.columns))
            raise InputError(
                f"{self.path or 'points'} has no column for {column}, {_MEANING[column]} (as "
                f"{', '.join(map(repr, ALIASES[column][:4]))}); it has {there}. Name it by --columns={column}=COLUMN."
            )
        return self.columns[column]

    def inputs(self, law: Law) -> np.ndarray:
        """Logs of a law's inputs, [inputs, n]."""
        return np.log(np.stack([self[column] for column in law.inputs]))

    def take(self, which) -> "Points":
        """The points that a mask or indices choose."""
        which = np.arange(len(self))[which]
        columns = {name: values[which] for name, values in self.columns.items()}
        names, workdirs = (tuple(of[i] for i in which) if of else () for of in (self.names, self.workdirs))
        return dataclasses.replace(self, columns=columns, names=names, workdirs=workdirs)


def of_arrays(N=None, D=None, loss=None, **columns) -> Points:
    """Points from arrays [n]; C is 6 N D unless given."""
    given = {"N": N, "D": D, "loss": loss, **columns}
    given = {name: np.asarray(values, float) for name, values in given.items() if values is not None}
    return Points(_completed(given), tuple(str(i + 1) for i in range(len(given["loss"]))))


def _completed(columns):
    if "N" in columns and "D" in columns and "C" not in columns:
        columns["C"] = 6 * columns["N"] * columns["D"]
    elif "N" in columns and "C" in columns and "D" not in columns:
        columns["D"] = columns["C"] / (6 * columns["N"])
    elif "D" in columns and "C" in columns and "N" not in columns:
        columns["N"] = columns["C"] / (6 * columns["D"])
    return columns


# --- reading ----------------------------------------------------------------------------------------------


class _Row(NamedTuple):
    where: str
    value: dict


def read(path: str, columns: dict[str, str] | None = None, where: dict[str, str] | None = None) -> Points:
    """The points of a file. columns: {N, D, C, S, lr or loss: its column's name} where the aliases do not find it.
    where: {column: value}: only the rows that have it.

    InputError: no such file or rows; no column for the loss, or several; a value that is not a positive number; rows in
    different metrics, counts of parameters or of FLOPs, or (unless the metric is bits/byte) tokenizers.
    """
    file = paths.local(path)
    if not file.exists():
        raise InputError(f"There is no file {path}: give the points that a sweep wrote, or a CSV with N, D, loss.")
    content = file.read_bytes()
    rows, cut = _rows(str(path), content)
    found = tuple(dict.fromkeys(key for row in rows for key in row.value))
    for name, value in (where or {}).items():
        if name not in found:
            raise InputError(f"--where: {path} has no column {name!r}{nearest(name, found)}")
        rows = [row for row in rows if str(row.value.get(name)) == value]
    if not rows:
        which = f" with {', '.join(f'{k}={v}' for k, v in where.items())}" if where else ""
        raise InputError(f"{path} has no rows{which}.")
    columns = _columns(str(path), found, columns or {})
    used, left_out = _used(rows, cut)
    if not used:
        raise InputError(f"{path} has no finished run: {left_out[0]}")
    for name in ("N", "D", "C", "S", "lr"):  # a column of nothing is none; steps and rates are of no use unless all say
        if (any if name in ("S", "lr") else all)(row.value.get(columns.get(name)) in (None, "") for row in used):
            columns.pop(name, None)
    if "lr" in columns and not all(_is_positive(row, columns["lr"]) for row in used):
        columns.pop("lr")  # as the rate at the end of a decay to 0
    values = {name: np.array([_number(row, key, name) for row in used]) for name, key in columns.items()}
    same = {name: _same(used, name) for name in ("metric", "count", "rule")}
    same["tokenizer"] = None if same["metric"] == "bits/byte" else _same(used, "tokenizer")
    _check_units(used, values)
    return Points(
        _completed(values), tuple(_text(row, "name") or row.where.rpartition(":")[2] for row in used),
        tuple(_text(row, "workdir") and str(file.parent / _text(row, "workdir")) for row in used),
        left_out=tuple(left_out), path=str(path), sha256=hashlib.sha256(content).hexdigest(), found=found, **same,
    )  # fmt: skip


def _rows(path: str, content: bytes) -> tuple[list[_Row], str | None]:
    """(rows, a sentence on a last line that is cut, or None)."""
    text = content.decode("utf-8-sig", "replace")
    if path.endswith(".json") and text.lstrip().startswith("["):
        try:
            return [_Row(f"{path}: row {i}", row) for i, row in enumerate(json.loads(text), 1)], None
        except (ValueError, TypeError) as error:
            raise InputError(f"{path} is not a list of JSON objects: {error}.") from None
    if text.lstrip().startswith("{"):
        return _json_lines(path, text)
    return _table(path, text)


def _json_lines(path, text):
    rows, lines = [], text.split("\n")
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            value = json.loads(line)
            if not isinstance(value, dict):
                raise ValueError("it is no object")
            rows.append(_Row(f"{path}:{number}", value))
        except ValueError as error:
            if number == len(lines):  # no line end: its writer was stopped
                return rows, _cut(path, number, rows)
            raise InputError(f"{path}:{number}: The line is no JSON object ({error}). Correct or remove it.") from None
    return rows, None


def _cut(path, number, rows) -> str:
    return f"{path}:{number}: The last line is cut and is left out; the {len(rows)} rows before it are used."


def _table(path, text):
    first = text.partition("\n")[0]
    reader = csv.reader(io.StringIO(text), delimiter="\t" if "\t" in first else ";" if ";" in first else ",")
    lines = [(reader.line_num, [cell.strip() for cell in line]) for line in reader if any(map(str.strip, line))]
    if not lines:
        return [], None
    (_, header), *lines = lines
    rows, ended = [], text.endswith("\n")
    for i, (number, line) in enumerate(lines):
        if len(line) != len(header):
            if i == len(lines) - 1 and len(line) < len(header) and not ended:
                return rows, _cut(path, number, rows)
            raise InputError(f"{path}:{number}: The row has {len(line)} cells, the header {len(header)}. Correct it.")
        rows.append(_Row(f"{path}:{number}", dict(zip(header, line, strict=True))))
    return rows, None


def _columns(path, found, given) -> dict[str, str]:
    """{N, D, C, S, lr or loss: the file's own name of it}."""
    plain = {name.strip().lower().replace(" ", "_").replace("-", "_"): name for name in reversed(found)}
    columns = {}
    for ours, aliases in ALIASES.items():
        if ours in given:
            if given[ours] not in found:
                raise InputError(f"--columns: {path} has no column {given[ours]!r}{nearest(given[ours], found)}")
            columns[ours] = given[ours]
        elif there := [plain[alias] for alias in aliases if alias in plain]:
            columns[ours] = there[0]
    if unknown := given.keys() - ALIASES.keys():
        raise InputError(f"--columns={min(unknown)}=… is unknown: it takes {', '.join(ALIASES)}.")
    if "loss" not in columns:
        alike = [name for key, name in plain.items() if "loss" in key]
        told = f"name one of {', '.join(map(repr, alike))} by --columns=loss=COLUMN" if alike else "name it loss"
        raise InputError(f"{path} has no column for the loss, only {', '.join(map(repr, found))}: {told}.")
    if not columns.keys() & {"N", "D", "C", "S"}:
        raise InputError(
            f"{path} has no column for N, D, C or steps, only {', '.join(map(repr, found))}: name them by "
            "--columns=N=COLUMN,D=COLUMN."
        )
    return columns


def _used(rows: list[_Row], cut) -> tuple[list[_Row], list[str]]:
    """(finished runs, a sentence for each row that is left out)."""
    used, left_out = [], [cut] if cut else []
    for row in rows:
        status = _text(row, "status") or "done"
        if status == "done":
            used.append(row)
        else:
            left_out.append(f"{row.where}: {_text(row, 'name') or 'The run'} is left out: its status is {status!r}.")
    return used, left_out


def _text(row: _Row, name: str) -> str | None:
    value = next((value for key, value in row.value.items() if key.lower() == name), None)
    return None if value in (None, "") else str(value)


def _float(row: _Row, key: str) -> float:
    """The number of a cell; nan if it is none."""
    value = row.value.get(key)
    try:
        return math.nan if value is None or isinstance(value, bool) else float(value)
    except (TypeError, ValueError):
        return math.nan


def _is_positive(row: _Row, key: str) -> bool:
    return 0 < _float(row, key) < math.inf


def _number(row: _Row, key: str, name: str) -> float:
    """A positive number. InputError otherwise."""
    if not _is_positive(row, key):
        value = row.value.get(key)
        shown = repr(value) if value is not None else "null" if key in row.value else "missing"
        told = " (a diverged run has the status 'diverged')" if name == "loss" else ""
        raise InputError(
            f"{row.where}: {name} must be a positive number, and column {key!r} is {shown}. Correct the row or remove "
            f"it{told}."
        )
    return _float(row, key)


def _same(rows, name) -> str | None:
    """The one value of a column of texts. InputError: several, with the first row of each."""
    first = {}
    for row in rows:
        first.setdefault(_text(row, name), row.where)
    if len(first) > 1:
        told = ", ".join(f"{value or 'none'} ({where})" for value, where in list(first.items())[:3])
        raise InputError(f"The rows differ in {name}: {told}. Losses compare only where it is the same: use --where.")
    return next(iter(first))


def _check_units(rows, values):
    if not {"N", "D", "C"} <= values.keys():
        return
    ratio = values["C"] / (6 * values["N"] * values["D"])
    off = (ratio > _UNITS) | (ratio < 1 / _UNITS)
    if off.any():
        i = int(off.argmax())
        raise InputError(
            f"{rows[i].where}: C is {ratio[i]:.3g} times 6 N D, which no way of counting explains: N is in parameters, "
            "D in tokens and C in FLOPs, in every row."
        )


def pairs(text: str | None, flag: str) -> dict[str, str]:
    """{key: value} of a flag's K=V,K=V. InputError: a part without `=`."""
    found = {}
    for part in filter(None, (text or "").split(",")):
        key, equals, value = part.partition("=")
        if not equals:
            raise InputError(f"--{flag}={text}: {part!r} is not KEY=VALUE.")
        found[key.strip()] = value.strip()
    return found


def budgets(compute, gap: float = 0.1) -> Iterator[np.ndarray]:
    """Indices of the points of each compute budget, from the smallest: budgets are apart where log C has a gap."""
    order = np.argsort(compute, kind="stable")
    edges = np.flatnonzero(np.diff(np.log(np.asarray(compute)[order])) > gap) + 1
    yield from np.split(order, edges)
