"""A task as a file: published/NAME.toml, or a user's own. It says where the rows are, how they become prompts and what
is measured.

    about = "PIQA (Bisk et al. 2020): which of two solutions reaches a goal"
    kind = "choice"
    metric = "acc_token"                    # the one to report; the others are computed too
    files = ["piqa.jsonl", "piqa/*.jsonl"]  # the first that exists in --data
    answer_context = "Answer:"              # choices are also scored by p(choice | context) / p(choice | this)

    [[form]]                                # how rows may look; the first whose fields are in a row is used
    context = "Question: {goal}\\nAnswer:"
    choices = ["{sol1}", "{sol2}"]          # or the name of a field with a list
    gold = "{label}"                        # its index, or one of `labels`

The kinds, with the keys of a form that each one needs:

    choice      context, choices, gold       which continuation is likeliest
    partial     contexts, continuation, gold which context makes one continuation likeliest (Trinh and Le 2018)
    cloze       context, answer              is the answer what greedy decoding gives, and its perplexity
    text        text                         perplexity of whole texts
    threshold   text, label                  is the mean log-probability of a text's tokens above a threshold
    generation  context, answers             text generated up to `stop`, compared with the answers
    code        context, tests, entry        programs generated and run: pass@k (Chen et al. 2021)

{a.b.0} reaches into objects and lists. `prepare = "module:function"` changes a row, or makes several of it, first.
"""

import dataclasses
import hashlib
import importlib
import re
import tomllib
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from gptjax import paths
from gptjax.config import nearest
from gptjax.data import sources
from gptjax.data.formats import may_hold_rows
from gptjax.data.rows import reach
from gptjax.data.tables import Table
from gptjax.errors import InputError

PUBLISHED = Path(__file__).parent / "published"
KINDS = {
    "choice": ("context", "choices", "gold"),
    "partial": ("contexts", "continuation", "gold"),
    "cloze": ("context", "answer"),
    "text": ("text",),
    "threshold": ("text", "label"),
    "generation": ("context", "answers"),
    "code": ("context", "tests", "entry"),
}


@dataclasses.dataclass(frozen=True)
class Task:
    """A task file's keys.

    about: a line with the source. kind, metric, form: see above. files: patterns of file names under --data. pool: the
    same for the rows that examples are drawn from; empty = the task's own rows, without the one that is asked. columns:
    names of the columns of .csv and .tsv files without a header. description: text before the examples. delimiter:
    between context and answer. separator: between examples. fewshot: 'per_item', examples drawn anew for every item
    (GPT-3 §2.4), or 'fixed', the same for all. answer_context: see above. prepare, detokenize, units: 'module:function' of a row, of a text, and how many units a
    text is counted as (words).
    stop, max_new_tokens, beams, length_penalty, temperature, top_k, top_p, samples: of generation; beams 1 is greedy
    decoding or sampling. extract: 'module:function' of a generated text -> the answer in it, of which the commonest of
    all samples is scored. metrics: 'module:function' of (prediction, answer) -> float, by name; the best answer counts.
    corpus_metrics: the same of (all predictions, the answers of each) -> a tuple that begins with value and standard
    error. allow_code_execution: of kind 'code', which runs what the model wrote (code_execution.py).
    sha256: of the file.
    """

    name: str
    about: str
    kind: str
    metric: str
    form: tuple[Mapping[str, Any], ...]
    files: tuple[str, ...] = ()
    pool: tuple[str, ...] = ()
    columns: tuple[str, ...] = ()
    description: str = ""
    delimiter: str = " "
    separator: str = "\n\n"
    fewshot: str = "per_item"
    answer_context: str | None = None
    prepare: str | None = None
    detokenize: str | None = None
    units: str | None = None
    stop: tuple[str, ...] = ("\n",)
    max_new_tokens: int = 64
    beams: int = 1
    length_penalty: float = 0.6
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    samples: int = 1
    extract: str | None = None
    metrics: Mapping[str, str] = dataclasses.field(default_factory=dict)
    corpus_metrics: Mapping[str, str] = dataclasses.field(default_factory=dict)
    allow_code_execution: bool = False
    sha256: str = ""

    def __post_init__(self):
        where = f"Task {self.name}"
        if self.kind not in KINDS:
            raise InputError(f"{where}: kind={self.kind!r} is unknown{nearest(self.kind, KINDS)}")
        if self.fewshot not in ("per_item", "fixed"):
            raise InputError(f"{where}: fewshot={self.fewshot!r}: choose per_item or fixed.")
        if not self.form:
            raise InputError(f"{where} has no [[form]], which says how its rows become prompts: add one.")
        for form in self.form:
            if missing := [key for key in KINDS[self.kind] if key not in form]:
                raise InputError(f"{where}: a form of kind {self.kind!r} needs {', '.join(missing)}: add them.")


