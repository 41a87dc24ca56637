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

    choice      context, choices, gold       which continuation is most likely; `names`: what its metrics call each
                                             choice; `answers`: names that are right, the gold one's if not given
    partial     contexts, continuation, gold which context makes one continuation most likely (Trinh and Le
                                             2018)
    cloze       context, answer              is the answer what greedy decoding gives, and its perplexity
    text        text                         perplexity of whole texts
    threshold   text, label                  is the mean log-probability of a text's tokens above a threshold
    generation  context, answers             text generated up to `stop`, compared with the answers; examples show the
                                             first, or `shown`
    code        context, tests, entry        programs generated and run: pass@k (Chen et al. 2021)

Items of the same `group`, a key of any form, belong together, as the answers to one question or the turns of one
conversation: they are one example, and one unit of the standard errors. Of items that have only a text in common, as
questions on one passage, that is the `cluster`, another key of any form: it is the unit of the standard errors, in the
group's place, and nothing else. {a.b.0} reaches into objects and lists. `prepare = "module:function"` changes a row, or
makes several of it, first.

Where no choice is right, as of the two sentences of a bias benchmark, a form has no `gold`, and a [figures] table says
what is measured instead: figures.py.
"""

import dataclasses
import hashlib
import importlib
import re
import tomllib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from gptjax.config import nearest
from gptjax.data.rows import reach
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
OPTIONAL = {"choice": ("labels", "names", "answers"), "partial": ("labels",), "generation": ("shown",)}
DECISIONS = ("acc", "acc_token", "acc_norm", "acc_bytes")  # what choices are compared by: kinds.py
_METRICS = {
    "cloze": ("acc", "acc_last_token", "perplexity", "log_prob"),
    "text": ("word_perplexity", "byte_perplexity", "token_perplexity", "bits_per_byte"),
    "threshold": ("matthews", "acc", "auc"),
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
    the answer in it, of which the most frequent of all samples is scored. metrics: 'module:function' of (prediction,
    answer) -> float, by name; of choices the prediction is a name. over_answers: 'best', the best answer counts, or
    'leave_one_out' (metrics.leave_one_out). corpus_metrics: 'module:function' of (all predictions, the answers of each)
    -> value, standard error and, for the protocol, a signature if it has one; of choices (predicted, gold, group,
    cluster, an array of numbers each) -> value, standard error. decided_by: the comparison of choices (DECISIONS, or
    acc_answer_context) whose predictions these metrics and the calibration have; `metric` or acc, if not given.
    figures: 'module:function' of (items, samples, decision) -> figures.Figure or None, by name, in place of all other
    metrics; subsets: templates, for whose values each figure is also given of the items that have that value. rows:
    rows in the task file itself, which then needs no files. lines: the files are text, of which each line becomes a row
    {line, file}. join, join_on: patterns of a table whose columns are added to the rows, after `prepare`, that have the
    same values of these fields; without the table nothing is added.
    allow_code_execution: of kind 'code', which runs what the model wrote (code_execution.py).
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
    over_answers: str = "best"
    corpus_metrics: Mapping[str, str] = dataclasses.field(default_factory=dict)
    decided_by: str = ""
    figures: Mapping[str, str] = dataclasses.field(default_factory=dict)
    subsets: tuple[str, ...] = ()
    rows: tuple[Mapping[str, Any], ...] = ()
    lines: bool = False
    join: tuple[str, ...] = ()
    join_on: tuple[str, ...] = ()
    allow_code_execution: bool = False
    sha256: str = ""

    @property
    def takes_examples(self) -> bool:
        """Whether prompts can have solved examples, which whole texts and choices of which none is right cannot."""
        return self.kind not in ("text", "threshold") and all(key in f for f in self.form for key in KINDS[self.kind])

    @property
    def decisions(self) -> tuple[str, ...]:
        """What choices are compared by."""
        return (*DECISIONS, "acc_answer_context") if self.answer_context is not None else DECISIONS

    @property
    def decision(self) -> str:
        """Of `decisions` the one that the choice's other metrics are of."""
        return self.decided_by or (self.metric if self.metric in self.decisions else "acc")

    @property
    def measured(self) -> tuple[str, ...]:
        """Names of the metrics that a result has; of figures those of all items."""
        if self.figures:
            return tuple(self.figures)
        if self.kind == "code":
            return tuple(f"pass@{k}" for k in (1, 10, 100) if k <= self.samples)
        decided = (*self.decisions, "brier", "nll", "ece") if self.kind in ("choice", "partial") else ()
        return (*decided, *_METRICS.get(self.kind, ()), *self.metrics, *self.corpus_metrics)

    def __post_init__(self):
        where = f"Task {self.name}"
        for field in dataclasses.fields(self):
            wanted = type(field.default)
            if wanted in (str, int, float, bool) and not isinstance(
                value := getattr(self, field.name), (int, float) if wanted is float else wanted
            ):
                raise InputError(f"{where}: {field.name}={value!r} must be of type {wanted.__name__}.")
        for key in ("files", "pool", "columns", "stop", "form", "subsets", "rows", "join", "join_on"):
            element = Mapping if key in ("form", "rows") else str
            if not isinstance(value := getattr(self, key), tuple) or not all(isinstance(v, element) for v in value):
                wanted = f"[[{key}]] tables" if element is Mapping else 'a list of texts, as ["a", "b"]'
                raise InputError(f"{where}: {key} must be {wanted}.")
        if self.kind not in KINDS:
            raise InputError(f"{where}: kind={self.kind!r} is unknown{nearest(self.kind, KINDS)}")
        choices = {"fewshot": ("per_item", "fixed"), "over_answers": ("best", "leave_one_out"),
                   "decided_by": self.decisions}  # fmt: skip
        for key, names in choices.items():
            if (value := getattr(self, key)) and value not in names:
                raise InputError(f"{where}: {key}={value!r} is unknown{nearest(value, names)}")
        for key in ("max_new_tokens", "beams", "samples"):
            if getattr(self, key) < 1:
                raise InputError(f"{where}: {key}={getattr(self, key)}: give at least 1.")
        if not self.form:
            raise InputError(f"{where} has no [[form]], which says how its rows become prompts: add one.")
        for form in self.form:
            unneeded = ("gold", "answers") if self.figures else ()
            if missing := [key for key in KINDS[self.kind] if key not in (*form, *unneeded)]:
                raise InputError(f"{where}: a form of kind {self.kind!r} needs {', '.join(missing)}: add them.")
            if wrong := [key for key, value in form.items() if not isinstance(value, str | list)]:
                raise InputError(f"{where}: {wrong[0]} of a form must be text or a list of texts.")
            known = (*KINDS[self.kind], *OPTIONAL.get(self.kind, ()), "group", "cluster")
            if wrong := [key for key in form if key not in known]:
                raise InputError(f"{where}: a form has no key {wrong[0]!r}{nearest(wrong[0], known)}")
        for key in ("metrics", "corpus_metrics", "figures"):
            if not isinstance(getattr(self, key), Mapping):
                raise InputError(f"{where}: {key} must be a table, as [{key}] with f1 = 'module:function' below it.")
        named = (self.prepare, self.detokenize, self.units, self.extract)
        tables = (self.metrics, self.corpus_metrics, self.figures)
        for name in (*filter(None, named), *(name for table in tables for name in table.values())):
            function(name)
        if self.figures and (self.metrics or self.corpus_metrics or self.kind not in ("choice", "generation")):
            raise InputError(f"{where}: [figures] are of kind choice or generation and the only metrics: drop one.")
        if not self.measured:
            raise InputError(f"{where} measures nothing: add [metrics] with f1 = 'module:function' below it.")
        if (self.metric.partition("/")[0] if self.figures else self.metric) not in self.measured:
            raise InputError(f"{where}: metric={self.metric!r} is not measured{nearest(self.metric, self.measured)}")


