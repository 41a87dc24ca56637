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
    gold = "{label}"                        # its index, or one of `labels`: ["A", "B"], or [["no", "0"], ["yes", "1"]]

The kinds, with the keys of a form that each one needs:

    choice      context, choices, gold       which continuation is likeliest
    partial     contexts, continuation, gold which context makes one continuation likeliest (Trinh and Le 2018)
    cloze       context, answer              is the answer what greedy decoding gives, and its perplexity
    text        text                         perplexity of whole texts
    threshold   text, label                  is the mean log-probability of a text's tokens above a threshold
    generation  context, answers             text generated up to `stop`, compared with the answers; examples show the
                                             first, or `shown`
    code        context, tests, entry        programs generated and run: pass@k (Chen et al. 2021)

{a.b.0} reaches into objects and lists. `prepare = "module:function"` changes a row, or makes several of it, first.
"""

import dataclasses
import hashlib
import importlib
import itertools
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

    about: a line with the source. kind, metric, form: see above. files: patterns of file names under --data, of which
    training files count only where a pattern says train. pool: the same for the rows that examples are drawn from;
    where there are none, the task's own rows, without the one that is asked. columns: names of the columns of .csv and
    .tsv files without a header. description: text before the examples. delimiter: between context and answer.
    separator: between examples. fewshot: 'per_item', examples drawn anew for every item (GPT-3 §2.4), or 'fixed', the
    same for all. answer_context: see above. prepare, detokenize, units: 'module:function' of a row, of a text, and how
    many units (words) a text counts as. stop, max_new_tokens, beams, length_penalty, temperature, top_k, top_p,
    samples: of generation; beams 1 is greedy decoding or sampling. extract: 'module:function' of a generated text ->
    the answer in it, of which the commonest of all samples is scored. metrics: 'module:function' of (prediction,
    answer) -> float, by name; the best answer counts. corpus_metrics: the same of (all predictions, the answers of
    each) -> value, standard error and, for the protocol, a signature if it has one. allow_code_execution: of kind
    'code', which runs what the model wrote (code_execution.py).
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

    @property
    def takes_examples(self) -> bool:
        """Whether prompts can have solved examples, which whole texts cannot."""
        return self.kind not in ("text", "threshold")

    def __post_init__(self):
        where = f"Task {self.name}"
        for key in ("files", "pool", "columns", "stop", "form"):
            element = Mapping if key == "form" else str
            if not isinstance(value := getattr(self, key), tuple) or not all(isinstance(v, element) for v in value):
                wanted = "[[form]] tables" if key == "form" else 'a list of texts, as ["a", "b"]'
                raise InputError(f"{where}: {key} must be {wanted}.")
        if self.kind not in KINDS:
            raise InputError(f"{where}: kind={self.kind!r} is unknown{nearest(self.kind, KINDS)}")
        if self.fewshot not in ("per_item", "fixed"):
            raise InputError(f"{where}: fewshot={self.fewshot!r}: choose per_item or fixed.")
        if not self.form:
            raise InputError(f"{where} has no [[form]], which says how its rows become prompts: add one.")
        for form in self.form:
            if missing := [key for key in KINDS[self.kind] if key not in form]:
                raise InputError(f"{where}: a form of kind {self.kind!r} needs {', '.join(missing)}: add them.")
            if wrong := [key for key, value in form.items() if not isinstance(value, str | list)]:
                raise InputError(f"{where}: {wrong[0]} of a form must be text or a list of texts.")


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
    raise InputError(
        f"{data} has no file for the task {task.name}: it looks for {', '.join(patterns) or 'none'}, rows (.jsonl, "
        f".json, .csv, .parquet) with the fields {fields}."
    )


def find_pool(task: Task, data: str) -> list[str]:
    """The files with the rows that examples are drawn from; if data is a file, next to it. Empty: there are none.
    InputError: the task needs them, for its threshold."""
    folder = Path(paths.local(data))
    folder = folder.parent if folder.is_file() else folder
    found = [file for file in _found(task, folder, task.pool) if file != str(paths.local(data))]
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


def load_items(task: Task, *files: str) -> list[Item]:
    """All items of files of rows. InputError: a row that has none of the task's forms, or an empty one."""
    prepare = function(task.prepare) if task.prepare else lambda row: [row]
    items = []
    for row in itertools.chain.from_iterable(_rows(task, file) for file in files):
        try:
            prepared = prepare(row.value)
            values = [prepared] if isinstance(prepared, Mapping) else prepared
            items += [make_item(task, value, row.where) for value in values]
        except InputError as error:
            raise InputError(f"{row.where}: {error}") from None
        except (AttributeError, LookupError, TypeError, ValueError) as error:  # of a prepare function
            raise InputError(f"{row.where}: {task.prepare} cannot read the row ({error!r}): fix it.") from None
    if not items:
        raise InputError(f"{', '.join(files)}: no rows for the task {task.name}.")
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
        if task.kind == "code":
            answers = (fill(form["tests"], row), fill(form["entry"], row))
        else:
            shown = [fill(form["shown"], row)] if "shown" in form else []
            answers = tuple(dict.fromkeys([*shown, *_texts(form["answers"], row)]))
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
    if empty := [i for i, (_, continuation) in enumerate(pairs) if not continuation.strip()]:
        raise InputError(f"Choice {empty[0]} is empty: every choice needs text.")
    return Item(where, pairs, _gold(form, row, len(pairs)), row=row)


def _gold(form: Mapping[str, Any], row: Mapping[str, Any], choices: int) -> int:
    given = fill(form["gold"], row)
    labels = form.get("labels", [str(i) for i in range(choices)])
    if isinstance(labels, str):
        labels = _texts(labels, row)
    spellings = [[label] if isinstance(label, str) else label for label in labels]
    names = [" or ".join(of_one) for of_one in spellings[:choices]]
    if len(labels) < choices:
        raise InputError(f"There are {choices} choices for the labels {', '.join(names)}: fix the row.")
    found = next((i for i, of_one in enumerate(spellings[:choices]) if given in of_one), None)
    if found is None:
        raise InputError(f"The answer {given!r} is not among {', '.join(names)}: fix the row.")
    return found


_FIELD = re.compile(r"\{([^{}]+)\}")


def fields_of(form: Mapping[str, Any]) -> set[str]:
    """The fields of a row that a form's templates name."""
    found = set()
    for key, value in form.items():
        if isinstance(value, str) and key in ("choices", "contexts", "answers", "labels") and "{" not in value:
            found.add(value)
        else:
            for template in [value] if isinstance(value, str) else value:
                found.update(_FIELD.findall(template) if isinstance(template, str) else ())
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