@dataclasses.dataclass(frozen=True)
class Item:
    """One question. pairs: (context, continuation) of each candidate; of generation and code (context, ''). gold: the
    index of the right pair. answers: what a generated text is compared with; of code its tests and the
    function's name. text: of the kinds text and threshold. where: file and
    row."""

    where: str
    pairs: tuple[tuple[str, str], ...] = ()
    gold: int = 0
    answers: tuple[str, ...] = ()
    text: str = ""
    row: Mapping[str, Any] = dataclasses.field(default_factory=dict)


def available() -> list[str]:
    """Names of the tasks that come with gptjax."""
    return sorted(path.stem for path in PUBLISHED.glob("*.toml"))


def load_task(name: str) -> Task:
    """A task by name, or a .toml file. InputError: it does not exist or cannot be read; unknown keys."""
    path = Path(name) if name.endswith(".toml") else PUBLISHED / f"{name}.toml"
    if not path.exists():
        if name.endswith(".toml"):
            raise InputError(f"The task file {name} does not exist.")
        raise InputError(f"There is no task {name!r}{nearest(name, available())} A task of your own is a .toml file.")
    try:
        keys = tomllib.loads(path.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise InputError(f"The task file {path} cannot be read ({error}): fix it.") from None
    known = {field.name for field in dataclasses.fields(Task)} - {"name", "sha256"}
    for key in keys:
        if key not in known:
            raise InputError(f"{path}: there is no key {key!r}{nearest(key, known)}")
    if missing := [key for key in ("about", "kind", "metric", "form") if key not in keys]:
        raise InputError(f"{path}: {', '.join(missing)} must be given.")
    values = {key: tuple(value) if isinstance(value, list) else value for key, value in keys.items()}
    return Task(name=path.stem, sha256=hashlib.sha256(path.read_bytes()).hexdigest(), **values)


def function(name: str) -> Callable:
    """'module:function' -> the function. InputError: there is none."""
    module, _, attribute = name.partition(":")
    try:
        return getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError, ValueError) as error:
        raise InputError(f"There is no function {name!r} ({error}): give module:function.") from None


def find_file(task: Task, data: str, patterns: Sequence[str]) -> str:
    """The first of a task's files in a folder. InputError: none of them is there."""
    if paths.local(data).is_file():
        return str(data)
    root = Path(paths.local(data))
    for pattern in patterns:
        if found := sorted(root.glob(pattern)):
            return str(found[0] if len(found) == 1 else root / pattern)
    fields = " or ".join(", ".join(sorted(fields_of(form))) for form in task.form)
    raise InputError(
        f"{data} has no file for the task {task.name}: it looks for {', '.join(patterns) or 'none'}, rows (.jsonl, "
        f".json, .csv, .parquet) with the fields {fields}."
    )


def load_items(task: Task, source: str) -> list[Item]:
    """All items of a source of rows. InputError: a row that has none of the task's forms, or an empty one."""
    prepare = function(task.prepare) if task.prepare else lambda row: [row]
    items = []
    for row in _rows(task, source):
        try:
            prepared = prepare(row.value)
            values = [prepared] if isinstance(prepared, Mapping) else prepared
            items += [make_item(task, value, row.where) for value in values]
        except InputError as error:
            raise InputError(f"{row.where}: {error}") from None
        except (KeyError, TypeError, ValueError) as error:  # of a prepare function
            raise InputError(f"{row.where}: {task.prepare} cannot read the row ({error!r}): fix it.") from None
    if not items:
        raise InputError(f"{source} has no rows for the task {task.name}.")
    return items


def _rows(task: Task, source: str) -> Iterable[sources.Row]:
    """The rows of a source; of texts, whose files need no rows, {text} of each."""
    if task.kind == "text" and paths.local(source).is_file() and not may_hold_rows(source):
        return [sources.Row(document.name, {"text": document.text}) for document in sources.documents(source)]
    return sources.rows(source, table=Table(columns=task.columns or None))