@dataclasses.dataclass(frozen=True)
class Item:
    """One question. pairs: (context, continuation) of each candidate; of generation and code (context, ''). gold: the
    index of the right pair; None = no choice is right. names: what each choice is called. answers: what a generated
    text, or the name of the predicted choice, is compared with; of code its tests and the function's name. shown: the
    answer as examples show it. text: of the kinds text and threshold. group: of items that belong together; cluster:
    of those that depend on each other, the group if not given; '' = it is alone. where: file and row."""

    where: str
    pairs: tuple[tuple[str, str], ...] = ()
    gold: int | None = 0
    names: tuple[str, ...] = ()
    answers: tuple[str, ...] = ()
    shown: str = ""
    text: str = ""
    group: str = ""
    cluster: str = ""
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
    module, _, attribute = str(name).partition(":")
    try:
        return getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError, ValueError) as error:
        raise InputError(f"There is no function {name!r} ({error}): give module:function.") from None


def make_item(task: Task, row: Mapping[str, Any], where: str = "") -> Item:
    """The item of a row. InputError: fields are missing, the answer is empty or not among the choices."""
    form = next((form for form in task.form if all(reach(row, f) is not None for f in fields_of(form))), None)
    if form is None:
        wanted = " or ".join(", ".join(sorted(fields_of(form))) for form in task.form)
        raise InputError(f"The row has the fields {', '.join(map(repr, row))}; task {task.name} needs {wanted}.")
    common = {"where": where, "row": row, **{key: fill(form.get(key, ""), row) for key in ("group", "cluster")}}
    if task.kind == "text":
        return Item(text=fill(form["text"], row), **common)
    if task.kind == "threshold":
        label = fill(form["label"], row)
        if label not in ("0", "1"):
            raise InputError(f"The label {label!r} is not 0 or 1: fix the row.")
        return Item(gold=int(label), text=fill(form["text"], row), **common)
    if task.kind == "code":
        answers = (fill(form["tests"], row), fill(form["entry"], row))
        return Item(pairs=((fill(form["context"], row), ""),), answers=_some(answers), **common)
    if task.kind == "generation":
        answers = _some(tuple(_texts(form["answers"], row))) if "answers" in form else ("",)
        shown = fill(form["shown"], row) if "shown" in form else answers[0]
        return Item(pairs=((fill(form["context"], row), ""),), answers=answers, shown=shown, **common)
    if task.kind == "cloze":
        (answer,) = _some((fill(form["answer"], row),))
        return Item(pairs=((fill(form["context"], row), task.delimiter + answer),), **common)
    if task.kind == "partial":
        contexts = _texts(form["contexts"], row)
        pairs = tuple((context, task.delimiter + fill(form["continuation"], row)) for context in contexts)
    else:
        context = fill(form["context"], row)
        pairs = tuple((context, task.delimiter + choice) for choice in _texts(form["choices"], row))
    if empty := [i for i, (_, continuation) in enumerate(pairs) if not continuation.strip()]:
        raise InputError(f"Choice {empty[0]} is empty: every choice needs text.")
    gold = _gold(form, row, len(pairs)) if "gold" in form else None
    if gold is None and len(set(pairs)) < len(pairs):
        raise InputError("Two of the texts to compare are the same: fix or remove the row.")
    names = _texts(form["names"], row) if "names" in form else [text[len(task.delimiter) :] for _, text in pairs]
    if len(names) != len(pairs):
        raise InputError(f"There are {len(pairs)} choices and {len(names)} names of them: give one for each.")
    answers = _texts(form["answers"], row) if "answers" in form else names[gold : gold + 1] if gold is not None else []
    return Item(pairs=pairs, gold=gold, names=tuple(names), answers=tuple(answers), **common)


def _some(answers: tuple[str, ...]) -> tuple[str, ...]:
    if not any(answer.strip() for answer in answers):
        raise InputError("The answer is empty, so nothing could be compared with it: fix or remove the row.")
    return answers


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
        if isinstance(value, str) and key in ("choices", "contexts", "answers", "labels", "names") and "{" not in value:
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


def solved(task: Task, group: Sequence[Item]) -> str:
    """The items of a group with their answers, as an example shows them: of generation the last one, since the last
    turn of a conversation has the others in its context; else the first one's context and all right continuations."""
    if task.kind == "generation":
        return group[-1].pairs[0][0] + task.delimiter + group[-1].shown
    return group[0].pairs[group[0].gold][0] + "".join(item.pairs[item.gold][1] for item in group)