def make_item(task: Task, row: Mapping[str, Any], where: str = "") -> Item:
    """The item of a row. InputError: fields are missing, the answer is empty or not among the choices."""
    form = next((form for form in task.form if all(reach(row, f) is not None for f in fields_of(form))), None)
    if form is None:
        wanted = " or ".join(", ".join(sorted(fields_of(form))) for form in task.form)
        raise InputError(f"The row has the fields {', '.join(map(repr, row))}; task {task.name} needs {wanted}.")
    if task.kind == "text":
        return Item(where, text=fill(form["text"], row), row=row)
    if task.kind == "threshold":
        label = fill(form["label"], row)
        if label not in ("0", "1"):
            raise InputError(f"The label {label!r} is not 0 or 1: fix the row.")
        return Item(where, gold=int(label), text=fill(form["text"], row), row=row)
    if task.kind in ("generation", "code"):
        code = task.kind == "code"
        answers = (fill(form["tests"], row), fill(form["entry"], row)) if code else tuple(_texts(form["answers"], row))
        if not any(answer.strip() for answer in answers):
            raise InputError("The answer is empty: nothing could be compared with it.")
        return Item(where, ((fill(form["context"], row), ""),), answers=answers, row=row)
    if task.kind == "cloze":
        answer = fill(form["answer"], row)
        if not answer.strip():
            raise InputError("The answer is empty: nothing could be scored.")
        return Item(where, ((fill(form["context"], row), task.delimiter + answer),), row=row)
    if task.kind == "partial":
        contexts = _texts(form["contexts"], row)
        pairs = tuple((context, task.delimiter + fill(form["continuation"], row)) for context in contexts)
    else:
        context = fill(form["context"], row)
        pairs = tuple((context, task.delimiter + choice) for choice in _texts(form["choices"], row))
    if empty := [i for i, pair in enumerate(pairs) if not pair[0].strip() + pair[1].strip()]:
        raise InputError(f"Choice {empty[0]} is empty: every choice needs text.")
    return Item(where, pairs, _gold(form, row, len(pairs)), row=row)


def _gold(form: Mapping[str, Any], row: Mapping[str, Any], choices: int) -> int:
    given = fill(form["gold"], row)
    labels = _texts(form["labels"], row) if "labels" in form else [str(i) for i in range(choices)]
    if len(labels) < choices:
        raise InputError(f"There are {choices} choices for the labels {', '.join(labels)}: fix the row.")
    if given not in labels[:choices]:
        raise InputError(f"The answer {given!r} is not among {', '.join(labels[:choices])}: fix the row.")
    return labels.index(given)


_FIELD = re.compile(r"\{([^{}]+)\}")


def fields_of(form: Mapping[str, Any]) -> set[str]:
    """The fields of a row that a form's templates name."""
    found = set()
    for key, value in form.items():
        if isinstance(value, str) and key in ("choices", "contexts", "answers", "labels") and "{" not in value:
            found.add(value)
        else:
            for template in [value] if isinstance(value, str) else value:
                found.update(_FIELD.findall(template))
    return found


def fill(template: str, row: Mapping[str, Any]) -> str:
    """A template with a row's fields in it. InputError: a field is not text or a number."""

    def value(match: re.Match) -> str:
        found = reach(row, match[1])
        if not isinstance(found, str | int | float):
            raise InputError(f"The field {match[1]!r} is {type(found).__name__}, not text.")
        return str(found)

    return _FIELD.sub(value, template)


def _texts(given: str | Sequence[str], row: Mapping[str, Any]) -> list[str]:
    """A list of templates filled, or the texts of the list in a field."""
    if not isinstance(given, str):
        return [fill(template, row) for template in given]
    if "{" in given:
        return [fill(given, row)]
    found = reach(row, given)
    found = [found] if isinstance(found, str) else found
    if not isinstance(found, Sequence) or not all(isinstance(x, str | int | float) for x in found) or not found:
        raise InputError(f"The field {given!r} must be a list of texts with at least one.")
    return [str(x) for x in found]


def solved(task: Task, item: Item) -> str:
    """An item with its answer, as an example shows it."""
    context, continuation = item.pairs[item.gold]
    return context + (task.delimiter + item.answers[0] if task.kind == "generation" else continuation)
